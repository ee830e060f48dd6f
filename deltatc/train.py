"""Training of sparse coders with BatchTopK, exported as JumpReLU thresholds: deltas and base transcoders alike.

A CoderTrainer sees batches of (x, target) and knows nothing of models, layers or files; harvest.py makes the batches.
BatchTopK: Bussmann, Leask & Nanda 2024, arXiv 2412.06410. The auxiliary loss for dead latents: Gao et al. 2024,
arXiv 2406.04093, section A.2.

Straight-through JumpReLU with a penalty on L0 was compared on the default study's deltas (four layers, d_new 64, delta
L0 16 and 32, two seeds, bandwidths 0.03 to 0.3, one- and two-sided penalties, from the start or after half the steps of
BatchTopK). BatchTopK had the lower validation FVU in all eight cells, by 0.3 to 7 %; what started from it ended equal.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltatc.errors import DataError
from deltatc.ops import Weights

AUX_COEFFICIENT = 1 / 32
DEAD_AFTER_STEPS = 100


@dataclass(frozen=True)
class Recipe:
    """How one coder is trained."""

    d_latents: int
    l0: float  # active latents a token, on average
    n_steps: int
    lr: float
    eval_every: int  # steps
    patience: int  # validations without a better FVU before stopping
    seed: int


class LogLine(NamedTuple):
    """One validation: loss is the training FVU since the last one; the rest is measured with JumpReLU thresholds."""

    step: int
    loss: float
    fvu: float
    l0: float
    dead_frac: float


class CoderTrainer:
    """Trains W_enc, b_enc, W_dec, b_dec so that decode(encode(x)) is near `target`, at `l0` active latents a token.

    Output is exactly zero at the start (W_dec = 0, b_dec = 0): a delta begins as its base.
    """

    def __init__(self, recipe: Recipe, d_model: int, device: str | torch.device = "cpu"):
        self.recipe = recipe
        draw = torch.Generator().manual_seed(recipe.seed)
        directions = torch.randn(d_model, recipe.d_latents, generator=draw)
        self.W_enc = (directions / directions.norm(dim=0)).to(device).requires_grad_()
        self.b_enc = torch.zeros(recipe.d_latents, device=device, requires_grad=True)
        self.W_dec = torch.zeros(recipe.d_latents, d_model, device=device, requires_grad=True)
        self.b_dec = torch.zeros(d_model, device=device, requires_grad=True)
        self.parameters = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self.adam = torch.optim.Adam(self.parameters, lr=recipe.lr, betas=(0.9, 0.99), foreach=True)
        self.quiet_steps = torch.zeros(recipe.d_latents, device=device)  # since each latent last fired
        self.n_done = 0
        self.losses: list[Tensor] = []
        self.log: list[LogLine] = []
        self.best: Weights | None = None
        self.stopped = False

    def step(self, x: Tensor, target: Tensor) -> None:
        """Take one optimiser step on a batch, [tokens, d_model] each; stops at a loss that is not finite."""
        for group in self.adam.param_groups:
            group["lr"] = self.recipe.lr * self._schedule()
        pre_acts = x @ self.W_enc + self.b_enc
        acts = batch_topk(pre_acts, self.recipe.l0)
        error = target - (acts @ self.W_dec + self.b_dec)
        energy = (target - target.mean(0)).pow(2).sum().clamp_min(1e-12)
        loss = error.pow(2).sum() / energy
        fired = (acts.detach() > 0).any(0)
        self.quiet_steps = torch.where(fired, 0.0, self.quiet_steps + 1)
        dead = self.quiet_steps > DEAD_AFTER_STEPS
        total = loss + AUX_COEFFICIENT * self._auxiliary(pre_acts, error.detach(), dead) if dead.any() else loss
        if not torch.isfinite(total):
            raise DataError(
                f"the delta's loss is {total.item()} at step {self.n_done}; activations must be finite: lower delta.lr "
                "or use dtype float32"
            )
        self.adam.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.adam.step()
        self.losses.append(loss.detach())
        self.n_done += 1

    def validate(self, x: Tensor, target: Tensor) -> None:
        """Measure on held-out tokens as exported; keep the best weights; set `stopped` when patience is over."""
        weights = self.export(x)
        acts = _jumprelu(x @ weights.W_enc + weights.b_enc, weights.threshold)
        error = target - (acts @ weights.W_dec + weights.b_dec)
        variance = (target - target.mean(0)).double().pow(2).sum().clamp_min(1e-300)  # a target may be all zero
        fvu = (error.double().pow(2).sum() / variance).item()
        if not math.isfinite(fvu):
            raise DataError(
                f"the delta's validation FVU is {fvu} at step {self.n_done}; activations must be finite: lower "
                "delta.lr or use dtype float32"
            )
        line = LogLine(
            step=self.n_done,
            loss=torch.stack(self.losses).mean().item() if self.losses else float("nan"),
            fvu=fvu,
            l0=(acts > 0).double().sum(-1).mean().item(),
            dead_frac=(~(acts > 0).any(0)).double().mean().item(),
        )
        self.losses.clear()
        self.log.append(line)
        best = min(entry.fvu for entry in self.log)
        if fvu <= best:
            self.best = weights
        since_best = len(self.log) - 1 - min(i for i, entry in enumerate(self.log) if entry.fvu == best)
        self.stopped = since_best >= self.recipe.patience or self.n_done >= self.recipe.n_steps

    def export(self, x: Tensor) -> Weights:
        """Return copies of the weights with JumpReLU thresholds that give `l0` on the tokens x."""
        with torch.no_grad():
            weights = [tensor.detach().clone() for tensor in self.parameters]
            threshold = calibrate_threshold(x @ weights[0] + weights[1], self.recipe.l0)
        return Weights(weights[0], weights[1], threshold, weights[2], weights[3])

    def _auxiliary(self, pre_acts: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """FVU of what is left over, reconstructed by dead latents alone, so that they get a gradient."""
        revived = torch.relu(pre_acts[:, dead])
        k = min(revived.shape[1], max(1, int(self.recipe.l0)))
        kept = torch.zeros_like(revived).scatter(1, *_values_last(revived.topk(k, dim=1)))
        loss = (error - kept @ self.W_dec[dead]).pow(2).sum() / error.pow(2).sum().clamp_min(1e-12)
        return torch.nan_to_num(loss, 0.0, 0.0, 0.0)

    def _schedule(self) -> float:
        """Constant, after a short warm-up, for the first half; then linear to a twentieth."""
        done = self.n_done / self.recipe.n_steps
        return min(1.0, (self.n_done + 1) / 20, max(0.05, 2 * (1 - done)))


def batch_topk(pre_acts: Tensor, l0: float) -> Tensor:
    """Keep the tokens * l0 largest positive entries of a whole batch [tokens, latents]; the rest are 0."""
    acts = torch.relu(pre_acts)
    n_kept = int(acts.shape[0] * l0)
    if n_kept >= acts.numel():
        return acts
    cut = acts.detach().flatten().kthvalue(acts.numel() - n_kept).values
    return acts * (acts.detach() > cut)


def calibrate_threshold(pre_acts: Tensor, l0: float) -> Tensor:
    """Return [latents] thresholds at which at most l0 latents a token are active on average."""
    positive = torch.relu(pre_acts).flatten()
    n_kept = int(pre_acts.shape[0] * l0)
    cut = positive.kthvalue(positive.numel() - n_kept).values if n_kept < positive.numel() else positive.new_zeros(())
    return cut.expand(pre_acts.shape[1]).clone()


def _jumprelu(pre_acts: Tensor, threshold: Tensor) -> Tensor:
    return pre_acts * (pre_acts > threshold.clamp_min(0))


def _values_last(topk) -> tuple[Tensor, Tensor]:
    return topk.indices, topk.values
