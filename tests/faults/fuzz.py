"""Fuzz targets: every reader of files, given inputs that once failed and random changes of them.

A reader may succeed or raise a ValueError with a message of readable length, within `SECONDS` and `EXTRA_MEMORY`, and
executes nothing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import TINY
from harness import Child, Tally
from test_configuration_fuzz import DOORS, NAMES, by_diffusers, limited, mutated

from dualcodebook_hf import DualCodebookModel, DualCodebookVQModel, default_checkpoint
from dualcodebook_hf.files import read_json
from dualcodebook_hf.hub.records import Records
from dualcodebook_hf.image_processing_dualcodebook import read_image
from dualcodebook_hf.tokens.file import load_tokens
from dualcodebook_hf.training.arguments import parse_run_config

CORPUS = Path(__file__).parent / "corpus"
SECONDS, EXTRA_MEMORY, LONGEST_MESSAGE = 20, 3 * 2**30, 4000
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MARK = "executed"  # a folder that the pickles of the corpus make where they are executed
WORDS = [b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b'""', b"[]", b"{}", b"9" * 30, b"9" * 5000, b"[" * 3000]
WORDS += [b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"~", b"../..", b"\n", b"&a *a", b"!!int x", b"<<"]


# --- the readers; each takes a file of its corpus


def image(path: Path) -> None:
    assert read_image(path.read_bytes()).mode == "RGB"


def tokens(path: Path) -> None:
    load_tokens(path)


def configuration(path: Path) -> None:
    """A mapping of fields through one of the five doors."""
    fields = read_json(path)
    folder = path.with_suffix(".folder")
    folder.mkdir(exist_ok=True)
    with torch.device("meta"):
        door = DOORS[path.stat().st_size % len(DOORS)]
        if door is by_diffusers:  # Python's own TypeError for an argument that a function does not have
            fields = {name: value for name, value in fields.items() if name in NAMES}
        door(fields, folder)


def weights(path: Path) -> None:
    """The weights, their index, or config.json, of a folder that is otherwise as it should be; both faces read it."""
    folder = path.with_suffix(".folder")
    shutil.copytree(path.parent / ("sharded" if path.suffix == ".index" else "valid"), folder, dirs_exist_ok=True)
    if path.suffix == ".json":
        shutil.copyfile(path, folder / "config.json")
    elif path.suffix == ".index":
        shutil.copyfile(path, folder / INDEX)
    elif path.suffix == ".bin":
        (folder / WEIGHTS).unlink()
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
            shutil.copyfile(path, folder / name)
    else:
        shutil.copyfile(path, folder / WEIGHTS)
    refused = []
    for face in (DualCodebookVQModel, DualCodebookModel):
        try:
            model = face.from_pretrained(folder)
        except (ValueError, OSError) as error:  # OSError, as the libraries have it: there are no weights to read
            refused.append(error)
        else:
            assert all(parameter.isfinite().all() for parameter in model.parameters())
            if path.suffix == ".index":  # whatever it says: the weights that the shards hold
                expected = face.from_pretrained(path.parent / "valid").state_dict()
                assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    shutil.rmtree(folder)
    if refused:
        raise ValueError(max(map(str, refused), key=len))


def run_file(path: Path) -> None:
    parse_run_config(["--config", str(path), "--dataset", "x"])


def records(path: Path) -> None:
    """metrics.json, train_config.json and conversion.json in turn, beside the config.json of the embedded one."""
    folder = path.with_suffix(".folder")
    folder.mkdir(exist_ok=True)
    shutil.copyfile(Path(default_checkpoint()) / "config.json", folder / "config.json")
    kinds = ("metrics", "train", "conversion")
    kind = path.stem.removeprefix("valid-") if path.name.startswith("valid") else kinds[path.stat().st_size % 3]
    Records.read(folder, **{kind: path})


TARGETS: dict[str, Callable[[Path], None]] = {
    reader.__name__: reader for reader in (image, tokens, configuration, weights, run_file, records)
}
SEEDS = {"image": 6000, "tokens": 6000, "configuration": 1500, "weights": 500, "run_file": 3000, "records": 3000}


# --- inputs


def changed(content: bytes, others: list[bytes], numbers: random.Random) -> bytes:
    """Some bytes flipped, written over, cut, doubled, or taken from another input."""
    for _ in range(numbers.choice([1, 1, 2, 4, 16])):
        start = numbers.randrange(len(content) + 1)
        end = min(len(content), start + numbers.choice([0, 1, 1, 4, 40, 400]))
        other = numbers.choice(others)
        piece = numbers.choice([numbers.randbytes(end - start), numbers.choice(WORDS), content[start:end] * 2, b""])
        if numbers.random() < 0.1:
            cut = numbers.randrange(len(other) + 1)
            piece = other[cut : cut + numbers.choice([4, 100, 10**6])]
        content = (content[:start] + piece + content[end:])[: 2**17]
    return content[: numbers.randrange(len(content) + 1)] if numbers.random() < 0.05 else content


def generated(target: str, folder: Path, tries: int, seed: int) -> list[Path]:
    """Changed inputs as files."""
    numbers, made = random.Random(f"{target} {seed}"), []
    corpus = sorted(path for path in [*(CORPUS / target).iterdir(), *folder.glob("valid-*")] if path.is_file())
    contents = {path: path.read_bytes() for path in corpus}
    valid = [path for path in corpus if path.name.startswith("valid")]
    for number in range(tries):
        source = numbers.choice(valid if numbers.random() < 0.5 else corpus)
        path = folder / f"{number}{source.suffix}"
        content = changed(contents[source], list(contents.values()), numbers)
        if target == "configuration" and numbers.random() < 0.7:
            content = json.dumps(mutated(numbers)).encode()
        path.write_bytes(content)
        made.append(path)
    return made


def prepare_weights(folder: Path) -> None:
    """A model that loads, in one file and in several, whose files are changed like those of the corpus."""
    torch.manual_seed(0)
    small = DualCodebookVQModel(**{**TINY, "block_out_channels": [4, 4], "global_transformer_layers": 0})
    small.save_pretrained(folder / "valid")
    small.save_pretrained(folder / "sharded", max_shard_size="8KB")
    shutil.copyfile(folder / "sharded" / INDEX, folder / "valid-weights.index")
    shutil.copyfile(folder / "valid" / WEIGHTS, folder / "valid-weights.safetensors")
    shutil.copyfile(folder / "valid" / "config.json", folder / "valid-config.json")


# --- the count


def fuzz(target: str, folder: Path, tries: int, seed: int) -> Tally:
    """A row: changed inputs. What fails is kept beside the corpus' name in `folder`, to be added to the corpus."""
    if target == "weights":
        prepare_weights(folder)
    return _read_all(f"fuzz: {target}", target, generated(target, folder, tries, seed), folder)


