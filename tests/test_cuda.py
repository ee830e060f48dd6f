"""The CUDA kernels without a GPU: the very same source, compiled for the CPU against cuda_shim/shim.h, on CPU tensors.

csrc/cuda/binding.cpp registers it as torch.ops.deltatc_shim. What a GPU alone can show (speed, that two blocks at once
do not race in global memory) is benchmarks/gpu.sh.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from deltatc import ops, ops_sparse
from deltatc.ops import Weights
from deltatc.ops_ref import part_gradients, transcode_stats_ref
from deltatc.ops_sparse import SparseActs
from tests.test_ops import BFLOAT16, as_double, assert_close, make_case, make_part, numpy_oracle, numpy_part
from tests.test_ops_sparse import check_form, dense

ROOT = Path(__file__).parent.parent
SHIM = ROOT / "tests/cuda_shim"
TORCH = Path(torch.__file__).parent
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(folder, *flags):
    """Compile csrc/cuda/ against the shim, two files at a time, into folder/shim.so."""
    common = ["g++", "-x", "c++", "-std=c++17", "-O1", "-g", "-fPIC", "-DDELTATC_HOST_SHIM", f"-I{SHIM}", *flags]
    binding = [f"-I{TORCH}/include", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]

    def compiled(source):
        target = folder / f"{source.name}.o"
        extra = binding if source.suffix == ".cpp" else []
        subprocess.run([*common, *extra, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sorted((ROOT / "csrc/cuda").glob("*.c[up]*"))))
    library = folder / "shim.so"
    link = ["-shared", "-o", str(library), f"-L{TORCH}/lib", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run(["g++", *flags, *objects, *link], check=True)
    return library


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    torch.ops.load_library(build(tmp_path_factory.mktemp("shim")))
    return torch.ops.deltatc_shim


@pytest.fixture
def schedule(monkeypatch):
    return lambda number: monkeypatch.setenv("DELTATC_SCHEDULE", str(number))


def forward(kernels, x, base, delta=None, alpha=0.7, k_base=None, k_delta=None):
    def packed(part):
        return part.W_enc.t().contiguous(), None

    rest = (None,) * 6 if delta is None else (*packed(delta), *delta[1:])
    scale = torch.tensor(alpha, dtype=torch.float64)
    return kernels.transcode_packed(x, *packed(base), *base[1:], *rest, scale, k_base, k_delta, True)


def check(found, x, base, delta, alpha=0.7, k_base=None, k_delta=None):
    recon, stats = numpy_oracle(x, base, delta, alpha, k_base, k_delta)
    eager = transcode_stats_ref(x, base, delta, alpha, k_base, k_delta).recon
    assert_close(found[0], recon, eager)
    for stat, wanted in zip(found[1:], stats, strict=True):
        torch.testing.assert_close(stat.double(), torch.as_tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-4)


# tokens, d_model, latents, d_new, active fraction, strides, k's
CASES = [
    (1, 8, 1, 1, 1.0, "contiguous", ()),
    (3, 48, 1000, 5, 0.05, "sliced", ()),
    (16, 264, 128, 33, 0.5, "transposed", (20, 5)),
    (1, 2304, 300, 16, 0.05, "contiguous", ()),
    (5, 64, 300, 16, 0.0, "contiguous", (1, 1)),
    (17, 8, 128, 1, 0.05, "contiguous", ()),
    (64, 48, 1000, 130, 0.05, "transposed", ()),
    (130, 72, 129, 20, 0.5, "sliced", ()),
    (257, 8, 300, 5, 0.05, "contiguous", (3, 1)),
    (64, 40, 1000, 40, 1.0, "contiguous", (64, 30)),
    (18, 2304, 200, 3, 0.05, "contiguous", (1, 3)),
    (64, 16, 1, 1, 0.0, "contiguous", ()),
    (33, 300 * 8, 140, 8, 0.05, "contiguous", ()),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_equals_the_oracle(kernels, case):
    *shape, layout, ks = case
    x, base, delta = make_case(*shape, BFLOAT16, layout, seed=sum(shape[:4]))
    check(forward(kernels, x, base, delta, 0.7, *ks), x, base, delta, 0.7, *ks)


def test_many_acts_go_through_matrix_products_and_too_many_through_all_latents(kernels):
    """More than a 72nd of the latents: dense_kernel. More than a list holds: the latents are encoded again."""
    # The last two: more than kMaxKeys in generation.
    for tokens, width, d_new in ((20, 1500, 6), (20, 4400, 6), (2, 4400, 6), (2, 6, 4400)):
        x, base, delta = make_case(tokens, 8, width, d_new, 1.0, BFLOAT16, seed=width)
        check(forward(kernels, x, base, delta, -1.3), x, base, delta, -1.3)


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("n, width", [(144, 144), (8, 720)])
def test_acts_are_not_rounded_before_they_are_decoded(kernels, tokens, n, width):
    """Acts of 1 + 2^-9 and of 1, with opposite signs: in bfloat16 all would be 1. By matrix products, or row by row."""
    x = torch.tensor([1, 2**-9, 0, 0, 0, 0, 0, 0]).repeat(tokens, 1).to(BFLOAT16)
    W_enc, W_dec = torch.zeros(8, width), torch.ones(width, 8)
    W_enc[0, :n], W_enc[1, :n:2], W_dec[1::2] = 1, 1, -1
    none = torch.zeros(width, dtype=BFLOAT16)
    recon = forward(kernels, x, Weights(W_enc.to(BFLOAT16), none, none, W_dec.to(BFLOAT16), none[:8]))[0]
    assert (recon == n / 2 * 2**-9).all()


def test_more_tokens_than_a_chunk(kernels):
    x, base, delta = make_case(4100, 8, 20, 3, 0.3, BFLOAT16)
    check(forward(kernels, x, base, delta), x, base, delta)
    check_acts(encode(kernels, x, base), x, base)


@pytest.mark.parametrize("tokens", [12, 40])
@pytest.mark.parametrize("ks", [(), (6, 2)])
def test_every_schedule_gives_the_same_bits(kernels, schedule, tokens, ks):
    x, base, delta = make_case(tokens, 32, 400, 40, 0.05, BFLOAT16)
    x[9, 3] = torch.inf  # in generation it meets no barrier of the selection
    wanted = forward(kernels, x, base, delta, 0.7, *ks)
    for number in range(1, 8):
        schedule(number)
        found = forward(kernels, x, base, delta, 0.7, *ks)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_row_is_nan_and_changes_no_other(kernels, tokens, bad):
    x, base, delta = make_case(tokens, 16, 200, 20, 0.3, BFLOAT16)
    clean = forward(kernels, x, base, delta)
    x[2, 5] = bad
    found = forward(kernels, x, base, delta)
    others = torch.arange(tokens) != 2
    for stat, before in zip(found, clean, strict=True):
        assert stat[2].isnan().all() and torch.equal(stat[others], before[others])


@pytest.mark.parametrize("fraction", [0.005, 0.3])
@pytest.mark.parametrize("tokens", [4, 40])
def test_alpha_zero_is_the_base_bit_for_bit_and_its_delta_still_counted(kernels, tokens, fraction):
    x, base, delta = make_case(tokens, 16, 200, 20, fraction, BFLOAT16)
    alone, off, on = (forward(kernels, x, base), *(forward(kernels, x, base, delta, alpha) for alpha in (0.0, 1.0)))
    assert torch.equal(alone[0], off[0]) and torch.equal(off[3], on[3]) and torch.equal(off[4], on[4])
    assert not torch.equal(on[0], off[0]) and (alone[3] == 0).all()
    delta.b_enc[3] = torch.inf  # spoils the delta's part alone
    assert torch.equal(forward(kernels, x, base, delta, 0.0)[0], alone[0])
    assert forward(kernels, x, base, delta, 1.0)[0].isnan().all()


@pytest.mark.parametrize("tokens", [2, 20])
def test_thresholds_are_strict_and_ties_go_to_the_lower_index(kernels, tokens):
    """Identity encoders: pre_acts are x itself, and recon shows which latents were kept."""
    x = torch.tensor([3.0, 2.0, 2.0, 2.0, 0.0, -1.0, 1.0, 2.0]).repeat(tokens, 1).to(BFLOAT16)
    eye, zeros = torch.eye(8).to(BFLOAT16), torch.zeros(8).to(BFLOAT16)
    thresholds = torch.tensor([3.0, 1.5, 2.0, -1.0, -1.0, -5.0, 1.0, 1.9]).to(BFLOAT16)
    found = forward(kernels, x, Weights(eye, zeros, thresholds, eye, zeros))
    assert found[0].tolist() == [[0.0, 2.0, 0.0, 2.0, 0.0, 0.0, 0.0, 2.0]] * tokens
    assert found[1].tolist() == [3.0] * tokens and found[2].tolist() == [6.0] * tokens
    thresholds[1] = torch.nan  # never active
    found = forward(kernels, x, Weights(eye, zeros, thresholds, eye, zeros))
    assert found[0].tolist() == [[0.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 2.0]] * tokens
    kept = forward(kernels, x, Weights(eye, zeros, zeros, eye, zeros), None, 1.0, 3)[0]
    assert kept.tolist() == [[3.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]] * tokens


def test_ties_across_panels_and_lists(kernels):
    """600 equal pre_acts and k 5: latents 0 to 4, in whichever panel, list or thread they are."""
    for tokens in (3, 20):
        x = torch.ones(tokens, 8, dtype=BFLOAT16)
        W_dec = torch.zeros(600, 8, dtype=BFLOAT16)
        W_dec[:5, 0] = torch.tensor([1, 2, 4, 8, 16]).to(BFLOAT16)
        W_dec[5:, 1] = 1
        W_enc, none = torch.ones(8, 600, dtype=BFLOAT16), torch.zeros(600, dtype=BFLOAT16)
        base = Weights(W_enc, none, none, W_dec, torch.zeros(8, dtype=BFLOAT16))
        assert forward(kernels, x, base, None, 1.0, 5)[0][:, :2].tolist() == [[8.0 * 31, 0.0]] * tokens


@pytest.mark.parametrize("ks", [(), (6, 2)])
def test_a_row_depends_on_nothing_but_itself(kernels, ks):
    x, base, delta = make_case(300, 16, 300, 20, 0.3, BFLOAT16)
    whole = forward(kernels, x, base, delta, 0.7, *ks)
    for rows in (slice(0, 20), slice(130, 299)):
        for stat, part in zip(whole, forward(kernels, x[rows], base, delta, 0.7, *ks), strict=True):
            assert torch.equal(stat[rows], part)


def test_nothing_of_size_tokens_by_latents_is_in_the_workspace(kernels):
    """At most a tenth (16k) and a twentieth (65k) of what the eager chain holds: pre_acts and acts in bfloat16."""
    for width, d_new, part in ((16384, 128, 10), (65536, 1024, 20)):
        for k in (None, 64):
            eager = 2 * 2 * 32768 * (width + d_new)
            assert kernels.workspace(32768, 2304, width, d_new, k) * part <= eager
            assert kernels.workspace(10**8, 2304, width, d_new, k) == kernels.workspace(4096, 2304, width, d_new, k)


def test_empty_and_unfit_inputs(kernels):
    x, base, delta = make_case(4, 8, 30, 5, 0.5, BFLOAT16)
    found = forward(kernels, x.new_zeros(2, 0, 8), base, delta)
    assert found[0].shape == (2, 0, 8) and found[1].shape == (2, 0)
    assert forward(kernels, x[0], base, delta)[0].shape == (8,)
    nothing = Weights(x.new_zeros(8, 0), x.new_zeros(0), x.new_zeros(0), x.new_zeros(0, 8), base.b_dec)
    assert torch.equal(forward(kernels, x, nothing)[0], base.b_dec.expand(4, 8))
    for wrong in (x[:, :4], x.float(), x.new_zeros(())):
        with pytest.raises(RuntimeError, match=r"x |rows"):
            forward(kernels, wrong, base, delta)
    with pytest.raises(RuntimeError, match="k_base = 31"):
        forward(kernels, x, base, delta, 1.0, 31)


BACKWARD = [(1, 8, 1), (3, 48, 33), (64, 64, 32), (130, 72, 130), (300, 16, 5), (2100, 24, 7)]


def gradient_case(tokens, d_model, d_new):
    x, *_ = make_case(tokens, d_model, 1, 1, 0.5, BFLOAT16, seed=tokens)
    grad = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(5)).to(BFLOAT16)
    return x, grad, make_part(d_model, d_new, x, 0.4, 7)


def gradients(kernels, grad, x, delta, alpha=0.7, bandwidth=0.5, needed=63):
    packed = delta.W_enc.t().contiguous()
    return kernels.delta_backward(grad, x, packed, *delta[1:], torch.tensor(alpha), bandwidth, needed)


@pytest.mark.parametrize("shape", BACKWARD, ids=str)
def test_gradients_equal_those_in_double(kernels, shape):
    x, grad, delta = gradient_case(*shape)

    def plain(dtype):
        weights = Weights(*(tensor.to(dtype) for tensor in delta))
        alpha = torch.tensor(0.7, dtype=dtype)
        return part_gradients(x.to(dtype), grad.to(dtype), weights, alpha, None, 0.5, [False] + [True] * 6)[1:]

    rows = zip(gradients(kernels, grad, x, delta), plain(torch.float64), plain(BFLOAT16), strict=True)
    for number, (found, wanted, eager) in enumerate(rows):
        scale = wanted.abs().max().item()
        error, usual = ((t.double() - wanted).abs().max().item() for t in (found, eager))
        assert error <= 3 * usual + 4e-3 * scale, (number, error, usual, scale)


def test_gradients_at_the_threshold_and_at_the_ends_of_its_window(kernels):
    """pre_acts are x itself, and everything is exact."""
    x = torch.tensor([0.75, 0.875, 1.0, 1.125, 1.25, 1.5, -1.0, 0.0]).repeat(3, 1).to(BFLOAT16)
    eye, zeros = torch.eye(8).to(BFLOAT16), torch.zeros(8).to(BFLOAT16)
    delta = Weights(eye, zeros, zeros + 1, eye, zeros)
    found = gradients(kernels, torch.ones_like(x), x, delta, 1.0, 0.5)
    x, one = x.double(), torch.tensor(1.0, dtype=torch.float64)
    wanted = part_gradients(x, torch.ones_like(x), as_double(delta), one, None, 0.5, [False] + [True] * 6)[1:]
    assert all(torch.equal(f.double(), w) for f, w in zip(found, wanted, strict=True))


def test_gradients_are_the_same_in_every_schedule_and_alone(kernels, schedule):
    x, grad, delta = gradient_case(300, 16, 40)
    wanted = gradients(kernels, grad, x, delta)
    for i in range(6):
        alone = gradients(kernels, grad, x, delta, needed=1 << i)
        assert torch.equal(alone[i], wanted[i]) and all(t.numel() == 0 for j, t in enumerate(alone) if j != i)
    for number in (1, 2, 3):
        schedule(number)
        assert all(map(torch.equal, gradients(kernels, grad, x, delta), wanted))
    assert all((t == 0).all() for t in gradients(kernels, grad[:0], x[:0], delta))


def encode(kernels, x, part, k=None, capacity=None):
    """JumpReLU, or with k TopK."""
    threshold = part.threshold if k is None else torch.zeros_like(part.threshold)
    arguments = (x, part.W_enc.t().contiguous(), None, part.b_enc, threshold, k, k or capacity)
    return SparseActs(*kernels.encode_packed(*arguments))


def decode(kernels, acts, base, more=None, delta=None, alpha=0.7):
    rest = (None,) * 5 if more is None else (*more, *delta[3:])
    return kernels.decode_acts(*acts, *base[3:], *rest, torch.tensor(alpha, dtype=torch.float64))


def assert_rounded(found, wanted):
    """In bfloat16 the nearest of `wanted`, but for float32's errors."""
    bound = 2**-8 * wanted.abs() + 1e-5 * wanted.abs().max() if wanted.numel() else 0
    assert found.shape == wanted.shape and ((found.double() - wanted).abs() <= bound).all()


