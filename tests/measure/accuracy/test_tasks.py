"""Tasks from local folders: found, loaded, or refused with file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

import compress
from compress.common.errors import UserError
from compress.measure.accuracy.score import MtebEncoder, score_task
from compress.measure.accuracy.tasks import find_tasks
from compress.models.text.spec import EmbedderSpec


def rows(*items: dict[str, object]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with one task of each of three kinds."""
    sts = tmp_path / "STSBenchmark"
    sts.mkdir()
    pairs = [{"sentence1": f"parcel {i}", "sentence2": f"parcel {i * i + 20}", "score": i % 6} for i in range(12)]
    with gzip.open(sts / "test.jsonl.gz", "wt") as file:
        file.write(rows(*pairs))
    retrieval = tmp_path / "SciFact"
    (retrieval / "qrels").mkdir(parents=True)
    (retrieval / "corpus.jsonl").write_text(rows(*({"_id": f"d{i}", "title": "t", "text": f"document {i}"} for i in range(5))))
    (retrieval / "queries.jsonl").write_text(rows({"_id": "q1", "text": "document 1"}, {"_id": "q2", "text": "document 2"}))
    (retrieval / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n")
    classification = tmp_path / "AmazonCounterfactualClassification" / "en"
    classification.mkdir(parents=True)
    for split in ("train", "test"):
        (classification / f"{split}.jsonl").write_text(
            rows(*({"text": f"{split} {'good' if i % 2 else 'bad'} {i}", "label": i % 2, "label_text": "x"} for i in range(40)))
        )
    return tmp_path


def test_the_folder_s_tasks_are_scored(bert: Path, data: Path) -> None:
    embedder = compress.load(str(bert), device="cpu")
    tasks = find_tasks(["STSBenchmark", "SciFact", "AmazonCounterfactualClassification"], data)
    scores = {score.task: score for score in (score_task(embedder, task) for task in tasks)}
    assert [score.metric for score in scores.values()] == ["cosine_spearman", "ndcg_at_10", "accuracy"]
    assert all(-1 <= score.score <= 1 for score in scores.values())
    assert set(scores["SciFact"].prompts) == {"query", "document"}
    # Only the subset and the splits that the folder has are scored, not those that mteb would fetch.
    assert tasks[2].mteb.hf_subsets == ["en"]
    assert list(tasks[2].mteb.eval_splits) == ["test"]


def test_the_score_of_sts_is_the_rank_correlation_of_cosines(bert: Path, data: Path) -> None:
    from scipy.stats import spearmanr

    embedder = compress.load(str(bert), device="cpu")
    first, second = (
        embedder.encode([f"parcel {i}" for i in range(12)]),
        embedder.encode([f"parcel {i * i + 20}" for i in range(12)]),
    )
    expected = spearmanr((first * second).sum(axis=1), [i % 6 for i in range(12)]).statistic
    assert score_task(embedder, find_tasks(["STSBenchmark"], data)[0]).score == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "STSBenchmark/test.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a"\n',
            "test.jsonl, line 2: not JSON",
        ),
        ("STSBenchmark/test.jsonl", '{"sentence1": "a", "score": 1}\n', "line 1: lacks 'sentence2'; it has score, sentence1"),
        ("STSBenchmark/test.jsonl", "[1]\n", "line 1: expected a JSON object, got list"),
        ("STSBenchmark/test.jsonl", "\n", "has no rows"),
        ("STSBenchmark/test.jsonl", b"\xff\xfe", "not UTF-8"),
        ("STSBenchmark/test.jsonl.gz", b"\x1f\x8b\x08\x00broken", "cannot be read"),
        ("SciFact/corpus.jsonl", '{"_id": "d1"}\n', "corpus.jsonl, line 1: lacks 'text'"),
        (
            "SciFact/qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq1\td1\n",
            "test.tsv, line 2: expected 'query-id<TAB>corpus-id<TAB>score', got",
        ),
        ("SciFact/qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td9\t1\n", "test.tsv, line 2: document 'd9' is not in its file"),
        ("SciFact/qrels/test.tsv", "q9\td1\t1\n", "test.tsv, line 1: query 'q9' is not in its file"),
    ],
)
def test_broken_files_are_named_with_their_line(data: Path, file: str, content: str | bytes, message: str) -> None:
    task = file.split("/")[0]
    for stale in (data / task).glob("test.jsonl*"):
        stale.unlink()
    (data / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        find_tasks([task], data)
    assert message in caught.value.message


def test_tasks_that_are_not_there_name_the_nearest(data: Path) -> None:
    with pytest.raises(UserError, match="unknown task 'STSBenchmrk'") as caught:
        find_tasks(["STSBenchmrk"], data)
    assert caught.value.hint == "did you mean 'STSBenchmark'?"
    with pytest.raises(UserError, match=r"task 'STS12': the data folder .* has no folder of that name"):
        find_tasks(["STS12"], data)
    with pytest.raises(UserError, match="not a folder"):
        find_tasks(["mini"], data / "none")
    with pytest.raises(UserError, match="no tasks"):
        find_tasks([], data)


def test_a_folder_without_the_task_s_subset_or_split_is_refused(data: Path) -> None:
    (data / "AmazonCounterfactualClassification" / "en").rename(data / "AmazonCounterfactualClassification" / "xx")
    with pytest.raises(UserError, match="has none of the subsets"):
        find_tasks(["AmazonCounterfactualClassification"], data)
    (data / "SciFact" / "qrels" / "test.tsv").rename(data / "SciFact" / "qrels" / "train.tsv")
    with pytest.raises(UserError, match="has none of the splits that SciFact is scored on: test"):
        find_tasks(["SciFact"], data)


def test_the_fingerprint_of_a_task_follows_its_data(data: Path) -> None:
    before = find_tasks(["SciFact"], data)[0].fingerprint
    assert find_tasks(["SciFact"], data)[0].fingerprint == before
    (data / "SciFact" / "qrels" / "test.tsv").write_text("q1\td3\t1\n")
    assert find_tasks(["SciFact"], data)[0].fingerprint != before


class Listening:
    """An embedder that notes what it is given."""

    name, dimension = "listening", 2

    def __init__(self, **spec: object) -> None:
        self.spec = EmbedderSpec(**spec)
        self.heard: list[tuple[list[str], str | None]] = []

    def encode(self, texts, prompt=None, *, batch_tokens=None, progress=None):
        self.heard.append((list(texts), prompt))
        return np.array([[len(text), 1.0] for text in texts], dtype=np.float32)


def test_each_text_is_embedded_once_and_put_back_where_it_was(data: Path) -> None:
    embedder = Listening()
    metadata = find_tasks(["STSBenchmark"], data)[0].mteb.metadata
    loader = [{"text": ["aa", "b"]}, {"text": ["aa", "ccc"]}]
    vectors = MtebEncoder(embedder).encode(loader, task_metadata=metadata, hf_split="test", hf_subset="default")
    assert embedder.heard == [(["aa", "b", "ccc"], "")]
    assert vectors[:, 0].tolist() == [2, 1, 2, 3]


def test_queries_and_documents_get_the_model_s_own_prompts(data: Path) -> None:
    embedder = Listening(prompts={"query": "Q: ", "document": "D: "}, normalize=True)
    score = score_task(embedder, find_tasks(["SciFact"], data)[0])
    assert score.prompts == {"query": "Q: ", "document": "D: "}
    assert {prompt for _, prompt in embedder.heard} == {"Q: ", "D: "}


# mteb's own scores of all-MiniLM-L6-v2 on the local files (of some tasks a part, so not all equal the published figure).
FROM_THESE_FILES = {
    "STSBenchmark": {"default": 82.03},
    "STS12": {"default": 72.37},
    "SICK-R": {"default": 77.58},
    "BIOSSES": {"default": 81.64},
    "Banking77Classification": {"default": 80.04},
    "AmazonCounterfactualClassification": {"en": 63.64, "en-ext": 65.59},
    "SciFact": {"default": 64.51},
    "SummEvalSummarization.v2": {"default": 25.76},
    "SIB200ClusteringS2S": {"eng_Latn": 42.45},
    "TwitterURLCorpus": {"default": 77.12},
    "LEMBQMSumRetrieval": {"default": 16.29},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_THESE_FILES)
def test_minilm_scores_what_mteb_says(minilm: Path, shared_mteb: Path, name: str) -> None:
    embedder = compress.load("minilm", device="cpu", dtype="float32")
    score = score_task(embedder, find_tasks([name], shared_mteb)[0])
    (split,) = score.mteb["scores"].values()
    scores = {row["hf_subset"]: 100 * row["main_score"] for row in split}
    assert scores == pytest.approx(FROM_THESE_FILES[name], abs=0.05)


def test_the_test_split_is_scored_where_there_are_several(data: Path) -> None:
    train = data / "AmazonCounterfactualClassification" / "en" / "train.jsonl"
    (train.parent / "validation.jsonl").write_text(train.read_text())
    assert list(find_tasks(["AmazonCounterfactualClassification"], data)[0].mteb.eval_splits) == ["test"]
    assert list(find_tasks(["AmazonCounterfactualClassification"], None)[0].mteb.eval_splits) == ["test"]
    (train.parent / "test.jsonl").unlink()
    assert list(find_tasks(["AmazonCounterfactualClassification"], data)[0].mteb.eval_splits) == ["validation"]
