"""The site check: do the base transcoders reconstruct the BASE model best where they are declared to read and write?

A transcoder fed from the wrong tensor still runs, and everything after it is an artefact. So FVU and L0 are measured
at the declared site and at the plausible wrong ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from deltatc.errors import DataError
from deltatc.evaluate import FvuSums
from deltatc.hooks import capture_mlp
from deltatc.models import decoder_layers, unwrap
from deltatc.sites import SITES
from deltatc.text import Encoded, batches
from deltatc.transcoder import Transcoder

BEFORE_POST_NORM = "output_before_post_norm"


def site_check(
    model: nn.Module,
    bases: Mapping[int, Mapping[int, Transcoder]],
    sequences: Sequence[Encoded],
    batch_size: int,
    pad_id: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return {layer: {l0 of the folder: {fvu, l0, sites: {name: {fvu, l0}}}}}, all measured on the sequences.

    `bases` is {layer: {l0: Transcoder}}. The sites are sites.SITES, and the declared input with the MLP's output
    taken before the post-feedforward norm.
    """
    names = [*SITES, BEFORE_POST_NORM]
    fvu = {(layer, l0, name): FvuSums() for layer in bases for l0 in bases[layer] for name in names}
    active = dict.fromkeys(fvu, 0)
    if not any(len(sequence.ids) > 1 for sequence in sequences):
        raise DataError("the site check's text has no tokens; see site_check.text")
    device, eps = next(model.parameters()).device, unwrap(model).config.rms_norm_eps
    steps = list(batches(sequences, batch_size, pad_id))
    with torch.inference_mode(), capture_mlp(model, sorted(bases)) as captured:
        for _, batch in tqdm(steps, desc="site check", unit="batch", disable=None):
            batch = batch.to(device)
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, logits_to_keep=1)
            at = captured.positions.counted
            for layer in bases:
                h, out = captured.resid_mid[layer][at], captured.mlp_out[layer][at]
                gain = decoder_layers(model)[layer].pre_feedforward_layernorm.weight
                for l0, base in bases[layer].items():
                    for name in names:
                        read, scale = SITES[base.site if name == BEFORE_POST_NORM else name]
                        target = captured.before_post_norm[layer][at] if name == BEFORE_POST_NORM else out
                        found = base.stats(read(h, gain, eps))
                        fvu[layer, l0, name].add(found.recon * scale(h.shape[-1]), target)
                        active[layer, l0, name] += found.l0_base.double().sum().item()
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for layer in bases:
        result[str(layer)] = {}
        for l0, base in bases[layer].items():
            sites = {}
            for name in names:
                sums = fvu[layer, l0, name]
                sites[name] = {"fvu": sums.fvu, "l0": active[layer, l0, name] / max(sums.n, 1)}
            result[str(layer)][str(l0)] = sites[base.site] | {"sites": sites}
    return result


def losers(result: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """List, in words, each transcoder whose declared site does not have the lowest FVU."""
    found = []
    for layer, choices in result.items():
        for l0, measured in choices.items():
            best = min(measured["sites"], key=lambda name: measured["sites"][name]["fvu"])
            if measured["sites"][best]["fvu"] < measured["fvu"]:
                found.append(
                    f"layer {layer}, average_l0_{l0}: {best} has FVU {measured['sites'][best]['fvu']:.3g}, "
                    f"the declared site {measured['fvu']:.3g}"
                )
    return found


def off_l0(result: Mapping[str, Mapping[str, Mapping[str, Any]]], tolerance: float) -> list[str]:
    """List, in words, each transcoder whose measured L0 is off its folder's number by more than `tolerance`."""
    return [
        f"layer {layer}, average_l0_{l0}: measured L0 {measured['l0']:.1f}"
        for layer, choices in result.items()
        for l0, measured in choices.items()
        if abs(measured["l0"] / int(l0) - 1) > tolerance
    ]
