"""params.yaml as frozen dataclasses: one block a pipeline stage, unknown or ill-typed keys refused by name."""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltatc.errors import ConfigError


def param(low: float | None = None, high: float | None = None, choices: tuple | None = None):
    """Declare a required parameter with its inclusive range or its choices (lists: each element)."""
    return field(metadata={"low": low, "high": high, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Model:
    path: str  # a Hugging Face folder with safetensors
    manifest: str  # what DVC depends on: the folder itself, or a file written by `deltatc manifest`


@dataclass(frozen=True, kw_only=True)
class Transcoders:
    path: str  # holds layer_L/width_W/average_l0_N/params.npz
    manifest: str
    width: str  # the W of width_W
    site: str = param(choices=("normalized", "normalized_with_gain", "resid_mid", "resid_mid_over_sqrt_d"))


@dataclass(frozen=True, kw_only=True)
class Prompts:
    source: str  # `data`, or a folder of external datasets
    seed: int = param(0)
    n_finetune: int = param(1)
    n_finetune_validation: int = param(1)
    n_delta: int = param(1)
    n_delta_validation: int = param(1)
    n_eval: int = param(1)  # rows of every evaluation subset
    copy_fraction: float = param(0, 1)  # share of copy rows in finetune and delta text


@dataclass(frozen=True, kw_only=True)
class Finetune:
    merged_model: str | None  # a ready finetuned model: training is skipped
    target_modules: str = param(choices=("mlp", "all", "attention"))
    r: int = param(1)
    lora_alpha: float = param(0)
    dropout: float = param(0, 1)
    lr: float = param(0)
    warmup_fraction: float = param(0, 1)
    weight_decay: float = param(0)
    clip_norm: float = param(0)
    n_epochs: float = param(0)
    batch_rows: int = param(1)
    accumulate: int = param(1)
    max_tokens: int = param(8)
    checkpoints: int = param(1)  # validations by generation, evenly spread; the best one is kept
    n_validation: int = param(1)  # validation rows generated at each of them
    gradient_checkpointing: bool
    max_new_tokens: int = param(1)


@dataclass(frozen=True, kw_only=True)
class SiteCheck:
    text: str  # JSONL of {"text": ...}: text like that the transcoders were trained on
    n_tokens: int = param(16)
    max_tokens: int = param(8)
    require_win: bool  # stop the pipeline when the declared site does not win
    l0_tolerance: float | None = param(0)  # stop when L0 is off its folder's number by more; null: warn at 0.15


@dataclass(frozen=True, kw_only=True)
class Delta:
    load_from: str | None  # a folder of ready deltas: training is skipped
    layers: list[int] | None  # null: every layer that has base transcoders
    d_new: list[int] = param(1)
    percentiles: list[float] = param(0, 1)
    target: str = param(choices=("recon", "mlp_diff"))
    l0_fraction: float = param(0, 1)  # delta L0 allowed, as a share of d_new
    l0_fraction_also: float | None = param(0, 1)  # the experiments' configuration is trained at this too
    n_tokens: int = param(1)  # training tokens in all
    n_chunks: int = param(1)  # the activations of n_tokens / n_chunks tokens are held at a time
    n_validation_tokens: int = param(1)
    n_steps: int = param(1)
    batch_tokens: int = param(1)
    lr: float = param(0)
    eval_every: int = param(1)  # steps
    patience: int = param(1)  # validations without a better FVU before stopping
    max_tokens: int = param(8)  # longest text
    seed: int = param(0)


@dataclass(frozen=True, kw_only=True)
class Fuse:
    npz: bool  # also write Gemma Scope's params.npz


@dataclass(frozen=True, kw_only=True)
class Exp1:
    subsets: list[str]
    n: int = param(1)  # rows of every subset
    max_tokens: int = param(8)


@dataclass(frozen=True, kw_only=True)
class Exp2a:
    d_new: int | None = param(1)  # null: the largest of delta.d_new
    percentile: float | None = param(0, 1)  # null: the middle one of delta.percentiles
    layers: list[int]
    jointly: bool  # also all layers at once
    n: int = param(1)
    max_new_tokens: int = param(1)


@dataclass(frozen=True, kw_only=True)
class Exp2b:
    """Goes on with exp2a's configuration, rows and limits; its alphas 0 and 1 are exp2a's no_delta and full."""

    layers: list[int]  # some of exp2a's
    jointly: bool
    alphas: list[float]


@dataclass(frozen=True, kw_only=True)
class Params:
    """Everything in params.yaml."""

    device: str
    dtype: str = param(choices=("float32", "bfloat16", "float64"))
    batch_size: int = param(1)  # sequences in a forward pass or a generation
    seed: int = param(0)
    model: Model
    transcoders: Transcoders
    prompts: Prompts
    finetune: Finetune
    site_check: SiteCheck
    delta: Delta
    fuse: Fuse
    exp1: Exp1
    exp2a: Exp2a
    exp2b: Exp2b


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check params.yaml; every problem is a ConfigError that names the key."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; run from the repository's root") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({error})") from None
    params = _build(Params, tree, "", str(path))
    _check_together(params, str(path))
    return params


def config_name(d_new: int, percentile: float, l0_fraction: float | None = None) -> str:
    """Name a configuration as files and metrics do: d32_p0.50, or d32_p0.50_l0.25 for another L0 share."""
    name = f"d{d_new}_p{percentile:.2f}"
    return name if l0_fraction is None else f"{name}_l{l0_fraction:.2f}"


def configurations(params: Params) -> list[tuple[str, int, float, float]]:
    """List (name, d_new, percentile, l0_fraction) of every delta that the pipeline makes, from params alone."""
    delta = params.delta
    grid = [(config_name(d_new, p), d_new, p, delta.l0_fraction) for d_new in delta.d_new for p in delta.percentiles]
    if delta.l0_fraction_also is not None:
        (d_new, p), also = studied(params), delta.l0_fraction_also
        grid.append((config_name(d_new, p, also), d_new, p, also))
    return grid


def studied(params: Params) -> tuple[int, float]:
    """Return (d_new, percentile) of the configuration that exp2a, exp2b and the headline numbers are about."""
    delta, chosen = params.delta, params.exp2a
    d_new = max(delta.d_new) if chosen.d_new is None else chosen.d_new
    middle = sorted(delta.percentiles)[len(delta.percentiles) // 2]
    return d_new, middle if chosen.percentile is None else chosen.percentile


def _check_together(params: Params, path: str) -> None:
    delta, exp2a, exp2b = params.delta, params.exp2a, params.exp2b
    choices: tuple[tuple[str, object, list], ...] = (
        ("exp2a.d_new", exp2a.d_new, [None, *delta.d_new]),
        ("exp2a.percentile", exp2a.percentile, [None, *delta.percentiles]),
        ("exp2b.jointly", exp2b.jointly, [False, exp2a.jointly]),
        *((f"exp2b.layers[{i}]", layer, exp2a.layers) for i, layer in enumerate(exp2b.layers)),
    )
    for key, value, allowed in choices:
        if value not in allowed:
            block = "delta" if key.startswith("exp2a") else "exp2a"
            raise ConfigError(f"{path}: {key} = {value} is not among {block}'s {allowed}; set it to one of them")
    for key, values in (
        ("delta.d_new", delta.d_new), ("delta.percentiles", delta.percentiles), ("delta.layers", delta.layers or []),
        ("exp2a.layers", exp2a.layers), ("exp2b.layers", exp2b.layers), ("exp2b.alphas", exp2b.alphas),
    ):  # fmt: skip
        if len(set(values)) != len(values):
            raise ConfigError(f"{path}: {key} = {values} repeats a value; list each once")
    if delta.l0_fraction_also == delta.l0_fraction:
        raise ConfigError(f"{path}: delta.l0_fraction_also = {delta.l0_fraction_also} is delta.l0_fraction again; "
                          "set it to another share or null")  # fmt: skip


def _build(cls: Any, tree: object, prefix: str, path: str):
    where = prefix.rstrip(".") or "the top level"
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: {where} must be a block of keys, got {tree!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            raise ConfigError(f"{path}: unknown key {prefix}{key}; known at {where}: {', '.join(fields)}")
    values = {}
    for name, spec in fields.items():
        if name not in tree:
            raise ConfigError(f"{path}: key {prefix}{name} is missing")
        if dataclasses.is_dataclass(spec.type):
            values[name] = _build(spec.type, tree[name], f"{prefix}{name}.", path)
        else:
            values[name] = _check(tree[name], spec, f"{path}: {prefix}{name}")
    return cls(**values)


def _check(value: Any, spec: dataclasses.Field, where: str):
    kinds = typing.get_args(spec.type) if isinstance(spec.type, types.UnionType) else (spec.type,)
    if value is None:
        if type(None) in kinds:
            return None
        raise ConfigError(f"{where} is empty; expected {_words(spec.type)}")
    kind = kinds[0]
    if typing.get_origin(kind) is list:
        if not isinstance(value, list) or not value:
            raise ConfigError(f"{where} = {value!r}; expected a list with at least one element")
        (element,) = typing.get_args(kind)
        return [_check_one(item, element, spec, f"{where}[{i}]") for i, item in enumerate(value)]
    return _check_one(value, kind, spec, where)


def _check_one(value: Any, kind: type, spec: dataclasses.Field, where: str):
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:  # a bool is not an int here
        raise ConfigError(f"{where} = {value!r}; expected {kind.__name__}, got {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} = {value!r}; expected a finite number")
    low, high, choices = (spec.metadata.get(key) for key in ("low", "high", "choices"))
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{where} = {value!r} is out of range; expected {bounds}")
    if choices is not None and value not in choices:
        raise ConfigError(f"{where} = {value!r}; expected one of {', '.join(map(str, choices))}")
    return value


def _words(kind: object) -> str:
    return getattr(kind, "__name__", str(kind))
