"""The protocol: what is measured, on what, and how it is written down."""

import importlib.util
import json
import math
import shutil

import numpy as np
import pytest
import torch
from packaging.version import Version
from PIL import Image

from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.evaluator import Evaluator, _weights, evaluate
from dualcodebook_hf.evaluation.linear_codec import PatchLinearCodec, fit_linear_codec
from dualcodebook_hf.evaluation.table import results_table
from dualcodebook_hf.image_processing_dualcodebook import (
    BadImageError,
    center_crop,
    resize_shorter_side,
    to_pixels,
)
from dualcodebook_hf.metrics import DEFAULT_METRICS, image_metrics, load_metric_network
from dualcodebook_hf.metrics import frechet as frechet_module
from dualcodebook_hf.metrics.frechet import FrechetDistance
from dualcodebook_hf.metrics.images import psnr, ssim
from dualcodebook_hf.metrics.tokens import QuantizationError, TokenStatistics
from dualcodebook_hf.metrics.wasserstein import SlicedWasserstein
from dualcodebook_hf.perceptual.vgg import LPIPS
from dualcodebook_hf.weights import weights_hash

datasets = pytest.importorskip("datasets")

SIZE = 32


def drawn(index):
    """An image of 40 x 56 pixels: a gradient and a disc, different for each index."""
    y, x = np.mgrid[:40, :56]
    disc = (y - 12 - index) ** 2 + (x - 20 - 3 * index) ** 2 < 80
    planes = [(4 * x + 11 * index) % 256, np.where(disc, 200, 3 * y), np.where(disc, 30 * index, 90 + x)]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def test_weights_are_named_where_they_are_those_of_the_file(tiny_model):
    """Not after they were rounded; torch.compile's wrapper changes no value."""
    own = weights_hash(tiny_model)
    assert _weights(tiny_model) == _weights(torch.compile(tiny_model)) == {"weights_sha256": own}
    tiny_model.cast_backbone(torch.bfloat16)
    assert _weights(tiny_model) == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An image folder with 6 images in train and 5 in test."""
    root = tmp_path_factory.mktemp("drawn images")
    for split, count in (("train", 6), ("test", 5)):
        (root / split).mkdir()
        for index in range(count):
            drawn(index).save(root / split / f"{index}.png")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def opened(dataset, **options):
    return EvaluationData(dataset=str(dataset), **{"size": SIZE, **options}).open()


def crops(resample="lanczos"):
    return torch.stack([to_pixels(center_crop(resize_shorter_side(drawn(i), SIZE, resample), SIZE)) for i in range(5)])


def test_the_numbers_are_those_of_the_metrics_on_resized_and_cropped_images(tiny_model, folder):
    """In batches of 2, the last of 1: the mean is over images, statistics are over the whole split."""
    metrics = evaluate(tiny_model, opened(folder), batch_size=2)["metrics"]
    x = crops()
    with torch.no_grad():
        out = tiny_model(x)
    pair = (out.sample + 1) / 2, (x + 1) / 2
    assert metrics["psnr"] == pytest.approx(psnr(*pair).mean().item(), rel=1e-4)
    assert metrics["ssim"] == pytest.approx(ssim(*pair).mean().item(), abs=1e-4)
    statistics = TokenStatistics({"global": 32, "local": 16})
    statistics.update(out.tokens)
    assert metrics["pair_entropy"] == pytest.approx(statistics.pair_entropy)
    error = QuantizationError({"global": 8, "local": 4})
    error.update(out.latents, out.quantized)
    expected = error.compute()
    assert metrics["quantization_error"] == pytest.approx(expected["all"], rel=1e-4)
    for name, codebook in statistics.codebooks().items():
        measured = metrics["codebooks"][name]
        assert measured["quantization_error"] == pytest.approx(expected[name], rel=1e-4)
        assert {key: measured[key] for key in codebook} == pytest.approx(codebook)


def test_bits_a_pixel_are_over_the_crop(tiny_model, folder):
    """f = 2 and codebooks of 32 and 16 codes: 9 bits on each 2 x 2 pixels, also where the crop is padded to tokens."""
    metrics = evaluate(tiny_model, opened(folder, limit=1))["metrics"]
    assert (metrics["bits_per_position"], metrics["bits_per_pixel"]) == (9.0, 2.25)
    metrics = evaluate(tiny_model, opened(folder, size=15, limit=1))["metrics"]
    assert metrics["bits_per_pixel"] == pytest.approx(9 * 64 / 225)


def test_the_result_is_json_and_holds_its_protocol_but_no_folder_of_this_machine(tiny_model, folder):
    result = evaluate(tiny_model, opened(folder, resample="bilinear", limit=3), name="tiny")
    text = json.dumps(result, allow_nan=False)
    assert str(folder.parent) not in text
    protocol = result["protocol"]
    assert (protocol["dataset"], protocol["split"], protocol["pictures"]) == (folder.name, "test", 3)
    assert (protocol["size"], protocol["resample"], protocol["limit"]) == (SIZE, "bilinear", 3)
    # A CUDA build's metadata leave out the "+cu130" that torch itself adds.
    assert Version(protocol["versions"]["torch"]).public == Version(torch.__version__).public
    assert protocol["hardware"]["device"] == "cpu"
    assert {"psnr", "ssim", "ms_ssim", "l1", "quantization_error", "crop"} <= set(protocol["definitions"])
    assert result["model"]["name"] == "tiny"
    assert result["model"]["codebook_sizes"] == {"global": 32, "local": 16}


def test_the_saved_images_give_the_numbers_again(tiny_model, folder, tmp_path):
    target = tmp_path / "pictures"
    metrics = evaluate(tiny_model, opened(folder), batch_size=2, save_images=target)["metrics"]
    pairs = []
    for name in ("original", "reconstruction"):
        paths = sorted((target / name).iterdir())
        assert [path.name for path in paths] == [f"{index:05}.png" for index in range(5)]
        pairs.append(np.stack([np.asarray(Image.open(path)) for path in paths]))
    assert np.array_equal(pairs[0], ((crops() + 1) / 2 * 255).round().numpy().transpose(0, 2, 3, 1))
    by_hand = -10 * np.log10((((pairs[0] - 1.0 * pairs[1]) / 255) ** 2).mean((1, 2, 3))).mean()
    assert metrics["psnr"] == pytest.approx(by_hand, abs=0.01)  # of 8 bits
    with pytest.raises(ValueError, match="`save_images` must be a new or empty folder, got"):
        evaluate(tiny_model, opened(folder), save_images=target)


def test_the_filter_matters_and_streaming_and_batches_do_not(tiny_model, folder):
    metrics = evaluate(tiny_model, opened(folder))["metrics"]
    for same, batch_size in (({"streaming": True}, 8), ({}, 1), ({"limit": 99}, 8)):
        other = evaluate(tiny_model, opened(folder, **same), batch_size=batch_size)["metrics"]
        assert other["psnr"] == pytest.approx(metrics["psnr"], rel=1e-5)
        assert other["pair_entropy"] == metrics["pair_entropy"]
    assert evaluate(tiny_model, opened(folder, resample="bicubic"))["metrics"]["l1"] != metrics["l1"]


def test_the_model_keeps_its_mode_and_its_gradients_untouched(tiny_model, folder):
    tiny_model.train()
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    evaluate(tiny_model, opened(folder, limit=2))
    assert tiny_model.training
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_half_precision_model_is_measured_against_float32_images(tiny_model, folder):
    result = evaluate(tiny_model.to(torch.bfloat16), opened(folder, limit=2))
    assert result["model"]["dtype"] == "bfloat16"
    assert math.isfinite(result["metrics"]["psnr"])


def test_the_baseline_is_measured_by_the_same_code_and_stands_in_the_same_table(tiny_model, folder):
    options = {"size": SIZE, "limit": 4}
    train_images, images = opened(folder, split="train"), opened(folder, **options)
    codec, fitted = fit_linear_codec(train_images, count=99, sizes=(16, 8), components=12)
    baseline = evaluate(codec, images, name="patch-linear codec", about={"fitted_to": fitted})
    model = evaluate(tiny_model, images)
    assert baseline["protocol"] == model["protocol"]
    assert set(baseline["metrics"]) == set(model["metrics"])
    assert baseline["model"]["fitted_to"]["pictures"] == 6
    assert baseline["metrics"]["bits_per_position"] == 7
    assert baseline["metrics"]["codebooks"]["stage_1"]["quantization_error"] is None
    assert 0 < baseline["metrics"]["quantization_error"] < 1

    lines = results_table([("tiny", model), ("patch-linear", baseline)]).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[2].startswith("| tiny ") and f"{model['metrics']['psnr']:.2f}" in lines[2]
    assert f"{baseline['metrics']['bits_per_pixel']:.4f}" in lines[3]


def test_fitting_the_baseline_on_the_same_split_is_deterministic(folder):
    images = opened(folder, split="train")
    fits = [PatchLinearCodec((8,), 4).fit(images.shuffled(0).first(5)) for _ in range(2)]
    assert torch.equal(fits[0].codes_0, fits[1].codes_0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 0}, "`size`"),
        ({"limit": 0}, "`limit`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"resample": "sharp"}, "`resample`"),
        ({"split": "tset"}, r"`split` must be one of \['train', 'test'\]"),
        ({"image_column": "picture"}, r"`image_column` must be one of \['image', 'label'\]"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(folder, options, message):
    data = {key: value for key, value in options.items() if key != "batch_size"}
    with pytest.raises(ValueError, match=message):
        evaluate(PatchLinearCodec(), opened(folder, **data), batch_size=options.get("batch_size", 8))


def test_another_kind_of_model_and_a_missing_folder_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"`model` must be a tokenizer, got Linear, which has no device, .*autoencode"):
        evaluate(torch.nn.Linear(1, 1), opened(folder))
    with pytest.raises(ValueError, match="`dataset`"):
        opened(tmp_path / "nowhere")


@pytest.fixture
def damaged(tmp_path, folder):
    """The drawn images with two files among them that cannot be read."""
    target = tmp_path / "damaged"
    shutil.copytree(folder, target)
    for name in ("1b.png", "4b.png"):
        (target / "test" / name).write_bytes(b"no image")
        (target / "train" / name).write_bytes(b"no image")
    return target


@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_are_left_out_are_in_the_record_and_not_in_the_numbers(tiny_model, folder, damaged, streaming):
    with pytest.raises(BadImageError, match=r"row 2 of '.*damaged' \(test\), '.*1b.png': not in an image format"):
        evaluate(tiny_model, opened(damaged, streaming=streaming))
    images = opened(damaged, streaming=streaming, on_bad_image="skip")
    whole, result = evaluate(tiny_model, opened(folder)), evaluate(tiny_model, images)
    assert result["metrics"] == whole["metrics"]
    assert result["protocol"]["pictures"] == 5
    assert [(item["row"], item["file"]) for item in result["protocol"]["skipped"]] == [(2, "1b.png"), (6, "4b.png")]
    assert str(damaged.parent) not in json.dumps(result)
    assert evaluate(tiny_model, images)["protocol"] == result["protocol"]
    assert "skipped" not in whole["protocol"]


def test_the_linear_codec_is_fitted_to_the_readable_images_alone(folder, damaged):
    splits = (opened(path, split="train", on_bad_image="skip") for path in (folder, damaged))
    fits = [fit_linear_codec(split, count=6, sizes=(8, 8), components=4) for split in splits]
    assert [fitted["pictures"] for _, fitted in fits] == [6, 6]
    values = [evaluate(codec, opened(folder))["metrics"]["psnr"] for codec, _ in fits]
    assert values[1] == pytest.approx(values[0], abs=0.5)


def test_a_split_without_a_readable_image_and_one_with_too_many_bad_ones_are_errors(tiny_model, tmp_path):
    for good, bad, message in ((0, 3, "not in an image format"), (2, 12, "11 of 13 images cannot be read.*too many")):
        (tmp_path / str(bad) / "test").mkdir(parents=True)
        for index in range(good):
            drawn(index).save(tmp_path / str(bad) / "test" / f"a{index}.png")
        for index in range(bad):
            (tmp_path / str(bad) / "test" / f"b{index:02}.png").write_bytes(b"no image")
        with pytest.raises(BadImageError, match=message):
            evaluate(tiny_model, opened(tmp_path / str(bad), on_bad_image="skip"))


def test_an_unknown_policy_is_refused(folder):
    with pytest.raises(ValueError, match="`on_bad_image` must be one of error, skip, got 'ignore'"):
        opened(folder, on_bad_image="ignore")


def test_a_long_image_of_few_bytes_is_measured_at_its_middle(tmp_path):
    """Enlarged whole it would have 15 million rows."""
    long = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60000, 1, 3), dtype=np.uint8))
    (tmp_path / "test").mkdir()
    for name, image in (("a", long), ("b", center_crop(long, (40, 1)))):
        image.save(tmp_path / "test" / f"{name}.png")
    first, second = opened(tmp_path, size=256)
    assert first.shape == (3, 256, 256)
    assert (first - second).abs().max() <= 2 / 255


def test_an_unreadable_image_is_named_by_its_place(tmp_path, folder):
    broken = tmp_path / "broken"
    broken.mkdir()
    drawn(0).save(broken / "0.png")
    (broken / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"row 1 of '.*' \(train\)"):
        evaluate(PatchLinearCodec(), opened(broken, split="train"))


def colour_moments(images):
    """Features for a Frechet distance without a network: (B, 3, H, W) in [0, 1] -> (B, 6)."""
    return torch.cat([images.mean((2, 3)), images.std((2, 3))], dim=1)


def test_metrics_by_networks_and_of_sets_are_those_of_their_modules(tiny_model, folder):
    """LPIPS per image of clamped values and then the mean; rFID and SWD over the whole split, in batches or not."""
    lpips = LPIPS()
    with pytest.warns(UserWarning, match="5 images with 6 features"):
        metrics = image_metrics([*DEFAULT_METRICS, "lpips", "rfid"], {"lpips": lpips, "rfid": colour_moments})
        result = evaluate(tiny_model, opened(folder), metrics, batch_size=2)
    x = crops()
    with torch.no_grad():
        out = tiny_model(x).sample
        expected = lpips(out.clamp(-1, 1), x)
    pair = (out + 1) / 2, (x + 1) / 2
    assert result["metrics"]["lpips"] == pytest.approx(expected.mean().item(), rel=1e-3)
    frechet, swd = FrechetDistance(colour_moments), SlicedWasserstein()
    for metric in (frechet, swd):
        metric.update(*pair)
    with pytest.warns(UserWarning, match="5 images with 6 features"):
        assert result["metrics"]["rfid"] == pytest.approx(frechet.compute()["rfid"], rel=1e-3)
    assert result["metrics"]["swd"] == pytest.approx(swd.compute()["swd"], rel=1e-3)
    definitions = result["protocol"]["definitions"]
    assert definitions["rfid"].endswith("colour_moments") and "VGG16" in definitions["lpips"]


def test_what_was_not_asked_for_is_neither_measured_nor_defined_and_the_table_says_so(tiny_model, folder):
    images = opened(folder, limit=2)
    plain = evaluate(tiny_model, images)
    assert not {"lpips", "rfid"} & (set(plain["metrics"]) | set(plain["protocol"]["definitions"]))
    assert "LPIPS" not in results_table([("plain", plain)])
    full = evaluate(tiny_model, images, image_metrics([*DEFAULT_METRICS, "lpips"], {"lpips": LPIPS()}))
    lines = results_table([("plain", plain), ("full", full)]).splitlines()
    place = [cell.strip() for cell in lines[0].split("|")].index("LPIPS")
    cells = [line.split("|")[place].strip() for line in lines[2:]]
    assert cells == ["not measured", f"{full['metrics']['lpips']:.4f}"]
    del plain["metrics"]["swd"]  # results written before it was measured
    assert "SWD" not in results_table([("plain", plain)])


def test_networks_that_are_not_available_are_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "torch" in name else real(name, *rest))
    monkeypatch.setattr(frechet_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"`lpips` cannot be measured: .*torchmetrics"):
        load_metric_network("lpips", SIZE)
    with pytest.raises(ValueError, match=r"`rfid` cannot be measured: .*torch-fidelity"):
        load_metric_network("rfid", SIZE)
    with pytest.raises(ValueError, match="`size` must be at least 16 for `lpips`, got 8"):
        load_metric_network("lpips", 8)
    with pytest.raises(ValueError, match="`networks` must hold the one of 'lpips'"):
        image_metrics(["lpips"])
    with pytest.raises(ValueError, match=r"`metrics` must be of psnr, .*, got 'fid'"):
        image_metrics(["fid"])


def test_the_evaluator_measures_what_it_is_given_and_returns_what_the_tokenizer_made(tiny_model):
    """The loop of validation: chosen metrics, batches from anywhere."""
    evaluator = Evaluator(tiny_model, image_metrics(["ssim"]))
    with pytest.raises(ValueError, match="no image was measured"):
        evaluator.compute()
    x = crops()
    outputs = [evaluator.update(batch) for batch in x.split(2)]
    with torch.no_grad():
        expected = tiny_model(x)
    assert torch.equal(torch.cat([output.tokens for output in outputs]), expected.tokens)
    found = evaluator.compute()
    pair = (expected.sample + 1) / 2, (x + 1) / 2
    assert found["ssim"] == pytest.approx(ssim(*pair).mean().item(), abs=1e-4)
    assert "psnr" not in found and found["codebooks"]["global"]["size"] == 32


def test_a_streams_images_are_counted_only_where_the_limit_tells(folder):
    assert (opened(folder).count, opened(folder, limit=2).count, opened(folder, limit=99).count) == (5, 2, 5)
    assert opened(folder, streaming=True).count is None
    assert opened(folder, streaming=True, limit=3).count == 3
