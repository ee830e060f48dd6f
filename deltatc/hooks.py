"""Capturing and replacing MLPs inside a running model: `capture_mlp` and `replace_mlp`, both context managers.

Hooks live only inside the `with`; the model is left as it was found, also after an exception. BOS and padding keep the
model's own MLP output and enter no statistic. Which positions those are is read from the model call itself, so that
it stays true under left padding and for the one-token calls of generation with a KV cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltatc.errors import PartsNotRecorded, PositionError, SiteError
from deltatc.models import check_layers, decoder, decoder_layers, unwrap
from deltatc.sites import site
from deltatc.transcoder import DeltaTranscoder, Transcoder

MODES = ("fused", "no_delta")


@dataclass
class Positions:
    """The positions of the model call that is running, each [batch, pos]; filled anew by every call."""

    replaced: Tensor | None = None
    """True where the MLP is replaced and captured: neither BOS nor padding."""
    counted: Tensor | None = None
    """True where statistics are taken: `replaced`, and not EOS (a finished row of a batch goes on without meaning)."""


@dataclass
class Captured:
    """What `capture_mlp` saw in the last model call; [batch, pos, d_model] for each captured layer."""

    positions: Positions
    resid_mid: dict[int, Tensor] = field(default_factory=dict)
    """The residual stream before the MLP (input of pre_feedforward_layernorm)."""
    mlp_out: dict[int, Tensor] = field(default_factory=dict)
    """What the MLP adds to the residual (output of post_feedforward_layernorm)."""
    before_post_norm: dict[int, Tensor] = field(default_factory=dict)
    """The MLP's output before the post-feedforward norm."""


@dataclass
class LayerStats:
    """Sums over the counted tokens of all model calls inside one `replace_mlp`."""

    n_tokens: int = 0
    l0_base: float = 0.0
    l1_base: float = 0.0
    l0_delta: float = 0.0
    l1_delta: float = 0.0

    def add(self, found: Any, counted: Tensor) -> None:
        self.n_tokens += int(counted.sum())
        for name in ("l0_base", "l1_base", "l0_delta", "l1_delta"):
            setattr(self, name, getattr(self, name) + float(getattr(found, name)[counted].double().sum()))


@contextmanager
def capture_mlp(model: nn.Module, layers: Sequence[int] | None = None) -> Iterator[Captured]:
    """Record each layer's MLP input and output during the model calls inside the `with` (the last call stays)."""
    if layers is None:
        layers = range(len(decoder_layers(model)))
    check_layers(model, list(layers), "capture_mlp")
    with ExitStack() as stack:
        captured = Captured(_watch_positions(model, stack))
        for layer in layers:
            pre, post = _norms(model, layer)
            _hook(stack, pre.register_forward_pre_hook(_recorder(captured.resid_mid, layer, 0)))
            _hook(stack, post.register_forward_pre_hook(_recorder(captured.before_post_norm, layer, 0)))
            _hook(stack, post.register_forward_hook(_output_recorder(captured.mlp_out, layer)))
        yield captured


@contextmanager
def replace_mlp(
    model: nn.Module,
    transcoders: Mapping[int, Transcoder | DeltaTranscoder],
    mode: str = "fused",
    alpha: float | Tensor = 1.0,
    *,
    collect_stats: bool = False,
) -> Iterator[dict[int, LayerStats]]:
    """Replace the MLP of each given layer by its transcoder's recon during the model calls inside the `with`.

    `mode="fused"` computes base + alpha * delta, `"no_delta"` the base alone (the same as alpha = 0). `model` is a
    Hugging Face Gemma-2 or a TransformerBridge around one. With `collect_stats` the yielded {layer: LayerStats} are
    filled. Raises PartsNotRecorded where alpha or mode need a delta that a transcoder does not record, PositionError
    for a call whose BOS and padding cannot be known.
    """
    if mode not in MODES:
        raise SiteError(f"mode = {mode!r}; expected one of {', '.join(MODES)}")
    check_layers(model, list(transcoders), "replace_mlp")
    strength = 0.0 if mode == "no_delta" else alpha
    eps = unwrap(model).config.rms_norm_eps
    with ExitStack() as stack:
        positions = _watch_positions(model, stack)
        stats = {layer: LayerStats() for layer in transcoders}
        for layer, transcoder in transcoders.items():
            parts = _parts(transcoder, strength, layer)
            _check_width(parts, model, layer)
            replacement = _Replacement(parts, strength, eps, positions, stats[layer] if collect_stats else None)
            pre, post = _norms(model, layer)
            _hook(stack, pre.register_forward_pre_hook(replacement.read))
            # On a TransformerBridge write at the hook point, so that a user's own hook_mlp_out sees the replacement.
            _hook(stack, getattr(post, "hook_out", post).register_forward_hook(replacement.write))
        yield stats


