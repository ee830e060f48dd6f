"""Transcoder, DeltaTranscoder and fuse against float64 numpy, and the algebra between them.

pytest tests/test_transcoder.py
"""

import numpy as np
import pytest
import torch

from deltatc import DeltaTranscoder, Transcoder, fuse
from deltatc.errors import FormatError, PartsNotRecorded, SiteError
from tests.helpers import random_transcoder, randomized


def numpy_recon(x, *parts):
    """base(x) + alpha * delta(x) in float64, written without the library."""
    total = 0.0
    for weights, alpha in parts:
        W_enc, b_enc, threshold, W_dec, b_dec = (t.detach().double().numpy() for t in weights)
        pre = x.double().numpy() @ W_enc + b_enc
        acts = pre * (pre > np.maximum(threshold, 0))
        total = total + alpha * (acts @ W_dec + b_dec)
    return torch.from_numpy(np.asarray(total))


def pair(seed=0, d_new=8, **kwargs):
    base = random_transcoder(seed, **kwargs)
    return base, randomized(DeltaTranscoder(base, d_new))


@pytest.mark.parametrize("shape", [(32,), (5, 32), (2, 3, 32), (0, 32), (2, 0, 32)])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3, 1.0, 2.0])
def test_delta_equals_numpy_for_any_leading_shape(shape, alpha):
    base, delta = pair(dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    wanted = numpy_recon(x, (base.weights, 1.0), (delta.weights, alpha))
    torch.testing.assert_close(delta(x, alpha), wanted.reshape(shape), rtol=1e-10, atol=1e-12)


def test_encode_decode_and_forward_agree():
    base, _ = pair(dtype=torch.float64)
    x = torch.randn(7, 32, dtype=torch.float64)
    acts = base.encode(x)
    assert acts.shape == (7, 40) and 0 < (acts > 0).double().mean() < 1
    torch.testing.assert_close(base.decode(acts), base(x), rtol=1e-10, atol=1e-12)


def test_a_new_delta_is_exactly_its_base():
    base = random_transcoder(0)
    x = torch.randn(50, 32)
    assert torch.equal(DeltaTranscoder(base, 8)(x), base(x))
    assert torch.equal(DeltaTranscoder(base, 8).delta_only(x), torch.zeros_like(x))


def test_alpha_zero_is_the_base_bit_for_bit_and_output_is_affine_in_alpha():
    base, delta = pair()
    x = torch.randn(50, 32)
    assert torch.equal(delta(x, 0.0), base(x))
    assert not torch.equal(delta(x, 1.0), base(x))
    for alpha in (-0.5, 0.25, 3.0):
        torch.testing.assert_close(delta(x, alpha), base(x) + alpha * delta.delta_only(x), rtol=1e-5, atol=1e-5)


def test_b_dec_belongs_to_the_delta_too():
    base, delta = pair()
    with torch.no_grad():
        delta.W_dec.zero_()
    x = torch.randn(4, 32)
    torch.testing.assert_close(delta.delta_only(x), delta.b_dec.expand(4, 32))
    torch.testing.assert_close(delta(x, 0.5) - base(x), (0.5 * delta.b_dec).expand(4, 32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(50))
def test_fused_is_base_plus_delta_and_comes_apart_exactly(seed):
    base, delta = pair(seed)
    fused = fuse(base, delta)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(seed))
    oracle = numpy_recon(x, (base.weights, 1.0), (delta.weights, 1.0))
    floor = 2 * torch.finfo(torch.float32).eps * oracle.abs().max()
    eager = (base.decode(base.encode(x)) + delta.delta_only(x) - oracle).abs().max()
    assert (fused(x) - oracle).abs().max() <= 2 * eager + floor
    base_again, delta_again = fused.unfuse()
    for whole, again in ((base, base_again), (delta, delta_again)):
        assert all(torch.equal(a, b) for a, b in zip(whole.weights, again.weights, strict=True))
    assert torch.equal(delta_again(x, 0.7), delta(x, 0.7))


def test_fusing_with_top_k_selects_apart():
    base, _ = pair(dtype=torch.float64)
    base.k = 5
    delta = randomized(DeltaTranscoder(base, 8, k=2))
    fused = fuse(base, delta)
    x = torch.randn(30, 32, dtype=torch.float64)
    torch.testing.assert_close(fused(x), delta(x), rtol=1e-10, atol=1e-12)
    acts = fused.encode(x)
    assert (acts[:, :40] > 0).sum(-1).max() == 5 and (acts[:, 40:] > 0).sum(-1).max() == 2
    stats = fused.stats(x)
    torch.testing.assert_close(stats.recon, delta(x), rtol=1e-10, atol=1e-12)
    assert torch.equal(stats.l0_base, (acts[:, :40] > 0).sum(-1).float())
    assert torch.equal(stats.l0_delta, (acts[:, 40:] > 0).sum(-1).float())


def test_stats_are_sums_over_the_acts():
    base, delta = pair(dtype=torch.float64)
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    recon, l0_base, l1_base, l0_delta, l1_delta = delta.stats(x, 0.5)
    assert torch.equal(recon, delta(x, 0.5))
    for weights, l0, l1 in ((base.weights, l0_base, l1_base), (delta.weights, l0_delta, l1_delta)):
        W_enc, b_enc, threshold = (t.detach().numpy() for t in weights[:3])
        pre = x.numpy() @ W_enc + b_enc
        active = pre > np.maximum(threshold, 0)
        assert np.array_equal(l0.numpy(), active.sum(-1))
        np.testing.assert_allclose(l1.numpy(), (pre * active).sum(-1), rtol=1e-6)
    alone = base.stats(x)
    assert torch.equal(alone.recon, base(x)) and torch.equal(alone.l0_base, l0_base) and not alone.l0_delta.any()


def test_parts_taken_from_a_whole_share_no_memory_with_it():
    base, delta = pair()
    fused = fuse(base, delta)
    x = torch.randn(6, 32)
    wanted = fused(x)
    for part in (base, delta, *fused.unfuse()):
        with torch.no_grad():
            for parameter in part.parameters():
                parameter += 1.0
    assert torch.equal(fused(x), wanted)
    again = fused.unfuse()[1]
    torch.testing.assert_close(again(x), wanted, rtol=1e-5, atol=1e-5)


def test_dtypes_follow_the_input_and_in_place_updates_are_honoured():
    base, delta = pair()
    x = torch.randn(6, 32)
    assert delta(x.bfloat16()).dtype == torch.bfloat16  # float32 weights, bfloat16 model
    small = fuse(base, delta).to(dtype=torch.bfloat16)
    assert small(x.bfloat16()).dtype == torch.bfloat16
    before = base(x)
    with torch.no_grad():
        base.b_dec += 1.0
    torch.testing.assert_close(base(x), before + 1.0)


def test_the_base_is_frozen_and_gradients_reach_only_the_delta():
    base, delta = pair()
    before = [t.clone() for t in base.weights]
    optimizer = torch.optim.AdamW([p for p in delta.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(20):
        x = torch.randn(16, 32)
        delta(x).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(before, base.weights, strict=True))
    assert all(p.grad is None for p in base.parameters())
    assert len([p for p in delta.parameters() if p.requires_grad]) == 5


def test_negative_thresholds_act_as_zero():
    base = random_transcoder(0, dtype=torch.float64)
    lowered = Transcoder(base.W_enc, base.b_enc, base.W_dec, base.b_dec, torch.full_like(base.threshold, -1.0))
    zero = Transcoder(base.W_enc, base.b_enc, base.W_dec, base.b_dec, torch.zeros_like(base.threshold))
    x = torch.randn(9, 32, dtype=torch.float64)
    assert torch.equal(lowered(x), zero(x)) and (lowered.encode(x) >= 0).all()


def test_square_weights_are_not_transposed():
    base = random_transcoder(0, d_sae=32, dtype=torch.float64)
    x = torch.randn(5, 32, dtype=torch.float64)
    torch.testing.assert_close(base(x), numpy_recon(x, (base.weights, 1.0)), rtol=1e-10, atol=1e-12)


def test_a_row_that_is_not_finite_gives_a_nan_row_only():
    _, delta = pair()
    x = torch.randn(5, 32)
    clean = delta(x)
    x[2, 3] = float("inf")
    found = delta(x)
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_what_does_not_fit_is_refused():
    base, delta = pair()
    with pytest.raises(PartsNotRecorded, match="does not record a base and a delta"):
        base.unfuse()
    with pytest.raises(FormatError, match="W_dec has shape"):
        Transcoder(base.W_enc, base.b_enc, base.W_enc, base.b_dec, base.threshold)
    with pytest.raises(FormatError, match="do not fit"):
        fuse(random_transcoder(1, d_model=16), delta)
    with pytest.raises(SiteError, match="unknown"):
        Transcoder(*(getattr(base, k) for k in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")), site="nowhere")
    with pytest.raises(FormatError, match="d_new"):
        DeltaTranscoder(base, 0)
