"""OpenAI's embeddings protocol: what a request may say, what answers and errors look like. No FastAPI here.

https://platform.openai.com/docs/api-reference/embeddings. Fields that are ours alone are `input_type`, `instruction`, `prompt` and
`tokenizer`.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_core import to_json

from compress.common.errors import nearest
from compress.models.embedder import Vectors

INVALID, UNAUTHORIZED, LIMITED, BROKEN = "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
"""Values of an error's `type`."""
LARGEST_ID = 2**31 - 1
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": LARGEST_ID}, "minItems": 1}
_INPUT = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": 2048},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1, "maxItems": 2048},
    ],
    "description": "A text, texts, or token ids of the model's own tokenizer (see `tokenizer`).",
}


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry: int | None = None
    ) -> None:
        """Describe an error.

        Args:
            status: the HTTP status.
            message: what is wrong, and how to mend it.
            param: the field of the request that is wrong.
            code: the kind of error, for programs.
            retry: seconds after which the client may try again.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry = status, message, param, code, retry

    @property
    def kind(self) -> str:
        """The error's `type`."""
        return {401: UNAUTHORIZED, 429: LIMITED}.get(self.status, BROKEN if self.status >= 500 else INVALID)

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers of the answer."""
        found = {} if self.retry is None else {"retry-after": str(self.retry)}
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        return found | ({"connection": "close"} if self.status == 408 or self.code == "stopping" else {})


class EmbeddingsRequest(BaseModel):
    """The body of `POST /v1/embeddings`."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    input: Annotated[Any, WithJsonSchema(_INPUT)]
    """A text, texts, or token ids of the model's own tokenizer (see `tokenizer`)."""
    model: str
    """Name of a served model, also with a prompt's name: `NAME@query`."""
    encoding_format: Literal["float", "base64"] = "float"
    """`float`: numbers; `base64`: the bytes of little-endian float32."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Number of leading dimensions to return, for models that were trained for it."""
    user: str | None = None
    """Accepted, and not used or logged."""
    input_type: str | None = None
    """What the texts are: `query`, `document`, or another name of the model's prompts; see `GET /v1/models`."""
    instruction: str | None = None
    """The task in words, for models that take instructions."""
    prompt: str | None = None
    """What is put before each text as it stands, in place of the model's prompts."""
    tokenizer: str | None = None
    """For token ids: the name of the served model whose tokenizer made them. They are taken as they are, without a prompt."""


class Embedding(BaseModel):
    """One vector of an answer."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """How many tokens were embedded: prompts and special tokens counted, texts cut to the longest input."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """The answer to `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class ErrorDetail(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The answer where there is no other."""

    error: ErrorDetail


def parse_request(body: bytes) -> EmbeddingsRequest:
    """Read the body of a request; its `input` is not looked at yet.

    Raises:
        ApiError: 400, it is not JSON, or a field is missing, not known or of a wrong type.
    """
    try:
        return EmbeddingsRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        known = nearest(str(name), EmbeddingsRequest.model_fields)
        raise ApiError(
            400, f"{str(name)[:80]!r} is not a field of this request; {known}", param=str(name)[:80], code="unknown_parameter"
        )
    if first["type"] == "missing":
        raise ApiError(400, f"you must provide {name!r}", param=name, code="missing_required_parameter")
    code = "invalid_json" if name is None else "invalid_type"
    raise ApiError(400, first["msg"] if name is None else f"{name}: {first['msg']}", param=name, code=code)


def texts_or_ids(given: Any, most: int) -> tuple[list[str], list[list[int]]]:
    """Return the items of `input`: texts, or lists of token ids; one of the two is empty.

    Args:
        given: `input` as it was sent.
        most: largest number of items.

    Raises:
        ApiError: 400, it is neither, an item is empty, or there are too many; names the first wrong item.
    """
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list):
        raise _wrong_input("must be a string, a list of strings, a list of token ids, or a list of such lists")
    if not given:
        raise _wrong_input("must not be empty", "empty_input")
    if isinstance(given[0], str):
        _check_number(given, most)
        for index, text in enumerate(given):
            if not isinstance(text, str):
                raise _wrong_input(f"item {index} is not a string, unlike those before it")
            if not text:
                raise _wrong_input(f"item {index} is an empty string", "empty_input")
        return given, []
    lists = given if isinstance(given[0], list) else [given]
    _check_number(lists, most)
    for index, ids in enumerate(lists):
        _check_ids(index, ids)
    return [], lists


def _check_number(items: list[Any], most: int) -> None:
    if len(items) > most:
        raise _wrong_input(f"has {len(items):,} items; at most {most:,} are taken in a request", "too_many_items")


def _check_ids(index: int, ids: Any) -> None:
    if not isinstance(ids, list):
        raise _wrong_input(f"item {index} is neither a string nor a list of token ids")
    if not ids:
        raise _wrong_input(f"item {index} is an empty list", "empty_input")
    for place, number in enumerate(ids):
        if type(number) is not int:
            raise _wrong_input(f"item {index} holds something else than token ids at place {place}")
        if not 0 <= number <= LARGEST_ID:
            raise _wrong_input(f"item {index} holds no token id at place {place}: it is out of range")


def _wrong_input(said: str, code: str = "invalid_input") -> ApiError:
    return ApiError(400, f"input: {said}", param="input", code=code)


def answer_of(vectors: Vectors, model: str, tokens: int, encoding: str) -> bytes:
    """Return the body of an answer.

    Args:
        vectors: float32 [items, dimension].
        model: the model's name as the client gave it.
        tokens: number of tokens that were embedded.
        encoding: `float` or `base64`.
    """
    rows: list[Any]
    if encoding == "base64":
        little = np.ascontiguousarray(vectors, dtype="<f4")
        rows = [base64.b64encode(row.data).decode("ascii") for row in little]
    else:
        rows = vectors.tolist()
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)]
    return to_json({"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