class _Replacement:
    """The pair of hooks of one layer: read x before the MLP, write recon over its output."""

    def __init__(self, transcoder, alpha, eps, positions: Positions, stats: LayerStats | None):
        self.transcoder, self.alpha, self.eps, self.positions, self.stats = transcoder, alpha, eps, positions, stats
        self.site = site(transcoder.site)
        self.x: Tensor | None = None

    def read(self, norm: nn.Module, args: tuple) -> None:
        self.x = self.site.read(args[0], norm.weight, self.eps)

    def write(self, module: nn.Module, args: tuple, mlp_out: Tensor) -> Tensor:
        x, self.x = self.x, None
        assert x is not None and self.positions.replaced is not None
        if isinstance(self.transcoder, DeltaTranscoder):
            if self.stats is None:
                recon = self.transcoder(x, self.alpha)
            else:
                found = self.transcoder.stats(x, self.alpha)
                self.stats.add(found, self.positions.counted)
                recon = found.recon
        else:
            recon = self.transcoder(x)
            if self.stats is not None:
                self.stats.add(self.transcoder.stats(x), self.positions.counted)
        recon = (recon * self.site.scale(x.shape[-1])).to(mlp_out.dtype)
        return torch.where(self.positions.replaced.unsqueeze(-1), recon, mlp_out)


def _parts(transcoder: Transcoder | DeltaTranscoder, alpha: float | Tensor, layer: int) -> nn.Module:
    """Take a fused transcoder apart, so that base and delta are computed and counted apart."""
    if isinstance(transcoder, DeltaTranscoder):
        return transcoder
    if transcoder.d_new:
        return transcoder.unfuse()[1]
    if isinstance(alpha, Tensor) or alpha != 1.0:
        raise PartsNotRecorded(
            f"layer {layer}: this transcoder records no delta, so there is nothing for alpha or no_delta to act on; "
            "give a DeltaTranscoder or a fused transcoder, or mode='fused' with alpha=1"
        )
    return transcoder


def _check_width(transcoder: nn.Module, model: nn.Module, layer: int) -> None:
    width = unwrap(model).config.hidden_size
    if transcoder.d_model != width:
        raise SiteError(f"layer {layer}: the transcoder reads width {transcoder.d_model}; expected the model's "
                        f"hidden size {width}: it belongs to another model")  # fmt: skip


def _norms(model: nn.Module, layer: int) -> tuple[nn.Module, nn.Module]:
    block = decoder_layers(model)[layer]
    return block.pre_feedforward_layernorm, block.post_feedforward_layernorm


def _hook(stack: ExitStack, handle: Any) -> None:
    stack.callback(handle.remove)


def _recorder(into: dict[int, Tensor], layer: int, index: int):
    def hook(module: nn.Module, args: tuple) -> None:
        into[layer] = args[index].detach()

    return hook


def _output_recorder(into: dict[int, Tensor], layer: int):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        into[layer] = output.detach()

    return hook


def _watch_positions(model: nn.Module, stack: ExitStack) -> Positions:
    """Keep a Positions up to date from the arguments of every call of the decoder."""
    positions = Positions()
    config = unwrap(model).config

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        cache = kwargs.get("past_key_values")
        n_past = cache.get_seq_length() if cache is not None else 0
        positions.replaced, positions.counted = find_positions(
            input_ids, kwargs.get("inputs_embeds"), mask, n_past, config
        )

    _hook(stack, decoder(model).register_forward_pre_hook(hook, with_kwargs=True))
    return positions


def find_positions(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, attention_mask: Any, n_past: int, config: Any
) -> tuple[Tensor, Tensor]:
    """Return (replaced, counted), each bool [batch, pos], for one decoder call.

    Left out are padding (mask 0, or the pad token where it is not also EOS), BOS, and the first real position of a
    sequence in absolute terms (`n_past` cached positions come before this call's first). `counted` also leaves out EOS.
    """
    given = input_ids if input_ids is not None else inputs_embeds
    if given is None:
        raise PositionError("the model was called with neither input_ids nor inputs_embeds; pass one of them")
    batch, length = given.shape[:2]
    if attention_mask is None:
        if input_ids is None:
            raise PositionError(
                "the model was called with inputs_embeds and no attention_mask, so BOS and padding cannot be known; "
                "pass input_ids, or an attention_mask [batch, position] beside inputs_embeds"
            )
        real = torch.ones(batch, n_past + length, dtype=torch.bool, device=given.device)
    elif not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise PositionError(
            "the attention_mask is not of shape [batch, position], so padding cannot be known; pass the tokenizer's "
            "mask and a dynamic KV cache (a static cache makes masks of its own)"
        )
    elif attention_mask.shape != (batch, n_past + length):
        raise PositionError(
            f"the attention_mask is of shape {list(attention_mask.shape)}; expected [{batch}, {n_past + length}]: one "
            f"column for each of the {n_past} cached positions and the {length} of this call"
        )
    else:
        real = attention_mask.to(given.device).bool()
    position = (real.long().cumsum(-1) - 1)[:, -length:]
    replaced = real[:, -length:] & (position > 0)
    if input_ids is None:
        return replaced, replaced
    eos = _ids(config.eos_token_id)
    replaced = replaced & ~_is_any(input_ids, _ids(config.bos_token_id))
    replaced = replaced & ~_is_any(input_ids, _ids(config.pad_token_id) - eos)
    return replaced, replaced & ~_is_any(input_ids, eos)


def _ids(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)


def _is_any(input_ids: Tensor, ids: set[int]) -> Tensor:
    found = torch.zeros_like(input_ids, dtype=torch.bool)
    for token in ids:
        found |= input_ids == token
    return found
