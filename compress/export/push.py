"""An export to the Hugging Face Hub, with the hub's own client."""

from __future__ import annotations

from pathlib import Path

from compress.common.errors import UserError, first_line
from compress.models.hub import HubName, failures

LOGIN = "a token that may write: `hf auth login`, or HF_TOKEN in the environment"


def check_push(name: str) -> None:
    """See, before anything is exported, that a push can begin.

    Raises:
        UserError: the name is not `owner/name`, or there is no token.
    """
    from huggingface_hub import get_token

    wanted = HubName.parse(name)
    if wanted is None or wanted.revision is not None:
        raise UserError(f"--push {name!r}: not a name that the hub allows", "owner/name, such as me/my-model-int8")
    if get_token() is None:
        raise UserError(f"--push {name}: the hub wants to know who writes", LOGIN)


def push(folder: Path, name: str) -> str:
    """Write a folder to a model's repository on the hub, which is made where there is none; files of other names stay.

    The folder's card names licence and base model in its front matter, which the hub shows and checks.

    Args:
        folder: an export.
        name: `owner/name`.

    Returns:
        The model's address on the hub.

    Raises:
        UserError: the token may not write there, the hub does not accept the card, or it cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    caught: tuple[type[Exception], ...] = (*failures(), ValueError, RuntimeError)  # the last two: of a card, of a broken upload
    try:
        page = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add what compress export wrote")
    except caught as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(f"--push {name}: the hub does not let this token write there ({status})", LOGIN) from error
        later = f"the export is in {folder}; to send it later: hf upload {name} {folder}"
        raise UserError(f"--push {name}: {first_line(error)}", later) from error
    return str(page)
