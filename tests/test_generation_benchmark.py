"""benchmarks/generation.py at tiny size: a row for each tokenizer and masking, and a second call does nothing again."""

from __future__ import annotations

import importlib

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_F16, spread_codes
from PIL import Image

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.files import read_json

generation = importlib.import_module("generation")


@pytest.fixture
def setting(tmp_path, monkeypatch):
    """Two tokenizers, images with classes, a generator's run file, and features that need no weights."""
    rng = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    for split, count in (("train", 6), ("validation", 4), ("test", 6)):
        images = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(count)]
        rows = datasets.Dataset.from_dict({"image": images, "label": [n % 2 for n in range(count)]}, features=features)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = spread_codes(DualCodebookVQModel(**TINY_F16, backbone="vqgan"))
        model.save_pretrained(tmp_path / f"tokenizer{seed}")
    config = {
        "generator": {"hidden_size": 8, "num_layers": 1, "num_attention_heads": 1},
        "training": {"max_train_steps": 2, "train_batch_size": 2, "validation_steps": 0, "sample_count": 0},
    }
    (tmp_path / "generator.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(generation, "effnetlite2_features", lambda device: lambda images: images.flatten(1)[:, ::97])
    return tmp_path


def call(folder, *more: str) -> list[str]:
    names = [f"{name}={folder}/tokenizer{seed}" for seed, name in enumerate(("one", "two"))]
    flags = ["--dataset", str(folder / "data"), "--output", str(folder / "out"), "--size", "32", "--crops", "2"]
    flags += ["--config", str(folder / "generator.yaml"), "--json", str(folder / "found.json"), "--threads", "1"]
    return ["--tokenizers", *names, *flags, *more]


def test_each_tokenizer_and_masking_is_a_row_and_what_is_done_is_kept(setting, capsys, fresh_accelerate, monkeypatch):
    assert generation.main(call(setting, "--maskings", "tokens", "books")) == 0
    record = read_json(setting / "found.json")
    assert [(row["tokenizer"], row["masking"]) for row in record["rows"]] == [
        ("one", "tokens"),
        ("one", "books"),
        ("two", "tokens"),
        ("two", "books"),
    ]
    for row in record["rows"]:
        assert row["bits"] == pytest.approx(np.log2(32) + np.log2(40))
        assert row["bits_global"] + row["bits_local"] == pytest.approx(row["bits_per_position"])
        assert 0 < row["bits_per_position"] < 2 * row["bits"]
        assert row["run"]["masking"] == row["masking"]
    assert str(setting) not in (setting / "found.json").read_text()
    printed = capsys.readouterr().out
    monkeypatch.setattr(generation, "_train", None)  # would fail if it were called
    assert generation.main(call(setting, "--maskings", "tokens", "books")) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == printed.splitlines()[-4:]
    assert generation.main(call(setting, "--maskings", "tokens", "--crops", "3")) == 2
    assert "was begun with other settings, choose a new folder" in capsys.readouterr().err


def test_a_tokenizer_without_a_name_is_refused(setting, capsys):
    assert generation.main([*call(setting), "--tokenizers", "runs/tokenizer"]) == 2
    assert "`--tokenizers` must be NAME=FOLDER, got 'runs/tokenizer'" in capsys.readouterr().err