def check_acts(acts, x, part, k=None):
    """The same latents as in float64, and their values."""
    if k is not None:
        part = part._replace(threshold=torch.zeros_like(part.threshold))
    wanted = torch.from_numpy(numpy_part(x.double().numpy(), as_double(part), k)[1])
    check_form(acts)
    found = dense(acts, wanted.shape[1])
    assert torch.equal(found > 0, wanted > 0) and acts.counts.tolist() == (wanted > 0).sum(1).tolist()
    assert acts.values.shape[1] == (k or int(acts.counts.max()))
    assert_rounded(found, wanted)


# tokens, d_model, latents, active fraction, strides, k
SPARSE = [
    (1, 8, 1, 1.0, "contiguous", 1),
    (3, 48, 1000, 0.05, "sliced", 40),
    (16, 2304, 129, 0.5, "transposed", 7),
    (17, 72, 128, 0.0, "contiguous", 128),
    (64, 8, 1000, 1.0, "sliced", 1),
    (130, 72, 129, 0.5, "transposed", 64),
    (257, 48, 128, 0.05, "contiguous", 3),
]


@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_encode_and_decode_equal_the_oracle(kernels, case):
    *shape, fraction, layout, k = case
    x, base, delta = make_case(*shape, 20, fraction, BFLOAT16, layout, seed=shape[0])
    more = encode(kernels, x, delta)
    for limit in (None, k):
        acts = encode(kernels, x, base, limit)
        check_acts(acts, x, base, limit)
        parts = [dense(a, a_part.b_enc.numel()) @ a_part.W_dec.double() + a_part.b_dec.double()
                 for a, a_part in ((acts, base), (more, delta))]  # fmt: skip
        assert_rounded(decode(kernels, acts, base), parts[0])
        found = decode(kernels, acts, base, more, delta)
        assert_rounded(found, parts[0] + 0.7 * parts[1])
        assert_close(found, numpy_oracle(x, base, delta, 0.7, limit)[0] if limit is None else found.double().numpy())
        assert torch.equal(decode(kernels, acts, base, more, delta, 0.0), decode(kernels, acts, base))


