"""encode_jumprelu, encode_topk and decode against dense acts in float64; their gradients, limits and errors."""

import pytest
import torch

from deltatc import ops_sparse
from deltatc.errors import OpError
from deltatc.ops import Weights, transcode
from deltatc.ops_sparse import SparseActs, decode, encode_jumprelu, encode_topk
from tests.test_ops import BFLOAT16, FLOAT32, FLOAT64, as_double, assert_close, make_case, numpy_oracle, numpy_part

CASES = [
    (0, 8, 30, FLOAT32, "contiguous"), (1, 1, 1, FLOAT64, "contiguous"), (3, 7, 31, FLOAT32, "sliced"),
    (129, 65, 257, FLOAT32, "transposed"), (257, 7, 600, BFLOAT16, "contiguous"), (129, 8, 600, FLOAT64, "sliced"),
    (3, 65, 257, BFLOAT16, "transposed"), (257, 65, 31, FLOAT64, "contiguous"), (1, 300, 600, BFLOAT16, "sliced"),
]  # fmt: skip


def dense(acts, width):
    out = torch.zeros(*acts.counts.shape, width, dtype=FLOAT64)
    return out.scatter_add(-1, acts.indices.long(), acts.values.double())


def check_form(acts):
    """Ascending indices up to counts, then zeros."""
    real = torch.arange(acts.values.shape[-1]) < acts.counts.unsqueeze(-1)
    assert (acts.values[~real] == 0).all() and (acts.indices[~real] == 0).all() and (acts.values[real] > 0).all()
    step = acts.indices.diff(dim=-1)
    assert (step[real[..., 1:]] > 0).all()


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_encode_equals_the_oracle(case, fraction):
    tokens, d_model, width, dtype, layout = case
    x, base, _ = make_case(tokens, d_model, width, 1, fraction, dtype, layout)
    for k in (None, 1, max(1, width // 3)):
        if k is None:
            acts = encode_jumprelu(x, base.W_enc, base.b_enc, base.threshold)
            part = as_double(base)
            assert acts.values.shape[-1] == (int(acts.counts.max()) if tokens else 0)
        else:
            acts = encode_topk(x, base.W_enc, base.b_enc, k)
            part = as_double(base)._replace(threshold=torch.zeros(width, dtype=FLOAT64))
            assert acts.values.shape == (tokens, k)
        check_form(acts)
        wanted = numpy_part(x.double().numpy(), part, k)[1]
        tolerance = {FLOAT64: 1e-12, FLOAT32: 1e-5, BFLOAT16: 2e-2}[dtype] * max(1.0, float(abs(wanted).max(initial=0)))
        error = (dense(acts, width) - torch.from_numpy(wanted)).abs()
        # In bfloat16 two pre_acts around the k-th may be rounded into another order; those are few and nearly equal.
        assert error.numel() == 0 or error.max() <= tolerance or (k is not None and dtype != FLOAT64)
        if k is None or dtype == FLOAT64:
            assert acts.counts.tolist() == (wanted > 0).sum(1).tolist()


@pytest.mark.parametrize("kernel", ["generic", "avx2", "avx512", "avx512vnni", "avx512bf16"])
def test_every_instruction_set(kernel, monkeypatch):
    from deltatc.ops import build_info

    if kernel not in build_info()["cpu"]:
        pytest.skip(f"{kernel} is not compiled for this processor")
    x, base, _ = make_case(33, 40, 300, 1, 0.2, FLOAT32)
    monkeypatch.setenv("DELTATC_CPU_KERNEL", kernel)
    try:
        acts = encode_jumprelu(x, base.W_enc, base.b_enc, base.threshold)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    wanted = torch.from_numpy(numpy_part(x.double().numpy(), as_double(base), None)[1])
    torch.testing.assert_close(dense(acts, 300), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16])
@pytest.mark.parametrize("tokens", [5, 150])
def test_encode_then_decode_is_transcode(dtype, tokens):
    x, base, delta = make_case(tokens, 33, 400, 50, 0.2, dtype)
    acts, more = (encode_jumprelu(x, *part[:3]) for part in (base, delta))
    for alpha in (0.0, 0.7, torch.tensor(-2.0)):
        found = decode(acts, *base[3:], more, *delta[3:], alpha)
        fused = transcode(x, base, delta, alpha)
        if dtype == BFLOAT16:  # here values are rounded once more
            assert_close(found, numpy_oracle(x, base, delta, float(alpha))[0])
        else:
            assert torch.equal(found, fused)
    assert torch.equal(decode(acts, *base[3:], more, *delta[3:], 0.0), decode(acts, *base[3:]))
    kept, few = encode_topk(x, *base[:2], 7), encode_topk(x, *delta[:2], 3)
    zeros = [part._replace(threshold=torch.zeros_like(part.threshold)) for part in (base, delta)]
    if dtype != BFLOAT16:
        assert torch.equal(decode(kept, *base[3:], few, *delta[3:]), transcode(x, *zeros, 1.0, 7, 3))


def test_an_alpha_sweep_encodes_nothing_again(monkeypatch):
    x, base, delta = make_case(4, 8, 30, 5, 0.5, FLOAT32)
    acts, more = (encode_jumprelu(x, *part[:3]) for part in (base, delta))
    monkeypatch.setattr(ops_sparse, "_by_packed", None)
    for alpha in (0.0, 0.25, 1.0, 4.0):
        assert decode(acts, *base[3:], more, *delta[3:], alpha).shape == x.shape


def test_capacity_is_a_limit_and_never_cuts():
    x, base, _ = make_case(9, 8, 60, 1, 0.5, FLOAT32)
    free = encode_jumprelu(x, *base[:3])
    largest = int(free.counts.max())
    held = encode_jumprelu(x, *base[:3], capacity=largest)
    wide = encode_jumprelu(x, *base[:3], capacity=largest + 3)
    assert all(map(torch.equal, free, held)) and torch.equal(wide.values[:, :largest], free.values)
    with pytest.raises(OpError, match=f"has {largest} active latents, over capacity = {largest - 1}; raise capacity"):
        encode_jumprelu(x, *base[:3], capacity=largest - 1)


def test_thresholds_ties_and_non_finite_rows():
    eye, none = torch.eye(4), torch.zeros(4)
    x = torch.tensor([[2.0, 1.0, 1.0, 1.0], [1.0, -1.0, 0.0, 3.0], [torch.nan, 1.0, 1.0, 1.0]])
    acts = encode_jumprelu(x, eye, none, torch.tensor([2.0, -1.0, 0.5, 0.0]))
    assert acts.counts.tolist() == [3, 1, 1] and acts.indices[0].tolist() == [1, 2, 3]
    assert acts.indices[1, 0] == 3 and acts.values[2, 0].isnan()
    assert encode_topk(x[:2], eye, none, 2).indices.tolist() == [[0, 1], [0, 3]]
    recon = decode(acts, eye, none)
    assert recon[2].isnan().all() and recon[:2].isfinite().all()


@pytest.mark.parametrize("ks", [None, 7])
def test_plain_twins_agree(ks, monkeypatch):
    monkeypatch.setattr(ops_sparse.ops, "PLAIN_ELEMENTS", 100)  # so that several chunks are needed
    x, base, delta = make_case(30, 8, 40, 20, 0.3, FLOAT64)
    x[3, 2] = torch.inf
    if ks is None:
        acts, plain = encode_jumprelu(x, *base[:3]), ops_sparse.plain_jumprelu(x, *base[:3], None)
    else:
        acts, plain = encode_topk(x, *base[:2], ks), ops_sparse.plain_topk(x, *base[:2], ks)
    for found, wanted in zip(plain, acts, strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True)
    more, alpha = encode_jumprelu(x, *delta[:3]), torch.tensor(0.7, dtype=FLOAT64)
    found = ops_sparse.plain_decode(*acts, *base[3:], *more, *delta[3:], alpha)
    torch.testing.assert_close(found, decode(acts, *base[3:], more, *delta[3:], alpha), equal_nan=True)
    torch.testing.assert_close(
        ops_sparse.decode_ref(acts, *base[3:]), decode(acts, *base[3:]), equal_nan=True, rtol=1e-10, atol=1e-10
    )


def test_threads_rows_and_shapes():
    x, base, _ = make_case(260, 16, 300, 1, 0.3, FLOAT32)
    acts = encode_jumprelu(x, *base[:3])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert all(map(torch.equal, encode_jumprelu(x, *base[:3]), acts))
    finally:
        torch.set_num_threads(before)
    some = encode_jumprelu(x[100:110], *base[:3], capacity=acts.values.shape[-1])
    assert all(torch.equal(part, whole[100:110]) for part, whole in zip(some, acts, strict=True))
    shaped = encode_jumprelu(x.reshape(4, 65, 16), *base[:3])
    assert torch.equal(shaped.values.reshape(260, -1), acts.values) and shaped.counts.shape == (4, 65)
    assert torch.equal(decode(shaped, *base[3:]).reshape(260, 16), decode(acts, *base[3:]))


def far_from_thresholds(seed=0):
    for number in range(seed, seed + 100):
        x, base, delta = make_case(5, 4, 9, 6, 0.5, FLOAT64, seed=number)
        gaps = [(x @ part.W_enc + part.b_enc - part.threshold.clamp(min=0)).abs().min() for part in (base, delta)]
        if min(gaps) > 1e-3:
            return x, base, delta
    raise AssertionError("no case found")


@pytest.mark.parametrize("seed", range(5))
def test_gradcheck(seed, monkeypatch):
    monkeypatch.setattr(ops_sparse, "DECODE_ELEMENTS", 40)  # so that several chunks are needed
    x, base, delta = far_from_thresholds(seed * 100)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, base.W_enc, base.b_enc)]
    assert torch.autograd.gradcheck(lambda *a: encode_jumprelu(*a, base.threshold).values, inputs)
    assert torch.autograd.gradcheck(lambda *a: encode_topk(*a, 3).values, inputs)
    acts, more = (encode_jumprelu(x, *part[:3]) for part in (base, delta))
    leaves = [acts.values, *base[3:], more.values, *delta[3:], torch.tensor(0.7, dtype=FLOAT64)]
    leaves = [tensor.clone().requires_grad_() for tensor in leaves]

    def whole(values, W_dec, b_dec, delta_values, delta_W_dec, delta_b_dec, alpha):
        first, second = SparseActs(values, *acts[1:]), SparseActs(delta_values, *more[1:])
        return decode(first, W_dec, b_dec, second, delta_W_dec, delta_b_dec, alpha)

    assert torch.autograd.gradcheck(whole, leaves)


