"""Graph runtimes execute a variant's own numbers: the weights' bytes, the vectors, what is refused, without torch, by many threads."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors import safe_open
from tests_support import compress_to, folder_of

import compress
import compress.common.machine
from compress.common.errors import UserError
from compress.data.texts import mixed_texts as mixed_texts_of
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.measure.vectors.fidelity import cosines
from compress.methods.base import Method
from compress.methods.nv_embed.fold import Fold
from compress.methods.prune.depth import Depth
from compress.methods.prune.width import Width
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.quantize.gptq import GPTQ
from compress.methods.quantize.rtn import RTN
from compress.methods.quantize.smoothquant import SmoothQuant
from compress.models.files.variant import VariantInfo
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import Measure, Recipe
from compress.runtimes import contract, onnx_trial
from compress.runtimes.contract import GRAPH_RUNTIMES, RUNTIMES, TORCH, graph_file, pick_runtime
from compress.runtimes.lower import lower
from compress.runtimes.onnx_trial import multiplies_groups
from compress.runtimes.torch_runtime import open_variant as open_torch

BOTH = list(GRAPH_RUNTIMES)
TEXTS = ["", "a", "one two", "the parcel never came, and nobody at the depot knew of it", "🙂 日本語", "rain by the evening"]


def opened(folder: Path, runtime: str, **settings: object):  # type: ignore[no-untyped-def]
    if runtime in BOTH:
        pytest.importorskip(runtime, reason=f"{runtime} is not installed")
        if not graph_file(folder, runtime).exists():
            lower(folder_of(folder), runtime)
    return compress.load(str(folder), runtime=runtime, device="cpu", **settings)


@pytest.mark.parametrize(
    ("kind", "pooling", "normalize", "runtime"),
    [
        pytest.param("bert", "mean", True, "openvino", marks=pytest.mark.slow),
        pytest.param("bert", "cls", False, "onnxruntime", marks=pytest.mark.slow),
        pytest.param("roberta", "mean", True, "onnxruntime", marks=pytest.mark.slow),
        ("mistral", "lasttoken", True, "openvino"),  # with its causal mask
        pytest.param("qwen3", "mean", False, "onnxruntime", marks=pytest.mark.slow),
        # Layers of two kinds, each with a mask of its own, are in the blocks of all kinds too.
        pytest.param("modernbert", "cls", True, "openvino", marks=pytest.mark.slow),
        pytest.param("gemma3_text", "mean", True, "onnxruntime", marks=pytest.mark.slow),
    ],
)
def test_half_precision_gives_torch_s_vectors(
    make_model, mixed_texts, tmp_path: Path, kind: str, pooling: str, normalize: bool, runtime: str
) -> None:
    compress_to(make_model(kind, pooling, normalize), tmp_path / "variant")
    texts = mixed_texts[:60]  # empty, of one token, of 5,000 words
    ours, theirs = (opened(tmp_path / "variant", name).encode(texts) for name in (runtime, "torch"))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


INTEGERS: dict[str, tuple[Method, ...]] = {
    "int8": (RTN(activations="none"),),
    "int8-groups": (RTN(activations="none", group_size=32, symmetric=False),),
    "int4-rows": (RTN(bits=4, activations="none"),),
    "int4-g16": (RTN(bits=4, activations="none", group_size=16),),
    "int4-g16-zeros": (RTN(bits=4, activations="none", group_size=16, symmetric=False),),
    "int4-zeros-ragged": (RTN(bits=4, activations="none", group_size=32, symmetric=False),),
    "table8": (Embeddings(bits=8),),
    "table8-groups": (Embeddings(bits=8, group_size=32),),
    "table4": (Embeddings(bits=4, group_size=32),),
}


IN_BRIEF = {("int4-g16-zeros", "onnxruntime"), ("int4-zeros-ragged", "openvino")}
"""What the blocks of all kinds, which have eight bits, four bits and a table of four in both runtimes, do not have."""


@pytest.mark.parametrize(
    ("steps", "runtime"),
    [
        pytest.param(steps, runtime, id=f"{name}-{runtime}", marks=[] if (name, runtime) in IN_BRIEF else [pytest.mark.slow])
        for name, steps in INTEGERS.items()
        for runtime in BOTH
        # Where both are given the same operators, one is enough.
        if (name, runtime) not in {("int4-rows", "onnxruntime"), ("table8", "openvino"), ("table8-groups", "onnxruntime")}
    ],
)
def test_integer_weights_give_torch_s_vectors(
    request: pytest.FixtureRequest, bert: Path, tmp_path: Path, runtime: str, steps: tuple[Method, ...]
) -> None:
    compress_to(bert, tmp_path / "variant", *steps)
    if "ragged-openvino" in request.node.name:
        with pytest.raises(
            UserError, match="has 48 four-bit inputs in groups of 32; openvino takes only groups that divide the inputs"
        ):
            lower(folder_of(tmp_path / "variant"), runtime)
        return
    ours, theirs = (opened(tmp_path / "variant", name).encode(TEXTS) for name in (runtime, "torch"))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


needs_byte_products = pytest.mark.skipif(
    not compress.common.machine.multiplies_bytes_exactly(),
    reason="byte products overflow on this CPU, so that graph runtimes refuse quantized activations (see test_more_refusals)",
)
STATIC, PER_TOKEN = SmoothQuant(activations="static_per_tensor"), RTN(activations="dynamic_per_token")


@needs_byte_products
@pytest.mark.parametrize(
    ("kind", "runtime", "step"),
    [
        ("bert", "openvino", STATIC),
        ("mistral", "openvino", STATIC),
        ("bert", "onnxruntime", STATIC),
        ("bert", "onnxruntime", PER_TOKEN),
        ("mistral", "onnxruntime", PER_TOKEN),
        ("bert", "onnxruntime", RTN(activations="dynamic_per_tensor")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.activations,
)
def test_quantized_activations_are_the_same_integers(make_model, tmp_path: Path, kind: str, runtime: str, step: Method) -> None:
    compress_to(make_model(kind), tmp_path / "variant", step)
    ours, theirs = (opened(tmp_path / "variant", name) for name in (runtime, "torch"))
    # One by one, because one scale for all tokens of a batch would see other texts.
    found = [float(cosines(ours.encode([text]), theirs.encode([text]))[0]) for text in TEXTS]
    # A value that floating point moves across the middle between two integers is rounded to the other one.
    assert np.min(found) > 0.9995
    assert np.median(found) > 0.9999


NARROW = (Depth(drop=(1,)), Width(overrides={"*.0": {"channels": 0.5}, "*.2": {"channels": 0.8}}))
FOUR_BITS = {"bits": 4, "group_size": 8, "activations": "none"}


@pytest.mark.parametrize("runtime", BOTH)
def test_blocks_of_all_kinds_give_torch_s_vectors(make_model, tmp_path: Path, runtime: str) -> None:
    """A block is left out, two are narrower, and layers and the table have bits of their own."""
    weights = RTN(activations="none", overrides={"*.Wqkv": FOUR_BITS})
    compress_to(make_model("modernbert"), tmp_path / "variant", *NARROW, weights, Embeddings(bits=4, group_size=16))
    ours, theirs = (opened(tmp_path / "variant", name).encode(TEXTS) for name in (runtime, "torch"))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


@needs_byte_products
@pytest.mark.parametrize(
    ("runtime", "steps"),
    [
        ("openvino", (SmoothQuant(activations="static_per_tensor", skip=("*.Wqkv",)), RTN(**FOUR_BITS))),
        ("onnxruntime", (RTN(overrides={"*.Wqkv": FOUR_BITS, "*attn.Wo": {"activations": "none"}}),)),
    ],
    ids=BOTH,
)
def test_blocks_of_all_kinds_with_mixed_activations(make_model, tmp_path: Path, runtime: str, steps: tuple[Method, ...]) -> None:
    compress_to(make_model("modernbert"), tmp_path / "variant", *NARROW, *steps, Embeddings(bits=4, group_size=16))
    assert len({layer.activations for layer in VariantInfo.read(tmp_path / "variant").quantized.values()}) == 2
    ours, theirs = (opened(tmp_path / "variant", name) for name in (runtime, "torch"))
    found = [float(cosines(ours.encode([text]), theirs.encode([text]))[0]) for text in TEXTS]
    assert np.min(found) > 0.9995
    assert np.median(found) > 0.9999


def test_a_mixture_that_a_runtime_does_not_execute_is_refused_before_it_is_made(
    make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "multiplies_bytes_exactly", lambda: True)
    monkeypatch.setattr(contract.Runtime, "is_installed", property(lambda self: True))
    folder = make_model("modernbert")
    ragged = RTN(activations="none", overrides={"*.0.mlp.Wo": {"bits": 4, "group_size": 16}})
    dynamic = RTN(activations="none", overrides={"*.0.mlp.Wo": {"activations": "dynamic_per_token"}})
    for step, said in (
        (ragged, r"layers\.0\.mlp\.Wo has 40 four-bit inputs in groups of 16; openvino takes only groups that divide the inputs"),
        (dynamic, r"openvino does not execute int8 weights with activations dynamic_per_token \(.*layers\.0\.mlp\.Wo\)"),
    ):
        recipe = Recipe(model=str(folder), runtime="openvino", steps=(*NARROW, step), measure=Measure(what=()))
        assert re.search(said, make_plan(recipe, folder_of(folder).shape, tmp_path).problems[-1])
        with pytest.raises(UserError, match=said) as refused:
            compress.run(recipe, output=tmp_path / "runs")
        assert "onnxruntime" in refused.value.hint


@pytest.mark.parametrize(
    ("kind", "group_size", "symmetric"),
    [
        pytest.param("bert", 16, True, marks=pytest.mark.slow),
        ("bert", 32, False),
        pytest.param("mistral", 16, False, marks=pytest.mark.slow),
    ],
    ids=["bert", "bert-zeros-ragged", "mistral-zeros"],
)
def test_activations_are_rounded_in_the_groups_of_the_weight(
    make_model, tmp_path: Path, kind: str, group_size: int, symmetric: bool
) -> None:
    """Without byte products too: two products of four bits by eight fit into sixteen."""
    step = RTN(bits=4, group_size=group_size, symmetric=symmetric, activations="dynamic_per_group")
    compress_to(make_model(kind), tmp_path / "variant", step)
    ours = opened(tmp_path / "variant", "onnxruntime").encode(TEXTS)
    theirs, unrounded = (open_torch(folder_of(tmp_path / "variant"), activations=rounds).encode(TEXTS) for rounds in (True, False))
    # A value that lies between two integers may be rounded to the other one; that changes little.
    assert np.abs(ours - theirs).max() < 0.1 * np.abs(unrounded - theirs).max()


@pytest.mark.parametrize("group_size", sorted(RUNTIMES["onnxruntime"].grouped_sizes or ()))
def test_onnxruntime_multiplies_rounded_groups_exactly(group_size: int) -> None:
    assert multiplies_groups(group_size)


def test_a_product_that_leaves_activations_as_they_are_is_refused(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `MatMulNBits` does at accuracy level 4 where it has no such kernel."""
    compress_to(bert, tmp_path / "variant", RTN(bits=4, group_size=16, activations="dynamic_per_group"))
    graph_file(tmp_path / "variant", "onnxruntime").touch()  # what is refused is never read
    monkeypatch.setattr(onnx_trial, "INT8_LEVEL", 1)
    multiplies_groups.cache_clear()
    with pytest.raises(UserError, match=r"no exact product of activations rounded in groups of 16 on this CPU") as refused:
        opened(tmp_path / "variant", "onnxruntime")
    multiplies_groups.cache_clear()
    assert refused.value.hint == "runtime: torch"


