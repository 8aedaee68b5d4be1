"""Assertions that several test files share."""

from PIL import ImageChops


def assert_alike(image, expected):
    """Equal pictures but for one of 256 levels: another process, with other threads, may round differently."""
    assert image.size == expected.size and image.mode == expected.mode == "RGB"
    assert max(high for _, high in ImageChops.difference(image, expected).getextrema()) <= 1
