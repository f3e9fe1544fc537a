"""matplotlib: pictures of importance and of training, as PNG bytes."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from nemo_minitron.evaluation.report import NAMES

# above no picture's axes is anything that a title could meet; to look for it costs a tenth of drawing
plt.rc("axes", titley=1.0)

COLOURS = {"teacher": "#555555", "pruned": "#d1862b", "student": "#2b6cb0", "scratch": "#b03a5b"}
_TITLES = {
    "hidden": "hidden channels", "ffn": "MLP neurons", "heads": "query heads", "layers": "layers",
    "kv_heads": "KV heads", "experts": "experts",
    "expert_ffn": "experts' neurons", "shared_ffn": "shared expert's neurons",
    "mamba_heads": "Mamba heads", "mamba_groups": "Mamba groups", "mamba_head_dim": "Mamba head channels",
    "mamba_state": "Mamba state channels", "conv_channels": "channels of short convolutions",
    "linear_key_heads": "delta nets' key heads", "linear_value_heads": "delta nets' value heads",
}  # fmt: skip


def importance_maps(ranking: Mapping[str, Tensor]) -> dict[str, bytes]:
    """One picture per axis: a heat map over layers, or a curve where there is one ranking for the model.

    Args:
        ranking: axis name to scores, [layers, units] or [units]; of [layers, experts, units] the
            heat map has a line per layer and expert.

    Returns:
        Axis name to PNG.
    """
    pictures = {}
    for axis, scores in ranking.items():
        figure, panel = plt.subplots(figsize=(6.4, 2.8))
        # always of the same shape: to let matplotlib find the margins costs as much as to draw
        figure.subplots_adjust(left=0.12, right=0.97, bottom=0.18, top=0.89)
        title = _TITLES[axis] if axis in _TITLES else axis
        if scores.dim() > 1:
            per_layer = math.prod(scores.shape[1:-1])
            scores = scores.flatten(0, -2)
            # sorted, relative to the layer's own best unit: what shows is how fast importance falls
            # off
            ordered = scores.sort(-1, descending=True).values
            relative = ordered / ordered[:, :1].clamp(min=1e-30)
            image = panel.imshow(
                relative.numpy(),
                aspect="auto",
                cmap="viridis",
                vmin=0,
                vmax=1,
                interpolation="nearest",
            )
            figure.colorbar(image, label="share of the line's best", ticks=[0, 0.5, 1])
            owner = "layer" if per_layer == 1 else f"layer x {per_layer} + expert"
            panel.set(
                xlabel=f"{title}, most important first",
                ylabel=owner,
                title=f"Importance of {title}",
            )
            panel.xaxis.set_major_locator(_few())
            panel.yaxis.set_major_locator(_few())
        elif axis == "layers":
            panel.bar(range(len(scores)), scores.numpy(), color=COLOURS["student"])
            panel.set(xlabel="layer", ylabel="importance", title="Importance of layers")
            panel.xaxis.set_major_locator(_few())
        else:
            ordered = scores.sort(descending=True).values
            panel.plot((ordered / ordered[0].clamp(min=1e-30)).numpy(), color=COLOURS["student"])
            panel.set(
                xlabel=f"{title}, most important first", ylabel="share of the best",
                title=f"Importance of {title}", ylim=(0, 1.05), yticks=[0, 0.5, 1],
            )  # fmt: skip
            panel.xaxis.set_major_locator(_few())
            panel.grid(alpha=0.25)
        pictures[axis] = _png(figure)
    return pictures


_METRICS = {
    "block_influence": "block influence", "lm_loss": "rise of the loss", "task": "fall of the accuracy",
}  # fmt: skip


def depth_map(importance: Mapping[tuple[str, int], Tensor]) -> bytes:
    """Picture of the importance of each layer, or of each block of consecutive layers.

    Args:
        importance: (metric, block length) to the blocks' importance, by their first layer.

    Returns:
        PNG: a panel per metric; a curve where there are single layers only, else a heat map of
            first layer
        and length.
    """
    metrics = list(dict.fromkeys(metric for metric, _ in importance))
    height = max(2.8, 1.2 + 0.22 * len(importance) / len(metrics))
    figure, panels = plt.subplots(
        1,
        len(metrics),
        figsize=(6.4 * len(metrics), height),
        constrained_layout=True,
        squeeze=False,
    )
    for panel, metric in zip(panels[0], metrics, strict=True):
        lengths = sorted(length for name, length in importance if name == metric)
        if len(lengths) == 1:
            panel.plot(
                importance[metric, lengths[0]].numpy(), marker="o", ms=4, color=COLOURS["student"]
            )
            panel.axhline(0, color="#999999", lw=0.8)
            panel.set(xlabel="layer", ylabel=_METRICS[metric], title="One layer less")
            panel.grid(alpha=0.25)
        else:
            layers = len(importance[metric, lengths[0]]) + lengths[0] - 1
            grid = np.full((len(lengths), layers), np.nan)
            for row, length in enumerate(lengths):
                values = importance[metric, length].numpy()
                grid[row, : len(values)] = values
            image = panel.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
            figure.colorbar(image, label=_METRICS[metric])
            panel.set_yticks(range(len(lengths)), [str(length) for length in lengths])
            panel.set(
                xlabel="first layer of the block",
                ylabel="layers in the block",
                title="A block less",
            )
        panel.xaxis.set_major_locator(_few())
    return _png(figure)


def routing_map(texts: Sequence[str], by_text: Tensor) -> bytes:
    """Which experts each text of a calibration mixture uses: a heat map of layers and experts per text.

    Args:
        texts: their names.
        by_text: tokens that came to each expert, int64, [texts, layers, experts].

    Returns:
        PNG.
    """
    share_MLE = by_text.double() / by_text.sum(-1, keepdim=True).clamp(min=1)
    times_MLE = share_MLE * by_text.shape[-1]
    height = 1.0 + len(texts) * max(1.4, 0.12 * by_text.shape[1])
    figure, panels = plt.subplots(
        len(texts), 1, figsize=(6.4, height), constrained_layout=True, squeeze=False, sharex=True
    )
    for panel, name, times_LE in zip(panels[:, 0], texts, times_MLE, strict=True):
        image = panel.imshow(
            times_LE.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=2, interpolation="nearest"
        )
        shown = name if len(name) <= 60 else f"...{name[-57:]}"
        panel.set_title(shown, fontsize=9, parse_math=False)
        panel.set_ylabel("layer")
        panel.yaxis.set_major_locator(_few())
        panel.xaxis.set_major_locator(_few())
    panels[-1, 0].set_xlabel("expert")
    figure.colorbar(image, ax=list(panels[:, 0]), label="tokens, in equal shares", extend="max")
    return _png(figure)


def pareto(points: Sequence[tuple[str, int, float]]) -> bytes:
    """Held-out loss against size, a point per model; a line joins the models on the Pareto front.

    Args:
        points: name, parameters, held-out loss in nats per token.

    Returns:
        PNG.
    """
    figure, panel = plt.subplots(figsize=(8.4, 4.2), constrained_layout=True)
    best: list[tuple[int, float]] = []
    for _, size, loss in sorted(points, key=lambda point: (point[1], point[2])):
        if not best or loss < best[-1][1]:
            best.append((size, loss))
    panel.plot(*zip(*best, strict=True), lw=1, color=COLOURS["student"], zorder=1)
    panel.scatter(
        [size for _, size, _ in points],
        [loss for *_, loss in points],
        color=COLOURS["student"],
        zorder=2,
    )
    panel.ticklabel_format(useOffset=False, style="plain")
    middle = sum(panel.get_xlim()) / 2
    for name, size, loss in points:  # towards the middle, where there is room
        left = size > middle
        panel.annotate(
            name, (size, loss), textcoords="offset points", xytext=(-5 if left else 5, 4), fontsize=8,
            ha="right" if left else "left",
        )  # fmt: skip
    panel.margins(0.08)
    panel.set(xlabel="parameters", ylabel="held-out loss (nats per token)")
    panel.grid(alpha=0.25)
    return _png(figure)


def sensitivity(
    whole: float,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    layers: Sequence[tuple[int, float]],
) -> bytes:
    """Held-out loss against the kept share of each axis, and without each layer.

    Args:
        whole: held-out loss of the whole model.
        curves: axis to its kept shares and the losses there.
        layers: layers, and the loss without each.

    Returns:
        PNG.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2), constrained_layout=True)
    for axis, points in curves.items():
        name = _TITLES[axis] if axis in _TITLES else axis
        left.plot(*zip(*sorted(points), strict=True), marker="o", ms=3, lw=1, label=name)
    left.axhline(whole, color="0.6", lw=0.8, ls="--", label="whole model")
    left.set(xlabel="kept of the axis", ylabel="held-out loss (nats per token)")
    left.xaxis.set_major_formatter(PercentFormatter(1.0))
    left.legend(fontsize=8)
    added = [(layer, loss - whole) for layer, loss in layers]
    right.bar([layer for layer, _ in added], [more for _, more in added], color="0.45")
    top = shown_up_to([more for _, more in added])
    if top is not None:  # else the few layers that a model cannot do without hide all others
        right.set_ylim(1.25 * min(0.0, *(more for _, more in added)), top)
        for layer, more in added:
            if more > top:
                right.annotate(
                    f"{more:.1f}", (layer, top), textcoords="offset points", xytext=(0, -3), fontsize=7,
                    ha="center", va="top", rotation=90, color="white",
                )  # fmt: skip
    right.set(xlabel="layer left out (0-based)", ylabel="loss added (nats per token)")
    right.xaxis.set_major_locator(_few())
    for panel in (left, right):
        panel.set_axisbelow(True)
        panel.grid(alpha=0.25)
    return _png(figure)


