"""transcode against a float64 numpy oracle: shapes, dtypes, selection, special values, invariance, errors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deltatc import ops
from deltatc.errors import OpError
from deltatc.ops import Weights, transcode, transcode_stats

FLOAT64, FLOAT32, BFLOAT16 = torch.float64, torch.float32, torch.bfloat16
# dtype: (factor over the eager twin's error, floor and backstop as parts of the largest |oracle|)
TOLERANCE = {FLOAT64: (None, 0.0, 1e-13), FLOAT32: (2, 2.4e-7, 2e-6), BFLOAT16: (2, 1.6e-2, 1.6e-2)}


def assert_close(got, oracle, baseline=None, factor=None):
    """The one tolerance rule: error <= factor x the eager twin's error + floor, and an absolute backstop."""
    assert got.shape == oracle.shape
    if got.numel() == 0:
        return
    usual, floor, backstop = TOLERANCE[got.dtype]
    scale = np.abs(oracle).max()
    error = np.abs(got.double().numpy() - oracle).max()
    assert error <= backstop * max(scale, 1.0), f"error {error:.3g}, largest value {scale:.3g}"
    if baseline is not None and usual is not None:
        eager = np.abs(baseline.double().numpy() - oracle).max()
        assert error <= (factor or usual) * eager + floor * scale, f"error {error:.3g}, eager twin's {eager:.3g}"


def numpy_part(x, part, k):
    """part(x) and its acts in float64: x [tokens, d_model]."""
    W_enc, b_enc, threshold, W_dec, b_dec = (tensor.double().numpy() for tensor in part)
    acts = x @ W_enc + b_enc
    acts[~((acts > 0) & (acts > threshold))] = 0
    if k is not None:
        for token in acts:  # a stable sort: ties go to the lower index
            token[np.argsort(-token, kind="stable")[k:]] = 0
    return acts @ W_dec + b_dec, acts


def numpy_oracle(x, base, delta=None, alpha=1.0, k_base=None, k_delta=None):
    rows = x.detach().double().numpy().reshape(-1, x.shape[-1])
    recon, acts = numpy_part(rows, base, k_base)
    l0_l1 = [(acts > 0).sum(1), acts.sum(1), np.zeros(len(rows)), np.zeros(len(rows))]
    if delta is not None:
        part, acts = numpy_part(rows, delta, k_delta)
        recon = recon + alpha * part
        l0_l1[2:] = [(acts > 0).sum(1), acts.sum(1)]
    return recon.reshape(x.shape), [stat.reshape(x.shape[:-1]) for stat in l0_l1]