def test_topk_through_several_panels_of_one_list(kernels):
    """513 tokens have two lists each, of three panels: the k-th largest so far is the gate of the next panel."""
    x, base, _ = make_case(513, 8, 700, 1, 0.5, BFLOAT16)
    check_acts(encode(kernels, x, base, 20), x, base, 20)
    x[:] = torch.tensor([1, 2**-9, 0, 0, 0, 0, 0, 0])
    base.W_enc.zero_(), base.b_enc.zero_()
    base.W_enc[0, :384] = 1
    base.W_enc[0, [7, 50, 90, 300, 301]] = torch.tensor([5.0, 4.0, 3.0, 3.0, 3.0]).to(BFLOAT16)
    base.W_enc[1, 300] = 1  # 3 + 2^-9 is above the gate 3, another 3 is not
    assert (encode(kernels, x, base, 3).indices == torch.tensor([7, 50, 300])).all()


def check_broken(acts, rows):
    """One act, NaN at latent 0, and zeros behind it."""
    for row in rows:
        assert acts.counts[row] == 1 and acts.values[row, 0].isnan() and acts.indices[row, 0] == 0
        assert (acts.values[row, 1:] == 0).all() and (acts.indices[row, 1:] == 0).all()


def test_encode_where_lists_overflow_and_decode_of_many_acts(kernels, schedule):
    """Rows with all, every other and no latent active, and some that are not finite: of 1400, in lists of 204 each."""
    W_enc = torch.randn(16, 1400, generator=torch.Generator().manual_seed(1)).abs().to(BFLOAT16)
    none, weights = torch.zeros(1400, dtype=BFLOAT16), torch.randn(1400, 16).to(BFLOAT16)
    base = Weights(W_enc, none, none, weights, none[:16])
    base.W_enc[0, ::2] *= -1
    base.W_enc[:, 10] = 0  # pre_acts of exactly the threshold
    x = torch.ones(6, 16).to(BFLOAT16)
    x[:, 0] = 0
    x[1, 1:], x[1, 0], x[2] = 0, 1, -x[2]  # the first row's last list overflows before the second's first
    acts = encode(kernels, x, base)
    assert acts.counts.tolist() == [1399, 700, 0] + [1399] * 3 and acts.values.shape == (6, 1399)
    check_acts(acts, x, base)
    recon = decode(kernels, acts, base)
    assert_rounded(recon, dense(acts, 1400) @ weights.double())
    for number in (1, 2, 3):
        schedule(number)
        assert all(map(torch.equal, encode(kernels, x[:3], base), (t[:3] for t in acts)))
        assert torch.equal(decode(kernels, acts, base), recon)
    x[3, 5], x[4, 5] = torch.inf, torch.nan
    spoiled = encode(kernels, x, base)
    check_broken(spoiled, [3, 4])
    assert torch.equal(decode(kernels, spoiled, base)[:3], decode(kernels, encode(kernels, x[:3], base), base))
    assert decode(kernels, spoiled, base)[3:5].isnan().all()
    base.W_enc.fill_(1)
    x[:, :10] = torch.tensor([-3e38] + [0] * 7 + [3e38, 1e38]).to(BFLOAT16)
    check_broken(encode(kernels, x, base, None, 1400), range(6))  # finite sums in order, but not in the other one


