"""The single examples of a task's score, captured while mteb scores, so that two models can be compared in pairs."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)
from pydantic import BaseModel, ConfigDict
from scipy.stats import spearmanr  # type: ignore[import-untyped]

from compress.measure.accuracy.statistics import (
    AveragePrecision,
    Clustering,
    Floats,
    Mean,
    Spearman,
    VMeasure,
    WeightedScore,
    differences,
    score,
)

# mteb's names of retrieval metrics, and the names in its per-query scores.
_PER_QUERY = {"ndcg": "ndcg_cut", "map": "map_cut", "mrr": "mrr", "recall": "recall", "precision": "P", "hit_rate": "success"}
_RECIPROCAL = re.compile(r"^mrr_at_(\d+)$")
_CUT = re.compile(r"^(ndcg|map|mrr|recall|precision|hit_rate)_at_(\d+)$")


class SplitExamples(BaseModel):
    """The examples of one split and subset of a task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["mean", "spearman", "average_precision", "v_measure"]
    values: Sequence[Sequence[float]]
    """`mean`: one value per example. `spearman` and `average_precision`: the gold values, then the similarities. `v_measure`: for
    each k-means run the examples it saw, their labels, their clusters."""
    count: int
    """Number of examples."""

    def statistic(self) -> WeightedScore:
        """Return the score as a function of the examples' weights."""
        arrays = [np.asarray(values, dtype=np.float64) for values in self.values]
        if self.kind == "mean":
            return Mean(arrays[0])
        if self.kind == "spearman":
            return Spearman(arrays[0], arrays[1])
        if self.kind == "average_precision":
            return AveragePrecision(arrays[0].astype(np.int64), arrays[1])
        whole = [array.astype(np.int64) for array in arrays]
        return VMeasure([Clustering(*whole[start : start + 3]) for start in range(0, len(whole), 3)], self.count)


