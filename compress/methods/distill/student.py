"""A new student: a config from a few sizes, a tokenizer trained on the texts, token embeddings from the teacher's vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.models.embedder import Vectors
from compress.models.files.config import CONFIG_FILE, TOKENIZER_FILE

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<s>", "</s>"
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LONGEST_PIECE = 24


class Student(BaseModel):
    """Sizes of a new small transformer; they go into its architecture's own config."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    architecture: Literal["nv-embed", "mistral", "bert"] = "nv-embed"
    """Architecture of the student. `nv-embed`: Mistral blocks without a causal mask, a latent-attention head, and prompts that are
    not pooled. `mistral`: the same blocks with mean pooling. `bert`: BERT with mean pooling."""
    width: int = Field(384, ge=8)
    """Width of hidden states and vectors."""
    blocks: int = Field(4, ge=1)
    """Number of transformer blocks."""
    heads: int = Field(6, ge=1)
    """Number of attention heads per block."""
    kv_heads: int | None = Field(None, ge=1)
    """Number of key and value heads, which several query heads share if there are fewer than `heads`; by default as many as
    `heads`. Not for bert."""
    mlp: int = Field(768, ge=8)
    """Number of MLP channels per block."""
    latents: int = Field(32, ge=1)
    """Number of latents of the nv-embed head."""
    latent_heads: int = Field(4, ge=1)
    """Number of attention heads of the nv-embed head."""
    vocabulary: int = Field(12_000, ge=300)
    """Size of the vocabulary, which is learned from the texts."""
    max_length: int = Field(512, ge=16)
    """Maximum input length in tokens."""
    tokens: Literal["teacher", "random"] = "teacher"
    """Initial token embeddings: made from the teacher's vectors of the tokens' strings (`teacher`), or random."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.width % self.heads or self.heads % (self.kv_heads or self.heads) or self.width % self.latent_heads:
            raise ValueError("`heads` and `latent_heads` have to divide `width`, and `kv_heads` has to divide `heads`")
        if self.architecture == "bert" and self.kv_heads not in (None, self.heads):
            raise ValueError("bert has keys and values for every head; leave `kv_heads` out")
        return self

    def config(self, vocabulary: int) -> dict[str, Any]:
        """Return the `config.json` of such a model with a vocabulary of this size."""
        sizes: dict[str, Any] = {
            "vocab_size": vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.max_length,
            "pad_token_id": 0,
        }
        if self.architecture == "bert":
            return {"model_type": "bert", "architectures": ["BertModel"], **sizes}
        sizes |= {"num_key_value_heads": self.kv_heads or self.heads, "head_dim": self.width // self.heads}
        sizes |= {"sliding_window": None, "bos_token_id": 2, "eos_token_id": 3}
        if self.architecture == "mistral":
            return {"model_type": "mistral", "architectures": ["MistralModel"], "is_causal": False, **sizes}
        latent = {
            "model_type": "latent_attention",
            "num_latents_value": self.latents,
            "num_cross_heads": self.latent_heads,
            "cross_dim_head": self.width // self.latent_heads,
            "hidden_dim": self.width,
            "latent_dim": self.width,
            "output_normalize": True,
        }
        return {
            "model_type": "nvembed",
            "add_eos": True,
            "is_mask_instruction": True,
            "mask_type": "b",
            "padding_side": "right",
            "text_config": sizes,
            "latent_attention_config": latent,
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of its tensors by name, assuming that the texts yield a vocabulary of the size wanted."""
        if self.architecture == "bert":
            return self._bert()
        prefix = "embedding_model." if self.architecture == "nv-embed" else ""
        width, keys = self.width, self.width // self.heads * (self.kv_heads or self.heads)
        made: dict[str, tuple[int, ...]] = {
            f"{prefix}embed_tokens.weight": (self.vocabulary, width),
            f"{prefix}norm.weight": (width,),
        }
        for number in range(self.blocks):
            block = f"{prefix}layers.{number}."
            made |= {
                f"{block}self_attn.{name}_proj.weight": (rows, width) for name, rows in (("q", width), ("k", keys), ("v", keys))
            }
            made[f"{block}self_attn.o_proj.weight"] = (width, width)
            made |= {f"{block}mlp.{name}_proj.weight": (self.mlp, width) for name in ("gate", "up")}
            made[f"{block}mlp.down_proj.weight"] = (width, self.mlp)
            made |= {f"{block}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        if self.architecture == "nv-embed":
            attend, feed = (f"latent_attention_model.cross_attend_blocks.{number}." for number in (0, 1))
            made["latent_attention_model.latents"] = (self.latents, width)
            made |= {
                f"{attend}fn.to_{name}.weight": (rows, width) for name, rows in (("q", width), ("kv", 2 * width), ("out", width))
            }
            made |= {f"{feed}fn.net.0.weight": (8 * width, width), f"{feed}fn.net.0.bias": (8 * width,)}
            made |= {f"{feed}fn.net.2.weight": (width, 4 * width), f"{feed}fn.net.2.bias": (width,)}
            norms = (f"{attend}norm", f"{attend}norm_context", f"{feed}norm")
            made |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
        return made

    def _bert(self) -> dict[str, tuple[int, ...]]:
        width = self.width
        tables = (("word", self.vocabulary), ("position", self.max_length), ("token_type", 2))
        made: dict[str, tuple[int, ...]] = {f"embeddings.{name}_embeddings.weight": (rows, width) for name, rows in tables}
        norms = ["embeddings.LayerNorm"]
        for number in range(self.blocks):
            block = f"encoder.layer.{number}."
            norms += [f"{block}attention.output.LayerNorm", f"{block}output.LayerNorm"]
            sizes = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
            sizes |= {
                "attention.output.dense": (width, width),
                "intermediate.dense": (self.mlp, width),
                "output.dense": (width, self.mlp),
            }
            for name, size in sizes.items():
                made |= {f"{block}{name}.weight": size, f"{block}{name}.bias": size[:1]}
        return made | {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}

    def write(self, folder: Path, texts: Sequence[str]) -> None:
        """Write config, tokenizer and pooling files: a model's folder that lacks only the weights."""
        tokenizer = self._tokenizer(texts)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / TOKENIZER_FILE))
        files: dict[str, Any] = {
            CONFIG_FILE: self.config(tokenizer.get_vocab_size()),
            "sentence_bert_config.json": {"max_seq_length": self.max_length, "do_lower_case": False},
        }
        if self.architecture != "nv-embed":
            special = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), BERT_SPECIAL, strict=True))
            named = special if self.architecture == "bert" else {"pad_token": PAD, "unk_token": UNKNOWN, "bos_token": START}
            files["tokenizer_config.json"] = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": self.max_length,
                **named,
            }
            modules = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
            files["modules.json"] = [
                {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for index, (path, kind) in enumerate(modules)
            ]
            files["1_Pooling/config.json"] = {"word_embedding_dimension": self.width, "pooling_mode_mean_tokens": True}
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _tokenizer(self, texts: Sequence[str]) -> Tokenizer:
        """Train a tokenizer: WordPiece like BERT's, or BPE with marked spaces like Mistral's; both are uncased."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

        if self.architecture == "bert":
            tokenizer = Tokenizer(models.WordPiece(unk_token=BERT_SPECIAL[1]))
            tokenizer.normalizer = normalizers.BertNormalizer()
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = decoders.WordPiece()
            pieces = trainers.WordPieceTrainer(
                vocab_size=self.vocabulary, special_tokens=list(BERT_SPECIAL), show_progress=False, limit_alphabet=500
            )
            tokenizer.train_from_iterator(texts, pieces)
            special = [("[CLS]", 2), ("[SEP]", 3)]
            tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
            return tokenizer
        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
        )
        tokenizer.decoder = decoders.Metaspace()
        marks = [AddedToken(token, special=True, normalized=False) for token in (PAD, UNKNOWN, START, END)]
        bytes_ = [f"<0x{number:02X}>" for number in range(256)]
        pairs = trainers.BpeTrainer(
            vocab_size=self.vocabulary,
            special_tokens=[*marks, *(AddedToken(token, normalized=False) for token in bytes_)],
            max_token_length=LONGEST_PIECE,
            limit_alphabet=500,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, pairs)
        single = f"{START} $A" + ("" if self.architecture == "nv-embed" else f" {END}")
        ends = [(START, 2)] + ([] if self.architecture == "nv-embed" else [(END, 3)])
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
        return tokenizer


def spelled(tokenizer: Tokenizer) -> list[str]:
    """Return the text that each token stands for, in the order of their ids, for the teacher to embed."""
    ids = tokenizer.get_vocab()
    return [token.replace("▁", " ").removeprefix("##").strip() for token in sorted(ids, key=ids.__getitem__)]


def table_from(vectors: Vectors, width: int) -> Vectors:
    """Return token embeddings, float32 [tokens, width], from the teacher's vectors of the tokens' strings, float32 [tokens, any].

    They are centred and reduced to the width by principal components, as in model2vec (Tulkens and van Dongen 2024). If the width
    is larger than the teacher's, the other dimensions are zero. The table is scaled to a mean square of 1 over the teacher's
    dimensions.
    """
    centred = vectors - vectors.mean(axis=0)
    if width < centred.shape[1]:
        _, axes = np.linalg.eigh(centred.T @ centred)
        centred = centred @ axes[:, ::-1][:, :width]
    table = np.zeros((len(centred), width), dtype=np.float32)
    table[:, : centred.shape[1]] = centred / np.sqrt(np.square(centred).mean())
    return table


def initial_weights(folder: Path, embed: Callable[[list[str]], Vectors] | None, seed: int) -> dict[str, torch.Tensor]:
    """Return initial weights by tensor name, float32.

    Matrices are drawn as in `compress.models.random_weights`, except that those that write into the residual stream are zero. So
    the student starts as the mean of its token embeddings, which come from the teacher.

    Args:
        folder: the folder with config and tokenizer.
        embed: returns the teacher's vectors of texts; None: token embeddings are random too.
        seed: seed of the random weights.
    """
    import torch
    from tokenizers import Tokenizer

    from compress.models.folder import ModelFolder
    from compress.models.network.build import empty_network
    from compress.models.network.segments import token_table
    from compress.models.random_weights import is_residual, random_tensor

    network = empty_network(ModelFolder("student", folder))
    blocks = int(network.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    state = {
        name: torch.zeros(tensor.shape) if is_residual(name) else random_tensor(name, tuple(tensor.shape), blocks, seed).float()
        for name, tensor in network.state_dict().items()
    }
    if embed is not None:
        name = token_table({"": network})
        assert name is not None
        table = network.get_submodule(name.lstrip("."))
        vectors = embed(spelled(Tokenizer.from_file(str(folder / TOKENIZER_FILE))))
        state[f"{name.lstrip('.')}.weight"] = torch.from_numpy(table_from(vectors, int(table.embedding_dim)))  # type: ignore[arg-type]
    return state
