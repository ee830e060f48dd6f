"""Training the whole grid of deltas: layers x base choices x d_new, from one harvest of the finetuned model.

Work is ordered so that each expensive thing happens once: text is harvested for all layers together, a base's residual
is computed once for every d_new that shares it. A delta comes out the same whether it is trained alone or in a grid.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deltatc.config import Delta
from deltatc.errors import DataError
from deltatc.harvest import Activations, harvest, take_tokens, transcoder_input
from deltatc.sites import site
from deltatc.text import Encoded
from deltatc.train import CoderTrainer, LogLine, Recipe
from deltatc.transcoder import DeltaTranscoder, Transcoder

SLICE = 8192  # tokens whose base recon is computed at once


class Key(NamedTuple):
    """One delta of the grid."""

    config: str
    """The configuration's name, such as d32_p0.50."""
    layer: int


@dataclass(frozen=True)
class Job:
    """What to train for a Key: beside which base, how many latents, how many of them active a token."""

    base_l0: int
    d_new: int
    l0: float


class Trained(NamedTuple):
    """A trained delta and its validations."""

    delta: DeltaTranscoder
    log: list[LogLine]


class Energy(NamedTuple):
    """Mean squared norms a token, of the two things that a delta's target holds."""

    finetune: float
    """|MLP_ft - MLP_base|^2: what the finetune changed."""
    base_error: float
    """|MLP_base - base transcoder|^2: what the base transcoder misses anyway."""
    target: float
    """|MLP_ft - base transcoder|^2, their sum with the cross term."""


def train_deltas(
    model: nn.Module,
    base_model: nn.Module,
    bases: Mapping[int, Mapping[int, Transcoder]],
    jobs: Mapping[Key, Job],
    train: Sequence[Encoded],
    validation: Sequence[Encoded],
    settings: Delta,
    batch_size: int,
    pad_id: int,
) -> tuple[dict[Key, Trained], dict[int, dict[int, Energy]]]:
    """Train every job and return ({Key: Trained}, {layer: {base L0: Energy on validation tokens}}).

    `bases` is {layer: {base L0: Transcoder}}; `model` the finetuned one. The bases are read only.
    """
    layers = sorted(bases)
    device = next(model.parameters()).device
    held_out = harvest(
        model, take_tokens(validation, settings.n_validation_tokens, settings.seed), layers, batch_size, pad_id,
        base_model, "harvest validation",
    )  # fmt: skip
    if not held_out[layers[0]].mlp_out.shape[0]:
        raise DataError("the delta's validation text has no tokens; raise prompts.n_delta_validation")
    energies = {
        layer: {l0: _energy(model, layer, base, held_out[layer]) for l0, base in bases[layer].items()}
        for layer in layers
    }
    d_model = held_out[layers[0]].mlp_out.shape[1]
    trainers = {
        key: CoderTrainer(
            Recipe(job.d_new, job.l0, settings.n_steps, settings.lr, settings.eval_every, settings.patience,
                   settings.seed + key.layer), d_model, device,
        )
        for key, job in jobs.items()
    }  # fmt: skip
    chosen = take_tokens(train, settings.n_tokens, settings.seed)
    steps_done = 0
    for chunk in range(settings.n_chunks):
        part = chosen[chunk :: settings.n_chunks]
        of_base = base_model if settings.target == "mlp_diff" else None
        acts = harvest(model, part, layers, batch_size, pad_id, of_base, f"harvest {chunk + 1}/{settings.n_chunks}")
        if not acts[layers[0]].mlp_out.shape[0]:
            raise DataError(
                f"chunk {chunk + 1} of {settings.n_chunks} of the delta's training text has no tokens; raise "
                "prompts.n_delta or lower delta.n_chunks"
            )
        n_steps = settings.n_steps * (chunk + 1) // settings.n_chunks - steps_done
        pairs = [(layer, l0) for layer in layers for l0 in bases[layer]]
        for layer, l0 in tqdm(pairs, desc=f"delta {chunk + 1}/{settings.n_chunks}", unit="base", disable=None):
            base = bases[layer][l0]
            data = _pair(model, layer, base, acts[layer], settings.target)
            check = _pair(model, layer, base, held_out[layer], settings.target)
            for key, job in jobs.items():
                if (key.layer, job.base_l0) == (layer, l0):
                    order = torch.Generator().manual_seed(settings.seed * 1_000_003 + layer * 1009 + chunk)
                    _train_on(trainers[key], data, check, n_steps, settings.batch_tokens, order)
        steps_done += n_steps
    return {key: _finish(trainers[key], bases[key.layer][job.base_l0]) for key, job in jobs.items()}, energies


def _train_on(
    trainer: CoderTrainer,
    data: tuple[Tensor, Tensor],
    check: tuple[Tensor, Tensor],
    n_steps: int,
    batch_tokens: int,
    order: torch.Generator,
) -> None:
    """Take up to n_steps steps on shuffled batches of (x, target), validating every eval_every steps."""
    x, target = data
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(n_steps):
        if trainer.stopped:
            return
        if len(queue) < batch_tokens:
            queue = torch.cat([queue, torch.randperm(x.shape[0], generator=order)])
        rows, queue = queue[:batch_tokens].to(x.device), queue[batch_tokens:]
        trainer.step(x[rows], target[rows])
        if trainer.n_done % trainer.recipe.eval_every == 0 or trainer.n_done == trainer.recipe.n_steps:
            trainer.validate(*check)


def _finish(trainer: CoderTrainer, base: Transcoder) -> Trained:
    delta = DeltaTranscoder(base, trainer.recipe.d_latents)
    best = trainer.best
    assert best is not None
    delta.set_delta(W_enc=best.W_enc, b_enc=best.b_enc, W_dec=best.W_dec, b_dec=best.b_dec, threshold=best.threshold)
    return Trained(delta, trainer.log)


def _pair(model: nn.Module, layer: int, base: Transcoder, acts: Activations, target: str) -> tuple[Tensor, Tensor]:
    """Return (x, what the delta has to add to the base), [tokens, d_model] float32 each."""
    x = transcoder_input(model, layer, base.site, acts.resid_mid)
    scale = _site_scale(base)
    mlp_out = acts.mlp_out.to(x.device).float() / scale
    if target == "mlp_diff":
        assert acts.mlp_out_of_base is not None
        return x, mlp_out - acts.mlp_out_of_base.to(x.device).float() / scale
    return x, mlp_out - _recon(base, x)


def _recon(base: Transcoder, x: Tensor) -> Tensor:
    with torch.inference_mode():
        recon = torch.cat([base(part) for part in x.split(SLICE)])
    return recon.clone()  # an ordinary tensor again, which autograd may save


def _energy(model: nn.Module, layer: int, base: Transcoder, acts: Activations) -> Energy:
    x = transcoder_input(model, layer, base.site, acts.resid_mid)
    recon = _recon(base, x) * _site_scale(base)
    assert acts.mlp_out_of_base is not None
    ft, of_base = acts.mlp_out.to(x.device).float(), acts.mlp_out_of_base.to(x.device).float()
    return Energy(*(part.double().pow(2).sum(-1).mean().item() for part in (ft - of_base, of_base - recon, ft - recon)))


def _site_scale(base: Transcoder) -> float:
    return site(base.site).scale(base.d_model)
