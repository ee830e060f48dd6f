"""torch.ops.deltatc.transcode beside what people run today, at the shapes of Gemma Scope's transcoders.

All contenders get the same weights and tokens; joined and transposed copies are made before the timing, as a user would
who cares for speed. `random`: every latent is as likely; `zipf`: latent j is active in proportion to 1 / (j + 10), as
activations of real text are roughly. Both have 64 active latents a token.
"""

import functools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import embedding_bag, linear

from benchmarks.peers import OtherPython, find_peers
from deltatc.ops import Weights, transcode

ACTIVE = 64
D_MODEL = 2304
SHAPES = {"16k": (16384, 128), "65k": (65536, 1024), "tiny": (1024, 32)}  # d_sae, d_new
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHORT = {"16k": (1, 8, 128, 512), "65k": (1, 8, 128, 512)}
FULL = {"16k": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048), "65k": (1, 8, 32, 128, 512, 2048)}


def cases(tokens, inputs):
    return [(shape, dtype, kind, n) for shape in tokens for dtype in DTYPES for kind in inputs for n in tokens[shape]]


@functools.lru_cache(maxsize=1)  # cells of one shape follow each other; two sets of weights would not fit in memory
def weights(shape, dtype, inputs, d_model, active=ACTIVE):
    d_sae, d_new = SHAPES[shape]
    draw = torch.Generator().manual_seed(0)
    width = d_sae + d_new
    rate = torch.ones(width) if inputs == "random" else 1 / (torch.arange(width) + 10.0)
    rate = (rate / rate.sum() * active).clamp(max=0.5)  # more often would be a negative threshold, which acts as 0
    rate = rate[torch.randperm(width, generator=draw)]
    # On standard normal tokens pre_acts are standard normal: a latent with this threshold fires at its rate.
    threshold = torch.distributions.Normal(0.0, 1.0).icdf(1 - rate.double()).float()

    def part(start, stop):
        n = stop - start
        tensors = (
            torch.randn(d_model, n, generator=draw) / d_model**0.5,
            torch.zeros(n),
            threshold[start:stop],
            torch.randn(n, d_model, generator=draw) / active**0.5,
            torch.zeros(d_model),
        )
        return Weights(*(tensor.to(DTYPES[dtype]) for tensor in tensors))

    base, delta = part(0, d_sae), part(d_sae, width)
    joined = {
        "encoder": torch.cat([base.W_enc, delta.W_enc], dim=1).T.contiguous(),
        "decoder": torch.cat([base.W_dec, delta.W_dec]),
        "b_enc": torch.cat([base.b_enc, delta.b_enc]),
        "threshold": torch.cat([base.threshold, delta.threshold]),
        "b_dec": base.b_dec + delta.b_dec,
    }
    joined["decoder_T"] = joined["decoder"].T.contiguous()
    return base, delta, joined, *find_peers(joined, active)


def gemm(x, w):
    """The encoder's matrix product alone: what any encoder built on it takes at least."""
    return linear(x, w["encoder"], w["b_enc"])


def eager_dense(x, w):
    """JumpReLU as SAELens, dictionary_learning and circuit-tracer compute it: two dense products."""
    pre = linear(x, w["encoder"], w["b_enc"])
    return linear(pre * (pre > w["threshold"]), w["decoder_T"], w["b_dec"])


def eager_sparse(x, w, k=ACTIVE):
    """TopK with a sparse decoder, as sparsify computes it on the CPU."""
    values, indices = linear(x, w["encoder"], w["b_enc"]).topk(k, dim=-1, sorted=False)
    return embedding_bag(indices, w["decoder"], per_sample_weights=values.relu(), mode="sum") + w["b_dec"]


def contenders(x, base, delta, joined, peers, full, active=ACTIVE):
    found = {
        "deltatc": lambda: transcode(x, base, delta),
        "deltatc_topk": lambda: transcode(x, base, delta, 1.0, active - 4, 4),
        "gemm": lambda: gemm(x, joined),
        "eager_dense": lambda: eager_dense(x, joined),
        "eager_sparse": lambda: eager_sparse(x, joined, active),
    }
    found |= {name: functools.partial(forward, x) for name, forward in peers.items()}
    if full:
        compiled = torch.compile(eager_dense)
        found["compiled_dense"] = lambda: compiled(x, joined)
    return found


@functools.lru_cache
def machine(dtype):
    """This machine's rates: bytes a second read from memory, operations a second of torch's matrix product."""
    held = torch.ones(1 << 28, dtype=torch.int32)
    a = torch.randn(2304, 2304).to(DTYPES[dtype])

    def best(function):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return min(times)

    return held.nbytes / best(held.max), 2 * len(a) ** 3 / best(lambda: a @ a)


