"""One way of running an embedder, in its own process: JSON lines in, JSON lines out.

`peers_quantization.py` starts it with the Python of the environment that the peer needs; nobody calls it by hand. It imports
nothing of ours unless the peer is one of ours, and nothing that the peer does not need, so that the process's memory is the peer's.
What converts, exports or quantizes is `prepare`, in an earlier process; the one that is measured loads what that left in a folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

BATCH = 32  # sentence-transformers' own default


def cast(base: Path, folder: Path, dtype: str) -> None:
    """Copy a model with its weights in another dtype, so that the measured process reads only what it needs."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("onnx", "openvino", ".*"))
    for file in folder.rglob("*.safetensors"):
        tensors = {
            name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(file).items()
        }
        written = file.with_suffix(".cast")  # the tensors may still be pages of the file
        save_file(tensors, written, {"format": "pt"})
        written.replace(file)


def weights_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("pytorch_model*.bin"))


class SentenceTransformers:
    """`SentenceTransformer.encode` with its defaults, in torch; subclasses differ in how the model is made and opened."""

    def __init__(self, folder: Path, side: dict[str, Any], dtype: str) -> None:
        self.open(folder, model_kwargs={"dtype": dtype})
        self.files = weights_in(folder)

    @staticmethod
    def prepare(base: Path, folder: Path, side: dict[str, Any], dtype: str) -> None:
        cast(base, folder, dtype)

    def open(self, folder: Path, **arguments: Any) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(folder), device="cpu", **arguments)

    def encode(self, texts: list[str]) -> Any:
        return self.model.encode(texts)

    def remark(self) -> str:
        return ""


class SentenceTransformersOnnx(SentenceTransformers):
    """The ONNX backend of sentence-transformers with its dynamic int8 export for AVX512-VNNI."""

    FILE = "onnx/model_qint8_avx512_vnni.onnx"

    def __init__(self, folder: Path, side: dict[str, Any]) -> None:
        self.open(folder, backend="onnx", model_kwargs={"file_name": self.FILE})
        self.files = [folder / self.FILE]

    @staticmethod
    def prepare(base: Path, folder: Path, side: dict[str, Any]) -> None:
        from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

        model = SentenceTransformer(str(base), device="cpu", backend="onnx")
        model.save_pretrained(str(folder))
        export_dynamic_quantized_onnx_model(model, "avx512_vnni", str(folder))


class SentenceTransformersOpenVino(SentenceTransformers):
    """The OpenVINO backend of sentence-transformers, with its default export or its static int8 export."""

    def __init__(self, folder: Path, side: dict[str, Any], static: bool) -> None:
        stem = folder / "openvino" / ("openvino_model_qint8_quantized" if static else "openvino_model")
        self.files = [stem.with_suffix(".xml"), stem.with_suffix(".bin")]
        self.open(folder, backend="openvino", model_kwargs={"file_name": f"openvino/{stem.name}.xml"})

    @staticmethod
    def prepare(base: Path, folder: Path, side: dict[str, Any], static: bool) -> None:
        from sentence_transformers import SentenceTransformer, export_static_quantized_openvino_model

        model = SentenceTransformer(str(base), device="cpu", backend="openvino")
        model.save_pretrained(str(folder))
        if static:  # None: its own configuration; the dataset may be a local folder, and then none is looked for on the hub
            export_static_quantized_openvino_model(
                model, None, str(folder),
                dataset_name=side["calibration"], dataset_config_name="default", dataset_split="train", column_name="text",
            )  # fmt: skip

    def remark(self) -> str:
        compiled = self.model.transformers_model.request
        return f"computes in {compiled.get_property('INFERENCE_PRECISION_HINT').to_string()} what is not int8"


