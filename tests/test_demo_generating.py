"""The page's generator: what its steps show, what repainting leaves alone, and what is refused."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, spread_codes
from PIL import Image

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.generation.pipeline import DualCodebookMaskGenerationPipeline
from dualcodebook_hf.generation.schedulers import MaskedTokenScheduler
from dualcodebook_hf.generation.transformer import DualCodebookTransformer
from dualcodebook_hf.reconstruction import reconstruct_image
from dualcodebook_hf.weights import encoder_hash

pytest.importorskip("gradio")

from dualcodebook_hf.demo.generating import HIDDEN, GeneratingHandlers, ServedGenerator

SIZES, CLASSES = (32, 16), {0: "coat", 1: "hat"}


@pytest.fixture(scope="module")
def generator() -> ServedGenerator:
    torch.manual_seed(0)
    tokenizer = spread_codes(DualCodebookVQModel(**{**TINY, "global_transformer_layers": 0})).eval()
    size = {"sample_size": (4, 4), "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    transformer = DualCodebookTransformer(
        SIZES, num_classes=2, tokenizer_weights_sha256=encoder_hash(tokenizer), **size
    ).eval()
    with torch.no_grad():
        for matrix in (transformer.class_embedding.weight, *(head.weight for head in transformer.heads)):
            matrix.mul_(100)  # untrained, the classes would hardly differ
        for block in transformer.blocks:
            block.attention.out.weight.mul_(100)
    return ServedGenerator(
        DualCodebookMaskGenerationPipeline(tokenizer, transformer, MaskedTokenScheduler(codebook_sizes=SIZES), CLASSES)
    )


@pytest.fixture
def handlers(generator) -> GeneratingHandlers:
    return GeneratingHandlers(generator, {"tiny": generator.tokenizer_hash})


@pytest.fixture
def shown(generator, tmp_path):
    """What a visitor is looking at, 8 x 6 pixels: a grid of 3 x 4."""
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    result = reconstruct_image(generator.pipeline.vqvae, Image.fromarray(values))
    result.image.save(tmp_path / "a.png")
    upload = SimpleNamespace(name="a.png")
    return SimpleNamespace(
        label="tiny", upload=upload, result=result, files={"reconstruction": str(tmp_path / "a.png")}, middle=(1, 2)
    )


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_steps_end_with_what_the_pipeline_gives(generator):
    settings = {"class_labels": "hat", "num_inference_steps": 5, "guidance_scale": 1.5, "num_images": 2}
    frames = list(generator.frames(generator=seeded(), **settings))
    whole = generator.pipeline(generator=seeded(), output_type="tokens", **settings).images
    assert torch.equal(frames[-1].tokens, whole) and torch.equal(frames[-1].predicted, whole)
    masks = torch.tensor(SIZES)[:, None, None]
    hidden = [int((frame.tokens == masks).sum()) for frame in frames]
    assert [frame.step for frame in frames] == [1, 2, 3, 4, 5]
    assert hidden == sorted(hidden, reverse=True) and hidden[0] > hidden[-1] == 0
    decoded = generator.pipeline(generator=seeded(), **settings).images
    assert [image.tobytes() for image in generator.pictures(frames[-1])] == [image.tobytes() for image in decoded]


def test_pictures_are_grey_where_tokens_are_hidden(generator):
    frame = next(generator.frames(num_inference_steps=4, generator=seeded()))
    share = (frame.tokens == torch.tensor(SIZES)[:, None, None])[0].float().mean(0)
    shown = np.asarray(generator.pictures(frame)[0], float)
    whole = np.asarray(generator.pictures(replace(frame, tokens=frame.predicted))[0], float)
    share = 0.8 * share.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy()[..., None]
    assert np.abs(shown - (whole * (1 - share) + HIDDEN * share)).max() < 1.5
    assert share.min() < share.max()


def test_a_map_is_grey_where_tokens_are_hidden(generator):
    colours = np.asarray(generator.map(torch.tensor([[0, 32], [31, 32]])))
    assert colours.shape == (4, 4, 3)
    assert (colours[:, 2:] == HIDDEN).all() and (colours[:2, :2] == generator.colours[0]).all()


def test_who_stops_looking_stops_the_run(generator):
    frames = generator.frames(num_inference_steps=1000, generator=seeded())
    next(frames)
    frames.close()
    assert "generator" not in [thread.name for thread in threading.enumerate()]


def test_an_error_of_the_pipeline_is_raised_where_the_frames_are_read(generator):
    with pytest.raises(ValueError, match="`class_labels` must be names"):
        list(generator.frames(class_labels=[7]))


def test_drawn_pictures_depend_on_class_and_seed_alone(handlers):
    def last(*settings):
        *_, answer = handlers.generate(*settings)
        return answer

    first = last("coat", 2.0, 3, 5)
    assert first[0].size == (16, 16) and first[1].size == (16, 16) and "coat, seed 5: step 3 of 3" in first[2]
    assert first[0].tobytes() == last("coat", 2.0, 3, 5)[0].tobytes()
    assert first[0].tobytes() != last("coat", 2.0, 3, 6)[0].tobytes()
    assert first[0].tobytes() != last("hat", 2.0, 3, 5)[0].tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("shoe", 2.0, 3, 5), "`class` must be one of any, coat, hat, got &#x27;shoe&#x27;"),
        (("coat", 9.0, 3, 5), "`guidance` must lie in [0, 8], got 9.0"),
        (("coat", 2.0, 0, 5), "`steps` must lie in [1, 64], got 0"),
        (("coat", 2.0, 2.5, 5), "`steps` must be a whole number, got 2.5"),
        (("coat", 2.0, 3, -1), "`seed` must lie in [0, 4.29497e+09], got -1"),
        (("coat", True, 3, 5), "`guidance` must lie in [0, 8], got True"),
    ],
)
def test_what_the_controls_do_not_send_is_refused(handlers, settings, message):
    [[picture, maps, line]] = handlers.generate(*settings)
    assert picture is None and maps is None and message in line


def test_repainting_changes_painted_positions_alone(handlers, generator, shown, monkeypatch):
    seen, decode = [], generator.pictures
    monkeypatch.setattr(generator, "pictures", lambda frame, size: seen.append(frame) or decode(frame, size))
    *steps, last = handlers.repaint(shown, "1+2 5+2", "hat", 1.0, 4, 0)
    painted = torch.zeros(3, 4, dtype=torch.bool)
    painted.view(-1)[[1, 2, 5, 6]] = True
    before, after = shown.result.tokens, seen[-1].tokens[0]
    assert torch.equal(after[:, ~painted], before[:, ~painted]) and not torch.equal(after, before)
    assert len(steps) == 4 and all(step[0]["value"].size == (8, 6) for step in steps)
    assert last[0]["visible"] is False and "Repainted" in last[1] and "4 positions: step 4 of 4" in last[2]


def test_what_cannot_be_repainted_is_told(handlers, generator, shown, monkeypatch):
    def line(shown, region="0+2"):
        *_, (_, slider, text) = handlers.repaint(shown, region, "any", 1.0, 2, 0)
        assert slider == ""
        return text

    assert "Paint over a part of the picture first." in line(shown, "")
    assert "`region` must be runs of squares" in line(shown, "0+99")
    monkeypatch.setattr("dualcodebook_hf.demo.generating.LARGEST_GRID", 11)
    assert "this one has 3 x 4" in line(shown)
    assert "this one has 3 x 4" in handlers.open_repaint(shown)[0]["value"]


def test_beside_another_model_a_picture_is_repainted_in_the_generators_own_tokens(
    handlers, generator, shown, monkeypatch
):
    expected = shown.result.tokens
    shown.label, shown.result = "another", replace(shown.result, tokens=torch.zeros(3, 1, 2, dtype=torch.int64))
    page = handlers.open_repaint(shown)
    assert "the generator&#x27;s own tokens" in page[2]["picture"] and 'data-rows="3"' in page[2]["picture"]
    seen, decode = [], generator.pictures
    monkeypatch.setattr(generator, "pictures", lambda frame, size: seen.append(frame) or decode(frame, size))
    *_, last = handlers.repaint(shown, "0+2", "hat", 1.0, 2, 0)
    assert torch.equal(seen[-1].tokens[0].flatten(1)[:, 2:], expected.flatten(1)[:, 2:])
    assert "Repainted" in last[1] and "2 positions: step 2 of 2" in last[2]


def test_a_picture_opens_its_grid_for_painting(handlers, shown):
    hint, page, grid = handlers.open_repaint(shown)
    assert (hint["visible"], page["visible"]) == (False, True)
    assert 'data-rows="3" data-columns="4"' in grid["picture"] and grid["value"]
    hint, page, grid = handlers.open_repaint(None)
    assert (hint["visible"], page["visible"]) == (True, False) and "Choose a picture first." in hint["value"]
