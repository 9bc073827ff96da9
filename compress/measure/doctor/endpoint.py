"""A server as one of the two sides that are compared."""

from __future__ import annotations

from collections.abc import Sequence

from compress.common.errors import UserError
from compress.measure.doctor.answers import Answers, Facts, Side
from compress.models.embedder import Vectors
from compress.runtimes.remote import ABOUT_THE_TEXT, Client, HTTPStatus


class Endpoint(Side):
    """A server that embeds. Texts are sent one by one, so that one which is refused does not take others with it."""

    def __init__(self, address: str, key_variable: str | None, timeout: float) -> None:
        """Find out how the server is asked; see `compress.runtimes.remote.Client`."""
        self._client = Client(address, key_variable, timeout)
        super().__init__(address, self._client.described.get("prompts"))

    def answer(self, texts: Sequence[str], prompt: str | None) -> Answers:
        """Encode texts; see `Side.answer`. Without a prompt the server's own conduct is what is asked for."""
        url = self._client.url
        rows: list[Vectors | None] = []
        refused: dict[int, str] = {}
        for index, text in enumerate(texts):
            try:
                rows.append(self._client.embed([text], prompt)[0])
            except HTTPStatus as status:
                self._client.check_allowed(status)
                if status.code not in ABOUT_THE_TEXT:
                    raise UserError(f"{url}: {status}") from status
                rows.append(None)
                refused[index] = str(status)
        if all(row is None for row in rows):
            raise UserError(f"{url}: refuses every text: {next(iter(refused.values()))}")
        if len({len(row) for row in rows if row is not None}) > 1:
            raise UserError(f"{url}: gives vectors of several widths")
        return Answers.of(rows, refused)

    def facts(self) -> Facts:
        """Return what is known of a server: its protocol, its model's name, and what our own server says of it."""
        told, model = self._client.described, self._client.model
        return Facts(
            name=self.name,
            kind=f"endpoint, {self._client.protocol}" + (f", model {model}" if model else ""),
            prompts=self.prompts,
            default_prompt=told.get("default_prompt"),
            max_length=told.get("max_input_tokens"),
            dtype=told.get("dtype"),
            weights=told.get("weights"),
        )
