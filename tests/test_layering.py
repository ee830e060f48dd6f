"""The architecture as a test: imports point one way, dangerous calls do not occur, the library does not print.

pytest tests/test_layering.py
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # a module imports only from lines above its own
    {"errors"},
    {"files", "config", "calculator", "sites", "ops_ref"},
    {"ops", "toolcall", "models", "text"},
    {"ops_sparse", "transcoder", "prompts"},
    {"formats", "hooks", "external"},
    {"harvest", "train", "generate", "evaluate"},
    {"delta", "finetune", "site_check", "intervene", "stats"},
    {"report", "plots"},
    {"cli"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
LIBRARY = sorted((ROOT / "deltatc").glob("*.py"))
PYTHON = [*LIBRARY, *sorted((ROOT / "pipeline").rglob("*.py")), ROOT / "setup.py"]
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_ARGUMENTS = {"allow_pickle", "trust_remote_code", "shell"}


def imported(source: str) -> set[str]:
    """The modules of deltatc that `source` imports, in whichever form."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("deltatc.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            parts = (node.module or "").split(".")
            if parts == ["deltatc"]:
                found |= {alias.name for alias in node.names if (ROOT / "deltatc" / f"{alias.name}.py").exists()}
            elif parts[0] == "deltatc":
                found.add(parts[1])
    return found


def dangerous(source: str) -> list[int]:
    """The lines of `source` that unpickle, evaluate, or start a shell."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            on = {keyword.arg for keyword in node.keywords if ast.unparse(keyword.value) != "False"}
            if ast.unparse(node.func) in FORBIDDEN_CALLS or on & FORBIDDEN_ARGUMENTS:
                lines.append(node.lineno)
        elif isinstance(node, ast.Import) and {a.name.split(".")[0] for a in node.names} & FORBIDDEN_MODULES:
            lines.append(node.lineno)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            if names & FORBIDDEN_CALLS or (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.stem != "__init__"], ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    found = imported(path.read_text())
    assert all(LEVEL[module] < LEVEL[path.stem] for module in found), found


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.stem)
def test_nothing_executes_what_it_reads(path):
    assert not dangerous(path.read_text())


def test_the_scan_sees_what_it_looks_for():
    forms = (
        "import deltatc.hooks",
        "from deltatc import hooks",
        "from deltatc.hooks import x",
        "import deltatc.hooks as h",
    )
    assert all(imported(form) == {"hooks"} for form in forms)
    bad = (
        "eval('1')", "def f():\n    exec(x)", "import pickle", "from pickle import loads", "import os, dill",
        "torch.load(p)", "from torch import load", "np.load(p, allow_pickle=True)", "f(trust_remote_code=flag)",
        "run(c, shell=True)", "yaml.load(t)", "os.system(c)", "from yaml import unsafe_load",
    )  # fmt: skip
    assert all(dangerous(source) for source in bad)
    fine = "np.load(p, allow_pickle=False)", "yaml.safe_load(t)", "model.eval()", "re.compile(x)", "import json"
    assert not any(dangerous(source) for source in fine)


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.stem != "cli"], ids=lambda p: p.stem)
def test_the_library_neither_prints_nor_parses_arguments(path):
    tree = ast.parse(path.read_text())
    assert not any(isinstance(n, ast.Call) and ast.unparse(n.func) == "print" for n in ast.walk(tree))
    assert "argparse" not in path.read_text()


def test_importing_the_package_does_not_import_torch():
    code = "import deltatc, deltatc.config, deltatc.prompts, deltatc.report, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_are_all_there():
    import deltatc

    assert all(getattr(deltatc, name) is not None for name in deltatc.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        deltatc.nothing  # noqa: B018
