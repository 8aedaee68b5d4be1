"""The training process: `python -m dualcodebook_hf.generation.train`, started by accelerate's launcher."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..training.train import run_training
from .arguments import PROGRAM, parse_generator_config
from .task import GeneratorTask


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the flags say, and says in a line how it ended; the exit code is one of docs/training.md."""
    return run_training(PROGRAM, parse_generator_config, GeneratorTask, argv)


if __name__ == "__main__":
    sys.exit(main())