@needs_byte_products
def test_minilm_s_int8_vectors_agree_as_far_as_rounding_lets_them(minilm: Path, tmp_path: Path) -> None:
    """Through six blocks of static int8, changes of a hundred-thousandth grow: torch is as far from itself as runtimes are from it."""
    compress_to(minilm, tmp_path / "variant", STATIC)
    texts = mixed_texts_of(64, seed=0)
    theirs, moved = opened(tmp_path / "variant", "torch"), opened(tmp_path / "variant", "torch")
    expected = theirs.encode(texts)
    norm = moved.model.embeddings.LayerNorm.weight
    norm.data *= 1 + 1e-5 * torch.randn(norm.shape, generator=torch.Generator().manual_seed(0))
    itself = 1 - cosines(moved.encode(texts), expected).mean()
    assert itself < 2e-3
    for runtime in BOTH:
        assert 1 - cosines(opened(tmp_path / "variant", runtime).encode(texts), expected).mean() < 1.5 * itself


@pytest.mark.parametrize(
    ("steps", "runtime"),
    [
        pytest.param((), "onnxruntime", marks=pytest.mark.slow),
        ((Fold(),), "openvino"),
        pytest.param((Fold(), GPTQ(bits=4, group_size=16)), "onnxruntime", marks=pytest.mark.slow),
    ],
    ids=["published", "folded", "int4"],
)
def test_nv_embed_with_its_prompt_left_out_of_the_pool(nv_embed: Path, tmp_path: Path, runtime: str, steps: tuple) -> None:
    compress_to(nv_embed, tmp_path / "variant", *steps)
    ours, theirs = (opened(tmp_path / "variant", name) for name in (runtime, "torch"))
    prompts = ("Instruct: find it\nQuery: ", "")
    for prompt in prompts:
        assert cosines(ours.encode(TEXTS, prompt), theirs.encode(TEXTS, prompt)).min() > 1 - 1e-6
    assert not np.allclose(*(ours.encode(TEXTS, prompt) for prompt in prompts), atol=1e-3)


