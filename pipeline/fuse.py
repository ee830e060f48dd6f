"""fuse: join each delta with its base into one transcoder: safetensors (un-fusable) and Gemma Scope's params.npz."""

from stage import DELTA, FUSED, run
from tqdm import tqdm

from deltatc.config import load_params
from deltatc.files import read_json
from deltatc.formats import find_transcoders, load_delta, load_transcoder, save_transcoder
from deltatc.transcoder import fuse


def main() -> None:
    params = load_params()
    found = find_transcoders(params.transcoders.path, params.transcoders.width)
    for job in tqdm(read_json(DELTA / "jobs.json"), desc="fuse", unit="delta", disable=None):
        layer, config = job["layer"], job["config"]
        base = load_transcoder(found[layer][job["base_l0"]], params.transcoders.site)
        base.metadata |= {"layer": str(layer), "base_l0": str(job["base_l0"]), "configuration": config}
        fused = fuse(base, load_delta(DELTA / config / f"layer_{layer}.safetensors", base))
        folder = FUSED / config / f"layer_{layer}"
        save_transcoder(fused, folder / "transcoder.safetensors")
        if params.fuse.npz:
            save_transcoder(fused, folder / "params.npz")


if __name__ == "__main__":
    run(main)