_FAR = 8
"""Values more than this many times the median are cut off and written down."""


def shown_up_to(values: Sequence[float]) -> float | None:
    """Where an axis ends that shows all values but outliers; None: there are none."""
    if not values:
        return None
    most = _FAR * float(np.median(values))
    near = [value for value in values if value <= most]
    if most <= 0 or len(near) == len(values):
        return None
    return 1.25 * max(near)


def loss_curves(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], levels: Mapping[str, float]
) -> bytes:
    """Held-out loss against tokens seen, one curve per training; other models are horizontal lines.

    Args:
        logs: model name to lines of its training log; only those with ``val_loss`` are drawn.
        levels: model name to held-out loss, drawn as a horizontal line.

    Returns:
        PNG.
    """
    figure, panel = plt.subplots(figsize=(8.4, 3.6), constrained_layout=True)
    for name, lines in logs.items():
        points = [(line["tokens"] / 1e6, line["val_loss"]) for line in lines if "val_loss" in line]
        if name in levels and name == "student" and "pruned" in levels:
            points = [(0.0, levels["pruned"]), *points]
        if points:
            panel.plot(
                *zip(*points, strict=True), marker="o", ms=3, color=COLOURS[name], label=NAMES[name]
            )
    for name in ("teacher", "pruned"):
        if name in levels:
            panel.axhline(levels[name], ls="--", lw=1, color=COLOURS[name], label=NAMES[name])
    panel.set(xlabel="training tokens (millions)", ylabel="held-out loss (nats per token)")
    panel.grid(alpha=0.25)
    panel.legend()
    return _png(figure)


