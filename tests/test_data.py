"""Batches are a function of (seed, position) alone: not of workers, processes, resumes or global generators."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from dualcodebook_hf.image_datasets import ImageSplit
from dualcodebook_hf.image_processing_dualcodebook import LARGEST_ENLARGEMENT, BadImageError, center_crop
from dualcodebook_hf.training.arguments import DataArguments
from dualcodebook_hf.training.data import (
    ImageTransform,
    TrainingBatches,
    TrainingImages,
    TrainingLoader,
    ValidationImages,
)

COUNT = 11
SIDE = 8
SIZES = (0, [0, 20])  # of `resize`


def draw(number: int, width: int = 14, height: int = 10) -> Image.Image:
    """Images whose red is their number; green and blue tell column and row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = number
    pixels[..., 1] = np.arange(width) * 10
    pixels[..., 2] = np.arange(height)[:, None] * 10
    return Image.fromarray(pixels)


def encode(image: Image.Image) -> dict[str, object]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture(scope="module")
def table() -> datasets.Dataset:
    rows = [encode(draw(number)) for number in range(COUNT)]
    return datasets.Dataset.from_dict(
        {"image": rows}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )


@pytest.fixture(scope="module")
def folder(table, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("pictures")
    for split in ("train", "validation"):
        table.to_parquet(path / f"{split}-00000-of-00001.parquet")
    return str(path)


@pytest.fixture(params=["table", "stream"])
def dataset(request, table) -> datasets.Dataset | datasets.IterableDataset:
    return table if request.param == "table" else table.to_iterable_dataset(num_shards=3)


def batches(
    data, count: int, workers: int = 0, name: str = "x", resize=0, **arguments
) -> list[dict[str, torch.Tensor]]:
    transform = ImageTransform(SIDE, resize=resize, horizontal_flip=True, seed=3)
    defaults = {"batch_size": 4, "seed": 3, "shuffle_buffer": 5}
    stream = TrainingBatches(
        [ImageSplit(rows, name) for rows in (data if isinstance(data, tuple) else (data,))],
        transform,
        **defaults | arguments,
    )
    return list(itertools.islice(TrainingLoader(stream, num_workers=workers), count))


def assert_equal(first: list[dict[str, torch.Tensor]], second: list[dict[str, torch.Tensor]]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


def joined(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([batch[name] for batch in found]) for name in found[0]}


def numbers(pixel_values: torch.Tensor) -> list[int]:
    """Which images these crops show."""
    return ((pixel_values[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def test_a_batch_has_the_documented_shapes_types_and_range(dataset):
    (batch,) = batches(dataset, 1)
    assert batch["pixel_values"].shape == (4, 3, SIDE, SIDE)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].abs().max() <= 1
    assert batch["index"].shape == (4,)
    assert batch["index"].dtype == torch.int64


def test_every_image_comes_exactly_once_per_epoch_across_batch_boundaries(dataset):
    found = joined(batches(dataset, 9))  # 36 samples of epochs of 11
    orders = [numbers(found["pixel_values"][start : start + COUNT]) for start in range(0, 3 * COUNT, COUNT)]
    for order in orders:
        assert sorted(order) == list(range(COUNT))
    assert orders[0] != orders[1] != orders[2]


def test_the_index_is_the_row_of_a_table_and_the_number_in_the_epoch_of_a_stream(table):
    found = joined(batches(table, 5))
    assert found["index"].tolist() == numbers(found["pixel_values"])
    assert joined(batches(table.to_iterable_dataset(), 5))["index"][:13].tolist() == [*range(COUNT), 0, 1]


def test_a_tables_order_is_the_documented_permutation(table):
    found = joined(batches(table, 5))
    expected = [*np.random.default_rng([3, 0]).permutation(COUNT), *np.random.default_rng([3, 1]).permutation(COUNT)]
    assert found["index"].tolist() == expected[:20]


def test_another_seed_gives_another_order(dataset):
    orders = {tuple(numbers(joined(batches(dataset, 2, seed=seed))["pixel_values"])) for seed in range(4)}
    assert len(orders) == 4


def test_the_stream_equals_its_own_replay(dataset):
    assert_equal(batches(dataset, 6), batches(dataset, 6))


@pytest.mark.parametrize("resize", SIZES)
def test_two_processes_together_equal_one_with_the_doubled_batch(dataset, resize):
    halves = [batches(dataset, 5, batch_size=2, rank=rank, world_size=2, resize=resize) for rank in range(2)]
    together = [joined(list(pair)) for pair in zip(*halves, strict=True)]
    assert_equal(together, batches(dataset, 5, batch_size=4, resize=resize))


@pytest.mark.parametrize("resize", SIZES)
@pytest.mark.parametrize("start", [4, 8, 12, 24, 7])
def test_a_stream_that_starts_later_is_the_tail_of_the_whole(dataset, start, resize):
    whole = joined(batches(dataset, 10, resize=resize))
    tail = joined(batches(dataset, 3, start=start, resize=resize))
    for name, value in tail.items():
        assert torch.equal(value, whole[name][start : start + 12]), name


def test_resuming_with_other_processes_and_batches_continues_the_same_sequence(dataset):
    whole = joined(batches(dataset, 6))
    halves = [batches(dataset, 2, batch_size=3, rank=rank, world_size=2, start=8) for rank in range(2)]
    tail = joined([joined(list(pair)) for pair in zip(*halves, strict=True)])
    assert torch.equal(tail["pixel_values"], whole["pixel_values"][8:20])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(dataset, workers):
    arguments = {"start": 5, "resize": SIZES[1]}
    assert_equal(batches(dataset, 6, workers=workers, **arguments), batches(dataset, 6, **arguments))


@pytest.mark.parametrize("resize", SIZES)
def test_the_cache_changes_nothing(table, resize):
    assert_equal(batches(table, 7, cache=True, resize=resize), batches(table, 7, resize=resize))


def test_global_generators_are_neither_drawn_from_nor_listened_to(folder):
    images = TrainingImages(DataArguments(dataset=folder, resolution=SIDE, num_workers=0), seed=1)
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = list(itertools.islice(images.loader(batch_size=3), 4))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    torch.manual_seed(1)
    np.random.seed(1)
    assert_equal(list(itertools.islice(images.loader(batch_size=3), 4)), first)


def test_crops_and_mirror_images_depend_on_seed_epoch_and_index(table):
    image = draw(5, width=60, height=50)
    transform = ImageTransform(SIDE, horizontal_flip=True, seed=3)
    assert torch.equal(transform(image, 2, 7), transform(image, 2, 7))
    crops = [transform(image, *place) for place in [(2, 7), (2, 8), (3, 7)]]
    crops.append(ImageTransform(SIDE, horizontal_flip=True, seed=4)(image, 2, 7))
    assert all(not torch.equal(*pair) for pair in itertools.combinations(crops, 2))


def test_random_crops_reach_every_place_and_half_are_mirrored():
    transform = ImageTransform(SIDE, horizontal_flip=True)
    lefts, tops, mirrored = set(), set(), 0
    for index in range(300):
        crop = ((transform(draw(0), 0, index) + 1) * 12.75).round().int()
        columns, rows = crop[1, 0].tolist(), crop[2, :, 0].tolist()
        mirrored += columns[0] > columns[-1]
        assert sorted(columns) == list(range(min(columns), min(columns) + SIDE))
        lefts.add(min(columns))
        tops.add(rows[0])
    assert lefts == set(range(14 - SIDE + 1))
    assert tops == set(range(10 - SIDE + 1))
    assert 110 < mirrored < 190


def test_without_flip_nothing_is_mirrored_and_the_centre_crop_is_the_middle():
    crop = (ImageTransform(SIDE, crop="center")(draw(0), 4, 9) + 1) * 12.75
    assert crop[1, 0].round().int().tolist() == list(range(3, 3 + SIDE))
    assert crop[2, :, 0].round().int().tolist() == list(range(1, 1 + SIDE))


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, (14, 10)),
        ({"resize": 20}, (28, 20)),
        ({"resize": 8}, (11, 8)),
        ({"resize": 20, "resize_mode": "exact"}, (20, 20)),
    ],
)
def test_the_resize_before_the_crop(arguments, size):
    transform = ImageTransform(SIDE, **arguments)
    assert transform.resize(draw(0), transform.draw_size(0, 0)).shape == (size[1], size[0], 3)


def test_of_several_sizes_each_image_gets_one_at_random_and_its_crop_is_that_of_the_one_size():
    sizes = [0, 20, 30]
    several = ImageTransform(SIDE, resize=sizes, horizontal_flip=True, seed=3)
    drawn = [several.draw_size(2, index) for index in range(300)]
    assert all(80 < drawn.count(size) < 120 for size in sizes)
    assert drawn != [several.draw_size(3, index) for index in range(300)]
    for index, size in enumerate(drawn[:20]):
        alone = ImageTransform(SIDE, resize=size, horizontal_flip=True, seed=3)
        assert torch.equal(several(draw(0), 2, index), alone(draw(0), 2, index))


@pytest.mark.parametrize("resize", [[0, SIDE - 1], [-1], []])
def test_a_size_below_the_crop_and_no_size_are_refused(resize):
    with pytest.raises(ValueError, match="`resize` must"):
        ImageTransform(SIDE, resize=resize)


def test_validation_takes_the_first_of_several_sizes(folder):
    several = DataArguments(dataset=folder, validation_split="train", resolution=SIDE, resize=[20, 0])
    found, expected = (
        next(ValidationImages(arguments).batches(4)) for arguments in (several, dataclasses.replace(several, resize=20))
    )
    assert torch.equal(found, expected)
    assert not torch.equal(found, next(ValidationImages(dataclasses.replace(several, resize=0)).batches(4)))


def test_the_resize_uses_the_filter_that_is_asked_for():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for name, resampling in (("bilinear", 2), ("bicubic", 3), ("lanczos", 1)):
        resized = ImageTransform(SIDE, resize=16, resize_mode="exact", resample=name).resize(image, 16)
        assert np.array_equal(resized, np.asarray(image.resize((16, 16), resampling)))


def test_smaller_images_are_enlarged_until_the_crop_fits():
    transform = ImageTransform(16)
    assert transform.resize(draw(0), 0).shape == (16, 22, 3)
    assert transform(draw(0, width=1, height=3)).shape == (3, 16, 16)


def test_the_authors_celebahq_setting_squeezes_the_whole_image_into_the_crop():
    transform = ImageTransform(SIDE, resize=SIDE, resize_mode="exact")
    expected = np.asarray(draw(3).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    assert np.array_equal(((transform(draw(3)) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), expected)


NO_IMAGES = {
    "broken": {"bytes": b"no image", "path": None},
    "empty": {"bytes": b"", "path": None},
    "null": None,
    "nothing": {"bytes": None, "path": None},
    "missing file": {"bytes": None, "path": "nowhere.png"},
    "address": {"bytes": None, "path": "http://example.invalid/a.png"},
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("value", NO_IMAGES.values(), ids=NO_IMAGES)
def test_an_unreadable_image_is_named_by_row_split_and_data_set_in_one_line(value, workers):
    with pytest.raises(BadImageError, match=r"^cannot read row 0 of 'birds' \(train\).*: .*$") as caught:
        batches([{"image": value}], 1, workers=workers, name="birds")
    assert (caught.value.dataset, caught.value.split, caught.value.row) == ("birds", "train", 0)
    assert "\n" not in str(caught.value)


def test_an_unreadable_image_of_a_stream_is_named_by_its_file_or_the_hash_of_its_bytes(table):
    broken = b"no image"
    for path, name in ((None, hashlib.sha256(broken).hexdigest()), ("a.png", "'a.png'")):
        rows = with_rows(table, {4: {"bytes": broken, "path": path}}).to_iterable_dataset()
        with pytest.raises(BadImageError, match=name) as caught:
            batches(rows, 3)
        assert caught.value.row is None


BAD = {3: NO_IMAGES["broken"], 7: NO_IMAGES["null"], 8: NO_IMAGES["empty"]}


def with_rows(table: datasets.Dataset, rows: dict[int, object]) -> datasets.Dataset:
    """The table with other values in some of its rows."""
    values = [rows.get(index, row["image"]) for index, row in enumerate(table)]
    return datasets.Dataset.from_dict({"image": values}, features=table.features)


@pytest.fixture(params=["table", "stream"])
def damaged(request, table) -> tuple[object, object]:
    """A whole data set, and the same with three rows that cannot be read."""
    pair = table, with_rows(table, BAD)
    return pair if request.param == "table" else tuple(rows.to_iterable_dataset(num_shards=3) for rows in pair)


def test_in_place_of_a_bad_image_comes_the_next_good_one_of_the_sequence(damaged):
    whole, broken = damaged
    sequence = numbers(joined(batches(whole, 15))["pixel_values"])
    found = joined(batches(broken, 12, on_bad_image="skip"))
    expected = [next(number for number in sequence[place:] if number not in BAD) for place in range(48)]
    assert numbers(found["pixel_values"]) == expected


@pytest.mark.parametrize("resize", SIZES)
def test_what_is_not_replaced_is_as_without_bad_images(damaged, resize):
    whole, broken = (joined(batches(data, 12, on_bad_image="skip", resize=resize)) for data in damaged)
    kept = [number not in BAD for number in numbers(whole["pixel_values"])]
    assert torch.equal(whole["pixel_values"][kept], broken["pixel_values"][kept])
    assert_equal(batches(damaged[0], 5, on_bad_image="skip"), batches(damaged[0], 5))


def test_the_index_of_a_replaced_sample_is_that_of_the_row_which_is_shown(table):
    found = joined(batches(with_rows(table, BAD), 6, on_bad_image="skip"))
    assert found["index"].tolist() == numbers(found["pixel_values"])


def test_a_replaced_sample_has_a_crop_of_its_own(table):
    """The same image twice in a row, cropped alike, would be no sample at all."""
    wide = [encode(draw(number, width=90, height=80)) for number in range(COUNT)]
    found = joined(batches(with_rows(table, {**dict(enumerate(wide)), **BAD}), 9, on_bad_image="skip"))
    shown = numbers(found["pixel_values"])
    pairs = [place for place in range(len(shown) - 1) if shown[place] == shown[place + 1]]
    assert pairs
    assert all(not torch.equal(*found["pixel_values"][place : place + 2]) for place in pairs)


@pytest.mark.parametrize("workers", [1, 2])
def test_skipping_does_not_depend_on_workers(damaged, workers):
    options = {"on_bad_image": "skip", "start": 5}
    assert_equal(batches(damaged[1], 6, workers=workers, **options), batches(damaged[1], 6, **options))


def test_skipping_does_not_depend_on_processes_nor_on_where_a_run_was_resumed(damaged):
    broken, options = damaged[1], {"on_bad_image": "skip"}
    whole = batches(broken, 9, **options)
    halves = [batches(broken, 9, batch_size=2, rank=rank, world_size=2, **options) for rank in range(2)]
    assert_equal([joined(list(pair)) for pair in zip(*halves, strict=True)], whole)
    whole = joined(whole)["pixel_values"]
    for start in range(0, 24):
        tail = joined(batches(broken, 3, start=start, **options))["pixel_values"]
        assert torch.equal(tail, whole[start : start + 12])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_bad_image_is_named_once_over_all_epochs(table, capsys, workers):
    batches(with_rows(table, BAD), 12, workers=workers, on_bad_image="skip", name="birds")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(BAD)
    for row in BAD:
        assert sum(f"row {row} of 'birds' (train)" in line for line in lines) == 1


def test_too_many_bad_images_end_the_run(table):
    rows = [table[number % COUNT] if number % 4 else {"image": None} for number in range(100)]
    with pytest.raises(BadImageError, match=r"row \d+ of 'birds' .* 11 of \d\d images cannot be read.* too many"):
        batches(rows, 25, on_bad_image="skip", name="birds")
    with pytest.raises(BadImageError, match="too many in a row"):
        batches([{"image": None}] * 5, 1, on_bad_image="skip")


def test_few_bad_images_do_not_add_up_over_the_epochs(table):
    assert len(batches(with_rows(table, BAD), 40, on_bad_image="skip")) == 40


def test_an_unknown_policy_is_refused(table):
    with pytest.raises(ValueError, match="`on_bad_image` must be one of error, skip, got 'ignore'"):
        batches(table, 1, on_bad_image="ignore")
    with pytest.raises(ValueError, match="`on_bad_image` must be one of error, skip, got 'ignore'"):
        DataArguments(dataset="x", on_bad_image="ignore").check()


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_validation_images_are_left_out_and_named_once(table, tmp_path, streaming, capsys):
    with_rows(table, BAD).to_parquet(tmp_path / "validation-00000-of-00001.parquet")
    arguments = {"dataset": str(tmp_path), "resolution": SIDE, "streaming": streaming}
    with pytest.raises(BadImageError, match=r"row 3 of '.*' \(validation\)"):
        list(ValidationImages(DataArguments(**arguments)).batches(4))
    images = ValidationImages(DataArguments(**arguments, on_bad_image="skip"))
    capsys.readouterr()
    for _ in range(2):
        found = list(images.batches(3))
        assert numbers(torch.cat(found)) == [number for number in range(COUNT) if number not in BAD]
        assert [len(batch) for batch in found] == [3, 3, 2]
        assert [error.row for error in images.skipped] == list(BAD)
    assert capsys.readouterr().err.count("left out: cannot read row") == len(BAD)


def test_a_validation_split_without_a_readable_image_is_an_error(table, tmp_path):
    with_rows(table.select([0, 1]), {0: None, 1: NO_IMAGES["broken"]}).to_parquet(tmp_path / "validation.parquet")
    images = ValidationImages(DataArguments(dataset=str(tmp_path), resolution=SIDE, on_bad_image="skip"))
    with pytest.raises(BadImageError, match="row 1"):
        list(images.batches(4))


@pytest.mark.parametrize("size", [(1, 60000), (60000, 1)])
def test_of_an_image_too_long_to_be_enlarged_the_middle_is_taken(size):
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values)
    around = center_crop(image, tuple(min(side, 40) for side in size[::-1]))
    for options in ({}, {"resize": 300}):
        transform = ImageTransform(256, crop="center", **options)
        assert transform.resize(image, transform.draw_size(0, 0)).nbytes <= 3 * LARGEST_ENLARGEMENT
        assert (transform(image) - transform(around)).abs().max() <= 2 / 255


def test_a_data_set_without_images_is_refused(table):
    for empty in (table.select([]), table.to_iterable_dataset().take(0)):
        with pytest.raises(ValueError, match="no images in 'birds'"):
            batches(empty, 1, name="birds")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"rank": 2, "world_size": 2}, r"`rank` must lie in \[0, world_size=2\), got 2"),
        ({"start": -1}, "`start` must be at least 0, got -1"),
        ({"seed": -1}, "`seed` must be at least 0, got -1"),
    ],
)
def test_arguments_out_of_range_are_refused_by_name(table, arguments, message):
    with pytest.raises(ValueError, match=message):
        batches(table, 1, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolution": 0}, "`resolution`"),
        ({"resolution": 8, "resize": 4}, "`resize` must be 0 or at least resolution=8, got 4"),
        ({"resolution": 8, "resize_mode": "longer"}, "`resize_mode`"),
        ({"resolution": 8, "crop": "left"}, "`crop`"),
        ({"resolution": 8, "resample": "sharp"}, "`resample`"),
        ({"resolution": 8, "seed": -1}, "`seed`"),
    ],
)
def test_transforms_out_of_range_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageTransform(**arguments)


