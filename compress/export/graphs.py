"""A variant as a graph from token ids to vectors, with its tokenizer and an example that runs it.

Running it needs onnxruntime or openvino, tokenizers and numpy, but neither torch nor transformers nor this package.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.common.errors import UserError
from compress.common.files import write_json
from compress.common.inputs import own_file
from compress.export.reader import Reader
from compress.models.files.headers import INDEX_FILE, weight_files
from compress.models.folder import ModelFolder
from compress.runtimes.contract import Kind, graph_file, graph_inputs, pick_runtime
from compress.runtimes.exported import SETTINGS_FILE

ONNXRUNTIME, OPENVINO = "onnxruntime", "openvino"

EXAMPLE = """\
import json
import numpy as np
{imports}
from tokenizers import Tokenizer

folder = "."  # the folder of this file
settings = json.load(open(folder + "/embedder.json"))
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_padding()
{opening}

def embed(texts, prompt=""):
    prepare = str.lower if settings["lowercase"] else str
    rows = tokenizer.encode_batch([prepare(prompt + text) + settings["suffix"] for text in texts])
    ids, mask = (np.array([getattr(row, key) for row in rows]) for key in ("ids", "attention_mask"))
    pooled = mask.copy()
    if prompt and not settings["pool_prompt"]:  # the network reads the prompt, but the mean leaves it out
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
exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}  # no further rounding
compiled = openvino.Core().compile_model(folder + "/model.xml", "CPU", exact)""",
    "running": "return compiled(inputs)[0]",
}


def write_onnx(source: ModelFolder, folder: Path) -> Reader:
    """Write a variant into an empty folder as ONNX; the graph refers to the weights in the safetensors files.

    Raises:
        UserError: onnxruntime does not execute the variant's numbers.
    """
    graph = _lowered(source, folder, ONNXRUNTIME)
    graph.rename(folder / "model.onnx")
    return _reader(source, folder, ONNXRUNTIME, IN_ONNXRUNTIME)


def write_openvino(source: ModelFolder, folder: Path) -> Reader:
    """Write a variant into an empty folder as OpenVINO's intermediate representation.

    Raises:
        UserError: openvino is not installed, or does not execute the variant's numbers.
    """
    graph = _lowered(source, folder, OPENVINO)
    import openvino

    # Keep the weights in their stored dtypes.
    openvino.save_model(openvino.Core().read_model(graph), folder / "model.xml", compress_to_fp16=False)
    for path in (graph, *weight_files(folder), folder / INDEX_FILE):
        path.unlink(missing_ok=True)
    return _reader(source, folder, OPENVINO, IN_OPENVINO)


def _lowered(source: ModelFolder, folder: Path, runtime: str) -> Path:
    """Copy a variant and write its graph for a runtime next to its weights."""
    from compress.runtimes.lower import lower

    _check_texts(source, runtime)
    pick_runtime(runtime, source.compressed.quantized, kind=Kind(static=source.is_static))
    for path in (*source.weight_files, *(source.path / name for name in ("config.json", "variant.json", INDEX_FILE))):
        if path.exists():
            shutil.copyfile(own_file(source.path, path), folder / path.name)
    lower(ModelFolder(source.name, folder), runtime)
    for name in ("config.json", "variant.json"):
        (folder / name).unlink()
    return graph_file(folder, runtime)


def _check_texts(source: ModelFolder, layout: str) -> None:
    """See that what is done to texts is what the export's example does to them.

    Raises:
        UserError: texts are cut by characters, or unknown tokens are left out, which only model2vec does too.
    """
    spec = source.spec
    if spec.skip_unknown or spec.max_characters is not None:
        raise UserError(
            f"{source.name}: cannot be written as {layout}: it takes texts as model2vec does, which leaves unknown tokens out",
            "use the variant as it is, or export it as model2vec",
        )


def _reader(source: ModelFolder, folder: Path, runtime: str, words: dict[str, str]) -> Reader:
    """Write the tokenizer and the settings of a graph, and return how it is run."""
    source.tokenizer.save(folder / "tokenizer.json")  # it truncates to the maximum length itself
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
        "similarity": spec.similarity,
        "inputs": list(graph_inputs(spec.pool_prompt)),
    }
    write_json(folder / SETTINGS_FILE, settings)
    return Reader(runtime, (runtime, "tokenizers", "numpy"), EXAMPLE.format(**words), runtime, quantizes=True)
