"""Models on the Hugging Face Hub: from a name there to a folder in the hub's cache, whose layout is known here. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from compress.common.errors import UserError, first_line
from compress.common.inputs import read_text
from compress.models.text.router import every_module
from compress.models.text.sentence_transformers import read_modules

# A star crosses folders, so that each of these is found in every module's folder too (2_Dense, 0_Transformer). Never code.
SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja", "README.md")
WEIGHTS = ("*.safetensors",)
# Downloaded by `compress convert` alone.
PICKLES = ("*pytorch_model*.bin", "*adapter_model.bin")
# The same weights in other libraries' formats, and what training left behind.
UNUSED = ("onnx/*", "openvino/*", "coreml/*", "gguf/*", "original/*", "consolidated*.safetensors", "checkpoint-*/*", ".*")
# Modules of sentence-transformers that have weights of their own.
WEIGHED = frozenset({"Transformer", "Dense", "LayerNorm", "WeightedLayerPooling", "StaticEmbedding"})
CACHED = "models--"
COMMIT_BYTES = 1024


@dataclass(frozen=True)
class HubName:
    """A model on the hub, and which revision of it; None: the newest."""

    name: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName | None:
        """Read `owner/name` or `owner/name@revision`; None where a text is neither."""
        found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", text)
        return cls(*found.groups()) if found else None

    def __str__(self) -> str:
        """Return it as it is typed."""
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def download(model: HubName, *, weights: bool = True, pickles: bool = False) -> Path:
    """Return a model's folder in the hub's cache; only what is not there yet is downloaded, and nothing with HF_HUB_OFFLINE=1.

    Args:
        model: which one.
        weights: whether its weights are wanted too, and not only configs and tokenizer.
        pickles: whether pickled weights are accepted; they are downloaded and not opened.

    Raises:
        UserError: there is no such model or revision, a token is missing or has no access, the hub cannot be reached, the disk is
            full, or its weights are pickles and these are not accepted.
    """
    from huggingface_hub import snapshot_download

    wanted = [*SETTINGS, *(WEIGHTS if weights or pickles else ()), *(PICKLES if pickles else ())]
    try:
        found = snapshot_download(model.name, revision=model.revision, allow_patterns=wanted, ignore_patterns=list(UNUSED))
    except failures() as error:
        raise _refusal(model, error) from error
    folder = Path(found)
    if weights and not pickles:
        _refuse_pickles(model, folder)
    return folder


def failures() -> tuple[type[Exception], ...]:
    """Return what the hub's client raises: its own errors, those of the HTTP library below it, and of the disk."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Of httpx or httpx2, by the client's version; a connection that breaks off for good is raised as it is.
    http_error: type[Exception] = HfHubHTTPError.__bases__[0]
    return (OSError, http_error, HFValidationError)


def _refusal(model: HubName, error: Exception) -> UserError:
    """Say what a failed download means and what mends it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the client looked in the cache after this
    refused = _refused_access(model, error)
    what, mend = refused if refused is not None else _unreachable(model, error)
    return UserError(f"model '{model}': {what}", mend)


def _refused_access(model: HubName, error: Exception) -> tuple[str, str] | None:
    """Say what the hub refused, and what mends it; None where it was something else that went wrong."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page, login = f"{constants.ENDPOINT}/{model.name}", "`hf auth login`, or HF_TOKEN in the environment"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        if status == 401:
            return "gated, and no token was sent", f"ask for access on {page}, then give a token: {login}"
        return "gated, and the token has no access to it", f"ask for access on {page} with the account of the token"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has no such revision", f"branches, tags and commits: {page}/commits/main"
    if status == 401 and "Invalid credentials" in str(getattr(error, "server_message", "")):
        return "the hub does not accept the token", f"give another one: {login}"
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        missing = "no such folder here, and on the hub no such model, or a private one"
        if get_token() is None:
            return missing, f"a private model needs a token: {login}"
        return f"{missing} that the token may not read", f"a private model needs a token of an account that may read it: {login}"
    if status == 403:
        return "the token may not read it", f"its rights: {constants.ENDPOINT}/settings/tokens"
    return None


def _unreachable(model: HubName, error: Exception) -> tuple[str, str]:
    """Say why a download did not end, and what mends it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    if isinstance(error, HFValidationError):
        return f"not a name that the hub allows ({first_line(error)})", "owner/name, or owner/name@revision"
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, and the hub's cache does not hold all of it ({constants.HF_HUB_CACHE})",
            f"download it once with the network: HF_HUB_OFFLINE=0 hf download {model.name}",
        )
    return (
        f"no such folder here, and it cannot be downloaded from {constants.ENDPOINT} ({first_line(error)})",
        "the same command continues a download that broke off; a local folder or a built-in model needs none",
    )


def _refuse_pickles(model: HubName, folder: Path) -> None:
    """Refuse a model of which a part has its weights only as a pickle: none was downloaded, and nothing else would say so."""
    from huggingface_hub import list_repo_files

    places = [module.folder for module in every_module(read_modules(folder)) if module.kind in WEIGHED] or [folder]
    without = {place.relative_to(folder).as_posix() for place in places if not any(place.glob("*.safetensors"))}
    if not without:
        return
    try:
        names = list_repo_files(model.name, revision=folder.name)
    except failures() as error:
        raise _refusal(model, error) from error
    found = [name for name in pickled(names) if Path(name).parent.as_posix() in without]
    if found:
        raise UserError(
            f"model '{model}': its weights are pickles ({', '.join(found)}), which can run code when opened",
            f"write them as safetensors first: compress convert {model} --to FOLDER",
        )


def pickled(names: Iterable[str]) -> list[str]:
    """Return the names of files that hold pickled weights."""
    return sorted(name for name in names if re.search(r"(?:^|/)(?:pytorch_model[^/]*|adapter_model)\.bin$", name))


def snapshot_of(folder: Path) -> Path:
    """Return the snapshot that a model's folder in the hub's cache (`models--owner--name`) stands for; any other folder as it is.

    Raises:
        UserError: it holds none, or several and none of them is `main`.
    """
    snapshots = folder / "snapshots"
    if not folder.name.startswith(CACHED) or not snapshots.is_dir():
        return folder
    main = folder / "refs" / "main"
    if main.is_file():
        commit = read_text(main, COMMIT_BYTES).strip()
        if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
            raise UserError(f"{main}: names no commit, but {commit[:80]!r}", "give one of the folders in snapshots/")
        if (snapshots / commit).is_dir():
            return snapshots / commit
    there = sorted(snapshots.iterdir())
    if len(there) != 1:
        raise UserError(f"{folder}: holds {len(there)} snapshots, none of them main", "give one of the folders in snapshots/")
    return there[0]


def cached_name(folder: Path) -> str | None:
    """Return `owner/name` of a snapshot in the hub's cache, whose folder is named after a commit; None for any other folder."""
    place = folder.resolve()
    if place.parent.name != "snapshots" or not place.parents[1].name.startswith(CACHED):
        return None
    return place.parents[1].name.removeprefix(CACHED).replace("--", "/")


def check_links(folder: Path) -> None:
    """See that no file that a model needs is a link to nothing, as a cleaned or half-copied cache leaves them.

    Raises:
        UserError: one is; names it, and what downloads it again.
    """
    kinds = {".safetensors", ".json", ".txt", ".model", ".jinja"}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if path.suffix in kinds and path.is_symlink() and not path.exists():
            name = cached_name(folder)
            mend = f"give {name} instead of the folder: that downloads what is missing" if name else "download or copy it again"
            raise UserError(f"{path}: a link to {path.readlink()}, where there is no file", mend)
