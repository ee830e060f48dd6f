"""Gradients of transcode: gradcheck, the threshold's closed form, the twin, opcheck, torch.compile."""

import numpy as np
import pytest
import torch

from deltatc import ops
from deltatc.errors import OpError
from deltatc.ops import Weights, transcode, transcode_stats

BANDWIDTH = 0.05


def make_part(d_model, width, seed, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    W_enc, b_enc = normal(d_model, width) / d_model**0.5, normal(width) * 0.2
    threshold = normal(width).abs() * 0.3
    threshold[::4] *= -1  # legal; acts as 0
    weights = (W_enc, b_enc, threshold, normal(width, d_model), normal(d_model))
    return Weights(*(tensor.to(dtype) for tensor in weights))


def away_from_thresholds(rows, *parts):
    """The rows whose pre_acts are at least half a bandwidth (and gradcheck's step) from the thresholds."""
    keep = torch.ones(len(rows), dtype=torch.bool)
    for part in parts:
        pre = rows @ part.W_enc + part.b_enc
        keep &= ((pre - part.threshold.clamp(min=0)).abs() > BANDWIDTH / 2 + 1e-3).all(-1)
    return rows[keep]


def make_case(tokens=6, d_model=5, width=7, d_new=4, dtype=torch.float64, seed=0):
    base, delta = make_part(d_model, width, seed + 1), make_part(d_model, d_new, seed + 2)
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(400, d_model, generator=draw, dtype=torch.float64)
    rows = away_from_thresholds(rows, base, delta)[:tokens]
    assert len(rows) == tokens
    return tuple(
        Weights(*(t.to(dtype) for t in value)) if isinstance(value, Weights) else value.to(dtype)
        for value in (rows, base, delta)
    )


def trainable(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("ks", [(None, None), (3, 2)])
@pytest.mark.parametrize("alpha", [1.0, -0.6, 0.0])
@pytest.mark.parametrize("seed", range(4))
def test_gradcheck_of_x_the_delta_and_alpha(seed, alpha, ks):
    x, base, delta = make_case(seed=10 * seed)
    inputs = trainable(x.view(2, 3, 5), delta.W_enc, delta.b_enc, delta.W_dec, delta.b_dec)
    scale = torch.tensor(alpha, dtype=torch.float64, requires_grad=alpha != 0)  # at 0: below

    def run(x, W_enc, b_enc, W_dec, b_dec, scale):
        return transcode(x, base, Weights(W_enc, b_enc, delta.threshold, W_dec, b_dec), scale, *ks, BANDWIDTH)

    assert torch.autograd.gradcheck(run, (*inputs, scale), nondet_tol=0.0)


def test_alpha_has_its_gradient_at_zero_too():
    x, base, delta = make_case()
    for alpha in (0.0, 1.0):
        scale = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
        transcode(x, base, delta, scale).sum().backward()
        part = transcode(x, base, delta, 1.0) - transcode(x, base)
        assert scale.grad.item() == pytest.approx(part.sum().item(), rel=1e-12)


@pytest.mark.parametrize("bandwidth", [0.01, 0.3, 2.0])
def test_threshold_gradient_is_the_closed_form(bandwidth):
    x, base, delta = make_case(tokens=20, d_new=9)
    grad = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    threshold = delta.threshold.clone().requires_grad_()
    transcode(x, base, delta._replace(threshold=threshold), 0.7, bandwidth=bandwidth).backward(grad)

    W_enc, b_enc, raw, W_dec, _ = (tensor.numpy() for tensor in delta)
    wanted = np.zeros(9)
    for j in range(9):
        theta = max(raw[j], 0.0)
        for token in range(20):
            pre = x[token].numpy() @ W_enc[:, j] + b_enc[j]
            if abs(pre - theta) / bandwidth < 0.5:
                wanted[j] += -theta / bandwidth * 0.7 * (grad[token].numpy() @ W_dec[j])
    np.testing.assert_allclose(threshold.grad.numpy(), wanted, rtol=1e-10, atol=1e-13)
    assert (threshold.grad[delta.threshold <= 0] == 0).all()
    if bandwidth == 2.0:
        assert (threshold.grad[delta.threshold > 0] != 0).all()


def test_the_window_counts_latents_on_both_sides_and_topk_only_those_in_reach():
    """pre = 1.04, 0.96 (below its threshold 1), 5, 3; with k = 2 the first two are behind 5 and 3."""
    values, threshold = torch.tensor([[1.04, 0.96, 5.0, 3.0]]), torch.ones(4, requires_grad=True)
    part = Weights(values, torch.zeros(4), threshold, torch.ones(4, 1), torch.zeros(1))
    nothing = Weights(torch.zeros(1, 0), torch.zeros(0), torch.zeros(0), torch.zeros(0, 1), torch.zeros(1))
    both, above, neither = [-10, -10, 0, 0], [-10, 0, 0, 0], [0, 0, 0, 0]
    for k, wanted in ((None, both), (4, both), (3, above), (2, neither)):
        recon = transcode(torch.ones(1, 1), nothing, part, 1.0, None, k, 0.1)
        (found,) = torch.autograd.grad(recon, threshold)
        torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32))


