import ast
import dataclasses
import json
from pathlib import Path

import pytest

import dualcodebook_hf
from dualcodebook_hf.training.arguments import CLASSES, parse_run_config

SOURCES = Path(dualcodebook_hf.__file__).parent
# Read by diffusers' pipelines, not by us.
READ_BY_OTHERS = {"scaling_factor", "force_upcast"}


def test_every_field_is_read_somewhere():
    """As an attribute of something that holds arguments: `re.compile` is no reading of `compile`."""
    holders = {"arguments", "args", "data", "training", "config", "model", "run"}
    definitions = {"arguments.py", "configuration_dualcodebook.py"}
    read = set()
    for path in SOURCES.rglob("*.py"):
        if path.name not in definitions:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    holder = getattr(node.value, "attr", getattr(node.value, "id", None))
                    if holder in holders:
                        read.add(node.attr)
    assert "trackers" in read  # the property that splits `report_to`
    fields = {spec.name for kind in CLASSES.values() for spec in dataclasses.fields(kind)}
    assert fields - read - {"report_to"} == READ_BY_OTHERS


def test_no_name_stands_in_two_sections():
    names = [spec.name for kind in CLASSES.values() for spec in dataclasses.fields(kind)]
    assert len(names) == len(set(names))


def test_flags_win_over_the_file_and_the_file_over_its_include(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "include: tiny\nmodel: {local_dim: 64}\ndata: {dataset: a, resolution: 64}\n"
        "training: {learning_rate: 1e-3, horizontal: 1}\n".replace(", horizontal: 1", "")
    )
    run = parse_run_config(["--config", str(path), "--resolution", "32", "--no_horizontal_flip"])
    assert (run.data.resolution, run.data.horizontal_flip, run.model.local_dim) == (32, False, 64)
    assert run.training.learning_rate == 1e-3  # YAML reads 1e-3 as text
    assert run.model.backbone == "dcae"  # from the preset


def test_the_saved_configuration_reads_back(tmp_path):
    top, saved = tmp_path / "top.yaml", tmp_path / "saved.yaml"
    top.write_text("include: tiny\ndata: {dataset: x, validation_split: null}\nmodel: {layers_per_level: null}\n")
    run = parse_run_config(["--config", str(top), "--learning_rate", "3e-5"])
    assert run.data.validation_split is None
    assert run.model.layers_per_level is None
    saved.write_text(json.dumps(run.to_dict()))  # JSON is YAML
    assert parse_run_config(["--config", str(saved)]).to_dict() == run.to_dict()
    assert parse_run_config(["--config", str(saved), "--validation_split", "test"]).data.validation_split == "test"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--datset", "x"], "unknown argument `--datset`; did you mean `--dataset`"),
        (["--config", "tinny"], "`config` must be one of .*did you mean tiny"),
        ([], "`dataset` must name"),
        (
            ["--dataset", "x", "--resize", "64", "--resolution", "128"],
            "`resize` must be 0 or at least resolution=128, got 64",
        ),
        (["--dataset", "x", "--train_batch_size", "0"], "`train_batch_size` must be at least 1, got 0"),
        (["--dataset", "x", "--perceptual", "vgg"], "`perceptual` must be one of lpips, ms-ssim, none, got 'vgg'"),
        (["--dataset", "x", "--local_dim", "7", "--vq_embed_dim", "3"], "`vq_embed_dim` must equal"),
        (["--dataset", "x", "--adam_beta1", "1"], r"`adam_beta1` must lie in \[0, 1\), got 1.0"),
        (["--dataset", "x", "--transformer_heads", "0"], "`transformer_heads` must be at least 1, got 0"),
        (["--dataset", "x", "--seed", "-1"], "`seed` must be at least 0, got -1"),
        (["--dataset", "x", "--report_to", "paper"], "`report_to` must be one of tensorboard, .*, got 'paper'"),
        (["--dataset", "x", "--learning_rate", "nan"], "`learning_rate` must be at least 0, got nan"),
    ],
)
def test_mistakes_are_named_before_anything_is_read(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_run_config(flags)


def test_a_wrong_key_in_a_file_is_named_with_a_suggestion(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {learning_rte: 1}\n")
    with pytest.raises(ValueError, match=r"unknown argument `training.learning_rte`; did you mean `learning_rate`"):
        parse_run_config(["--config", str(path), "--dataset", "x"])


def test_a_value_of_the_wrong_type_ends_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run_config(["--dataset", "x", "--resolution", "big"])
    assert stop.value.code == 2
    assert "--resolution" in capsys.readouterr().err
