"""Every kind of source that `load_images` opens, and what it says of those that it cannot open."""

import shutil

import numpy as np
import pytest
from PIL import Image

from dualcodebook_hf.image_datasets import image_source, load_images
from dualcodebook_hf.image_processing_dualcodebook import read_image

datasets = pytest.importorskip("datasets")

SHADES = (10, 120, 240)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def sources(tmp_path):
    """The same three grey images in every kind of source, by name."""
    folder = tmp_path / "folder"
    (folder / "train").mkdir(parents=True)
    for index, shade in enumerate(SHADES):
        Image.fromarray(np.full((6, 9, 3), shade, np.uint8)).save(folder / "train" / f"{index}.png")
    (tmp_path / "zipped").mkdir()
    shutil.make_archive(str(tmp_path / "zipped" / "train"), "zip", folder / "train")

    files = sorted((folder / "train").iterdir())
    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": [0, 1, 2]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    images = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "parquet").mkdir()
    images.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    images.to_parquet(tmp_path / "parquet" / "test-00000-of-00001.parquet")
    images.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": images}).save_to_disk(tmp_path / "saved_splits")
    (tmp_path / "listed").mkdir()
    paths = datasets.Dataset.from_dict({"image": [str(file) for file in files]})
    paths.to_json(tmp_path / "listed" / "train.jsonl")
    names = ("folder", "zipped", "parquet", "saved", "saved_splits", "listed")
    return {name: tmp_path / name for name in names} | {
        "file": tmp_path / "parquet" / "train-00000-of-00001.parquet",
        "flat": folder / "train",
    }


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["folder", "flat", "zipped", "parquet", "file", "saved", "saved_splits", "listed"])
def test_the_same_images_come_out_of_every_source(sources, kind, streaming):
    rows = load_images(str(sources[kind]), split="train", streaming=streaming)
    assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
    images = [read_image(image_source(row["image"])) for row in rows]
    assert [image.getpixel((0, 0)) for image in images] == [(shade,) * 3 for shade in SHADES]
    assert images[0].size == (9, 6)


@pytest.mark.parametrize("kind", ["folder", "parquet", "saved", "saved_splits"])
def test_an_unknown_split_names_those_that_exist(sources, kind):
    with pytest.raises(ValueError, match=r"`split` must be one of \['train'.* got 'tset'"):
        load_images(sources[kind], split="tset")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_column_names_those_that_exist(sources, streaming):
    with pytest.raises(ValueError, match=r"`image_column` must be one of \['image', 'label'\].* got 'img'"):
        load_images(sources["parquet"], image_column="img", streaming=streaming)


def test_a_column_without_images_is_refused(sources):
    with pytest.raises(ValueError, match="`image_column` must hold images; 'label'"):
        load_images(sources["parquet"], image_column="label")


@pytest.mark.parametrize("missing", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_folder_that_does_not_exist_is_no_hub_id(missing):
    with pytest.raises(ValueError, match="`dataset`: no such file or folder"):
        load_images(missing)


def test_what_is_neither_data_nor_a_known_format_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a folder with data"):
        load_images(tmp_path / "empty")
    (tmp_path / "picture.png").touch()
    with pytest.raises(ValueError, match=r"a folder or a \.parquet file"):
        load_images(tmp_path / "picture.png")


def test_an_unknown_configuration_is_refused(sources):
    with pytest.raises(ValueError, match="not found"):
        load_images(sources["folder"], "wide")
    with pytest.raises(ValueError, match="`config` must be None"):
        load_images(sources["saved"], "wide")


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}])
def test_a_row_without_a_image_is_an_error(value):
    with pytest.raises(ValueError, match="no image"):
        image_source(value)
