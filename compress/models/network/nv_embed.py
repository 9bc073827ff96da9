"""NV-Embed: Mistral without a causal mask, latent-attention pooling; and the same head folded to a fifteenth of its size.

Lee et al. 2024, "NV-Embed", arXiv 2405.17428, section 3. Module names are those of the published checkpoint
(nvidia/NV-Embed-v2), so its tensors load by name. Checked against outputs of the original code: tests/models/test_nv_embed.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MistralConfig, MistralModel

from compress.common.errors import UserError
from compress.models.folder import read_json
from compress.models.text.spec import EmbedderSpec, Pooling

MODEL_TYPE = "nvembed"
EOS = "</s>"
PREFIX = "Instruct: {instruction}\nQuery: "
# config.json of the published model names only the latent part's type; these are the original code's defaults.
LATENT_DEFAULTS = {
    "num_latents_value": 512,
    "num_cross_heads": 8,
    "cross_dim_head": 4096,
    "hidden_dim": 4096,
    "latent_dim": 4096,
    "output_normalize": True,
}
FEED_FORWARD_FACTOR = 4


def is_nv_embed(folder: Path) -> bool:
    """Whether a folder's config is NV-Embed's."""
    path = folder / "config.json"
    return path.exists() and read_json(path).get("model_type") == MODEL_TYPE


def read_nv_config(folder: Path) -> tuple[MistralConfig, dict[str, Any]]:
    """Read `config.json` in the published model's own form: the backbone's config, bidirectional, and the latent part's."""
    config = read_json(folder / "config.json")
    text = {
        key: value for key, value in config["text_config"].items() if key not in ("model_type", "architectures", "_name_or_path")
    }
    # The sliding window stands in the file and is not applied by the original code.
    backbone = MistralConfig(**{**text, "sliding_window": None, "use_cache": False})
    backbone.is_causal = False
    return backbone, LATENT_DEFAULTS | config.get("latent_attention_config", {})


def read_nv_spec(folder: Path) -> EmbedderSpec:
    """Return NV-Embed's conventions: EOS as text, the instruction not pooled, its instruction for each MTEB task.

    Version 1 has the same keys and the same config, so it loads too; its weights were never at hand here.

    Raises:
        UserError: the config asks for what neither version does.
    """
    backbone, latent = read_nv_config(folder)
    config = read_json(folder / "config.json")
    for key, only in (("mask_type", "b"), ("padding_side", "right")):
        if config.get(key, only) != only:
            raise UserError(f"{folder / 'config.json'}: {key} {config[key]!r} is not supported, {only!r} is")
    settings = folder / "sentence_bert_config.json"
    longest = read_json(settings).get("max_seq_length") if settings.exists() else None
    return EmbedderSpec(
        pooling=Pooling.MEAN,
        pool_prompt=not config.get("is_mask_instruction", True),
        prompt_specials=False,
        suffix=EOS if config.get("add_eos", True) else "",
        normalize=bool(latent["output_normalize"]),
        max_length=min(longest or backbone.max_position_embeddings, backbone.max_position_embeddings),
        prompts=instruction_prompts(),
    )


def instruction_prompts() -> dict[str, str]:
    """Return the prefix for each MTEB task, by task name or by `<task>-query` and `<task>-document`.

    The instructions are those of the model's own `instructions.json`, and mteb's defaults where that has none. Documents of
    asymmetric retrieval get an explicitly empty prefix.
    """
    listing = json.loads((resources.files("compress.data") / "nv_embed_instructions.json").read_text(encoding="utf-8"))
    prompts = {}
    for task, instructions in listing["tasks"].items():
        for role, instruction in instructions.items():
            name = task if role == "text" else f"{task}-{role}"
            prompts[name] = PREFIX.format(instruction=instruction) if instruction else ""
    return prompts


Mean = Callable[[torch.Tensor], torch.Tensor]
"""Averages the rows of each text in float32: [n, any] to [texts, any]."""


