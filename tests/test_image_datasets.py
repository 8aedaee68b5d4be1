"""Every kind of source that `load_images` opens, and what it says of those that it cannot open."""

import io
import os
import pickle
import shutil
import socket
import tarfile

import numpy as np
import pytest
from packaging.version import Version
from PIL import Image

from dualcodebook_hf.image_datasets import image_source, load_images, read_row
from dualcodebook_hf.image_processing_dualcodebook import BadImageError, read_image

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
    with pytest.raises(ValueError, match=r"a folder or a \.parquet or \.tar file"):
        load_images(tmp_path / "picture.png")


def test_an_unknown_configuration_is_refused(sources):
    with pytest.raises(ValueError, match="not found"):
        load_images(sources["folder"], "wide")
    with pytest.raises(ValueError, match="`config` must be None"):
        load_images(sources["saved"], "wide")


@pytest.mark.parametrize("value", [None, {"bytes": None, "path": None}])
def test_a_row_without_an_image_is_an_error(value):
    with pytest.raises(BadImageError, match="no image"):
        image_source(value)


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:{port}/a.png", "https://127.0.0.1:{port}/a.png", "zip://a.png::http://127.0.0.1:{port}/b.zip"],
)
def test_an_address_in_a_row_is_not_fetched(address):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = address.format(port=server.getsockname()[1])
        with pytest.raises(BadImageError, match=r"row 5 of 'birds' .*an address .*http.*not fetched"):
            read_row({"image": {"bytes": None, "path": address}}, dataset="birds", split="train", index=5)
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_file_that_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(BadImageError, match="not a regular file"):
        read_row({"image": {"bytes": None, "path": str(tmp_path / "a.png")}}, dataset="birds", split="train", index=5)


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_rows_with_the_image_in_another_column_are_named_by_their_key(tmp_path, sources, streaming):
    if streaming and Version(datasets.__version__) < Version("4.8.5"):
        pytest.skip("datasets up to 4.8.0 at least ends such a stream with a CastError of its own")
    image = (sources["folder"] / "train" / "0.png").read_bytes()
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train-000.tar", "w") as tar:
        for number in range(8):
            for suffix, data in (("png" if number < 6 else "jpg", image), ("cls", b"0")):
                info = tarfile.TarInfo(f"{number:03}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    rows = load_images(tmp_path / "tars", image_column="png", streaming=streaming)
    bad = []
    for row in rows:
        try:
            read_row(row, "png", dataset="tars", split="train")
        except BadImageError as error:
            bad.append(error)
    assert [error.file for error in bad] == ["006", "007"]
    assert "an image of 'tars' (train), '006': its column `png` holds no image" in str(bad[0])


def test_the_error_keeps_its_place_on_the_way_between_processes():
    error = BadImageError("it is empty", "a.png", dataset="birds", split="train", row=7)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is BadImageError and vars(copy) == vars(error) and str(copy) == str(error)
