"""What every stage script shares: the paths of the pipeline, and turning expected failures into one sentence."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from deltatc.errors import DeltatcError

PROMPTS = Path("artifacts/prompts")
FINETUNED = Path("artifacts/finetuned")
DELTA = Path("artifacts/delta")
FUSED = Path("artifacts/fused")
EXP2A = Path("artifacts/exp2a")
EXP2B = Path("artifacts/exp2b")
METRICS = Path("metrics")
PLOTS = Path("plots")
REPORT = Path("report")


def run(main: Callable[[], None]) -> None:
    """Run a stage: bad input, a full disk or too little memory end it with one sentence instead of a traceback."""
    name = Path(sys.argv[0]).stem
    logging.basicConfig(format=f"{name}: %(levelname)s: %(message)s", level=logging.WARNING)
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        main()
    except DeltatcError as error:
        sys.exit(f"{name}: error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; `dvc repro` takes this stage up again from its beginning")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"{name}: error: the disk is full ({error.filename}); free some space and run `dvc repro` again")
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        sys.exit(
            f"{name}: error: out of memory; lower batch_size in params.yaml first, then delta.n_tokens (or raise "
            f"delta.n_chunks) in the delta stage, or set dtype: bfloat16"
        )


def quiet_transformers() -> None:
    """Keep transformers' own progress bars and notices out of a stage's output."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "not enough memory" in text