class Examples(BaseModel):
    """Examples of all splits and subsets of a task, whose score is the mean over them. Empty if single ones have no scores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    parts: tuple[SplitExamples, ...] = ()

    @property
    def count(self) -> int:
        """Number of examples."""
        return sum(part.count for part in self.parts)


def paired_draws(baseline: Examples, variant: Examples, *, resamples: int, seed: int) -> Floats:
    """Return bootstrap draws of the difference of a task's scores, variant minus baseline: [resamples].

    Raises:
        ValueError: the two were not scored on the same examples.
    """
    if len(baseline.parts) != len(variant.parts):
        raise ValueError(f"both models are scored on the same parts, got {len(baseline.parts)} and {len(variant.parts)}")
    draws = [
        differences(ours.statistic(), theirs.statistic(), resamples=resamples, seed=seed + index)
        for index, (ours, theirs) in enumerate(zip(baseline.parts, variant.parts, strict=True))
    ]
    means: Floats = np.mean(draws, axis=0)
    return means


class _Remembering(random.Random):
    """A random generator that remembers which examples were drawn."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.drawn: list[list[int]] = []

    def choices(self, population: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().choices(population, *args, **kwargs)
        self.drawn.append(list(found))
        return found

    def sample(self, population: Any, *args: Any, **kwargs: Any) -> Any:
        found = super().sample(population, *args, **kwargs)
        self.drawn.append(list(found))
        return found


class Caught:
    """Predictions captured from a task's evaluation, by split and subset."""

    def __init__(self, task: AbsTask) -> None:
        self._task = task
        self._predictions: dict[tuple[str, str], Any] = {}
        self._queries: dict[tuple[str, str], Mapping[str, Mapping[str, float]]] = {}
        self._drawn: dict[tuple[str, str], list[list[int]]] = {}

    def keep_predictions(self, predictions: Any, *_: Any, hf_split: str, hf_subset: str, **__: Any) -> None:
        """Replace the task's own method that saves predictions to a file."""
        self._predictions[hf_split, hf_subset] = predictions
        generator = self._task.rng_state
        if isinstance(generator, _Remembering):
            self._drawn[hf_split, hf_subset] = generator.drawn
            generator.drawn = []

    def keep_queries(self, scores: Any, relevant: Any, results: Any, *, hf_split: str, hf_subset: str) -> None:
        """Keep a retrieval task's scores of each query."""
        found = _RECIPROCAL.match(self._task.metadata.main_score)
        if found is not None:
            scores = {query: _reciprocal_rank(results[query], relevant[query], int(found.group(1))) for query in results}
        self._queries[hf_split, hf_subset] = scores

    def examples(self) -> Examples:
        """Return the captured examples, ready for pairing."""
        parts = []
        for split, subset in self._predictions:
            part = self._part(split, subset)
            if part is None:
                return Examples()
            parts.append(part)
        return Examples(parts=tuple(parts))

    def _part(self, split: str, subset: str) -> SplitExamples | None:
        task, predictions = self._task, self._predictions[split, subset]
        if isinstance(task, AbsTaskRetrieval):
            return _queries(self._queries[split, subset], task.metadata.main_score)
        rows = _rows(task, split, subset)
        if isinstance(task, AbsTaskSTS):
            if task.metadata.main_score != "cosine_spearman":
                return None
            return _pairs("spearman", rows["score"], predictions["cosine_scores"])
        if isinstance(task, AbsTaskPairClassification):
            labels = rows[task.label_column_name]
            labels = labels[0] if isinstance(labels[0], list) else labels
            return _best_pairs(labels, predictions, task.metadata.main_score)
        if isinstance(task, AbsTaskClassification):
            labels = list(rows[task.label_column_name])
            right = np.mean([[got == wanted for got, wanted in zip(made, labels, strict=True)] for made in predictions], axis=0)
            return _mean(right) if task.metadata.main_score == "accuracy" else None
        if isinstance(task, AbsTaskSummarization):
            pairs = zip(predictions["human_scores"], predictions["cosine_scores"], strict=True)
            return _mean([spearmanr(human, cosine).statistic for human, cosine in pairs])
        if isinstance(task, AbsTaskClustering):
            return self._clustering(predictions, rows[task.label_column_name], self._drawn[split, subset])
        if isinstance(task, AbsTaskClusteringLegacy):
            return _legacy_clustering(predictions, rows[task.label_column_name])
        return None

    def _clustering(
        self, predictions: Mapping[str, Sequence[Any]], labels: Sequence[Any], drawn: list[list[int]]
    ) -> SplitExamples | None:
        """Return each k-means run with the examples it was given; None for hierarchical labels."""
        if list(predictions) != ["Level 0"]:
            return None
        runs = predictions["Level 0"]
        embedded = drawn[0] if len(drawn) > len(runs) else list(range(len(labels)))
        flat = [label[0] if isinstance(label, list) else label for label in labels]
        codes = {label: code for code, label in enumerate(sorted(set(flat), key=str))}
        values: list[Sequence[float]] = []
        for chosen, clusters in zip(drawn[-len(runs) :], runs, strict=True):
            values += [[*chosen], [codes[flat[embedded[index]]] for index in chosen], clusters]
        return SplitExamples(kind="v_measure", values=values, count=len(embedded))


def _rows(task: AbsTask, split: str, subset: str) -> Any:
    data = task.dataset
    found = data[split] if subset not in data and subset == "default" else data[subset][split]
    return found


def _mean(values: Sequence[float] | Floats) -> SplitExamples:
    return SplitExamples(kind="mean", values=[[float(value) for value in values]], count=len(values))


def _pairs(kind: Literal["spearman", "average_precision"], gold: Sequence[float], similarity: Sequence[float]) -> SplitExamples:
    return SplitExamples(kind=kind, values=[[float(x) for x in gold], [float(x) for x in similarity]], count=len(gold))


def _best_pairs(labels: Sequence[float], predictions: Mapping[str, Sequence[float]], metric: str) -> SplitExamples | None:
    """Return pairs with their cosine; for mteb's `max_ap`, with the similarity of the largest average precision."""
    if metric not in ("cosine_ap", "max_ap"):
        return None
    similarities = [np.asarray(predictions["cosine_scores"])]
    if metric == "max_ap":
        similarities += [np.asarray(predictions["dot_scores"]), np.asarray(predictions["similarity_scores"])]
        similarities += [-np.asarray(predictions[f"{kind}_distances"]) for kind in ("manhattan", "euclidean")]
    parts = [_pairs("average_precision", labels, similarity.tolist()) for similarity in similarities]
    return max(parts, key=lambda part: score(part.statistic()))


def _reciprocal_rank(found: Mapping[str, float], relevant: Mapping[str, int], cut: int) -> dict[str, float]:
    """Return 1 / rank of the first relevant document of a query, 0 where it is below the cut; mteb keeps only the mean of it."""
    ranked = sorted(found, key=lambda document: (found[document], document), reverse=True)[:cut]  # ties as mteb breaks them
    ranks = (rank for rank, document in enumerate(ranked, start=1) if relevant.get(document, 0) > 0)
    return {f"mrr_{cut}": 1 / next(ranks, math.inf)}


def _queries(scores: Mapping[str, Mapping[str, float]], metric: str) -> SplitExamples | None:
    found = _CUT.match(metric)
    if found is None:
        return None
    name = f"{_PER_QUERY[found.group(1)]}_{found.group(2)}"
    return _mean([scores[query][name] for query in sorted(scores)])


def _legacy_clustering(predictions: Sequence[Any], labels: Sequence[Any]) -> SplitExamples:
    """Return sets of texts, each clustered once. A task with a single set has unnested labels and clusters."""
    sets = list(zip(labels, predictions, strict=True)) if isinstance(labels[0], list) else [(labels, predictions)]
    values: list[Sequence[float]] = []
    start = 0
    for own, clusters in sets:
        codes = {label: code for code, label in enumerate(sorted(set(own), key=str))}
        values += [list(range(start, start + len(own))), [codes[label] for label in own], [int(cluster) for cluster in clusters]]
        start += len(own)
    return SplitExamples(kind="v_measure", values=values, count=start)


class _LabelsInMemory:
    """A data set from which mteb draws training examples; its labels are decoded once instead of at every access."""

    def __init__(self, data: Any, column: str) -> None:
        self._data, self._labels = data, {column: list(data[column])}

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, column: str) -> list[Any]:
        return self._labels[column]

    def select(self, rows: Sequence[int]) -> Any:
        return self._data.select(rows)


