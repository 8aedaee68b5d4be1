"""`python scripts/push_to_hub.py RUN --repo-id you/name`, the same as `dualcodebook push`."""

import sys

from dualcodebook_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
