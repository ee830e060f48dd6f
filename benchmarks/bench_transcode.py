"""torch.ops.deltatc.transcode beside the eager dense chain (linear, JumpReLU, linear) over base and delta.

Ours and the chain run alternately in one benchmark, so that a busy machine slows both; `extra_info` holds the
median times and the speedup. Shapes: the tiny default, and Gemma-2-2B's 2304 x (16384 + 128).
"""

import statistics
import time

import pytest
import torch
from torch.nn.functional import linear

from deltatc.ops import Weights, transcode

ACTIVE = 64
SHAPES = {"tiny": (128, 1024, 32), "gemma-2-2b": (2304, 16384, 128)}  # d_model, d_sae, d_new


def make_part(d_model, width, threshold, dtype, draw):
    """Random weights whose pre_acts are standard normal on a standard normal x."""
    tensors = (
        torch.randn(d_model, width, generator=draw) / d_model**0.5,
        torch.zeros(width),
        torch.full((width,), threshold),
        torch.randn(width, d_model, generator=draw) / ACTIVE**0.5,
        torch.zeros(d_model),
    )
    return Weights(*(tensor.to(dtype) for tensor in tensors))


def eager_chain(base, delta):
    """Return x -> recon by dense operators; weights are joined and laid out for linear before the timing."""
    encoder = torch.cat([base.W_enc, delta.W_enc], dim=1).T.contiguous()
    decoder = torch.cat([base.W_dec, delta.W_dec]).T.contiguous()
    b_enc, threshold = torch.cat([base.b_enc, delta.b_enc]), torch.cat([base.threshold, delta.threshold])
    b_dec = base.b_dec + delta.b_dec

    def run(x):
        pre = linear(x, encoder, b_enc)
        return linear(pre * (pre > threshold), decoder, b_dec)

    return run


@pytest.mark.parametrize("tokens", [1, 512, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transcode(benchmark, shape, dtype, tokens):
    if shape == "gemma-2-2b" and tokens > 512:
        pytest.skip("minutes on two cores")
    if benchmark.disabled:
        shape = "tiny"  # a run without timing only shows that both run and agree
    d_model, d_sae, d_new = SHAPES[shape]
    draw = torch.Generator().manual_seed(0)
    threshold = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - ACTIVE / (d_sae + d_new))).item()
    base, delta = (make_part(d_model, width, threshold, dtype, draw) for width in (d_sae, d_new))
    x = torch.randn(tokens, d_model, generator=draw).to(dtype)
    chain, times = eager_chain(base, delta), {"ours": [], "eager": []}

    def both():
        for name, run in (("ours", lambda: transcode(x, base, delta)), ("eager", lambda: chain(x))):
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)

    with torch.no_grad():
        wanted = chain(x).float()
        difference = (transcode(x, base, delta).float() - wanted).norm() / wanted.norm()
        # The chain rounds pre_acts to bfloat16 before it compares them, so a few latents a token flip.
        assert difference < (1e-4 if dtype == torch.float32 else 0.3)
        benchmark.pedantic(both, rounds=50 if tokens * d_sae < 1 << 20 else 5, warmup_rounds=1)
    ours, eager = (statistics.median(times[name][1:] or times[name]) for name in ("ours", "eager"))
    benchmark.extra_info.update(ours_ms=ours * 1e3, eager_ms=eager * 1e3, speedup=eager / ours)
