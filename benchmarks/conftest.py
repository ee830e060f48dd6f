"""Interleaved timing, and the table: `make bench` writes results/cpu.json, ratios of times measured in the same run."""

import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import deltatc

RESULTS = Path(__file__).parent / "results"
CELLS: list[dict] = []


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the shapes that take minutes, and torch.compile")


@pytest.fixture
def cells():
    """The rows of results/cpu.json."""
    return CELLS


@pytest.fixture
def race(benchmark):
    """Time contenders {name: function} in turns, so that a busy machine slows all of them; return {name: seconds}.

    The medians' ratios to `deltatc` go to the table under the cell's name; a ratio above 1 means that ours is faster.
    """

    def run(
        cell: dict, contenders: dict[str, Callable[[], object]], rounds: int, roofline: float | None = None
    ) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in contenders}

        def turn():
            for name, contender in contenders.items():
                start = time.perf_counter()
                contender()
                times[name].append(time.perf_counter() - start)

        benchmark.pedantic(turn, rounds=1 if benchmark.disabled else rounds, warmup_rounds=1)
        medians = {name: statistics.median(found[1:] or found) for name, found in times.items()}
        ours = medians["deltatc"]
        others = medians if roofline is None else medians | {"roofline": roofline}
        ratios = {name: round(seconds / ours, 3) for name, seconds in others.items() if name != "deltatc"}
        benchmark.extra_info.update(cell | ratios)
        if not benchmark.disabled:
            CELLS.append(cell | {"over_deltatc": ratios})
        return medians

    return run


def pytest_sessionfinish(session, exitstatus):
    """Write the table of a whole run; a run of chosen cells (-k) leaves the committed one alone."""
    if not CELLS or exitstatus or session.config.option.keyword:
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {
        "device": _cpu_name(), "threads": torch.get_num_threads(), "kernels": deltatc.build_info()["cpu"],
        "torch": torch.__version__, "date": datetime.date.today().isoformat(), "commit": commit,
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cpu.json").write_text(json.dumps(about | {"cells": CELLS}, indent=1) + "\n")
    plot(CELLS, RESULTS / "cpu.png")


def plot(cells: list[dict], path: Path) -> None:
    """Draw time against tokens, over the roofline of the same work in the weights' dtype; Zipf-like latents."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    wide = [(shape, dtype) for shape in ("16k", "65k") for dtype in ("float32", "bfloat16")]
    figure, axes = plt.subplots(1, len(wide), figsize=(4 * len(wide), 3.8), sharey=True, layout="constrained")
    names = {
        "sae_lens": "SAELens",
        "eager_dense": "two dense products",
        "sparsify": "sparsify",
        "eager_sparse": "topk + embedding_bag",
        "deltatc": "deltatc",
    }
    for axis, (shape, dtype) in zip(axes, wide, strict=True):
        chosen = [c for c in cells if (c.get("d_sae"), c.get("dtype"), c.get("inputs")) == (shape, dtype, "zipf")]
        found = {cell["tokens"]: cell["over_deltatc"] for cell in chosen}
        tokens = sorted(found)
        for name, label in names.items():
            times = [
                found[n].get(name, 1.0 if name == "deltatc" else float("nan")) / found[n]["roofline"] for n in tokens
            ]
            axis.plot(tokens, times, marker="o", label=label, linewidth=2.5 if name == "deltatc" else 1.2)
        axis.axhline(1.0, color="grey", linestyle="--", label="roofline")
        axis.set(title=f"{shape} latents, {dtype}", xlabel="tokens", xscale="log", yscale="log")
        axis.set_xticks(tokens, [str(n) for n in tokens])
        axis.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        axis.minorticks_off()
    axes[0].set_ylabel("time / roofline")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