def make_part(d_model, width, x, fraction, seed, layout="contiguous"):
    """Weights with about `fraction` active latents a token, thresholds in gaps of the pre_acts (no flips)."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        tensor = torch.randn(*shape, generator=draw, dtype=FLOAT64).to(x.dtype)
        if layout == "sliced":
            held = torch.full([2 * size for size in shape], 7.0, dtype=x.dtype)
            view = held[tuple(slice(None, None, 2) for _ in shape)]
            return view.copy_(tensor)
        return tensor.mT.contiguous().mT if layout == "transposed" and len(shape) == 2 else tensor

    W_enc = normal(d_model, width).div_(d_model**0.5)
    b_enc, b_dec = normal(width).mul_(0.1), normal(d_model)
    W_dec = normal(width, d_model).div_(max(1.0, fraction * width) ** 0.5)
    threshold = torch.full((width,), 0.3, dtype=FLOAT64)
    rows = x.detach().reshape(-1, d_model).double()
    rows = rows[rows.isfinite().all(-1)]
    if len(rows) and fraction < 1:
        pre = (rows @ W_enc.double() + b_enc.double()).sort(0).values
        at = torch.arange(len(rows) + 1).div(len(rows)).sub(1 - fraction).abs().sort().indices[:7]
        edges = torch.cat([pre[:1] - 1, pre, pre[-1:] + 1])
        low, high = edges[at], edges[at + 1]  # a few gaps near the wanted quantile: the widest wins
        widest = (high - low).argmax(0, keepdim=True)
        threshold = ((low + high) / 2).gather(0, widest)[0]
    elif fraction == 1:
        b_enc += 6
        threshold = torch.full((width,), -1.0, dtype=FLOAT64)
    return Weights(W_enc, b_enc, threshold.to(x.dtype), W_dec, b_dec)


def make_case(tokens, d_model, width, d_new, fraction, dtype, layout="contiguous", seed=0):
    x = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(seed + 1), dtype=FLOAT64).to(dtype)
    if layout == "sliced":
        x = torch.cat([x, x + 5], dim=-1)[:, :d_model]
    elif layout == "transposed":
        x = x.T.contiguous().T
    base = make_part(d_model, width, x, fraction, seed + 2, layout)
    return x, base, make_part(d_model, d_new, x, fraction, seed + 3, layout)


def as_double(part):
    return Weights(*(tensor.double() for tensor in part))


# Each pair of values of two axes occurs at least once (checked by test_the_cases_cover_every_pair).
AXES = (
    (0, 1, 3, 64, 257),
    (1, 8, 48, 2304),
    (1, 128, 1000, 16384),
    (0.0, 0.05, 0.5, 1.0),
    (FLOAT64, FLOAT32, BFLOAT16),
    ("contiguous", "sliced", "transposed"),
)


def pairwise(axes, seed):
    """Greedy cover of all pairs of values of two axes."""
    missing = {(i, a, j, b) for i in range(len(axes)) for j in range(i) for a in axes[i] for b in axes[j]}
    draw, cases = np.random.default_rng(seed), []
    while missing:
        tries = [tuple(axis[draw.integers(len(axis))] for axis in axes) for _ in range(60)]
        covers = [{(i, t[i], j, t[j]) for i in range(len(axes)) for j in range(i)} & missing for t in tries]
        best = max(range(60), key=lambda n: len(covers[n]))
        cases, missing = [*cases, tries[best]], missing - covers[best]
    return cases


def heavy(case):
    return case[1] * case[2] > 1 << 24  # seconds each


# Several covers, of which only the first keeps its heavy cases.
CASES = pairwise(AXES, 0) + [case for seed in range(1, 5) for case in pairwise(AXES, seed) if not heavy(case)]


def test_the_cases_cover_every_pair():
    pairs = {(i, case[i], j, case[j]) for case in CASES for i in range(len(AXES)) for j in range(i)}
    assert len(pairs) == sum(len(AXES[i]) * len(AXES[j]) for i in range(len(AXES)) for j in range(i))


@pytest.mark.parametrize("selection", ["jumprelu", "topk"])
@pytest.mark.parametrize("case", sorted(set(CASES), key=str), ids=lambda case: "-".join(map(str, case)))
def test_transcode_equals_the_oracle(case, selection):
    tokens, d_model, width, fraction, dtype, layout = case
    d_new = {1: 1, 128: 7, 1000: 130, 16384: 128}[width]
    x, base, delta = make_case(tokens, d_model, width, d_new, fraction, dtype, layout)
    ks = (None, None) if selection == "jumprelu" else (max(1, width // 9), max(1, d_new // 2))
    found = transcode_stats(x, base, delta, 0.7, *ks)
    recon, stats = numpy_oracle(x, base, delta, 0.7, *ks)
    assert_close(found.recon, recon, ops.transcode_ref(x, base, delta, 0.7, *ks))
    for got, wanted, exact in zip(found[1:], stats, (True, False, True, False), strict=True):
        assert got.dtype == FLOAT32
        np.testing.assert_allclose(got.numpy(), wanted, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
    assert torch.equal(transcode(x, base, delta, 0.7, *ks), found.recon)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16])
@pytest.mark.parametrize("kernel", ["generic", "avx2", "avx512", "avx512vnni", "avx512bf16"])
def test_every_instruction_set_equals_the_oracle(kernel, dtype, monkeypatch):
    monkeypatch.setenv("DELTATC_CPU_KERNEL", kernel)
    try:
        assert ops.build_info()["cpu"][0] == kernel
    except RuntimeError as error:
        assert "DELTATC_CPU_KERNEL" in str(error)
        pytest.skip(f"this CPU has no {kernel}")
    for tokens, d_model, width in ((1, 300, 256), (3, 48, 37), (29, 67, 523)):
        x, base, delta = make_case(tokens, d_model, width, 33, 0.3, dtype)
        recon, _ = numpy_oracle(x, base, delta, 1.5, 40 if width == 523 else None, 5)
        assert_close(transcode(x, base, delta, 1.5, 40 if width == 523 else None, 5), recon)


def test_long_sums_stay_as_accurate_as_the_eager_twin():
    x, base, _ = make_case(2, 64, 16384, 1, 1.0, FLOAT32)
    wide = as_double(base)
    oracle = (x.double() @ wide.W_enc + wide.b_enc) @ wide.W_dec + wide.b_dec
    assert_close(transcode(x, base), oracle.numpy(), ops.transcode_ref(x, base))


def test_encode_and_decode_are_the_definition():
    x, base, _ = make_case(7, 8, 30, 1, 0.5, FLOAT64)
    for k in (None, 3):
        recon, acts = numpy_part(x.numpy(), base, k)
        np.testing.assert_allclose(ops.encode(x, base, k).numpy(), acts, atol=1e-13)
        np.testing.assert_allclose(ops.decode(ops.encode(x, base, k), base).numpy(), recon, atol=1e-13)


def identity_part(values, thresholds, dtype=FLOAT32):
    """For x = [1]: the pre_acts are `values`, and latent j writes 2**j, so recon tells which were active."""
    n = len(values)
    writes = torch.tensor([[2.0**j] for j in range(n)], dtype=dtype)
    zeros = torch.zeros(n, dtype=dtype)
    pre_acts, threshold = torch.tensor([values], dtype=dtype), torch.tensor(thresholds, dtype=dtype)
    return Weights(pre_acts, zeros, threshold, writes, torch.zeros(1, dtype=dtype))


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16])
def test_threshold_is_strict_and_a_negative_one_acts_as_zero(dtype):
    x = torch.ones(1, 1, dtype=dtype)
    above = float(torch.nextafter(torch.tensor(1.0, dtype=dtype), torch.tensor(2.0, dtype=dtype)))
    #                     at threshold, just above, negative pre, zero pre, just positive
    part = identity_part([1.0, above, -0.5, 0.0, 0.25], [1.0, 1.0, -1.0, -1.0, -1.0], dtype)
    found = transcode_stats(x, part, part)
    assert found.l0_base.tolist() == [2] and found.l0_delta.tolist() == [2]
    assert found.recon.item() == pytest.approx(2 * (above * 2 + 0.25 * 16), rel=1e-2)
    assert (ops.encode(x, part)[0] != 0).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("k, kept", [(1, [1]), (2, [1, 3]), (4, [0, 1, 3, 4]), (6, [0, 1, 3, 4, 5])])
def test_topk_breaks_ties_by_the_lower_index(k, kept):
    x = torch.ones(1, 1)
    part = identity_part([1.0, 2.0, -3.0, 2.0, 2.0, 1.0], [0.5] * 6)
    wanted = sum(part.W_enc[0, j].item() * 2.0**j for j in kept)
    assert transcode(x, part, k_base=k).item() == wanted
    assert transcode(x, part, part, 10.0, k_base=k, k_delta=1).item() == wanted + 10 * 2.0 * 2  # apart
    assert ops.transcode_ref(x, part, k_base=k).item() == wanted


def test_topk_keeps_ties_by_index_across_panels():
    width = 1000
    zeros, writes = torch.zeros(width), torch.arange(width).float()[:, None]
    part = Weights(torch.ones(1, width), zeros, zeros, writes, torch.zeros(1))
    for k in (1, 5, 300, 999):
        assert transcode(torch.ones(1, 1), part, k_base=k).item() == k * (k - 1) / 2


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ks", [(None, None), (5, 2)])
def test_a_non_finite_row_is_nan_and_changes_no_other(dtype, bad, ks):
    x, base, delta = make_case(40, 48, 300, 9, 0.2, dtype)
    before = transcode_stats(x, base, delta, 0.5, *ks)
    x[13, 7], x[39, 0] = bad, bad
    after = transcode_stats(x, base, delta, 0.5, *ks)
    others = [row for row in range(40) if row not in (13, 39)]
    for old, new in zip(before, after, strict=True):
        assert new[[13, 39]].isnan().all() and torch.equal(old[others], new[others])
    assert ops.encode(x, base)[[13, 39]].isnan().all()


def test_a_pre_act_that_overflows_is_nan_and_the_delta_s_only_where_alpha_uses_it():
    x, base, delta = make_case(5, 8, 20, 4, 0.5, FLOAT32)
    delta.W_enc[0, 1] = 3e38
    x[:, 0] = 0.0
    x[2, 0] = -10.0
    assert transcode(x, base, delta).isnan().any(-1).tolist() == [False, False, True, False, False]
    unused = transcode_stats(x, base, delta, 0.0)
    assert torch.equal(transcode(x, base, delta, 0.0), transcode(x, base))
    assert torch.equal(unused.recon, transcode(x, base)) and unused.l1_delta.isnan().tolist()[1:3] == [
        False,
        True,
    ]
    assert transcode(x, delta)[2].isnan().all()


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16])
@pytest.mark.parametrize("ks", [(None, None), (9, 3)])
def test_alpha_zero_is_the_base_bit_for_bit_and_the_base_ignores_the_delta(dtype, ks):
    x, base, delta = make_case(33, 48, 300, 40, 0.2, dtype)
    alone = transcode_stats(x, base, None, 1.0, ks[0])
    for alpha in (0, -0.0, torch.tensor(0.0), torch.tensor(0.0, dtype=BFLOAT16)):
        found = transcode_stats(x, base, delta, alpha, *ks)
        assert torch.equal(found.recon, alone.recon) and torch.equal(found.l1_base, alone.l1_base)
        assert found.l1_delta.sum() > 0  # what the delta would add does not depend on alpha
    broken = delta._replace(b_dec=torch.full_like(delta.b_dec, torch.nan))
    assert torch.equal(transcode(x, base, broken, 0.0, *ks), alone.recon)
    assert torch.equal(transcode_stats(x, base, broken, 0.0, *ks).recon, alone.recon)
    silent = delta._replace(W_dec=torch.zeros_like(delta.W_dec), b_dec=torch.zeros_like(delta.b_dec))
    assert torch.equal(transcode(x, base, silent, 0.9, *ks), alone.recon)
    assert alone.l0_delta.sum() == 0


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16])
@pytest.mark.parametrize("ks", [(None, None), (9, 3)])
@pytest.mark.parametrize("tokens", [257, 1000])  # a block, and several
def test_a_row_depends_on_nothing_but_itself(dtype, ks, tokens):
    x, base, delta = make_case(tokens, 48, 300, 7, 0.6, dtype)
    whole = transcode(x, base, delta, 0.5, *ks)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(5))
    assert torch.equal(transcode(x[order], base, delta, 0.5, *ks), whole[order])
    assert torch.equal(torch.cat([transcode(row, base, delta, 0.5, *ks)[None] for row in x]), whole)
    assert torch.equal(transcode(x.view(1, tokens, 1, 48), base, delta, 0.5, *ks), whole.view(1, tokens, 1, 48))


def test_threads_do_not_change_a_bit():
    x, base, delta = make_case(1000, 48, 600, 40, 0.2, FLOAT32)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found += [transcode_stats(x, base, delta, 0.5), transcode_stats(x, base, delta, 0.5)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_in_place_updates_are_honoured():
    x, base, delta = make_case(9, 8, 30, 4, 0.5, FLOAT64)
    transcode(x, base, delta)
    for tensor in (*base, *delta):
        tensor.mul_(1.25).add_(0.01)
        assert_close(transcode(x, base, delta), numpy_oracle(x, base, delta)[0])


def test_packed_weights_are_kept_and_never_stale():
    x, base, delta = make_case(20, 8, 70, 4, 0.5, FLOAT32)
    kept = ops.packed(base.W_enc)
    transcode(x, base, delta)
    assert ops.packed(base.W_enc) is kept
    changes = (
        lambda W: W.mul_(1.25),
        lambda W: W[3].zero_(),
        lambda W: W.copy_(W.flip(1)),
        lambda W: W.resize_(8, 70).add_(0.1),
        lambda W: torch._foreach_add_([W], 0.5),
        lambda W: W.set_(torch.randn(8, 70)),
        lambda W: setattr(W, "data", torch.randn(8, 70)),
    )
    for change in changes:
        change(base.W_enc)
        assert_close(transcode(x, base, delta), numpy_oracle(x, base, delta)[0])
    learning = torch.nn.Parameter(base.W_enc.clone())
    with torch.no_grad():
        assert ops.packed(learning) is not ops.packed(learning)
    with torch.inference_mode():
        born_here = base._replace(W_enc=torch.randn(8, 70))
        transcode(x, born_here)
        born_here.W_enc.mul_(0.5)
        assert_close(transcode(x, born_here), numpy_oracle(x, born_here)[0])
    held = len(ops._PACKED)
    del kept, base, born_here, changes, change
    assert len(ops._PACKED) < held


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (8, 32), (65, 100), (0, 40), (6, 0)])
def test_pack_is_bit_exact(dtype, shape):
    W_enc = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = ops.packed(W_enc.mT.contiguous().mT).rows  # any strides
    of_line = 64 // W_enc.element_size()
    assert rows.shape == (shape[1], -(-shape[0] // of_line) * of_line)
    assert torch.equal(rows[:, : shape[0]], W_enc.mT) and not rows[:, shape[0] :].any()


def test_empty_shapes_and_an_empty_base():
    x, base, delta = make_case(4, 8, 30, 5, 0.5, FLOAT32)
    for shape in ((0, 8), (3, 0, 8), (0, 2, 8)):
        found = transcode_stats(x.new_zeros(shape), base, delta)
        assert found.recon.shape == shape and found.l0_delta.shape == shape[:-1]
    nothing = Weights(torch.zeros(8, 0), torch.zeros(0), torch.zeros(0), torch.zeros(0, 8), torch.zeros(8))
    assert torch.equal(transcode(x, nothing, delta), transcode(x, delta))
    x[1, 3] = torch.nan
    assert transcode(x, nothing).isnan().all(-1).tolist() == [False, True, False, False]
    assert transcode(x[0], base).shape == (8,)


def test_nothing_of_size_tokens_by_latents_is_held():
    """8,192 tokens x 16,384 latents would be 512 MiB; forward and backward need a fraction of it."""
    script = """
