"""`dualcodebook convert` for a checkout: python scripts/convert_checkpoint.py SOURCE --output DIR."""

import sys

from dualcodebook_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
