"""The generator inside the package: small, of the embedded tokenizer, with its card and without traces of a machine."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from dualcodebook_hf import DualCodebookVQModel, default_checkpoint, default_generator
from dualcodebook_hf.generation.loading import load_generator
from dualcodebook_hf.generation.masking import cross_entropies, mask_tokens, scored_masks
from dualcodebook_hf.hub.card import generator_card
from dualcodebook_hf.image_processing_dualcodebook import to_pixels
from dualcodebook_hf.weights import encoder_hash

FOLDER = Path(default_generator())


@pytest.fixture(scope="module")
def pipe():
    pipeline = load_generator()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_small_and_names_no_machine():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25_000_000
    for path in files:
        if path.suffix in (".json", ".md"):
            text = path.read_text()
            assert not any(place in text for place in ("/home/", "/root/", "/work/", "/tmp/")), path


def test_its_tokenizer_is_the_embedded_one(pipe):
    assert encoder_hash(pipe.vqvae) == encoder_hash(DualCodebookVQModel.from_pretrained(default_checkpoint("faithful")))
    assert pipe.transformer.config.tokenizer_weights_sha256 == encoder_hash(pipe.vqvae)
    name = "diffusion_pytorch_model.safetensors"  # a copy, so that the folder is a whole pipeline
    assert (FOLDER / "vqvae" / name).read_bytes() == (Path(default_checkpoint("faithful")) / name).read_bytes()


def test_it_draws_each_of_its_classes_in_its_own_way(pipe):
    """The same random numbers give other tokens for another class, and equal ones for the same."""
    assert len(pipe.labels) == 10

    def tokens(label):
        generator = torch.Generator().manual_seed(0)
        return pipe(class_labels=label, num_inference_steps=2, generator=generator, output_type="tokens").images

    first, again, other = (tokens(label) for label in ("shirt", "shirt", "shoes"))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_it_has_learned_which_tokens_stand_beside_each_other(pipe):
    """Of a photograph that it has not seen, it needs fewer bits than the tokens take."""
    rows, columns = pipe.transformer.config.sample_size
    image = Image.fromarray(data.chelsea()).resize((columns * 16, rows * 16))
    grid = pipe.vqvae.tokenize(to_pixels(image)[None])
    [mask] = scored_masks(tuple(grid.shape[1:]), "tokens", 0.5, np.random.default_rng(0))
    hidden, weight = (torch.from_numpy(part)[None] for part in mask)
    with torch.no_grad():
        logits = pipe.transformer(torch.where(hidden, mask_tokens(pipe.transformer.mask_token_ids), grid)).logits
    assert float((cross_entropies(logits, grid) * weight).sum() / np.log(2)) < 18


def test_its_card_is_that_of_its_records(pipe):
    train = json.loads((FOLDER / "train_config.json").read_text())
    record = FOLDER / "metrics.json"
    measured = json.loads(record.read_text()) if record.is_file() else None
    assert (FOLDER / "README.md").read_text() == generator_card(pipe, train=train, measured=measured)