import resource, torch
from deltatc.ops import Weights, transcode
tokens, width, d_model = 8192, 16384, 4
def part(n):
    threshold = torch.full((n,), 4.0)
    W_enc, W_dec = torch.randn(d_model, n), torch.randn(n, d_model)
    return Weights(W_enc, torch.zeros(n), threshold, W_dec, torch.zeros(d_model))
x, base, delta = torch.randn(tokens, d_model, requires_grad=True), part(width), part(64)
transcode(x[:4], base, delta).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
transcode(x, base, delta).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(run.stdout) < 160 * 1024, f"grew by {int(run.stdout) // 1024} MiB"


ROOT = Path(__file__).parent.parent


def test_a_missing_library_is_one_sentence(tmp_path):
    (tmp_path / "deltatc").mkdir()
    for source in (ROOT / "deltatc").glob("*.py"):
        (tmp_path / "deltatc" / source.name).write_bytes(source.read_bytes())
    command = [sys.executable, "-c", "import deltatc.ops"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and "not built; run `make setup`" in run.stderr.splitlines()[-1]


def changed(part, **fields):
    return lambda case: {**case, part: case[part]._replace(**fields)}


def given(**fields):
    return lambda case: {**case, **fields}


def sized(*shape, dtype=FLOAT32, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16])
def test_skip_connection_and_error(dtype):
    x, base, delta = make_case(6, 8, 30, 4, 0.5, dtype)
    draw = torch.Generator().manual_seed(9)
    W_skip, mlp_out = (torch.randn(n, 8, generator=draw).to(dtype) for n in (8, 6))
    oracle = numpy_oracle(x, base, delta, 0.7)[0] + x.double().numpy() @ W_skip.double().numpy()
    eager = ops.transcode_ref(x, base, delta, 0.7) + x @ W_skip
    assert_close(transcode(x, base, delta, 0.7, W_skip=W_skip), oracle, eager)
    error = mlp_out.double().numpy() - oracle
    assert_close(transcode(x, base, delta, 0.7, W_skip=W_skip, mlp_out=mlp_out), error, mlp_out - eager)
    stats = transcode_stats(x, base, delta, 0.7, mlp_out=mlp_out)
    assert torch.equal(stats.recon, mlp_out - transcode(x, base, delta, 0.7))
    if dtype == FLOAT64:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, W_skip, mlp_out)]
        run = lambda x, W, out: transcode(x, base, delta, 0.7, W_skip=W, mlp_out=out)  # noqa: E731
        assert torch.autograd.gradcheck(run, leaves)