@pytest.mark.parametrize(
    ("step", "runtime"),
    [
        (RTN(bits=4, activations="none", group_size=16), "openvino"),
        pytest.param(STATIC, "onnxruntime", marks=pytest.mark.slow),
        pytest.param(STATIC, "openvino", marks=pytest.mark.slow),
        pytest.param(RTN(bits=4, activations="none", group_size=16), "onnxruntime", marks=pytest.mark.slow),
    ],
)
def test_a_graph_s_weights_are_the_variant_s_bytes(bert: Path, tmp_path: Path, runtime: str, step: Method) -> None:
    folder = tmp_path / "variant"
    compress_to(bert, folder, step, Embeddings(bits=8))
    lower(folder_of(folder), runtime)
    model = onnx.load(graph_file(folder, runtime))  # with what it refers to
    seen = set()
    with safe_open(folder / "model.safetensors", "numpy") as stored:
        for weight in model.graph.initializer:
            name = weight.name.removesuffix(".pairs")
            if name in stored.keys():  # noqa: SIM118  not a mapping
                seen.add(name)
                assert weight.raw_data == stored.get_tensor(name).tobytes()
        # Scales and factors of an input that several layers share are referred to once.
        left = {name for name in set(stored.keys()) - seen if not name.endswith((".input_scale", ".input_factor"))}
    assert not left
    assert graph_file(folder, runtime).stat().st_size < 200_000


