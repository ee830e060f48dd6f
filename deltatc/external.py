"""External datasets as splits: JSONL rows of the original system's kind, plain text lines, and GSM8K.

A folder is scanned recursively and its files are recognised by name and content:
- `finetune*.jsonl`: {input, target, label} rows to finetune on, split 9 : 1 into training and validation;
- `transcoder_train*.txt`, `transcoder_validation*.txt`: one prompt a line, text for the deltas;
- any other JSONL with {input, target, label}: evaluation rows; with {question, answer}: GSM8K's problems.
Without a finetune file the rest adds evaluation subsets to the project's own study. Rows that would overlap are dropped
and counted.
"""

import logging
import random
import re
from collections import Counter
from pathlib import Path

from deltatc.calculator import evaluate
from deltatc.config import Prompts
from deltatc.errors import CalcError, DataError
from deltatc.files import read_jsonl
from deltatc.prompts import SPLITS, SUBSETS, Prompted, check_splits, generate_splits, make_row
from deltatc.toolcall import parse, render

log = logging.getLogger(__name__)

LABELS = (
    {"positive": "tool", "negative": "copy"} | {subset: subset for subset in SUBSETS} | {"tool_gsm8k": "tool_gsm8k"}
)
VALIDATION_SHARE = 0.1


def external_splits(source: str | Path, own_data: str | Path, settings: Prompts) -> Prompted:
    """Return the splits of an external folder, at most settings' sizes; `own_data` fills in what it does not have."""
    files = sorted(file for file in Path(source).rglob("*") if file.suffix in (".jsonl", ".txt"))
    if not files:
        raise DataError(f"{source} holds no .jsonl or .txt file; expected datasets there (prompts.source), or `data`")
    dropped: Counter[str] = Counter()
    found: dict[str, list[dict]] = {split: [] for split in SPLITS}
    for file in files:
        name = file.name
        if file.suffix == ".txt" and name.startswith(("transcoder_train", "transcoder_validation")):
            split = "delta_train" if name.startswith("transcoder_train") else "delta_validation"
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            found[split] += [make_row(line, "", "text", name, None) for line in lines if line]
        elif file.suffix == ".jsonl":
            found["finetune_train" if name.startswith("finetune") else "eval"] += _read(file, dropped)
    if not found["finetune_train"]:  # evaluation data only: it joins the project's own study
        own = generate_splits(own_data, settings)
        found = own | {"eval": own["eval"] + found["eval"]}
    splits = _without_overlap(found, settings, dropped)
    present = {row["label"] for row in splits["eval"]}
    for subset in SUBSETS:
        if subset not in present:
            log.warning("%s has no rows of subset %s; it is skipped", source, subset)
    if not present:
        raise DataError(
            f"{source} leaves no evaluation row; expected labelled rows that the training text does not hold"
        )
    check_splits(splits, allow_shared_expressions=True)
    return Prompted(splits, dict(dropped))


def _read(file: Path, dropped: Counter[str]) -> list[dict]:
    rows = read_jsonl(file)
    if rows and set(rows[0]) >= {"question", "answer"}:
        return [
            row for row in (_gsm8k(raw, f"{file}:{i}", dropped) for i, raw in enumerate(rows, 1)) if row is not None
        ]
    return [_labelled(raw, f"{file}:{i}") for i, raw in enumerate(rows, 1)]


def _labelled(raw: dict, where: str) -> dict:
    for key in ("input", "target", "label"):
        if not isinstance(raw.get(key), str):
            raise DataError(f"{where}: {key!r} is {raw.get(key)!r}; expected text in every row")
    if raw["label"] not in LABELS:
        raise DataError(f"{where}: label {raw['label']!r} is unknown; expected one of {', '.join(LABELS)}")
    call = parse(raw["target"])
    return make_row(raw["input"], raw["target"], LABELS[raw["label"]], "external", call.expr if call else None)


def _gsm8k(raw: dict, where: str, dropped: Counter[str]) -> dict | None:
    """Take a problem whose first <<expression=value>> annotation is an expression of the calculator's."""
    for key in ("question", "answer"):
        if not isinstance(raw.get(key), str):
            raise DataError(f"{where}: {key!r} is {raw.get(key)!r}; expected text in every row")
    annotation = re.search(r"<<([^=<>]+)=", raw["answer"])
    try:
        expr = annotation[1].strip() if annotation else ""
        evaluate(expr)
    except CalcError:
        dropped["gsm8k without a usable annotation"] += 1
        return None
    return make_row(raw["question"], render(expr), "tool_gsm8k", "gsm8k", expr)


def _without_overlap(found: dict[str, list[dict]], settings: Prompts, dropped: Counter[str]) -> dict[str, list[dict]]:
    """Split off validation where there is none, drop what occurs twice or in training text, and cut to size."""
    draw = random.Random(settings.seed)
    for training, validation in (("finetune_train", "finetune_validation"), ("delta_train", "delta_validation")):
        if not found[training]:
            found[training] = list(found["finetune_train"])
        if not found[validation]:
            draw.shuffle(found[training])
            n = max(1, int(len(found[training]) * VALIDATION_SHARE))
            found[validation], found[training] = found[training][:n], found[training][n:]
    limits = {
        "finetune_train": settings.n_finetune,
        "finetune_validation": settings.n_finetune_validation,
        "delta_train": settings.n_delta,
        "delta_validation": settings.n_delta_validation,
    }
    home: dict[str, str] = {}
    splits: dict[str, list[dict]] = {split: [] for split in SPLITS}
    # Evaluation first: where a row is in two splits, training loses it, so that a small evaluation set stays whole.
    for split in ("eval", "finetune_validation", "delta_validation", "finetune_train", "delta_train"):
        for row in found[split]:
            if row["input"] in home:
                dropped[f"{split} row already in {home[row['input']]}"] += 1
                continue
            home[row["input"]] = split
            splits[split].append(row)
    for split, n in limits.items():
        splits[split] = splits[split][:n]
    kept: Counter[str] = Counter()
    evaluation = []
    for row in splits["eval"]:
        kept[row["label"]] += 1
        if kept[row["label"]] <= settings.n_eval:
            evaluation.append(row)
    return splits | {"eval": evaluation}
