"""What is left once no other reading of the texts explains a difference: rounding, compression, other weights."""

from __future__ import annotations

import numpy as np
from safetensors import safe_open

from compress.common.errors import UserError
from compress.measure.doctor.answers import BothSides, agreement
from compress.measure.doctor.causes import Cause, CauseName
from compress.measure.doctor.changes import LocalSide
from compress.measure.doctor.texts import probe_texts
from compress.models.folder import ModelFolder
from compress.runtimes.loading import open_source
from compress.runtimes.torch_embedder import TorchEmbedder

# Rounding to half precision does not take vectors further from each other than this.
LOWEST_ROUNDED = 0.98
# Two roundings of one network differ by as much as either of them: how many times the effect of one may be seen.
ROUNDINGS = 4
HALVES = ("float16", "bfloat16")
TENSORS_COMPARED = 12


def compression_of(folder: ModelFolder) -> str | None:
    """Say what was done to a variant's weights; None: nothing, or it is no variant."""
    info = folder.variant
    if info is None:
        return None
    words = info.weights
    return None if words == "float16" and not info.dropped and not info.blocks and info.heads is None else words


def precision_cause(comparison: BothSides, notes: list[str]) -> Cause | None:
    """Say that the difference is one of rounding, where half precision makes one as large in the side that runs in torch."""
    folders = [one.folder for one in (comparison.side, comparison.reference) if isinstance(one, LocalSide) and one.folder]
    if np.nanmin(comparison.cosines) < LOWEST_ROUNDED or any(compression_of(folder) is not None for folder in folders):
        return None
    for varied, other in ((comparison.reference, "the model"), (comparison.side, "the reference")):
        if not isinstance(varied, LocalSide) or varied.folder is None or not isinstance(varied.embedder, TorchEmbedder):
            continue
        is_model = varied is comparison.side
        exact = (comparison.answers if is_model else comparison.expected).vectors
        texts = [index for index, cosine in enumerate(comparison.cosines) if not np.isnan(cosine)]
        seen = 1 - float(np.nanmean(comparison.cosines))
        for dtype in HALVES:
            try:
                half = open_source(varied.folder, device=str(varied.embedder.device), runtime="torch", dtype=dtype)
            except UserError as error:
                notes.append(f"not tried: {dtype} ({error.message})")
                continue
            vectors = half.encode([probe_texts()[index].text for index in texts], comparison.prompts[0 if is_model else 1])
            rounded = 1 - float(np.nanmean(agreement(vectors, exact[texts])))
            if seen <= ROUNDINGS * rounded:
                words = f"{other} computes or stores its weights in half precision: {dtype} here makes as large a difference"
                return Cause(name=CauseName.PRECISION, words=f"{words} (1 - cosine {rounded:.1e}, seen {seen:.1e})")
    return None


def weights_cause(comparison: BothSides) -> Cause:
    """Say that weights differ, and what shows it; or, where they are the same, that no cause was found."""
    folders = [one.folder if isinstance(one, LocalSide) else None for one in (comparison.side, comparison.reference)]
    bases = {_base_fingerprint(folder) for folder in folders if folder is not None}
    done = {
        role: compression_of(folder)
        for role, folder in zip(("the model", "the reference"), folders, strict=True)
        if folder is not None and compression_of(folder) is not None
    }
    if done and len(bases) == 1:
        words = ", ".join(f"{role} is a variant ({what})" for role, what in done.items())
        return Cause(name=CauseName.COMPRESSION, words=f"{words}; nothing else explains the difference")
    if folders[0] is None or folders[1] is None:
        return Cause(name=CauseName.WEIGHTS, words="another checkpoint: no other reading of the texts explains the difference")
    if folders[0].is_variant or folders[1].is_variant:
        names = [folder.variant.base if folder.variant else folder.name for folder in (folders[0], folders[1])]
        words = f"another checkpoint: made from {names[0]} and {names[1]}"
        if len(bases) > 1:
            words = f"{words}, whose files have different fingerprints"
        return Cause(name=CauseName.WEIGHTS, words=words)
    evidence = difference_of(folders[0], folders[1])
    if evidence is None:
        words = "no cause was found: the weights that were compared are the same, and nothing that was tried explains it"
        return Cause(name=CauseName.UNKNOWN, words=words)
    return Cause(name=CauseName.WEIGHTS, words=f"another checkpoint: {evidence}")


def _base_fingerprint(folder: ModelFolder) -> str:
    return folder.fingerprint if folder.variant is None else folder.variant.base_fingerprint


def difference_of(a: ModelFolder, b: ModelFolder) -> str | None:
    """Say how two checkpoints' tensors differ; None: those that were compared do not."""
    names = sorted(set(a.headers) & set(b.headers))
    if not names:
        return f"no tensor of {a.name} has a name of {b.name}'s"
    other = [name for name in names if a.headers[name].shape != b.headers[name].shape]
    if other:
        shapes = [folder.headers[other[0]].shape for folder in (a, b)]
        return f"{len(other)} tensors have other shapes, such as {other[0]}: {shapes[0]} and {shapes[1]}"
    alone = sorted(set(a.headers) ^ set(b.headers))
    for name in dict.fromkeys(names[:: -(-len(names) // TENSORS_COMPARED)]):
        ours, theirs = _tensor(a, name), _tensor(b, name)
        difference = float(np.abs(ours - theirs).max(initial=0.0))
        if difference > 1e-2 * float(np.abs(theirs).max(initial=0.0)):
            return f"{name} differs by up to {difference:.3g}"
    return f"{len(alone)} tensors are in one of them alone, such as {alone[0]}" if alone else None


def _tensor(folder: ModelFolder, name: str) -> np.ndarray:
    """Read one tensor in float32."""
    for path in folder.weight_files:
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118  no container, it has keys() alone
                values: np.ndarray = file.get_tensor(name).float().numpy()
                return values
    raise KeyError(name)
