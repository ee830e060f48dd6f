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
    {"transcoder", "prompts"},
    {"formats", "hooks", "external"},
    {"harvest", "train", "generate", "evaluate"},
    {"delta", "finetune", "site_check", "intervene", "stats"},
    {"report", "plots"},
    {"cli"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
LIBRARY = sorted((ROOT / "deltatc").glob("*.py"))
PYTHON = [*LIBRARY, *sorted((ROOT / "pipeline").rglob("*.py")), ROOT / "setup.py"]
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill"}
FORBIDDEN_ARGUMENTS = {"allow_pickle", "trust_remote_code", "shell"}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "deltatc":
            found |= {alias.name for alias in node.names if (ROOT / "deltatc" / f"{alias.name}.py").exists()}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deltatc."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", [p for p in LIBRARY if p.stem != "__init__"], ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    assert all(LEVEL[module] < LEVEL[path.stem] for module in imported(path)), imported(path)


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: p.stem)
def test_nothing_executes_what_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in FORBIDDEN_CALLS and name not in ("torch.load", "yaml.load", "os.system"), (
                f"{path}:{node.lineno}"
            )
            for keyword in node.keywords:
                assert keyword.arg not in FORBIDDEN_ARGUMENTS or ast.unparse(keyword.value) == "False", (
                    f"{path}:{node.lineno}"
                )
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not FORBIDDEN_MODULES & {name.split(".")[0] for name in names}, f"{path}:{node.lineno}"


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
