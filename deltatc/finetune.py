"""LoRA finetuning on `input + newline + target + EOS` and merging into an ordinary model.

The loss is on target and EOS for every row, tool call or copy, so that both learn to stop. The best checkpoint is
chosen by generation, never by teacher-forced argmax.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deltatc.config import Finetune
from deltatc.errors import DataError
from deltatc.generate import generate, rates
from deltatc.models import decoder_layers
from deltatc.text import Encoded, encode_row, pad

log = logging.getLogger(__name__)

MLP = ("gate_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS = {"mlp": MLP, "attention": ATTENTION, "all": ATTENTION + MLP}


class Validation(NamedTuple):
    """One validation by generation; a later field only decides between equals in the earlier ones."""

    math_correct: float
    f1: float
    """Of `starts with <tool_call>` against the row being a tool row."""
    step: int
    loss: float
    """Mean training loss since the last validation, nats a token."""


def finetune(
    model: nn.Module, tokenizer: Any, train: Sequence[dict], validation: Sequence[dict], settings: Finetune,
    batch_size: int, seed: int,
) -> tuple[nn.Module, list[Validation]]:  # fmt: skip
    """Train a LoRA adapter on `model`, keep the best validated checkpoint and return the merged model."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    if not set(TARGETS[settings.target_modules]) & set(MLP):
        log.warning(
            "finetune.target_modules = %s trains no MLP projection: every MLP stays as it was, and a delta of the MLP "
            "can only learn the base transcoder's error; use mlp or all", settings.target_modules,
        )  # fmt: skip
    torch.manual_seed(seed)
    adapter = LoraConfig(
        r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.dropout, bias="none",
        target_modules=list(TARGETS[settings.target_modules]), task_type="CAUSAL_LM",
    )  # fmt: skip
    peft_model = get_peft_model(model, adapter)
    if settings.gradient_checkpointing:
        peft_model.enable_input_require_grads()
        peft_model.gradient_checkpointing_enable()
    sequences = _encode_all(tokenizer, train, settings.max_tokens)
    trainable = [p for p in peft_model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trainable, lr=settings.lr, betas=(0.9, 0.98), weight_decay=settings.weight_decay)
    n_steps = max(1, int(settings.n_epochs * len(sequences) / (settings.batch_rows * settings.accumulate)))
    check_at = {math.ceil(n_steps * (i + 1) / settings.checkpoints) for i in range(settings.checkpoints)}
    groups = _row_groups(sequences, settings.batch_rows, seed)
    best: Validation | None = None
    best_state: dict[str, Tensor] = {}
    history: list[Validation] = []
    losses: list[float] = []
    for step in tqdm(range(1, n_steps + 1), desc="finetune", unit="step", disable=None):
        for group in adam.param_groups:
            group["lr"] = settings.lr * schedule(step, n_steps, settings.warmup_fraction)
        peft_model.train()
        for _ in range(settings.accumulate):
            loss = _loss(peft_model, pad([sequences[i] for i in next(groups)], tokenizer.pad_token_id, "right"))
            (loss / settings.accumulate).backward()
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise DataError(f"the finetune's loss is {losses[-1]} at step {step}; lower finetune.lr")
        torch.nn.utils.clip_grad_norm_(trainable, settings.clip_norm)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step in check_at:
            found = _validate(peft_model.eval(), tokenizer, validation, settings, batch_size, step, losses)
            history.append(found)
            losses.clear()
            if best is None or found[:2] >= best[:2]:
                best = found
                best_state = {k: v.detach().cpu().clone() for k, v in get_peft_model_state_dict(peft_model).items()}
    set_peft_model_state_dict(peft_model, best_state)
    return peft_model.merge_and_unload().eval(), history


def schedule(step: int, n_steps: int, warmup_fraction: float) -> float:
    """Return the share of the learning rate at a step from 1 on: linear warm-up, then linear to zero."""
    n_warmup = max(1, int(n_steps * warmup_fraction))
    if step <= n_warmup:
        return step / n_warmup
    return (n_steps - step + 1) / max(1, n_steps - n_warmup)


def _encode_all(tokenizer: Any, rows: Sequence[dict], max_tokens: int) -> list[Encoded]:
    encoded = [encode_row(tokenizer, row, max_tokens) for row in rows]
    kept = [sequence for sequence in encoded if sequence is not None]
    if len(kept) < len(rows):
        log.warning("%d of %d rows are longer than max_tokens = %d and were left out",
                    len(rows) - len(kept), len(rows), max_tokens)  # fmt: skip
    if not kept:
        raise DataError(f"no row is short enough for finetune.max_tokens = {max_tokens}; raise it")
    return kept


def _row_groups(sequences: Sequence[Encoded], batch_rows: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of row indices for ever: shuffled, then of similar length within a window of 16 batches."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(sequences), generator=draw).tolist()
        window = 16 * batch_rows
        found = []
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=lambda i: len(sequences[i].ids))
            found += [part[i : i + batch_rows] for i in range(0, len(part), batch_rows)]
        for index in torch.randperm(len(found), generator=draw).tolist():
            yield found[index]


def _loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross entropy of target and EOS tokens, in float32."""
    batch = batch.to(next(model.parameters()).device)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    predicts = batch.target_mask[:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1][predicts].float(), batch.input_ids[:, 1:][predicts])


def _validate(
    model: nn.Module, tokenizer: Any, rows: Sequence[dict], settings: Finetune, batch_size: int, step: int,
    losses: list[float],
) -> Validation:  # fmt: skip
    tool = [row for row in rows if row["expr"] is not None][: settings.n_validation]
    copy = [row for row in rows if row["expr"] is None][: settings.n_validation]
    found = {
        name: rates(part, generate(model, tokenizer, part, batch_size, settings.max_new_tokens, f"validate {name}"))
        for name, part in (("tool", tool), ("copy", copy))
        if part
    }
    hits = found["tool"]["tool_call_rate"] * len(tool) if tool else 0.0
    false_alarms = found["copy"]["tool_call_rate"] * len(copy) if copy else 0.0
    f1 = 2 * hits / (hits + false_alarms + len(tool)) if tool else 0.0
    math_correct = found["tool"]["math_correct_rate"] if tool else 0.0
    return Validation(math_correct, f1, step, sum(losses) / len(losses))


def mlp_change(model: nn.Module, base_model: nn.Module) -> list[float]:
    """Return each layer's |W_ft - W_base| / |W_base| over its MLP projections: 0 where the finetune left it alone."""
    changes = []
    for ft, base in zip(decoder_layers(model), decoder_layers(base_model), strict=True):
        pairs = [(getattr(ft.mlp, name).weight, getattr(base.mlp, name).weight) for name in MLP]
        moved = sum((a.detach().float() - b.detach().float()).pow(2).sum().item() for a, b in pairs)
        size = sum(b.detach().float().pow(2).sum().item() for _, b in pairs)
        changes.append(math.sqrt(moved / size))
    return changes
