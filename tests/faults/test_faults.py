"""Faults injected again and again; `make test-faults` prints how many were survived (docs/reliability.md).

FAULTS: `full`, `small` (a share for CI), or a factor of `full`'s number of tries. FAULTS_SEED: of every random choice.
"""

import os

import pytest
from fuzz import SEEDS, TARGETS, fuzz, repeat_corpus
from harness import HEADER
from test_training import dataset  # noqa: F401
from token_faults import TokenFaults
from training_faults import TrainingFaults

pytestmark = pytest.mark.slow
FACTOR = {"small": 0.1, "full": 1.0}.get(os.environ.get("FAULTS", "full")) or float(os.environ["FAULTS"])
SEED = int(os.environ.get("FAULTS_SEED", "0"))


@pytest.fixture(scope="module")
def report(request):
    """Takes a row of the table and fails where something was lost; the table is printed at the end."""
    rows = []

    def add(tally):
        rows.append(tally.row)
        assert tally.tries and not tally.lost, "\n".join([f"seed {SEED}", *tally.lost])

    yield add
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", HEADER, *rows, sep="\n")


@pytest.fixture(scope="module")
def training(dataset, tmp_path_factory):  # noqa: F811
    return TrainingFaults(dataset, tmp_path_factory.mktemp("runs"), max(2, round(20 * FACTOR)), SEED)


@pytest.mark.parametrize(
    "fault",
    [
        TrainingFaults.killed_at_file_system_events,
        TrainingFaults.killed_at_random_moments,
        TrainingFaults.killed_inside_saves,
        TrainingFaults.one_of_two_ranks_killed,
        TrainingFaults.disk_full,
        TrainingFaults.damaged_files,
        TrainingFaults.replaced_files,
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_run_that_goes_on_equals_the_undisturbed_one(training, report, fault):
    report(fault(training))


@pytest.fixture(scope="module")
def tokenizing(tmp_path_factory):
    return TokenFaults(tmp_path_factory.mktemp("tokens"), max(2, round(20 * FACTOR)), SEED)


@pytest.mark.parametrize(
    "fault",
    [
        TokenFaults.killed_at_file_system_events,
        TokenFaults.killed_five_times_by_one_process,
        TokenFaults.killed_five_times_by_two_processes,
        TokenFaults.disk_full,
    ],
    ids=lambda fault: fault.__name__,
)
def test_tokens_that_are_made_again_equal_the_undisturbed_ones(tokenizing, report, fault):
    report(fault(tokenizing))


@pytest.mark.parametrize("target", TARGETS)
def test_a_reader_answers_by_success_or_value_error(target, report, tmp_path):
    report(fuzz(target, tmp_path, max(20, round(SEEDS[target] * FACTOR)), SEED))


@pytest.mark.parametrize("target", TARGETS)
def test_no_input_that_once_failed_fails_again(target, report, tmp_path):
    report(repeat_corpus(target, tmp_path))
