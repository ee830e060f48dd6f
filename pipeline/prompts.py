"""prompts: rows of every subset in disjoint splits, from data/ or from external datasets."""

from stage import METRICS, PROMPTS, run

from deltatc.config import load_params
from deltatc.files import write_json, write_jsonl
from deltatc.prompts import counts, generate_splits


def main() -> None:
    settings = load_params().prompts
    splits = generate_splits(settings.source, settings)
    for split, rows in splits.items():
        write_jsonl(PROMPTS / f"{split}.jsonl", rows)
    write_json(METRICS / "prompts.json", {"rows": counts(splits)})


if __name__ == "__main__":
    run(main)