@pytest.mark.parametrize("k", [None, 6])
def test_encode_and_decode_of_a_row_depend_on_nothing_but_itself(kernels, schedule, k):
    x, base, delta = make_case(140, 32, 300, 40, 0.2, BFLOAT16)
    acts, more = encode(kernels, x, base, k), encode(kernels, x, delta)
    recon = decode(kernels, acts, base, more, delta)
    few = slice(100, 117)
    part = encode(kernels, x[few], base, k, acts.values.shape[1])
    assert all(torch.equal(a, b[few]) for a, b in zip(part, acts, strict=True))
    for number in range(1, 8):
        schedule(number)
        assert all(map(torch.equal, encode(kernels, x[few], base, k, acts.values.shape[1]), part)), number
        again = decode(kernels, part, base, SparseActs(*(t[few] for t in more)), delta)
        assert torch.equal(again, recon[few]), number
    x[105, 3] = torch.inf
    broken = encode(kernels, x[few], base, k, acts.values.shape[1])
    check_broken(broken, [5])
    others = torch.arange(17) != 5
    assert all(torch.equal(a[others], b[others]) for a, b in zip(broken, part, strict=True))


def test_encode_of_ties_and_thresholds(kernels):
    x = torch.tensor([3.0, 2.0, 2.0, 2.0, 0.0, -1.0, 1.0, 2.0]).repeat(20, 1).to(BFLOAT16)
    eye, zeros = torch.eye(8).to(BFLOAT16), torch.zeros(8).to(BFLOAT16)
    thresholds = torch.tensor([3.0, 1.5, 2.0, -1.0, -1.0, -5.0, 1.0, 1.9]).to(BFLOAT16)
    found = encode(kernels, x, Weights(eye, zeros, thresholds, eye, zeros), None, 5)
    assert found.indices.tolist() == [[1, 3, 7, 0, 0]] * 20 and found.values.tolist() == [[2.0] * 3 + [0.0] * 2] * 20
    assert encode(kernels, x, Weights(eye, zeros, zeros, eye, zeros), 3).indices.tolist() == [[0, 1, 2]] * 20
    W_enc, none = torch.ones(8, 2700, dtype=BFLOAT16), torch.zeros(2700, dtype=BFLOAT16)
    equal = encode(kernels, torch.ones_like(x), Weights(W_enc, none, none, W_enc.T, zeros), 5)
    assert equal.indices.tolist() == [[0, 1, 2, 3, 4]] * 20 and equal.counts.tolist() == [5] * 20


