"""exp1 and exp2a with the compiled operator and with its plain-torch definition, on the artifacts of `make repro`."""

from pathlib import Path

import pytest

from deltatc import ops, ops_ref
from deltatc.config import config_name, load_params, studied
from deltatc.evaluate import Condition, compare_replacements, encode_rows
from deltatc.files import read_jsonl
from deltatc.formats import load_fused_layers
from deltatc.intervene import run_condition
from deltatc.models import load_model, load_tokenizer

ARTIFACTS = Path("artifacts")


@pytest.fixture(scope="module")
def study():
    if not (ARTIFACTS / "fused").is_dir():
        pytest.skip("artifacts/fused is missing; run `make repro` first")
    params = load_params()
    fused = load_fused_layers(ARTIFACTS / "fused" / config_name(*studied(params)), None, "cpu")
    rows = [row for row in read_jsonl(ARTIFACTS / "prompts/eval.jsonl") if row["label"] == "tool"][:64]
    return load_model(ARTIFACTS / "finetuned", "cpu", "float32"), load_tokenizer(params.model.path), rows, fused


def plainly(monkeypatch, function):
    def run():
        with monkeypatch.context() as patch:
            patch.setattr(ops, "transcode", ops_ref.transcode_ref)
            patch.setattr(ops, "transcode_stats", ops_ref.transcode_stats_ref)
            return function()

    return run


def test_exp1(race, study, monkeypatch):
    model, tokenizer, rows, fused = study
    sequences = encode_rows(tokenizer, rows, 256)
    conditions = {Condition(layer, "fused"): transcoder for layer, transcoder in fused.items()}

    def evaluate():
        return compare_replacements(model, sequences, conditions, 32, tokenizer.pad_token_id, "exp1")

    found, wanted = (run()[1] for run in (evaluate, plainly(monkeypatch, evaluate)))
    for condition in conditions:
        assert found[condition].means()["ce"] == pytest.approx(wanted[condition].means()["ce"], rel=1e-3, abs=1e-4)
    race({"experiment": "exp1"}, {"deltatc": evaluate, "plain": plainly(monkeypatch, evaluate)}, 7)


def test_exp2a(race, study, monkeypatch):
    model, tokenizer, rows, fused = study

    def generate():
        return run_condition(model, tokenizer, rows[:32], fused, 1.0, 32, 24, "exp2a")

    race({"experiment": "exp2a"}, {"deltatc": generate, "plain": plainly(monkeypatch, generate)}, 7)
