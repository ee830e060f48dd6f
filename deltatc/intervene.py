"""Interventions during real generation (exp2): the delta on, off, or at a strength alpha, and what the model does."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from deltatc.evaluate import encode_rows, target_ce
from deltatc.files import write_csv, write_jsonl
from deltatc.generate import Generation, generate, judge, rates
from deltatc.hooks import LayerStats, replace_mlp
from deltatc.transcoder import DeltaTranscoder, Transcoder

# {is it the raw model: {condition: alpha}}
CONDITIONS: dict[bool, dict[str, float]] = {True: {"raw": 1.0}, False: {"full": 1.0, "no_delta": 0.0}}


def run_condition(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict],
    transcoders: Mapping[int, Transcoder | DeltaTranscoder],
    alpha: float,
    batch_size: int,
    max_new_tokens: int,
    label: str,
) -> tuple[dict[str, Any], list[Generation]]:
    """Return (metrics, generations) of the rows with base + alpha * delta in the given layers (none: the raw model).

    The metrics are target_ce (nats a token; null where rows have no target), the tool-call rates with their intervals,
    n, and acts_base and acts_delta: sum of |acts| a token, mean over the layers, over the generation's own passes.
    """
    with_target = [row for row in rows if row["target"]]
    with replace_mlp(model, transcoders, alpha=alpha):
        ce = None
        if with_target:
            ce = target_ce(model, encode_rows(tokenizer, with_target), batch_size, tokenizer.pad_token_id)
    with replace_mlp(model, transcoders, alpha=alpha, collect_stats=True) as stats:
        generations = generate(model, tokenizer, rows, batch_size, max_new_tokens, label)
    return {"target_ce": ce} | rates(rows, generations) | _mean_acts(stats), generations


def _mean_acts(stats: Mapping[int, LayerStats]) -> dict[str, float | None]:
    if not stats:
        return {"acts_base": None, "acts_delta": None}
    mean = len(stats)
    return {
        "acts_base": sum(s.l1_base / max(s.n_tokens, 1) for s in stats.values()) / mean,
        "acts_delta": sum(s.l1_delta / max(s.n_tokens, 1) for s in stats.values()) / mean,
    }


def alpha_name(alpha: float) -> str:
    """Write alpha as metrics and file names do: 0.25, 0, 1."""
    return f"{alpha:g}"


def save_generations(path: Path, condition: str, rows: Sequence[dict], generations: Sequence[Generation]) -> None:
    """Write one JSONL line a generation, with the verdict of each rate."""
    write_jsonl(
        path,
        (
            {"condition": condition, **row, "generation": generation.text, "ended": generation.ended}
            | {name.removesuffix("_rate"): verdict for name, verdict in judge(row, generation).items()}
            for row, generation in zip(rows, generations, strict=True)
        ),
    )


def cell_rows(result: Mapping[str, Mapping[str, Mapping[str, Any]]], d_new: int, percentile: float) -> Iterator[dict]:
    """Yield {layer, subset, condition, d_new, percentile, metrics...}, one dict a cell, intervals as two columns."""
    for layer, subsets in result.items():
        for subset, cells in subsets.items():
            for condition, cell in cells.items():
                row = {
                    "layer": layer,
                    "subset": subset,
                    "condition": condition,
                    "d_new": d_new,
                    "percentile": percentile,
                }
                for name, value in cell.items():
                    if name.endswith("_ci95"):
                        low, high = value or (None, None)
                        row |= {name.replace("ci95", "low95"): low, name.replace("ci95", "high95"): high}
                    else:
                        row[name] = value
                yield row


def write_cells(path: Path, rows: Iterator[dict]) -> None:
    """Write cell_rows as CSV."""
    listed = list(rows)
    write_csv(path, listed, list(listed[0]))