BACKSTOP = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", BACKSTOP)
@pytest.mark.parametrize("ks", [(None, None), (9, 3)])
@pytest.mark.parametrize("chunk", [1 << 21, 64])
def test_gradients_equal_the_twin_s_in_double(dtype, ks, chunk, monkeypatch):
    """Chunks of 64 elements: the tokens are taken three or ten at a time."""
    monkeypatch.setattr(ops, "BACKWARD_ELEMENTS", chunk)
    x, base, delta = make_case(tokens=33, d_model=5, width=20, d_new=6, dtype=dtype)
    grad = torch.randn(33, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    alpha = torch.tensor(0.75)

    def gradients(function, wide):
        args = trainable(*(t.to(wide) for t in (x, *delta, alpha)))
        frozen = Weights(*(t.to(wide) for t in base))
        recon = function(args[0], frozen, Weights(*args[1:6]), args[6], *ks, 0.04)
        return torch.autograd.grad(recon, args, grad.to(wide))

    oracle = gradients(ops.transcode_ref, torch.float64)
    alpha = alpha.to(dtype)
    names = ("x", *Weights._fields, "alpha")
    for name, found, wanted in zip(names, gradients(transcode, dtype), oracle, strict=True):
        error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
        assert error <= BACKSTOP[dtype], f"{name}: {error:.3g}"


@pytest.mark.parametrize("only", range(7))
def test_each_gradient_alone_is_the_same_as_with_all(only):
    x, base, delta = make_case()
    tensors = [x, *delta, torch.tensor(0.7, dtype=torch.float64)]
    everything = trainable(*tensors)
    alone = list(tensors)
    alone[only] = tensors[only].clone().requires_grad_()
    for args in (everything, alone):
        transcode(args[0], base, Weights(*args[1:6]), args[6], bandwidth=1.0).sum().backward()
    assert torch.equal(alone[only].grad, everything[only].grad)


def test_without_a_delta_x_has_its_gradient_and_strides_do_not_matter():
    x, base, _ = make_case()
    leaf = x.T.contiguous().T.requires_grad_()
    transcode(leaf, base).sum().backward()  # the incoming gradient is an expanded scalar
    (wanted,) = torch.autograd.grad(ops.transcode_ref(leaf, base).sum(), leaf)
    torch.testing.assert_close(leaf.grad, wanted)
    transcode(leaf[:0], base).sum().backward()


def test_stats_differentiate_through_recon_only():
    x, base, delta = make_case()
    (x,) = trainable(x)
    found = transcode_stats(x, base, delta)
    assert found.recon.requires_grad and not any(stat.requires_grad for stat in found[1:])
    (got,) = torch.autograd.grad(found.recon.sum(), x)
    (wanted,) = torch.autograd.grad(transcode(x, base, delta).sum(), x)
    assert torch.equal(got, wanted)


def test_the_base_stays_frozen_and_second_derivatives_are_refused():
    x, base, delta = make_case()
    for field in Weights._fields:
        learning = base._replace(**{field: getattr(base, field).clone().requires_grad_()})
        with pytest.raises(OpError, match="base requires grad"):
            transcode(x, learning, delta)
        with torch.no_grad():
            transcode(x, learning, delta)
        recon = torch.ops.deltatc.transcode(x, *learning, *delta, torch.tensor(1.0), None, None, 1e-3)
        with pytest.raises(OpError, match="base requires grad"):
            recon.sum().backward()
    (x,) = trainable(x)
    (first,) = torch.autograd.grad(transcode(x, base, delta).pow(2).sum(), x, create_graph=True)
    with pytest.raises(OpError, match="once"):
        first.sum().backward()


@pytest.mark.parametrize("with_delta", [True, False])
@pytest.mark.parametrize("ks", [(None, None), (3, 2)])
@pytest.mark.parametrize("tokens", [(3,), (2, 2), (0,)])
@pytest.mark.parametrize("name", ["transcode", "transcode_stats", "transcode_backward"])
def test_opcheck(name, tokens, ks, with_delta):
    _, base, delta = make_case()
    x = make_case(tokens=4)[0][: int(np.prod(tokens))].view(*tokens, 5)
    k_base, k_delta = ks if with_delta else (ks[0], None)
    parts = (*base, *(delta if with_delta else (None,) * 5))
    alpha = torch.tensor(0.5, dtype=torch.float64)
    if name == "transcode_backward":
        needed = [True] + [with_delta] * 6
        args = (torch.ones_like(x), x, *parts, alpha, k_base, k_delta, 0.1, needed)
    else:
        learning = trainable(*delta) if with_delta else [None] * 5
        alpha.requires_grad_(with_delta)
        args = (x.clone().requires_grad_(), *base, *learning, alpha, k_base, k_delta, 0.1)
    torch.library.opcheck(getattr(torch.ops.deltatc, name).default, args)


def test_compile_fullgraph_forward_and_backward():
    x, base, delta = make_case(tokens=8)

    def loss(x, W_enc, b_enc, threshold, W_dec, b_dec, alpha):
        learning = Weights(W_enc, b_enc, threshold, W_dec, b_dec)
        recon, *stats = transcode_stats(x, base, learning, alpha, 3, 2, 0.1)
        difference = transcode(x, base, learning, 0.5, bandwidth=0.1) - recon
        return difference.pow(2).sum() + sum(stat.sum() for stat in stats)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for tokens in (8, 5, 3):  # the second shape recompiles with a dynamic one
        args = trainable(x[:tokens], *delta, torch.tensor(0.7, dtype=torch.float64))
        eager, traced = loss(*args), compiled(*args)
        torch.testing.assert_close(traced, eager)
        gradients = torch.autograd.grad(traced, args), torch.autograd.grad(eager, args)
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.skipif(" " in torch.__file__, reason="inductor's own link command does not quote a path with a space")
def test_compile_with_the_default_backend():
    x, base, delta = make_case(tokens=8)
    (x,) = trainable(x)
    compiled = torch.compile(lambda x: transcode(x, base, delta, 0.7), fullgraph=True)
    assert torch.equal(compiled(x), transcode(x, base, delta, 0.7))
    (got,) = torch.autograd.grad(compiled(x).sum(), x)
    (wanted,) = torch.autograd.grad(transcode(x, base, delta, 0.7).sum(), x)
    torch.testing.assert_close(got, wanted)
