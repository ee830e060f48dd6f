"""Faithfulness of replaced MLPs on fixed text: cross entropy, KL, cosine, relative error, FVU and L0 (exp1).

Text is prompt + target + EOS. CE and KL are over the target's tokens and EOS, in nats a token and weighted by tokens;
everything about recon is over all positions but BOS, padding and EOS. Generation is generate.py's business.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from deltatc.errors import DataError
from deltatc.hooks import LayerStats, capture_mlp, replace_mlp
from deltatc.text import Batch, Encoded, batches, encode_row
from deltatc.transcoder import DeltaTranscoder, Transcoder

log = logging.getLogger(__name__)


@dataclass
class FvuSums:
    """Sums from which FVU is exact: |recon - mlp_out|^2 over the variance about the dataset's mean."""

    n: int = 0
    error: float = 0.0
    square: float = 0.0
    total: Tensor | float = 0.0

    def add(self, recon: Tensor, mlp_out: Tensor) -> None:
        """Add tokens, [n, d_model] each."""
        recon, mlp_out = recon.double(), mlp_out.double()
        self.n += mlp_out.shape[0]
        self.error += (recon - mlp_out).pow(2).sum().item()
        self.square += mlp_out.pow(2).sum().item()
        self.total = self.total + mlp_out.sum(0)

    def merge(self, other: "FvuSums") -> None:
        self.n += other.n
        self.error += other.error
        self.square += other.square
        self.total = self.total + other.total

    @property
    def fvu(self) -> float:
        mean_square = torch.as_tensor(self.total).pow(2).sum().item() / max(self.n, 1)
        return self.error / max(self.square - mean_square, 1e-300)