def test_opcheck_and_compile():
    x, base, delta = far_from_thresholds()
    acts, more = (encode_jumprelu(x, *part[:3]) for part in (base, delta))
    leaf = x.clone().requires_grad_()
    alpha = torch.tensor(0.5, dtype=FLOAT64)
    torch.library.opcheck(torch.ops.deltatc.encode_jumprelu.default, (leaf, *base[:3], 9))
    torch.library.opcheck(torch.ops.deltatc.encode_topk.default, (leaf, *base[:2], 3))
    torch.library.opcheck(torch.ops.deltatc.decode.default, (*acts, *base[3:], *more, *delta[3:], alpha))
    torch.library.opcheck(torch.ops.deltatc.decode.default, (*acts, *base[3:], *(None,) * 5, alpha))

    def chain(x):
        return decode(encode_topk(x, *base[:2], 4), *base[3:], encode_jumprelu(x, *delta[:3], 6), *delta[3:], 0.5)

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), chain(x))


def wrong(**changes):
    x, base, _ = make_case(4, 8, 30, 1, 0.5, FLOAT32)
    return {"x": x, "W_enc": base.W_enc, "b_enc": base.b_enc, "threshold": base.threshold} | changes


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"x": torch.zeros(4, 7)}, r"W_enc is .*expected torch.float32 \[7, 30\]"),
        ({"x": torch.zeros(4, 8).half()}, "x is torch.float16"),
        ({"x": torch.zeros(4, 8).double()}, "W_enc is torch.float32"),
        ({"W_enc": torch.zeros(8)}, r"W_enc is .*expected \[d_model, d_sae\]"),
        ({"b_enc": torch.zeros(29)}, r"b_enc is .*\[29\].*expected torch.float32 \[30\]"),
        ({"threshold": torch.zeros(30, device="meta")}, "threshold is .* on meta"),
        ({"capacity": 0}, "capacity = 0"),
        ({"capacity": True}, "capacity = True"),
    ],
)
def test_bad_arguments_of_encode_are_named(changes, words):
    with pytest.raises(OpError, match=words):
        encode_jumprelu(**wrong(**changes))


