"""Tokens are revealed as many as the schedule says, in the order that was asked for, and never change again."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from dualcodebook_hf.generation.schedulers import MaskedTokenScheduler, draw_tokens, halton_order, lowest

SIZES = (5, 9)
GRID = (4, 6)
POSITIONS = GRID[0] * GRID[1]
ALL = [(order, units) for order in ("confidence", "halton") for units in ("tokens", "positions", "books")]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def all_hidden(batch=2, grid=GRID, sizes=SIZES):
    return torch.tensor(sizes)[None, :, None, None].expand(batch, -1, *grid).clone()


def random_logits(batch=2, grid=GRID, sizes=SIZES, seed=0, dtype=torch.float32):
    generator = seeded(seed)
    return tuple(torch.randn(batch, size, *grid, generator=generator).to(dtype) for size in sizes)


def run(scheduler, steps, sample=None, starting_mask=None, generator=None, temperature=(4.5, 0.0), logits=None):
    """The tokens before the first step and after each."""
    sample = all_hidden() if sample is None else sample
    scheduler.set_timesteps(steps, temperature)
    samples = [sample]
    for step, timestep in enumerate(scheduler.timesteps):
        given = logits or random_logits(len(sample), sample.shape[2:], seed=step)
        samples.append(scheduler.step(given, timestep, samples[-1], starting_mask, generator).prev_sample)
    return samples


@pytest.mark.parametrize(("order", "units"), ALL)
def test_what_is_known_never_changes_and_all_is_known_at_the_end(order, units):
    scheduler = MaskedTokenScheduler(codebook_sizes=SIZES, order=order, units=units)
    samples = run(scheduler, 7, generator=seeded())
    for before, after in itertools.pairwise(samples):
        known = ~scheduler.hidden(before)
        assert torch.equal(before[known], after[known])
        assert (scheduler.hidden(after).sum((1, 2, 3)) < scheduler.hidden(before).sum((1, 2, 3))).all()
    for size, tokens in zip(SIZES, samples[-1].unbind(1), strict=True):
        assert tokens.min() >= 0 and tokens.max() < size


@pytest.mark.parametrize(
    ("schedule", "units", "expected"),
    [
        # Of 48 tokens, or 24 positions of two, in 4 steps: arccos(1/4) = 1.318116, arccos(1/2) = pi/3, ...
        ("arccos", "tokens", [40, 32, 22, 0]),
        ("cosine", "tokens", [44, 33, 18, 0]),
        ("linear", "tokens", [36, 24, 12, 0]),
        ("arccos", "positions", [2 * 20, 2 * 16, 2 * 11, 0]),
        ("cosine", "positions", [2 * 22, 2 * 16, 2 * 9, 0]),
        # Two steps for each codebook.
        ("linear", "books", [24 + 12, 24, 12, 0]),
        ("cosine", "books", [24 + 16, 24, 16, 0]),
    ],
)
@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_the_number_of_hidden_tokens_follows_the_schedule(schedule, units, expected, order):
    scheduler = MaskedTokenScheduler(codebook_sizes=SIZES, order=order, units=units, masking_schedule=schedule)
    counts = [scheduler.hidden(sample).sum((1, 2, 3)).tolist() for sample in run(scheduler, 4, generator=seeded())]
    assert counts == [[48, 48], *([count, count] for count in expected)]


@pytest.mark.parametrize("units", ["tokens", "positions", "books"])
def test_a_partial_start_is_a_share_of_what_was_hidden_for_each_sample(units):
    sample = torch.zeros(2, 2, *GRID, dtype=torch.int64)
    sample[0, :, :, :2], sample[1, :, 0] = torch.tensor(SIZES)[:, None, None], torch.tensor(SIZES)[:, None]
    scheduler = MaskedTokenScheduler(codebook_sizes=SIZES, units=units, masking_schedule="linear")
    samples = run(scheduler, 4, sample, scheduler.hidden(sample), seeded())
    counts = torch.stack([scheduler.hidden(each).sum((1, 2, 3)) for each in samples])
    assert counts[:, 0].tolist() == [16, 12, 8, 4, 0]
    assert counts[:, 1].tolist() == [12, *{"tokens": (9, 6, 3), "positions": (8, 6, 2), "books": (9, 6, 3)}[units], 0]
    outside = ~scheduler.hidden(sample)
    assert all(torch.equal(each[outside], sample[outside]) for each in samples)


@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_tokens_of_a_position_are_revealed_together(order):
    scheduler = MaskedTokenScheduler(codebook_sizes=SIZES, order=order, units="positions")
    for sample in run(scheduler, 6, generator=seeded()):
        hidden = scheduler.hidden(sample)
        assert torch.equal(hidden[:, 0], hidden[:, 1])


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
@pytest.mark.parametrize("order", ["confidence", "halton"])
def test_no_local_token_comes_before_all_global_ones(order, steps):
    scheduler = MaskedTokenScheduler(codebook_sizes=SIZES, order=order, units="books")
    samples = run(scheduler, steps, generator=seeded())
    for before, after in itertools.pairwise(samples):
        hidden, newer = scheduler.hidden(before), scheduler.hidden(after)
        if steps > 1 and not torch.equal(hidden[:, 1], newer[:, 1]):
            assert not hidden[:, 0].any()
    assert not newer.any()


@pytest.mark.parametrize("units", ["tokens", "positions"])
def test_without_noise_the_most_confident_come_first(units):
    scheduler = MaskedTokenScheduler(codebook_sizes=SIZES, units=units, masking_schedule="linear")
    scheduler.set_timesteps(4, temperature=0)
    logits, sample = random_logits(), all_hidden()
    out = scheduler.step(logits, 3, sample, generator=seeded())
    for index in range(len(sample)):
        confidence = torch.zeros(2, *GRID)
        for book in range(2):
            for row in range(GRID[0]):
                for column in range(GRID[1]):
                    chances = torch.softmax(logits[book][index, :, row, column], 0)
                    confidence[book, row, column] = chances[out.pred_original_sample[index, book, row, column]].log()
        values = confidence.sum(0) if units == "positions" else confidence
        revealed = values.flatten().argsort(descending=True)[: values.numel() // 4]
        expected = torch.zeros(values.numel(), dtype=torch.bool)
        expected[revealed] = True
        assert torch.equal(~scheduler.hidden(out.prev_sample)[index], expected.view(values.shape).expand(2, *GRID))


def test_noise_on_the_confidences_falls_to_its_end():
    scheduler = MaskedTokenScheduler(codebook_sizes=SIZES)
    scheduler.set_timesteps(5, temperature=(8, 2))
    assert scheduler.temperatures == [8, 6.5, 5, 3.5, 2]
    first = run(scheduler, 4, generator=seeded(), temperature=(100, 0), logits=random_logits())[1]
    again = run(scheduler, 4, generator=seeded(), temperature=(100, 0), logits=random_logits())[1]
    other = run(scheduler, 4, generator=seeded(1), temperature=(100, 0), logits=random_logits())[1]
    assert torch.equal(first, again) and not torch.equal(scheduler.hidden(first), scheduler.hidden(other))


@pytest.mark.parametrize(("order", "units"), ALL)
def test_a_seed_gives_the_same_tokens_and_a_sample_of_its_own_generator_those_it_has_alone(order, units):
    scheduler = MaskedTokenScheduler(codebook_sizes=SIZES, order=order, units=units)
    logits = random_logits(1)
    both = tuple(part.expand(2, *part.shape[1:]) for part in logits)
    one = run(scheduler, 5, all_hidden(1), generator=seeded(3), logits=logits)[-1]
    assert torch.equal(one, run(scheduler, 5, all_hidden(1), generator=seeded(3), logits=logits)[-1])
    assert not torch.equal(one, run(scheduler, 5, all_hidden(1), generator=seeded(4), logits=logits)[-1])
    two = run(scheduler, 5, all_hidden(2), generator=[seeded(3), seeded(4)], logits=both)[-1]
    assert torch.equal(two[:1], one) and not torch.equal(two[1:], one)


def plain_halton_order(height, width):
    """Digit by digit, in fractions, until every position was met."""

    def inverse(number, base):
        value, place = Fraction(0), Fraction(1, base)
        while number:
            number, digit = divmod(number, base)
            value, place = value + digit * place, place / base
        return value

    order, number = [], 0
    while len(order) < height * width:
        number += 1
        position = int(inverse(number, 2) * height) * width + int(inverse(number, 3) * width)
        order += [position] if position not in order else []
    return order


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (9, 1), (8, 9), (16, 16), (13, 6)])
def test_halton_order_is_that_of_the_plain_sequence_and_meets_every_position_once(grid):
    order = halton_order(*grid)
    assert order.tolist() == plain_halton_order(*grid)
    assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))


def test_large_grids_are_met_whole():
    for grid in [(64, 64), (31, 97)]:
        assert sorted(halton_order(*grid).tolist()) == list(range(grid[0] * grid[1]))


def test_halton_reveals_positions_that_are_spread_and_other_ones_for_each_sample():
    scheduler = MaskedTokenScheduler(codebook_sizes=SIZES, order="halton", units="positions", masking_schedule="linear")
    grid, batch = (16, 16), 8
    samples = run(scheduler, 16, all_hidden(batch, grid), generator=seeded(), logits=random_logits(batch, grid))
    known = ~scheduler.hidden(samples[4])[:, 0]
    counts = known.unfold(1, 4, 4).unfold(2, 4, 4).sum((3, 4)).float()
    assert known.sum((1, 2)).tolist() == [64] * batch  # 4 in each sixteenth of the grid, nearly
    by_chance = 64 * (1 / 16) * (15 / 16) * (192 / 255)  # variance of 64 positions drawn without order
    assert counts.var(correction=0) < by_chance / 3
    assert len({tuple(each.flatten().tolist()) for each in known}) == batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_step_draws_from_the_softmax(dtype):
    logits = tuple(torch.randn(1, size, 1, 2, generator=seeded(5)).to(dtype) for size in SIZES)
    many = tuple(part.expand(20000, -1, -1, -1) for part in logits)
    scheduler = MaskedTokenScheduler(codebook_sizes=SIZES)
    scheduler.set_timesteps(1)
    tokens = scheduler.step(many, 0, all_hidden(20000, (1, 2)), generator=seeded()).prev_sample
    for book, size in enumerate(SIZES):
        for place in range(2):
            found = torch.bincount(tokens[:, book, 0, place], minlength=size) / len(tokens)
            expected = logits[book][0, :, 0, place].float().softmax(0)
            assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / len(tokens))


def test_confidences_are_the_logarithms_of_the_probabilities_in_float32():
    logits = random_logits(dtype=torch.bfloat16)
    tokens, confidences = draw_tokens(logits, seeded())
    assert confidences.dtype == torch.float32
    for book, part in enumerate(logits):
        expected = part.float().log_softmax(1).gather(1, tokens[:, book : book + 1])[:, 0]
        torch.testing.assert_close(confidences[:, book], expected)


def test_lowest_marks_exactly_so_many_whatever_the_ties():
    scores, among = torch.zeros(3, 6), torch.tensor([True, False, True, True, False, True]).expand(3, -1)
    marked = lowest(scores, among, torch.tensor([0, 2, 9]))
    assert marked.sum(1).tolist() == [0, 2, 4] and not marked[:, [1, 4]].any()


def test_it_is_saved_and_loaded(tmp_path):
    MaskedTokenScheduler(
        codebook_sizes=SIZES, order="halton", units="books", masking_schedule="linear"
    ).save_pretrained(tmp_path)
    loaded = MaskedTokenScheduler.from_pretrained(tmp_path)
    assert tuple(loaded.config.codebook_sizes) == SIZES
    assert (loaded.config.order, loaded.config.units, loaded.config.masking_schedule) == ("halton", "books", "linear")
    assert loaded.order == 1
    other = MaskedTokenScheduler.from_config(loaded.config, units="tokens")
    assert (tuple(other.config.codebook_sizes), other.config.order, other.config.units) == (SIZES, "halton", "tokens")
    assert not loaded.hidden(run(loaded, 3, generator=seeded())[-1]).any()


def test_wrong_arguments_are_named():
    for name, value in {"order": "raster", "units": "rows", "masking_schedule": "sine", "codebook_sizes": ()}.items():
        with pytest.raises(ValueError, match=f"`{name}` must"):
            MaskedTokenScheduler(**{"codebook_sizes": SIZES, name: value})
    scheduler = MaskedTokenScheduler(codebook_sizes=SIZES)
    with pytest.raises(ValueError, match="`set_timesteps`"):
        scheduler.step(random_logits(), 0, all_hidden())
    with pytest.raises(ValueError, match="`num_inference_steps`"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="`temperature`"):
        scheduler.set_timesteps(4, temperature=(1, -1))
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`timestep`"):
        scheduler.step(random_logits(), 4, all_hidden())
    with pytest.raises(ValueError, match="`sample` must have shape"):
        scheduler.step(random_logits(), 3, all_hidden()[:, :1])
    with pytest.raises(ValueError, match="`model_output` must have the shapes"):
        scheduler.step(random_logits()[:1], 3, all_hidden())