def test_a_stream_cannot_be_cached(table):
    with pytest.raises(ValueError, match="`cache` must be off for a streamed data set"):
        batches(table.to_iterable_dataset(), 1, cache=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_training_images_follow_their_arguments(folder, streaming):
    args = DataArguments(
        dataset=folder, streaming=streaming, max_train_samples=5, resolution=SIDE, crop="center", num_workers=0
    )
    images = TrainingImages(args, seed=1)
    found = joined(list(itertools.islice(images.loader(batch_size=5), 2)))
    assert sorted(numbers(found["pixel_values"][:5])) == sorted(numbers(found["pixel_values"][5:])) == list(range(5))
    assert torch.equal(images.first(7), found["pixel_values"][:7])
    resumed = next(iter(images.loader(batch_size=2, start=4, rank=1, world_size=2)))
    assert torch.equal(resumed["pixel_values"], found["pixel_values"][6:8])


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_images_are_centre_crops_in_order_and_always_the_same(folder, streaming):
    args = DataArguments(dataset=folder, streaming=streaming, resolution=SIDE, num_workers=0)
    images = ValidationImages(args)
    found = list(images.batches(4))
    assert [len(batch) for batch in found] == [4, 4, 3]
    assert numbers(torch.cat(found)) == list(range(COUNT))
    expected = [ImageTransform(SIDE, crop="center")(draw(number)) for number in range(COUNT)]
    assert torch.equal(torch.cat(found), torch.stack(expected))
    assert torch.equal(torch.cat(list(images.batches(11))), torch.cat(found))


def test_some_validation_images_are_spread_over_the_split_and_of_a_stream_the_first(folder):
    args = {"dataset": folder, "resolution": SIDE}
    assert numbers(torch.cat(list(ValidationImages(DataArguments(**args), 4).batches(3)))) == [0, 2, 5, 8]
    streamed = ValidationImages(DataArguments(**args, streaming=True), 4)
    assert numbers(torch.cat(list(streamed.batches(3)))) == [0, 1, 2, 3]
    assert len(torch.cat(list(ValidationImages(DataArguments(**args), 100).batches(3)))) == COUNT


def test_validation_mirrors_some_images_where_asked_to_and_always_the_same_ones(folder):
    args = DataArguments(dataset=folder, resolution=SIDE, validation_horizontal_flip=True)
    first, again = (torch.cat(list(ValidationImages(args).batches(4))) for _ in range(2))
    plain = torch.cat(list(ValidationImages(DataArguments(dataset=folder, resolution=SIDE)).batches(4)))
    assert torch.equal(first, again)
    mirrored = [torch.equal(one, other.flip(-1)) for one, other in zip(first, plain, strict=True)]
    assert 0 < sum(mirrored) < COUNT
    assert all(torch.equal(first[i], plain[i]) for i in range(COUNT) if not mirrored[i])


OTHERS = 7


@pytest.fixture(scope="module")
def other_table() -> datasets.Dataset:
    """A second data set: images of another size, numbered on, beside another column."""
    rows = [encode(draw(COUNT + number, width=30, height=24)) for number in range(OTHERS)]
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": rows, "text": ["a"] * OTHERS}, features=features)


@pytest.fixture(params=["table", "stream"])
def two(request, table, other_table):
    pair = table, other_table
    return pair if request.param == "table" else tuple(rows.to_iterable_dataset(num_shards=2) for rows in pair)


def test_every_image_of_every_data_set_comes_exactly_once_per_epoch(two):
    found, whole = numbers(joined(batches(two, 9))["pixel_values"]), COUNT + OTHERS
    orders = [found[start : start + whole] for start in (0, whole)]
    assert [sorted(order) for order in orders] == [list(range(whole))] * 2
    assert orders[0] != orders[1]


def test_tables_are_shuffled_together_and_streams_give_a_row_in_turn(table, other_table):
    found = joined(batches((table, other_table), 4))
    assert found["index"].tolist() == numbers(found["pixel_values"])
    assert found["index"].tolist() == np.random.default_rng([3, 0]).permutation(COUNT + OTHERS).tolist()[:16]
    streams = tuple(rows.to_iterable_dataset() for rows in (table, other_table))
    first = [number < COUNT for number in numbers(joined(batches(streams, 4))["pixel_values"])]
    assert first == [True, False] * OTHERS + [True] * 2


def test_several_data_sets_depend_on_neither_workers_nor_processes_nor_the_place_of_a_resume(two):
    whole = batches(two, 9)
    assert_equal(batches(two, 9, workers=2), whole)
    halves = [batches(two, 9, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert_equal([joined(list(pair)) for pair in zip(*halves, strict=True)], whole)
    for start in (3, 16, 23):
        tail = joined(batches(two, 2, start=start))
        assert torch.equal(tail["pixel_values"], joined(whole)["pixel_values"][start : start + 8])


def test_a_bad_image_is_named_by_the_row_of_its_own_data_set(table, other_table):
    bad = other_table.map(lambda row, index: {"image": None if index == 2 else row["image"]}, with_indices=True)
    splits = [ImageSplit(table, "birds"), ImageSplit(bad, "fish", "test")]
    loader = TrainingLoader(TrainingBatches(splits, ImageTransform(SIDE), batch_size=COUNT + OTHERS))
    with pytest.raises(BadImageError, match=r"row 2 of 'fish' \(test\)"):
        next(iter(loader))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_arguments_name_several_data_sets_with_what_differs_between_them(folder, other_table, tmp_path, streaming):
    other_table.rename_column("image", "png").to_parquet(tmp_path / "test-00000-of-00001.parquet")
    args = DataArguments(
        dataset=[folder, str(tmp_path)],
        train_split=["train", "test"],
        validation_split=["validation", None],
        image_column=["image", "png"],
        streaming=streaming,
        resolution=SIDE,
        num_workers=0,
    )
    args.check()
    assert sorted(numbers(TrainingImages(args).first(COUNT + OTHERS))) == list(range(COUNT + OTHERS))
    assert numbers(torch.cat(list(ValidationImages(args).batches(4)))) == list(range(COUNT))
    both = dataclasses.replace(args, validation_split=["validation", "test"])
    shown = numbers(torch.cat(list(ValidationImages(both, 6).batches(4))))
    assert shown == ([0, COUNT, 1, COUNT + 1, 2, COUNT + 2] if streaming else [0, 3, 6, 9, 12, 15])
    first = TrainingImages(dataclasses.replace(args, max_train_samples=2)).first(4)
    assert sorted(numbers(first)) == [0, 1, COUNT, COUNT + 1]


def test_what_is_not_one_for_each_data_set_is_refused_by_name():
    for name in ("dataset_config", "train_split", "validation_split", "image_column"):
        with pytest.raises(ValueError, match=f"`{name}` must be one, or one for each .* 2, got 3"):
            DataArguments(dataset=["a", "b"], **{name: ["x", "y", "z"]}).check()
