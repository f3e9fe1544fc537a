"""matplotlib: the pictures of docs/paper.md."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_COLOURS = ("#2b6cb0", "#b03a5b", "#2f855a", "#d1862b", "#6b46c1", "#555555", "#84a414", "#9b2c2c")
_LINES = {"pruned": "-", "scratch": "--", "start": ":"}


def curves(
    drawn: Mapping[str, Any], along: str, title: str = "", floor: float | None = None
) -> Any:
    """Losses of one seed along trainings, one line each; ``floor``: the teacher's."""
    figure, axes = plt.subplots(figsize=(7.6, 3.6))
    kinds = list(dict.fromkeys(name.split(",")[0] for name in drawn))
    for name, row in drawn.items():
        points = ([[0, row["pruned"]]] if "pruned" in row and row["pruned"] < 7 else []) + row[
            "curve"
        ]
        style = next((line for word, line in _LINES.items() if word in name), "-")
        colour = _COLOURS[kinds.index(name.split(",")[0]) % len(_COLOURS)]
        axes.plot(*zip(*points, strict=True), style, color=colour, label=name, linewidth=1.4)
    if floor is not None:
        axes.axhline(floor, color="#999999", linewidth=0.8)
        # below the line and at its end, where no student's curve runs
        end = max((row["curve"][-1][0] for row in drawn.values()), default=0)
        axes.annotate(
            title, (end, floor), (0, -2), textcoords="offset points", fontsize=7, color="#666666",
            ha="right", va="top",
        )  # fmt: skip
        axes.margins(y=0.08)
    axes.set_xlabel(f"{along} (first seed)")
    axes.set_ylabel("held-out loss, nats per token")
    if drawn:
        axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _clean(figure, axes)


def against_tokens(rows: Mapping[str, Sequence[Any]], multiples: Sequence[int]) -> Any:
    """Losses from scratch against the multiple of the student's tokens, one colour per seed."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for seed, student in enumerate(rows.get("student", ())):
        colour = _COLOURS[seed % len(_COLOURS)]
        named = ((m, rows.get(f"from scratch, tokens x {m}", ())) for m in multiples)
        points = [(m, of[seed]["loss"]) for m, of in named if len(of) > seed and of[seed]]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, linewidth=1.2,
                      label=f"from scratch, seed {seed}")  # fmt: skip
        axes.axhline(
            student["loss"], color=colour, linestyle="--", linewidth=1, label=f"pruned, seed {seed}"
        )
    axes.set_xscale("log")
    axes.set_xlim(0.9, 1.1 * max(multiples))
    axes.set_xticks(multiples, [f"{m} x" for m in multiples])
    axes.minorticks_off()
    axes.set_xlabel("tokens, as a multiple of the student's")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(fontsize=7, frameon=False)
    return _clean(figure, axes)


def before_and_after(rows: Mapping[str, Sequence[Any]]) -> Any:
    """A line per way: loss right after the cut on the left, after training on the right; a dot per seed, a bar their mean."""
    names = [name for name, of in rows.items() if of and "pruned" in of[0]]
    figure, both = plt.subplots(1, 2, figsize=(7.6, 0.9 + 0.2 * len(names)), sharey=True)
    ours = any("ours" in name for name in names)
    for axes, key, title in zip(
        both, ("pruned", "loss"), ("right after the cut", "after training"), strict=True
    ):
        for line, name in enumerate(names):
            colour = _COLOURS[0] if not ours or "ours" in name else _COLOURS[5]
            values = [row[key] for row in rows[name] if key in row]
            axes.scatter(values, [line] * len(values), s=10, color=colour, linewidths=0)
            axes.plot(
                [statistics.fmean(values)] * 2,
                [line - 0.35, line + 0.35],
                color=colour,
                linewidth=1,
            )
        if rows.get("teacher"):
            mean = statistics.fmean(row["loss"] for row in rows["teacher"])
            axes.axvline(mean, color="#999999", linewidth=0.8, linestyle=":")
        axes.grid(axis="both", color="#eeeeee")
        axes.set_axisbelow(True)
        axes.set_xlabel(f"held-out loss {title}")
        _clean(figure, axes)
    both[0].set_yticks(range(len(names)), names, fontsize=7)
    both[0].invert_yaxis()
    both[0].annotate(
        "a dot: a seed; a bar: their mean; dotted: the teacher", (0, 1), (0, 5), "axes fraction",
        textcoords="offset points", fontsize=7, color="#666666",
    )  # fmt: skip
    figure.tight_layout()
    return figure


def _clean(figure: Any, axes: Any) -> Any:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=7)
    axes.xaxis.label.set_size(8)
    axes.yaxis.label.set_size(8)
    figure.tight_layout()
    return figure


def save(figure: Any, path: Path) -> None:
    """Writes a picture as SVG, the same bytes for the same numbers."""
    with matplotlib.rc_context({"svg.hashsalt": "paper", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