def test_capacity_is_a_limit_of_encode(kernels):
    x, base, _ = make_case(20, 8, 60, 1, 0.5, BFLOAT16)
    free = encode(kernels, x, base)
    largest = int(free.counts.max())
    wide = encode(kernels, x, base, None, largest + 3)
    assert all(map(torch.equal, free, encode(kernels, x, base, None, largest)))
    assert torch.equal(wide.values[:, :largest], free.values) and (wide.values[:, largest:] == 0).all()
    for capacity, words in ((largest - 1, f"has {largest} active latents, over capacity = {largest - 1}; raise"),
                            (-1, "capacity = -1")):  # fmt: skip
        with pytest.raises(RuntimeError, match=words):
            encode(kernels, x, base, None, capacity)
    with pytest.raises(RuntimeError, match="k = 61"):
        encode(kernels, x, base, 61)


def test_decode_reads_what_counts_say_and_refuses_what_leads_outside(kernels):
    """1100 acts are more than a piece; a bad one is found wherever it is, but behind a count nothing is looked at."""
    x, base, delta = make_case(33, 24, 1100, 9, 0.5, BFLOAT16)
    draw = torch.Generator().manual_seed(2)
    values = torch.rand(33, 1100, generator=draw).to(BFLOAT16)
    acts = SparseActs(values, torch.arange(1100, dtype=torch.int32).repeat(33, 1), torch.full((33,), 1100).int())
    acts.counts[1:] = torch.arange(1024 - 16, 1024 + 16)
    real = torch.arange(1100) < acts.counts[:, None]
    wanted = torch.where(real, values.double(), 0) @ base.W_dec.double() + base.b_dec.double()
    found = decode(kernels, acts, base)
    assert_rounded(found, wanted)
    garbage = SparseActs(values.where(real, torch.nan), acts.indices.where(real, 10**9), acts.counts)
    assert torch.equal(decode(kernels, garbage, base), found)
    more = encode(kernels, x, delta)
    for prefix, given in (("", acts), ("delta_", more)):
        capacity, width = given.values.shape[1], (base if prefix == "" else delta).b_enc.numel()
        counts = given.counts.clone()
        counts[32] = capacity
        for field, value in (("counts", -1), ("counts", capacity + 1), ("indices", -1), ("indices", width)):
            spoiled = SparseActs(given.values, given.indices.clone(), counts.clone())
            getattr(spoiled, field)[(32, -1)[: 1 + (field == "indices")]] = value
            pair = (spoiled, more) if prefix == "" else (acts, spoiled)
            for alpha in (0.0, 1.0):
                with pytest.raises(RuntimeError, match=f"{prefix}{field} holds {value}; expected 0 to "):
                    decode(kernels, pair[0], base, pair[1], delta, alpha)


