"""The screen in eight bits (csrc/cpu/screen.inc) changes no bit of a result, and its bound holds, in float64.

pytest tests/test_screen.py
"""

import numpy as np
import pytest
import torch

from deltatc import ops
from deltatc.ops import Weights
from tests.test_ops import BFLOAT16, FLOAT32, FLOAT64, make_case

STRIP, HEAD = 32, 3 * 32 * 4  # latents of a strip, bytes of its scales, norms and errors


@pytest.fixture(params=["avx512vnni", "avx512bf16", "amx_model", "amx"], autouse=True)
def kernel(request, monkeypatch):
    monkeypatch.setenv("DELTATC_CPU_KERNEL", request.param)
    try:
        ops.build_info()
    except RuntimeError:
        pytest.skip(f"this CPU has no {request.param}")
    ops._PACKED.clear()


def screened_and_not(x, base, delta=None, k_base=None, k_delta=None):
    """transcode's outputs with and without the screens."""
    alpha, found = torch.tensor(0.7), []
    for keep in (True, False):
        packs = [ops.packed(part.W_enc) if part else (None, None) for part in (base, delta)]
        assert packs[0].screen.numel() > 0 or base.W_enc.shape[1] == 0
        first, second = ((rows, screen if keep else None) for rows, screen in packs)
        rest = (*second, *(delta[1:] if delta else (None,) * 4), alpha, k_base, k_delta, True)
        found.append(torch.ops.deltatc.transcode_packed(x, *first, *base[1:], *rest))
    return found


def assert_same_bits(x, base, delta=None, *ks):
    with_screen, without = screened_and_not(x, base, delta, *ks)
    for found, wanted in zip(with_screen, without, strict=True):
        assert torch.equal(found.nan_to_num(nan=-7.0), wanted.nan_to_num(nan=-7.0))
    return without