def repeat_corpus(target: str, folder: Path) -> Tally:
    """A row: the corpus itself."""
    if target == "weights":
        prepare_weights(folder)
    copies = [shutil.copy(path, folder) for path in sorted((CORPUS / target).iterdir())]
    inputs = [path for path in map(Path, copies) if path.is_file()] + sorted(folder.glob("valid-weights.*"))
    return _read_all(f"corpus: {target}", target, inputs, folder)


def _read_all(fault: str, target: str, inputs: list[Path], folder: Path) -> Tally:
    """In a process that is replaced when it dies."""
    found, answers, log = Tally(fault), folder / "answers", folder / "log"
    answers.touch()
    while (done := len(answers.read_text().splitlines())) < len(inputs):
        child = Child(lambda rest=inputs[done:]: _answer(target, rest, answers), log)
        try:
            code = child.wait(60 + 2 * len(inputs))
        except TimeoutError:
            code = "a hang"
        if len(answers.read_text().splitlines()) < len(inputs):
            with answers.open("a") as file:
                file.write(f"ended by {code}\n")
    for path, answer in zip(inputs, answers.read_text().splitlines(), strict=True):
        found.tries += 1
        if answer == "read" or (answer == "refused" and not path.name.startswith("valid")):
            found.outcomes[answer] = found.outcomes.get(answer, 0) + 1
        else:
            found.lost.append(f"{path}: {answer}")
    if (folder / MARK).exists():
        found.lost.append("a pickle was executed")
    return found


def _answer(target: str, inputs: list[Path], answers: Path) -> None:
    os.chdir(answers.parent)
    with answers.open("a", buffering=1) as file:
        for path in inputs:
            file.write(_one_answer(TARGETS[target], path) + "\n")


def _one_answer(read: Callable[[Path], None], path: Path) -> str:
    try:
        with limited(SECONDS, EXTRA_MEMORY):
            read(path)
    except ValueError as error:
        length = len(str(error))
        return "refused" if length <= LONGEST_MESSAGE else f"a message of {length} characters"
    except BaseException as error:
        return f"{type(error).__name__} {' '.join(str(error).split())[:300]}"
    return "read"
