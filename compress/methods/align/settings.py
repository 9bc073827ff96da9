"""The YAML keys of `align`: read by the method, by the fitting and by the training."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from compress.data.texts import is_hub
from compress.methods.base import Method

FEWEST_TEXTS = 100
"""Texts to fit on below which a map would be those texts alone."""
MOST_HELD_OUT = 1_000


class AlignSettings(Method):
    """What a recipe may set for `align`."""

    family: ClassVar[str] = "aligned"
    whole: ClassVar[bool] = True
    anywhere: ClassVar[bool] = True
    without_blocks: ClassVar[bool] = True
    to: str
    """The model that made the index: a built-in name, a folder or a hub name."""
    texts: str
    """Texts that both models embed, like the queries to come: a JSONL file with `text` (`.gz` allowed), a plain text file with one
    text per line, or a dataset of the hub as `hub:OWNER/NAME:COLUMN`."""
    count: int | None = Field(None, ge=FEWEST_TEXTS)
    """Number of texts to use, held-out ones included, drawn with `seed`; by default all of them."""
    held_out: int | None = Field(None, ge=11)
    """Number of these texts that the map is not fitted on and is judged by; by default a fifth, at most 1,000."""
    map: Literal["auto", "rotation", "linear"] = "auto"
    """The map: a `rotation` with a scale and a shift, which keeps the model's own similarities, a `linear` one by ridge least
    squares, or the better one on the held-out texts (`auto`)."""
    task: Literal["query", "document"] = "query"
    """What both models embed the texts as, which chooses their prompts."""
    minutes: float = Field(0.0, ge=0, le=24 * 60)
    """Minutes of training the network on the same texts towards the other model's vectors, after the map is fitted; 0: none."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the choice of texts, and of their order in training."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The texts, if they are in a file."""
        return () if is_hub(self.texts) else (self.texts,)

    def held_out_of(self, texts: int) -> int:
        """Return how many of the texts are held out.

        Raises:
            ValueError: there are too few texts.
        """
        held = min(MOST_HELD_OUT, math.ceil(texts / 5)) if self.held_out is None else self.held_out
        if texts - held < FEWEST_TEXTS:
            raise ValueError(
                f"{self.texts}: {texts - held:,} different texts are left to fit a map on after holding out {held:,}; at least "
                f"{FEWEST_TEXTS} are needed, and ten times the dimensions are a good number"
            )
        return held