class BitsAndBytes(SentenceTransformers):
    """sentence-transformers with the linear layers in LLM.int8(), with the defaults of transformers."""

    def __init__(self, folder: Path, side: dict[str, Any]) -> None:
        self.open(folder)
        self.files = weights_in(folder)

    @staticmethod
    def prepare(base: Path, folder: Path, side: dict[str, Any]) -> None:
        from sentence_transformers import SentenceTransformer
        from transformers import BitsAndBytesConfig

        wanted = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
        SentenceTransformer(str(base), device="cpu", model_kwargs=wanted).save_pretrained(str(folder))


class Loop:
    """A hand-written pipeline around a network: a Rust tokenizer, batches sorted by length, pooling in numpy."""

    def __init__(self, side: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        if side["pooling"] not in ("mean", "cls"):
            raise ValueError(f"{side['pooling']} pooling is not written here")
        self.side = side
        self.tokenizer = Tokenizer.from_file(str(Path(side["network"]) / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(side["max_length"])

    def hidden(self, rows: list[list[int]], mask: Any) -> Any:
        """Return the last hidden states of token ids: float32 [texts, longest, dimension]."""
        raise NotImplementedError

    def encode(self, texts: list[str]) -> Any:
        import numpy as np

        rows = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        pooled = []
        for start in range(0, len(rows), BATCH):
            chosen = [rows[index] for index in order[start : start + BATCH]]
            lengths = np.array([len(row) for row in chosen])[:, None]
            mask = np.arange(lengths.max()) < lengths
            hidden = self.hidden(chosen, mask)
            if self.side["pooling"] == "mean":
                pooled.append(((mask / lengths).astype(np.float32)[:, None] @ hidden)[:, 0])
            else:
                pooled.append(hidden[:, 0].copy())
        vectors = np.concatenate(pooled)[np.argsort(order)]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if self.side["normalize"] else vectors

    def remark(self) -> str:
        return ""


class OnnxRuntime(Loop):
    """onnxruntime on torch's own export, in float32 or with the defaults of `quantize_dynamic`."""

    def __init__(self, folder: Path, side: dict[str, Any], dynamic: bool) -> None:
        import onnxruntime

        super().__init__(side)
        file = folder / ("dynamic.onnx" if dynamic else "model.onnx")
        self.files = sorted(folder.glob(f"{file.name}*"))
        self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    @staticmethod
    def prepare(base: Path, folder: Path, side: dict[str, Any], dynamic: bool) -> None:
        import torch
        from transformers import AutoModel

        class Hidden(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = AutoModel.from_pretrained(side["network"], dtype=torch.float32)

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:
                return self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

        # Two tensors, not one twice: of one the exporter makes one input.
        ids, axes = torch.ones(2, 16, dtype=torch.int64), {0: "batch", 1: "length"}
        network = Hidden().eval()
        large = sum(weight.nbytes for weight in network.parameters()) > 1 << 31  # more than one protobuf holds
        torch.onnx.export(
            network, (ids, torch.ones_like(ids)), str(folder / "model.onnx"), dynamo=True, external_data=large,
            input_names=["input_ids", "attention_mask"], output_names=["hidden"], dynamic_shapes=(axes, axes),
        )  # fmt: skip
        if dynamic:
            from onnxruntime.quantization import quantize_dynamic

            quantize_dynamic(folder / "model.onnx", folder / "dynamic.onnx", use_external_data_format=large)

    def hidden(self, rows: list[list[int]], mask: Any) -> Any:
        import numpy as np

        ids = np.zeros(mask.shape, dtype=np.int64)
        ids[mask] = np.concatenate(rows)
        return self.session.run(None, {"input_ids": ids, "attention_mask": mask.astype(np.int64)})[0]


class CTranslate2(Loop):
    """CTranslate2 with weights and products in int8."""

    def __init__(self, folder: Path, side: dict[str, Any]) -> None:
        import ctranslate2

        super().__init__(side)
        self.files = [folder / "converted" / "model.bin"]
        self.encoder = ctranslate2.Encoder(str(folder / "converted"), device="cpu")

    @staticmethod
    def prepare(base: Path, folder: Path, side: dict[str, Any]) -> None:
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(side["network"]).convert(str(folder / "converted"), quantization="int8")

    def hidden(self, rows: list[list[int]], mask: Any) -> Any:
        import numpy as np

        return np.asarray(self.encoder.forward_batch(rows).last_hidden_state)

    def remark(self) -> str:
        return f"computes in {self.encoder.compute_type}"


class Ours:
    """`compress.load`: a variant, or the base in a dtype."""

    def __init__(
        self, folder: Path, side: dict[str, Any], model: str | None = None, dtype: str | None = None, runtime: str | None = None
    ) -> None:
        from compress.models.source import find
        from compress.runtimes.loading import load

        given = {"dtype": dtype, "runtime": runtime}
        self.model = load(model or str(folder), device="cpu", **{key: value for key, value in given.items() if value})
        self.files = weights_in(find(model or str(folder)).path)

    @classmethod
    def prepare(
        cls,
        base: Path,
        folder: Path,
        side: dict[str, Any],
        model: str | None = None,
        dtype: str | None = None,
        runtime: str | None = None,
    ) -> None:
        if model is None:
            cast(base, folder, dtype or "float32")
        else:  # what its runtime makes of a variant and keeps is made here
            cls(folder, side, model, dtype, runtime).encode(["a text"])

    def encode(self, texts: list[str]) -> Any:
        return self.model.encode(texts)

    def remark(self) -> str:
        return ""


PEERS = {
    peer.__name__: peer
    for peer in (
        SentenceTransformers,
        SentenceTransformersOnnx,
        SentenceTransformersOpenVino,
        BitsAndBytes,
        OnnxRuntime,
        CTranslate2,
        Ours,
    )
}


def process_status(field: str) -> int | None:
    """Return a number about this process from the kernel; None where the kernel does not report it."""
    path = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+)", path.read_text(encoding="ascii"), re.M) if path.exists() else None
    return int(found.group(1)) if found else None


class Worker:
    """Answers requests about one peer."""

    def __init__(self) -> None:
        self.peer: Any = None

    def versions(self) -> dict[str, str]:
        """Tell the packages of this environment."""
        return {"python": sys.version.split()[0], **{one.name: one.version for one in metadata.distributions()}}

    def prepare(self, peer: str, base: str, folder: str, side: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Convert the base model into a folder."""
        PEERS[peer].prepare(Path(base), Path(folder), side, **options)
        return {}

    def load(self, peer: str, folder: str, side: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
        """Load what was prepared, and say how large its weights are on disk."""
        self.peer = PEERS[peer](Path(folder), side, **options)
        return {"weights_bytes": sum(file.stat().st_size for file in self.peer.files)}

    def encode(self, texts: list[str]) -> dict[str, Any]:
        """Encode all texts once; seconds, and seconds of all cores together."""
        start, cpu = time.perf_counter(), time.process_time()
        self.peer.encode(texts)
        return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}

    def save(self, texts: list[str], path: str) -> dict[str, Any]:
        """Encode texts into a file: float32 [texts, dimension]."""
        import numpy as np

        np.save(path, np.asarray(self.peer.encode(texts), dtype=np.float32))
        return {}

    def memory(self, texts: list[str]) -> dict[str, Any]:
        """Encode all texts once and say what this process has held at most since its start."""
        self.peer.encode(texts)
        peak = process_status("VmHWM")
        return {"peak_bytes": None if peak is None else 1024 * peak}

    def threads(self) -> dict[str, Any]:
        """Tell the threads of this process, those at rest among them, and what the peer says of itself."""
        return {"threads": process_status("Threads"), "remark": self.peer.remark()}


def main() -> None:
    """Serve requests until standard input closes."""
    # Libraries print; the answers go to the original standard output, everything else to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
