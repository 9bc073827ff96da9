"""A new student that is a static table: the teacher's tokens and whole words, each with the teacher's vector of its string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.common.files import write_json
from compress.models.embedder import Vectors
from compress.models.files.config import TOKENIZER_FILE
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape
from compress.models.text.sentence_transformers import STATIC
from compress.models.text.static import TABLE, TOKEN_WEIGHTS, StaticConfig
from compress.models.text.tokens import Ids, TextTokenizer
from compress.models.text.vocabulary import kept_tokens, with_tokens

AXES_FILE = "axes.npy"
MODULES_PACKAGE = "sentence_transformers.models"


class StaticStudent(BaseModel):
    """A new static table: a vector and a factor for each token, and no network. Only the table's own runtimes are needed to run it.

    It keeps the teacher's tokens, because the teacher knows a vector for each of them, also for those that the texts lack. A text
    is the mean of its tokens, so their order does not count.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    architecture: Literal["static"]
    """`static`: a static table."""
    width: int = Field(256, ge=8)
    """Width of the vectors. Where it is less than the teacher's, the student learns the principal components of the teacher's
    vectors."""
    min_count: int = Field(0, ge=0)
    """Number of times that one of the teacher's tokens has to occur in the texts to be kept; by default all are kept."""
    words: int = Field(0, ge=0)
    """Number of whole words, the most frequent ones that the teacher's tokenizer splits, that become tokens of their own. Only for
    WordPiece tokenizers, such as BERT's."""
    map: bool = True
    """Whether tokens learn through one linear map of their first vectors as well as each by itself. Tokens that are rare in the
    texts, or lacking, then learn from the others."""
    sif: float = Field(1e-3, gt=0)
    """Constant a of the initial factors a / (a + p), where p is the token's share of the texts (SIF: Arora et al. 2017)."""

    def shape(self, teacher: ModelShape) -> ModelShape:
        """Return the shape that the student has at most: tokens that are dropped, or words that the texts lack, are still counted.

        Raises:
            ValueError: the teacher has no table of tokens.
        """
        table = teacher.token_table
        if table is None:
            raise ValueError(f"{teacher.name} has no token embedding table, whose tokens a static student could take")
        tokens = teacher.tensors[f"{table}.weight"].shape[0] + self.words
        config = StaticConfig(self.width, tokens, tokens, shared=False, weighted=True)
        tensors = {TABLE: TensorInfo("F16", (tokens, self.width)), TOKEN_WEIGHTS: TensorInfo("F16", (tokens,))}
        return ModelShape(teacher.name, tensors, config.as_json(), vector_width=self.width)

    def write(self, folder: Path, tokenizer: TextTokenizer, texts: Sequence[str]) -> Ids:
        """Write the list of modules and the tokenizer: a folder that lacks only the weights.

        Args:
            folder: the folder; it is made.
            tokenizer: the teacher's.
            texts: the texts whose tokens and words are counted.

        Returns:
            How often each token occurs in the texts, int64 [tokens].

        Raises:
            ValueError: the teacher's tokenizer does not take words.
        """
        from compress.methods.distill.static_table import counted, frequent_words, with_words

        # A text's vector is the mean of its tokens: special tokens would only add the same to every text.
        definition = {**tokenizer.definition(), "post_processor": None, "truncation": None, "padding": None}
        if self.min_count:
            seen = (counted(definition, texts) >= self.min_count).nonzero()[0].tolist()
            definition = with_tokens(definition, kept_tokens(definition, seen))
        if self.words:
            definition = with_words(definition, frequent_words(definition, texts, self.words))
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / TOKENIZER_FILE, definition)
        # sentence-transformers' layout, which every runtime and export takes; nothing is cut.
        kinds = {"": STATIC, "1_Normalize": "Normalize"}
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"{MODULES_PACKAGE}.{kind}"}
            for number, (path, kind) in enumerate(kinds.items())
        ]
        write_json(folder / "modules.json", modules)
        return counted(definition, texts)

    def initial_weights(self, vectors: Vectors, axes: Vectors, counts: Ids, unknown: int | None) -> dict[str, Vectors]:
        """Return the table and the factors to begin with, float32, by their names in the file.

        The unknown token has neither vector nor factor. Both gradients are then zero, so it stays without: it adds nothing to a
        text, and model2vec, which leaves it out, gives the same vectors.

        Args:
            vectors: the teacher's vectors of the tokens' strings, float32 [tokens, any].
            axes: float32 [any, width], from `principal_axes`.
            counts: how often each token occurs in the texts, int64 [tokens].
            unknown: id of the unknown token; None: there is none.
        """
        from compress.methods.distill.static_table import reduced, sif_factors

        table, factors = reduced(vectors, axes), sif_factors(counts, self.sif)
        if unknown is not None:
            table[unknown], factors[unknown] = 0, 0
        return {"embedding.weight": table, "weights": factors}
