"""Checks and times the operator on a CUDA device: `python benchmarks/gpu.py check|time OUTDIR`, called by gpu.sh.

Without a CUDA device it runs the same lines on the CPU, small (`--device cpu`), so that they do not rot.
"""

import argparse
import datetime
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.bench_transcode import eager_dense, eager_sparse, gemm
from benchmarks.peers import find_peers
from deltatc import build_info
from deltatc.ops import Weights, transcode, transcode_stats
from deltatc.ops_ref import transcode_ref, transcode_stats_ref
from deltatc.ops_sparse import decode, encode_jumprelu, encode_topk

ACTIVE = 64
SHAPES = {"16k": (2304, 16384, 128), "65k": (2304, 65536, 1024)}  # d_model, d_sae, d_new
SMALL = {"16k": (64, 1000, 40)}
TOKENS = (1, 8, 128, 512, 2048, 4096, 32768)
ALPHA = 0.7


def make_part(d_model, width, active, total, draw, device):
    """A part on standard normal tokens: each latent fires with probability active / total."""
    threshold = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - active / total, dtype=torch.float64)).item()
    tensors = (
        torch.randn(d_model, width, generator=draw) / d_model**0.5,
        torch.zeros(width),
        torch.full((width,), max(threshold, 0.0)),
        torch.randn(width, d_model, generator=draw) / ACTIVE**0.5,
        torch.randn(d_model, generator=draw),
    )
    return Weights(*(tensor.to(torch.bfloat16).to(device) for tensor in tensors))


def make_case(shape, tokens, device, active=ACTIVE, seed=0):
    d_model, d_sae, d_new = shape
    draw = torch.Generator().manual_seed(seed)
    base, delta = (make_part(d_model, width, active, d_sae + d_new, draw, device) for width in (d_sae, d_new))
    return torch.randn(tokens, d_model, generator=draw).to(torch.bfloat16).to(device), base, delta


def relative_error(found, wanted):
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def check(device, small):
    """Against float64; the same bits a thousand times; in a CUDA graph; gradients. Raises at the first difference."""
    report = {}
    for tokens in (1, 3, 16, 17, 130, 1000)[: 4 if small else 6]:
        for active, ks in ((8, (None, None)), (200, (None, None)), (900, (None, None)), (200, (20, 5))):
            x, base, delta = make_case(SMALL["16k"], tokens, device, active, seed=tokens)
            found = transcode_stats(x, base, delta, ALPHA, *ks)
            wide = [Weights(*(tensor.double() for tensor in part)) for part in (base, delta)]
            wanted = transcode_stats_ref(x.double(), *wide, ALPHA, *ks)
            eager = transcode_ref(x, base, delta, ALPHA, *ks)
            error, usual = (relative_error(recon, wanted.recon) for recon in (found.recon, eager))
            assert error <= 2 * usual + 4e-3, (tokens, active, ks, error, usual)
            flips = (found.l0_base - wanted.l0_base).abs().sum().item() / max(1.0, wanted.l0_base.sum().item())
            assert flips < 1e-2, (tokens, active, ks, flips)
            report[f"N={tokens} active={active} k={ks}"] = {"error": error, "eager": usual, "flips": flips}
    repeats = 20 if small else 1000
    for tokens in (3, 300):
        x, base, delta = make_case(SMALL["16k"], tokens, device, 100)
        first = transcode(x, base, delta, ALPHA, 20, 5)
        for number in range(repeats):
            assert torch.equal(transcode(x, base, delta, ALPHA, 20, 5), first), f"repeat {number} differs, N={tokens}"
    report["repeats"] = repeats
    for tokens in (5, 700):
        x, base, delta = make_case(SMALL["16k"], tokens, device, 300)
        grad = torch.randn_like(x)

        def gradients(operator, dtype, x=x, base=base, delta=delta, grad=grad):
            leaves = Weights(*(tensor.to(dtype, copy=True).requires_grad_() for tensor in delta))
            frozen = Weights(*(tensor.to(dtype) for tensor in base))
            recon = operator(x.to(dtype), frozen, leaves, ALPHA, bandwidth=0.5)
            return torch.autograd.grad(recon, leaves, grad.to(dtype))

        wanted = gradients(transcode_ref, torch.float64)
        rows = zip(gradients(transcode, torch.bfloat16), gradients(transcode_ref, torch.bfloat16), wanted, strict=True)
        for name, (found, eager, exact) in zip(Weights._fields, rows, strict=True):
            error, usual = relative_error(found, exact), relative_error(eager, exact)
            assert error <= 3 * usual + 4e-3, (tokens, name, error, usual)
            report[f"gradient N={tokens} {name}"] = {"error": error, "eager": usual}
    for tokens in (3, 300):
        x, base, delta = make_case(SMALL["16k"], tokens, device, 100)
        acts, more = (encode_jumprelu(x, *part[:3]) for part in (base, delta))
        stats = transcode_stats(x, base, delta, ALPHA)
        for counts, l0 in ((acts.counts, stats.l0_base), (more.counts, stats.l0_delta)):
            assert (counts - l0).abs().sum() <= 1e-2 * l0.sum(), tokens  # few tokens are summed in another order
        for alpha in (0.0, ALPHA):
            error = relative_error(decode(acts, *base[3:], more, *delta[3:], alpha), transcode(x, base, delta, alpha))
            assert error < 2e-2, (tokens, alpha, error)
        few = encode_topk(x, *base[:2], 20)
        again = encode_topk(x, *base[:2], 20)
        assert (few.counts == 20).all() and all(map(torch.equal, few, again))
        report[f"halves N={tokens}"] = {"error": error}
    if device == "cuda":
        x, base, delta = make_case(SMALL["16k"], 3, device, 100)
        transcode(x, base, delta, ALPHA)
        graph = torch.cuda.CUDAGraph()
        alpha = torch.tensor(ALPHA, device=device)
        with torch.cuda.graph(graph):
            captured = transcode(x, base, delta, alpha)
        for value in (0.0, 2.0):
            alpha.fill_(value)
            x.normal_()
            graph.replay()
            assert torch.equal(captured, transcode(x, base, delta, value)), "the captured call differs"
        report["graph"] = "same bits"
    return report