@pytest.mark.parametrize("k", [0, -1, 31, 2.0, True, None])
def test_bad_k_is_named(k):
    given = wrong()
    with pytest.raises(OpError, match="k = "):
        encode_topk(given["x"], given["W_enc"], given["b_enc"], k)


def test_bad_arguments_of_decode_are_named():
    x, base, delta = make_case(4, 8, 30, 5, 0.5, FLOAT32)
    acts = encode_jumprelu(x, *base[:3])
    more = encode_jumprelu(x, *delta[:3])
    wide, low, high = (acts.indices.clone() for _ in range(3))
    low[0, 0], high[1, 0] = -1, 30
    fewer = SparseActs(*(tensor[1:] for tensor in more))
    for words, call in {
        "acts is tuple": lambda: decode(tuple(acts), *base[3:]),
        "expected all three or none": lambda: decode(acts, *base[3:], more),
        r"W_dec is .*expected torch.float32": lambda: decode(acts, base.W_dec.double(), base.b_dec),
        r"b_dec is .*\[7\]": lambda: decode(acts, base.W_dec, torch.zeros(7)),
        "indices of torch.int64": lambda: decode(SparseActs(acts.values, wide.long(), acts.counts), *base[3:]),
        "acts has shapes": lambda: decode(SparseActs(acts.values, wide[:, 1:], acts.counts), *base[3:]),
        "tokens and d_model of the base": lambda: decode(acts, *base[3:], fewer, *delta[3:]),
        "alpha is": lambda: decode(acts, *base[3:], alpha=torch.ones(1)),
    }.items():
        with pytest.raises(OpError, match=words):
            call()
    for words, indices, counts in (
        ("indices holds -1", low, acts.counts), ("indices holds 30", high, acts.counts),
        ("counts holds", acts.indices, acts.counts + 100), ("counts holds -", acts.indices, acts.counts - 100),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=words):
            decode(SparseActs(acts.values, indices, counts), *base[3:])