@pytest.fixture(scope="module")
def int8(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A variant whose graphs are written by the first test that opens them."""
    folder = tmp_path_factory.mktemp("int8") / "variant"
    compress_to(bert, folder, RTN(activations="none"))
    return folder


def test_batches_streams_and_order_change_nothing(int8: Path, mixed_texts) -> None:
    for runtime in BOTH:
        whole = opened(int8, runtime, threads=1).encode(mixed_texts[:150], batch_tokens=10_000)
        small = opened(int8, runtime, threads=4).encode(mixed_texts[:150], batch_tokens=64)
        np.testing.assert_allclose(whole, small, atol=1e-5)


@pytest.mark.parametrize("runtime", BOTH)
def test_eight_threads_of_small_requests(int8: Path, mixed_texts, runtime: str) -> None:
    embedder = opened(int8, runtime, threads=2)
    requests = [mixed_texts[start : start + 3] for start in range(0, 240, 3)]
    alone = [embedder.encode(texts) for texts in requests]
    answers: list[np.ndarray | None] = [None] * len(requests)

    def serve(first: int) -> None:
        for index in range(first, len(requests), 8):
            answers[index] = embedder.encode(requests[index])

    threads = [threading.Thread(target=serve, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer, expected in zip(answers, alone, strict=True):
        np.testing.assert_array_equal(answer, expected)


WITHOUT_TORCH = """
import sys
import compress
embedder = compress.load(sys.argv[1])
assert embedder.encode(["a text", ""]).shape == (2, 48)
heavy = {"torch", "transformers", "onnx", "mteb"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("runtime", "written"),
    [
        ("onnxruntime", True),
        pytest.param("onnxruntime", False, marks=pytest.mark.slow),
        pytest.param("openvino", False, marks=pytest.mark.slow),
    ],
)
def test_a_variant_runs_where_it_was_made_for_without_torch(int8: Path, tmp_path: Path, runtime: str, written: bool) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    if written:
        opened(int8, runtime)
    folder = Path(shutil.copytree(int8, tmp_path / "variant"))
    VariantInfo.read(folder).model_copy(update={"runtime": runtime}).write(folder)
    if not written:
        for name in BOTH:
            graph_file(folder, name).unlink(missing_ok=True)  # another process writes it
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(folder)], check=True)
    assert graph_file(folder, runtime).exists()


