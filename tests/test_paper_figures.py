"""The figures of the paper and rate-quality: right pixels in right places, codecs held to their bytes, one command."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from charts import PAPER, Series, bars, curves
from paper_figures import (
    MARK,
    Tile,
    code_patches,
    codebook_figure,
    difference_window,
    models_figure,
    tiles_figure,
)
from PIL import Image

from dualcodebook_hf.evaluation.codecs import CODECS, Codec, available_codecs, coded_at, coded_within

datasets = pytest.importorskip("datasets")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
figures = importlib.import_module("figures")


def photograph(size: int = 64) -> Image.Image:
    data = pytest.importorskip("skimage.data")
    return Image.fromarray(data.astronaut()[:256, 100:356]).resize((size, size), Image.Resampling.LANCZOS)


def test_a_patch_is_the_middle_of_a_field_of_its_code_with_the_other_codebook_at_its_mean(tiny_model) -> None:
    patches = code_patches(tiny_model, "local")
    assert patches.shape == (16, 3, 2, 2)
    tokens = torch.zeros(1, 2, 3, 3, dtype=torch.long)
    tokens[:, 1] = 11
    expected = tiny_model.detokenize(tokens, only="local")[0, :, 2:4, 2:4]
    torch.testing.assert_close(patches[11], expected, atol=1e-5, rtol=1e-4)
    assert code_patches(tiny_model, "global").shape == (32, 3, 2, 2)
    with pytest.raises(ValueError, match="`book` must be one of global, local, got 'both'"):
        code_patches(tiny_model, "both")


def test_codes_stand_in_order_of_use_and_unused_ones_are_crossed_out() -> None:
    """Four codes of one grey each; the second is used most, the last never."""
    greys = torch.tensor([-1.0, -0.2, 0.3, 0.9]).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    figure = np.asarray(codebook_figure({"local": (greys, torch.tensor([1, 6, 3, 0]))}, "title"))
    expected = [round((grey + 1) * 127.5) for grey in (-0.2, 0.3, -1.0, 0.9)]
    row = figure[16 + 34 + 48 + 3]
    starts = [16 + 22 * place for place in range(4)]
    assert [int(row[start + 15, 0]) for start in starts] == pytest.approx(expected, abs=1)
    crossed = [bool((figure[98:118, start : start + 20] == MARK).all(-1).any()) for start in starts]
    assert crossed == [False, False, False, True]


def test_bars_are_as_high_as_their_counts() -> None:
    image = np.asarray(bars(np.array([4, 2, 0, 1]), (40, 80), (0, 0, 0)).convert("L"), dtype=int)
    heights = [(255 - image[:, 10 * place + 5]).sum() / 255 for place in range(4)]
    assert heights == pytest.approx([80, 40, 0, 20], abs=1)


def test_curves_put_points_where_the_axes_say_and_leave_out_what_lies_beyond() -> None:
    """x is logarithmic: 0.1 is in the middle of 0.01 and 1."""
    red, blue = (255, 0, 0), (0, 0, 255)
    series = [Series("inside", [(0.1, 5)], red), Series("beyond", [(2.0, 5), (3.0, 6)], blue)]
    chart = np.asarray(curves(series, (400, 300), "t", "x", [0.01, 0.1, 1], [0, 5, 10]))
    hits = np.argwhere((chart == red).all(-1))
    hits = hits[hits[:, 0] < 200]  # the legend lies below
    left, top, right, bottom = 46, 34, 400 - 14, 300 - 46
    assert hits.mean(0) == pytest.approx([(top + bottom) / 2, (left + right) / 2], abs=1.5)
    assert not (chart[:200] == blue).all(-1).any()
    with pytest.raises(ValueError, match="`x_ticks` and `y_ticks`"):
        curves(series, (400, 300), "t", "x", [0, 1], [0, 1])


def test_the_window_is_where_the_models_differ_not_where_both_are_wrong() -> None:
    original = torch.zeros(3, 40, 50)
    both, one = original.clone(), original.clone()
    both[:, :10, :10] += 0.9
    one[:, :10, :10] += 0.9
    one[:, 30:36, 20:26] += 0.5
    left, top, right, bottom = difference_window(original, [both, one], side=8)
    assert (right - left, bottom - top) == (8, 8)
    assert left <= 20 and top <= 30 and right >= 26 and bottom >= 36
    left, top, _, _ = difference_window(original, [both], side=8)  # alone: its largest error
    assert left <= 2 and top <= 2


def test_the_enlarged_region_is_that_of_the_box() -> None:
    image = photograph(64)
    tiles = [Tile(image, box=(8, 16, 40, 48))] * 2
    figure = np.asarray(models_figure([tiles], ["original", "model"], "title"))
    enlarged = np.asarray(image.crop((8, 16, 40, 48)).resize((64, 64), Image.Resampling.LANCZOS))[2:-2, 2:-2]
    places = [
        (top, left)
        for top in range(figure.shape[0] - 60)
        for left in range(figure.shape[1] - 60)
        if (figure[top, left] == enlarged[0, 0]).all() and (figure[top : top + 60, left : left + 60] == enlarged).all()
    ]
    assert len(places) == 2
    with pytest.raises(ValueError, match="`rows` must hold 2 tiles each, all with a box"):
        models_figure([[Tile(image)] * 2], ["original", "model"], "title")


def test_marked_captions_are_in_colour() -> None:
    black = Image.new("RGB", (60, 20))
    plain, marked = (np.asarray(tiles_figure([[Tile(black, "text", marked=mark)]])) for mark in (False, True))
    assert not (plain == MARK).all(-1).any() and (marked == MARK).all(-1).any()
    assert (plain[:20, :60] == 0).all() and tuple(plain[-1, -1]) == PAPER


@pytest.mark.parametrize("name", sorted(CODECS))
def test_a_codec_takes_the_highest_quality_within_the_bytes_or_its_smallest_file_marked(name: str) -> None:
    if name not in available_codecs():
        pytest.skip(f"this Pillow has no {name}")
    codec, image = CODECS[name], photograph(64)
    coded = coded_within(codec, image, 900)
    assert not coded.smallest and coded.count <= 900 and coded.image.size == image.size
    assert coded.count == len(codec.encode(image, coded.quality)) == coded_at(codec, image, coded.quality).count
    assert coded.quality == codec.highest or len(codec.encode(image, coded.quality + 1)) > 900
    smallest = coded_within(codec, image, 10)
    assert smallest.smallest and smallest.quality == codec.lowest
    assert smallest.count == len(codec.encode(image, codec.lowest)) > 10


def test_half_size_is_coded_as_a_image_of_half_the_sides() -> None:
    image = photograph(64)
    half = Codec("JPEG", "jpg", 1, 95, shrink=2)
    data = half.encode(image, 50)
    assert data == Codec("JPEG", "jpg", 1, 95).encode(image.resize((32, 32), Image.Resampling.LANCZOS), 50)
    assert half.decode(data, image.size).size == (64, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 2), ("test", 3)):
        (root / split).mkdir()
        for index in range(count):
            photograph(96).rotate(90 * index).save(root / split / f"{index}.png")
    return root


@pytest.fixture
def command(tiny_model, folder, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_model.save_pretrained(tmp_path / "model")
    return ["--model", str(tmp_path / "model"), "--dataset", str(folder), "--size", "32", "--rows", "2"]


@pytest.mark.parametrize("figure", ["codebook", "compare", "extremes"])
def test_each_figure_of_the_paper_is_one_command(figure: str, command, tmp_path) -> None:
    output = tmp_path / "out" / f"{figure}.png"
    # 72 patches of 16 x 16: enough to fit the linear codec.
    more = ["--model", "patch-linear", "--size", "96"] if figure == "compare" else []
    assert figures.main([figure, *command, *more, "--output", str(output)]) == 0
    pixels = np.asarray(Image.open(output))
    assert (pixels != 255).any(-1).mean() > 0.02
    assert figures.main([figure, *command, *more, "--output", str(tmp_path / "again.png")]) == 0
    assert np.array_equal(pixels, np.asarray(Image.open(tmp_path / "again.png")))


def test_rate_and_quality_are_measured_as_by_evaluate_and_at_equal_bytes(command, tiny_model, folder, tmp_path) -> None:
    from dualcodebook_hf.evaluation.data import EvaluationData
    from dualcodebook_hf.evaluation.evaluator import evaluate

    output, numbers = tmp_path / "rate.jpg", tmp_path / "rate.json"
    assert figures.main(["rate", *command, "--output", str(output), "--json", str(numbers)]) == 0
    assert Image.open(output).format == "JPEG" and output.stat().st_size <= figures.LARGEST_JPEG
    record = json.loads(numbers.read_text())
    assert str(folder.parent) not in numbers.read_text()
    (name,) = set(record["points"]) - set(CODECS)
    (point,) = record["points"][name]
    expected = evaluate(tiny_model, EvaluationData(dataset=str(folder), size=32).open())["metrics"]
    assert point["psnr"] == pytest.approx(expected["psnr"], rel=1e-4)
    assert (point["bits_per_pixel"], record["pictures"]) == (expected["bits_per_pixel"], 3)
    equal = record["equal_bytes"]
    assert equal["bytes"] == 32 * 32 * 2.25 / 8
    for codec, found in equal["codecs"].items():
        assert found["bytes"] <= equal["bytes"] or found["within_bytes"] < 1
        rates = [at["bits_per_pixel"] for at in record["points"][codec]]
        assert rates == sorted(rates)


def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path, capsys) -> None:
    output = tmp_path / "figure.gif"
    assert figures.main(["codebook", *command, "--output", str(output)]) == 2
    assert "`--output` must be a file named *.png or *.jpg" in capsys.readouterr().err
    assert figures.main(["extremes", *command, "--split", "tset", "--output", str(tmp_path / "a.png")]) == 2
    assert "`split` must be one of" in capsys.readouterr().err
    assert figures.main(["extremes", "--model", "patch-linear", *command[2:], "--output", str(tmp_path / "a.png")]) == 2
    assert "must be one neural model" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
