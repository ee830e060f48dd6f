"""Metrics into summaries, headline numbers and the Markdown report; draws nothing and runs no model."""

from collections.abc import Mapping
from typing import Any


def exp1_row(ce_raw: float, base: dict[str, float], full: dict[str, float], l0_folder: int) -> dict[str, Any]:
    """Return one layer's metrics of base-only and fused; gap_closed = (dce_base - dce_full) / dce_base or null."""
    dce_base, dce_full = base["ce"] - ce_raw, full["ce"] - ce_raw
    row = {
        "l0_folder": l0_folder,
        "ce_raw": ce_raw,
        "ce_base": base["ce"],
        "ce_full": full["ce"],
        "dce_base": dce_base,
        "dce_full": dce_full,
        "gap_closed": (dce_base - dce_full) / dce_base if dce_base > 0 else None,
    }
    for name in ("kl", "cos", "rel_l2_error", "fvu"):
        row |= {f"{name}_base": base[name], f"{name}_full": full[name]}
    return row | {"l0_base": full["l0_base"], "l0_delta": full["l0_delta"]}


def summarize(layers: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a configuration's means and maxima over its layers."""
    rows = list(layers.values())

    def mean(name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    gaps = [row["gap_closed"] for row in rows if row["gap_closed"] is not None]
    return {
        "mean_dce_base": mean("dce_base"),
        "mean_dce_full": mean("dce_full"),
        "max_dce_full": max(row["dce_full"] for row in rows),
        "mean_cos_base": mean("cos_base"),
        "mean_cos_full": mean("cos_full"),
        "mean_rel_l2_error_base": mean("rel_l2_error_base"),
        "mean_rel_l2_error_full": mean("rel_l2_error_full"),
        "gap_closed_min": min(gaps) if gaps else None,
        "gap_closed_mean": sum(gaps) / len(gaps) if gaps else None,
    }


def headline(
    finetune: Mapping[str, Any],
    site_check: Mapping[str, Any],
    exp1: Mapping[str, Any],
    quarter: Mapping[str, Any] | None,
    exp2a: Mapping[str, Any],
    energy: Mapping[str, Any],
) -> dict[str, float | None]:
    """Return the few numbers that `dvc metrics` shows: the finetune, the bases, the studied deltas, the interventions.

    `exp1` and `quarter` are {layer: exp1_row} of the studied configuration at its usual and its other delta L0.
    """
    tool, copy = finetune.get("tool", {}), finetune.get("copy", {})
    fvus = [[choices[l0]["fvu"] for l0 in sorted(choices, key=int)] for choices in site_check.values()]
    means = summarize(exp1)
    joint = exp2a.get("all", {})
    shares = [e["finetune"] / e["target"] for by_l0 in energy.values() for e in by_l0.values()]

    def rate(subset: str, condition: str, name: str) -> float | None:
        return joint.get(subset, {}).get(condition, {}).get(name)

    numbers = {
        "tool_call_rate": tool.get("tool_call_rate"),
        "valid_tool_format_rate": tool.get("valid_tool_format_rate"),
        "math_correct_rate": tool.get("math_correct_rate"),
        "copy_tool_call_rate": copy.get("tool_call_rate"),
        "tool_ood_math_correct_rate": finetune.get("tool_ood", {}).get("math_correct_rate"),
        "copy_ood_tool_call_rate": finetune.get("copy_ood", {}).get("tool_call_rate"),
        "base_fvu_sparsest_max": max(fvu[0] for fvu in fvus),
        "base_fvu_densest_max": max(fvu[-1] for fvu in fvus),
        "mean_dce_base": means["mean_dce_base"],
        "mean_dce_full": means["mean_dce_full"],
        "max_dce_full": means["max_dce_full"],
        "gap_closed_min": means["gap_closed_min"],
        "gap_closed_mean": means["gap_closed_mean"],
        "gap_closed_min_at_other_l0": None if quarter is None else summarize(quarter)["gap_closed_min"],
        "mean_cos_base": means["mean_cos_base"],
        "mean_cos_full": means["mean_cos_full"],
        "max_l0_delta": max(row["l0_delta"] for row in exp1.values()),
        "finetune_share_of_target_energy": sum(shares) / len(shares) if shares else None,
        "all_layers_full_valid_rate": rate("tool", "full", "valid_tool_format_rate"),
        "all_layers_full_math_correct_rate": rate("tool", "full", "math_correct_rate"),
        "all_layers_full_copy_tool_call_rate": rate("copy", "full", "tool_call_rate"),
        "all_layers_no_delta_valid_rate": rate("tool", "no_delta", "valid_tool_format_rate"),
        "all_layers_no_delta_math_correct_rate": rate("tool", "no_delta", "math_correct_rate"),
    }
    return {name: value for name, value in numbers.items() if value is not None}


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Return a Markdown table; numbers get three significant decimals, None a dash."""
    cells = [[_cell(value) for value in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:.1e}"
    if isinstance(value, list):
        return f"{value[0]:.2f}-{value[1]:.2f}"
    return str(value)


def markdown(metrics: Mapping[str, Any], exp1: Mapping[str, Any], config: str, numbers: Mapping[str, Any]) -> str:
    """Return the report: every table with what it means, and the plots by relative path."""
    finetune, exp2a, exp2b = metrics["finetune"], metrics["exp2a"], metrics["exp2b"]
    rates = ("tool_call_rate", "valid_tool_format_rate", "math_correct_rate", "exact_match_rate")
    sections = [
        "# What changed inside the finetuned model?",
        f"Studied configuration: `{config}`. Cross entropies are nats a token over the target and EOS; intervals are "
        "Wilson 95 %; rates come from greedy generation.",
        "## Headline",
        table(["number", "value"], [[f"`{name}`", value] for name, value in numbers.items()]),
        "## The finetuned model",
        table(
            ["subset", "n", *[part for name in rates for part in (name, "95 %")]],
            [
                [subset, cell["n"], *[part for name in rates for part in (cell[name], cell[f"{name}_ci95"])]]
                for subset, cell in finetune.items()
            ],
        ),
        "## Site check: FVU of the base transcoders on the base model",
        "The declared site has to have the lowest FVU; a transcoder fed from another tensor still runs.",
        _site_table(metrics["site_check"]),
        f"## exp1: one layer replaced, `{config}`",
        table(
            ["layer", "base L0", "dCE base", "dCE base + delta", "gap closed", "cos base", "cos full", "FVU base",
             "FVU full", "delta L0"],
            [
                [layer, row["l0_folder"], row["dce_base"], row["dce_full"], row["gap_closed"], row["cos_base"],
                 row["cos_full"], row["fvu_base"], row["fvu_full"], row["l0_delta"]]
                for layer, row in exp1.items()
            ],
        ),
        f"![dCE against layer](../plots/exp1/dce_{config}.png) ![cosine against layer](../plots/exp1/cos_{config}.png)",
        "## exp1: all configurations, means over layers",
        table(
            ["configuration", "dCE base", "dCE full", "max dCE full", "cos full", "gap closed, min", "mean"],
            [
                [name, row["mean_dce_base"], row["mean_dce_full"], row["max_dce_full"], row["mean_cos_full"],
                 row["gap_closed_min"], row["gap_closed_mean"]]
                for name, row in metrics["exp1_summary"].items()
            ],
        ),
        "![dCE heatmap](../plots/exp1_summary/mean_dce_full.png) "
        "![cosine heatmap](../plots/exp1_summary/mean_cos_full.png)",
        "## What the delta's target holds",
        "Mean squared norm a token of what the finetune changed (MLP_ft - MLP_base), of what the base transcoder "
        "misses anyway (MLP_base - base), and of the target, which is both.",
        _energy_table(metrics["delta"]["energy"]),
        "## exp2a: the delta in place (full) and switched off (no_delta)",
        _cells_table(exp2a, ("target_ce", *rates[:3], "acts_base", "acts_delta")),
        "![no_delta dCE](../plots/exp2a/dce_no_delta.png) ![mean acts](../plots/exp2a/mean_acts.png)",
        *[f"![tool metrics, {s}](../plots/exp2a/tool_metrics_{s}.png)" for s in next(iter(exp2a.values()))],
        "## exp2b: base + alpha * delta",
        _cells_table(exp2b, ("target_ce", *rates[:3])),
        *[f"![metrics by alpha, {s}](../plots/exp2b/metrics_vs_alpha_{s}.png)" for s in next(iter(exp2b.values()))],
        "## Data",
        table(
            ["split", "subset", "rows"],
            [[split, subset, n] for split, rows in metrics["prompts"]["rows"].items() for subset, n in rows.items()],
        ),
    ]  # fmt: skip
    return "\n\n".join(sections) + "\n"


def _site_table(site_check: Mapping[str, Any]) -> str:
    first = next(iter(next(iter(site_check.values())).values()))
    names = list(first["sites"])
    rows = [
        [layer, l0, found["l0"], *[found["sites"][name]["fvu"] for name in names]]
        for layer, choices in site_check.items()
        for l0, found in choices.items()
    ]
    return table(["layer", "average_l0", "L0 measured", *names], rows)


def _energy_table(energy: Mapping[str, Any]) -> str:
    rows = [
        [layer, l0, e["finetune"], e["base_error"], e["target"]] for layer, by in energy.items() for l0, e in by.items()
    ]
    return (
        table(["layer", "base L0", "finetune", "base error", "target"], rows)
        if rows
        else "(ready deltas: not measured)"
    )


def _cells_table(result: Mapping[str, Any], names: tuple[str, ...]) -> str:
    rows = [
        [layer, subset, condition, *[cell[name] for name in names], cell["n"]]
        for layer, subsets in result.items()
        for subset, cells in subsets.items()
        for condition, cell in cells.items()
    ]
    return table(["layer", "subset", "condition", *names, "n"], rows)
