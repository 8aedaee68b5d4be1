"""Entry point for `accelerate launch scripts/train.py --config tiny --dataset PATH ...`."""

import sys

from dualcodebook_hf.training.train import main

if __name__ == "__main__":
    sys.exit(main())
