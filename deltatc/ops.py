"""torch.ops.deltatc in Python: base + alpha * delta as one differentiable operator.

The schemas and the contract are in csrc/ops.cpp, the definition in plain torch in ops_ref.py. This module
loads the built library, names what is wrong with an argument, and adds fake kernels and autograd. It holds no
parameters.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from deltatc.errors import OpError
from deltatc.ops_ref import (
    TranscodeStats,
    Weights,
    decode_dense,
    encode_dense,
    part_gradients,
    transcode_ref,
    transcode_stats_ref,
)

__all__ = [
    "TranscodeStats",
    "Weights",
    "build_info",
    "decode",
    "encode",
    "transcode",
    "transcode_ref",
    "transcode_stats",
    "transcode_stats_ref",
]

BASE_IS_FROZEN = "base requires grad, but is frozen here; pass the trainable part as delta, or detach the base"
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
PLAIN_ELEMENTS = 1 << 26
"""Where a device has no kernel, so few tokens at a time that a dense matrix has at most this many elements."""
BACKWARD_ELEMENTS = 1 << 21
"""Backward takes so few tokens at a time that each token x latent matrix has at most this many elements."""


def transcode(
    x: Tensor,
    base: Weights,
    delta: Weights | None = None,
    alpha: float | Tensor = 1.0,
    k_base: int | None = None,
    k_delta: int | None = None,
    bandwidth: float = 1e-3,
    *,
    W_skip: Tensor | None = None,
    mlp_out: Tensor | None = None,
) -> Tensor:
    """Return base(x) + alpha * delta(x), never holding tokens x d_sae; alpha = 0 is base(x) bit for bit.

    x [..., d_model] float64, float32 or bfloat16, the weights alike; any strides, any leading shape.
    acts = pre_acts where pre_acts > max(threshold, 0), of which the k largest (ties: lower index) if k is
    given, base and delta apart. alpha, a number or a scalar tensor, scales the delta's b_dec too. A row of x
    that is not finite, or whose pre_acts are not, gives a NaN row and changes no other row.
    Differentiable, once, in x, the delta's five tensors and alpha; the base is frozen. The threshold's
    gradient is straight-through (arXiv 2407.14435): a rectangle kernel of width `bandwidth` (of pre_acts).
    W_skip [d_model, d_model] adds x @ W_skip (skip transcoders, arXiv 2501.18823); with mlp_out, of x's shape, the
    result is mlp_out - recon, the transcoder's error. Raises OpError, naming the argument.
    """
    recon = torch.ops.deltatc.transcode(*_arguments(x, base, delta, alpha, k_base, k_delta, bandwidth))
    return _finished(recon, x, W_skip, mlp_out)


def transcode_stats(
    x: Tensor,
    base: Weights,
    delta: Weights | None = None,
    alpha: float | Tensor = 1.0,
    k_base: int | None = None,
    k_delta: int | None = None,
    bandwidth: float = 1e-3,
    *,
    W_skip: Tensor | None = None,
    mlp_out: Tensor | None = None,
) -> TranscodeStats:
    """Return transcode's recon with each token's l0 and l1; only recon is differentiable.

    The delta's l0 and l1 do not depend on alpha (also at 0), are 0 without a delta, and NaN in a NaN row.
    """
    recon, *stats = torch.ops.deltatc.transcode_stats(*_arguments(x, base, delta, alpha, k_base, k_delta, bandwidth))
    return TranscodeStats(_finished(recon, x, W_skip, mlp_out), *(stat.detach() for stat in stats))


def encode(x: Tensor, weights: Weights, k: int | None = None) -> Tensor:
    """Return dense acts [..., d_sae] of x [..., d_model], in plain torch; the threshold gets no gradient."""
    check_x(x)
    _check_weights("weights", weights, x)
    check_k("k", k, weights.b_enc.shape[0])
    return encode_dense(x, weights, k)[0]


def decode(acts: Tensor, weights: Weights) -> Tensor:
    """Return recon [..., d_model] of dense acts [..., d_sae], in plain torch."""
    if not isinstance(acts, Tensor) or acts.dim() < 1 or acts.shape[-1] != weights.W_dec.shape[0]:
        raise OpError(f"acts is {described(acts)}; expected [..., d_sae = {weights.W_dec.shape[0]}]")
    if acts.dtype != weights.W_dec.dtype or acts.device != weights.W_dec.device:
        raise OpError(f"acts is {described(acts)}; expected the dtype and device of W_dec, {described(weights.W_dec)}")
    return decode_dense(acts, weights)


def build_info() -> dict[str, Any]:
    """Say what was built: CUDA, architectures, compiler; CPU instruction sets, the one in use first."""
    nvcc, *archs = torch.ops.deltatc.cuda_build().split("+")
    return {"cuda": bool(nvcc), "archs": archs, "nvcc": nvcc or None, "cpu": torch.ops.deltatc.cpu_kernels().split()}


def _finished(recon: Tensor, x: Tensor, W_skip: Tensor | None, mlp_out: Tensor | None) -> Tensor:
    """Add the skip connection and take the error: both touch d_model values a token, and cost next to nothing."""
    d_model = x.shape[-1]
    for name, tensor, shape in (("W_skip", W_skip, (d_model, d_model)), ("mlp_out", mlp_out, x.shape)):
        if tensor is None:
            continue
        fits = isinstance(tensor, Tensor) and tensor.shape == shape
        if not fits or tensor.dtype != x.dtype or tensor.device != x.device:
            raise OpError(f"{name} is {described(tensor)}; expected {x.dtype} {list(shape)} on {x.device} to fit x")
    if W_skip is not None:
        recon = recon + x @ W_skip
    return recon if mlp_out is None else mlp_out - recon


def _arguments(
    x: Tensor,
    base: Weights,
    delta: Weights | None,
    alpha: float | Tensor,
    k_base: int | None,
    k_delta: int | None,
    bandwidth: float,
) -> tuple[Any, ...]:
    """Check everything, and return the operator's arguments."""
    check_x(x)
    if x.device.type not in ("cpu", "cuda"):
        raise OpError(f"x is on {x.device}; expected the CPU or a CUDA device")
    _check_weights("base", base, x)
    check_k("k_base", k_base, base.b_enc.shape[0])
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in base):
        raise OpError(BASE_IS_FROZEN)
    if delta is not None:
        _check_weights("delta", delta, x)
        check_k("k_delta", k_delta, delta.b_enc.shape[0])
    elif k_delta is not None:
        raise OpError(f"k_delta = {k_delta!r} without a delta; expected None")
    if isinstance(alpha, Tensor):
        if alpha.dim() != 0 or not alpha.is_floating_point() or alpha.device != x.device:
            raise OpError(f"alpha is {described(alpha)}; expected a number or a floating-point scalar tensor beside x")
    elif isinstance(alpha, (int, float)) and math.isfinite(alpha):
        alpha = torch.full((), alpha, dtype=torch.float64, device=x.device)
    else:
        raise OpError(f"alpha = {alpha!r}; expected a finite number or a floating-point scalar tensor")
    if not isinstance(bandwidth, (int, float)) or not 0 < bandwidth < math.inf:
        raise OpError(f"bandwidth = {bandwidth!r}; expected a finite number above 0")
    return (x, *base, *(delta or (None,) * 5), alpha, k_base, k_delta, bandwidth)