def test_direct_calls_raise_and_never_crash():
    x, base, _ = make_case(4, 8, 30, 1, 0.5, FLOAT32)
    encode, topk = torch.ops.deltatc.encode_jumprelu, torch.ops.deltatc.encode_topk
    for call in (
        lambda: encode(x[:, :5], *base[:3], None), lambda: encode(x, base.W_enc, base.b_enc[:5], base.threshold, None),
        lambda: encode(x, *base[:2], base.threshold[:3], None), lambda: encode(x, *base[:3], 0),
        lambda: encode(x.double(), *base[:3], None), lambda: topk(x, *base[:2], 31), lambda: topk(x, *base[:2], 0),
        lambda: torch.ops.deltatc.encode_packed(x, base.W_enc, None, *base[1:3], None, None),
        lambda: encode(x[0, 0], *base[:3], None),
    ):  # fmt: skip
        with pytest.raises((RuntimeError, OpError)):
            call()


def test_an_empty_part_and_no_tokens():
    x = torch.ones(3, 8)
    nothing = Weights(torch.zeros(8, 0), torch.zeros(0), torch.zeros(0), torch.zeros(0, 8), torch.ones(8))
    acts = encode_jumprelu(x, *nothing[:3])
    assert acts.values.shape == (3, 0) and torch.equal(decode(acts, *nothing[3:]), torch.ones(3, 8))
    none = encode_topk(x[:0], torch.eye(8), torch.zeros(8), 2)
    assert none.values.shape == (0, 2) and decode(none, torch.eye(8), torch.zeros(8)).shape == (0, 8)
