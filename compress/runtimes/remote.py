"""A server that embeds, over HTTP: the OpenAI protocol and that of text-embeddings-inference. The standard library alone."""

from __future__ import annotations

import base64
import binascii
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, HTTPMessage
from itertools import islice
from typing import IO, Any

import numpy as np

from compress.common.errors import BadTextError, UserError
from compress.models.embedder import LONG_WORK_TEXTS, Vectors, checked_chunks, with_progress
from compress.models.text.spec import EmbedderSpec

OPENAI, TEI = "OpenAI protocol", "text-embeddings-inference"
# Answers that are about the text and not about the server: bad request, too large, unprocessable.
ABOUT_THE_TEXT = (400, 413, 422)
NOT_THERE = (404, 405)
BUSY = (429, 503)
"""Answers after which the same request may come again."""
TRIES, LONGEST_PAUSE = 6, 30.0
SHOWN_CHARACTERS = 160
OURS = "compress"
"""What our server says that it is, as the owner of its models; such a server takes a prompt apart from the text."""
AT_A_TIME, REQUEST_CHARACTERS, CONNECTIONS = 64, 200_000, 4
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


class HTTPStatus(Exception):
    """An answer that is not 200."""

    def __init__(self, code: int, body: str, retry_after: str | None = None) -> None:
        super().__init__(f"HTTP {code}: {body}")
        self.code, self.retry_after = code, retry_after

    @property
    def pause(self) -> float | None:
        """Seconds after which the server wants to be asked again; None: it does not say."""
        given = self.retry_after or ""
        return min(float(given), LONGEST_PAUSE) if given.isdecimal() else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET, and the key would go with it to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        return None


def is_url(name: str) -> bool:
    """Whether a model is named by an address."""
    return name.startswith(("http://", "https://"))


class Client:
    """Asks a server for vectors."""

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
        url, _, model = address.partition("#")
        self._timeout, self._asked = timeout, url
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key_variable is not None:
            if not os.environ.get(key_variable):
                raise UserError(f"environment variable {key_variable!r} is not set", "--api-key-env names the one with the key")
            self._headers["Authorization"] = f"Bearer {os.environ[key_variable]}"
        self._opener = urllib.request.build_opener(_NoRedirect)
        self.url, self.protocol = self._found(url.rstrip("/"))
        self.described: Mapping[str, Any] = {}
        """What our server says of the model; empty for other servers."""
        self.model = self._model_name(model) if self.protocol == OPENAI else ""

    @property
    def takes_prompts(self) -> bool:
        """Whether the server takes a prompt apart from the texts, as ours does."""
        return bool(self.described)

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
                self.check_allowed(status)
            return candidate, protocol
        raise UserError(f"{url}: embeds at neither {' nor '.join(path for path, _ in candidates)}", "give the whole address")

    def _model_name(self, given: str) -> str:
        """Return the model's name: the one that was given, or the only one that the server has."""
        listing = self.url.removesuffix("/embeddings") + "/models"
        try:
            entries = {str(entry["id"]): entry for entry in self._request(listing, None)["data"]}
        except (HTTPStatus, KeyError, TypeError, UserError) as error:
            if given:  # and a server need not list its models
                return given
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.url}: does not list its models ({error})", f"name it: {self.url}#MODEL") from error
        if not given and len(entries) != 1:
            raise UserError(f"{self.url}: has {len(entries)} models: {', '.join(entries)}", f"name one: {self.url}#MODEL")
        name = given or next(iter(entries))
        entry = entries.get(name, {})
        self.described = entry if entry.get("owned_by") == OURS and isinstance(entry.get("prompts"), dict) else {}
        return name

    def embed(self, texts: Sequence[str], prompt: str | None = None) -> Vectors:
        """Embed texts in one request.

        Args:
            texts: the texts.
            prompt: what is put before each; None: what the server does by itself.

        Returns:
            float32 [texts, dimension].

        Raises:
            HTTPStatus: the server refuses.
            UserError: its answer holds no vectors, or it cannot be asked.
        """
        fields: dict[str, Any] = {}
        if prompt is not None and self.takes_prompts:
            fields["prompt"] = prompt
        elif prompt:
            texts = [prompt + text for text in texts]
        if self.protocol == OPENAI:
            fields |= {"model": self.model, "input": list(texts), "encoding_format": "base64" if self.takes_prompts else "float"}
        else:
            fields = {"inputs": list(texts), "truncate": True}
        found = self._patiently(fields)
        try:
            entries = [entry["embedding"] for entry in found["data"]] if self.protocol == OPENAI else found
            rows = [_vector(entry) for entry in entries]
            vectors = np.array(rows, dtype=np.float32)
        except (KeyError, IndexError, TypeError, ValueError, binascii.Error) as error:
            shown = json.dumps(found)[:SHOWN_CHARACTERS]
            raise UserError(f"{self.url}: no vector in its answer: {shown}", f"it was asked in the {self.protocol}") from error
        if len(vectors) != len(texts):
            raise UserError(f"{self.url}: gave {len(vectors)} vectors for {len(texts)} texts")
        if not vectors.shape[1]:
            raise UserError(f"{self.url}: gave an empty vector")
        return vectors

    def _patiently(self, body: dict[str, Any]) -> Any:
        """Send a request, and again where the server is busy."""
        for attempt in range(TRIES - 1):
            try:
                return self._request(self.url, body)
            except HTTPStatus as status:
                if status.code not in BUSY:
                    raise
                time.sleep(status.pause if status.pause is not None else 0.5 * 2**attempt)
        return self._request(self.url, body)

    def check_allowed(self, status: HTTPStatus) -> None:
        """See that an answer is not about who is asking.

        Raises:
            UserError: the key is wrong, or the server redirects.
        """
        if status.code in (401, 403):
            raise UserError(
                f"{self._asked}: {status}", "--api-key-env NAME names the environment variable with the key"
            ) from status
        if 300 <= status.code < 400:
            said = f"{self._asked}: redirects ({status.code}); keys are not sent on"
            raise UserError(said, "give the address that answers") from status

    def _request(self, url: str, body: dict[str, Any] | None) -> Any:
        """Send JSON (GET where there is no body) and return the JSON that comes back.

        Raises:
            HTTPStatus: the answer is not 200.
            UserError: there is no answer in time, or it is not JSON.
        """
        self._asked = url
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers=self._headers)
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            said = error.read(2 * SHOWN_CHARACTERS).decode("utf-8", "replace")[:SHOWN_CHARACTERS]
            raise HTTPStatus(error.code, said, error.headers.get("Retry-After")) from error
        except (OSError, HTTPException, ValueError) as error:  # URLError and a time-out are OSErrors
            reason = getattr(error, "reason", None) or error or type(error).__name__
            raise UserError(f"{url}: cannot be asked ({reason})") from error
        try:
            return json.loads(content)
        except ValueError as error:
            shown = content[:SHOWN_CHARACTERS].decode("utf-8", "replace")
            raise UserError(f"{url}: its answer is not JSON: {shown}") from error


