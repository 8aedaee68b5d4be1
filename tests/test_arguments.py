import ast
import dataclasses
import json
import typing
from pathlib import Path

import pytest

import dualcodebook_hf
from dualcodebook_hf.training.arguments import CLASSES, parse_run_config
from dualcodebook_hf.training.parsing import parse_sections

FIELDS = [(section, spec.name) for section, kind in CLASSES.items() for spec in dataclasses.fields(kind)]
SOURCES = Path(dualcodebook_hf.__file__).parent
# Read by diffusers' pipelines, not by us.
READ_BY_OTHERS = {"scaling_factor", "force_upcast"}


def test_every_field_is_read_somewhere():
    """As an attribute of something that holds arguments: `re.compile` is no reading of `compile`."""
    holders = {"arguments", "args", "data", "training", "config", "model", "run"}
    definitions = {"arguments.py", "run_arguments.py", "configuration_dualcodebook.py"}
    read = set()
    for path in SOURCES.rglob("*.py"):
        if path.name not in definitions:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    holder = getattr(node.value, "attr", getattr(node.value, "id", None))
                    if holder in holders:
                        read.add(node.attr)
    assert "trackers" in read  # the property that splits `report_to`
    assert {name for _, name in FIELDS} - read - {"report_to"} == READ_BY_OTHERS


def test_no_name_stands_in_two_sections():
    names = [name for _, name in FIELDS]
    assert len(names) == len(set(names))


def test_flags_win_over_the_file_and_the_file_over_its_include(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "include: tiny\nmodel: {local_dim: 64}\ndata: {dataset: a, resolution: 64}\ntraining: {learning_rate: 1e-3}\n"
    )
    run = parse_run_config(["--config", str(path), "--resolution", "32", "--no_horizontal_flip"])
    assert (run.data.resolution, run.data.horizontal_flip, run.model.local_dim) == (32, False, 64)
    assert run.training.learning_rate == 1e-3  # YAML reads 1e-3 as text
    assert run.model.backbone == "dcae"  # from the preset


def sample_values(kind, name):
    """Text for a flag, the value that it means, and another value for the file."""
    hint = typing.get_type_hints(kind)[name]
    inner = (
        next((part for part in typing.get_args(hint) if part is not type(None)), hint) if hint != list[int] else hint
    )
    default = next(spec.default for spec in dataclasses.fields(kind) if spec.name == name)
    if inner is bool:
        return str(default is not True).lower(), default is not True, default is True
    samples = {
        int: ("7", 7, 6),
        float: ("0.25", 0.25, 0.5),
        str: ("flag's", "flag's", "file's"),
        list[int]: ("7", [7], [5, 6]),
    }
    return samples[inner]


@pytest.mark.parametrize("before", ["default", "null", "value"])
@pytest.mark.parametrize(("section", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_every_flag_wins_in_every_spelling_whatever_the_file_says(tmp_path, section, name, before):
    text, value, other = sample_values(CLASSES[section], name)
    path = tmp_path / "run.yaml"
    content = {"default": {}, "null": {name: None}, "value": {name: other}}[before]
    path.write_text(json.dumps({section: content}))
    for spelled in (name, name.replace("_", "-")):
        for flag in ([f"--{spelled}", text], [f"--{spelled}={text}"]):
            parts = parse_sections(["--config", str(path), *flag], CLASSES, "train")
            assert getattr(parts[list(CLASSES).index(section)], name) == value, flag


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_a_null_in_the_file_means_none_where_a_field_may_be_none_and_is_refused_elsewhere(tmp_path, section, name):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({section: {name: None}}))
    if type(None) in typing.get_args(typing.get_type_hints(CLASSES[section])[name]):
        parts = parse_sections(["--config", str(path)], CLASSES, "train")
        assert getattr(parts[list(CLASSES).index(section)], name) is None
    else:
        with pytest.raises(ValueError, match=f"`{name}` must have a value, got null"):
            parse_sections(["--config", str(path)], CLASSES, "train")


@pytest.mark.parametrize(
    "name", [spec.name for kind in CLASSES.values() for spec in dataclasses.fields(kind) if spec.default is True]
)
def test_what_is_on_by_default_can_be_switched_off_in_both_spellings(name):
    for flag in (f"--no_{name}", f"--no-{name.replace('_', '-')}"):
        parts = parse_sections([flag], CLASSES, "train")
        assert [getattr(part, name) for part in parts if hasattr(part, name)] == [False]


@pytest.mark.parametrize("flag", ["--learning_rat", "--learning-rat", "--learning-rat=1"])
def test_an_unknown_flag_gets_a_suggestion_in_both_spellings(flag):
    with pytest.raises(ValueError, match=f"unknown argument `{flag}`; did you mean `--learning_rate`"):
        parse_run_config(["--dataset", "x", flag])


def test_the_help_names_the_command_and_each_default_once(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run_config(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: dualcodebook train ")
    assert "or a YAML file (default: tiny)" in text
    assert "(default: None)" not in text


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
        (["--dataset", "x", "--resolution", "big"], "`resolution` must be a whole number, got 'big'"),
        (["--dataset", "x", "--in_channels", "1"], "`in_channels` must be 3, as images are read as RGB, got 1"),
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