@dataclass
class Sums:
    """What one condition adds up over batches."""

    n_targets: int = 0
    ce: float = 0.0
    kl: float = 0.0
    n_tokens: int = 0
    cos: float = 0.0
    rel_l2: float = 0.0
    l0_base: float = 0.0
    l0_delta: float = 0.0
    fvu: FvuSums = field(default_factory=FvuSums)

    def add_logits(self, logp: Tensor, logp_raw: Tensor, labels: Tensor) -> None:
        """Add log-probabilities [targets, vocabulary] of this condition and of the raw model, labels [targets]."""
        self.n_targets += labels.shape[0]
        self.ce -= logp.gather(1, labels.unsqueeze(1)).double().sum().item()
        self.kl += (logp_raw.exp() * (logp_raw - logp)).double().sum().item()

    def add_recon(self, recon: Tensor, mlp_out: Tensor, stats: LayerStats) -> None:
        """Add recon and mlp_out, [tokens, d_model] each, and the stats of the same tokens."""
        recon, mlp_out = recon.float(), mlp_out.float()
        self.n_tokens += mlp_out.shape[0]
        self.cos += nn.functional.cosine_similarity(recon, mlp_out, dim=-1).double().sum().item()
        relative = (recon - mlp_out).norm(dim=-1) / mlp_out.norm(dim=-1).clamp_min(1e-8)
        self.rel_l2 += relative.double().sum().item()
        self.l0_base += stats.l0_base
        self.l0_delta += stats.l0_delta
        self.fvu.add(recon, mlp_out)

    def merge(self, other: "Sums") -> None:
        for name in ("n_targets", "ce", "kl", "n_tokens", "cos", "rel_l2", "l0_base", "l0_delta"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.fvu.merge(other.fvu)

    def means(self) -> dict[str, float]:
        """Return the means: ce and kl in nats a target token, the rest a token."""
        per_target, per_token = max(self.n_targets, 1), max(self.n_tokens, 1)
        return {
            "ce": self.ce / per_target,
            "kl": self.kl / per_target,
            "cos": self.cos / per_token,
            "rel_l2_error": self.rel_l2 / per_token,
            "fvu": self.fvu.fvu,
            "l0_base": self.l0_base / per_token,
            "l0_delta": self.l0_delta / per_token,
        }


class Condition(NamedTuple):
    """One way to run the model in exp1: the MLP of one layer replaced."""

    layer: int
    name: str
    """"base_24" for the base of average L0 24 alone, or a configuration's name such as "d32_p0.50"."""


def subsets_of(rows: Sequence[dict], wanted: Sequence[str] | None, n: int) -> dict[str, list[dict]]:
    """Return {subset: its first n rows}; a wanted subset that the data does not have is left out with a warning."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(row["label"], []).append(row)
    for subset in wanted or found:
        if subset not in found:
            log.warning("the evaluation data has no rows of subset %s; it is skipped", subset)
        elif len(found[subset]) < n:
            log.warning("subset %s has %d rows, fewer than the %d asked for", subset, len(found[subset]), n)
    chosen = {subset: found[subset][:n] for subset in wanted or found if subset in found}
    if not chosen:
        raise DataError(f"the evaluation data has no rows of {', '.join(wanted or ['any subset'])}; see prompts.source")
    return chosen


def encode_rows(tokenizer: Any, rows: Iterable[dict], max_tokens: int | None = None) -> list[Encoded]:
    """Encode rows for teacher-forced evaluation; a row longer than max_tokens is refused, not dropped."""
    found = []
    for row in rows:
        sequence = encode_row(tokenizer, row, max_tokens)
        if sequence is None:
            raise DataError(f"the row {row['input'][:60]!r}... is longer than max_tokens = {max_tokens}; raise it")
        found.append(sequence)
    return found


def compare_replacements(
    model: nn.Module,
    sequences: Sequence[Encoded],
    conditions: Mapping[Condition, Transcoder | DeltaTranscoder],
    batch_size: int,
    pad_id: int,
    label: str = "exp1",
) -> tuple[Sums, dict[Condition, Sums]]:
    """Return (the raw model's Sums, {condition: Sums}) over the sequences, each condition replacing its one layer."""
    device = next(model.parameters()).device
    sums = {condition: Sums() for condition in conditions}
    raw = Sums()
    layers = sorted({condition.layer for condition in conditions})
    steps = list(batches(sequences, batch_size, pad_id))
    with torch.inference_mode(), tqdm(total=len(steps) * (1 + len(conditions)), desc=label, disable=None) as bar:
        for _, batch in steps:
            batch = batch.to(device)
            labels = batch.input_ids[:, 1:][batch.target_mask[:, 1:]]
            with capture_mlp(model, layers) as original:
                logp_raw = target_logp(model, batch)
            raw.add_logits(logp_raw, logp_raw, labels)
            at = original.positions.counted
            mlp_out = {layer: original.mlp_out[layer][at] for layer in layers}
            bar.update()
            for condition, transcoder in conditions.items():
                layer = condition.layer
                with (
                    replace_mlp(model, {layer: transcoder}, collect_stats=True) as stats,
                    capture_mlp(model, [layer]) as replaced,  # entered second, so that it records the replacement
                ):
                    logp = target_logp(model, batch)
                sums[condition].add_logits(logp, logp_raw, labels)
                sums[condition].add_recon(replaced.mlp_out[layer][at], mlp_out[layer], stats[layer])
                bar.update()
    return raw, sums


def target_logp(model: nn.Module, batch: Batch) -> Tensor:
    """Return float32 log-probabilities [targets, vocabulary] of the tokens that predict target and EOS."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return logits[:, :-1][batch.target_mask[:, 1:]].float().log_softmax(-1)


def target_ce(model: nn.Module, sequences: Sequence[Encoded], batch_size: int, pad_id: int) -> float:
    """Return the mean cross entropy of target and EOS tokens, nats a token, as the model (and its hooks) now runs."""
    device = next(model.parameters()).device
    total = Sums()
    with torch.inference_mode():
        for _, batch in batches(sequences, batch_size, pad_id):
            batch = batch.to(device)
            logp = target_logp(model, batch)
            total.add_logits(logp, logp, batch.input_ids[:, 1:][batch.target_mask[:, 1:]])
    return total.means()["ce"]
