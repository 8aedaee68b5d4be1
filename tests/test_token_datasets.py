"""Whole data sets to tokens and back: what a shard holds depends on its number alone, and other programs read it."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from dualcodebook_hf import DualCodebookVQModel
from dualcodebook_hf.cli import main
from dualcodebook_hf.cli.main import build_parser
from dualcodebook_hf.cli.tokenize_dataset import _job
from dualcodebook_hf.image_processing_dualcodebook import to_pixels
from dualcodebook_hf.loading import load_tokenizer_with_hash
from dualcodebook_hf.pil_images import BadImageError, center_crop, read_image
from dualcodebook_hf.tokens.augment import KINDS, Augmentation
from dualcodebook_hf.tokens.dataset import TokenDataset, read_summary
from dualcodebook_hf.tokens.detokenizing import ShardDetokenizer
from dualcodebook_hf.tokens.export import FORMS, export_tokens
from dualcodebook_hf.tokens.source import TokenSource
from dualcodebook_hf.tokens.tokenizing import TokenizeJob
from dualcodebook_hf.weights import encoder_hash

datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")

COUNT, SIZE = 11, 16
MODEL = {**TINY, "global_transformer_layers": 0}


def picture(number: int) -> Image.Image:
    """Images of three sizes."""
    values = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(values).resize([(33, 21), (17, 40), (16, 16)][number % 3])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    torch.manual_seed(0)
    model = DualCodebookVQModel(**MODEL)
    for codebook in model.quantize.codebooks.values():
        codebook.set_codes(torch.randn(codebook.size, codebook.dim) * 0.3)
    model.save_pretrained(folder := tmp_path_factory.mktemp("model"))
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of images in folders of their classes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(COUNT):
        place = root / "train" / ("dog" if number >= 6 else "cat")
        place.mkdir(parents=True, exist_ok=True)
        picture(number).save(place / f"{number:02}.png")
    return root


def job_of(dataset: Path, output: Path, checkpoint: str, **changes) -> TokenizeJob:
    columns = changes.pop("columns", ("label",))
    options = {name: changes.pop(name) for name in ("streaming", "image_column") if name in changes}
    source = TokenSource(dataset=str(dataset), columns=columns, **options)
    settings = {"augmentation": Augmentation(size=SIZE), "num_shards": 3, "batch_size": 4, "workers": 2, **changes}
    return TokenizeJob(source=source, output=str(output), model=checkpoint, device="cpu", **settings)


def write(job: TokenizeJob, shards=None):
    tokenizer = job.prepare()
    missing = tokenizer.info.missing(Path(job.output))
    return [tokenizer.write(shard) for shard in (missing if shards is None else shards)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def written(photos, checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens") / "out"
    write(job_of(photos, folder, checkpoint))
    return folder


def test_load_dataset_reads_tokens_sizes_and_labels_with_their_names(written, checkpoint):
    rows = datasets.load_dataset(str(written), split="train")
    assert rows.features["tokens"] == datasets.Array4D((1, 2, SIZE // 2, SIZE // 2), "uint16")
    assert rows.features["label"] == datasets.ClassLabel(names=["cat", "dog"])
    assert rows["id"] == [str(number) for number in range(COUNT)]
    assert rows["label"] == [0] * 6 + [1] * 5
    model = DualCodebookVQModel.from_pretrained(checkpoint).eval()
    for number, row in enumerate(rows.with_format("numpy")):
        image = picture(number)
        assert (row["height"], row["width"]) == image.size[::-1]
        scale = SIZE / min(image.size)
        small = image.resize((max(16, int(image.width * scale)), max(16, int(image.height * scale))), Image.LANCZOS)
        crop = center_crop(small, SIZE)
        expected = model.tokenize(to_pixels(crop)[None])
        assert np.array_equal(row["tokens"], expected.numpy())
        box = row["crop"][0]
        assert box[2] - box[0] == pytest.approx(SIZE * image.width / small.width)
        assert not row["flip"][0]


def test_the_metadata_says_which_weights_made_the_tokens_and_stands_in_every_shard(written, checkpoint):
    info = json.loads((written / "tokens.json").read_text())
    assert info["weights_sha256"] == encoder_hash(DualCodebookVQModel.from_pretrained(checkpoint))
    assert info["books"] == {"global": 32, "local": 16} and info["bits_per_position"] == 9
    for path in TokenDataset(written).shards:
        assert json.loads(pq.read_metadata(path).metadata[b"dualcodebook_tokens"]) == info


def test_no_folder_of_this_machine_gets_into_the_data_set(written, photos):
    assert all(str(photos.parent).encode() not in content for content in contents(written).values())


def test_shards_are_the_same_in_any_order_by_any_process_and_after_any_end(written, photos, checkpoint, tmp_path):
    job = job_of(photos, tmp_path / "a", checkpoint, workers=1)
    write(job, [2])
    (tmp_path / "a/data/.train-00000-of-00003.parquet.123.partial").write_bytes(b"half of it")  # of a killed process
    write(replace(job, workers=3), [0])
    assert write(job)[0].number == 1  # what is missing, alone
    assert contents(tmp_path / "a") == contents(written)


def test_a_process_that_finishes_a_shard_which_another_one_writes_does_no_harm(photos, written, checkpoint, tmp_path):
    job = job_of(photos, tmp_path / "out", checkpoint)
    first, second, finished = job.prepare(), job.prepare(), []
    first.write(0, lambda: finished or finished.append(second.write(0)))
    write(job)
    assert contents(tmp_path / "out") == contents(written)


def test_a_shard_that_fails_leaves_nothing(photos, checkpoint, tmp_path):
    broken = shutil.copytree(photos, tmp_path / "broken")
    (broken / "train/dog/08.png").write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"row 8 .*08\.png"):
        write(job_of(broken, tmp_path / "out", checkpoint))
    assert sorted(path.name for path in (tmp_path / "out/data").iterdir()) == [
        f"train-0000{shard}-of-00003.parquet" for shard in (0, 1)
    ]


def test_bad_images_are_left_out_named_and_recorded(photos, written, checkpoint, tmp_path):
    broken = shutil.copytree(photos, tmp_path / "broken")
    (broken / "train/dog/08.png").write_bytes(b"no image")
    shards = write(job_of(broken, tmp_path / "out", checkpoint, on_bad_image="skip"))
    assert [(shard.rows, len(shard.skipped)) for shard in shards] == [(3, 0), (4, 0), (3, 1)]
    (skipped,) = read_summary(TokenDataset(tmp_path / "out").shards[2]).skipped
    assert (skipped["id"], skipped["file"]) == ("8", "08.png")
    rows, whole = (list(TokenDataset(folder).rows()) for folder in (tmp_path / "out", written))
    assert [row["id"] for row in rows] == [row["id"] for row in whole if row["id"] != "8"]


@pytest.mark.parametrize(
    "changes",
    [
        {"augmentation": Augmentation(size=SIZE, kind="ten-crop")},
        {"num_shards": 2},
        {"batch_size": 2},
        {"columns": ()},
        {"on_bad_image": "skip"},
    ],
)
def test_a_data_set_is_not_continued_with_other_settings(written, photos, checkpoint, changes):
    before = contents(written)
    with pytest.raises(ValueError, match=r"`output`: .* holds tokens that were made otherwise: .* there, .* here"):
        job_of(photos, written, checkpoint, **changes).prepare()
    assert contents(written) == before


def test_a_data_set_is_not_continued_with_other_weights_nor_with_other_images(written, photos, checkpoint, tmp_path):
    other = DualCodebookVQModel.from_pretrained(checkpoint)
    other.encoder.conv_in.bias.data += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="weights_sha256"):
        job_of(photos, written, str(tmp_path / "other")).prepare()
    more = shutil.copytree(photos, tmp_path / photos.name)
    picture(50).save(more / "train/dog/50.png")
    with pytest.raises(ValueError, match=r"'rows': 11.* there.*'rows': 12.* here"):
        job_of(more, written, checkpoint).prepare()


def test_the_number_of_shards_is_one_for_each_10_000_rows(photos, checkpoint, tmp_path):
    assert job_of(photos, tmp_path / "out", checkpoint, num_shards=None).prepare().info.num_shards == 1
    with pytest.raises(ValueError, match="`num_shards` must be at most 11, the rows of"):
        job_of(photos, tmp_path / "more", checkpoint, num_shards=12).prepare()


def test_only_a_few_images_are_read_ahead(photos, checkpoint, tmp_path, monkeypatch):
    """Memory does not grow with the data set."""
    tokenizer = job_of(photos, tmp_path / "out", checkpoint, num_shards=1).prepare()
    read, source = [], tokenizer.source.rows(0, 1)
    endless = itertools.cycle(list(source))
    monkeypatch.setattr(type(tokenizer.source), "rows", lambda *_: (read.append(0) or row for row in endless))
    decoded = tokenizer._decoded(0)
    for taken in range(1, 100):
        next(decoded)
        assert len(read) - taken <= 3 * 4 + 2
    decoded.close()


# --- other sources


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> Path:
    """The same images as webdataset tars of 4, 4 and 3."""
    root = tmp_path_factory.mktemp("tars")
    for start in range(0, COUNT, 4):
        with tarfile.open(root / f"train-{start // 4:03}.tar", "w") as tar:
            for number in range(start, min(start + 4, COUNT)):
                buffer = io.BytesIO()
                picture(number).save(buffer, "PNG")
                for suffix, data in (("png", buffer.getvalue()), ("cls", str(int(number >= 6)).encode())):
                    info = tarfile.TarInfo(f"{number:03}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return root


@pytest.mark.parametrize("streaming", [False, True])
def test_tars_give_the_same_tokens_and_a_stream_a_shard_for_each_file(tars, written, checkpoint, tmp_path, streaming):
    job = job_of(
        tars, tmp_path / "out", checkpoint, image_column="png", columns=("cls",), streaming=streaming, num_shards=None
    )
    shards = write(job)
    assert [shard.rows for shard in shards] == ([4, 4, 3] if streaming else [11])
    rows, whole = (list(TokenDataset(folder).rows()) for folder in (tmp_path / "out", written))
    assert all(np.array_equal(one["tokens"], other["tokens"]) for one, other in zip(rows, whole, strict=True))
    assert [row["cls"] for row in rows] == [row["label"] for row in whole]
    assert rows[5]["id"] == ("1-1" if streaming else "5")
    if streaming:
        with pytest.raises(ValueError, match="`num_shards` must be at most 3, the files of"):
            replace(job, num_shards=4).prepare()


def test_columns_that_are_not_there_are_refused_by_name(photos, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"`columns` must be among \['label'\].* got 'text'"):
        job_of(photos, tmp_path / "out", checkpoint, columns=("text",)).prepare()
    assert not (tmp_path / "out").exists()


# --- crops


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(pixels)


def test_ten_crops_are_the_corners_and_the_centre_and_those_of_the_mirror_image():
    image = ramp(44, 40)
    crops = Augmentation(kind="ten-crop", size=32, crop_ranges=(1.25,))(image)
    square = np.asarray(image)[:, 2:42]

    def five(pixels):
        places = [(0, 0), (8, 0), (0, 8), (8, 8), (4, 4)]
        return [pixels[top : top + 32, left : left + 32] for left, top in places]

    assert np.array_equal(crops.pixels, np.stack(five(square) + five(square[:, ::-1])))
    assert crops.flips.tolist() == [False] * 5 + [True] * 5


@pytest.mark.parametrize("kind", ["center", "center-flip", "ten-crop", "random-crop"])
def test_boxes_say_where_a_crop_was_cut(kind):
    """Of an image that is enlarged twice: a crop's colours are those of its box."""
    augmentation = Augmentation(kind=kind, size=60, crop_ranges=(1.5,), crops=20, resample="bilinear")
    image = ramp(50, 40)
    crops = augmentation(image, key=(3,))
    assert len(crops.pixels) == augmentation.count
    for pixels, box, flip in zip(crops.pixels, crops.boxes, crops.flips, strict=True):
        pixels = pixels[:, ::-1] if flip else pixels
        assert np.allclose([pixels[30, 30, 0], pixels[30, 30, 1]], [box[0::2].mean(), box[1::2].mean()], atol=1.5)
        assert box[0] >= 0 and box[1] >= 0 and box[2] <= 50.01 and box[3] <= 40.01


