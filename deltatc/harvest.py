"""Harvesting: run a model over text and keep each layer's MLP input and output at real positions.

Memory: tokens * d_model * 2 (3 with a base model) * bytes of the model's dtype, for each layer; so callers bound the
tokens of one harvest (delta.n_chunks) and nothing ever holds the activations of a whole corpus.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deltatc.hooks import capture_mlp
from deltatc.models import decoder_layers, unwrap
from deltatc.sites import site
from deltatc.text import Encoded, batches


class Activations(NamedTuple):
    """One layer's activations on the CPU, in the model's dtype, [tokens, d_model] each."""

    resid_mid: Tensor
    """The residual stream before the MLP."""
    mlp_out: Tensor
    """What the MLP added to the residual."""
    mlp_out_of_base: Tensor | None
    """What the base model's MLP would have added at the same residual (None without a base model)."""


def harvest(
    model: nn.Module,
    sequences: Sequence[Encoded],
    layers: Sequence[int],
    batch_size: int,
    pad_id: int,
    base_model: nn.Module | None = None,
    label: str = "harvest",
) -> dict[int, Activations]:
    """Return {layer: Activations} of all non-BOS, non-padding positions of the sequences, in one pass."""
    device = next(model.parameters()).device
    width, dtype = unwrap(model).config.hidden_size, next(model.parameters()).dtype
    n_tokens = sum(len(sequence.ids) - 1 for sequence in sequences)  # all but BOS
    n_kinds = 2 if base_model is None else 3
    kept = {layer: [torch.empty(n_tokens, width, dtype=dtype) for _ in range(n_kinds)] for layer in layers}
    base_layers = None if base_model is None else decoder_layers(base_model)
    done = 0
    with torch.inference_mode(), capture_mlp(model, layers) as captured:
        steps = list(batches(sequences, batch_size, pad_id))
        for _, batch in tqdm(steps, desc=label, unit="batch", disable=None, leave=False):
            batch = batch.to(device)
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
            at = captured.positions.replaced
            assert at is not None  # input_ids were given
            n = int(at.sum())
            for layer in layers:
                h = captured.resid_mid[layer][at]
                found = [h, captured.mlp_out[layer][at]]
                if base_layers is not None:
                    found.append(_mlp_of(base_layers[layer], h))
                for into, tensor in zip(kept[layer], found, strict=True):
                    into[done : done + n] = tensor.cpu()
            done += n
    # Special tokens inside a text would be left out by the model call, so fewer may have come than were reserved.
    return {
        layer: Activations(kinds[0][:done], kinds[1][:done], kinds[2][:done] if n_kinds == 3 else None)
        for layer, kinds in kept.items()
    }


def transcoder_input(model: nn.Module, layer: int, site_name: str, resid_mid: Tensor) -> Tensor:
    """Return x [tokens, d_model] float32, what a transcoder of that site reads at these residuals."""
    norm = decoder_layers(model)[layer].pre_feedforward_layernorm
    eps = unwrap(model).config.rms_norm_eps
    return site(site_name).read(resid_mid.to(norm.weight.device), norm.weight.detach(), eps).float()


def take_tokens(sequences: Sequence[Encoded], n_tokens: int, seed: int) -> list[Encoded]:
    """Return shuffled sequences that hold about `n_tokens` tokens without their BOS (all, where there are fewer)."""
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed)).tolist()
    taken, total = [], 0
    for index in order:
        if total >= n_tokens:
            break
        taken.append(sequences[index])
        total += len(sequences[index].ids) - 1
    return taken


def _mlp_of(layer: Any, resid_mid: Tensor) -> Tensor:
    return layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(resid_mid)))