def _quick_labels(task: AbsTaskClassification) -> dict[str, Any]:
    """Return replacement methods for a task that pass lists to mteb instead of columns that are decoded at every access.

    The scores are the same; on AmazonCounterfactual they take a third of the time.
    """
    draw, score_predictions = task._undersample_data, task._calculate_scores
    decoded: dict[int, tuple[Any, _LabelsInMemory]] = {}  # holds the data too, so that no other object gets its id

    def draw_from_memory(data: Any, *given: Any) -> Any:
        if id(data) not in decoded:
            decoded[id(data)] = (data, _LabelsInMemory(data, task.label_column_name))
        return draw(decoded[id(data)][1], *given)

    return {
        "_undersample_data": draw_from_memory,
        "_calculate_scores": lambda labels, predictions: score_predictions(list(labels), predictions),
    }


@contextmanager
def catching(task: AbsTask) -> Iterator[Caught]:
    """Capture what a task predicts while mteb evaluates it. Its random generators are reset, so every model gets the same draws.

    mteb keeps predictions only if it is given a `prediction_folder`; nothing is written there.
    """
    caught = Caught(task)
    task.rng_state, task.np_rng = _Remembering(task.seed), np.random.default_rng(task.seed)
    replaced: dict[str, Any] = {"_save_task_predictions": caught.keep_predictions}
    if isinstance(task, AbsTaskClassification):
        replaced |= _quick_labels(task)
    if isinstance(task, AbsTaskRetrieval):
        own = task.task_specific_scores

        def specific(scores: Any, qrels: Any, results: Any, *, hf_split: str, hf_subset: str) -> Any:
            caught.keep_queries(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)
            return own(scores, qrels, results, hf_split=hf_split, hf_subset=hf_subset)

        replaced["task_specific_scores"] = specific
    for name, method in replaced.items():
        setattr(task, name, method)
    try:
        yield caught
    finally:
        for name in replaced:
            delattr(task, name)
