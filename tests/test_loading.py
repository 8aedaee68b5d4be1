"""The embedded checkpoints by name: two decoders, one encoder, the same tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dualcodebook_hf import DualCodebookVQModel, default_checkpoint
from dualcodebook_hf.cli import main
from dualcodebook_hf.hub import Records, model_card
from dualcodebook_hf.image_processing_dualcodebook import to_pixels
from dualcodebook_hf.loading import check_tokenizer_name, load_tokenizer, tokenizer_label
from dualcodebook_hf.metrics.images import psnr
from dualcodebook_hf.training.arguments import parse_run_config
from dualcodebook_hf.training.tokenizer_task import build_model
from dualcodebook_hf.weights import TOKEN_PARTS


@pytest.fixture(scope="module")
def decoders() -> tuple[DualCodebookVQModel, DualCodebookVQModel]:
    return tuple(load_tokenizer(name, device="cpu") for name in ("sharp", "faithful"))


@pytest.fixture(scope="module")
def photograph() -> torch.Tensor:
    data = pytest.importorskip("skimage.data")
    return to_pixels(Image.fromarray(data.astronaut()).resize((256, 256), Image.Resampling.LANCZOS))[None]


def test_both_have_the_same_encoder_and_codebooks_bit_by_bit(decoders):
    sharp, faithful = (model.state_dict() for model in decoders)
    names = {name for name in faithful if name.split(".")[0] in TOKEN_PARTS}
    assert names == {name for name in sharp if name.split(".")[0] in TOKEN_PARTS}
    assert all(torch.equal(sharp[name], faithful[name]) for name in names)


def test_tokens_of_one_are_the_others_and_pixels_are_its_own(decoders, photograph):
    sharp, faithful = decoders
    tokens = sharp.tokenize(photograph)
    assert torch.equal(tokens, faithful.tokenize(photograph))
    restored = [(model.detokenize(tokens, size=(256, 256)) + 1) / 2 for model in decoders]
    assert not torch.allclose(*restored, atol=0.05)
    of_sharp, of_faithful = (psnr(image, (photograph + 1) / 2).item() for image in restored)
    assert abs(of_sharp - of_faithful) < 0.8


def test_sharp_is_nearer_by_features_on_every_data_set_for_less_than_a_decibel():
    measured = []
    for name in ("sharp", "faithful"):
        results = json.loads((Path(default_checkpoint(name)) / "metrics.json").read_text())["results"]
        own = [result for result in results if result["model"]["name"] == tokenizer_label(name)]
        measured.append({result["protocol"]["dataset"]: result["metrics"] for result in own})
    assert measured[0].keys() == measured[1].keys() >= {"clothing-256", "bsds500"}
    for dataset, sharp in measured[0].items():
        faithful = measured[1][dataset]
        assert sharp["kd_effnetlite2"] < faithful["kd_effnetlite2"], dataset
        assert sharp["psnr"] > faithful["psnr"] - 0.8, dataset


def test_names_stand_for_folders_of_the_package(decoders):
    assert default_checkpoint() == default_checkpoint("sharp") != default_checkpoint("faithful")
    assert tokenizer_label(None) == tokenizer_label("sharp") == "embedded checkpoint"
    assert "embedded" not in tokenizer_label("/a/mydualcodebook_hf/checkpoints/tiny")
    assert (
        tokenizer_label("faithful")
        == tokenizer_label(default_checkpoint("faithful"))
        == "embedded checkpoint, faithful"
    )
    loaded = DualCodebookVQModel.from_pretrained(default_checkpoint("faithful"))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), decoders[1].parameters(), strict=True))
    with pytest.raises(ValueError, match="`decoder` must be one of sharp, faithful, got 'blurred'"):
        default_checkpoint("blurred")


def test_a_folder_of_that_name_is_never_taken_or_left_silently(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(default_checkpoint("sharp"), "faithful")
    for use in (check_tokenizer_name, load_tokenizer):
        with pytest.raises(ValueError, match=r"`model`: 'faithful' is a decoder .* write './faithful' for the folder"):
            use("faithful")
    assert load_tokenizer("./faithful").num_parameters() == load_tokenizer("sharp").num_parameters()


def test_training_starts_from_a_name(decoders, tmp_path):
    flags = ["--config", "tiny", "--dataset", "x", "--output_dir", str(tmp_path), "--data_initialization", "0"]
    run = parse_run_config([*flags, "--init_from", "faithful"])
    model = build_model(run)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), decoders[1].parameters(), strict=True))
    with pytest.raises(ValueError, match="`init_from` 'sharp' does not fit the model"):
        build_model(parse_run_config([*flags, "--init_from", "sharp"]))  # its decoder is wider


def test_commands_take_the_names(tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("sharp", "faithful")}
    for name, file in files.items():
        assert main(["tokenize", str(tmp_path / "a.png"), "--model", name, "--output", str(file)]) == 0
    pictures = []
    for name in files:  # either decodes what the other tokenized
        out = tmp_path / name
        assert main(["detokenize", str(files["sharp"]), "--model", name, "--output", str(out)]) == 0
        pictures.append(np.asarray(Image.open(next(out.glob("*.png")))))
    assert pictures[0].shape == pictures[1].shape == (40, 50, 3)
    assert not np.array_equal(*pictures)


def test_each_card_names_its_own_decoder():
    for name, source in (("sharp", "default_checkpoint()"), ("faithful", 'default_checkpoint("faithful")')):
        folder = Path(default_checkpoint(name))
        text = model_card(Records.read(folder))
        assert f"DualCodebookVQModel.from_pretrained({source})" in text
        assert text == (folder / "README.md").read_text()
        assert ("Trained for pixels alone" in text) == (name == "faithful")
        assert "license: apache-2.0" in text
