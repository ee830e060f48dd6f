"""Sparse acts as values and indices: encode once, decode at many alphas.

The fused chain is ops.transcode; these are its halves, for looking at acts and for sweeps of alpha. The schemas are in
csrc/ops.cpp.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltatc import ops
from deltatc.errors import OpError

DECODE_ELEMENTS = 1 << 22
"""Gradients of decode, and of encode, take so few tokens at a time that the rows they gather have so many elements."""


class SparseActs(NamedTuple):
    """values [..., capacity], indices [..., capacity] int32, counts [...] int32; zeros behind a token's counts.

    A token's acts are in the order of their latents. A token that is not finite has one act, NaN.
    """

    values: Tensor
    indices: Tensor
    counts: Tensor


def encode_jumprelu(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, capacity: int | None = None
) -> SparseActs:
    """Return the acts of x [..., d_model]: pre_acts above max(threshold, 0).

    counts are true counts; one above `capacity` raises, and None is the largest count. The threshold gets no gradient:
    the straight-through window counts latents on both sides of it, and an inactive one has no place here; train with
    ops.transcode. Raises OpError, naming the argument.
    """
    _check_encoder(x, W_enc, b_enc, threshold)
    if capacity is not None and (not isinstance(capacity, int) or isinstance(capacity, bool) or capacity < 1):
        raise OpError(f"capacity = {capacity!r}; expected None or a whole number of at least 1")
    try:
        return SparseActs(*torch.ops.deltatc.encode_jumprelu(x, W_enc, b_enc, threshold, capacity))
    except RuntimeError as error:
        if "over capacity" not in str(error):
            raise
        raise OpError(str(error).splitlines()[0]) from None


def encode_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> SparseActs:
    """Return the k largest positive pre_acts of x [..., d_model] (ties: lower index); values [..., k].

    Raises OpError, naming the argument.
    """
    _check_encoder(x, W_enc, b_enc, b_enc)
    ops.check_k("k", k, b_enc.shape[0])
    if k is None:
        raise OpError("k = None; expected a whole number of at least 1")
    return SparseActs(*torch.ops.deltatc.encode_topk(x, W_enc, b_enc, k))


def decode(
    acts: SparseActs,
    W_dec: Tensor,
    b_dec: Tensor,
    delta_acts: SparseActs | None = None,
    delta_W_dec: Tensor | None = None,
    delta_b_dec: Tensor | None = None,
    alpha: float | Tensor = 1.0,
) -> Tensor:
    """Return recon [..., d_model]: acts @ W_dec + b_dec + alpha * (delta_acts @ delta_W_dec + delta_b_dec).

    alpha = 0 is the base's part bit for bit. Differentiable, once, in values, W_dec, b_dec and alpha. Raises OpError.
    """
    delta = (delta_acts, delta_W_dec, delta_b_dec)
    if any(tensor is None for tensor in delta) != all(tensor is None for tensor in delta):
        raise OpError("delta_acts, delta_W_dec, delta_b_dec: expected all three or none")
    _check_acts("", acts, W_dec, b_dec)
    if delta_acts is not None and delta_W_dec is not None:
        _check_acts("delta_", delta_acts, delta_W_dec, delta_b_dec)
        if delta_acts.values.shape[:-1] != acts.values.shape[:-1] or delta_W_dec.shape[1] != W_dec.shape[1]:
            found = ops.described(delta_acts.values)
            raise OpError(f"delta_acts.values is {found}; expected the tokens and d_model of the base's acts")
    if not isinstance(alpha, Tensor):
        alpha = torch.full((), alpha, dtype=torch.float64, device=W_dec.device)
    elif alpha.dim() != 0 or not alpha.is_floating_point() or alpha.device != W_dec.device:
        raise OpError(f"alpha is {ops.described(alpha)}; expected a number or a floating-point scalar tensor")
    return torch.ops.deltatc.decode(*acts, W_dec, b_dec, *(delta_acts or (None,) * 3), delta_W_dec, delta_b_dec, alpha)


def encode_jumprelu_ref(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, capacity: int | None = None
) -> SparseActs:
    """encode_jumprelu in plain torch, by way of dense acts."""
    dense = ops.encode_dense(x, ops.Weights(W_enc, b_enc, threshold, W_enc.T, x.new_empty(x.shape[-1])), None)[0]
    return _sparse(dense, capacity)


def encode_topk_ref(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> SparseActs:
    """encode_topk in plain torch, by way of dense acts."""
    none = torch.zeros_like(b_enc)
    dense = ops.encode_dense(x, ops.Weights(W_enc, b_enc, none, W_enc.T, x.new_empty(x.shape[-1])), k)[0]
    return _sparse(dense, k)


def decode_ref(acts: SparseActs, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """One part of decode in plain torch: acts @ W_dec + b_dec."""
    return (acts.values.unsqueeze(-1) * W_dec[acts.indices.long()]).sum(-2) + b_dec


def _sparse(dense: Tensor, capacity: int | None) -> SparseActs:
    broken = dense.isnan().any(-1, keepdim=True)
    dense = torch.where(broken, 0.0, dense)
    active = dense > 0
    active[..., :1] |= broken
    dense = torch.cat([torch.where(broken, torch.nan, dense[..., :1]), dense[..., 1:]], -1)
    counts = active.sum(-1)
    largest = int(counts.max()) if counts.numel() else 0
    if capacity is not None and largest > capacity:
        raise OpError(
            f"a token has {largest} active latents, over capacity = {capacity}; raise capacity, or give None for no "
            f"limit"
        )
    width = largest if capacity is None else capacity
    order = (~active).to(torch.int8).sort(dim=-1, stable=True).indices[..., :width]
    real = _real(order, counts)
    values = torch.where(real, dense.gather(-1, order), 0.0)
    return SparseActs(values, torch.where(real, order, 0).int(), counts.int())


def _check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor) -> None:
    ops.check_x(x)
    if not isinstance(W_enc, Tensor) or W_enc.dim() != 2:
        raise OpError(f"W_enc is {ops.described(W_enc)}; expected [d_model, d_sae]")
    width = W_enc.shape[1]
    for name, tensor, shape in (
        ("W_enc", W_enc, (x.shape[-1], width)), ("b_enc", b_enc, (width,)), ("threshold", threshold, (width,))
    ):  # fmt: skip
        fits = isinstance(tensor, Tensor) and tensor.shape == shape
        if not fits or tensor.dtype != x.dtype or tensor.device != x.device:
            expected = f"{x.dtype} {list(shape)} on {x.device}"
            raise OpError(f"{name} is {ops.described(tensor)}; expected {expected} to fit x")


def _check_acts(prefix: str, acts: SparseActs, W_dec: Any, b_dec: Any) -> None:
    if not isinstance(acts, SparseActs):
        raise OpError(f"{prefix}acts is {type(acts).__name__}; expected SparseActs")
    values, indices, counts = acts
    ops.check_x(values)
    if not isinstance(W_dec, Tensor) or W_dec.dim() != 2 or W_dec.dtype != values.dtype:
        raise OpError(f"{prefix}W_dec is {ops.described(W_dec)}; expected {values.dtype} [d_sae, d_model]")
    if not isinstance(b_dec, Tensor) or b_dec.shape != W_dec.shape[1:] or b_dec.dtype != values.dtype:
        raise OpError(f"{prefix}b_dec is {ops.described(b_dec)}; expected {values.dtype} [{W_dec.shape[1]}]")
    if indices.shape != values.shape or counts.shape != values.shape[:-1]:
        shapes = f"{list(values.shape)}, {list(indices.shape)} and {list(counts.shape)}"
        raise OpError(f"{prefix}acts has shapes {shapes}; expected [..., capacity] twice and [...]")
    if indices.dtype != torch.int32 or counts.dtype != torch.int32:
        raise OpError(f"{prefix}acts has indices of {indices.dtype} and counts of {counts.dtype}; expected int32")


def _by_packed(
    kernels: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, k: int | None, capacity: int | None
) -> Any:
    if x.dim() < 1 or W_enc.dim() != 2 or W_enc.shape[0] != x.shape[-1]:
        raise OpError(f"W_enc is {ops.described(W_enc)}; expected [d_model, d_sae] to fit x, {ops.described(x)}")
    return kernels.encode_packed(x, *ops.packed(W_enc), b_enc, threshold, k, capacity)


def _in_chunks(encode: Any, x: Tensor, width: int) -> tuple[Tensor, ...]:
    """SparseActs of all rows of x by a plain twin that holds dense acts, so few tokens at a time as ops allows."""
    rows = x.reshape(-1, x.shape[-1])
    parts = [encode(part) for part in rows.split(max(1, ops.PLAIN_ELEMENTS // max(1, width)))]
    capacity = max(part.values.shape[-1] for part in parts)
    padded = [
        [torch.nn.functional.pad(t, (0, capacity - t.shape[-1])) for t in part[:2]] + [part.counts] for part in parts
    ]
    values, indices, counts = (torch.cat(field) for field in zip(*padded, strict=True))
    leading = x.shape[:-1]
    return values.reshape(*leading, capacity), indices.reshape(*leading, capacity), counts.reshape(leading)


@torch.library.impl("deltatc::encode_jumprelu", "CPU")
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, capacity: int | None) -> Any:
    return _by_packed(torch.ops.deltatc, x, W_enc, b_enc, threshold, None, capacity)


@torch.library.impl("deltatc::encode_topk", "CPU")
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Any:
    return _by_packed(torch.ops.deltatc, x, W_enc, b_enc, torch.zeros_like(b_enc), k, k)


def plain_jumprelu(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, capacity: int | None) -> Any:
    """encode_jumprelu where a device has no kernel for it."""
    return _in_chunks(lambda rows: encode_jumprelu_ref(rows, W_enc, b_enc, threshold, capacity), x, W_enc.shape[1])


def plain_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Any:
    """encode_topk where a device has no kernel for it."""
    return _in_chunks(lambda rows: encode_topk_ref(rows, W_enc, b_enc, k), x, W_enc.shape[1])


def plain_decode(values: Tensor, indices: Tensor, _counts: Tensor, W_dec: Tensor, b_dec: Tensor, *rest: Any) -> Tensor:
    """decode where a device has no kernel for it: zeros behind the counts add nothing."""
    recon = _gathered(values, indices, W_dec) + b_dec
    delta_values, delta_indices, _, delta_W_dec, delta_b_dec, alpha = rest
    if delta_values is None:
        return recon
    part = alpha.to(values.dtype) * (_gathered(delta_values, delta_indices, delta_W_dec) + delta_b_dec)
    return torch.where(alpha == 0, recon, recon + part)


def _jumprelu_on_cuda(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, capacity: int | None) -> Any:
    if not ops.cuda_kernels_take(x):
        return plain_jumprelu(x, W_enc, b_enc, threshold, capacity)
    return _by_packed(ops.CUDA_KERNELS, x, W_enc, b_enc, threshold, None, capacity)


def _topk_on_cuda(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Any:
    if not ops.cuda_kernels_take(x, k):
        return plain_topk(x, W_enc, b_enc, k)
    return _by_packed(ops.CUDA_KERNELS, x, W_enc, b_enc, torch.zeros_like(b_enc), k, k)


def _decode_on_cuda(values: Tensor, indices: Tensor, counts: Tensor, W_dec: Tensor, *rest: Any) -> Tensor:
    decode_acts = ops.CUDA_KERNELS.decode_acts if ops.cuda_kernels_take(W_dec) else plain_decode
    return decode_acts(values, indices, counts, W_dec, *rest)


torch.library.impl("deltatc::encode_jumprelu", "CUDA", _jumprelu_on_cuda)
torch.library.impl("deltatc::encode_topk", "CUDA", _topk_on_cuda)
torch.library.impl("deltatc::decode", "CUDA", _decode_on_cuda)


@torch.library.register_fake("deltatc::encode_jumprelu")
def _(x: Tensor, _W: Tensor, _b: Tensor, _threshold: Tensor, capacity: int | None) -> Any:
    return _empty(x, torch.library.get_ctx().new_dynamic_size() if capacity is None else capacity)


@torch.library.register_fake("deltatc::encode_topk")
def _(x: Tensor, _W: Tensor, _b: Tensor, k: int) -> Any:
    return _empty(x, k)


@torch.library.register_fake("deltatc::decode")
def _(values: Tensor, _indices: Tensor, _counts: Tensor, W_dec: Tensor, *_rest: Any) -> Tensor:
    return values.new_empty(*values.shape[:-1], W_dec.shape[1])


def _empty(x: Tensor, capacity: Any) -> tuple[Tensor, ...]:
    shape = (*x.shape[:-1], capacity)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), x.new_empty(shape[:-1], dtype=torch.int32)


def _chunks(indices: Tensor, width: int) -> Any:
    """Slices of tokens whose gathered rows [tokens, capacity, width] have at most DECODE_ELEMENTS elements."""
    n_tokens, capacity = indices.shape
    step = max(1, DECODE_ELEMENTS // max(1, capacity * width))
    return (slice(start, start + step) for start in range(0, n_tokens, step))


def _real(indices: Tensor, counts: Tensor) -> Tensor:
    """Which slots hold an act: those before their token's count."""
    return torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)


