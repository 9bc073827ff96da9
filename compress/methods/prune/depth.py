"""Depth pruning: blocks are dropped, or only their attention or their MLPs, by what that does to calibration texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Estimate, Method, share_of
from compress.models.architectures import LAYER_WEIGHTS, place_in_block, renumbered
from compress.models.shape import ModelShape, with_backbone

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Left, Survey
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel


class Depth(Method):
    """Drop blocks, or one sublayer of some blocks, which leaves a shallower model of the same architecture.

    Nothing is refitted; distillation can restore what is lost. No other library has an architecture with some attentions or MLPs
    missing, so such a variant runs only here.
    """

    family: ClassVar[str] = "smaller"
    method: Literal["depth"] = "depth"
    whole: ClassVar[bool] = True
    spreads: ClassVar[tuple[str, ...]] = ("keep",)
    what: Literal["blocks", "attention", "mlp"] = "blocks"
    """What to drop: whole blocks, or only their attention or their MLP."""
    keep: float | None = Field(None, gt=0, le=1)
    """Share of the blocks that is kept, rounded to whole blocks, halves up."""
    drop: tuple[int, ...] | None = None
    """Blocks to drop, instead of `keep`, numbered from 0 as in the original model."""
    criterion: Literal["greedy", "pooled", "influence", "angular"] = "greedy"
    """How `keep` chooses what to drop. `pooled`: those without which, one at a time, the texts' vectors keep the highest mean
    cosine to the full model's. `greedy`: the same, one after another, with all others evaluated again after each. `influence`:
    those with the smallest block influence, 1 - cosine of the hidden states with and without (ShortGPT, Men et al. 2024, arXiv
    2403.03853). `angular`: the consecutive blocks with the smallest angular distance from input to output (Gromov et al. 2024,
    arXiv 2403.17887)."""

    @model_validator(mode="after")
    def _says_how_many(self) -> Self:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("`keep` says how many blocks stay, `drop` which ones are dropped; give one of them")
        if self.drop is not None and len(set(self.drop)) != len(self.drop):
            raise ValueError("`drop` names a block twice")
        if self.drop == ():
            raise ValueError("`drop` names no block; leave the step out")
        if self.criterion == "angular" and self.what != "blocks":
            raise ValueError("`criterion: angular` compares runs of whole blocks; use greedy, pooled or influence")
        return self

    def unspread(self, rounds: int) -> tuple[str, str] | None:
        """Return the key because of which the step cannot be done in rounds, and the reason; None where it can be."""
        if self.drop is not None:
            return "drop", "names blocks, and each round chooses its own; give `keep`, the share that is left at the end"
        if self.what != "blocks":
            return "what", f"{self.what} is not dropped in rounds; drop blocks, or put this step before the rounds"
        return None

    def spread(self, rounds: int, shape: ModelShape) -> tuple[Self | None, ...]:
        """Return the step of each round: all drop as many blocks, the first ones one more where the number does not divide.

        Raises:
            ValueError: the step does not fit the model.
        """
        self.estimate(shape)
        blocks = len(shape.layers)
        each, more = divmod(self._goes(blocks), rounds)
        parts: list[Self | None] = []
        for number in range(rounds):
            left = blocks - each - (number < more)
            parts.append(None if left == blocks else self.model_copy(update={"keep": left / blocks}))
            blocks = left
        return tuple(parts)

    @property
    def surveys(self) -> bool:
        """Whether blocks still have to be chosen."""
        return self.drop is None

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Choose what to drop, and take it out of the network.

        Raises:
            ValueError: a block is named that does not exist, that other blocks depend on, or whose place no other block can take;
                or the model's head averages the outputs of several blocks.
        """
        from compress.models.network.segments import blocks_of
        from compress.models.network.surgery import drop_blocks, drop_sublayer

        self.estimate(model.shape)  # raises what can be known without the weights
        if self.drop is None:
            chosen = bench.once(lambda: {"drop": self.choose(survey)})["drop"]
            drop = sorted(model.layers[place] for place in chosen)
        else:
            drop = sorted(self.drop)
        places = [model.layers.index(number) for number in drop]
        decided = self.model_copy(update={"keep": None, "drop": tuple(drop)})
        if self.what != "blocks":
            for place in places:
                drop_sublayer(blocks_of(model.network)[1][place], self.what)
            left = model.network.state_dict().keys()
            weights = model.weights.renamed(lambda name: name if name in left else None)
            dropped = (*model.dropped, *((place, self.what) for place in places))
            return decided, replace(model, weights=weights, dropped=dropped, depths=())
        kept = [place for place in range(len(model.layers)) if place not in places]
        types = drop_blocks(model.network, kept)
        changes = {"num_hidden_layers": len(kept)} | ({} if types is None else {"layer_types": types})
        rename = _renaming(kept)
        return decided, replace(
            model,
            weights=model.weights.renamed(rename),
            config=with_backbone(model.config, **changes),
            layers=tuple(model.layers[place] for place in kept),
            depths=(),  # what is left is not what was trained to be cut
            dropped=tuple((kept.index(place), what) for place, what in model.dropped if place in kept),
        )

    def choose(self, survey: Survey) -> list[int]:
        """Choose the positions, among the model's current blocks, of the blocks or sublayers to drop.

        Raises:
            ValueError: fewer can be dropped than `keep` asks for.
        """
        part: Literal["block", "attention", "mlp"] = "block" if self.what == "blocks" else self.what
        gone = {place for place, what in survey.model.dropped if what == part}
        places = [place for place in survey.droppable if place not in gone]
        goes = self._goes(survey.blocks - len(gone))
        if goes > len(places):
            raise ValueError(f"`keep: {self.keep}` drops {goes} of the {self.what}, and only {len(places)} can be dropped")
        if goes == 0:
            return []
        if self.criterion == "angular":
            return self._least_angle(survey, places, goes)
        if self.criterion == "greedy":
            return self._one_after_another(survey, places, part, goes)
        # Each one on its own: ShortGPT's block influence of the tokens, or what is lost of the texts' vectors. Drop the smallest.
        parts = [(place, part) for place in places]
        losses = survey.influence(parts) if self.criterion == "influence" else _losses(survey, [frozenset([one]) for one in parts])
        ranked = sorted(range(len(places)), key=losses.__getitem__)
        return sorted(places[index] for index in ranked[:goes])

    @staticmethod
    def _least_angle(survey: Survey, places: Sequence[int], goes: int) -> list[int]:
        """Return the run of `goes` blocks with the smallest angular distance (Gromov et al. 2024, section 3.2)."""
        # Step 1: d(x^(l), x^(l+n)) for each first block l. Step 2: the l with the smallest distance. Step 3: drop l to l + n - 1.
        distances = {first: angle for first, angle in enumerate(survey.angles(goes)) if {first, first + goes - 1} <= {*places}}
        first = min(distances, key=distances.__getitem__)
        return list(range(first, first + goes))

    @staticmethod
    def _one_after_another(
        survey: Survey, places: Sequence[int], part: Literal["block", "attention", "mlp"], goes: int
    ) -> list[int]:
        """Drop `goes` times what costs least together with what has been dropped before."""
        chosen: list[int] = []
        while len(chosen) < goes:
            rest = [place for place in places if place not in chosen]
            losses = _losses(survey, [frozenset((place, part) for place in (*chosen, another)) for another in rest])
            chosen.append(rest[losses.index(min(losses))])
        return sorted(chosen)

    def _goes(self, blocks: int) -> int:
        """Return how many of `blocks` blocks are dropped.

        Raises:
            ValueError: none would be left.
        """
        assert self.keep is not None
        left = share_of(self.keep, blocks)
        if left == 0:
            raise ValueError(f"`keep: {self.keep}` leaves none of {blocks} blocks")
        return blocks - left

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size: fewer blocks, or blocks with fewer tensors. Until `prepare` has chosen, the last blocks stand for
        them.

        Raises:
            ValueError: a block is named that does not exist, none would be left, the blocks' layout is not known, or the model's
                head averages the outputs of several blocks.
        """
        _check_head(shape.tensors)
        layers, owned = shape.layers, own_tensors(shape)
        if self.drop is None:
            goes, free = self._goes(len(layers)), [place for place in range(len(layers)) if place not in owned]
            if goes == 0:
                raise ValueError(f"`keep: {self.keep}` of {len(layers)} blocks drops none; lower it, or leave the step out")
            if goes > len(free):
                raise ValueError(f"`keep: {self.keep}` drops {goes} of the {self.what}, and only {len(free)} can be dropped")
            places = free[len(free) - goes :]
        else:
            for number in self.drop:
                if number not in layers:
                    raise ValueError(f"`drop` names block {number}; {shape.name} has {', '.join(map(str, layers))}")
            places = [layers.index(number) for number in self.drop]
            if len(places) == len(layers) and self.what == "blocks":
                raise ValueError(f"`drop` leaves none of {len(layers)} blocks")
        self._check(shape, places, owned)
        after = self._without_blocks(shape, places) if self.what == "blocks" else self._without_sublayers(shape, places, self.what)
        saved, many = shape.parameters - after.parameters, len(places) > 1
        named = "" if self.drop is None else f" ({', '.join(map(str, self.drop))})"
        what = {"blocks": "blocks", "attention": "blocks' attention", "mlp": "blocks' MLP"}[self.what]
        rounds = {"greedy": len(places), "pooled": 1}.get(self.criterion, 0) if self.surveys else 0
        return Estimate(
            after=after,
            memory_bytes=0,
            bytes_touched=0,
            passes=rounds * len(layers) / 2 + (1 if self.surveys else 0),
            copies=len(layers) if rounds else 2,
            note=f"{len(places)} of {len(layers)} {what}{named} {'are' if many else 'is'} dropped, {saved / 1e6:,.1f} M parameters"
            + "".join(f"; block {layers[place]} stays, because only it has {tensor}" for place, tensor in owned.items()),
        )

    def _check(self, shape: ModelShape, places: Sequence[int], owned: Mapping[int, str]) -> None:
        """See that nothing else in the model depends on what is dropped.

        Raises:
            ValueError: something does.
        """
        for place in places:
            if place in owned and self.what != "mlp":
                raise ValueError(
                    f"block {shape.layers[place]} cannot be dropped: only it has {owned[place]}, which the others need"
                )
        if self.what == "blocks" and places and shape.setting("hidden_size_per_layer_input"):
            raise ValueError(f"{shape.name}: blocks cannot be dropped: its tables hold a row of numbers for each block")
        if self.what == "attention" and "attention" in shape.anatomy.refused:
            raise ValueError(f"{shape.name}: attention cannot be dropped: {shape.anatomy.refused['attention']}")

    @staticmethod
    def _without_blocks(shape: ModelShape, places: Sequence[int]) -> ModelShape:
        kept = [place for place in range(len(shape.layers)) if place not in places]
        rename = _renaming(kept)
        tensors = {new: info for name, info in shape.as_stored().tensors.items() if (new := rename(name)) is not None}
        types = shape.setting("layer_types")
        changes = {"num_hidden_layers": len(kept)} | ({} if types is None else {"layer_types": [types[place] for place in kept]})
        layers = tuple(shape.layers[place] for place in kept)
        return replace(shape, tensors=tensors, config=with_backbone(shape.config, **changes), left=layers)

    @staticmethod
    def _without_sublayers(shape: ModelShape, places: Sequence[int], sublayer: Literal["attention", "mlp"]) -> ModelShape:
        gone = tuple(f"{name}." for name in shape.anatomy.replacements[sublayer])

        def stays(name: str) -> bool:
            at = place_in_block(name)
            return at is None or at[0] not in places or not at[1].startswith(gone)

        tensors = {name: info for name, info in shape.as_stored().tensors.items() if stays(name)}
        return replace(shape, tensors=tensors)

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Do nothing: `prepare` has dropped everything before the walk."""
        return {}


