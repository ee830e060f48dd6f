"""dvc.yaml, params.yaml and the stage scripts agree with each other.

pytest tests/test_pipeline_files.py
"""

import ast
import dataclasses
from pathlib import Path

import pytest
import yaml

from deltatc.config import Params, load_params

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "deltatc"
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())


def library_imports(path: Path) -> set[str]:
    """Names of deltatc modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "deltatc":
            found |= {alias.name for alias in node.names if (LIBRARY / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deltatc."):
            found.add(node.module.split(".")[1])
    return found


def reached(path: Path) -> set[str]:
    """The library modules that a stage script reaches, through stage.py and through each other."""
    waiting, seen = library_imports(path) | library_imports(ROOT / "pipeline/stage.py"), set()
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting |= library_imports(LIBRARY / f"{module}.py")
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_deps_list_the_script_and_exactly_the_modules_it_reaches(stage):
    modules = reached(ROOT / f"pipeline/{stage}.py")
    wanted = {f"pipeline/{stage}.py", "pipeline/stage.py", *(f"deltatc/{module}.py" for module in modules)}
    wanted |= {"csrc"} if "ops" in modules else set()
    code = {dep for dep in STAGES[stage]["deps"] if dep.startswith(("pipeline/", "deltatc/", "csrc"))}
    assert code == wanted


@pytest.mark.parametrize("stage", STAGES)
def test_stage_script_and_params_block_share_a_name(stage):
    assert STAGES[stage]["cmd"] == f"env OMP_WAIT_POLICY=PASSIVE python pipeline/{stage}.py"
    if stage not in ("exp1_summary", "report"):  # these two only rearrange
        assert stage in PARAMS and any(key.split(".")[0] == stage for key in STAGES[stage]["params"])


@pytest.mark.parametrize("stage", STAGES)
def test_params_that_a_script_reads_are_declared(stage):
    declared = {key.split(".")[0] for key in STAGES[stage].get("params", [])}
    read = set()
    for node in ast.walk(ast.parse((ROOT / f"pipeline/{stage}.py").read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params":
            read.add(node.attr)
    assert read <= declared


def test_both_scales_have_the_same_keys():
    full = yaml.safe_load((ROOT / "pipeline/params/gemma-2-2b.yaml").read_text())
    assert keys(full) == keys(PARAMS)
    load_params(ROOT / "pipeline/params/gemma-2-2b.yaml")


def test_params_yaml_has_a_block_for_every_dataclass_field():
    assert list(PARAMS) == [field.name for field in dataclasses.fields(Params)]


def keys(tree: object, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix]
    return [key for name, value in tree.items() for key in keys(value, f"{prefix}.{name}")]
