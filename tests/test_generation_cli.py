"""`dualcodebook generate` writes what the pipeline draws, and refuses bad input before it loads anything."""

import argparse
import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from test_generation_pipeline import build, photograph, seeded, white

from dualcodebook_hf.cli import main
from dualcodebook_hf.cli.sampling import OPTIONS, add_sampling
from dualcodebook_hf.generation.pipeline import DualCodebookMaskGenerationPipeline
from dualcodebook_hf.generation.schedulers import MaskedTokenScheduler
from dualcodebook_hf.tokens.file import load_tokens

FAST = ["--steps", "2", "--count", "3"]


@pytest.fixture(scope="module")
def pipe():
    return build()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    place = tmp_path_factory.mktemp("generator")
    pipe.save_pretrained(place)
    return str(place)


def expected(pipe, **options):
    return [np.asarray(image) for image in pipe(**{"num_inference_steps": 2, **options}).images]


def test_a_folder_of_images_has_what_the_pipeline_draws_by_each_seed_and_the_token_file_decodes_to_it(
    pipe, folder, tmp_path
):
    tokens = tmp_path / "tokens.safetensors"
    command = ["generate", "--model", folder, *FAST, "--class", "hat", "1", "--seed", "5", "--batch-size", "2"]
    assert main([*command, "--output", str(tmp_path / "out"), "--tokens-output", str(tokens)]) == 0
    names = [f"{label}-{seed}.png" for label in ("hat", "1") for seed in (5, 6, 7)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    shown = [np.asarray(Image.open(tmp_path / "out" / name)) for name in names]
    call = {"class_labels": ["hat", 1], "num_images": 3, "generator": [seeded(s) for _ in range(2) for s in (5, 6, 7)]}
    for image, drawn in zip(shown, expected(pipe, **call), strict=True):
        assert np.abs(image.astype(int) - drawn).max() <= 1  # another batch rounds otherwise
    content = load_tokens(tokens)
    content.check_model(pipe.vqvae, tokens)
    assert [image.name for image in content.images] == names
    decoded = pipe.vqvae.detokenize(torch.stack([image.tokens for image in content.images]))
    assert np.abs((decoded.clamp(-1, 1) + 1).permute(0, 2, 3, 1).numpy() * 127.5 - np.stack(shown)).max() <= 1


def test_a_sheet_shows_a_row_of_each_class(pipe, folder, tmp_path, capsys):
    path = tmp_path / "sheet.png"
    assert main(["generate", "--model", folder, *FAST, "--class", "dog", "cat", "--output", str(path)]) == 0
    assert "6 images written" in capsys.readouterr().out
    sheet = np.asarray(Image.open(path))
    generators = [seeded(s) for _ in range(2) for s in range(3)]
    for drawn in expected(pipe, class_labels=["dog", "cat"], num_images=3, generator=generators):
        windows = np.lib.stride_tricks.sliding_window_view(sheet, drawn.shape)[:, :, 0]
        assert (np.abs(windows.astype(int) - drawn).max((2, 3, 4)) <= 1).sum() == 1


def test_flags_that_are_left_out_are_the_pipelines_own_defaults():
    parser = argparse.ArgumentParser()
    add_sampling(parser.add_argument_group(), "--steps")
    call = inspect.signature(DualCodebookMaskGenerationPipeline.__call__).parameters
    assert vars(parser.parse_args([])) == {name: call[name].default for name in OPTIONS}


def test_a_part_of_an_image_is_repainted_and_the_order_may_be_another(pipe, folder, tmp_path):
    photograph().save(tmp_path / "a.png")
    white((0, 0, 6, 10)).save(tmp_path / "mask.png")
    command = ["generate", "--model", folder, *FAST, "--order", "halton", "--units", "positions", "--class", "hat"]
    command += ["--sampling-temperature", "0.5"]
    command += ["--image", str(tmp_path / "a.png"), "--mask", str(tmp_path / "mask.png"), "--output", str(tmp_path)]
    assert main(command) == 0
    original = pipe.scheduler
    try:
        pipe.scheduler = MaskedTokenScheduler.from_config(original.config, order="halton", units="positions")
        call = {"image": photograph(), "mask_image": white((0, 0, 6, 10)), "class_labels": "hat", "num_images": 3}
        drawn = expected(pipe, **call, sampling_temperature=0.5, generator=[seeded(s) for s in range(3)])
    finally:
        pipe.scheduler = original
    for seed, image in enumerate(drawn):
        shown = np.asarray(Image.open(tmp_path / f"a-hat-{seed}.png"))
        assert np.array_equal(shown[:, 6:], np.asarray(photograph())[:, 6:])
        assert np.abs(shown.astype(int) - image).max() <= 1


def test_a_large_image_is_shrunk_to_the_area_that_was_trained_on(folder, tmp_path):
    photograph(140, 50).save(tmp_path / "a.png")
    command = ["generate", "--model", folder, "--count", "1", "--steps", "1", "--image", str(tmp_path / "a.png")]
    assert main([*command, "--output", str(tmp_path)]) == 0
    width, height = Image.open(tmp_path / "a-0.png").size
    assert width * height <= 12 * 16 and abs(width / height - 2.8) < 0.3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "`--model` must be a folder or a Hub id"),
        (["--model", "."], "`--model`: there is no model_index.json in the folder"),
        (["--output", "a.jpg"], "`--output` must be a file named *.png"),
        (["--mask", "a.png"], "`--mask` must come with an `--image`"),
        (["--strength", "1"], "`--strength` must come with an `--image`"),
        (["--image", "missing.png"], "cannot read image 'missing.png'"),
        (["--steps", "0"], "`--steps` must be a whole number of at least 1"),
        (["--order", "raster"], "`--order` must be one of confidence, halton"),
        (["--tokens-output", "a.txt"], "`--tokens-output` must be a file named *.safetensors"),
        (["--class", "hut"], "`--class` must be among the names cat, dog, hat, kitten; got 'hut'; did you mean hat?"),
        (["--class", "9"], "`--class` must be names, or ids in [0, 3), got 9"),
        (["--class", "hat", "--guidance-scale", "-1"], "`--guidance-scale` must be at least 0"),
        (["--guidance-scale", "2"], "`--guidance-scale` guides towards a class: give --class"),
        (["--sampling-temperature", "0"], "`--sampling-temperature` must be above 0"),
        (["--height", "8"], "`--height` and `--width` must be given together"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(
    folder, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *([] if "--model" in flags else ["--model", folder]), *flags]) == 2
    out, err = capsys.readouterr()
    assert message in err.splitlines()[-1] and not out
    assert list(tmp_path.iterdir()) == []


def test_without_a_generator_in_the_package_one_must_be_named(monkeypatch, tmp_path, capsys):
    from dualcodebook_hf import loading

    monkeypatch.setattr(loading, "__file__", str(tmp_path / "loading.py"))
    assert main(["generate"]) == 2
    assert "there is no generator inside the package" in capsys.readouterr().err
    with pytest.raises(ValueError, match="name another by `model`"):
        loading.default_generator()