CASES = [
    (1, 8, 1), (3, 1, 31), (5, 63, 33), (13, 64, 200), (40, 65, 1000), (500, 300, 130), (33, 2304, 300), (2, 2304, 65),
    (482, 16, 64), (12, 128, 500), (24, 200, 96), (8, 1000, 97),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_bit_changes(case, fraction, dtype):
    tokens, d_model, width = case
    x, base, delta = make_case(tokens, d_model, width, 40, fraction, dtype)
    assert_same_bits(x, base, delta)
    assert_same_bits(x, base, delta, max(1, width // 20), 3)


def shaped(kind, rows, size, draw):
    """Vectors that are unkind to eight bits or to a rotation."""
    values = torch.randn(rows, size, generator=draw)
    if kind == "outliers":
        values[:, torch.randint(size, (3,), generator=draw)] *= 60
    elif kind == "one coordinate":
        values = torch.eye(size)[torch.arange(rows) % size] * 3
    elif kind == "constant":
        values = torch.ones(rows, size) * torch.randn(rows, 1, generator=draw)
    elif kind == "alternating":
        values = torch.ones(rows, size) * (1 - 2 * (torch.arange(size) % 2))
    elif kind == "heavy tails":
        values = values**5
    return values


KINDS = ["normal", "outliers", "one coordinate", "constant", "alternating", "heavy tails"]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_changes_with_unkind_values(kind, dtype):
    draw = torch.Generator().manual_seed(3)
    for weights in KINDS:
        x = shaped(kind, 30, 200, draw).to(dtype)
        W_enc = shaped(weights, 150, 200, draw).T.contiguous().to(dtype)
        pre = x.double() @ W_enc.double()
        threshold = pre.quantile(0.97, dim=0).to(dtype)
        base = Weights(W_enc, torch.zeros(150, dtype=dtype), threshold, torch.randn(150, 200).to(dtype), x[0])
        assert_same_bits(x, base)
        assert_same_bits(x, base, None, 4)


def test_a_threshold_one_step_below_a_pre_act_is_passed_and_the_pre_act_itself_is_not():
    """Every latent's threshold is some token's pre_act, as the kernel computes it, or the number before it."""
    x, base, _ = make_case(64, 300, 256, 1, 1.0, FLOAT32)
    eye = torch.eye(256, 300)
    silent = base._replace(threshold=torch.zeros_like(base.threshold), W_dec=eye, b_dec=torch.zeros_like(base.b_dec))
    pre = screened_and_not(x, silent)[1][0][:, :256]  # each latent writes its own column
    token = torch.arange(256) % 64
    exact = pre[token, torch.arange(256)]
    assert (exact > 0).all()
    for threshold, active in ((exact, False), (torch.nextafter(exact, torch.zeros_like(exact)), True)):
        recon = assert_same_bits(x, silent._replace(threshold=threshold))[0]
        assert ((recon[token, torch.arange(256)] > 0) == active).all()


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-16, 1e-10, 1e10, 1e17, 1e19, 1e30, 3e38])
def test_no_bit_changes_at_the_ends_of_the_range(size, dtype):
    for part in ("x", "W_enc", "b_enc", "threshold"):
        x, base, _ = make_case(20, 48, 100, 1, 0.3, dtype)
        tensors = {"x": x} | base._asdict()
        tensors[part].mul_(size / tensors[part].abs().max())
        if part in ("x", "W_enc"):
            tensors["threshold"].zero_()
        assert_same_bits(x, base)
        tensors[part].view(-1)[5] *= -1
        x[3, 4] = 3e38
        assert_same_bits(x, base)
        base.threshold.fill_(torch.inf)  # a pre_act may overflow where it could never fire
        assert_same_bits(x, base)


@pytest.mark.parametrize("size", [1e17, 1e18, 2e19, 3e20, 1e25, 1e38])
def test_a_pre_act_of_minus_infinity_is_found(size):
    """However far below its threshold it is, it makes the row NaN."""
    for fewer in (1.0, 1e-19):
        x = torch.full((15, 64), size)
        W_enc, zeros = torch.full((64, 40), -size * fewer), torch.zeros(40)
        stats = assert_same_bits(x, Weights(W_enc, zeros, zeros, torch.ones(40, 64), torch.zeros(64)))
        assert stats[0].isnan().all() == (64 * size * size * fewer > 3.4e38)


def test_no_bit_changes_with_weights_that_are_not_finite():
    x, base, _ = make_case(20, 48, 100, 1, 0.1, FLOAT32)
    for bad in (torch.nan, torch.inf, -torch.inf):
        for part in ("W_enc", "b_enc", "threshold"):
            tensors = {name: tensor.clone() for name, tensor in base._asdict().items()}
            tensors[part].view(-1)[70] = bad
            assert_same_bits(x, Weights(**tensors))
    x[3, 2], x[7] = torch.nan, 0.0
    assert_same_bits(x, base)


def screen_of(values):
    """scale, norm, error [rows] and bytes [rows, size] of the rows of `values`, from their packed screen."""
    screen = ops.packed(values.T).screen.numpy()
    head = screen[:, :HEAD].copy().view(np.float32).reshape(len(screen), 3, STRIP).astype(np.float64)
    size = (screen.shape[1] - HEAD) // STRIP
    quads = screen[:, HEAD:].reshape(len(screen), size // 4, STRIP, 4)
    found = quads.transpose(0, 2, 1, 3).reshape(-1, size).astype(np.int64) - 128
    return (*(head[:, i].reshape(-1)[: len(values)] for i in range(3)), found[: len(values)])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("size", [1, 40, 64, 200, 2304])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_and_is_tight(kind, size, dtype):
    """The product of any two vectors is within the bound of their bytes' product; bytes lose about a percent."""
    values = shaped(kind, 70, size, torch.Generator().manual_seed(size)).to(dtype)
    scale, norm, error, found = screen_of(values)
    exact = values.double().numpy()
    lengths = np.sqrt((exact**2).sum(1))
    assert (norm >= lengths).all() and (norm <= 1.01 * lengths).all()
    of_bytes = (found @ found.T) * scale[:, None] * scale
    products = exact @ exact.T
    bound = (norm + error)[:, None] * error + error[:, None] * norm + 1e-4 * norm[:, None] * norm
    assert (np.abs(products - of_bytes) <= bound).all()
    assert np.abs(found).max() <= 127
    if size >= 200:  # without the rotation, outliers make this several times as much
        assert (error <= 0.013 * norm).all()


def test_the_rotation_is_what_keeps_outliers_from_the_bytes():
    values = shaped("outliers", 50, 2304, torch.Generator().manual_seed(0))
    _, norm, error, _ = screen_of(values)
    step = values.abs().amax(1, keepdim=True) / 127
    unrotated = (values - (values / step).round() * step).norm(dim=1) / values.norm(dim=1)
    assert unrotated.min() > 2 * (error / norm).max()


def rotation(size):
    """R as csrc/cpu/screen.inc describes it, in float64: two Hadamard transforms with signs."""
    power = 1 << (size.bit_length() - 1)
    parity = np.array([[bin(i & j).count("1") % 2 for j in range(power)] for i in range(power)])
    signs = []
    for i in range(1, power + 1):
        mixed = (i ^ i >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        signs.append(-1.0 if (mixed ^ mixed >> 16) & 1 else 1.0)
    found = np.eye(size)
    for start in (0, size - power):
        part = slice(start, start + power)
        found[part] = (1 - 2.0 * parity) * signs / power**0.5 @ found[part]
    return found


@pytest.mark.parametrize("size", [64, 128, 320])
def test_norms_and_errors_are_what_the_bytes_leave_out(size):
    values = shaped("normal", 40, size, torch.Generator().manual_seed(1))
    scale, norm, error, found = screen_of(values)
    rotated = values.double().numpy() @ rotation(size).T
    left = np.linalg.norm(rotated - scale[:, None] * found, axis=1)
    assert (error >= left).all() and (error <= 1.01 * left).all()
    assert (norm >= np.linalg.norm(rotated, axis=1)).all()
    assert (np.abs(found).max(axis=1) == 127).all()


@pytest.mark.parametrize("lost_by", ["the token", "the latent", "both"])
@pytest.mark.parametrize("tokens, negative", [(1, 0.5), (40, 0.5), (13, 0.95), (33, 0.05)])
def test_the_worst_case_is_kept(lost_by, tokens, negative):
    """What the bytes leave out lies along the other vector: the bound of Cauchy and Schwarz is attained."""
    size, draw = 320, np.random.default_rng(0)
    sides = draw.choice([-1.0, 1.0], size, p=[negative, 1 - negative])
    exact, between = 126 * sides, 126.49 * sides
    exact[0] = between[0] = 127 * sides[0]  # the largest: it sets the scale
    of_x, of_w = (between if lost_by in (name, "both") else exact for name in ("the token", "the latent"))
    x, w = ((part @ rotation(size)).astype(np.float32) for part in (of_x / 100, of_w / 1000))
    product, of_bytes = x.astype(np.float64) @ w, exact @ exact / 1e5
    assert product > of_bytes * 1.003
    threshold = torch.full((50,), product - 0.05 * (product - of_bytes))
    W_enc, zeros = torch.from_numpy(w)[:, None].repeat(1, 50), torch.zeros(50)
    base = Weights(W_enc, zeros, threshold.float(), torch.ones(50, size), torch.zeros(size))
    stats = assert_same_bits(torch.from_numpy(x).repeat(tokens, 1), base)
    assert stats[1].tolist() == [50.0] * tokens


def test_float64_has_no_screen():
    assert ops.packed(torch.randn(8, 40, dtype=FLOAT64)).screen.numel() == 0


def test_a_screen_of_another_shape_is_refused():
    x, base, _ = make_case(3, 8, 40, 1, 0.3, FLOAT32)
    rows, screen = ops.packed(base.W_enc)
    for wrong in (screen[:1], screen[:, 1:].contiguous(), screen.float()):
        with pytest.raises(RuntimeError, match="screen has shape"):
            torch.ops.deltatc.transcode_packed(
                x, rows, wrong, *base[1:], *(None,) * 6, torch.tensor(1.0), None, None, False
            )
