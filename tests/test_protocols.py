"""Named protocols: what they stand for, that nothing overrides them silently, and that numbers carry their name."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualcodebook_hf.cli import main
from dualcodebook_hf.cli.main import build_parser
from dualcodebook_hf.evaluation.data import EvaluationData
from dualcodebook_hf.evaluation.evaluator import evaluate
from dualcodebook_hf.evaluation.protocols import PROTOCOLS, Protocol, get_protocol
from dualcodebook_hf.perceptual.vgg import LPIPS
from dualcodebook_hf.training.arguments import parse_run_config

datasets = pytest.importorskip("datasets")


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A protocol like the public ones on five drawn images, three of them to be measured."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    generator = np.random.default_rng(0)
    for split, count in (("train", 2), ("validation", 3)):
        (tmp_path / "drawn" / split).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "drawn" / split / f"{index}.png")
    folder = str(tmp_path / "drawn")
    data = {"dataset": folder, "split": "validation", "size": 32, "resample": "bilinear"}
    train = {"train_dataset": folder, "train_split": "train"}
    protocol = Protocol(name="drawn", images=3, origin="drawn here", **data, **train)
    monkeypatch.setitem(PROTOCOLS, "drawn", protocol)
    return protocol


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_papers_data_sets_are_there_and_measured_at_256_pixels():
    assert {"ade20k", "celebahq", "coco2017", "imagenet"} <= set(PROTOCOLS)
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and protocol.size == 256 and protocol.origin
        assert protocol.split != protocol.train_split
        assert protocol.dataset.count("/") == 1
    assert (PROTOCOLS["coco2017"].images, PROTOCOLS["imagenet"].images) == (5000, 50_000)


def test_an_option_that_agrees_is_accepted_and_one_that_contradicts_is_named():
    protocol = get_protocol("coco2017")
    assert protocol.streaming and protocol.limit is None
    part = protocol.with_options(split="val", size=256, dataset=None, limit=3, streaming=False)
    assert part == replace(protocol, limit=3, streaming=False)
    wrong = {"dataset": "x/y", "config": "full", "split": "train", "image_column": "pic", "size": 128}
    for key, value in {**wrong, "resample": "bicubic"}.items():
        with pytest.raises(ValueError, match=f"`{key}` of the protocol coco2017 is .*, got {value!r}"):
            protocol.with_options(**{key: value})
    with pytest.raises(ValueError, match=r"`protocol` must be one of ade20k, .*, got 'coco'"):
        get_protocol("coco")


def test_a_protocol_gives_the_numbers_of_its_options_and_its_name(tiny_model, drawn):
    result = evaluate(tiny_model, drawn.open())
    by_hand = EvaluationData(dataset=drawn.dataset, split="validation", size=32, resample="bilinear")
    by_hand = evaluate(tiny_model, by_hand.open())
    assert result["metrics"] == by_hand["metrics"]
    record = {"name": "drawn", "expected_pictures": 3, "complete": True}
    assert result["protocol"] == {**record, **by_hand["protocol"]}
    part = evaluate(tiny_model, drawn.with_options(limit=2, streaming=False).open())["protocol"]
    assert (part["pictures"], part["complete"]) == (2, False)


def test_the_command_line_takes_a_name_for_everything_and_refuses_contradictions(checkpoint, drawn, tmp_path, capsys):
    output = tmp_path / "out.json"
    command = ["evaluate", "--model", checkpoint, "--protocol", "drawn", "--no-lpips", "--no-rfid"]
    assert main([*command, "--limit", "2", "--output", str(output)]) == 0
    (result,) = json.loads(output.read_text())["results"]
    assert (result["protocol"]["name"], result["protocol"]["pictures"]) == ("drawn", 2)
    assert "2 of the 3 images of drawn" in capsys.readouterr().out
    for flag, value in (("--dataset", "./other"), ("--split", "train"), ("--size", "64"), ("--resample", "lanczos")):
        assert main([*command, flag, value]) == 2
        message = capsys.readouterr().err
        assert "of the protocol drawn is" in message and len(message.splitlines()) == 1


def test_the_linear_codec_is_fitted_to_the_protocols_training_split(checkpoint, drawn, tmp_path):
    output = tmp_path / "out.json"
    command = ["evaluate", "--model", checkpoint, "--protocol", "drawn", "--no-lpips", "--no-rfid"]
    command += ["--patch-linear", "--output", str(output)]
    # Two images of 32 pixels have 8 patches: too few for the model's 32 codes, and the error comes from the fit.
    assert main(command) == 2
    PROTOCOLS["drawn"] = replace(drawn, size=96)
    assert main(command) == 0
    model, codec = json.loads(output.read_text())["results"]
    assert codec["model"]["fitted_to"]["split"] == "train"
    assert codec["model"]["fitted_to"]["sizes"] == [32, 16]
    assert codec["protocol"]["name"] == model["protocol"]["name"] == "drawn"


def test_a_protocol_measures_by_networks_where_they_are_to_be_had_and_says_why_not(
    checkpoint, drawn, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setattr(LPIPS, "from_pretrained", classmethod(lambda cls: LPIPS()))  # random weights for the Hub's
    output = tmp_path / "out.json"
    command = ["evaluate", "--model", checkpoint, "--protocol", "drawn", "--output", str(output)]
    assert main(command) == 0
    (result,) = json.loads(output.read_text())["results"]
    assert "lpips" in result["metrics"] and "rfid" not in result["metrics"]
    assert list(result["protocol"]["not_measured"]) == ["rfid"]
    assert "`rfid` cannot be measured: " in capsys.readouterr().out

    assert main([*command, "--no-lpips", "--no-rfid"]) == 0
    (result,) = json.loads(output.read_text())["results"]
    assert "lpips" not in result["metrics"] and "not_measured" not in result["protocol"]
    assert main([*command, "--rfid"]) == 2
    assert "`--rfid` cannot be measured: " in capsys.readouterr().err


def test_one_of_data_set_and_protocol_is_needed(checkpoint, capsys):
    assert main(["evaluate", "--model", checkpoint]) == 2
    assert "--protocol" in capsys.readouterr().err


def test_the_commands_of_the_papers_table_are_valid(monkeypatch):
    """docs/paper-table.md: every flag is known, every protocol and configuration exists, updates are 500 epochs."""
    monkeypatch.chdir(Path(__file__).parents[1])
    text = Path("docs", "paper-table.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("dualcodebook")]
    trained = {}
    for command in commands:
        if command[0] == "train":
            run = parse_run_config(command[command.index("--") + 1 :])
            trained[run.training.output_dir] = run
        else:
            arguments = build_parser(command[:1]).parse_args(command)
            assert get_protocol(arguments.protocol) and arguments.model[0].removesuffix("/final") in trained
    images = {"runs/ade20k": 20_210, "runs/celebahq": 28_000, "runs/coco2017": 117_266}
    assert set(trained) == set(images)
    for folder, run in trained.items():
        protocol = get_protocol(folder.removeprefix("runs/"))
        assert (run.data.dataset, run.data.train_split) == (protocol.train_dataset, protocol.train_split)
        assert run.training.max_train_steps == math.ceil(500 * images[folder] / (2 * run.training.train_batch_size))