def test_bfloat16_in_openvino(int8: Path) -> None:
    exact, rounded = (opened(int8, "openvino", dtype=dtype).encode(TEXTS) for dtype in ("float32", "bfloat16"))
    cosine = (exact * rounded).sum(axis=1)
    assert cosine.min() > 0.999
    if "avx512_bf16" in compress.common.machine.cpu_flags():
        assert cosine.min() < 1 - 1e-7


def layer(**settings: object) -> dict[str, QuantizedLayer]:
    return {"encoder.layer.0.output.dense": QuantizedLayer(**{"bits": 8, **settings})}  # type: ignore[arg-type]


def test_auto_is_the_fastest_that_executes_the_variant_s_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = set(RUNTIMES)
    monkeypatch.setattr(contract.Runtime, "is_installed", property(lambda self: self.name in installed))
    monkeypatch.setattr(contract, "multiplies_bytes_exactly", lambda: True)
    static, dynamic = ({"activations": ActivationScheme(name)} for name in ("static_per_tensor", "dynamic_per_token"))
    assert pick_runtime("auto", layer(**static)) == "openvino"
    assert pick_runtime("auto", layer(**dynamic)) == "onnxruntime"
    assert pick_runtime("auto", layer(bits=3)) == "torch"
    grouped = {"bits": 4, "group_size": 64, "activations": ActivationScheme.DYNAMIC_PER_GROUP}
    monkeypatch.setattr(contract, "multiplies_bytes_exactly", lambda: False)
    assert pick_runtime("auto", layer(**grouped)) == "onnxruntime"
    assert pick_runtime("auto", layer(**static)) == "torch"
    monkeypatch.setattr(contract, "multiplies_bytes_exactly", lambda: True)
    assert pick_runtime("auto", layer(numbers=Numbers.FLOAT8)) == "torch"
    assert pick_runtime("auto", {}, dtype="bfloat16") == "openvino"
    assert pick_runtime("auto", layer(**static), device="cuda") == "torch"
    installed.remove("openvino")
    assert pick_runtime("auto", layer(**static)) == "onnxruntime"