def _vector(entry: Any) -> Any:
    return np.frombuffer(base64.b64decode(entry, validate=True), dtype="<f4") if isinstance(entry, str) else entry


class RemoteEmbedder:
    """A server as an embedder: texts in, vectors out."""

    def __init__(self, client: Client) -> None:
        """Ask the server what it serves; one that does not say is asked for the vector of a text.

        Raises:
            UserError: it refuses a plain text, or its model has a Router.
        """
        self._client = client
        self.name = client.model or client.url
        told = client.described
        if told.get("routed"):
            raise UserError(
                f"model {self.name!r}: its vectors depend on the task, which is not asked for over HTTP here", "give its folder"
            )
        self.spec = EmbedderSpec(
            prompts={str(name): str(text) for name, text in told.get("prompts", {}).items()},
            default_prompt=str(told.get("default_prompt") or ""),
            similarity=told["similarity"] if told.get("similarity") in SIMILARITIES else "cosine",
            normalize=bool(told.get("normalized", False)),
        )
        """Prompts and similarity, where the server says them. The texts' pooling and length are the server's own matter."""
        self.dimension = int(told.get("dimension") or self._ask(["dimension"], None).shape[1])

    def encode(
        self,
        texts: Iterable[str],
        prompt: str | None = None,
        *,
        task: str | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> Vectors:
        """Embed texts; see `compress.models.embedder.TextEmbedder.encode`. How they are batched is the server's own matter.

        Raises:
            UserError: the server refuses a text, cannot be asked, or gives a vector of another width.
        """
        del batch_tokens
        named = None if prompt is None and task is None else self.spec.prompt(prompt, task)
        chunks: list[Vectors] = []
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="asking") as threads:
            for chunk in checked_chunks(texts):
                parts = list(_parts(chunk))
                asked: Callable[[list[str]], Vectors] = lambda part: self._ask(part, named)  # noqa: E731
                show = len(chunk) >= LONG_WORK_TEXTS if progress is None else progress
                running = [threads.submit(asked, part) for part in parts]
                chunks += [future.result() for future in with_progress(running, "encoding", show)]
        return np.concatenate(chunks) if chunks else np.empty((0, self.dimension), dtype=np.float32)

    def _ask(self, texts: list[str], prompt: str | None) -> Vectors:
        try:
            vectors = self._client.embed(texts, prompt)
        except HTTPStatus as status:
            self._client.check_allowed(status)
            kind = BadTextError if status.code in ABOUT_THE_TEXT else UserError
            raise kind(f"{self._client.url}: {status}") from status
        width = getattr(self, "dimension", vectors.shape[1])
        if vectors.shape[1] != width:
            raise UserError(f"{self._client.url}: gives vectors of {vectors.shape[1]} dimensions, and of {width}")
        return vectors


def _parts(texts: Sequence[str]) -> Iterator[list[str]]:
    """Split texts into those of one request each."""
    iterator = iter(texts)
    while part := list(islice(iterator, AT_A_TIME)):
        start, characters = 0, 0
        for index, text in enumerate(part):
            if index > start and characters + len(text) > REQUEST_CHARACTERS:
                yield part[start:index]
                start, characters = index, 0
            characters += len(text)
        yield part[start:]
