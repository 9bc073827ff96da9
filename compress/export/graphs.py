"""A variant as a graph for a runtime alone: token ids in, vectors out; the tokenizer and an example that runs it lie beside.

Needs neither torch nor transformers nor this package: onnxruntime or openvino, tokenizers, numpy.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.common.files import write_json
from compress.export.reader import Reader
from compress.models.files.headers import weight_files
from compress.models.files.variant import INDEX_FILE
from compress.models.folder import ModelFolder
from compress.runtimes.contract import INPUTS, RuntimeName, graph_file, pick_runtime
from compress.runtimes.exported import SETTINGS_FILE

EXAMPLE = """\
import json
import numpy as np
{imports}
from tokenizers import Tokenizer

folder = "."  # where this file lies
settings = json.load(open(folder + "/embedder.json"))
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_padding()
{opening}

def embed(texts, prompt=""):
    prepare = str.lower if settings["lowercase"] else str
    rows = tokenizer.encode_batch([prepare(prompt + text) + settings["suffix"] for text in texts])
    ids, mask = (np.array([getattr(row, key) for row in rows]) for key in ("ids", "attention_mask"))
    pooled = mask.copy()
    if prompt and not settings["pool_prompt"]:  # the prompt is read, and does not enter the mean
        alone = tokenizer.encode(prepare(prompt), add_special_tokens=settings["prompt_specials"])
        pooled[:, : len(alone.ids) - (alone.special_tokens_mask or [0])[-1]] = 0
    inputs = [ids, mask, pooled][: len(settings["inputs"])]
    {running}
"""
IN_ONNXRUNTIME = {
    "imports": "import onnxruntime",
    "opening": """\
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations stay in float32
session = onnxruntime.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])""",
    "running": 'return session.run(None, dict(zip(settings["inputs"], inputs)))[0]',
}
IN_OPENVINO = {
    "imports": "import openvino",
    "opening": """\
exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # as it was stored, and no more rounding
compiled = openvino.Core().compile_model(folder + "/model.xml", "CPU", exact)""",
    "running": "return compiled(inputs)[0]",
}


def write_onnx(source: ModelFolder, folder: Path) -> Reader:
    """Write a variant into an empty folder as ONNX, its weights in the safetensors files that the graph refers to.

    Raises:
        UserError: onnxruntime does not execute the variant's numbers.
    """
    graph = _lowered(source, folder, RuntimeName.ONNXRUNTIME)
    graph.rename(folder / "model.onnx")
    return _reader(source, folder, RuntimeName.ONNXRUNTIME, IN_ONNXRUNTIME)


def write_openvino(source: ModelFolder, folder: Path) -> Reader:
    """Write a variant into an empty folder as OpenVINO's intermediate representation.

    Raises:
        UserError: openvino is not installed, or does not execute the variant's numbers.
    """
    graph = _lowered(source, folder, RuntimeName.OPENVINO)
    import openvino

    # Weights stay in the numbers that they are stored in.
    openvino.save_model(openvino.Core().read_model(graph), folder / "model.xml", compress_to_fp16=False)
    for path in (graph, *weight_files(folder), folder / INDEX_FILE):
        path.unlink(missing_ok=True)
    return _reader(source, folder, RuntimeName.OPENVINO, IN_OPENVINO)


def _lowered(source: ModelFolder, folder: Path, runtime: RuntimeName) -> Path:
    """Copy a variant and write its graph for a runtime beside its weights."""
    from compress.runtimes.lower import lower

    pick_runtime(runtime, source.compressed.quantized)
    for path in (*source.weight_files, *(source.path / name for name in ("config.json", "variant.json", INDEX_FILE))):
        if path.exists():
            shutil.copy(path, folder / path.name)
    lower(ModelFolder(source.name, folder), runtime)
    for name in ("config.json", "variant.json"):
        (folder / name).unlink()
    return graph_file(folder, runtime)


def _reader(source: ModelFolder, folder: Path, runtime: RuntimeName, words: dict[str, str]) -> Reader:
    """Write what lies beside a graph, and say how it is run."""
    source.tokenizer.save(folder / "tokenizer.json")  # with its longest input, which it cuts itself
    spec = source.spec
    settings = {
        "dimension": source.dimension,
        "max_length": source.tokenizer.max_length,
        "prompts": spec.prompts,
        "default_prompt": spec.default_prompt,
        "pool_prompt": spec.pool_prompt,
        "prompt_specials": spec.prompt_specials,
        "lowercase": spec.lowercase,
        "suffix": spec.suffix,
        "normalized": spec.normalize,
        "inputs": list(INPUTS[:2] if spec.pool_prompt else INPUTS),
    }
    write_json(folder / SETTINGS_FILE, settings)
    return Reader(str(runtime), (str(runtime), "tokenizers", "numpy"), EXAMPLE.format(**words), runtime, quantizes=True)