def _gathered(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """Rows of W [d_sae, d] weighted with values and added up: [..., d]."""
    flat_values, flat = values.reshape(-1, values.shape[-1]), indices.reshape(-1, values.shape[-1])
    out = W.new_empty(flat.shape[0], W.shape[1])
    for chunk in _chunks(flat, W.shape[1]):
        out[chunk] = torch.einsum("nk,nkd->nd", flat_values[chunk], W[flat[chunk].long()])
    return out.reshape(*values.shape[:-1], W.shape[1])


def _dotted(rows: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    """Each token's row times the rows of W [d_sae, d] that its indices name: [..., capacity]."""
    flat_rows, flat = rows.reshape(-1, rows.shape[-1]), indices.reshape(-1, indices.shape[-1])
    out = W.new_empty(flat.shape)
    for chunk in _chunks(flat, W.shape[1]):
        out[chunk] = torch.einsum("nd,nkd->nk", flat_rows[chunk], W[flat[chunk].long()])
    return out.reshape(indices.shape)


def _scattered(values: Tensor, indices: Tensor, rows: Tensor, width: int) -> Tensor:
    """Sum over tokens of value * row at each of its indices: [width, d]."""
    flat_values, flat = values.reshape(-1, values.shape[-1]), indices.reshape(-1, values.shape[-1])
    flat_rows = rows.reshape(-1, rows.shape[-1])
    out = rows.new_zeros(width, rows.shape[-1])
    for chunk in _chunks(flat, rows.shape[-1]):
        outer = flat_values[chunk].unsqueeze(-1) * flat_rows[chunk].unsqueeze(-2)
        out.index_add_(0, flat[chunk].reshape(-1).long(), outer.reshape(-1, rows.shape[-1]))
    return out


def _decode_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, alpha = ctx.saved_tensors
    found: list[Tensor | None] = []
    for part in range(2):
        values, indices, counts, W_dec, b_dec = tensors[part * 5 : part * 5 + 5]
        needs = ctx.needs_input_grad[part * 5 : part * 5 + 5]
        if values is None:
            found += [None] * 5
            continue
        real = _real(indices, counts)
        up = grad if part == 0 else alpha.to(grad.dtype) * grad
        found.append(torch.where(real, _dotted(up, indices, W_dec), 0.0) if needs[0] else None)
        found += [None, None]
        found.append(_scattered(torch.where(real, values, 0.0), indices, up, W_dec.shape[0]) if needs[3] else None)
        found.append(up.reshape(-1, b_dec.shape[0]).sum(0) if needs[4] else None)
    of_alpha = None
    if ctx.needs_input_grad[10]:
        of_alpha = torch.zeros_like(alpha)
        if tensors[5] is not None:
            values = torch.where(_real(tensors[6], tensors[7]), tensors[5], 0.0)
            part = _gathered(values, tensors[6], tensors[8]) + tensors[9]
            of_alpha = (grad * part).sum().to(alpha.dtype)
    return (*found, of_alpha)


def _encode_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, W_enc = inputs[:2]
    _, indices, counts = output
    ctx.save_for_backward(x, W_enc, indices, counts)
    ctx.n_inputs = len(inputs)
    ctx.mark_non_differentiable(indices, counts)


def _encode_backward(ctx: Any, grad: Tensor, *_others: Any) -> tuple[Tensor | None, ...]:
    x, W_enc, indices, counts = ctx.saved_tensors
    grad = torch.where(_real(indices, counts), grad, 0.0)
    needs = ctx.needs_input_grad
    of_x = _gathered(grad, indices, W_enc.T) if needs[0] else None
    of_W = _scattered(grad, indices, x, W_enc.shape[1]).T if needs[1] else None
    of_b = None
    if needs[2]:
        of_b = grad.new_zeros(W_enc.shape[1]).index_add_(0, indices.reshape(-1).long(), grad.reshape(-1))
    return (of_x, of_W, of_b, *(None,) * (ctx.n_inputs - 3))


torch.library.register_autograd("deltatc::encode_jumprelu", _encode_backward, setup_context=_encode_context)
torch.library.register_autograd("deltatc::encode_topk", _encode_backward, setup_context=_encode_context)
torch.library.register_autograd("deltatc::decode", _decode_backward, setup_context=_decode_context)
