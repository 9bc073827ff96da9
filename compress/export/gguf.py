"""GGUF, the file format of llama.cpp: for BERTs and Mistrals, including NV-Embed's without its head.

Blocks of 32 values of a row share a scale: `Q8_0` is int8, `Q4_0` four bits centred on 8, `Q4_1` four bits above a minimum
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Our integers are copied: a group becomes several blocks with the same
scale, rounded to half precision as those scales of GGUF are; two and three bits are stored in four. `MXFP4` is copied as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.common.errors import UserError
from compress.export.base import Exportable, check_linears, check_numbers, open_for_export, refusal, stored
from compress.export.gguf_vocabulary import GGUFVocabulary, read_vocabulary
from compress.export.reader import READ_BACK_COSINE, Reader
from compress.layers.compressed import CompressedLinear
from compress.layers.float4_linear import Float4Linear
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.models.folder import ModelFolder
from compress.models.text.spec import Pooling

if TYPE_CHECKING:
    from gguf import GGUFWriter

LAYOUT, FILE = "gguf", "model.gguf"
NUMBERS = frozenset({Numbers.INTEGER, Numbers.MXFP4})
BLOCK = 32
Q4_0, Q4_1, Q8_0, MXFP4 = "Q4_0", "Q4_1", "Q8_0", "MXFP4"
# Two-dimensional tensors that llama.cpp needs in float32.
FLOAT32 = ("position_embd.weight", "token_types.weight")
# Lowest cosine to accept: llama.cpp rounds the input of every quantized layer.
EIGHT_BIT_COSINE = 0.999
# Maximum length of texts in the example, in tokens.
LONGEST = 4096
POOLINGS: dict[Pooling | tuple[Pooling, ...], str] = {Pooling.CLS: "CLS", Pooling.MEAN: "MEAN", Pooling.LAST: "LAST"}

OPENED = """\
import numpy
from llama_cpp import Llama

model = Llama("model.gguf", embedding=True, n_ctx={length}, n_batch={length}, n_ubatch={length}, verbose=False)
"""
POOLED = """
def embed(texts, prompt=""):
    return numpy.array([model.embed({prepared}, normalize={normalize}) for text in texts])
"""
BY_TOKEN = """
def embed(texts, prompt=""):
    skipped = len(model.tokenize(prompt.encode())) - {ends} if prompt else 0  # the network reads it, but the mean leaves it out
    vectors = numpy.array([numpy.mean(model.embed({prepared})[skipped:], axis=0) for text in texts])
    return {vectors}
