"""Where a transcoder reads the residual stream: the declared site of Gemma Scope and the plausible wrong ones.

Gemma Scope 1's transcoders read the pre-feedforward RMSNorm's value without its (1 + w) gain and predict what the
MLP adds to the residual, after the post-feedforward norm. What is measured at each site is site_check.py's business.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deltatc.errors import SiteError

DEFAULT_SITE = "normalized"


def rms_normalize(resid_mid: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square in float32, without a gain (Zhang & Sennrich 2019, eq. 4, g = 1)."""
    h = resid_mid if resid_mid.dtype == torch.float64 else resid_mid.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


class Site(NamedTuple):
    """How a site turns the residual stream before the MLP into a transcoder's input, and its output back."""

    read: Callable[[Tensor, Tensor, float], Tensor]
    """(resid_mid [..., d_model], the norm's weight w [d_model], eps) -> x [..., d_model]."""
    scale: Callable[[int], float]
    """d_model -> s: the transcoder predicts mlp_out / s, so its recon is multiplied by s."""


def _one(d_model: int) -> float:
    return 1.0


SITES = {
    "normalized": Site(lambda h, w, eps: rms_normalize(h, eps), _one),
    "normalized_with_gain": Site(lambda h, w, eps: rms_normalize(h, eps) * (1 + w.float()), _one),
    "resid_mid": Site(lambda h, w, eps: h, _one),
    # The convention of the system that deltatc rebuilds; wrong for Gemma Scope, kept for comparison.
    "resid_mid_over_sqrt_d": Site(lambda h, w, eps: h / math.sqrt(h.shape[-1]), math.sqrt),
}


def site(name: str) -> Site:
    """Return the site of that name."""
    if name not in SITES:
        raise SiteError(f"site {name!r} is unknown; expected one of {', '.join(SITES)}")
    return SITES[name]
