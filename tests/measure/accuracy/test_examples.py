"""What a score is made of: the examples caught while mteb scores give the score again, for every type of task."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import compress
from compress.common.errors import UserError
from compress.measure.accuracy.examples import Examples, paired_draws
from compress.measure.accuracy.paired import compare_scores
from compress.measure.accuracy.score import TaskScore, score_task
from compress.measure.accuracy.statistics import Verdict, score
from compress.measure.accuracy.tasks import EMBEDDED, LITE, find_tasks
from compress.models.text.spec import EmbedderSpec


class Noisy:
    """Another embedder's vectors with noise, the same for a text each time."""

    name, spec = "noisy", EmbedderSpec()

    def __init__(self, embedder: Any, amount: float) -> None:
        self._embedder, self._amount, self.dimension = embedder, amount, embedder.dimension

    def encode(self, texts: Any, prompt: str | None = None, **_: Any) -> np.ndarray:
        vectors = self._embedder.encode(texts, prompt)
        seeds = [sum(text.encode()) for text in texts]
        noise = np.stack([np.random.default_rng(seed).standard_normal(self.dimension) for seed in seeds])
        return (vectors + self._amount * noise / np.sqrt(self.dimension)).astype(np.float32)


@pytest.fixture(scope="module")
def minilm_embedder(minilm: Path) -> Any:
    return compress.load("minilm", device="cpu")


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_examples_give_the_score_again(bert: Path, name: str) -> None:
    task, embedder = find_tasks([name], None)[0], compress.load(str(bert), device="cpu")
    found = score_task(embedder, task)
    assert len(found.examples.parts) == 1
    assert score(found.examples.parts[0].statistic()) == pytest.approx(found.score, abs=1e-5)
    assert TaskScore(**json.loads(found.model_dump_json())).examples == found.examples
    assert found.mteb["task_name"] == name
    again = score_task(embedder, task)  # the task draws the same samples again
    assert again.examples == found.examples
    assert again.score == found.score


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


