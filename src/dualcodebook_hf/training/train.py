"""The training process: `python -m dualcodebook_hf.training.train`, started by accelerate's launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .arguments import EXIT_CODE_FILE, parse_run_config
from .run import StopRequest, Trainer
from .tokenizer_task import TokenizerTask


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what the flags say: 0 when it ended or was asked to stop, 2 for bad input, 1 for the disk or the Hub."""
    with StopRequest().watching() as stop:
        try:
            run = parse_run_config(sys.argv[1:] if argv is None else argv)
            Trainer(TokenizerTask(run), run.training, stop).train()
        except ValueError as error:
            print(f"dualcodebook train: error: {error}", file=sys.stderr)
            if EXIT_CODE_FILE in os.environ:
                Path(os.environ[EXIT_CODE_FILE]).write_text("2")
            return 2
        except OSError as error:
            print(f"dualcodebook train: error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
