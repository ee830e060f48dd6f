"""What torch.ops.deltatc computes, in plain torch: the definition that compiled kernels are tested against.

It holds dense acts, tokens x d_sae, and checks nothing: ops.py is what other modules call.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """W_enc [d_model, d_sae], b_enc [d_sae], threshold [d_sae], W_dec [d_sae, d_model], b_dec [d_model]."""

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    W_dec: Tensor
    b_dec: Tensor


class TranscodeStats(NamedTuple):
    """recon [..., d_model]; l0 (number) and l1 (sum) of acts a token, base and delta apart: [...] float32."""

    recon: Tensor
    l0_base: Tensor
    l1_base: Tensor
    l0_delta: Tensor
    l1_delta: Tensor


def encode_dense(x: Tensor, weights: Weights, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return acts, pre_acts, and where a threshold matters: not behind the k-th largest active latent."""
    pre = x @ weights.W_enc + weights.b_enc
    active = pre > weights.threshold.clamp(min=0)
    acts = torch.where(active, pre, 0.0)
    counted = torch.ones_like(active)
    if k is not None and k < acts.shape[-1]:
        order = acts.detach().sort(dim=-1, descending=True, stable=True)  # stable: ties go to the lower index
        kept = torch.zeros_like(active).scatter(-1, order.indices[..., :k], True)
        acts = torch.where(kept, acts, 0.0)
        counted = torch.where(active, kept, pre > order.values[..., k - 1 : k])
    finite = x.isfinite().all(-1, keepdim=True) & pre.isfinite().all(-1, keepdim=True)
    return acts.masked_fill(~finite, math.nan), pre, counted


def decode_dense(acts: Tensor, weights: Weights) -> Tensor:
    """Return recon [..., d_model] of dense acts [..., d_sae]."""
    return acts @ weights.W_dec + weights.b_dec


def threshold_slope(pre: Tensor, theta: Tensor, counted: Tensor, bandwidth: float) -> Tensor:
    """Return d acts / d theta, straight through: -theta / bandwidth where pre is within half a bandwidth.

    The step's derivative is replaced by a rectangle of width `bandwidth` (arXiv 2407.14435, equation 12).
    """
    near = (pre - theta).abs() < bandwidth / 2
    return torch.where(near & counted, -theta / bandwidth, 0.0)


def transcode_ref(
    x: Tensor,
    base: Weights,
    delta: Weights | None = None,
    alpha: float | Tensor = 1.0,
    k_base: int | None = None,
    k_delta: int | None = None,
    bandwidth: float = 1e-3,
) -> Tensor:
    """ops.transcode in plain torch, with gradients by torch's own autograd."""
    return transcode_stats_ref(x, base, delta, alpha, k_base, k_delta, bandwidth).recon


def transcode_stats_ref(
    x: Tensor,
    base: Weights,
    delta: Weights | None = None,
    alpha: float | Tensor = 1.0,
    k_base: int | None = None,
    k_delta: int | None = None,
    bandwidth: float = 1e-3,
) -> TranscodeStats:
    """ops.transcode_stats in plain torch, with gradients by torch's own autograd."""
    acts, _, _ = encode_dense(x, base, k_base)
    recon = decode_dense(acts, base)
    l0, l1 = _l0_l1(acts)
    if delta is None:
        return TranscodeStats(recon, l0, l1, torch.zeros_like(l0), torch.zeros_like(l1))
    acts, pre, counted = encode_dense(x, delta, k_delta)
    theta = delta.threshold.clamp(min=0)
    slope = threshold_slope(pre, theta, counted, bandwidth).detach()
    # Adds exactly 0 where the slope is finite; its derivative by theta is the slope.
    through = torch.where(slope == 0, 0.0, slope * (theta - theta.detach()))
    if not isinstance(alpha, Tensor):
        alpha = torch.full((), alpha, dtype=torch.float64, device=x.device)
    part = alpha.to(x.dtype) * decode_dense(acts + through, delta)
    return TranscodeStats(torch.where(alpha == 0, recon, recon + part), l0, l1, *_l0_l1(acts))


def part_gradients(
    x: Tensor, grad: Tensor, part: Weights, scale: Tensor, k: int | None, bandwidth: float, needed: list[bool]
) -> list[Tensor | None]:
    """Gradients of scale * part(x) by x [tokens, d_model], the five tensors and scale; None: not needed."""
    acts, pre, counted = encode_dense(x, part, k)
    theta = part.threshold.clamp(min=0)
    to_acts = grad @ part.W_dec.T
    to_pre = torch.where(acts != 0, scale * to_acts, 0.0)
    formulas = (
        lambda: to_pre @ part.W_enc.T,
        lambda: x.T @ to_pre,
        lambda: to_pre.sum(0),
        lambda: scale * (to_acts * threshold_slope(pre, theta, counted, bandwidth)).sum(0),
        lambda: scale * (acts.T @ grad),
        lambda: scale * grad.sum(0),
        lambda: (acts * to_acts).sum() + grad.sum(0) @ part.b_dec,
    )
    return [formula() if need else None for formula, need in zip(formulas, needed, strict=True)]


def _l0_l1(acts: Tensor) -> tuple[Tensor, Tensor]:
    acts = acts.detach()
    l1 = acts.sum(-1, dtype=torch.float64)
    l0 = (acts != 0).sum(-1, dtype=torch.float64)
    return torch.where(l1.isnan(), l1, l0).float(), l1.float()