class CrossAttention(nn.Module):
    """Tokens attend to the latents: no mask, no biases, heads laid out as (head, width)."""

    def __init__(self, width: int, latent_width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(latent_width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], self.heads, self.head_width).transpose(0, 1)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Map tokens [n, width] and latents [m, latent_width] to [n, width]."""
        keys, values = self.to_kv(context).chunk(2, dim=-1)
        query, key, value = (self._split(part)[None] for part in (self.to_q(x), keys, values))
        mixed = F.scaled_dot_product_attention(query, key, value)[0]
        projected: torch.Tensor = self.to_out(mixed.transpose(0, 1).reshape(x.shape[0], -1))
        return projected


class GEGLU(nn.Module):
    """`value * gelu(gate)`, the value being the first half; exact GELU (Shazeer 2020, arXiv 2002.05202)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., 2 width] to [..., width]."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """`net.2(GEGLU(net.0(x)))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width * FEED_FORWARD_FACTOR
        self.net = nn.Sequential(nn.Linear(width, inner * 2), GEGLU(), nn.Linear(inner, width))


class PreNorm(nn.Module):
    """A function with a layer norm before it, and one before its context where it has one."""

    def __init__(self, width: int, function: nn.Module, context_width: int | None = None) -> None:
        super().__init__()
        self.fn = function
        self.norm = nn.LayerNorm(width)
        if context_width is not None:
            self.norm_context = nn.LayerNorm(context_width)


class LatentAttention(nn.Module):
    """The head as published. Works on pooled tokens alone: what is not pooled never mixes with what is."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        width, latent_width = settings["hidden_dim"], settings["latent_dim"]
        attention = CrossAttention(width, latent_width, settings["num_cross_heads"], settings["cross_dim_head"])
        self.latents = nn.Parameter(torch.empty(settings["num_latents_value"], latent_width))
        self.cross_attend_blocks = nn.ModuleList(
            [PreNorm(width, attention, latent_width), PreNorm(width, FeedForward(width))],
        )

    def forward(self, hidden: torch.Tensor, mean: Mean) -> torch.Tensor:
        """Pool: token vectors [n, width] to float32 [texts, width]."""
        attend, feed = _blocks(self)
        attended = hidden + attend.fn(attend.norm(hidden), attend.norm_context(self.latents))
        return mean(attended + feed.fn.net(feed.norm(attended)))


def _blocks(head: LatentAttention) -> tuple[Any, Any]:
    """Return the attention and the feed-forward block; typed loosely, because torch types every submodule so."""
    attend, feed = head.cross_attend_blocks
    return attend, feed


class FoldedLatentAttention(nn.Module):
    """The same function with the constants multiplied out.

    Keys and values depend on the latents alone, so per head `A_h = K_h Wq_h / sqrt(width_h)` and `B_h = V_h Wo_h^T`, both
    [latents, width], replace `to_q`, `to_kv`, `to_out` and the latents: 539 M parameters become 33.6 M for NV-Embed-v2. The last
    product of the feed-forward part is linear, so it commutes with the mean and runs once a text instead of once a token.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        width = settings["hidden_dim"]
        self.heads = settings["num_cross_heads"]
        rows = self.heads * settings["num_latents_value"]
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, rows, bias=False)
        self.values = nn.Linear(rows, width, bias=False)
        self.feed_norm = nn.LayerNorm(width)
        self.net = FeedForward(width).net

    def forward(self, hidden: torch.Tensor, mean: Mean) -> torch.Tensor:
        """Pool; see `LatentAttention.forward`."""
        scores = self.scores(self.norm(hidden)).unflatten(-1, (self.heads, -1))
        attended = hidden + self.values(scores.softmax(dim=-1).flatten(-2))
        gated = self.net[1](self.net[0](self.feed_norm(attended)))
        # Back to the compute dtype for the last product; the residual's mean stays in float32.
        last: torch.Tensor = self.net[2](mean(gated).to(hidden.dtype))
        return mean(attended) + last.float()


def mean_of_rows(text: torch.Tensor, texts: int) -> Mean:
    """Average the rows of each text: `text`, int64 [n], says whose each row is."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros((texts, x.shape[1]), dtype=torch.float32, device=x.device).index_add_(0, text, x.float())
        counts = torch.zeros(texts, device=x.device).index_add_(0, text, torch.ones_like(text, dtype=torch.float32))
        return sums / counts.unsqueeze(1)

    return mean


def mean_of_padded(mask: torch.Tensor) -> Mean:
    """Average the rows of a padded batch, texts one after another, by a mask, int64 [texts, length]."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        weights = mask.to(torch.float32)
        sums: torch.Tensor = (weights.unsqueeze(1) @ x.float().view(*mask.shape, x.shape[1])).squeeze(1)
        return sums / weights.sum(dim=1, keepdim=True)

    return mean


@torch.no_grad()
def fold(head: LatentAttention) -> FoldedLatentAttention:
    """Multiply the constants of a head out, in float64.

    The two new matrices are in float32 where the head is in half precision, so that rounding is left to whoever stores them; the
    rest is the head's own.
    """
    attend, feed = _blocks(head)
    attention: CrossAttention = attend.fn
    heads, head_width = attention.heads, attention.head_width
    latents, width = head.latents.shape[0], attention.to_q.in_features
    settings = {"hidden_dim": width, "num_cross_heads": heads, "num_latents_value": latents}
    with torch.device("meta"):
        folded = FoldedLatentAttention(settings)
    context = F.layer_norm(
        head.latents.double(),
        attend.norm_context.normalized_shape,
        attend.norm_context.weight.double(),
        attend.norm_context.bias.double(),
        attend.norm_context.eps,
    )
    scores, values = [], []
    for index in range(heads):
        # One head at a time: in float64 the eight of NV-Embed-v2 together would take 4 GB more.
        rows = slice(index * head_width, (index + 1) * head_width)
        shifted = slice(heads * head_width + rows.start, heads * head_width + rows.stop)
        key = context @ attention.to_kv.weight[rows].double().t()
        value = context @ attention.to_kv.weight[shifted].double().t()
        scores.append(key @ attention.to_q.weight[rows].double() / head_width**0.5)
        values.append(value @ attention.to_out.weight[:, rows].double().t())
    dtype = torch.promote_types(head.latents.dtype, torch.float32)
    folded.scores.weight = nn.Parameter(torch.cat(scores).to(dtype), requires_grad=False)
    folded.values.weight = nn.Parameter(torch.cat(values).t().contiguous().to(dtype), requires_grad=False)
    folded.norm, folded.feed_norm, folded.net = attend.norm, feed.norm, feed.fn.net
    return folded


class NVEmbedNetwork(nn.Module):
    """Backbone and head; `config` is the backbone's."""

    latent_attention_model: LatentAttention | FoldedLatentAttention

    def __init__(self, backbone: MistralConfig, settings: Mapping[str, Any], folded: bool = False) -> None:
        super().__init__()
        self.config = backbone
        self.normalize = bool(settings["output_normalize"])
        self.embedding_model = MistralModel(backbone)
        self.latent_attention_model = (FoldedLatentAttention if folded else LatentAttention)(settings)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pool_mask: torch.Tensor) -> torch.Tensor:
        """Embed a batch: int64 [b, length] three times to float32 [b, width]; every text needs a pooled token."""
        return self.pool(self.embedding_model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state, pool_mask)

    def pool(self, hidden: torch.Tensor, pool_mask: torch.Tensor) -> torch.Tensor:
        """Pool hidden states [b, length, width] by a mask, int64 [b, length], to float32 [b, width]."""
        text, position = pool_mask.nonzero(as_tuple=True)
        return self._normalized(self.latent_attention_model(hidden[text, position], mean_of_rows(text, len(hidden))))

    def pool_padded(self, hidden: torch.Tensor, pool_mask: torch.Tensor) -> torch.Tensor:
        """Pool as `pool` does, by steps whose shapes do not depend on the mask: the head sees all tokens, the mean not."""
        return self._normalized(self.latent_attention_model(hidden.flatten(0, 1), mean_of_padded(pool_mask)))

    def _normalized(self, pooled: torch.Tensor) -> torch.Tensor:
        return F.normalize(pooled, dim=1) if self.normalize else pooled


def is_folded(model: nn.Module) -> bool:
    """Whether a network is NV-Embed's with its head folded."""
    return isinstance(model, NVEmbedNetwork) and isinstance(model.latent_attention_model, FoldedLatentAttention)
