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
# By properties beside them: `trackers`, `encoder_layers`, `decoder_widths`, `decoder_layers`.
READ_THROUGH = {"report_to", "layers_per_level", "decoder_block_out_channels", "decoder_layers_per_level"}


def test_every_field_is_read_somewhere():
    """As an attribute of something that holds arguments: `re.compile` is no reading of `compile`."""
    holders = {"arguments", "args", "data", "training", "config", "model", "run"}
    definitions = {"arguments.py", "run_arguments.py", "configuration_fields.py"}
    read = set()
    for path in SOURCES.rglob("*.py"):
        if path.name not in definitions:
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    holder = getattr(node.value, "attr", getattr(node.value, "id", None))
                    if holder in holders:
                        read.add(node.attr)
                elif isinstance(node, ast.JoinedStr):  # getattr(config, f"{part}_update")
                    parts = [part.value for part in node.values if isinstance(part, ast.Constant)]
                    if len(node.values) == 2 and len(parts) == 1 and parts[0].startswith("_"):
                        read |= {f"{part}{parts[0]}" for part in ("global", "local")}
    assert {"trackers", "encoder_layers", "decoder_widths", "decoder_layers"} <= read
    assert {name for _, name in FIELDS} - read - READ_THROUGH == READ_BY_OTHERS


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
    with pytest.raises(ValueError, match=f"unknown argument `{flag}`; did you mean `--learning-rate`"):
        parse_run_config(["--dataset", "x", flag])


def test_the_help_names_the_command_and_each_default_once(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run_config(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: dualcodebook train ")
    assert "or a YAML file with the sections model, data, training (default: tiny)" in text
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
        (
            ["--dataset", "x", "--resize", "0", "64", "--resolution", "128"],
            "`resize` must be 0 or at least resolution=128, got 64",
        ),
        (["--dataset", "x", "--resize", "128", "big"], "`resize` must be a whole number, got 'big'"),
        (["--dataset", "x", "--train_batch_size", "0"], "`train_batch_size` must be at least 1, got 0"),
        (["--dataset", "x", "--perceptual", "vgg"], "`perceptual` must be one of lpips, efficientnet, .*, got 'vgg'"),
        (["--dataset", "x", "--perceptual_form", "a"], "`perceptual_form` must be one of stages, .*, got 'a'"),
        (
            ["--dataset", "x", "--feature_matching_weight", "1", "--resolution", "12", "--adversarial_weight", "0"],
            "`resolution` must be at least 16 with `feature_matching_weight` or `perceptual: efficientnet`, got 12",
        ),
        (["--dataset", "x", "--seam_weight", "-1"], "`seam_weight` must be .*, got -1"),
        (["--dataset", "x", "--discriminator", "x"], "`discriminator` must be one of patch, projected, got 'x'"),
        (["--dataset", "x", "--discriminator_augment", "color,x"], "`discriminator_augment` must be one of .* got 'x'"),
        (["--dataset", "x", "--validation_metrics", "psnr,fid"], "`validation_metrics` must be one of .* got 'fid'"),
        (["--dataset", "x", "--train", "decoder"], "`train: decoder` needs `init_from`"),
        (
            ["--dataset", "x", "--config", "paper", "--discriminator", "projected", "--resolution", "96"],
            r"`resolution` must be at least 128 with a discriminator \(.*`discriminator: projected`\), got 96",
        ),
        (["--dataset", "x", "--local_dim", "7", "--vq_embed_dim", "3"], "`vq_embed_dim` must equal"),
        (["--dataset", "x", "--adam_beta1", "1"], r"`adam_beta1` must lie in \[0, 1\), got 1.0"),
        (["--dataset", "x", "--transformer_heads", "0"], r"`transformer_heads` must lie in \[1, \d+\], got 0"),
        (["--dataset", "x", "--max_train_steps", "9" * 400], "`max_train_steps` must be below 4294967296, got "),
        (["--dataset", "x", "--seed", str(2**32)], "`seed` must be below 4294967296, got "),
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


def parse(tmp_path, text, *flags):
    (tmp_path / "run.yaml").write_text(text)
    return parse_run_config(["--config", str(tmp_path / "run.yaml"), "--dataset", "x", *flags])


@pytest.mark.parametrize(
    ("section", "text", "value"),
    [
        ("training", "max_train_steps: 1e5", 100_000),
        ("training", "max_train_steps: 010", 10),
        ("training", "max_train_steps: 10_000", 10_000),
        ("training", "learning_rate: 1e-3", 1e-3),
        ("training", "learning_rate: 1", 1.0),
        ("training", "mixed_precision: no", "no"),
        ("training", "report_to: [tensorboard, none]", "tensorboard,none"),
        ("training", "push_to_hub: no", False),
        ("training", "hub_model_id: 2020-01-01", "2020-01-01"),
        ("data", "train_split: 2020", "2020"),
        ("data", "train_split: on", "on"),
        ("data", "horizontal_flip: off", False),
        ("data", "validation_split: ~", None),
        ("data", "dataset_config: [a]", "a"),
        ("data", "validation_split: [~, ~]", None),
        ("model", "block_out_channels: [32, 6.4e1]", [32, 64]),
    ],
)
def test_values_of_yaml_are_what_they_look_like(tmp_path, section, text, value):
    run = parse(tmp_path, f"{section}: {{{text}}}")
    name = text.split(":")[0]
    found = getattr(getattr(run, section), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {horizontal_flip: []}", r"`horizontal_flip` must be true or false, got \[\]"),
        ("data: {horizontal_flip: 2}", "`horizontal_flip` must be true or false, got 2"),
        ("data: {train_split: true}", "`train_split` must be text, got True"),
        ("data: {resolution: 12.5}", "`resolution` must be a whole number, got 12.5"),
        ("data: {resolution: true}", "`resolution` must be a whole number, got True"),
        ("data: {resolution: [64]}", r"`resolution` must be a whole number, got \[64\]"),
        ("data: {resolution: {a: 1}}", "`resolution` must be a whole number, got {'a': 1}"),
        ("data: {resolution: 1e400}", "`resolution` must be a whole number, got inf"),
        ("training: {learning_rate: fast}", "`learning_rate` must be a number, got 'fast'"),
        ("training: {learning_rate: 1" + 400 * "0" + "}", "`learning_rate` must be a number"),
        ("model: {block_out_channels: [8, wide]}", "`block_out_channels` must be a whole number, got 'wide'"),
        ("data: {image_column: []}", "`image_column` must have a value, got an empty list"),
        ("data: {train_split: [train, ~]}", "`train_split` must be text, got None"),
        ("model: []", "section 'model' must be a mapping"),
        ("data: {crop: center}\ntraining: {seed: 1}\ndata: {}", "'data' stands in line 1 and again in line 3"),
        ("data:\n  crop: center\n  crop: random", "'crop' stands in line 2 and again in line 3"),
        ("data: " + "[" * 3000, "is not readable YAML: maximum recursion depth exceeded"),
    ],
)
def test_a_value_that_is_wrong_is_named_in_one_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse(tmp_path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["validation_split", "resume_from_checkpoint", "mixed_precision", "layers_per_level"])
def test_null_on_the_command_line_is_none(name):
    parts = parse_sections([f"--{name}", "null"], CLASSES, "train")
    assert [getattr(part, name) for part in parts if hasattr(part, name)] == [None]


def test_several_words_are_one_list_of_trackers(tmp_path):
    for flags in (["--report_to", "tensorboard", "none"], ["--report_to=tensorboard, none"]):
        assert parse_run_config(["--dataset", "x", *flags]).training.trackers == ["tensorboard"]


def test_a_list_in_the_file_has_a_value_for_each_data_set(tmp_path):
    lists = "data: {dataset_config: [a, ~], train_split: [train, test], image_column: image}"
    data = parse(tmp_path, lists, "--dataset", "x", "y").data
    assert (data.dataset_config, data.train_split, data.image_column) == (["a", None], ["train", "test"], "image")
    with pytest.raises(ValueError, match="`train_split` must be one, or one for each data set, of which there are 3"):
        parse(tmp_path, lists, "--dataset", "x", "y", "z", "--dataset_config", "null")


def test_several_words_are_several_data_sets_and_null_may_be_among_their_validation_splits():
    flags = ["--dataset", "a", "~/b", "--validation_split", "null", "test"]
    data = parse_run_config(flags).data
    assert data.dataset == ["a", str(Path("~/b").expanduser())]
    assert data.validation_split == [None, "test"]


def test_a_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "over.yaml").write_text("training: {seed: 3}")
    (tmp_path / "run.yaml").write_text("include: ~/over.yaml\ntraining: {output_dir: ~/runs}\ndata: {dataset: ~/d}")
    flags = ["--init_from=~/w", "--resume_from_checkpoint=~/c", "--vgg_weights", "~/v"]
    run = parse_run_config(["--config=~/run.yaml", *flags])
    assert run.training.seed == 3
    found = [run.data.dataset, run.training.output_dir, run.training.init_from]
    found += [run.training.resume_from_checkpoint, run.training.vgg_weights]
    assert found == [str(tmp_path / name) for name in ("d", "runs", "w", "c", "v")]


