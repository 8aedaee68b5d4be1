"""Entry point for `accelerate launch scripts/train_generator.py --config tiny --tokens FOLDER ...`."""

import sys

from dualcodebook_hf.generation.train import main

if __name__ == "__main__":
    sys.exit(main())
