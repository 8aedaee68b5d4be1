"""`make demo`: reconstructs four images of scikit-image's wheel with the embedded checkpoint, offline."""

import sys
from pathlib import Path

import skimage

from dualcodebook_hf.cli import main

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")

if __name__ == "__main__":
    folder = Path(skimage.__file__).parent / "data"
    images = [str(folder / name) for name in NAMES]
    sys.exit(main(["reconstruct", *images, "--output", "demo", "--sheet", "demo/sheet.png"]))