def test_several_ranges_give_ten_crops_each():
    image, ranges = ramp(70, 50), (1.1, 1.05)
    both = Augmentation(kind="ten-crop", size=32, crop_ranges=ranges)(image).pixels
    single = [Augmentation(kind="ten-crop", size=32, crop_ranges=(value,))(image).pixels for value in ranges]
    assert np.array_equal(both, np.concatenate(single))


def test_random_crops_depend_on_seed_and_key_alone():
    image, cut = ramp(90, 80), Augmentation(kind="random-crop", size=16, crops=4, crop_ranges=(2.0,))
    first = cut(image, (3, 5))
    assert all(np.array_equal(one, other) for one, other in zip(first, cut(image, (3, 5)), strict=True))
    others = [cut(image, (3, 6)), replace(cut, seed=1)(image, (3, 5))]
    assert all(not np.array_equal(first.boxes, other.boxes) for other in others)
    assert len({tuple(box) for box in first.boxes}) == 4
    assert np.array_equal(replace(cut, crops=9)(image, (3, 5)).boxes[:4], first.boxes)


def test_random_crops_do_not_depend_on_the_number_of_shards(photos, checkpoint, tmp_path):
    found = []
    for num_shards in (1, 4):
        folder = tmp_path / str(num_shards)
        augmentation = Augmentation(kind="random-crop", size=SIZE, crops=3, crop_ranges=(1.5,))
        write(job_of(photos, folder, checkpoint, augmentation=augmentation, num_shards=num_shards))
        found.append(list(TokenDataset(folder).rows()))
    for one, other in zip(*found, strict=True):
        assert one["tokens"].shape == (3, 2, SIZE // 2, SIZE // 2)
        assert np.array_equal(one["crop"], other["crop"]) and one["flip"] == other["flip"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "five-crop"}, "`augmentation` must be one of center, .* got 'five-crop'"),
        ({"crop_ranges": (0.9,)}, r"`crop_ranges` must be numbers in \[1, 4\], got \[0.9\]"),
        ({"crops": 0}, "`crops` must be at least 1, got 0"),
    ],
)
def test_crops_out_of_range_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**changes)


