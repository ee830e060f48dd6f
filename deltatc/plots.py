"""Plots of the metrics: PNG files, the same bytes for the same numbers (no software stamp), so they can live in git."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltatc.config import config_name
from deltatc.files import atomic_path

RATE_LABELS = {
    "tool_call_rate": "starts a tool call",
    "valid_tool_format_rate": "valid call",
    "math_correct_rate": "right value",
}


def plot_exp1(layers: Mapping[str, Mapping[str, Any]], name: str, folder: Path) -> None:
    """Draw dCE (base-only and fused) and cosine against layer."""
    at = [int(layer) for layer in layers]
    for quantity, label in (("dce", "added cross entropy, nats a token"), ("cos", "cosine of recon and MLP output")):
        figure, axes = _figure(f"{name}: {label}", "layer", label)
        for part, legend, style in (("base", "base only", "o--"), ("full", "base + delta", "o-")):
            axes.plot(at, [row[f"{quantity}_{part}"] for row in layers.values()], style, label=legend)
        axes.set_xticks(at)
        if quantity == "cos":
            axes.set_ylim(0, 1.02)
        else:
            axes.axhline(0, color="grey", linewidth=0.8)
        axes.legend()
        _save(figure, folder / f"{quantity}_{name}.png")


def plot_heatmaps(
    summary: Mapping[str, Mapping[str, Any]], d_new: Sequence[int], percentiles: Sequence[float], folder: Path
) -> None:
    """Draw mean_dce_full and mean_cos_full over the grid of d_new and percentile."""
    for quantity, label in (
        ("mean_dce_full", "mean added cross entropy, nats a token"),
        ("mean_cos_full", "mean cosine"),
    ):
        figure, axes = _figure(f"base + delta: {label}", "percentile of the base's L0 (higher: denser)", "d_new")
        values = [[summary[config_name(d, p)][quantity] for p in percentiles] for d in d_new]
        image = axes.imshow(values, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(percentiles)), [f"{p:g}" for p in percentiles])
        axes.set_yticks(range(len(d_new)), [str(d) for d in d_new])
        middle = (min(map(min, values)) + max(map(max, values))) / 2
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                axes.text(j, i, f"{value:.4f}", ha="center", va="center", color="white" if value < middle else "black")
        figure.colorbar(image, ax=axes)
        _save(figure, folder / f"{quantity}.png")


def plot_exp2a(result: Mapping[str, Mapping[str, Mapping[str, Any]]], folder: Path) -> None:
    """Draw dCE(no_delta - raw) and mean acts against layer, and the tool metrics of each subset."""
    import numpy as np

    layers = list(result)
    subsets = list(next(iter(result.values())))
    figure, axes = _figure("the delta switched off: added cross entropy on the target", "layer", "nats a token")
    for subset in subsets:
        cells = [result[layer][subset] for layer in layers]
        if cells[0]["raw"]["target_ce"] is not None:
            axes.plot(layers, [c["no_delta"]["target_ce"] - c["raw"]["target_ce"] for c in cells], "o-", label=subset)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.legend()
    _save(figure, folder / "dce_no_delta.png")
    figure, axes = _figure("activity during generation, base + delta in place", "layer", "sum of |acts| a token")
    for subset in subsets:
        for part, style in (("base", "--"), ("delta", "-")):
            values = [result[layer][subset]["full"][f"acts_{part}"] for layer in layers]
            axes.plot(layers, values, f"o{style}", label=f"{subset}, {part}", color=f"C{subsets.index(subset)}")
    axes.legend(fontsize=7, ncols=2)
    _save(figure, folder / "mean_acts.png")
    for subset in subsets:
        names = [n for n in RATE_LABELS if result[layers[0]][subset]["raw"][n] is not None]
        figure, all_axes = _figures(len(names), f"{subset}: what the model generates (bars: 95 % interval)")
        for axes, name in zip(all_axes, names, strict=True):
            for i, condition in enumerate(("raw", "full", "no_delta")):
                cells = [result[layer][subset][condition] for layer in layers]
                _bars(axes, np.arange(len(layers)) + 0.27 * (i - 1), cells, name, condition)
            axes.set_xticks(range(len(layers)), layers)
            axes.set_xlabel("layer")
            axes.set_title(RATE_LABELS[name], fontsize=10)
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        _save(figure, folder / f"tool_metrics_{subset}.png")


def plot_exp2b(
    result: Mapping[str, Mapping[str, Mapping[str, Any]]], raw: Mapping[str, Mapping[str, Any]], folder: Path
) -> None:
    """Draw CE and the tool metrics against alpha, one file a subset, one line a layer, the raw model dashed."""
    for subset in raw:
        names = ["target_ce", *RATE_LABELS]
        names = [name for name in names if raw[subset][name] is not None]
        figure, all_axes = _figures(len(names), f"{subset}: base + alpha * delta")
        for axes, name in zip(all_axes, names, strict=True):
            for layer in result:
                cells = result[layer][subset]
                axes.plot(
                    [float(a) for a in cells], [cell[name] for cell in cells.values()], "o-", label=f"layer {layer}"
                )
            axes.axhline(raw[subset][name], color="black", linestyle="--", linewidth=0.8, label="raw model")
            axes.set_xlabel("alpha")
            axes.set_title("cross entropy, nats a token" if name == "target_ce" else RATE_LABELS[name], fontsize=10)
            axes.set_yscale("log") if name == "target_ce" else axes.set_ylim(-0.03, 1.03)
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
        _save(figure, folder / f"metrics_vs_alpha_{subset}.png")


def _bars(axes: Any, at: Any, cells: Sequence[Mapping[str, Any]], name: str, label: str) -> None:
    values = [cell[name] for cell in cells]
    low = [max(0.0, cell[name] - cell[f"{name}_ci95"][0]) for cell in cells]
    high = [max(0.0, cell[f"{name}_ci95"][1] - cell[name]) for cell in cells]
    axes.bar(at, values, 0.25, label=label, yerr=[low, high], error_kw={"linewidth": 0.8})
    axes.set_ylim(0, 1.05)


def _figure(title: str, x: str, y: str) -> tuple[Any, Any]:
    figure, (axes,) = _figures(1, title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return figure, axes


def _figures(n: int, title: str) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(5.6, 3.6) if n == 1 else (3.6 * n, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, list(figure.subplots(1, n, squeeze=False)[0])


def _save(figure: Any, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, metadata={"Software": None})
