"""One parser: both spellings, switches, suggestions, true defaults; tables fit a terminal; shells complete it all."""

import argparse
import random
import re
import shutil
import subprocess

import pytest

from dualcodebook_hf.cli import main
from dualcodebook_hf.cli.main import COMMANDS, build_parser
from dualcodebook_hf.cli.tables import WIDTH, shortened, text_table, transposed_tables
from dualcodebook_hf.flags import Parser, Switch, boolean
from dualcodebook_hf.presets import load_preset, preset_names
from dualcodebook_hf.training.arguments import CLASSES
from dualcodebook_hf.training.parsing import add_fields, parse_sections

PARSERS = build_parser().commands()
FLAGS = [
    (name, flag, action)
    for name, parser in PARSERS.items()
    for action in parser._actions
    for flag in action.option_strings
    if flag.startswith("--") and flag != "--help"
]


def switches(**options):
    parser = Parser(prog="p")
    parser.add_argument("--fast-mode", action=Switch, **options)
    parser.add_argument("files", nargs="*")
    return parser


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ([], None),
        (["--fast-mode"], True),
        (["--no-fast-mode"], False),
        (["--no_fast_mode"], False),
        (["--fast_mode", "true"], True),
        (["--fast-mode=off"], False),
    ],
)
def test_a_switch_has_two_flags_and_takes_words_for_true_and_false(words, value):
    assert switches(type=boolean).parse_args(words).fast_mode is value


def test_a_switch_beside_files_takes_none_of_them_and_a_wrong_word_is_refused():
    arguments = switches(nargs=0, default=False).parse_args(["--fast-mode", "photos"])
    assert arguments.fast_mode is True and arguments.files == ["photos"]
    with pytest.raises(ValueError, match=r"^`--fast-mode` must be true or false, got 'perhaps' \(see"):
        switches(type=boolean).parse_args(["--fast-mode", "perhaps"])
    with pytest.raises(ValueError, match="`--no-fast-mode` takes no value, got 'true'"):
        switches(type=boolean).parse_args(["--no-fast-mode", "true"])


def message(capsys, *argv):
    assert main(argv) == 2
    return capsys.readouterr().err


def test_every_mistyped_command_flag_and_choice_gets_a_suggestion(capsys):
    for name in COMMANDS:
        assert f"; did you mean {name}? (see `dualcodebook --help`)" in message(capsys, f"{name}x")
    some = [flag for flag in FLAGS if flag[0] != "train"] + [flag for flag in FLAGS if flag[0] == "train"][::10]
    for name, flag, action in some:
        typo = f"{flag}x"
        assert f"unknown argument `{typo}`; did you mean `{flag}`?" in message(capsys, name, typo, "1")
        if action.choices and name != "train":
            choice = list(action.choices)[-1]
            error = message(capsys, name, flag, f"{choice}x")
            assert f"`{flag}` must be one of" in error and f"got '{choice}x'; did you mean {choice}?" in error


@pytest.mark.parametrize(("name", "wrong"), [("perceptual", "lpipz"), ("quantizer", "duel"), ("crop", "randem")])
def test_a_mistyped_word_of_training_gets_a_suggestion(capsys, name, wrong):
    error = message(capsys, "train", "--dataset", "x", f"--{name}", wrong)
    assert f"`{name}` must be one of" in error and "; did you mean " in error


def test_what_stands_where_no_word_may_stand_is_named(capsys):
    assert "unexpected argument `more` (see `dualcodebook convert --help`)" in message(capsys, "convert", "a", "more")
    assert "unexpected argument `tiny` (see `dualcodebook train --help`)" in message(capsys, "train", "tiny")


def test_every_flag_has_a_help_that_tells_its_default_truly():
    for name, flag, action in FLAGS:
        text = action.help % vars(action)
        assert text, (name, flag)
        if action.default not in (None, argparse.SUPPRESS):
            listed = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
            shown = listed.lower() if isinstance(action.default, bool) else listed or "none"
            assert f"(default: {shown})" in text, (name, flag)


@pytest.mark.parametrize("preset", preset_names())
def test_the_defaults_in_the_help_of_train_are_those_that_a_run_would_have(preset):
    parser = Parser()
    add_fields(parser, CLASSES, load_preset(preset))
    shown = {action.dest: action.help for action in parser._actions}
    for section in parse_sections(["--config", preset], CLASSES, "train"):
        for name, value in vars(section).items():
            if value not in (None, ""):
                text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
                text = text.lower() if isinstance(value, bool) else text
                assert f"(default: {text})" in shown[name], name


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_long_help_is_in_groups(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: dualcodebook {name} ")
    groups = [group for group in PARSERS[name]._action_groups if group._group_actions]
    assert len(groups) > 5 and max(len(group._group_actions) for group in groups) <= 13
    assert all(f"\n{group.title}:\n" in text for group in groups)
    assert "\n  --streaming, --no-streaming\n" in text


def test_no_command_demands_an_output():
    with_output = {name: parser for name, parser in PARSERS.items() if "--output" in parser._option_string_actions}
    assert {"reconstruct", "tokenize", "detokenize", "evaluate", "train", "convert", "card"} <= set(with_output)
    assert not any(parser._option_string_actions["--output"].required for parser in with_output.values())


def test_tables_are_no_wider_than_a_terminal_and_lose_nothing_but_the_middle_of_names():
    words = random.Random(0)
    for _ in range(100):
        names = ["n" * words.randint(1, 120) for _ in range(words.randint(1, 9))]
        rows = [[name, *(str(words.randint(0, 10**6)) for _ in range(7))] for name in names]
        rows = [["image", *map("column {}".format, range(7))], *rows]
        for table in (text_table(rows), transposed_tables(rows[0], rows[1:])):
            assert max(map(len, table.splitlines())) <= WIDTH
            assert all(cell in table for row in rows for cell in row[1:])


def test_a_shortened_name_keeps_both_ends():
    assert shortened("abcdefghijkl", 12) == "abcdefghijkl"
    short = shortened("photograph-of-a-mountain-0001.jpeg", 16)
    assert len(short) == 16 and short.startswith("phot") and short.endswith(".jpeg")


def test_a_shell_completes_every_command_and_flag(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as end:
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert end.value.code == 0
    assert {flag for _, flag, _ in FLAGS} <= set(re.findall(r"--[\w-]+", script))
    assert set(COMMANDS) <= set(re.findall(r"[\w-]+", script))
    if shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