def test_encode_and_decode_of_empty_and_unfit_inputs(kernels):
    x, base, delta = make_case(4, 8, 30, 5, 0.5, BFLOAT16)
    acts = encode(kernels, x, base)
    for k, capacity, width in ((None, None, 0), (None, 9, 9), (3, None, 3)):
        none = encode(kernels, x.new_zeros(2, 0, 8), base, k, capacity)
        assert none.values.shape == none.indices.shape == (2, 0, width) and none.counts.shape == (2, 0)
        assert decode(kernels, none, base).shape == (2, 0, 8)
    alone = encode(kernels, x[1], base)
    assert alone.counts.shape == () and decode(kernels, alone, base).shape == (8,)
    shaped = encode(kernels, x.reshape(2, 2, 8), base)
    assert torch.equal(decode(kernels, shaped, base).reshape(4, 8), decode(kernels, acts, base))
    nothing = Weights(x.new_zeros(8, 0), x.new_zeros(0), x.new_zeros(0), x.new_zeros(0, 8), base.b_dec)
    empty = encode(kernels, x, nothing)
    assert empty.counts.tolist() == [0] * 4 and torch.equal(decode(kernels, empty, nothing), base.b_dec.expand(4, 8))
    more = encode(kernels, x[:3], delta)
    for words, call in {
        "x has shape": lambda: encode(kernels, x[:, :4], base),
        "rows has shape": lambda: encode(kernels, x.repeat(1, 2), base),
        "indices has shape": lambda: decode(kernels, acts._replace(indices=acts.indices.long()), base),
        "counts has shape": lambda: decode(kernels, acts._replace(counts=acts.counts[1:]), base),
        "W_dec and x are of different dtypes": lambda: decode(kernels, acts._replace(values=acts.values.float()), base),
        "delta_values has shape": lambda: decode(kernels, acts, base, more, delta),
    }.items():
        with pytest.raises(RuntimeError, match=words):
            call()


