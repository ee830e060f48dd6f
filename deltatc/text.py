"""Token batches: BOS once, masks of the target by character offsets, right padding to train, left to generate."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """One sequence of token ids."""

    ids: list[int]
    """BOS, then the text, then EOS if it was asked for."""
    n_prompt: int
    """Tokens before the first target token (all of them when there is no target)."""


class Batch(NamedTuple):
    """Padded sequences, each [batch, pos]."""

    input_ids: Tensor
    attention_mask: Tensor
    target_mask: Tensor
    """True where the token belongs to the target or is its EOS; padding and prompt are False."""

    def to(self, device: str | torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))


def full_text(row: dict) -> str:
    """Return `input + newline + target`, the text that a row stands for (the input alone without a target)."""
    return f"{row['input']}\n{row['target']}" if row["target"] else row["input"]


def encode_text(tokenizer: Any, text: str, max_tokens: int | None = None) -> Encoded:
    """Encode BOS + text, without EOS, cut to `max_tokens`."""
    ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    ids = ids[:max_tokens]
    return Encoded(ids, len(ids))


def encode_row(tokenizer: Any, row: dict, max_tokens: int | None = None) -> Encoded | None:
    """Encode BOS + input + newline + target + EOS; None when it is longer than `max_tokens`.

    A token that straddles the boundary counts as target: some of what it predicts is target text.
    """
    text = full_text(row)
    start = len(row["input"]) + 1
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    n_prompt = 1 + sum(end <= start for _, end in encoding["offset_mapping"])
    ids = [tokenizer.bos_token_id, *encoding["input_ids"], tokenizer.eos_token_id]
    return None if max_tokens is not None and len(ids) > max_tokens else Encoded(ids, n_prompt)


def encode_prompt(tokenizer: Any, row: dict) -> Encoded:
    """Encode BOS + input + newline, from which the target is generated."""
    return encode_text(tokenizer, row["input"] + "\n")


def pad(sequences: Sequence[Encoded], pad_id: int, side: str) -> Batch:
    """Pad sequences on the given side ("left" or "right") to the longest."""
    length = max(len(sequence.ids) for sequence in sequences)
    shape = (len(sequences), length)
    input_ids = torch.full(shape, pad_id)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    target_mask = torch.zeros(shape, dtype=torch.bool)
    for i, (ids, n_prompt) in enumerate(sequences):
        start = length - len(ids) if side == "left" else 0
        stop = start + len(ids)
        input_ids[i, start:stop] = torch.tensor(ids)
        attention_mask[i, start:stop] = 1
        target_mask[i, start + n_prompt : stop] = True
    return Batch(input_ids, attention_mask, target_mask)


def batches(
    sequences: Sequence[Encoded], batch_size: int, pad_id: int, side: str = "right"
) -> Iterator[tuple[list[int], Batch]]:
    """Yield (indices into `sequences`, batch), similar lengths together so that little is padding."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen, pad([sequences[i] for i in chosen], pad_id, side)
