"""What a single prompt does: the answers of several conditions side by side, and the latents active at its end."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltatc.calculator import evaluate
from deltatc.errors import CalcError
from deltatc.evaluate import encode_rows, target_ce
from deltatc.generate import Generation, generate
from deltatc.harvest import transcoder_input
from deltatc.hooks import capture_mlp, replace_mlp
from deltatc.text import encode_prompt, pad
from deltatc.toolcall import parse
from deltatc.transcoder import DeltaTranscoder, Transcoder


class Answer(NamedTuple):
    """What one condition makes of a prompt."""

    condition: str
    generation: Generation
    call: str | None
    """The expression of a valid tool call, or None."""
    value: str | None
    """Its exact value, or why it has none; None without a call."""
    top_tokens: list[tuple[str, float]]
    """The ten most likely first tokens and their probabilities."""
    ce: float
    """Cross entropy of the raw model's own answer under this condition, nats a token."""
    delta_ce: float
    """ce minus the raw model's."""


class LayerReport(NamedTuple):
    """One layer's latents at the last token of a prompt."""

    layer: int
    l0_base: int
    l1_base: float
    l0_delta: int
    l1_delta: float
    top_base: list[tuple[int, float]]
    """(latent, act), strongest first."""
    top_delta: list[tuple[int, float]]


def side_by_side(
    unfinetuned: nn.Module, model: nn.Module, tokenizer: Any, prompt: str,
    transcoders: Mapping[int, Transcoder | DeltaTranscoder], max_new_tokens: int,
) -> list[Answer]:  # fmt: skip
    """Answer a prompt four ways: unfinetuned, raw (the finetuned model), base-only and fused in the given layers."""
    row = {"input": prompt, "target": "", "expr": None}
    (reference,) = generate(model, tokenizer, [row], 1, max_new_tokens)
    row["target"] = reference.text
    ways: tuple[tuple[str, nn.Module, Mapping[int, Transcoder | DeltaTranscoder], float], ...] = (
        ("unfinetuned", unfinetuned, {}, 1.0),
        ("raw", model, {}, 1.0),
        ("base-only", model, transcoders, 0.0),
        ("fused", model, transcoders, 1.0),
    )
    answers: list[Answer] = []
    ce_raw = target_ce(model, encode_rows(tokenizer, [row]), 1, tokenizer.pad_token_id)
    for name, net, replaced, alpha in ways:
        with replace_mlp(net, replaced, alpha=alpha):
            (found,) = generate(net, tokenizer, [row], 1, max_new_tokens)
            ce = target_ce(net, encode_rows(tokenizer, [row]), 1, tokenizer.pad_token_id)
            top = _top_tokens(net, tokenizer, row)
        call = parse(found.text)
        expr = call.expr if call is not None and found.ended else None
        answers.append(Answer(name, found, expr, None if expr is None else _value(expr), top, ce, ce - ce_raw))
    return answers


def last_token_latents(
    model: nn.Module, tokenizer: Any, prompt: str, transcoders: Mapping[int, DeltaTranscoder], n_top: int = 5
) -> list[LayerReport]:
    """Return each layer's L0, L1 and strongest latents at the prompt's last token (no replacement)."""
    batch = pad([encode_prompt(tokenizer, {"input": prompt})], tokenizer.pad_token_id, "right")
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode():
        with capture_mlp(model, sorted(transcoders)) as captured:
            model(input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), use_cache=False)
        for layer, delta in sorted(transcoders.items()):
            x = transcoder_input(model, layer, delta.site, captured.resid_mid[layer][0, -1:])
            base, new = delta.base.encode(x)[0], delta.encode_delta(x)[0]
            found.append(LayerReport(layer, _l0(base), base.sum().item(), _l0(new), new.sum().item(),
                                     _strongest(base, n_top), _strongest(new, n_top)))  # fmt: skip
    return found


def _l0(acts: Tensor) -> int:
    return int((acts > 0).sum())


def _strongest(acts: Tensor, n: int) -> list[tuple[int, float]]:
    top = acts.topk(min(n, acts.shape[0]))
    return [(index, value) for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True) if value > 0]


def _top_tokens(model: nn.Module, tokenizer: Any, row: dict) -> list[tuple[str, float]]:
    batch = pad([encode_prompt(tokenizer, row)], tokenizer.pad_token_id, "right")
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), use_cache=False
        ).logits[0, -1]
    top = logits.float().softmax(-1).topk(10)
    return [(tokenizer.decode([i]), p) for i, p in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def _value(expr: str) -> str:
    try:
        return str(evaluate(expr))
    except CalcError as error:
        return f"no value: {error}"