def roofline(shape, dtype, tokens, active):
    """Seconds that the work takes at least, with W_enc multiplied in its own dtype: memory's time or arithmetic's."""
    bandwidth, operations = machine(dtype)
    width = sum(SHAPES[shape])
    read = DTYPES[dtype].itemsize * D_MODEL * (width + min(width, tokens * active) + 2 * tokens)
    return max(read / bandwidth, 2 * tokens * D_MODEL * (width + active) / operations)


@pytest.mark.parametrize("case", cases(SHORT, ["random", "zipf"]), ids=lambda case: "-".join(map(str, case)))
def test_forward(race, benchmark, case):
    check(race, benchmark, case, full=False)


@pytest.mark.parametrize("active", [16, 256, 1024])
@pytest.mark.parametrize("case", cases({"16k": (512,)}, ["random"]), ids=lambda case: "-".join(map(str, case)))
def test_forward_with_other_l0(race, benchmark, case, active):
    check(race, benchmark, case, full=False, active=active)


@pytest.mark.parametrize("case", cases(FULL, ["zipf"]), ids=lambda case: "-".join(map(str, case)))
def test_forward_full(race, benchmark, case, request):
    if not request.config.getoption("--full"):
        pytest.skip("minutes; run make bench-full")
    check(race, benchmark, case, full=True)


def check(race, benchmark, case, full, active=ACTIVE):
    shape, dtype, inputs, tokens = case
    d_model = 64 if benchmark.disabled else D_MODEL  # without timing only that all agree is shown
    active = min(active, 64) if benchmark.disabled else active
    base, delta, joined, peers, absent = weights(
        "tiny" if benchmark.disabled else shape, dtype, inputs, d_model, active
    )
    x = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(1)).to(DTYPES[dtype])
    with torch.no_grad():
        rows = x[:8]
        wanted = eager_dense(rows, joined).float()
        difference = (transcode(rows, base, delta).float() - wanted).norm() / wanted.norm()
        # The chain rounds pre_acts to bfloat16 before it compares them, so a few latents a token flip.
        assert difference < (1e-4 if dtype == "float32" else 0.3)
        if "sae_lens" in peers:
            theirs = peers["sae_lens"](rows)
            theirs = (peers["sae_lens"].result() if theirs is rows else theirs).float()
            assert (theirs - wanted).norm() / wanted.norm() < (1e-4 if dtype == "float32" else 0.3)
        long = shape == "65k" or active != ACTIVE
        rounds = 31 if tokens <= 8 else 7 if tokens <= 128 else 3 if long else 5
        cell = {"d_sae": shape, "dtype": dtype, "inputs": inputs, "tokens": tokens, "active": active}
        cell |= {"absent_peers": absent} if absent else {}
        least = None if benchmark.disabled else roofline(shape, dtype, tokens, active)
        race(cell, contenders(x, base, delta, joined, peers, full, active), rounds, least)


MEMORY = """
import sys, torch
sys.path.insert(0, ".")
from benchmarks.bench_transcode import DTYPES, contenders, weights
name, tokens, d_model, shape, dtype = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
base, delta, joined, peers, _ = weights(shape, dtype, "random", d_model)
x = torch.randn(tokens, d_model).to(DTYPES[dtype])
run = {n: contenders(part, base, delta, joined, peers, False)[name] for n, part in (("warm", x[:4]), ("all", x))}
def resident(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
with torch.no_grad():
    run["warm"]()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = resident("VmRSS")
    run["all"]()
print(resident("VmHWM") - before)
"""


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory(benchmark, cells, dtype):
    """MiB that one call at 2,048 tokens needs above weights and inputs, output included; each in its own process."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, which counts a process's peak memory")
    small = benchmark.disabled
    arguments = ["64", "64", "tiny", dtype] if small else ["2048", str(D_MODEL), "16k", dtype]
    found = {}
    peers = weights("tiny", dtype, "random", 64)[3]
    here = [name for name, forward in peers.items() if not isinstance(forward, OtherPython)]
    for name in ["deltatc", "eager_dense", "eager_sparse", *here]:
        command = [sys.executable, "-c", MEMORY, name, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = round(int(run.stdout.split()[-1]) / 1024, 1)
    benchmark.extra_info.update(found)
    benchmark.pedantic(lambda: None, rounds=1)
    if not small:
        cells.append({"memory": "16k", "dtype": dtype, "tokens": 2048, "peak_mib": found})
