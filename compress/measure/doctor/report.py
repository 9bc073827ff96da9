"""A diagnosis in words for people."""

from __future__ import annotations

from compress.measure.doctor.diagnose import Diagnosis

UNKNOWN = "not known"


def describe(found: Diagnosis) -> str:
    """Write a diagnosis: both sides, the texts, the verdict, and the causes."""
    lines = [
        f"model      {found.model.name} ({found.model.kind})",
        f"reference  {found.reference.name} ({found.reference.kind})",
        "",
    ]
    lines += [f"{'':18}{'model':<34}reference"]
    lines += [f"{what:18}{ours:<34}{theirs}" for what, ours, theirs in _facts(found)]
    lines += ["", f"{'text':22}{'cosine':>11}"]
    for row in found.texts:
        cosine = "-" if row.cosine is None else f"{row.cosine:.7f}"
        mark = "  differs" if row.cosine is not None and row.cosine < found.at_least else ""
        lines.append(f"{row.kind:22}{cosine:>11}{mark}{f'  {row.note}' if row.note else ''}")
    compared = sum(row.cosine is not None for row in found.texts)
    lines += ["", f"lowest cosine {found.lowest:.7f} on {compared} texts; the same from {found.at_least:g} on"]
    lines += [f"note: {note}" for note in found.notes]
    if found.same:
        return "\n".join([*lines, "these are the same vectors"])
    lines.append("these are NOT the same vectors; likeliest cause:")
    for cause in found.causes:
        shown = "" if cause.lowest_cosine is None else f" (with that undone: lowest cosine {cause.lowest_cosine:.7f})"
        lines.append(f"  {cause.name}: {cause.words}{shown}")
    return "\n".join(lines)


def _facts(found: Diagnosis) -> list[tuple[str, str, str]]:
    ours, theirs = found.model, found.reference
    both = (ours, theirs)
    rows = [
        ("prompts", *(_prompts(side.prompts) for side in both)),
        ("default prompt", *(_default(side.default_prompt) for side in both)),
        ("pooling", *(side.pooling or UNKNOWN for side in both)),
        ("attention", *(side.attention or UNKNOWN for side in both)),
        ("truncation", *(_truncation(side.max_length, side.truncation_side) for side in both)),
        ("norm", *found.norms),
        ("dtype", *(_dtype(side.dtype, values) for side, values in zip(both, found.values, strict=True))),
        ("weights", *(side.weights or UNKNOWN for side in both)),
        ("dimension", f"{found.dimension:,}", f"{found.dimension:,}"),
    ]
    return [(what, left, right) for what, left, right in rows if (left, right) != (UNKNOWN, UNKNOWN)]


def _prompts(prompts: dict[str, str] | None) -> str:
    if prompts is None:
        return UNKNOWN
    names = list(prompts)
    return "none" if not names else ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")


def _default(prompt: str | None) -> str:
    return UNKNOWN if prompt is None else repr(prompt[:28]) if prompt else "none"


def _truncation(length: int | None, side: str | None) -> str:
    return UNKNOWN if length is None else f"{length:,} tokens" + (f", cut on the {side}" if side else "")


def _dtype(computed: str | None, values: str) -> str:
    stored = "" if values == "float32" else f"values fit in {values}"
    return ", ".join(part for part in (computed, stored) if part) or UNKNOWN