"""


def write(source: ModelFolder, folder: Path) -> Reader:
    """Write a variant into an empty folder.

    Raises:
        UserError: llama.cpp does not support the architecture, the tokenizer or the numbers; the package gguf is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("the package gguf is not installed", "pip install 'compress-embedders[gguf]'") from error

    opened = open_for_export(source, LAYOUT)
    spec, config = opened.info.spec, opened.folder.config
    architecture = architecture_of(config, source.name)
    check_linears(opened.linears, LAYOUT, NUMBERS)
    for name, layer in opened.linears.items():
        check(name, layer, opened.shape(name)[1])
    for name in opened.tables:
        check(name, opened.info.quantized[name], opened.network.get_submodule(name).embedding_dim)  # type: ignore[arg-type]
    vocabulary = read_vocabulary(opened.folder.path / "tokenizer.json", int(config["vocab_size"]))
    # llama.cpp pools all tokens, including the prompt's. Where the mean leaves these out, the caller computes it.
    if spec.pooling not in POOLINGS or spec.layers or spec.modules or spec.dimensions or spec.truncation_side != "right":
        raise UserError(
            f"{source.name}: cannot be written as {LAYOUT}: llama.cpp has cls, mean and lasttoken pooling, and nothing after it",
            "onnx holds every pooling and what comes after it",
        )
    by_token = spec.pooling is Pooling.MEAN and not spec.pool_prompt
    writer = gguf.GGUFWriter(folder / FILE, architecture, use_temp_file=True)
    writer.add_name(opened.info.base)
    if opened.info.licence:
        writer.add_license(opened.info.licence)
    _describe(writer, config)
    writer.add_pooling_type(gguf.PoolingType.NONE if by_token else gguf.PoolingType[POOLINGS[spec.pooling]])
    vocabulary.write(writer)
    kinds = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], int(config["num_hidden_layers"]))
    for name, values, kind in _tensors(opened, config):
        found = names.get_name(name, (".weight", ".bias"))
        if found is None:
            raise UserError(f"{name}: cannot be written as {LAYOUT}: llama.cpp's {architecture} has no such tensor")
        if kind is None and (values.ndim == 1 or found in FLOAT32):
            values = values.astype(np.float32)
        writer.add_tensor(found, values, raw_dtype=None if kind is None else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _reader(opened, vocabulary, by_token)


def architecture_of(config: Mapping[str, Any], name: str) -> str:
    """Return llama.cpp's name for a model's architecture.

    Raises:
        UserError: llama.cpp or this export does not support it.
    """
    kind, rope = config["model_type"], config.get("rope_parameters") or {}
    if kind == "bert" and config.get("hidden_act", "gelu") == "gelu":
        return "bert"
    if kind == "mistral" and not config.get("sliding_window") and rope.get("rope_type", "default") == "default":
        return "llama" if config.get("is_causal", True) else "llama-embed"
    raise UserError(
        f"{name}: cannot be written as {LAYOUT}: this kind of {kind} model is not supported",
        "supported: BERTs with GELU, Mistrals without a sliding window",
    )


def check(name: str, layer: QuantizedLayer, inputs: int) -> None:
    """Check that blocks of 32 values can store a layer.

    Raises:
        UserError: they cannot, because of the kind of numbers, zeros with more than four bits, or widths.
    """
    check_numbers(name, layer, LAYOUT, NUMBERS)
    if layer.bits > 4 and not layer.symmetric:
        raise refusal(name, LAYOUT, f"have {layer.bits} bits and are asymmetric", "use symmetric weights, or four bits")
    for what, width in (("inputs", inputs), ("inputs per group", layer.group_size or BLOCK)):
        if width % BLOCK:
            raise refusal(name, LAYOUT, f"have {width} {what}, not a multiple of {BLOCK}", "choose another width or group_size")


def block_kind(layer: QuantizedLayer) -> str:
    """Return the type of block that stores a layer's integers."""
    if layer.bits > 4:
        return Q8_0
    return Q4_0 if layer.bits == 4 and layer.symmetric else Q4_1


def blocks(kind: str, integers: np.ndarray, scale: np.ndarray, zero: np.ndarray, group: int | None) -> np.ndarray:
    """Return rows of blocks, each with the scale, for `Q4_1` the minimum, and 32 values.

    Args:
        kind: `Q4_0`, `Q4_1` or `Q8_0`.
        integers: uint8 [rows, width].
        scale: [rows, groups].
        zero: uint8 [rows, groups].
        group: number of values that share a scale, a multiple of 32; None: all values of a row.

    Returns:
        uint8 [rows, bytes].
    """
    rows, width = integers.shape
    wide = integers.reshape(rows, -1, BLOCK)
    each, count = (group or width) // BLOCK, width // BLOCK  # the last group may be smaller
    step, middle = (np.repeat(values, each, axis=1)[:, :count, None] for values in (scale.astype(np.float16), zero))
    parts = [step.view(np.uint8)]
    if kind == Q8_0:
        parts.append((wide.astype(np.int16) - middle).astype(np.int8).view(np.uint8))
    else:
        if kind == Q4_1:
            least = (-step.astype(np.float32) * middle).astype(np.float16)
            parts.append(least.view(np.uint8))
        parts.append(wide[..., : BLOCK // 2] | wide[..., BLOCK // 2 :] << 4)
    return np.concatenate(parts, axis=2).reshape(rows, -1)


def float_blocks(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return rows of blocks of `MXFP4`, each with the scale and 32 values.

    Args:
        codes: E2M1's bits, uint8 [rows, width].
        scale: E8M0, uint8 [rows, width / 32].

    Returns:
        uint8 [rows, bytes].
    """
    wide = codes.reshape(len(codes), -1, BLOCK)
    halves = wide[..., : BLOCK // 2] | wide[..., BLOCK // 2 :] << 4
    return np.concatenate([scale[:, :, None], halves], axis=2).reshape(len(codes), -1)


def _tensors(opened: Exportable, config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray, str | None]]:
    """Yield names, values and types of blocks; type None: plain values in half precision."""
    for layers, tensors in stored(opened):
        for name, layer in layers.items():
            if isinstance(layer, QuantizedLinear | QuantizedEmbedding):
                integers, scale, zero = layer.integers(), layer.weight_scale, layer.zeros()
                kind = block_kind(layer.layer)
                scales = scale.view(len(scale), -1).numpy()
                rows = blocks(kind, integers.numpy(), scales, zero.numpy(), layer.layer.group_size)
                yield f"{name}.weight", _in_pairs(name, rows, config), kind
            elif isinstance(layer, Float4Linear):
                rows = float_blocks(layer.codes().numpy(), layer.weight_scale.numpy())
                yield f"{name}.weight", _in_pairs(name, rows, config), MXFP4
            else:
                assert isinstance(layer, CompressedLinear)
                yield f"{name}.weight", _in_pairs(name, layer.values().half().numpy(), config), None
        for name, tensor in tensors.items():
            yield name, _in_pairs(name.removesuffix(".weight"), tensor.half().numpy(), config), None


def _in_pairs(name: str, rows: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """Reorder the rows of a query or key projection: llama.cpp rotates neighbours, transformers the halves of a head."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.rpartition(".")[2])
    if heads is None:
        return rows
    return rows.reshape(config[heads], 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _describe(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write the hyperparameters of the network."""
    width, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_head_count(heads)
    writer.add_vocab_size(int(config["vocab_size"]))
    if config["model_type"] == "bert":
        writer.add_layer_norm_eps(float(config["layer_norm_eps"]))
        writer.add_causal_attention(False)
        return
    each = int(config.get("head_dim") or width // heads)
    rope = config.get("rope_parameters") or config
    writer.add_head_count_kv(int(config["num_key_value_heads"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_rope_dimension_count(each)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_key_length(each)
    writer.add_value_length(each)
    writer.add_causal_attention(bool(config.get("is_causal", True)))


def _reader(opened: Exportable, vocabulary: GGUFVocabulary, by_token: bool) -> Reader:
    spec = opened.info.spec
    length = min(opened.info.max_length, LONGEST)
    example = OPENED.format(length=length)
    prepared = "(prompt + text).lower()" if spec.lowercase else "prompt + text"
    if by_token:
        vectors = "vectors / numpy.linalg.norm(vectors, axis=1, keepdims=True)" if spec.normalize else "vectors"
        example += BY_TOKEN.format(ends=vocabulary.ends, prepared=prepared, vectors=vectors)
    else:
        example += POOLED.format(prepared=prepared, normalize=spec.normalize)
    notes = []
    if opened.linears:
        notes.append("llama.cpp rounds the inputs of quantized layers to 8 bits in blocks of 32, whatever the variant does.")
    if any(layer.activations is not ActivationScheme.NONE for layer in opened.linears.values()):
        notes.append("The variant's activation scales are not stored.")
    if length < opened.info.max_length:
        notes.append(
            f"The example truncates texts at {length:,} of {opened.info.max_length:,} tokens: llama.cpp's memory grows with"
            " the square of `n_ctx` (more than 30 GB at 32,768); raise it for longer texts."
        )
    if by_token:
        notes.append("The mean leaves prompts out, which llama.cpp does not support: the example pools the file's token vectors.")
    lowest = EIGHT_BIT_COSINE if opened.linears else READ_BACK_COSINE
    return Reader("llama.cpp", ("llama-cpp-python", "numpy"), example, lowest=lowest, notes=tuple(notes))
