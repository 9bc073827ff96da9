"""Fits the map of an alignment: embeds the texts with both models, chooses the map, and trains the queries' network if asked to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from compress.common.cache import use
from compress.common.errors import UserError
from compress.measure.scored import baseline_key
from compress.methods.align.maps import AffineMap, HeldOut, fitted, held_out
from compress.methods.align.settings import AlignSettings
from compress.methods.base import Bench
from compress.methods.distill.data import different
from compress.models.embedder import Embedder, Vectors
from compress.models.files.headers import tensors_in
from compress.models.files.shards import write_tensors
from compress.models.files.variant import AlignedTo
from compress.models.files.weights import Weights
from compress.models.folder import ModelFolder
from compress.models.network.pooling import attach_head
from compress.models.network.walk import Streamed
from compress.models.opened import OpenModel
from compress.models.text.spec import EmbedderSpec, HeadModule
from compress.models.text.tokens import TextTokenizer
from compress.runtimes.loading import open_source, runtime_of
from compress.runtimes.stored_vectors import StoredEmbedder, VectorStore
from compress.runtimes.streamed import StreamedEmbedder
from compress.runtimes.torch_embedder import TorchEmbedder
from compress.runtimes.torch_runtime import prepare

TENSORS = "map.safetensors"


@dataclass(frozen=True)
class _Described:
    """What an embedder is told of a model that has no folder yet."""

    name: str
    spec: EmbedderSpec
    tokenizer: TextTokenizer
    dimension: int


@dataclass(frozen=True)
class Texts:
    """Texts that both models embed: those to fit on, and the held-out ones."""

    fitted: list[str]
    held_out: list[str]


class Fitting:
    """The fitting of one model's vectors to another's."""

    def __init__(self, settings: AlignSettings, model: OpenModel, old: ModelFolder, bench: Bench, device: str) -> None:
        """See that the two models can be aligned.

        Args:
            settings: the step.
            model: the model to align, as the steps before left it.
            old: the model that made the index.
            bench: keeps what is expensive, and files.
            device: where both run.

        Raises:
            ValueError: the model is aligned already.
            UserError: the other model has a Router, or random weights.
        """
        if old.routes is not None:
            raise old.routes.refusal()
        if old.is_random:
            raise UserError(f"model {old.name!r}: its weights are random, and so is every index that it made")
        if model.aligned_to is not None:
            raise ValueError(f"the model is aligned to {model.aligned_to.name} already; align the model that it was made from")
        self.settings, self.model, self.old, self.bench, self.device = settings, model, old, bench, device
        self.spec = aligned_spec(model, old)

    def found(self) -> dict[str, Any]:
        """Fit the map, write its tensors or those of the trained network, and return what the record and the variant say of it."""
        texts, left_out = self._texts()
        source = [self._own(self.model, part) for part in (texts.fitted, texts.held_out)]
        target = [self._others(part) for part in (texts.fitted, texts.held_out)]
        chosen, judged = fitted(self.settings.map, (source[0], source[1]), (target[0], target[1]))
        for kind, found in judged.items():
            self.bench.say(f"{kind}: held-out {said(found)}")
        self._write(chosen)
        report: dict[str, Any] = {
            "maps": {kind: asdict(found) for kind, found in judged.items()},
            "penalty": chosen.penalty,
            "left_out": left_out,
        }
        best = judged[chosen.name]
        if self.settings.minutes:
            best = self._train(texts, target, report)
            report["trained"] = asdict(best)
        aligned = AlignedTo(
            name=self.old.name,
            fingerprint=self.old.fingerprint,
            method=chosen.name,
            trained=self.settings.minutes > 0,
            task=self.settings.task,
            texts=len(texts.fitted),
            held_out=len(texts.held_out),
            **asdict(best),
        )
        return {"aligned_to": aligned.model_dump(mode="json"), **report}

    def aligned(self, to: AlignedTo) -> OpenModel:
        """Return the model with the map as its last module, with the weights that `found` has written."""
        return replace(self._trained() if to.trained else self._with_module(), aligned_to=to, depths=())

    def _texts(self) -> tuple[Texts, int]:
        """Read and draw the texts; also return how many more are in the evaluation."""
        settings = self.settings
        texts, evaluated = different(settings.texts, self.bench.evaluated())
        self.bench.say(f"{settings.texts}: {len(texts):,} different texts; {evaluated:,} more are in the evaluation and left out")
        count = len(texts) if settings.count is None else settings.count
        if len(texts) < count:
            raise ValueError(f"{len(texts):,} different texts, {count:,} are needed; lower `count`, or leave it out")
        held = settings.held_out_of(count)
        order = np.random.default_rng(settings.seed).permutation(len(texts))[:count]
        drawn = [texts[index] for index in order]
        return Texts(drawn[held:], drawn[:held]), evaluated

    def _own(self, model: OpenModel, texts: Sequence[str]) -> Vectors:
        """Embed texts with the model as the steps before left it, all its dimensions, float32 [texts, width]."""
        place, compute = torch.device(self.device), torch.float32
        spec = model.spec.model_copy(update={"dimensions": None})
        described = _Described(self.bench.published.name, spec, model.tokenizer, spec.dimension(model.shape.output_width))
        attached = replace(model, network=_with_head(model, spec))
        embedder = TorchEmbedder(cast(ModelFolder, described), attached.network, place, compute)
        source = Streamed(attached.network, model.weights, partial(prepare, dtype=compute, device=place))
        return StreamedEmbedder(embedder, source).encode(texts, task=self.settings.task)

    def _others(self, texts: Sequence[str]) -> Vectors:
        """Embed texts with the other model, float32 [texts, width]; from the cache where it has done so before."""
        runtime = runtime_of(self.old, device=self.device)
        key = baseline_key(self.old.fingerprint, None, self.device, None, runtime)
        opened = partial(open_source, self.old, device=self.device)
        embedder: Embedder = StoredEmbedder(self.old, opened, VectorStore(use("vectors", key)))
        return embedder.encode(texts, task=self.settings.task)

    def _write(self, chosen: AffineMap) -> None:
        """Write the tensors of the module, by their names in the network."""
        self.bench.folder.mkdir(parents=True, exist_ok=True)
        own = f"after.{len(self.spec.modules) - 1}.linear"
        names = _with_head(self.model, self.spec).state_dict()
        name = next(found.removesuffix(".weight") for found in names if found.endswith(f"{own}.weight"))
        tensors = {f"{name}.weight": np.ascontiguousarray(chosen.matrix.T), f"{name}.bias": chosen.shift}
        write_tensors(self.bench.folder / TENSORS, {key: torch.from_numpy(array) for key, array in tensors.items()})

    def _with_module(self) -> OpenModel:
        network = _with_head(self.model, self.spec)
        weights = self.model.weights.extended(tensors_in(self.bench.folder / TENSORS), network)
        return replace(self.model, network=network, weights=weights, spec=self.spec)

    def _trained(self) -> OpenModel:
        from compress.methods.distill.job import WEIGHTS

        made = self._with_module()
        return replace(made, weights=Weights(tensors_in(self.bench.folder / WEIGHTS), made.network, exact=True))

    def _train(self, texts: Texts, target: Sequence[Vectors], report: dict[str, Any]) -> HeldOut:
        """Train the network towards the other model's vectors, and judge it on the held-out texts."""
        from compress.methods.align.queries import Queries

        start = time.perf_counter()
        queries = Queries(self.settings, self._with_module(), self.bench, self.device)
        report["curve"] = queries.learn((texts.fitted, texts.held_out), target)
        report["training_seconds"] = time.perf_counter() - start
        judged = held_out(self._own(self._trained(), texts.held_out), target[1])
        self.bench.say(f"trained: held-out {said(judged)}")
        return judged


def _with_head(model: OpenModel, spec: EmbedderSpec) -> nn.Module:
    """Give the network of a model the head of a spec, without values, and return the network."""
    with torch.device("meta"):
        return attach_head(model.network, spec)


def aligned_spec(model: OpenModel, old: ModelFolder) -> EmbedderSpec:
    """Return how a model takes texts, with the map as its last module, and the other model's normalisation and similarity."""
    spec, theirs = model.spec, old.spec
    whole = spec.model_copy(update={"dimensions": None})
    before = (HeadModule(kind="Normalize"),) if spec.normalize else ()
    dense = HeadModule(kind="Dense", inputs=whole.dimension(model.shape.output_width), width=old.dimension)
    # Vectors that are cut after they were normalised have no common length, which the map then has to meet.
    unit = theirs.normalize and theirs.dimensions is None
    return whole.model_copy(update={"modules": (*spec.modules, *before, dense), "normalize": unit, "similarity": theirs.similarity})


def said(found: HeldOut) -> str:
    """Return what was found on held-out texts, for people."""
    return f"cosine {found.cosine_mean:.4f}, 1st percentile {found.cosine_p1:.4f}, neighbour overlap@10 {found.overlap_at_10:.3f}"