def test_the_help_states_the_defaults_of_the_config_beside_it(capsys):
    """Without one that is `tiny`, whose values are not the fields'."""
    for flags, rate, steps in (([], "0.0005", "14500"), (["--config", "paper"], "0.000144", "500000")):
        with pytest.raises(SystemExit):
            parse_run_config([*flags, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"of encoder and decoder (the paper's authors: 4.5e-6 x 32) (default: {rate})" in text
        assert f"updates in all (default: {steps})" in text


ALIASES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 'x'}]\n" for n in range(12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 3000, "is not readable YAML: "),
        (f"model: {{fsq_levels: {'[' * 3000}{']' * 3000}}}", "is not readable YAML: "),
        ("model: {attention: !!bool perhaps}", "is not readable YAML: "),
        ("model: {in_channels: !!timestamp x}", "is not readable YAML: "),
        ("include: [tiny]", r"or a YAML file, got \['tiny'\]"),
        (f"include: {'a' * 5000}", "or a YAML file, got 'aaa"),
        ("include: ~nobody-of-this-name/a.yaml", "or a YAML file, got '~nobody"),
        (ALIASES.replace("a11:", "data:\\n  streaming:"), "unknown section 'a0'"),
        (f"data: {{streaming: &a [*a, x, {'y' * 9000}]}}", "`streaming` must be true or false"),
        (f"data: {{streaming: {'9' * 4000}}}", "`streaming` must be true or false, got 999"),
    ],
)
def test_hostile_run_files_are_refused_in_a_short_message(tmp_path, text, message):
    """What once hung, filled the memory or ended in a traceback; more of them in tests/faults/corpus/run_file."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        parse_run_config(["--config", str(path), "--dataset", "x"])
    assert len(str(refusal.value)) < 1500