def check_x(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() < 1 or x.dtype not in DTYPES:
        raise OpError(f"x is {described(x)}; expected a [..., d_model] tensor of float64, float32 or bfloat16")


def _check_weights(name: str, weights: Weights, x: Tensor) -> None:
    if not isinstance(weights, Weights) or not all(isinstance(tensor, Tensor) for tensor in weights):
        raise OpError(f"{name} is {type(weights).__name__}; expected Weights of five tensors")
    if weights.W_enc.dim() != 2:
        raise OpError(f"{name}.W_enc is {described(weights.W_enc)}; expected [d_model, d_sae]")
    d_model, width = x.shape[-1], weights.W_enc.shape[1]
    shapes = ((d_model, width), (width,), (width,), (width, d_model), (d_model,))
    for field, tensor, shape in zip(Weights._fields, weights, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != x.device:
            expected = f"{x.dtype} {list(shape)} on {x.device}"
            raise OpError(f"{name}.{field} is {described(tensor)}; expected {expected} to fit x")


def check_k(name: str, k: int | None, width: int) -> None:
    if k is not None and (not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= width):
        raise OpError(f"{name} = {k!r}; expected None, or a whole number from 1 to {width}, the latents")


def described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} {list(value.shape)} on {value.device}"


def _load_library() -> None:
    found = sorted(Path(__file__).parent.glob("_ops*.so"))
    if not found:
        raise ImportError("deltatc's operators are not built; run `make setup`")
    torch.ops.load_library(found[0])


_load_library()


_PACKED: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Packed(NamedTuple):
    """W_enc's latents as rows, and on the CPU their screen in eight bits (csrc/cpu/screen.inc), a byte a weight."""

    rows: Tensor
    screen: Tensor | None


def packed(W_enc: Tensor) -> Packed:
    """Return W_enc as a kernel reads it; of a frozen one it is kept until W_enc is freed or changed in place.

    A change is seen by the tensor's version counter, which every operation on the tensor itself raises; what writes
    around it (`W_enc.data.mul_()`, NumPy on shared memory) is not seen, as autograd does not see it either. What is
    being trained is packed at every call: a delta is small.
    """
    if W_enc.requires_grad or W_enc.is_inference():  # the latter counts no versions
        return _pack(W_enc)
    state = (W_enc.data_ptr(), W_enc._version, W_enc.shape, W_enc.stride(), W_enc.dtype)
    kept = _PACKED.get(W_enc)
    if kept is None or kept[0] != state:
        kept = _PACKED[W_enc] = (state, _pack(W_enc))
    return kept[1]


def _pack(W_enc: Tensor) -> Packed:
    return Packed(W_enc.detach().t().contiguous(), None) if W_enc.is_cuda else Packed(*torch.ops.deltatc.pack(W_enc))


def _by_kernel(kernels: Any, want_stats: bool, *arguments: Any) -> tuple[Tensor, ...]:
    x, W_enc, b_enc, threshold, W_dec, b_dec, delta_W_enc, *rest = arguments
    # What the wrapper has said in better words, for those who call torch.ops directly.
    encoders = {"W_enc": W_enc} if delta_W_enc is None else {"W_enc": W_enc, "delta_W_enc": delta_W_enc}
    for name, tensor in encoders.items():
        if not isinstance(tensor, Tensor) or x.dim() < 1 or tensor.shape[:-1] != x.shape[-1:]:
            raise OpError(f"{name} is {described(tensor)}; expected [d_model, d_sae] to fit x, {described(x)}")
    if not 0 < rest[-1] < math.inf:
        raise OpError(f"bandwidth = {rest[-1]!r}; expected a finite number above 0")
    base, delta = packed(W_enc), (None, None) if delta_W_enc is None else packed(delta_W_enc)
    return kernels.transcode_packed(x, *base, b_enc, threshold, W_dec, b_dec, *delta, *rest[:-1], want_stats)


def plain_stats(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """transcode_stats by its plain-torch definition, in chunks of tokens: where a device has no kernel for it."""
    *weights, alpha, k_base, k_delta, bandwidth = rest
    base, delta = Weights(*weights[:5]), None if weights[5] is None else Weights(*weights[5:])
    rows = x.reshape(-1, x.shape[-1])
    step = max(1, PLAIN_ELEMENTS // max(1, base.W_enc.shape[1]))
    parts = [transcode_stats_ref(part, base, delta, alpha, k_base, k_delta, bandwidth) for part in rows.split(step)]
    recon, *stats = (torch.cat(field) for field in zip(*parts, strict=True))
    return recon.reshape(x.shape), *(stat.reshape(x.shape[:-1]) for stat in stats)


def cuda_kernels_take(x: Tensor, *ks: int | None) -> bool:
    """Whether csrc/cuda/ computes this: built, bfloat16, d_model a multiple of 8 up to 8192, k up to 4096."""
    d_model = x.shape[-1]
    fits = x.dtype == torch.bfloat16 and 8 <= d_model <= 8192 and d_model % 8 == 0
    return CUDA_KERNELS is not None and fits and all(k is None or k <= 4096 for k in ks)


def _on_cuda(want_stats: bool, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if not cuda_kernels_take(x, *rest[11:13]):
        return plain_stats(x, *rest)
    return _by_kernel(CUDA_KERNELS, want_stats, x, *rest)


CUDA_KERNELS: Any = torch.ops.deltatc if build_info()["cuda"] else None
for _device, _run in (("CPU", lambda *arguments: _by_kernel(torch.ops.deltatc, *arguments)), ("CUDA", _on_cuda)):
    torch.library.impl("deltatc::transcode_stats", _device, lambda *a, _run=_run: _run(True, *a))
    torch.library.impl("deltatc::transcode", _device, lambda *a, _run=_run: _run(False, *a)[0])


@torch.library.register_fake("deltatc::transcode")
def _(x: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("deltatc::transcode_stats")
def _(x: Tensor, *_rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *(x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(4))


@torch.library.register_fake("deltatc::transcode_backward")
def _(_grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    inputs = [x if t is None else t for t in (x, *rest[5:11])]
    return [t.new_empty(t.shape if need else 0) for t, need in zip(inputs, rest[-1], strict=True)]


@torch.library.impl("deltatc::transcode_backward", "default")
def _(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    """Gradients of x, the delta's five tensors and alpha, in float32 or wider, over chunks of tokens."""
    *weights, alpha, k_base, k_delta, bandwidth, needed = rest
    inputs = [x if t is None else t for t in (x, *weights[5:], alpha)]
    if x.is_cuda and weights[5] is not None and k_delta is None and not needed[0] and cuda_kernels_take(x):
        return delta_gradients(grad, x, Weights(*weights[5:]), alpha, bandwidth, needed)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = [t.new_zeros(t.shape if n else 0, dtype=wide) for t, n in zip(inputs, needed, strict=True)]
    base, delta = weights[:5], weights[5:]
    parts = []
    if needed[0]:
        only_x = [True] + [False] * 6
        parts.append((Weights(*(t.to(wide) for t in base)), x.new_ones((), dtype=wide), k_base, only_x))
    if delta[0] is not None:
        parts.append((Weights(*(t.to(wide) for t in delta)), alpha.to(wide), k_delta, needed))

    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    step = max(1, BACKWARD_ELEMENTS // max(1, x.shape[-1], *(part.W_enc.shape[1] for part, *_ in parts)))
    for start in range(0, rows.shape[0], step):
        chunk = slice(start, start + step)
        for part, scale, k, wanted in parts:
            x_chunk, grad_chunk = rows[chunk].to(wide), grads[chunk].to(wide)
            found = part_gradients(x_chunk, grad_chunk, part, scale, k, bandwidth, wanted)
            targets = [sums[0].view(rows.shape)[chunk] if needed[0] else sums[0], *sums[1:]]
            for target, gradient in zip(targets, found, strict=True):
                if gradient is not None:
                    target += gradient
    return [s.to(t.dtype) for t, s in zip(inputs, sums, strict=True)]


def delta_gradients(
    grad: Tensor, x: Tensor, delta: Weights, alpha: Tensor, bandwidth: float, needed: list[bool]
) -> list[Tensor]:
    """transcode_backward by csrc/cuda/backward.cu, where x needs no gradient and no k limits the delta."""
    wanted = sum(need << i for i, need in enumerate(needed[1:]))
    arguments = (grad, x, packed(delta.W_enc).rows, *delta[1:], alpha, bandwidth, wanted)
    found = CUDA_KERNELS.delta_backward(*arguments)
    return [x.new_empty(0), *(f.to(t.dtype) for f, t in zip(found, (*delta, alpha), strict=True))]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:12])
    ctx.options = inputs[12:]


def _backward(ctx: Any, grad: Tensor, *_stats: Tensor) -> tuple[Tensor | None, ...]:
    needed = [ctx.needs_input_grad[i] for i in (0, 6, 7, 8, 9, 10, 11)]
    if any(ctx.needs_input_grad[1:6]):
        raise OpError(BASE_IS_FROZEN)
    gradients = torch.ops.deltatc.transcode_backward(grad, *ctx.saved_tensors, *ctx.options, needed)
    x, *delta_and_alpha = (g if need else None for g, need in zip(gradients, needed, strict=True))
    return (x, *(None,) * 5, *delta_and_alpha, *(None,) * 3)


def _backward_twice(_ctx: Any, *_grads: Any) -> None:
    raise OpError("transcode is differentiable once; expected no second derivative to be asked for")


torch.library.register_autograd("deltatc::transcode", _backward, setup_context=_setup_context)
torch.library.register_autograd("deltatc::transcode_stats", _backward, setup_context=_setup_context)
torch.library.register_autograd("deltatc::transcode_backward", _backward_twice)