def test_the_library_s_way_to_encode_and_decode(kernels, monkeypatch):
    monkeypatch.setattr(ops, "CUDA_KERNELS", kernels)
    monkeypatch.setattr(ops, "_pack", lambda W_enc: ops.Packed(W_enc.detach().t().contiguous(), None))
    ops._PACKED.clear()
    x, base, delta = make_case(20, 16, 200, 20, 0.3, BFLOAT16)
    jumprelu, topk = ops_sparse._jumprelu_on_cuda, ops_sparse._topk_on_cuda
    acts, more = jumprelu(x, *base[:3], None), jumprelu(x, *delta[:3], 20)
    assert all(map(torch.equal, acts, encode(kernels, x, base)))
    assert all(map(torch.equal, topk(x, *base[:2], 7), encode(kernels, x, base, 7)))
    found = ops_sparse._decode_on_cuda(*acts, *base[3:], *more, *delta[3:], torch.tensor(0.7))
    assert torch.equal(found, decode(kernels, acts, base, more, delta))
    ops._PACKED.clear()
    single = [t.float() for t in base]
    plain = SparseActs(*jumprelu(x.float(), *single[:3], None))
    assert plain.values.dtype == topk(x.float(), *single[:2], 7)[0].dtype == torch.float32
    recon = ops_sparse._decode_on_cuda(*plain, *single[3:], *(None,) * 5, torch.tensor(0.7))
    torch.testing.assert_close(recon, ops_sparse.decode_ref(plain, *single[3:]))


def test_the_library_s_way_to_the_kernels(kernels, monkeypatch):
    """What deltatc.ops does for CUDA tensors, with the shim in the kernels' place."""
    monkeypatch.setattr(ops, "CUDA_KERNELS", kernels)
    monkeypatch.setattr(ops, "_pack", lambda W_enc: ops.Packed(W_enc.detach().t().contiguous(), None))
    ops._PACKED.clear()
    x, base, delta = make_case(20, 16, 200, 20, 0.3, BFLOAT16)
    arguments = (x, *base, *delta, torch.tensor(0.7), None, 3, 1e-3)
    check(ops._on_cuda(True, *arguments), x, base, delta, 0.7, None, 3)
    needed = [False, True, False, True, True, False, True]
    found = ops.delta_gradients(x, x, delta, torch.tensor(0.7), 0.5, needed)
    wanted = gradients(kernels, x, x, delta, needed=63)
    for i, need in enumerate(needed[1:]):
        assert torch.equal(found[i + 1], wanted[i].to(found[i + 1].dtype)) if need else found[i + 1].numel() == 0
    ops._PACKED.clear()
    assert ops.cuda_kernels_take(x) and ops.cuda_kernels_take(x, 4096, None)
    assert not ops.cuda_kernels_take(x, 4097) and not ops.cuda_kernels_take(x.float())
    assert not ops.cuda_kernels_take(x[:, :12]) and not ops.cuda_kernels_take(x.new_zeros(1, 8200))
    as_plain = (x.float(), *(t.float() for t in (*base, *delta)), torch.tensor(0.7), None, None, 1e-3)
    assert ops._on_cuda(False, *as_plain)[0].dtype == torch.float32


