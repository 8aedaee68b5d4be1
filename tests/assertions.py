"""Assertions that several test files share."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import ImageChops
from safetensors.torch import load_file

from dualcodebook_hf.run_folder import RunFolder


def assert_alike(image, expected):
    """Equal images but for one of 256 levels: another process, with other threads, may round differently."""
    assert image.size == expected.size and image.mode == expected.mode == "RGB"
    assert max(high for _, high in ImageChops.difference(image, expected).getextrema()) <= 1


def checkpoint_names(output_dir):
    """Complete checkpoints of a run, oldest first."""
    return [path.name for path in RunFolder(Path(output_dir)).checkpoints()]


def contents(folder):
    """Every tensor and number of a checkpoint, by file and key."""

    def flatten(prefix, value):
        if isinstance(value, dict):
            for key, item in value.items():
                yield from flatten(f"{prefix}/{key}", item)
        elif isinstance(value, (list, tuple)):
            for key, item in enumerate(value):
                yield from flatten(f"{prefix}/{key}", item)
        else:
            yield prefix, value

    found = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found |= dict(flatten(name, load_file(path)))
        elif path.suffix == ".bin":
            found |= dict(flatten(name, torch.load(path, weights_only=True)))
        elif path.name == "progress.json" or path.name.startswith("random_states_"):
            found |= dict(flatten(name, json.loads(path.read_text())))
    return found


def assert_equal_checkpoints(a, b):
    """Equal to the last bit."""
    a, b = contents(a), contents(b)
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = value.equal(b[name]) if isinstance(value, torch.Tensor) else np.array_equal(value, b[name])
        assert same, name
