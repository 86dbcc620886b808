"""Files appear whole or not at all, and checks say what, expected, got and the way out."""

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from cryo_lib import checks, files

ROOT = Path(__file__).resolve().parents[1]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError):
        with files.atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*a.txt: the disk is full; free space on the file system of"):
        files.write_text(tmp_path / "a.txt", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_writer_with_its_own_words_for_a_full_disk_is_explained_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: files.shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="the disk is full") as caught:
        with files.atomic(tmp_path / "a.pt"):
            raise RuntimeError("unexpected pos 64 vs 0")
    assert "unexpected pos" in str(caught.value.__cause__) and list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_folder_is_an_error(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError):
        files.write_text(tmp_path / "a" / "b.txt", "x")


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"psnr": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_images_pass_as_arrays_or_tensors():
    for value in (np.zeros((1, 2, 3)), torch.zeros(1, 2, 3), np.zeros((1, 2, 3), np.uint8)):
        assert checks.as_images("x", value).dtype == np.float32


@pytest.mark.parametrize(
    "value, error, message",
    [
        (np.zeros((2, 2)), ValueError, r"x: expected images of shape \(n, h, w\).*got \(2, 2\)"),
        (np.zeros((0, 2, 2)), ValueError, r"with n, h, w >= 1, got \(0, 2, 2\)"),
        (np.array([["a"]]), TypeError, "x: expected real numbers"),
        (
            torch.zeros(1, 2, 2, device="meta"),
            TypeError,
            "x: expected a numpy array or a CPU tensor, got a tensor on meta",
        ),
    ],
)
def test_what_is_no_stack_of_images_is_named(value, error, message):
    with pytest.raises(error, match=message):
        checks.as_images("x", value)


def test_the_root_is_found_from_below_and_missed_loudly(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT / "notebooks")
    assert files.enter_root() == ROOT and Path.cwd() == ROOT
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected dvc.yaml in"):
        files.enter_root()
