"""python -m pipeline.bootstrap [OUTPUT]: everything in models/, seeded and gated, in minutes on two CPU cores."""

import sys
from pathlib import Path

from deltatc.errors import DeltatcError
from pipeline.bootstrap.base_transcoders import train_base_transcoders
from pipeline.bootstrap.corpus import Corpus
from pipeline.bootstrap.pretrain import pretrain

SEED = 0


def main(folder: Path) -> None:
    corpus = Corpus(SEED)
    pretrain(corpus, folder, SEED)
    train_base_transcoders(corpus, folder, SEED)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "models"))
    except DeltatcError as error:
        sys.exit(f"bootstrap: error: {error}")
