"""Freed memory is kept: the same blocks again cost no page faults."""

import os
import platform
import subprocess
import sys

import pytest

from dualcodebook_hf.malloc import _CHOSEN

# Faults of the sixth turn of three blocks of 64 MiB, which are 16,384 pages each.
SCRIPT = """
import resource, sys
import torch
from dualcodebook_hf.malloc import keep_freed_memory
print([keep_freed_memory(word == "keep") for word in sys.argv[1:]])
def turn():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        torch.zeros(16, 2**20).add_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([turn() for _ in range(6)][-1])
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")


def run(*words, **environment):
    """What the calls returned, and the faults."""
    clean = {name: value for name, value in os.environ.items() if name not in (*_CHOSEN, "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", SCRIPT, *words]
    out = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout
    answers, faults = out.splitlines()
    return answers, int(faults)


def test_a_block_that_comes_again_costs_no_page_faults():
    assert run()[1] > 10_000
    answers, faults = run("keep")
    assert answers == "[True]" and faults < 1_000


def test_it_can_be_taken_back():
    answers, faults = run("keep", "leave")
    assert answers == "[True, True]" and faults > 10_000


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}],
    ids=lambda environment: next(iter(environment)),
)
def test_what_the_environment_says_is_left_alone(environment):
    answers, faults = run("keep", **environment)
    assert answers == "[False]" and faults > 10_000


def test_the_commands_keep_it(tmp_path):
    """The setting of the process after a command, seen by page faults in it."""
    code = "import sys\nfrom dualcodebook_hf.cli.main import main\nmain(['tokenize', 'missing.png'])\n"
    clean = {name: value for name, value in os.environ.items() if name not in (*_CHOSEN, "GLIBC_TUNABLES")}
    out = subprocess.run(
        [sys.executable, "-c", code + SCRIPT], env=clean, capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert int(out.splitlines()[-1]) < 1_000