def _check_head(tensors: Iterable[str]) -> None:
    """See that a head takes the last block's output alone; `tensors`: names of the model's.

    Raises:
        ValueError: it averages those of several blocks, and each has a weight of its own.
    """
    if LAYER_WEIGHTS in tensors:
        raise ValueError("WeightedLayerPooling averages the outputs of several blocks, and has a weight for each; keep all blocks")


def own_tensors(shape: ModelShape) -> dict[int, str]:
    """Return the blocks that have a layer which no other block has, by position, with that layer's name in the block.

    The others get what it makes: T5's first block has the table of position biases. Sublayers that were dropped elsewhere do not
    count.
    """
    owners: dict[str, set[int]] = {}
    for name in shape.tensors:
        at = place_in_block(name)
        if at is not None:
            owners.setdefault(at[1].rpartition(".")[0], set()).add(at[0])
    alone = {layer: min(places) for layer, places in owners.items() if len(places) == 1 and shape.blocks > 1}
    if not alone:
        return {}
    try:
        sublayers = [f"{name}." for names in shape.anatomy.replacements.values() for name in names]
    except ValueError:  # of an unknown layout, and so whole in every block
        sublayers = []
    return {place: layer for layer, place in alone.items() if not f"{layer}.".startswith(tuple(sublayers))}


def _losses(survey: Survey, cases: Sequence[Left]) -> list[float]:
    """Return 1 - the mean cosine of the texts' vectors to the full model's, for each case of parts left out."""
    import torch

    whole, *without = survey.vectors([frozenset(), *cases])
    return [1 - float(torch.cosine_similarity(whole, vectors, dim=1).mean()) for vectors in without]


def _renaming(kept: Sequence[int]) -> Callable[[str], str | None]:
    """Return a function that gives a tensor its name when only blocks at these positions are kept; None if its block is dropped."""
    place_of = {old: new for new, old in enumerate(kept)}

    def rename(name: str) -> str | None:
        at = place_in_block(name)
        if at is None:
            return name
        return renumbered(name, place_of[at[0]]) if at[0] in place_of else None

    return rename
