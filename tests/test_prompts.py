"""Prompts: splits that share nothing, and external data taken as it is.

pytest tests/test_prompts.py
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from deltatc.config import Prompts
from deltatc.errors import DataError
from deltatc.external import external_splits
from deltatc.prompts import SUBSETS, check_splits, generate_splits
from deltatc.toolcall import is_correct

ROOT = Path(__file__).parent.parent
DATA = ROOT / "data"
SETTINGS = Prompts(
    source="data", seed=5, n_finetune=400, n_finetune_validation=40, n_delta=200, n_delta_validation=40, n_eval=60,
    copy_fraction=0.4,
)  # fmt: skip

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="data/ is missing; run `dvc pull data.dvc`")


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def example(text: str, label: str = "positive") -> dict:
    target = text if label == "negative" else f"<tool_call>calculator({text.split()[-1]})</tool_call>"
    return {"input": text, "target": target, "label": label}


def test_splits_share_no_prompt_no_expression_and_no_ood_template():
    splits = generate_splits(DATA, SETTINGS)
    seen: dict[str, str] = {}
    for split, rows in splits.items():
        for row in rows:
            for item in (row["input"], (row["expr"] or row["input"]).replace(" ", "")):
                assert seen.setdefault(item, split) == split
    trained = {row["template"] for split, rows in splits.items() if split != "eval" for row in rows}
    ood = [row for row in splits["eval"] if row["label"].endswith("_ood")]
    assert ood and not trained & {row["template"] for row in ood}
    assert not any("<tool_call>" in row["input"] for row in splits["eval"])


def test_sizes_labels_targets_and_values():
    splits = generate_splits(DATA, SETTINGS)
    assert [len(rows) for rows in splits.values()] == [400, 40, 200, 40, 60 * len(SUBSETS)]
    assert Counter(row["label"] for row in splits["eval"]) == dict.fromkeys(SUBSETS, 60)
    assert Counter(row["label"] for row in splits["finetune_train"]) == {"copy": 160, "tool": 240}
    for row in (row for rows in splits.values() for row in rows):
        if row["expr"] is None:
            assert row["target"] == row["input"] and not set("+*/=") & set(row["input"])
        else:
            assert is_correct(row["target"], True, row["expr"])  # also: no gold value divides by zero
    assert all("." in row["expr"] for row in splits["eval"] if row["label"] == "tool_decimal")
    assert all("(" in row["expr"] for row in splits["eval"] if row["label"] == "tool_two_step")


def test_a_seed_decides_everything():
    assert generate_splits(DATA, SETTINGS) == generate_splits(DATA, SETTINGS)
    assert generate_splits(DATA, SETTINGS) != generate_splits(DATA, replace(SETTINGS, seed=6))


def test_planted_overlaps_are_found():
    splits = generate_splits(DATA, SETTINGS)
    for split in ("finetune_train", "delta_validation"):
        with pytest.raises(DataError, match="disjoint"):
            check_splits(splits | {split: splits[split] + splits["eval"][:1]})
    stolen = {**splits["eval"][-1], "input": "brand new", "expr": None, "label": "tool_ood"}
    stolen["template"] = splits["finetune_train"][0]["template"]
    with pytest.raises(DataError, match="trained template"):
        check_splits(splits | {"eval": [*splits["eval"], stolen]})


def test_asking_for_more_than_there_is_says_so(tmp_path):
    for name in ("templates", "words", "numbers"):
        value = json.loads((DATA / f"{name}.json").read_text())
        if name == "numbers":
            value["digits"] = [1, 1]
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match="used up"):
        generate_splits(tmp_path, SETTINGS)


def test_missing_data_says_what_to_pull(tmp_path):
    with pytest.raises(DataError, match=r"dvc pull data\.dvc"):
        generate_splits(tmp_path, SETTINGS)


def test_external_rows_keep_their_labels_and_lose_their_overlaps(tmp_path):
    train = [example(f"find {i}+1") for i in range(40)] + [example(f"text number {i}", "negative") for i in range(20)]
    write_rows(tmp_path / "finetune.jsonl", train)
    write_rows(tmp_path / "exp2.jsonl", [train[0], example("new 5+6"), example("odd 7+8", "tool_ood")])
    (tmp_path / "transcoder_train.txt").write_text("one\ntwo\ntwo\nnew 5+6\n")
    prompted = external_splits(tmp_path, DATA, SETTINGS)
    assert [row["label"] for row in prompted.rows["eval"]] == ["tool", "tool", "tool_ood"]
    evaluated = {row["input"] for row in prompted.rows["eval"]}
    for split, rows in prompted.rows.items():
        assert split == "eval" or not evaluated & {row["input"] for row in rows}
    assert (
        prompted.dropped["delta_train row already in eval"]
        + prompted.dropped.get("delta_validation row already in eval", 0)
        == 1
    )
    assert prompted.rows["eval"][0]["expr"] == "0+1"


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"input": "a", "target": "b", "label": "maybe"}', r"x\.jsonl:2: label 'maybe'"),
     ('{"input": "a", "target": 3, "label": "positive"}', r"x\.jsonl:2: 'target'"),
     ('{"input": "a"', r"x\.jsonl:2: not valid JSON"), ("[1]", r"x\.jsonl:2: expected a JSON object")],
)  # fmt: skip
def test_bad_external_rows_are_refused_with_file_and_line(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text(json.dumps(example("find 1+1")) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        external_splits(tmp_path, DATA, SETTINGS)


def test_gsm8k_alone_joins_the_projects_own_study(tmp_path):
    rows = [{"question": f"How many are {i} and 2?", "answer": f"It is <<{i}+2={i + 2}>>{i + 2}"} for i in range(5)]
    write_rows(tmp_path / "train.jsonl", [*rows, {"question": "Why?", "answer": "No numbers."}])
    prompted = external_splits(tmp_path, DATA, SETTINGS)
    found = Counter(row["label"] for row in prompted.rows["eval"])
    assert found["tool_gsm8k"] == 5 and found["tool"] == 60
    assert prompted.dropped == {"gsm8k without a usable annotation": 1}


def test_the_original_systems_files_and_gsm8k(shared_data, tmp_path):
    for name in ("exp2_combined_dataset.jsonl", "finetune.jsonl"):
        (tmp_path / name).write_bytes((shared_data / "toolformer" / name).read_bytes())
    for name in ("transcoder_train.txt", "transcoder_validation.txt"):
        (tmp_path / name).write_bytes((shared_data / "toolformer" / name).read_bytes())
    problems = (shared_data / "gsm8k/train.jsonl").read_text().splitlines(keepends=True)[:300]
    (tmp_path / "gsm8k.jsonl").write_text("".join(problems))
    prompted = external_splits(tmp_path, DATA, SETTINGS)
    found = Counter(row["label"] for row in prompted.rows["eval"])
    assert found == {"tool": 20, "copy": 20, "tool_gsm8k": 60}
    evaluated = {row["input"] for row in prompted.rows["eval"]}
    assert not evaluated & {row["input"] for row in prompted.rows["finetune_train"]}
    assert (
        prompted.dropped["finetune_train row already in eval"]
        + prompted.dropped.get("finetune_validation row already in eval", 0)
        == 20
    )  # every copy row of its evaluation file was in its training file
