"""params.yaml: every mistake names its key.

pytest tests/test_config.py
"""

from pathlib import Path

import pytest
import yaml

from deltatc.config import config_name, configurations, load_params, studied
from deltatc.errors import ConfigError

ROOT = Path(__file__).parent.parent


def changed(tmp_path, key, value):
    tree = yaml.safe_load((ROOT / "params.yaml").read_text())
    *path, last = key.split(".")
    block = tree
    for name in path:
        block = block[name]
    if value is ...:
        del block[last]
    else:
        block[last] = value
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "params.yaml"


@pytest.mark.parametrize(
    ("key", "value"),
    [("delta.lr", ...), ("exp1", ...), ("delta.learning_rate", 1), ("nonsense", 1),
     ("batch_size", "10"), ("batch_size", True), ("batch_size", 0), ("dtype", "float8"),
     ("delta.lr", float("nan")), ("delta.lr", -1.0), ("delta.l0_fraction", 1.5),
     ("delta.d_new", 8), ("delta.d_new", []), ("delta.d_new", [8, 8]), ("delta.d_new", [0]), ("delta.d_new", [8.5]),
     ("delta.percentiles", [2.0]), ("delta.target", "both"), ("transcoders.site", "somewhere"), ("exp2a.d_new", 7),
     ("exp2a.percentile", 0.3), ("exp2b.layers", [9]), ("finetune.target_modules", ["mlp"]), ("prompts.source", None),
     ("finetune", 3), ("delta.l0_fraction_also", 0.5), ("site_check.require_win", "yes")],
)  # fmt: skip
def test_every_mistake_names_its_key(tmp_path, key, value):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        load_params(changed(tmp_path, key, value))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(ConfigError, match="repository's root"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_params(tmp_path / "params.yaml")


def test_configurations_come_from_params_alone(tmp_path):
    params = load_params(changed(tmp_path, "delta.d_new", [8]))
    assert [name for name, *_ in configurations(params)] == ["d8_p0.25", "d8_p0.50", "d8_p0.75", "d8_p0.50_l0.25"]
    assert studied(params) == (8, 0.5) and config_name(8, 0.5) == "d8_p0.50"