def test_no_access_outside_memory_and_no_undefined_behaviour(tmp_path):
    """All kernels under AddressSanitizer and UndefinedBehaviorSanitizer, threads in two orders."""
    library = build(tmp_path, *SANITIZE)
    script = f"""
import torch
from tests.test_cuda import decode, encode, forward, gradient_case, gradients
from tests.test_ops import BFLOAT16, make_case
torch.ops.load_library({str(library)!r})
kernels = torch.ops.deltatc_shim
small = (1, 8, 1, 1, 1.0), (3, 48, 300, 5, 0.05), (17, 8, 129, 3, 0.3)
large = (20, 16, 1200, 5, 1.0), (2, 8, 1, 4200, 1.0)
for case in small + large:
    x, base, delta = make_case(*case, BFLOAT16)
    for ks in ((), (1, 1), (min(9, case[2]), 1)):
        forward(kernels, x, base, delta, 0.7, *ks)
for case in (*small, (1, 8, 2700, 5, 1.0)):
    x, base, delta = make_case(*case, BFLOAT16)
    more = encode(kernels, x, delta)
    for k in (None, min(9, case[2]), min(100, case[2])):
        acts = encode(kernels, x, base, k)
        decode(kernels, acts, base, more, delta)
        acts.counts[-1] = 10**9
        try:
            decode(kernels, acts, base)
        except RuntimeError:
            acts.counts[-1] = 0
        decode(kernels, acts, base)
for shape in ((1, 8, 1), (33, 24, 5), (130, 16, 130)):
    x, grad, delta = gradient_case(*shape)
    gradients(kernels, grad, x, delta)
print("done")
"""
    runtime = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout
        for name in ("asan", "ubsan")
    ]

    def run(number):
        environment = os.environ | {
            "LD_PRELOAD": " ".join(path.strip() for path in runtime),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "DELTATC_SCHEDULE": number,
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", script]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, ("0", "3")):
            assert done.returncode == 0 and done.stdout.endswith("done\n"), done.stderr[-3000:]


BROKEN = """
#include "device.h"
#include <cstdio>
using namespace deltatc;
struct Job { int* out; int what; };
void kernel(Job job) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  if (job.what == 1 && threadIdx.x == 5) return;                 // right: a thread that has ended is not waited for
  if (job.what == 2 && threadIdx.x < 32) shared[0] = warp_sum(1);  // right: a whole warp
  if (job.what == 3 && threadIdx.x == 5) shared[5] = warp_sum(1);  // wrong: part of a warp
  if (job.what == 4) copy_async(shared + 4 * threadIdx.x, job.out, true), copy_commit();  // wrong: not waited for
  if (job.what != 5) __syncthreads();                            // 5, wrong: no barrier
  job.out[threadIdx.x] = shared[(threadIdx.x + 63) % 64];
}
int main(int, char** arguments) {
  alignas(16) int out[64] = {};
  const Job job{out, std::atoi(arguments[1])};
  launch(kernel, dim3(1), 64, 1024, nullptr, job);
  int right = 0;
  for (int i = 0; i < 64; ++i) right += out[i] == (i + 63) % 64;
  std::printf("%d\\n", right);
}
"""


def test_the_shim_finds_what_a_gpu_would_punish(tmp_path):
    """Negative controls: a missing barrier, a barrier that some threads never reach, a copy nobody waited for."""
    (tmp_path / "broken.cpp").write_text(BROKEN)
    program = str(tmp_path / "broken")
    flags = ["-std=c++17", "-O1", "-DDELTATC_HOST_SHIM", f"-I{SHIM}", f"-I{ROOT}/csrc/cuda"]
    subprocess.run(["g++", *flags, str(tmp_path / "broken.cpp"), "-o", program], check=True)

    def right(what, number):
        run = subprocess.run(
            [program, str(what)], capture_output=True, text=True, env=os.environ | {"DELTATC_SCHEDULE": str(number)}
        )
        return int(run.stdout) if run.returncode == 0 else run.stderr

    assert right(0, 0) == right(0, 1) == 64
    assert right(1, 1) == 63 and right(2, 1) == 63
    assert "barrier that the others never reach" in right(3, 1)
    assert right(4, 0) == 64  # the copy has not come by then, as on a GPU it may not have
    assert right(5, 0) == 63 and right(5, 1) < 63
