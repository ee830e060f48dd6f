"""Published packages as contenders, where they are: $DELTATC_PEERS names the folder of a virtual environment with them,
or one into which their packages were unpacked.

python -m venv peers && peers/bin/pip install torch==2.13.0 sae-lens==6.54.12 eai-sparsify==1.3.3
DELTATC_PEERS=peers make bench

A peer runs in the benchmark's own process where it can be imported there. Else (SAELens needs an older
transformer-lens) this file runs in that environment's Python, with the same weights and tokens from files, and is asked
for one forward pass at a time; what asking costs, some 50 us, counts against it.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ENVIRONMENT = Path(os.environ["DELTATC_PEERS"]).resolve() if os.environ.get("DELTATC_PEERS") else None
if ENVIRONMENT is not None:
    sys.path += [*map(str, ENVIRONMENT.glob("lib/python*/site-packages")), str(ENVIRONMENT)]


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
    config = module.JumpReLUTranscoderConfig(
        d_in=d_model,
        d_out=d_model,
        d_sae=width,
        dtype=dtype,
        device=str(joined["decoder"].device),
        apply_b_dec_to_input=False,
    )
    with torch.device("meta"):
        coder = module.JumpReLUTranscoder(config)
    coder.W_enc, coder.b_enc = _fixed(joined["encoder"].T.contiguous()), _fixed(joined["b_enc"])
    coder.W_dec, coder.b_dec = _fixed(joined["decoder"]), _fixed(joined["b_dec"])
    coder.threshold = _fixed(joined["threshold"])
    return coder


PEERS = {"sparsify": sparsify, "sae_lens": sae_lens}


def find_peers(
    joined: dict[str, Tensor], k: int, here: bool = False
) -> tuple[dict[str, Callable[[Tensor], Tensor]], list[str]]:
    """Return {name: forward} of the peers that are there (here: in this very process), and the absent ones' names."""
    found: dict[str, Callable[[Tensor], Tensor]] = {}
    absent = []
    for name, make in PEERS.items():
        try:
            found[name] = make(joined, k)
        except ImportError:
            try:
                found[name] = OtherPython(name, joined, k, ENVIRONMENT if not here else None)
            except OSError:
                absent.append(name)
    return found, absent


class OtherPython:
    """A peer in the environment's own Python; called like a function. Raises OSError where there is none."""

    def __init__(self, name: str, joined: dict[str, Tensor], k: int, environment: Path | None) -> None:
        if environment is None:
            raise FileNotFoundError("no environment of its own for a peer")
        self.folder = tempfile.TemporaryDirectory()
        self.x: Tensor | None = None
        save_file({key: tensor.contiguous() for key, tensor in joined.items()}, f"{self.folder.name}/weights")
        command = [environment / "bin/python", __file__, name, self.folder.name, str(k)]
        clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DELTATC_PEERS")}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean)
        if not self._ask("hello"):
            raise FileNotFoundError(f"{name} does not run in {environment}")

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self.x:
            save_file({"x": x.contiguous()}, f"{self.folder.name}/x")
            self._ask("load")
            self.x = x
        self._ask("run")
        return x  # the result stays there; see result()

    def result(self) -> Tensor:
        """The last call's output."""
        self._ask("save")
        return load_file(f"{self.folder.name}/recon")["recon"]

    def _ask(self, what: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(what, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return ""
        for line in self.process.stdout:
            if line == f"{what} done\n":  # whatever else the packages print
                return line
        return ""

    def __del__(self) -> None:
        if hasattr(self, "process"):
            self.process.kill()
            self.process.wait()


def _fixed(tensor: Tensor) -> Any:
    return torch.nn.Parameter(tensor, requires_grad=False)


def serve(name: str, folder: str, k: int) -> None:
    """Answer OtherPython's questions on standard input."""
    forward = PEERS[name](load_file(f"{folder}/weights"), k)
    x = recon = torch.empty(0)
    with torch.no_grad():
        for line in sys.stdin:
            if line == "load\n":
                x = load_file(f"{folder}/x")["x"]
            elif line == "run\n":
                recon = forward(x)
            elif line == "save\n":
                save_file({"recon": recon.contiguous()}, f"{folder}/recon")
            print(line.strip(), "done", flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