WORDS = [
    "parcel",
    "weather",
    "bicycle",
    "harvest",
    "violin",
    "lantern",
    "harbour",
    "cheese",
    "tunnel",
    "feather",
    "marble",
    "thunder",
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Small tasks of the types whose layouts the embedded suite does not have."""
    texts = [f"the {word} of {other}" for word in WORDS for other in WORDS[:4]]
    labels = [index // 4 for index in range(len(texts))]
    write(tmp_path / "TwentyNewsgroupsClustering", "test.jsonl", [
        {"sentences": texts[:24], "labels": labels[:24]}, {"sentences": texts[24:], "labels": labels[24:]}
    ])  # fmt: skip
    write(tmp_path / "SummEval", "test.jsonl", [
        {
            "text": f"long {word}",
            "human_summaries": [f"{word} one", f"{word} two"],
            "machine_summaries": [f"{word} {other}" for other in WORDS[:5]],
            "relevance": [1.0, 2.0, 3.0, 4.0, 5.0],
        }
        for word in WORDS
    ])  # fmt: skip
    reranking = tmp_path / "AskUbuntuDupQuestions"
    write(reranking, "corpus.jsonl", [{"_id": f"d{index}", "text": text} for index, text in enumerate(texts)])
    write(reranking, "queries.jsonl", [{"_id": f"q{index}", "text": word} for index, word in enumerate(WORDS)])
    (reranking / "qrels").mkdir()
    (reranking / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{index}\td{4 * index}\t1\n" for index in range(len(WORDS)))
    )
    write(reranking, "top_ranked.jsonl", [
        {"query-id": f"q{index}", "corpus-ids": [f"d{(4 * index + step) % len(texts)}" for step in range(8)]}
        for index in range(len(WORDS))
    ])  # fmt: skip
    return tmp_path


@pytest.mark.parametrize("name", ["TwentyNewsgroupsClustering", "SummEvalSummarization.v2", "AskUbuntuDupQuestions"])
def test_types_from_a_folder(bert: Path, data: Path, name: str) -> None:
    task = find_tasks([name], data)[0]
    found = score_task(compress.load(str(bert), device="cpu"), task)
    assert 0 < found.score < 1 or "Summ" in name
    assert score(found.examples.parts[0].statistic()) == pytest.approx(found.score, abs=1e-5)
    assert found.examples.count == (48 if "Clustering" in name else 12)


def test_reranking_ranks_the_listed_documents_alone(bert: Path, data: Path) -> None:
    embedder = compress.load(str(bert), device="cpu")
    listed = score_task(embedder, find_tasks(["AskUbuntuDupQuestions"], data)[0]).score
    (data / "AskUbuntuDupQuestions" / "top_ranked.jsonl").unlink()
    assert listed > score_task(embedder, find_tasks(["AskUbuntuDupQuestions"], data)[0]).score
    write(data / "AskUbuntuDupQuestions", "top_ranked.jsonl", [{"query-id": "q0", "corpus-ids": ["d0", "d999"]}])
    with pytest.raises(UserError, match=r"line 1: document 'd999' is not in the corpus"):
        find_tasks(["AskUbuntuDupQuestions"], data)


def test_a_column_that_is_missing_is_named(data: Path) -> None:
    write(data / "TwentyNewsgroupsClustering", "test.jsonl", [{"sentences": ["a"], "label": [1]}])
    with pytest.raises(UserError, match="the rows of 'test' lack 'labels'"):
        find_tasks(["TwentyNewsgroupsClustering"], data)


def test_named_subsets() -> None:
    assert [task.name for task in find_tasks(["mini"], None)] == list(EMBEDDED)
    lite = find_tasks(["lite"], None)
    assert tuple(task.name for task in lite) == LITE
    assert len({task.mteb.metadata.type for task in lite}) == 7
    assert len(find_tasks(["mteb-eng-v1"], None)) == 56
    assert len(find_tasks(["mteb-eng-v2", "BIOSSES"], None)) == 41  # BIOSSES is one of them
    assert find_tasks(["MTEB(eng, v2)"], None)[0].folder is None


@pytest.mark.slow
def test_a_copy_is_kept_and_shuffled_weights_regress(minilm: Path, minilm_embedder: Any, tmp_path: Path) -> None:
    """Weights of one layer after the other shuffled until the mean has dropped by more than the margin."""
    tasks = find_tasks(["MiniSTS", "MiniRetrieval", "MiniPairClassification"], None)
    own = {task.name: score_task(minilm_embedder, task) for task in tasks}
    same = compare_scores(own, own, 0.01).overall
    assert same is not None
    assert (same.low, same.high, same.verdict) == (0, 0, Verdict.KEPT)
    nearly = compare_scores(own, {task.name: score_task(Noisy(minilm_embedder, 1e-4), task) for task in tasks}, 0.01).overall
    assert nearly is not None
    assert nearly.verdict is Verdict.KEPT

    folder = Path(shutil.copytree(minilm, tmp_path / "shuffled"))
    tensors = load_file(folder / "model.safetensors")
    found = None
    for layer in reversed(range(6)):
        weight = tensors[f"encoder.layer.{layer}.output.dense.weight"]
        tensors[f"encoder.layer.{layer}.output.dense.weight"] = np.random.default_rng(layer).permutation(weight)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        shuffled = compress.load(str(folder), device="cpu")
        found = compare_scores(own, {task.name: score_task(shuffled, task) for task in tasks}, 0.01)
        assert found.overall is not None
        if found.overall.delta < -3 * found.overall.margin:
            break
    assert found is not None
    assert found.overall is not None
    assert found.overall.verdict is Verdict.REGRESSED
    assert Verdict.KEPT not in {interval.verdict for interval in found.tasks.values() if interval}


def test_pairing_narrows_the_interval(minilm_embedder: Any) -> None:
    task = find_tasks(["MiniSTS"], None)[0]
    ours, theirs = (score_task(Noisy(minilm_embedder, amount), task).examples for amount in (0.0, 0.3))
    paired = paired_draws(ours, theirs, resamples=400, seed=0)
    single = [paired_draws(Examples(parts=(flat(part.parts[0]),)), part, resamples=400, seed=0) for part in (ours, theirs)]
    assert paired.std() < 0.7 * np.hypot(single[0].std(), single[1].std())


def flat(part: Any) -> Any:
    """The same examples with a similarity that is the gold itself: its rank correlation is one whatever is drawn."""
    return part.model_copy(update={"values": [part.values[0], part.values[0]]})
