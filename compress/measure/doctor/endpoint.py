"""Embeddings over HTTP: the OpenAI protocol and that of text-embeddings-inference. The standard library alone."""

from __future__ import annotations

import base64
import binascii
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException, HTTPMessage
from typing import IO, Any

import numpy as np

from compress.common.errors import UserError
from compress.measure.doctor.answers import Answers, Facts, Side

OPENAI, TEI = "OpenAI protocol", "text-embeddings-inference"
# Answers that are about the text and not about the endpoint: bad request, too large, unprocessable.
ABOUT_THE_TEXT = (400, 413, 422)
NOT_THERE = (404, 405)
SHOWN_CHARACTERS = 160


class HTTPStatus(Exception):
    """An answer that is not 200."""

    def __init__(self, code: int, body: str) -> None:
        super().__init__(f"HTTP {code}: {body}")
        self.code = code


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET, and the key would go with it to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        return None


def is_url(name: str) -> bool:
    """Whether a model is named by an address."""
    return name.startswith(("http://", "https://"))


class Endpoint(Side):
    """A server that embeds. Texts are sent one by one, so that one which is refused does not take others with it."""

    def __init__(self, address: str, key_variable: str | None, timeout: float) -> None:
        """Find out how the server is asked.

        Args:
            address: `http://HOST/v1/embeddings` (OpenAI protocol), `http://HOST/embed` (text-embeddings-inference) or
                `http://HOST`, which is tried as both; `#NAME` at the end names the model, where the server has several.
            key_variable: environment variable that holds the API key; None: no key is sent.
            timeout: seconds for each request.

        Raises:
            UserError: the variable is not set, or nothing there embeds.
        """
        super().__init__(address, None)
        url, _, model = address.partition("#")
        self._timeout = timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key_variable is not None:
            if not os.environ.get(key_variable):
                raise UserError(f"environment variable {key_variable!r} is not set", "--api-key-env names the one with the key")
            self._headers["Authorization"] = f"Bearer {os.environ[key_variable]}"
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._url, self.protocol = self._found(url.rstrip("/"))
        self._model = self._model_name(model) if self.protocol == OPENAI else ""

    def _found(self, url: str) -> tuple[str, str]:
        """Return the address that takes texts, and its protocol."""
        if url.endswith("/embeddings"):
            return url, OPENAI
        if url.endswith("/embed"):
            return url, TEI
        if url.endswith("/v1"):
            return f"{url}/embeddings", OPENAI
        candidates = [(f"{url}/v1/embeddings", OPENAI), (f"{url}/embed", TEI)]
        for candidate, protocol in candidates:
            try:
                self._request(candidate, {})  # what is wrong with an empty request is not asked; whether it is read is
            except HTTPStatus as status:
                if status.code in NOT_THERE:
                    continue
                self._check_allowed(candidate, status)
            return candidate, protocol
        raise UserError(f"{url}: embeds at neither {' nor '.join(path for path, _ in candidates)}", "give the whole address")

    def _model_name(self, given: str) -> str:
        """Return the model's name: the one that was given, or the only one that the server has."""
        if given:
            return given
        listing = self._url.removesuffix("/embeddings") + "/models"
        try:
            names = [str(entry["id"]) for entry in self._request(listing, None)["data"]]
        except (HTTPStatus, KeyError, TypeError) as error:
            raise UserError(f"{self._url}: does not list its models ({error})", f"name it: {self._url}#MODEL") from error
        if len(names) != 1:
            raise UserError(f"{self._url}: has {len(names)} models: {', '.join(names)}", f"name one: {self._url}#MODEL")
        return names[0]

    def answer(self, texts: Sequence[str], prompt: str | None) -> Answers:
        """Encode texts; see `Side.answer`. Without a prompt the server's own conduct is what is asked for."""
        rows: list[Sequence[float] | None] = []
        refused: dict[int, str] = {}
        for index, text in enumerate(texts):
            try:
                rows.append(self._embed((prompt or "") + text))
            except HTTPStatus as status:
                self._check_allowed(self._url, status)
                if status.code not in ABOUT_THE_TEXT:
                    raise UserError(f"{self._url}: {status}") from status
                rows.append(None)
                refused[index] = str(status)
        if all(row is None for row in rows):
            raise UserError(f"{self._url}: refuses every text: {next(iter(refused.values()))}")
        if len({len(row) for row in rows if row is not None}) > 1:
            raise UserError(f"{self._url}: gives vectors of several widths")
        return Answers.of(rows, refused)

    def facts(self) -> Facts:
        """Return what is known of a server: its protocol, and its model's name."""
        return Facts(name=self.name, kind=f"endpoint, {self.protocol}" + (f", model {self._model}" if self._model else ""))

    def _embed(self, text: str) -> Sequence[float]:
        if self.protocol == OPENAI:
            found = self._request(self._url, {"model": self._model, "input": [text], "encoding_format": "float"})
        else:
            found = self._request(self._url, {"inputs": [text], "truncate": True})
        try:
            vector = found["data"][0]["embedding"] if self.protocol == OPENAI else found[0]
            if isinstance(vector, str):
                vector = np.frombuffer(base64.b64decode(vector, validate=True), dtype="<f4").tolist()
            values = [float(value) for value in vector]
        except (KeyError, IndexError, TypeError, ValueError, binascii.Error) as error:
            shown = json.dumps(found)[:SHOWN_CHARACTERS]
            raise UserError(f"{self._url}: no vector in its answer: {shown}", f"it was asked in the {self.protocol}") from error
        if not values:
            raise UserError(f"{self._url}: gave an empty vector")
        return values

    def _check_allowed(self, url: str, status: HTTPStatus) -> None:
        if status.code in (401, 403):
            raise UserError(f"{url}: {status}", "--api-key-env NAME names the environment variable with the key") from status
        if 300 <= status.code < 400:
            raise UserError(f"{url}: redirects ({status.code}); keys are not sent on", "give the address that answers") from status

    def _request(self, url: str, body: dict[str, Any] | None) -> Any:
        """Send JSON (GET where there is no body) and return the JSON that comes back.

        Raises:
            HTTPStatus: the answer is not 200.
            UserError: there is no answer in time, or it is not JSON.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers=self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise HTTPStatus(error.code, error.read(2 * SHOWN_CHARACTERS).decode("utf-8", "replace")[:SHOWN_CHARACTERS]) from error
        except (OSError, HTTPException, ValueError) as error:  # URLError and a time-out are OSErrors
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise UserError(f"{url}: cannot be asked ({reason})") from error
        try:
            return json.loads(content)
        except ValueError as error:
            shown = content[:SHOWN_CHARACTERS].decode("utf-8", "replace")
            raise UserError(f"{url}: its answer is not JSON: {shown}") from error