def task_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], measures: Sequence[str]) -> bytes:
    """Measures of tasks against tokens seen, a panel for each, with a curve per training.

    Args:
        logs: model name to lines of its training log.
        measures: names of what was measured, TASK:METRIC; a line may have a standard error beside it.

    Returns:
        PNG.
    """
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 2.9 * rows), constrained_layout=True, squeeze=False
    )
    for panel in panels.flat[len(measures) :]:
        panel.set_visible(False)
    for panel, measure in zip(panels.flat, measures, strict=False):
        for name, lines in logs.items():
            points = [line for line in lines if measure in line]
            if points:
                panel.errorbar(
                    [line["tokens"] / 1e6 for line in points], [line[measure] for line in points],
                    [line.get(f"{measure}_stderr", 0.0) for line in points],
                    marker="o", ms=3, capsize=2, color=COLOURS[name], label=NAMES[name],
                )  # fmt: skip
        task, _, metric = measure.rpartition(":")
        panel.set_xlabel("training tokens (millions)")
        panel.set_ylabel(metric, parse_math=False)
        panel.set_title(task, fontsize=9, parse_math=False)
        panel.grid(alpha=0.25)
    panels.flat[0].legend()
    return _png(figure)


def _few() -> MaxNLocator:
    """Up to six whole numbers along an axis: to draw a number takes longer than to draw what it counts."""
    return MaxNLocator(5, integer=True)


def _png(figure: Any) -> bytes:
    # drawn once; savefig draws all of it twice
    figure.set_dpi(130)
    figure.canvas.draw()
    buffer = io.BytesIO()
    plain = {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 2}}
    plt.imsave(buffer, figure.canvas.buffer_rgba(), format="png", **plain)
    plt.close(figure)
    return buffer.getvalue()
