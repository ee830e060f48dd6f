"""Published packages as contenders, where they can be imported; $DELTATC_PEERS names a folder to look in last.

python -m venv peers && peers/bin/pip install torch==2.13.0 sae-lens==6.54.12 eai-sparsify==1.3.3
DELTATC_PEERS=peers/lib/python3.11/site-packages make bench
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

if os.environ.get("DELTATC_PEERS"):
    sys.path.append(os.environ["DELTATC_PEERS"])


def sparsify(joined: dict[str, Tensor], k: int) -> Callable[[Tensor], Tensor]:
    """EleutherAI's TopK transcoder: SparseCoder.encode and .decode."""
    module = importlib.import_module("sparsify")
    width, d_model = joined["decoder"].shape
    coder = module.SparseCoder(d_model, module.SparseCoderConfig(num_latents=width, k=k, transcode=True), device="meta")
    coder.encoder.weight, coder.encoder.bias = _fixed(joined["encoder"]), _fixed(joined["b_enc"])
    coder.W_dec, coder.b_dec = _fixed(joined["decoder"]), _fixed(joined["b_dec"])

    def run(x: Tensor) -> Tensor:
        acts, indices, _ = coder.encode(x)
        return coder.decode(acts, indices)

    return run


def sae_lens(joined: dict[str, Tensor], k: int) -> Callable[[Tensor], Tensor]:
    """SAELens' JumpReLUTranscoder, with W_enc as it loads Gemma Scope's: [d_model, d_sae]."""
    module = importlib.import_module("sae_lens.saes.transcoder")
    width, d_model = joined["decoder"].shape
    dtype = str(joined["decoder"].dtype).removeprefix("torch.")
    config = module.JumpReLUTranscoderConfig(d_in=d_model, d_out=d_model, d_sae=width, dtype=dtype, device="meta")
    coder = module.JumpReLUTranscoder(config)
    coder.W_enc, coder.b_enc = _fixed(joined["encoder"].T.contiguous()), _fixed(joined["b_enc"])
    coder.W_dec, coder.b_dec = _fixed(joined["decoder"]), _fixed(joined["b_dec"])
    coder.threshold = _fixed(joined["threshold"])
    return coder


PEERS = {"sparsify": sparsify, "sae_lens": sae_lens}


def find_peers(joined: dict[str, Tensor], k: int) -> tuple[dict[str, Callable[[Tensor], Tensor]], list[str]]:
    """Return {name: forward} of the peers that can be imported, and the names of the absent ones."""
    found, absent = {}, []
    for name, make in PEERS.items():
        try:
            found[name] = make(joined, k)
        except ImportError:
            absent.append(name)
    return found, absent


def _fixed(tensor: Tensor) -> Any:
    return torch.nn.Parameter(tensor, requires_grad=False)
