"""The pipeline for real, at a minute's size: `dvc repro` twice in a folder with a space, and the full-scale layout.

pytest tests/test_pipeline.py
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from deltatc.config import configurations, load_params

ROOT = Path(__file__).parent.parent
STAGES = ("prompts", "finetune", "site_check", "delta", "fuse", "exp1", "exp1_summary", "exp2a", "exp2b", "report")
SMALL = {
    "batch_size": 50,
    "prompts": {"n_finetune": 240, "n_finetune_validation": 16, "n_delta": 150, "n_delta_validation": 30, "n_eval": 12},
    "finetune": {"n_epochs": 1, "batch_rows": 16, "accumulate": 1, "checkpoints": 2, "n_validation": 6,
                 "max_new_tokens": 40},
    "site_check": {"n_tokens": 3000},
    "delta": {"d_new": [4, 8], "n_tokens": 3000, "n_validation_tokens": 800, "n_steps": 40, "batch_tokens": 128,
              "eval_every": 20},
    "exp1": {"n": 8},
    "exp2a": {"n": 8, "layers": [0, 2], "max_new_tokens": 24},
    "exp2b": {"layers": [0], "alphas": [0.5]},
}  # fmt: skip


def workspace(folder: Path, params: dict) -> Path:
    """Copy what git would clone, embedded data and models included, with smaller params."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(
            (".dvc/embedded", "plots/", "metrics/", "report/", "dvc.lock")
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in ("data", "models"):
        if not (ROOT / name).is_dir():
            pytest.skip(f"{name}/ is missing; run `dvc pull data.dvc models.dvc`")
        shutil.copytree(ROOT / name, folder / name, dirs_exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    run(folder, "git", "init", "-q")
    return folder


def shrunk(source: str) -> dict:
    params = yaml.safe_load((ROOT / source).read_text())
    for block, values in SMALL.items():
        if isinstance(values, dict):
            params[block].update(values)
        else:
            params[block] = values
    return params


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE", "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_repro_runs_everything_once_in_a_folder_with_a_space(tmp_path):
    folder = workspace(tmp_path / "a b", shrunk("params.yaml"))
    first = run(folder, "dvc", "repro")
    assert [stage for stage in STAGES if f"Running stage '{stage}'" in first] == list(STAGES)
    assert "Running stage" not in run(folder, "dvc", "repro")
    assert "up to date" in run(folder, "dvc", "status")
    params = load_params(folder / "params.yaml")
    check_outputs(folder, params, n_layers=4)
    headline = json.loads((folder / "metrics/headline.json").read_text())
    assert 0 < len(headline) <= 25
    assert set(json.loads(run(folder, "dvc", "metrics", "show", "--json"))[""]["data"]) == {"metrics/headline.json"}
    # A seed decides everything: the last stages again, from the same inputs, give the same bytes.
    before = {path: path.read_bytes() for path in (folder / "metrics").rglob("*") if path.is_file()}
    run(folder, "dvc", "repro", "--force", "--single-item", "delta", "exp1", "exp2a")
    assert {path: path.read_bytes() for path in before} == before
    # Chat and stats work on what is there.
    chat = run(folder, "deltatc", "chat", "--prompt", "What is 12 plus 30?", "--layer", "0", "--max-new-tokens", "8")
    assert all(name in chat for name in ("unfinetuned", "raw", "base-only", "fused", "dCE"))
    assert run(folder, "deltatc", "stats", "What is 12 plus 30?").count("delta") == 4


def test_full_scale_params_run_on_a_stand_in_outside_the_models_folder(tmp_path):
    from tests.helpers import tiny_gemma2

    params = shrunk("pipeline/params/gemma-2-2b.yaml")
    params |= {"device": "cpu", "dtype": "float32"}
    params["exp2a"] |= {"d_new": 8, "layers": [0, 2]}
    params["site_check"] |= {"require_win": False}
    params["finetune"] |= {"gradient_checkpointing": False, "lr": 0.001}
    folder = workspace(tmp_path, params)
    checkpoints = folder / "checkpoints"
    tiny_gemma2(checkpoints / "gemma-2-2b")
    draw = np.random.default_rng(0)
    for layer in range(3):
        for l0 in (9, 20, 41, 76):  # four choices, so that no percentile is an end of the list
            path = checkpoints / f"gemma-scope-2b-pt-transcoders/layer_{layer}/width_16k/average_l0_{l0}"
            path.mkdir(parents=True)
            W_enc = draw.normal(size=(32, 96)).astype("f") * 0.2
            arrays = {"W_enc": W_enc, "W_dec": W_enc.T * 0.1, "b_enc": np.zeros(96, "f"), "b_dec": np.zeros(32, "f")}
            np.savez(path / "params.npz", threshold=np.full(96, 2 / l0, "f"), **arrays)
    shutil.copy(ROOT / "models/tiny-text/heldout.jsonl", checkpoints / "pretraining-sample.jsonl")
    for name in ("gemma-2-2b", "gemma-scope-2b-pt-transcoders"):
        run(folder, "deltatc", "manifest", f"checkpoints/{name}", f"checkpoints/{name}.json")
    for stage in STAGES:
        run(folder, "python", f"pipeline/{stage}.py")
    check_outputs(folder, load_params(folder / "params.yaml"), n_layers=3)
    row = json.loads((folder / "metrics/exp1/d8_p0.25.json").read_text())["2"]
    assert row["l0_folder"] == 20  # index int(4 * 0.25) of 9, 20, 41, 76


def test_external_data_runs_through_every_stage(tmp_path, shared_data):
    """The original system's files and GSM8K, a sample of each; the model is a ready one, so nothing is finetuned."""
    params = shrunk("params.yaml")
    params["prompts"] |= {"source": "external"}
    params["finetune"] |= {"merged_model": "ready-model"}
    params["exp1"]["subsets"] = ["tool", "copy", "tool_gsm8k"]
    params["delta"] |= {"d_new": [4], "percentiles": [0.5]}
    folder = workspace(tmp_path, params)
    shutil.copytree(folder / "models/tiny", folder / "ready-model")
    source = folder / "external"
    source.mkdir()
    for file in (shared_data / "toolformer").iterdir():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (source / file.name).write_text("".join(lines[:400]), encoding="utf-8")
    problems = (shared_data / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (source / "gsm8k.jsonl").write_text("".join(problems[:40]), encoding="utf-8")
    for stage in STAGES:
        run(folder, "python", f"pipeline/{stage}.py")
    counts = json.loads((folder / "metrics/prompts.json").read_text())["rows"]["eval"]
    assert {"tool", "copy", "tool_gsm8k"} <= set(counts)
    rates = json.loads((folder / "metrics/finetune.json").read_text())
    assert {subset: cell["n"] for subset, cell in rates.items()} == counts
    # The ready model was never finetuned: it calls no tool, and its MLPs are the base's.
    assert rates["tool"]["tool_call_rate"] == 0
    assert max(json.loads((folder / "artifacts/finetuned/validation.json").read_text())["mlp_change"]) == 0
    # Ready deltas instead of training: the very same ones come out.
    before = {path.name: path.read_bytes() for path in (folder / "artifacts/delta/d4_p0.50").iterdir()}
    (folder / "artifacts/delta").rename(folder / "ready-deltas")
    params["delta"]["load_from"] = "ready-deltas"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in ("delta", "fuse", "exp1", "exp1_summary", "report"):
        run(folder, "python", f"pipeline/{stage}.py")
    assert {path.name: path.read_bytes() for path in (folder / "artifacts/delta/d4_p0.50").iterdir()} == before


def check_outputs(folder: Path, params, n_layers: int) -> None:
    """Every file that the README promises is there, with the keys it promises."""
    read = lambda name: json.loads((folder / "metrics" / name).read_text())  # noqa: E731
    layers = [str(layer) for layer in range(n_layers)]
    for subset, cell in read("finetune.json").items():
        assert {"tool_call_rate", "valid_tool_format_rate", "math_correct_rate", "tool_call_rate_ci95", "n"} <= set(
            cell
        )
        assert (cell["math_correct_rate"] is None) == subset.startswith("copy")
    for choices in read("site_check.json").values():
        for found in choices.values():
            assert set(found) == {"fvu", "l0", "sites"} and len(found["sites"]) == 5
    summary = read("exp1_summary.json")
    for name, d_new, _, fraction in configurations(params):
        rows = read(f"exp1/{name}.json")
        assert list(rows) == layers and set(summary[name]) >= {"mean_dce_full", "gap_closed_min"}
        for row in rows.values():
            assert list(row) == [
                "l0_folder", "ce_raw", "ce_base", "ce_full", "dce_base", "dce_full", "gap_closed", "kl_base", "kl_full",
                "cos_base", "cos_full", "rel_l2_error_base", "rel_l2_error_full", "fvu_base", "fvu_full", "l0_base",
                "l0_delta",
            ]  # fmt: skip
            assert row["l0_delta"] <= d_new and 0 < fraction < 1
    groups = [str(layer) for layer in params.exp2a.layers] + ["all"]
    exp2a, exp2b = read("exp2a.json"), read("exp2b.json")
    assert list(exp2a) == groups
    for group, subsets in exp2a.items():
        for subset, cells in subsets.items():
            assert set(cells) == {"raw", "full", "no_delta"}
            for condition, cell in cells.items():
                layer = "raw" if condition == "raw" else group
                lines = (folder / f"artifacts/exp2a/layer_{layer}_{subset}_{condition}.jsonl").read_text().splitlines()
                assert len(lines) == cell["n"] > 0
    for group, subsets in exp2b.items():
        for subset, cells in subsets.items():
            assert list(cells) == ["0", *[f"{a:g}" for a in params.exp2b.alphas if a < 1], "1",
                                   *[f"{a:g}" for a in params.exp2b.alphas if a > 1]]  # fmt: skip
            assert cells["0"] == exp2a[group][subset]["no_delta"] and cells["1"] == exp2a[group][subset]["full"]
    report = (folder / "report/report.md").read_text()
    for link in [part.split(")")[0] for part in report.split("](")[1:]]:
        assert (folder / "report" / link).is_file(), link
