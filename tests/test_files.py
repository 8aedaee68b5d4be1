"""Files and folders appear whole or not at all, and names that are published hold no folder of this machine."""

import os
import shutil

import pytest

from dualcodebook_hf.files import (
    atomic_file,
    atomic_folder,
    is_free_folder,
    public_name,
    read_json,
    remove_folder,
    remove_leftovers,
    staged_files,
    write_json,
)


class Broken(Exception):
    pass


def test_a_file_is_the_old_one_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(Broken), atomic_file(path) as partial:
        partial.write_text("half")
        raise Broken
    assert path.read_text() == "old"
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_replaced_as_a_whole_and_only_on_demand(tmp_path):
    folder = tmp_path / "deep" / "folder"
    with atomic_folder(folder) as partial:
        partial.mkdir()
        (partial / "a").touch()
        assert not folder.exists()
    assert [entry.name for entry in folder.iterdir()] == ["a"]
    with pytest.raises(ValueError, match="`folder` must be new or empty"), atomic_folder(folder):
        pass
    with pytest.raises(Broken), atomic_folder(folder, replace=True) as partial:
        partial.mkdir()
        raise Broken
    assert [entry.name for entry in folder.iterdir()] == ["a"]
    with atomic_folder(folder, replace=True) as partial:
        partial.mkdir()
        (partial / "b").touch()
    assert [entry.name for entry in folder.iterdir()] == ["b"]
    assert [entry.name for entry in folder.parent.iterdir()] == ["folder"]


def test_staged_files_arrive_together_or_not_at_all(tmp_path):
    folder = tmp_path / "new" / "folder"
    with pytest.raises(Broken), staged_files(folder) as staging:
        (staging / "a").touch()
        raise Broken
    assert not list(tmp_path.iterdir())
    with staged_files(folder) as staging:
        (staging / "a").write_text("1")
        assert not (folder / "a").exists()
    (folder / "mine").touch()
    with pytest.raises(Broken), staged_files(folder) as staging:
        (staging / "a").write_text("2")
        raise Broken
    assert (folder / "a").read_text() == "1"
    with staged_files(folder) as staging:
        (staging / "a").write_text("2")
    assert (folder / "a").read_text() == "2"
    assert sorted(entry.name for entry in folder.iterdir()) == ["a", "mine"]


def test_json_comes_back_and_anything_else_is_named(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1, 2]})
    assert read_json(tmp_path / "a.json") == {"a": [1, 2]}
    assert read_json(tmp_path / "none.json") is None
    for text in ("{", "[1]"):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(ValueError, match=r"b\.json"):
            read_json(tmp_path / "b.json")


def test_a_local_path_is_published_by_its_last_parts_and_a_hub_id_as_it_is(tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    assert public_name(tmp_path / "run" / "final") == "final"
    assert public_name(str(tmp_path / "run" / "final"), parts=2) == "run/final"
    assert public_name("owner/name", parts=2) == "owner/name"


def test_only_nothing_and_an_empty_folder_are_free(tmp_path):
    assert is_free_folder(tmp_path / "none") and is_free_folder(tmp_path)
    (tmp_path / "file").touch()
    assert not is_free_folder(tmp_path) and not is_free_folder(tmp_path / "file")


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else the power goes, and a file of the right name holds nothing."""
    synced = set()
    sync = os.fsync

    def record(handle):
        synced.add(os.fstat(handle).st_ino)
        sync(handle)

    monkeypatch.setattr(os, "fsync", record)
    with atomic_file(tmp_path / "a") as partial:
        partial.write_text("1")
    with atomic_folder(tmp_path / "folder") as partial:
        (partial / "deep").mkdir(parents=True)
        (partial / "deep" / "b").write_text("2")
    for name in ("a", "folder", "folder/deep", "folder/deep/b", "."):
        assert (tmp_path / name).stat().st_ino in synced, name


def test_a_folder_that_goes_has_lost_its_name_before_its_files(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # it is killed here
    remove_folder(folder)
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".") and (left / "a").exists()
    monkeypatch.undo()
    (tmp_path / "mine").touch()
    (tmp_path / ".a.1.partial").touch()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