BAD = [  # the change in a good call (x [5, 8], base 30 wide, delta 4 wide), and words that must come back
    (given(x=3.0), "x is 3.0"),
    (given(x=torch.tensor(1.0)), "x is torch.float32 []"),
    (given(x=sized(5, 8, dtype=torch.float16)), "x is torch.float16"),
    (given(x=sized(5, 8, dtype=torch.int64)), "x is torch.int64"),
    (given(x=sized(5, 9)), "base.W_enc"),
    (given(x=sized(5, 8, dtype=FLOAT64)), "base.W_enc"),
    (given(x=sized(1 << 20, 1 << 12, 8, device="meta")), "x is on meta"),
    (given(base=None), "base is NoneType"),
    (given(base=(1, 2, 3)), "base is tuple"),
    (changed("base", W_enc=None), "base is Weights"),
    (changed("base", W_enc=sized(8)), "base.W_enc"),
    (changed("base", W_enc=sized(30, 8)), "base.W_enc"),
    (changed("base", b_enc=sized(29)), "base.b_enc"),
    (changed("base", b_enc=sized(1, 30)), "base.b_enc"),
    (changed("base", threshold=sized(1)), "base.threshold"),
    (changed("base", threshold=sized(30, dtype=FLOAT64)), "base.threshold"),
    (changed("base", W_dec=sized(8, 30)), "base.W_dec"),
    (changed("base", b_dec=sized(30)), "base.b_dec"),
    (changed("base", b_dec=sized(8, device="meta")), "base.b_dec is torch.float32 [8] on meta"),
    (changed("base", W_dec=torch.zeros(30, 8, requires_grad=True)), "base requires grad"),
    (changed("delta", W_enc=sized(7, 4)), "delta.W_enc"),
    (changed("delta", b_enc=sized(5)), "delta.b_enc"),
    (changed("delta", threshold=sized(4, dtype=BFLOAT16)), "delta.threshold"),
    (changed("delta", W_dec=sized(4, 9)), "delta.W_dec"),
    (changed("delta", b_dec=sized(1)), "delta.b_dec"),
    (given(alpha=torch.zeros(1)), "alpha is torch.float32 [1]"),
    (given(alpha=torch.tensor(1)), "alpha is torch.int64"),
    (given(alpha=float("nan")), "alpha = nan"),
    (given(alpha="1"), "alpha = '1'"),
    (given(k_base=0), "k_base = 0"),
    (given(k_base=31), "k_base = 31"),
    (given(k_base=2.0), "k_base = 2.0"),
    (given(k_base=True), "k_base = True"),
    (given(k_delta=5), "k_delta = 5"),
    (given(k_delta=-1), "k_delta = -1"),
    (given(delta=None, k_delta=2), "k_delta = 2"),
    (given(bandwidth=0.0), "bandwidth = 0.0"),
    (given(bandwidth=float("inf")), "bandwidth = inf"),
    (given(bandwidth=None), "bandwidth = None"),
    (given(W_skip=sized(8, 7)), "W_skip is torch.float32 [8, 7]"),
    (given(W_skip=3.0), "W_skip is 3.0"),
    (given(mlp_out=sized(5, 9)), "mlp_out is torch.float32 [5, 9]"),
    (given(mlp_out=sized(5, 8, dtype=BFLOAT16)), "mlp_out is torch.bfloat16"),
]


