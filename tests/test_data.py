"""Batches are a function of (seed, position) alone: not of workers, processes, resumes or global generators."""

from __future__ import annotations

import io
import itertools

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dualcodebook_hf.training.arguments import DataArguments
from dualcodebook_hf.training.data import ImageTransform, TrainingBatches, TrainingImages, ValidationImages

COUNT = 11
SIDE = 8


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


def batches(dataset, count: int, workers: int = 0, **arguments) -> list[dict[str, torch.Tensor]]:
    transform = ImageTransform(SIDE, horizontal_flip=True, seed=3)
    defaults = {"batch_size": 4, "seed": 3, "shuffle_buffer": 5}
    stream = TrainingBatches(dataset, transform, **defaults | arguments)
    return list(itertools.islice(DataLoader(stream, batch_size=None, num_workers=workers), count))


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


def test_two_processes_together_equal_one_with_the_doubled_batch(dataset):
    halves = [batches(dataset, 5, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    together = [joined(list(pair)) for pair in zip(*halves, strict=True)]
    assert_equal(together, batches(dataset, 5, batch_size=4))


@pytest.mark.parametrize("start", [4, 8, 12, 24, 7])
def test_a_stream_that_starts_later_is_the_tail_of_the_whole(dataset, start):
    whole, tail = joined(batches(dataset, 10)), joined(batches(dataset, 3, start=start))
    for name, value in tail.items():
        assert torch.equal(value, whole[name][start : start + 12]), name


def test_resuming_with_other_processes_and_batches_continues_the_same_sequence(dataset):
    whole = joined(batches(dataset, 6))
    halves = [batches(dataset, 2, batch_size=3, rank=rank, world_size=2, start=8) for rank in range(2)]
    tail = joined([joined(list(pair)) for pair in zip(*halves, strict=True)])
    assert torch.equal(tail["pixel_values"], whole["pixel_values"][8:20])


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_changes_nothing(dataset, workers):
    assert_equal(batches(dataset, 6, workers=workers, start=5), batches(dataset, 6, start=5))


def test_the_cache_changes_nothing(table):
    assert_equal(batches(table, 7, cache=True), batches(table, 7))


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
    assert ImageTransform(SIDE, **arguments).resize(draw(0)).shape == (size[1], size[0], 3)


def test_the_resize_uses_the_filter_that_is_asked_for():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    for name, resampling in (("bilinear", 2), ("bicubic", 3), ("lanczos", 1)):
        resized = ImageTransform(SIDE, resize=16, resize_mode="exact", resample=name).resize(image)
        assert np.array_equal(resized, np.asarray(image.resize((16, 16), resampling)))


def test_smaller_images_are_enlarged_until_the_crop_fits():
    transform = ImageTransform(16)
    assert transform.resize(draw(0)).shape == (16, 22, 3)
    assert transform(draw(0, width=1, height=3)).shape == (3, 16, 16)


def test_the_authors_celebahq_setting_squeezes_the_whole_image_into_the_crop():
    transform = ImageTransform(SIDE, resize=SIDE, resize_mode="exact")
    expected = np.asarray(draw(3).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    assert np.array_equal(((transform(draw(3)) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), expected)


def test_an_unreadable_image_is_named_by_index_and_data_set():
    rows = [encode(draw(0)), {"bytes": b"no image", "path": None}, {"bytes": None, "path": None}]
    for broken in (1, 2):
        with pytest.raises(ValueError, match="image 0 of birds cannot be read"):
            batches([{"image": rows[broken]}], 1, name="birds")


def test_a_worker_reports_an_unreadable_image_as_the_main_process_does():
    with pytest.raises(ValueError, match="image 0 of birds cannot be read"):
        batches([{"image": {"bytes": b"no image", "path": None}}], 1, workers=1, name="birds")


def test_a_data_set_without_images_is_refused(table):
    for empty in (table.select([]), table.to_iterable_dataset().take(0)):
        with pytest.raises(ValueError, match="birds has no images"):
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
