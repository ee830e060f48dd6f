"""prompts: rows of every subset in disjoint splits, from the project's templates or from external datasets."""

from pathlib import Path

from stage import METRICS, PROMPTS, run

from deltatc.config import load_params
from deltatc.external import external_splits
from deltatc.files import check_manifest, write_json, write_jsonl
from deltatc.prompts import Prompted, counts, generate_splits

OWN_DATA = Path("data")


def main() -> None:
    params = load_params()
    # Before any work: of a manifest that is missing later, DVC would say no more than its name.
    check_manifest(params.model.path, params.model.manifest)
    check_manifest(params.transcoders.path, params.transcoders.manifest)
    settings = params.prompts
    if Path(settings.source) == OWN_DATA:
        prompted = Prompted(generate_splits(OWN_DATA, settings), {})
    else:
        prompted = external_splits(settings.source, OWN_DATA, settings)
    for split, rows in prompted.rows.items():
        write_jsonl(PROMPTS / f"{split}.jsonl", rows)
    write_json(METRICS / "prompts.json", {"rows": counts(prompted.rows), "dropped": prompted.dropped})


if __name__ == "__main__":
    run(main)
