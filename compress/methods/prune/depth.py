"""Depth: whole blocks dropped, or only their attention or their MLPs, by what that does to the texts' vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Estimate, Method, share_of
from compress.models.architectures import place_in_block, renumbered
from compress.models.shape import ModelShape, with_backbone

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Left, Survey
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel


class Depth(Method):
    """Drop blocks, or one sublayer of some blocks. What is left is a shallower model of the same architecture.

    Nothing is refitted; distillation heals what is lost. A model without some MLPs or attentions has no architecture of its own
    elsewhere: such a variant runs here alone.
    """

    method: Literal["depth"] = "depth"
    whole: ClassVar[bool] = True
    what: Literal["blocks", "attention", "mlp"] = "blocks"
    """What is dropped: whole blocks, or their attention or their MLP."""
    keep: float | None = Field(None, gt=0, le=1)
    """Share that is kept, rounded to whole blocks, halves up."""
    drop: tuple[int, ...] | None = None
    """In the place of `keep`: which ones go, numbered from 0 as in the published model."""
    criterion: Literal["greedy", "pooled", "influence", "angular"] = "greedy"
    """How `keep` chooses. `pooled`: those without which, one at a time, the texts' vectors keep the highest mean cosine to the
    whole model's. `greedy`: the same, one after another, the rest looked at anew after each. `influence`: those that turn token
    vectors least, 1 - cosine of what comes out with and without (ShortGPT, Men et al. 2024, arXiv 2403.03853). `angular`: the run
    of blocks over which token vectors turn least (Gromov et al. 2024, arXiv 2403.17887)."""

    @model_validator(mode="after")
    def _says_how_many(self) -> Self:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("`keep` says how many stay, `drop` which ones go; give one of them")
        if self.drop is not None and len(set(self.drop)) != len(self.drop):
            raise ValueError("`drop` names a block twice")
        if self.criterion == "angular" and self.what != "blocks":
            raise ValueError("`criterion: angular` is about runs of blocks; use greedy, pooled or influence")
        return self

    @property
    def surveys(self) -> bool:
        """Whether the choice is still to be made."""
        return self.drop is None

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Choose what goes, and take it out of the network.

        Raises:
            ValueError: a block is named that is not there, or one that no other can stand in for.
        """
        from compress.models.network.segments import blocks_of
        from compress.models.network.surgery import drop_blocks, drop_sublayer

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
            return decided, replace(model, weights=weights, dropped=dropped)
        kept = [place for place in range(len(model.layers)) if place not in places]
        types = drop_blocks(model.network, kept)
        changes = {"num_hidden_layers": len(kept)} | ({} if types is None else {"layer_types": types})
        rename = _renaming(kept)
        return decided, replace(
            model,
            weights=model.weights.renamed(rename),
            config=with_backbone(model.config, **changes),
            layers=tuple(model.layers[place] for place in kept),
            dropped=tuple((kept.index(place), what) for place, what in model.dropped if place in kept),
        )

    def choose(self, survey: Survey) -> list[int]:
        """Choose which places of the model's blocks lose the block or the sublayer.

        Raises:
            ValueError: fewer can go than are to go.
        """
        part: Literal["block", "attention", "mlp"] = "block" if self.what == "blocks" else self.what
        gone = {place for place, what in survey.model.dropped if what == part}
        places = [place for place in survey.droppable if place not in gone]
        goes = self._goes(survey.blocks - len(gone))
        if goes > len(places):
            raise ValueError(f"{goes} of the {self.what} are to go, and only {len(places)} can")
        if goes == 0:
            return []
        if self.criterion == "angular":
            spans = {first: angle for first, angle in enumerate(survey.angles(goes)) if {first, first + goes - 1} <= {*places}}
            first = min(spans, key=spans.__getitem__)
            return list(range(first, first + goes))
        if self.criterion == "greedy":
            chosen: list[int] = []
            while len(chosen) < goes:
                rest = [place for place in places if place not in chosen]
                losses = _losses(survey, [frozenset((place, part) for place in (*chosen, another)) for another in rest])
                chosen.append(rest[losses.index(min(losses))])
            return sorted(chosen)
        parts = [(place, part) for place in places]
        losses = survey.influence(parts) if self.criterion == "influence" else _losses(survey, [frozenset([one]) for one in parts])
        ranked = sorted(range(len(places)), key=losses.__getitem__)
        return sorted(places[index] for index in ranked[:goes])

    def _goes(self, blocks: int) -> int:
        """Return how many go of so many.

        Raises:
            ValueError: none would be left.
        """
        assert self.keep is not None
        left = share_of(self.keep, blocks)
        if left == 0:
            raise ValueError(f"`keep: {self.keep}` leaves none of {blocks} blocks")
        return blocks - left

    def estimate(self, shape: ModelShape) -> Estimate:
        """Size after: fewer blocks, or blocks of fewer tensors. Which ones is not known before `prepare`; the last stand for them.

        Raises:
            ValueError: a block is named that is not there, none would be left, or the blocks' layout is not known.
        """
        layers = shape.layers
        if self.drop is None:
            goes = self._goes(len(layers))
            places = list(range(len(layers) - goes, len(layers)))
        else:
            for number in self.drop:
                if number not in layers:
                    raise ValueError(f"`drop` names block {number}; {shape.name} has {', '.join(map(str, layers))}")
            places = [layers.index(number) for number in self.drop]
            if len(places) == len(layers) and self.what == "blocks":
                raise ValueError(f"`drop` leaves none of {len(layers)} blocks")
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
            note=f"{len(places)} of {len(layers)} {what}{named} {'are' if many else 'is'} dropped, {saved / 1e6:,.1f} M parameters",
        )

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
        """Do nothing: what goes is gone before the walk."""
        return {}


def _losses(survey: Survey, cases: Sequence[Left]) -> list[float]:
    """Return 1 - mean cosine of the texts' vectors to the whole model's, for each case."""
    import torch

    whole, *without = survey.vectors([frozenset(), *cases])
    return [1 - float(torch.cosine_similarity(whole, vectors, dim=1).mean()) for vectors in without]


def _renaming(kept: Sequence[int]) -> Callable[[str], str | None]:
    """Return what gives a tensor its name where only blocks at these places are left, None where its block is not."""
    place_of = {old: new for new, old in enumerate(kept)}

    def rename(name: str) -> str | None:
        at = place_in_block(name)
        if at is None:
            return name
        return renumbered(name, place_of[at[0]]) if at[0] in place_of else None

    return rename
