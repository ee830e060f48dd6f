"""Greedy generation with the KV cache, and the tool-call rates of what was generated.

What counts as a call is toolcall.py's business; which MLPs run during generation is hooks.py's.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from deltatc import toolcall
from deltatc.text import batches, encode_prompt

RATES = ("tool_call_rate", "valid_tool_format_rate", "math_correct_rate", "exact_match_rate")


class Generation(NamedTuple):
    """What the model wrote after one prompt."""

    text: str
    """Without EOS."""
    ended: bool
    """Whether EOS came within the limit."""


def generate(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict],
    batch_size: int,
    max_new_tokens: int,
    label: str = "generate",
) -> list[Generation]:
    """Return one greedy Generation a row, in the rows' order; prompts are left-padded and the KV cache is used."""
    prompts = [encode_prompt(tokenizer, row) for row in rows]
    device = next(model.parameters()).device
    found: list[Generation | None] = [None] * len(rows)
    steps = list(batches(prompts, batch_size, tokenizer.pad_token_id, side="left"))
    with torch.inference_mode():
        for indices, batch in tqdm(steps, desc=label, unit="batch", disable=None, leave=False):
            output = model.generate(
                input_ids=batch.input_ids.to(device),
                attention_mask=batch.attention_mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            for index, ids in zip(indices, output[:, batch.input_ids.shape[1] :].tolist(), strict=True):
                ended = tokenizer.eos_token_id in ids
                kept = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
                found[index] = Generation(tokenizer.decode(kept, skip_special_tokens=False), ended)
    return [generation for generation in found if generation is not None]


def judge(row: dict, generation: Generation) -> dict[str, bool | None]:
    """Say of one generation what each rate counts; math_correct_rate is None where the row has no expression."""
    text, ended = generation
    return {
        "tool_call_rate": toolcall.starts_call(text),
        "valid_tool_format_rate": toolcall.is_valid(text, ended),
        "math_correct_rate": None if row["expr"] is None else toolcall.is_correct(text, ended, row["expr"]),
        "exact_match_rate": ended and text == row["target"],
    }


def rates(rows: Sequence[dict], generations: Sequence[Generation]) -> dict[str, Any]:
    """Return each rate with its Wilson 95 % interval, and n; math_correct_rate is null without expressions."""
    verdicts = [judge(row, generation) for row, generation in zip(rows, generations, strict=True)]
    result: dict[str, Any] = {}
    for name in RATES:
        counted = [hit for verdict in verdicts if (hit := verdict[name]) is not None]
        result[name] = sum(counted) / len(counted) if counted else None
        result[f"{name}_ci95"] = wilson(sum(counted), len(counted)) if counted else None
    return result | {"n": len(generations)}


def wilson(successes: int, n: int) -> list[float]:
    """Return the Wilson score interval [low, high] at 95 % (Wilson 1927)."""
    z = 1.959963984540054
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]