def joined_weights(base, delta):
    """Base and delta as one transcoder, in the layouts that peers read."""
    found = {
        "encoder": torch.cat([base.W_enc, delta.W_enc], dim=1).T.contiguous(),
        "decoder": torch.cat([base.W_dec, delta.W_dec]),
        "b_dec": base.b_dec + delta.b_dec,
    }
    found |= {name: torch.cat([getattr(part, name) for part in (base, delta)]) for name in ("b_enc", "threshold")}
    return found | {"decoder_T": found["decoder"].T.contiguous()}


def contenders(x, base, delta, device):
    joined = joined_weights(base, delta)
    peers, absent = find_peers(joined, ACTIVE, here=True)
    found = {
        "deltatc": lambda: transcode(x, base, delta),
        "deltatc_topk": lambda: transcode(x, base, delta, 1.0, ACTIVE - 4, 4),
        "gemm": lambda: gemm(x, joined),
        "eager_dense": lambda: eager_dense(x, joined),
        "eager_topk": lambda: eager_sparse(x, joined),
    } | {name: functools.partial(forward, x) for name, forward in peers.items()}
    if device == "cuda":
        compiled = torch.compile(eager_dense)
        found["compiled_dense"] = lambda: compiled(x, joined)
        if x.shape[0] <= 16:
            found["deltatc_graph"], found["eager_graph"] = (captured(found[n]) for n in ("deltatc", "eager_dense"))
    return found, absent


def captured(function):
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def backward_contenders(x, base, delta):
    grad = torch.randn_like(x)

    def step(operator):
        def run():
            leaves = Weights(*(tensor.detach().requires_grad_() for tensor in delta))
            return torch.autograd.grad(operator(x, leaves), leaves, grad)

        return run

    empty = Weights(*(tensor[..., :0] if i < 3 else tensor for i, tensor in enumerate(base)))
    empty = empty._replace(W_dec=base.W_dec[:0])
    return {
        "deltatc": step(lambda x, leaves: transcode(x, empty, leaves, bandwidth=0.5)),
        "eager": step(lambda x, leaves: transcode_ref(x, empty, leaves, bandwidth=0.5)),
    }


def race(functions, device, rounds):
    """Medians in microseconds; contenders take turns, and a large buffer is written between them to empty the cache."""
    flush = torch.empty((128 if device == "cuda" else 1) << 20, dtype=torch.int8, device=device)
    times = {name: [] for name in functions}
    for number in range(rounds + 2):
        for name, function in functions.items():
            flush.fill_(number % 7)
            if device == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end) * 1e3
            else:
                begin = time.perf_counter()
                function()
                elapsed = (time.perf_counter() - begin) * 1e6
            if number >= 2:
                times[name].append(elapsed)
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def peak_bytes(function):
    """Bytes that a call needs above what is there before, its output included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(device, small):
    cells = []
    for name, shape in (SMALL if small else SHAPES).items():
        for tokens in TOKENS[: 3 if small else None]:
            x, base, delta = make_case(shape, tokens, device)
            with torch.no_grad():
                functions, absent = contenders(x, base, delta, device)
                cell = {
                    "d_sae": name,
                    "tokens": tokens,
                    "absent_peers": absent,
                    "us": race(functions, device, 20 if tokens <= 4096 else 5),
                }
                if device == "cuda" and tokens == TOKENS[-1]:
                    cell["peak_bytes"] = {n: peak_bytes(functions[n]) for n in ("deltatc", "eager_dense")}
            cells.append(cell)
            row = [f"{n} {us:.1f}" for n, us in cell["us"].items()] + [f"{n} peer absent" for n in absent]
            print(f"{name:>4} N={tokens:<6}", "  ".join(row), flush=True)
        x, base, delta = make_case(shape, TOKENS[2 if small else 5], device)
        us = race(backward_contenders(x, base, delta), device, 20)
        cells.append({"d_sae": name, "tokens": x.shape[0], "backward": True, "us": us})
        print(f"{name:>4} backward N={x.shape[0]}", us, flush=True)
    return cells


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["check", "time"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.device == "cuda" and not (torch.cuda.is_available() and build_info()["cuda"]):
        sys.exit("gpu.py: error: no CUDA device, or built without nvcc; expected both, or --device cpu --small to try")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__, "built": build_info(), "date": datetime.date.today().isoformat(), "commit": commit,
    }  # fmt: skip
    found = (check if options.what == "check" else measure)(options.device, options.small)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.what}.json"
    path.write_text(json.dumps(about | {"found": found}, indent=1) + "\n")
    print(f"{options.what}: done, {path}")


if __name__ == "__main__":
    main()
