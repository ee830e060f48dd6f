"""Transcoder, DeltaTranscoder and fuse: the modules, their algebra, and nothing about files or models.

Axes: any leading shape, then d_model (x, recon) or d_sae (acts). A module computes in its own dtype and returns
recon in x's dtype, so that a bfloat16 model can keep float32 transcoders.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from deltatc import ops
from deltatc.errors import FormatError, PartsNotRecorded
from deltatc.ops import Weights
from deltatc.sites import DEFAULT_SITE, site

KEYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


class Transcoder(nn.Module):
    """A sparse stand-in for an MLP: JumpReLU, or its `k` largest active latents (Gemma Scope, arXiv 2408.05147).

    W_enc [d_model, d_sae], b_enc [d_sae], W_dec [d_sae, d_model], b_dec [d_model], threshold [d_sae].
    `site` names where x is read (sites.py); `metadata` is free text that travels with the file.
    """

    b_dec_base: Tensor | None
    b_dec_delta: Tensor | None

    def __init__(
        self,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        threshold: Tensor,
        *,
        site: str = DEFAULT_SITE,
        k: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ):
        super().__init__()
        tensors = dict(zip(KEYS, (W_enc, b_enc, W_dec, b_dec, threshold), strict=True))
        check_shapes(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().contiguous(), requires_grad=False))
        self.site = _checked_site(site)
        self.k = k
        self.k_delta: int | None = None
        self.metadata = dict(metadata or {})
        # A fused transcoder also keeps each part's own b_dec: their sum cannot be taken apart again exactly.
        self.register_buffer("b_dec_base", None)
        self.register_buffer("b_dec_delta", None)
        self.d_new = 0

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents (of a fused transcoder: base and delta together)."""
        return self.W_enc.shape[1]

    @property
    def weights(self) -> Weights:
        return Weights(self.W_enc, self.b_enc, self.threshold, self.W_dec, self.b_dec)

    def encode(self, x: Tensor) -> Tensor:
        """Return dense acts [..., d_sae] of x [..., d_model], in x's dtype."""
        if self._selects_apart:
            base, delta = self.unfuse()
            return torch.cat([base.encode(x), delta.encode_delta(x)], dim=-1)
        return ops.encode(x.to(self.W_enc.dtype), self.weights, self.k).to(x.dtype)

    def decode(self, acts: Tensor) -> Tensor:
        """Return recon [..., d_model] of dense acts [..., d_sae], in the acts' dtype."""
        return ops.decode(acts.to(self.W_enc.dtype), self.weights).to(acts.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return recon [..., d_model] of x [..., d_model], in x's dtype."""
        if self._selects_apart:
            _, delta = self.unfuse()
            return delta(x)
        return ops.transcode(x.to(self.W_enc.dtype), self.weights, k_base=self.k).to(x.dtype)

    def stats(self, x: Tensor) -> ops.TranscodeStats:
        """Return recon with l0 and l1 (sum of |acts|) of the latents, a number a token; the delta's are 0.

        Only where base and delta pick their k largest apart are they also counted apart.
        """
        if self._selects_apart:
            return self.unfuse()[1].stats(x)
        found = ops.transcode_stats(x.to(self.W_enc.dtype), self.weights, k_base=self.k)
        return found._replace(recon=found.recon.to(x.dtype))

    def unfuse(self) -> tuple["Transcoder", "DeltaTranscoder"]:
        """Take a fused transcoder apart into the (base, delta) it was made of, bit for bit."""
        if self.b_dec_base is None or self.b_dec_delta is None:
            raise PartsNotRecorded(
                "this transcoder does not record a base and a delta, so it cannot be taken apart; expected one made "
                "by fuse() or loaded from its .safetensors file (params.npz keeps only the sum)"
            )
        n = self.d_sae - self.d_new
        of_base = (self.W_enc[:, :n], self.b_enc[:n], self.W_dec[:n], self.b_dec_base, self.threshold[:n])
        # Copies: what is done to a part in place must not reach back into some tensors of the whole.
        copies = (tensor.detach().clone() for tensor in of_base)
        base = Transcoder(*copies, site=self.site, k=self.k, metadata=self.metadata)
        delta = DeltaTranscoder(base, self.d_new, k=self.k_delta)
        delta.set_delta(
            W_enc=self.W_enc[:, n:], b_enc=self.b_enc[n:], W_dec=self.W_dec[n:], b_dec=self.b_dec_delta,
            threshold=self.threshold[n:],
        )  # fmt: skip
        return base, delta

    @property
    def _selects_apart(self) -> bool:
        """Whether base and delta pick their own k largest, so that one selection over both would be wrong."""
        return self.d_new > 0 and (self.k is not None or self.k_delta is not None)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_sae={self.d_sae}, d_new={self.d_new}, k={self.k}, site={self.site!r}"


class DeltaTranscoder(nn.Module):
    """`d_new` trainable latents beside a frozen base: base(x) + alpha * delta(x); exactly the base at the start.

    W_enc [d_model, d_new], b_enc [d_new], W_dec [d_new, d_model] (zero at the start), b_dec [d_model] (zero),
    threshold [d_new] are the delta's own. alpha scales the delta's b_dec too.
    """

    def __init__(self, base: Transcoder, d_new: int, *, k: int | None = None, seed: int = 0):
        super().__init__()
        if d_new < 1:
            raise FormatError(f"d_new = {d_new}; expected at least one new latent")
        self.base = base.requires_grad_(False)
        self.k = k
        like = {"dtype": base.W_enc.dtype, "device": base.W_enc.device}
        draw = torch.Generator().manual_seed(seed)
        directions = torch.randn(base.d_model, d_new, generator=draw)
        # Unit columns: on an RMS-normalised x every pre_act starts with about unit variance.
        self.W_enc = nn.Parameter((directions / directions.norm(dim=0)).to(**like))
        self.b_enc = nn.Parameter(torch.zeros(d_new, **like))
        self.W_dec = nn.Parameter(torch.zeros(d_new, base.d_model, **like))
        self.b_dec = nn.Parameter(torch.zeros(base.d_model, **like))
        self.threshold = nn.Parameter(torch.zeros(d_new, **like))

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_new(self) -> int:
        return self.W_enc.shape[1]

    @property
    def site(self) -> str:
        return self.base.site

    @property
    def weights(self) -> Weights:
        """The delta's own weights."""
        return Weights(self.W_enc, self.b_enc, self.threshold, self.W_dec, self.b_dec)

    def set_delta(self, **tensors: Tensor) -> None:
        """Replace the delta's W_enc, b_enc, W_dec, b_dec and threshold by copies of the given tensors."""
        check_shapes(tensors, d_model=self.d_model)
        if tensors["W_enc"].shape[1] != self.d_new:
            raise FormatError(f"W_enc has {tensors['W_enc'].shape[1]} latents; expected d_new = {self.d_new}")
        with torch.no_grad():
            for name in KEYS:
                getattr(self, name).copy_(tensors[name])

    def encode_delta(self, x: Tensor) -> Tensor:
        """Return the delta's dense acts [..., d_new]."""
        return ops.encode(x.to(self.W_enc.dtype), self.weights, self.k).to(x.dtype)

    def delta_only(self, x: Tensor) -> Tensor:
        """Return the delta's part of the recon (alpha = 1), its b_dec included."""
        no_base = _empty_weights(self.W_enc)
        inner = x.to(self.W_enc.dtype)
        return ops.transcode(inner, no_base, self.weights, k_delta=self.k).to(x.dtype)

    def forward(self, x: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
        """Return base(x) + alpha * delta_only(x); alpha = 0 is base(x) bit for bit on the CPU."""
        inner = x.to(self.W_enc.dtype)
        recon = ops.transcode(inner, self.base.weights, self.weights, alpha, self.base.k, self.k)
        return recon.to(x.dtype)

    def stats(self, x: Tensor, alpha: float | Tensor = 1.0) -> ops.TranscodeStats:
        """Return recon with l0 and l1 (sum of |acts|) of base and delta, a number a token."""
        inner = x.to(self.W_enc.dtype)
        found = ops.transcode_stats(inner, self.base.weights, self.weights, alpha, self.base.k, self.k)
        return found._replace(recon=found.recon.to(x.dtype))

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, d_new={self.d_new}, k={self.k}"


def fuse(base: Transcoder, delta: DeltaTranscoder) -> Transcoder:
    """Join base and delta into one ordinary Transcoder that computes base(x) + delta(x) and can be unfused."""
    if (base.d_model, base.site) != (delta.d_model, delta.site):
        raise FormatError(
            f"base (d_model {base.d_model}, site {base.site}) and delta (d_model {delta.d_model}, site {delta.site}) "
            "do not fit; fuse a delta with the base that it was trained beside"
        )
    new = {name: getattr(delta, name).detach().to(base.W_enc) for name in KEYS}
    fused = Transcoder(
        torch.cat([base.W_enc, new["W_enc"]], dim=1),
        torch.cat([base.b_enc, new["b_enc"]]),
        torch.cat([base.W_dec, new["W_dec"]]),
        base.b_dec + new["b_dec"],
        torch.cat([base.threshold, new["threshold"]]),
        site=base.site,
        k=base.k,
        metadata=base.metadata,
    )
    record_parts(fused, delta.d_new, base.b_dec, new["b_dec"], delta.k)
    return fused


def record_parts(fused: Transcoder, d_new: int, b_dec_base: Tensor, b_dec_delta: Tensor, k_delta: int | None) -> None:
    """Record in `fused` what unfuse() needs: its last `d_new` latents are the delta's, and each part's b_dec."""
    if not 0 < d_new < fused.d_sae:
        raise FormatError(f"d_new = {d_new} of {fused.d_sae} latents; expected at least one in each part")
    fused.d_new, fused.k_delta = d_new, k_delta
    fused.b_dec_base, fused.b_dec_delta = b_dec_base.detach().clone(), b_dec_delta.detach().clone()


def check_shapes(tensors: Mapping[str, Tensor], d_model: int | None = None) -> None:
    """Refuse tensors whose ranks, shapes or dtypes do not make a transcoder together."""
    W_enc = tensors["W_enc"]
    if W_enc.dim() != 2:
        raise FormatError(f"W_enc has shape {list(W_enc.shape)}; expected [d_model, d_sae]")
    width, d_sae = W_enc.shape
    if d_model is not None and width != d_model:
        raise FormatError(f"W_enc reads width {width}; expected d_model = {d_model}: a transcoder of another model?")
    wanted = {"b_enc": [d_sae], "W_dec": [d_sae, width], "b_dec": [width], "threshold": [d_sae]}
    for name, shape in wanted.items():
        if list(tensors[name].shape) != shape:
            raise FormatError(f"{name} has shape {list(tensors[name].shape)}; expected {shape} beside W_enc's "
                              f"[{width}, {d_sae}]")  # fmt: skip
    dtypes = {str(tensor.dtype) for tensor in tensors.values()}
    if len(dtypes) > 1 or W_enc.dtype not in ops.DTYPES:
        raise FormatError(
            f"the tensors are of {', '.join(sorted(dtypes))}; expected one floating-point dtype: float32, float64 or "
            "bfloat16"
        )


def _empty_weights(like: Tensor) -> Weights:
    d_model = like.shape[0]
    empty = like.new_zeros
    return Weights(empty(d_model, 0), empty(0), empty(0), empty(0, d_model), empty(d_model))


def _checked_site(name: str) -> str:
    site(name)
    return name