# --- the way back


def decode(tokens: Path, checkpoint: str, output: Path, **options) -> list[dict]:
    detokenizer = ShardDetokenizer(TokenDataset(tokens), *load_tokenizer_with_hash(checkpoint), output, **options)
    for shard in detokenizer.missing():
        detokenizer.write(shard)
    return list(datasets.load_dataset(str(output), split="train"))


def test_the_images_come_back_with_their_labels(written, checkpoint, tmp_path):
    model = DualCodebookVQModel.from_pretrained(checkpoint).eval()
    rows = decode(written, checkpoint, tmp_path / "images")
    for row, tokens in zip(rows, TokenDataset(written).rows(), strict=True):
        expected = model.detokenize(torch.from_numpy(tokens["tokens"].astype(np.int64)), size=(SIZE, SIZE))
        assert (to_pixels(row["image"]) - expected[0].clamp(-1, 1)).abs().max() <= 1.01 / 255
        assert (row["id"], row["label"]) == (tokens["id"], tokens["label"])


def test_images_are_not_continued_with_another_crop_or_another_decoder(ten_crops, checkpoint, tmp_path):
    decode(ten_crops.folder, checkpoint, tmp_path / "images", crop=1)
    before = contents(tmp_path / "images")
    with pytest.raises(ValueError, match=r"`output`: .*-00000-of-.* was made otherwise, by another crop$"):
        decode(ten_crops.folder, checkpoint, tmp_path / "images", crop=2)
    tokens, (model, sha256) = TokenDataset(ten_crops.folder), load_tokenizer_with_hash(checkpoint)
    model.decoder.conv_out.bias.data += 1e-3  # which decodes the same tokens
    with pytest.raises(ValueError, match=r"was made otherwise, by another model_sha256$"):
        ShardDetokenizer(tokens, model, sha256, tmp_path / "images", crop=1)
    assert contents(tmp_path / "images") == before


