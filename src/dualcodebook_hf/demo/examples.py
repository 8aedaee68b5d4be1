"""Pictures to begin with: photographs of scikit-image's wheel or, where it is not installed, two drawn ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from PIL import Image

PHOTOGRAPHS = {
    "Cat": "chelsea.png",
    "Astronaut": "astronaut.png",
    "Coffee": "coffee.png",
    "Rocket": "rocket.jpg",
}
THUMBNAIL = 168  # pixels


def example_images(folder: Path) -> dict[str, Path]:
    """Copies the examples into a folder: {what they show: path}."""
    package = importlib.util.find_spec("skimage")
    source = Path(package.origin).parent / "data" if package else None
    if source is None or not all((source / name).is_file() for name in PHOTOGRAPHS.values()):
        return _draw(folder)
    found = {}
    for title, name in PHOTOGRAPHS.items():
        found[title] = folder / name
        found[title].write_bytes((source / name).read_bytes())
    return found


def thumbnail(path: Path) -> Image.Image:
    """The middle of a picture, small and square."""
    image = Image.open(path).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)


def _draw(folder: Path) -> dict[str, Path]:
    disc = Image.radial_gradient("L").resize((512, 384))
    fractal = Image.effect_mandelbrot(disc.size, (-2, -1.2, 0.8, 1.2), 90)
    slope = Image.linear_gradient("L").resize(disc.size)
    found = {"Fractal": folder / "fractal.png", "Gradients": folder / "gradients.png"}
    Image.merge("RGB", (fractal, disc, slope)).save(found["Fractal"])
    Image.merge("RGB", (slope, disc, disc.rotate(180))).save(found["Gradients"])
    return found
