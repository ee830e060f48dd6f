"""What every test shares: the environment of `make test`, also under a plain `pytest`, and the shared data folder."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Before the first import of torch, which reads it; see the Makefile for why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests that start `python`, `dvc` or `deltatc` get those of this environment.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

settings.register_profile("deltatc", deadline=None, derandomize=True)
settings.load_profile("deltatc")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of external datasets (toolformer/, gsm8k/): $DELTATC_SHARED_DATA, or shared/data beside the clone."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DELTATC_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"external datasets not found: {folder} is no folder; name it in DELTATC_SHARED_DATA")
    return folder
