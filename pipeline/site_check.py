"""site_check: FVU and L0 of every base transcoder on the base model, at its declared site and at wrong ones."""

import logging

from stage import METRICS, quiet_transformers, run

from deltatc.config import load_params
from deltatc.errors import SiteError
from deltatc.files import check_manifest, read_jsonl, write_json
from deltatc.formats import find_transcoders, load_transcoder
from deltatc.harvest import take_tokens
from deltatc.models import check_layers, load_model, load_tokenizer
from deltatc.site_check import losers, off_l0, site_check
from deltatc.text import encode_text

WARN_AT = 0.15  # L0 off its folder's number by more than this share


def main() -> None:
    params = load_params()
    settings = params.site_check
    check_manifest(params.model.path, params.model.manifest)
    check_manifest(params.transcoders.path, params.transcoders.manifest)
    found = find_transcoders(params.transcoders.path, params.transcoders.width)
    texts = [row["text"] for row in read_jsonl(settings.text)]
    quiet_transformers()
    tokenizer = load_tokenizer(params.model.path)
    model = load_model(params.model.path, params.device, params.dtype)
    check_layers(model, list(found), params.transcoders.path)
    sequences = [encode_text(tokenizer, text, settings.max_tokens) for text in texts]
    sequences = take_tokens(sequences, settings.n_tokens, params.seed)
    result: dict[str, dict] = {}
    for layer, files in found.items():  # one layer's transcoders in memory at a time
        site = params.transcoders.site
        bases = {l0: load_transcoder(file, site).to(params.device) for l0, file in files.items()}
        result |= site_check(model, {layer: bases}, sequences, params.batch_size, tokenizer.pad_token_id)
    if (beaten := losers(result)) and settings.require_win:
        raise SiteError(
            f"the declared site {params.transcoders.site!r} does not win the site check: {'; '.join(beaten)}; the "
            "transcoders read or write elsewhere or belong to another model: mend transcoders.site or model.path"
        )
    tolerance = settings.l0_tolerance
    if off := off_l0(result, WARN_AT if tolerance is None else tolerance):
        if tolerance is not None:
            raise SiteError(f"L0 is off by more than {tolerance:.0%}: {'; '.join(off)}; the transcoders belong to "
                            "another model, or site_check.text is unlike what they were trained on")  # fmt: skip
        logging.getLogger(__name__).warning("L0 is off its folder's number by more than 15%%: %s", "; ".join(off))
    write_json(METRICS / "site_check.json", result)


if __name__ == "__main__":
    run(main)