@pytest.mark.parametrize("change, words", BAD, ids=[f"{n}:{words}" for n, (_, words) in enumerate(BAD)])
def test_bad_arguments_are_named(change, words):
    x, base, delta = make_case(5, 8, 30, 4, 0.5, FLOAT32)
    good = {"x": x, "base": base, "delta": delta, "alpha": 1.0, "k_base": 3, "k_delta": 2, "bandwidth": 1e-3}
    transcode(**good)
    for operator in (transcode, transcode_stats):
        with pytest.raises(OpError, match=r"expected|pass the trainable part") as error:
            operator(**change(good))
        assert words in str(error.value)


def direct(case):
    delta = case["delta"] or (None,) * 5
    alpha = case["alpha"] if isinstance(case["alpha"], torch.Tensor) else torch.tensor(case["alpha"])
    rest = (alpha, case["k_base"], case["k_delta"], case["bandwidth"])
    return torch.ops.deltatc.transcode(case["x"], *case["base"], *delta, *rest)


# What the operator itself takes: meta tensors (no data), NaN, what converts, a base that requires grad. It has neither
# W_skip nor mlp_out.
TAKEN = ("on meta", "alpha = nan", "alpha is torch.int64", "k_base = True", "base requires grad")
RUNTIME_BAD = [n for n, (_, w) in enumerate(BAD) if not w.endswith(TAKEN) and not w.startswith(("W_skip", "mlp_out"))]