@pytest.mark.parametrize(
    ("wanted", "settings", "where", "said"),
    [
        ("openvino", {"activations": ActivationScheme.DYNAMIC_PER_TOKEN}, {}, r"openvino does not execute int8 weights with activations "
         r"dynamic_per_token \(encoder\.layer\.0\.output\.dense\)"),
        ("onnxruntime", {"bits": 3, "group_size": 64}, {}, r"onnxruntime does not execute int3-g64 weights \(encoder\.layer\.0"),
        ("openvino", {"numbers": Numbers.NF4, "bits": 4}, {}, "openvino does not execute nf4 weights"),
        ("onnxruntime", {"bits": 4, "activations": ActivationScheme.STATIC_PER_TENSOR}, {}, "int4 weights with activations static"),
        ("onnxruntime", {"group_size": 64, "activations": ActivationScheme.DYNAMIC_PER_GROUP}, {}, "int8-g64 weights with activations "
         "dynamic_per_group"),
        ("onnxruntime", {"bits": 4, "group_size": 48, "activations": ActivationScheme.DYNAMIC_PER_GROUP}, {}, "onnxruntime rounds "
         r"activations in groups of 16, 32, 64, 128, 256, not of 48 \(encoder\.layer\.0"),
        ("openvino", {"bits": 4, "group_size": 64, "activations": ActivationScheme.DYNAMIC_PER_GROUP}, {}, "int4-g64 weights with "
         "activations dynamic_per_group"),
        ("openvino", {}, {"device": "cuda:0"}, "openvino runs on the CPU here, not on cuda:0"),
        ("onnxruntime", {}, {"dtype": "bfloat16"}, "onnxruntime does not compute in bfloat16"),
    ],
)  # fmt: skip
def test_refusals_name_the_layer_and_who_does(wanted: str, settings: dict, where: dict, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        pick_runtime(wanted, layer(**settings), **where)
    assert "torch" in refused.value.hint


def test_more_refusals(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="openvino executes variants, and this is a checkpoint"):
        compress.load(str(bert), runtime="openvino")
    with pytest.raises(UserError, match="runtime 'openvno' is not known") as refused:
        compress.load(str(bert), runtime="openvno")
    assert "openvino" in refused.value.hint
    compress_to(bert, tmp_path / "variant", STATIC)
    monkeypatch.setattr(contract, "multiplies_bytes_exactly", lambda: True)
    with pytest.raises(UserError, match="only torch compiles or streams"):
        compress.load(str(tmp_path / "variant"), runtime="onnxruntime", stream=True)
    with monkeypatch.context() as patch:
        patch.setattr(contract.Runtime, "is_installed", property(lambda self: self.name != "openvino"))
        with pytest.raises(UserError, match=r"openvino is not installed: pip install 'compress-embedders\[openvino\]'"):
            compress.load(str(tmp_path / "variant"), runtime="openvino")
    monkeypatch.setattr(contract, "multiplies_bytes_exactly", lambda: False)
    with pytest.raises(UserError, match="would let byte products overflow on this CPU"):
        compress.load(str(tmp_path / "variant"), runtime="onnxruntime")


def test_rows_of_an_odd_number_of_four_bit_integers_are_refused(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.runtimes import lowered_layers

    compress_to(bert, tmp_path / "variant", RTN(bits=4, activations="none"))
    whole = lowered_layers.TracedLinear.__init__

    def odd(self: object, linear: object) -> None:
        whole(self, linear)  # type: ignore[arg-type]
        self.width -= 1  # type: ignore[attr-defined]

    monkeypatch.setattr(lowered_layers.TracedLinear, "__init__", odd)
    with pytest.raises(UserError, match="rows of 47 four-bit integers; graphs take only even rows"):
        lower(folder_of(tmp_path / "variant"), "openvino")


def test_every_runtime_of_the_table_has_an_opener() -> None:
    assert RUNTIMES[TORCH].linear is None
    assert set(GRAPH_RUNTIMES) < set(RUNTIMES)
    for runtime in RUNTIMES.values():
        if runtime.is_installed:
            assert callable(importlib.import_module(runtime.opener).open_variant)


@pytest.mark.parametrize(("runtime", "said"), [("onyx", "runtime 'onyx' is not known"), ("torch", "torch executes no graph")])
def test_what_is_no_graph_runtime_is_never_lowered_as_another(runtime: str, said: str) -> None:
    from compress.runtimes.lowered_layers import translations

    with pytest.raises(UserError, match=said):
        translations(runtime)


def test_kinds_of_numbers_and_schemes_that_are_new_are_refused_until_a_runtime_names_them() -> None:
    """Rows list what they execute; none says "all of the enumeration", which would take in whatever is added to it."""
    source = Path(contract.__file__).read_text()
    assert not re.search(r"frozenset\((?:ActivationScheme|Numbers)\)", source)
