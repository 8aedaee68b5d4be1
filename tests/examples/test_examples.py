"""The scripts of examples/ and the notebook, run at a tiny size: what they leave behind is what they promise."""

import json
import runpy
import sys
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
import skimage
import torch
from conftest import forget_accelerate
from diffusers import LDMPipeline
from PIL import Image

import dualcodebook_hf
from dualcodebook_hf import DualCodebookVQModel, default_checkpoint
from dualcodebook_hf.image_processing_dualcodebook import read_image, to_pixels
from dualcodebook_hf.metrics.images import psnr

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOK = ROOT / "notebooks" / "tokenizer_tour.ipynb"
SIDE = 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder as docs/data.md shows it: splits, in them a folder per class; 64 x 64 crops of two photographs."""
    root = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("validation", 1), ("test", 2)):
        for name in ("astronaut", "coffee"):
            (root / split / name).mkdir(parents=True)
            photograph = Image.open(Path(skimage.data_dir) / f"{name}.png").resize((300, 300))
            for number in range(count):
                left, top = (int(place) for place in rng.integers(300 - SIDE, size=2))
                photograph.crop((left, top, left + SIDE, top + SIDE)).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    """Runs a script as its user would, in an empty folder, and returns that folder."""
    monkeypatch.chdir(tmp_path)

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return tmp_path

    yield run
    forget_accelerate()


def pixels_of(folder):
    return torch.stack([to_pixels(read_image(path)) for path in sorted(folder.rglob("*.png"))])


def quality(model, pixels):
    with torch.no_grad():
        return psnr((model(pixels).sample + 1) / 2, (pixels + 1) / 2).mean().item()


def test_training_on_a_folder_leaves_a_model_that_knows_its_images(photos, run_example, capsys):
    small = ["--block_out_channels", 8, 8, 8, "--layers_per_level", 0, 1, 1, "--data_initialization", 10]
    sizes = ["--global_codebook_size", 64, "--local_codebook_size", 64, "--global_dim", 8, "--local_dim", 8]
    short = ["--max_train_steps", 4, "--lr_warmup_steps", 0, "--train_batch_size", 4, "--resolution", 32]
    quiet = ["--report_to", "none", "--validation_steps", 0, "--num_threads", 1]
    folder = run_example("train_on_your_folder.py", photos, "runs/mine", *small, *sizes, *short, *quiet)
    model = DualCodebookVQModel.from_pretrained(folder / "runs" / "mine" / "final")
    untrained = DualCodebookVQModel.from_config(model.config).eval()
    pixels = pixels_of(photos / "validation")
    assert quality(model, pixels) > quality(untrained, pixels) + 5
    assert "photos validation" in capsys.readouterr().out


def test_fine_tuning_gains_on_the_images_that_it_saw(photos, run_example, capsys):
    flags = ["--steps", 12, "--batch_size", 4, "--resolution", SIDE]
    folder = run_example("fine_tune.py", photos, "runs/tuned", *flags)
    before = DualCodebookVQModel.from_pretrained(default_checkpoint())
    after = DualCodebookVQModel.from_pretrained(folder / "runs" / "tuned" / "final")
    pixels = pixels_of(photos / "train")
    assert quality(after, pixels) > quality(before, pixels) + 0.5
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert names[1:] == ["before", "after"]


def test_measuring_writes_the_model_beside_the_codec_at_the_same_bits(photos, run_example):
    size = 256  # of 64-pixel images: enough patches for 512 codes
    folder = run_example("measure.py", photos, "metrics.json", "--split", "test", "--size", size, "--fit", 4)
    model, codec = json.loads((folder / "metrics.json").read_text())["results"]
    assert model["metrics"]["bits_per_pixel"] == codec["metrics"]["bits_per_pixel"] == 18 / 256
    assert codec["model"]["fitted_to"]["split"] == "train"
    for result in (model, codec):
        assert result["protocol"]["pictures"] == 4
        assert 15 < result["metrics"]["psnr"] < 60


def test_the_small_generator_learns_and_its_samples_are_images(photos, run_example):
    images = sorted((photos / "train").rglob("*.png"))
    flags = ["--images", *images, "--size", SIDE, "--steps", 40]
    folder = run_example("train_a_small_generator.py", "samples.png", *flags)
    losses = json.loads((folder / "samples.json").read_text())
    assert losses[0] > 17  # it knows nothing: 18 bits per position
    assert np.mean(losses[-5:]) < 6  # ten images of 16 positions can be learnt by heart
    samples = np.asarray(Image.open(folder / "samples.png")).reshape(SIDE, 8, SIDE, 3).swapaxes(0, 1)
    assert len({sample.tobytes() for sample in samples}) > 1
    assert all(sample.std() > 5 for sample in samples)


def test_the_pipeline_is_saved_whole_and_its_latents_have_the_unit_spread_that_diffusion_wants(photos, run_example):
    images = sorted((photos / "train").rglob("*.png"))
    flags = ["--images", *images, "--size", SIDE, "--steps", 2, "--width", 32]
    folder = run_example("under_a_pipeline.py", "my-ldm", *flags)
    pipeline = LDMPipeline.from_pretrained(folder / "my-ldm")
    assert type(pipeline.vqvae) is DualCodebookVQModel
    with torch.no_grad():
        latents = pipeline.vqvae.encode(pixels_of(photos / "train")).latents
    assert latents.std().item() * pipeline.vqvae.config.scaling_factor == pytest.approx(1, abs=0.01)
    again = pipeline(num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images[0]
    difference = np.asarray(again, float) - np.asarray(Image.open(folder / "my-ldm.png"), float)
    assert again.size == (SIDE, SIDE)
    assert np.abs(difference).mean() < 1


def test_every_script_is_tested_here_listed_and_short():
    here, listed = Path(__file__).read_text(), (ROOT / "examples" / "README.md").read_text()
    site = (ROOT / "docs" / "examples.md").read_text()
    assert SCRIPTS
    for path in SCRIPTS:
        assert f'run_example("{path.name}"' in here, path.name
        assert f"({path.name})" in listed, path.name
        assert f'"examples/{path.name}"' in site, path.name
        assert len(path.read_text().splitlines()) <= 80, path.name


def test_the_notebook_runs_and_shows_what_it_promises(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(dualcodebook_hf.__file__).parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert len(pictures) == 7
    assert "(2, 2, 16, 16)" in printed and "576 bytes, 0.0703 bits per pixel" in printed


def test_the_notebook_holds_no_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