def test_whole_images_come_back_in_their_sizes(photos, checkpoint, tmp_path):
    write(job_of(photos, tmp_path / "tokens", checkpoint, augmentation=Augmentation(kind="none")))
    rows = decode(tmp_path / "tokens", checkpoint, tmp_path / "images")
    model = DualCodebookVQModel.from_pretrained(checkpoint).eval()
    for number, (row, stored) in enumerate(zip(rows, TokenDataset(tmp_path / "tokens").rows(), strict=True)):
        assert row["image"].size == picture(number).size
        assert np.array_equal(stored["tokens"], model.tokenize(to_pixels(picture(number))[None]).numpy())
    with pytest.raises(ValueError, match="whole images; memmap needs crops of one size"):
        export_tokens(TokenDataset(tmp_path / "tokens"), "memmap", tmp_path / "export")


def test_other_weights_are_refused_with_both_hashes(written, checkpoint, tmp_path):
    other = DualCodebookVQModel.from_pretrained(checkpoint).eval()
    other.encoder.conv_in.bias.data += 1e-3
    own, theirs = TokenDataset(written).info.weights_sha256, encoder_hash(other)
    with pytest.raises(ValueError, match=f"`model` must be .* of SHA-256 {own}; got one with SHA-256 {theirs}"):
        ShardDetokenizer(TokenDataset(written), other, theirs, tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_a_data_set_with_a_missing_shard_is_refused_and_told_how_to_go_on(written, tmp_path):
    part = shutil.copytree(written, tmp_path / "part")
    (part / "data/train-00001-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match=r"of the 3 shards .* 1 are missing \(1\): run the same `tokenize-dataset`"):
        TokenDataset(part)


def test_the_hash_of_weights_is_that_of_their_values_in_every_file_and_type(checkpoint, tmp_path):
    model, found = load_tokenizer_with_hash(checkpoint, device="cpu")
    assert load_tokenizer_with_hash(checkpoint, device="cpu", dtype="bfloat16")[1] == found
    model.save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert load_tokenizer_with_hash(str(tmp_path / "parts"), device="cpu")[1] == found
    low = load_tokenizer_with_hash(checkpoint, device="cpu", dtype="bfloat16")[0]
    assert low.dtype == torch.bfloat16
    plain = DualCodebookVQModel.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert encoder_hash(plain) == encoder_hash(low) != found


# --- exports


@pytest.fixture(scope="module")
def ten_crops(photos, checkpoint, tmp_path_factory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("ten") / "out"
    write(job_of(photos, folder, checkpoint, augmentation=Augmentation(kind="ten-crop", size=SIZE)))
    return TokenDataset(folder)


class LlamaGenDataset(torch.utils.data.Dataset):
    """Reads as LlamaGen's loader does: a file of codes and a file of labels by number, one crop at random."""

    def __init__(self, folder: Path, size: int, count: int) -> None:
        self.codes, self.labels = (folder / f"imagenet{size}_{what}" for what in ("codes", "labels"))
        self.names = [f"{number}.npy" for number in range(count)]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int):
        features = np.load(os.path.join(self.codes, self.names[index]))
        crop = torch.randint(low=0, high=features.shape[1], size=(1,)).item()
        return torch.from_numpy(features[:, crop]), torch.from_numpy(np.load(self.labels / self.names[index]))


def test_llamagens_loader_reads_crops_and_labels(ten_crops, checkpoint, tmp_path):
    export_tokens(ten_crops, "llamagen", tmp_path / "out")
    loader = torch.utils.data.DataLoader(LlamaGenDataset(tmp_path / "out", SIZE, COUNT), batch_size=COUNT)
    ((codes, labels),) = loader
    assert codes.shape == (COUNT, 1, SIZE * SIZE // 4) and codes.dtype == torch.int64
    assert labels[:, 0].tolist() == [0] * 6 + [1] * 5
    first = np.load(tmp_path / "out" / f"imagenet{SIZE}_codes" / "0.npy")
    assert first.shape == (1, 10, SIZE * SIZE // 4)
    quantize = DualCodebookVQModel.from_pretrained(checkpoint).quantize
    back = quantize.from_product_ids(torch.from_numpy(first[0]).unflatten(1, (SIZE // 2, SIZE // 2)))
    assert np.array_equal(back.numpy(), next(ten_crops.rows())["tokens"])


def test_jsonl_has_a_line_for_each_crop(ten_crops, tmp_path):
    export_tokens(ten_crops, "jsonl", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "pretokenized.jsonl").read_text().splitlines()]
    assert len(lines) == 10 * COUNT and {frozenset(line) for line in lines} == {frozenset(("class_id", "tokens"))}
    assert [line["class_id"] for line in lines] == [0] * 60 + [1] * 50
    tokens = next(ten_crops.rows())["tokens"].astype(int)
    assert lines[3]["tokens"] == (tokens[3, 0] * 16 + tokens[3, 1]).flatten().tolist()


def test_a_memmap_holds_all_tokens_in_one_array(ten_crops, tmp_path):
    export_tokens(ten_crops, "memmap", tmp_path / "out")
    array = np.load(tmp_path / "out" / "tokens.npy", mmap_mode="r")
    assert isinstance(array, np.memmap) and array.dtype == np.uint16
    assert np.array_equal(array, np.stack([row["tokens"] for row in ten_crops.rows()]))
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [0] * 6 + [1] * 5
    record = json.loads((tmp_path / "out" / "tokens.json").read_text())
    assert record["weights_sha256"] == ten_crops.info.weights_sha256


def read_mds(folder: Path):
    """MDS as its documentation describes it: in each shard number, offsets, columns, samples."""
    for shard in json.loads((folder / "index.json").read_text())["shards"]:
        data = (folder / shard["raw_data"]["basename"]).read_bytes()
        assert len(data) == shard["raw_data"]["bytes"]
        assert np.frombuffer(data, "<u4", 1)[0] == shard["samples"]
        ends = np.frombuffer(data, "<u4", shard["samples"] + 1, 4)
        for start, end in itertools.pairwise(ends):
            sizes = [size for size in shard["column_sizes"]]
            place = start + 4 * sizes.count(None)
            lengths = iter(np.frombuffer(data, "<u4", sizes.count(None), start))
            sample = {}
            for name, size in zip(shard["column_names"], sizes, strict=True):
                size = next(lengths) if size is None else size
                sample[name], place = data[place : place + size], place + size
            assert place == end
            yield sample


@pytest.mark.parametrize("limit", [2**26, 9000])
def test_mds_shards_are_as_documented(ten_crops, tmp_path, monkeypatch, limit):
    monkeypatch.setattr("dualcodebook_hf.tokens.export.MDS_SHARD_BYTES", limit)
    export_tokens(ten_crops, "mds", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.mds"))) == (1 if limit > 9000 else 4)
    for sample, row in zip(read_mds(tmp_path / "out"), ten_crops.rows(), strict=True):
        assert sample["id"].decode() == row["id"]
        assert np.frombuffer(sample["label"], "<i8")[0] == row["label"]
        assert np.array_equal(np.frombuffer(sample["tokens"], "<u2"), row["tokens"].flatten())


def test_mosaicml_streaming_reads_mds(ten_crops, tmp_path, monkeypatch):
    """`make test-mds` installs it by itself: it asks for other versions than this package."""
    if "streaming" not in sys.modules:  # its image data sets need torchvision
        monkeypatch.setitem(sys.modules, "streaming.vision", types.ModuleType("streaming.vision"))
    streaming = pytest.importorskip("streaming", reason="make test-mds")
    export_tokens(ten_crops, "mds", tmp_path / "out")
    found = streaming.StreamingDataset(local=str(tmp_path / "out"), shuffle=False, batch_size=1)
    assert len(found) == COUNT
    for sample, row in zip(found, ten_crops.rows(), strict=True):
        assert (sample["id"], sample["label"]) == (row["id"], row["label"])
        assert sample["tokens"].dtype == np.uint16 and np.array_equal(sample["tokens"], row["tokens"])


def test_a_form_that_needs_labels_says_how_to_keep_them(photos, checkpoint, tmp_path):
    write(job_of(photos, tmp_path / "tokens", checkpoint, columns=()))
    tokens = TokenDataset(tmp_path / "tokens")
    for form in ("llamagen", "jsonl"):
        with pytest.raises(ValueError, match=r"`label_column` must be .* `tokenize-dataset --columns`"):
            export_tokens(tokens, form, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_tokens(tokens, "mds", tmp_path / "out")


# --- the commands


def test_the_commands_go_there_and_back(photos, checkpoint, tmp_path, capsys, monkeypatch):
    tokens, images = tmp_path / "tokens", tmp_path / "images"
    command = ["tokenize-dataset", str(photos), "--output", str(tokens), "--model", checkpoint, "--device", "cpu"]
    command += ["--size", str(SIZE), "--num-shards", "3", "--batch-size", "4", "--columns", "label"]
    assert main([*command, "--shard", "1"]) == 0
    assert "1 of 3 shards" in capsys.readouterr().out
    (tokens / ".tokens.json.5.partial").write_text("half of it")  # of a killed process
    (tokens / "data/.train-00001-of-00003.parquet.5.partial").write_text("half of it")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        assert main(command) == 0
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert "is complete: 3 shards, 11 images" in capsys.readouterr().out
    assert sorted(contents(tokens)) == ["data/" + path.name for path in TokenDataset(tokens).shards] + ["tokens.json"]
    assert main(["detokenize-dataset", str(tokens), "--output", str(images), "--model", checkpoint]) == 0
    assert len(datasets.load_dataset(str(images), split="train")) == COUNT
    assert main(["export-tokens", str(tokens), "--form", "memmap", "--output", str(tmp_path / "memmap")]) == 0
    assert np.load(tmp_path / "memmap/tokens.npy").shape == (COUNT, 1, 2, SIZE // 2, SIZE // 2)


def test_the_flags_names_and_defaults_are_those_of_what_they_set():
    parser = build_parser(["tokenize-dataset", "export-tokens"]).commands()
    given = parser["tokenize-dataset"].parse_args(["x"])
    assert _job(given) == TokenizeJob(source=TokenSource(dataset="x"), output="token-dataset")
    choices = {action.dest: action.choices for command in parser.values() for action in command._actions}
    assert (choices["augmentation"], choices["form"]) == (KINDS, tuple(FORMS))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "3", "--num-shards", "3"], r"`--shard` must lie in \[0, 3\), the number of shards, got 3"),
        (["--num-shards", "12"], "`--num-shards` must be at most 11"),
        (["--columns", "text"], r"`--columns` must be among \['label'\]"),
        (["--split", "tset"], r"`--split` must be one of \['train'\]"),
        (["--augmentation", "ten-crop", "--crop-ranges", "9"], "`--crop-ranges` must be numbers"),
        (["--image-column", "jpg"], "`--image-column` must be one of"),
        (["--augmentation", "none"], "`--size` is of crops: `--augmentation none` takes whole images"),
        (["--crop-ranges", "1.1"], "`--crop-ranges` is of ten-crop and random-crop, `--augmentation` is center"),
        (["--augmentation", "ten-crop", "--crops", "10"], "`--crops` is of random-crop, `--augmentation` is ten-crop"),
        (["--ray_workers=1"], "`--ray-workers` goes with `--engine ray`"),
    ],
)
def test_what_is_wrong_with_the_flags_ends_with_2_and_one_line(photos, checkpoint, tmp_path, capsys, flags, message):
    command = ["tokenize-dataset", str(photos), "--output", str(tmp_path / "out"), "--model", checkpoint]
    assert main([*command, "--size", str(SIZE), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dualcodebook: error: ")
    assert re.search(message, error), error


def test_images_of_the_source_are_read_as_everywhere(photos):
    """Guards the fixture: the comparison above relies on it."""
    assert np.array_equal(np.asarray(read_image(photos / "train/cat/00.png")), np.asarray(picture(0)))