@pytest.mark.parametrize("number", RUNTIME_BAD)
def test_a_direct_call_of_the_operator_raises_and_never_crashes(number):
    x, base, delta = make_case(5, 8, 30, 4, 0.5, FLOAT32)
    good = {"x": x, "base": base, "delta": delta, "alpha": 1.0, "k_base": 3, "k_delta": 2, "bandwidth": 1e-3}
    direct(good)
    bad = BAD[number][0](good)
    with pytest.raises((OpError, RuntimeError, TypeError, NotImplementedError)):
        direct(bad)


def test_a_direct_call_with_part_of_a_delta_raises():
    x, base, delta = make_case(5, 8, 30, 4, 0.5, FLOAT32)
    with pytest.raises(RuntimeError, match="all five or none"):
        torch.ops.deltatc.transcode(x, *base, *delta[:4], None, torch.tensor(1.0), None, None, 1e-3)


def test_build_info_says_what_was_built():
    info = ops.build_info()
    assert set(info) == {"cuda", "archs", "nvcc", "cpu"}
    with_cuda = shutil.which("nvcc") is not None and os.environ.get("DELTATC_CUDA") != "0"
    assert info["cuda"] == with_cuda and bool(info["archs"]) == with_cuda and bool(info["nvcc"]) == with_cuda
    assert "generic" in info["cpu"] and os.environ.get("DELTATC_CPU_KERNEL") in (None, info["cpu"][0])


@pytest.mark.parametrize("shape", [(0, 8), (3, 5, 8), (8,)])
def test_plain_definition_for_devices_without_a_kernel_equals_the_kernel(shape, monkeypatch):
    monkeypatch.setattr(ops, "PLAIN_ELEMENTS", 64)  # so that several chunks are needed
    draw = torch.Generator().manual_seed(0)
    base, delta = (
        ops.Weights(
            *(torch.randn(size, generator=draw, dtype=torch.float64) for size in ((8, n), (n,), (n,), (n, 8), (8,)))
        )
        for n in (30, 5)
    )
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    arguments = (x, *base, *delta, torch.tensor(0.7, dtype=torch.float64), None, 3, 1e-3)
    wanted = torch.ops.deltatc.transcode_stats(*arguments)
    for found, expected in zip(ops.plain_stats(*arguments), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
