"""Files appear whole or not at all, and checks say what, expected, got and the way out."""

import ast
import errno
import json
from fnmatch import fnmatch
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import torch

from cryo_lib import checks, files, npz

ROOT = Path(__file__).resolve().parents[1]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError):
        with files.atomic(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_was_writing_is_no_result(tmp_path):
    """DVC keeps some folders of results between runs: it must not take up what lies there half written."""
    ignored = [line for line in (ROOT / ".dvcignore").read_text().splitlines() if line and not line.startswith("#")]
    for name in ("generator.safetensors", "metrics.jsonl", "x" * 60 + ".json"):
        with files.atomic(tmp_path / name) as temporary:
            assert any(fnmatch(temporary.name, pattern) for pattern in ignored)
            temporary.write_text("whole")
        assert not any(fnmatch(name, pattern) for pattern in ignored)


def test_an_archive_made_again_is_the_same_file_on_every_python(tmp_path):
    """What it holds comes back; no header says when it was made, or which Python's zipfile did."""
    arrays = {"a/b": np.arange(6.0).reshape(2, 3).T, "half": np.float16([[1.5]]), "one": np.bool_(True), "empty": []}
    paths = [npz.write(tmp_path / name / "x.npz", **arrays) for name in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with np.load(paths[0]) as found, ZipFile(paths[0]) as archive:
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, strict=name != "empty")
        for entry in archive.infolist():
            assert (entry.date_time, entry.extract_version, entry.extra) == ((1980, 1, 1, 0, 0, 0), 20, b"")
            start = entry.header_offset
            local = paths[0].read_bytes()[start : start + 30]
            assert int.from_bytes(local[4:6], "little") == 20 and int.from_bytes(local[28:30], "little") == 0
    with pytest.raises(ValueError):
        npz.write(paths[0], a=np.array([{}]))
    assert paths[0].read_bytes() == paths[1].read_bytes() and len(list(paths[0].parent.iterdir())) == 1


def test_no_archive_is_written_otherwise():
    for path in (*ROOT.glob("cryo_lib/**/*.py"), *ROOT.glob("notebooks/*.ipynb")):
        assert "np.savez" not in path.read_text(), path


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


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A library `cryo_lib` of three modules, in place of ours."""
    folder = tmp_path / "cryo_lib"
    (folder / "room").mkdir(parents=True)
    (folder / "__init__.py").write_text('"""Nothing."""\n')
    (folder / "room" / "a.py").write_text('"""Doc."""\nfrom cryo_lib.room import b\n\n\ndef f():\n    """Doc."""\n')
    (folder / "room" / "b.py").write_text("X = 1  # a comment\n")
    (folder / "other.py").write_text("Y = 2\n")
    monkeypatch.setattr(files, "__file__", str(folder / "files.py"))
    return folder


def test_a_closure_holds_the_code_of_all_that_is_imported_and_nothing_else(package):
    """Docstrings and comments change nothing, code below does, and what is not imported does not."""
    source = "from cryo_lib.room.a import f  # what it is for\nf()"
    before = files.closure(source)
    assert "X = 1" in before and "Doc" not in before and "comment" not in before and "Y = 2" not in before
    (package / "room" / "b.py").write_text('"""A docstring."""\n\n# another comment\nX = 1\n')
    (package / "other.py").write_text("Y = 3\n")
    assert files.closure(source.split("#")[0] + "\nf()") == before
    (package / "room" / "b.py").write_text("X = 2\n")
    assert files.closure(source) != before


def test_what_documents_a_field_is_not_its_code():
    source = 'x: int = Field(1, ge={0}, description="{1}")'
    assert files.closure(source.format(0, "a count")) == files.closure(source.format(0, "how many"))
    assert files.closure(source.format(0, "a count")) != files.closure(source.format(1, "a count"))


def test_an_f_string_is_written_as_the_calls_that_it_stands_for():
    """The quotes that Python would write it with differ between 3.11 and 3.12."""
    source = """said = f"{a['b']!r:>{width}} and {f'{c:.2f}'}, {{}}" 'x' f"{c}" f"{d!s}{d=}" """
    bare = files.closure(source)
    assert not any(isinstance(node, ast.JoinedStr) for node in ast.walk(ast.parse(bare)))
    expected, got = ({"a": {"b": "'"}, "c": 1 / 3, "d": None, "width": 7} for _ in range(2))
    exec(source, expected)
    exec(bare, got)
    assert got["said"] == expected["said"]


def test_no_format_ends_in_a_value():
    """After the width of `f"{a:{width}}"` Python 3.12.1 keeps an empty text, others do not; write `f"{a:{width}d}"`."""
    sources = [path.read_text() for path in (ROOT / "cryo_lib").rglob("*.py")]
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        sources += ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    formats = [node for source in sources for node in ast.walk(ast.parse(source)) if hasattr(node, "format_spec")]
    ends = [node.format_spec.values[-1] for node in formats if node.format_spec]
    assert len(ends) > 100 and all(isinstance(end, ast.Constant) and end.value for end in ends)


def test_a_relative_import_has_no_closure():
    with pytest.raises(ValueError, match="code, line 2: expected an import by full name, got a relative one"):
        files.closure("x = 1\nfrom . import b")


def test_the_code_without_docstrings_is_the_same_code():
    """Every module of the library still parses, and each function is there with the statements that it had."""
    for path in sorted((ROOT / "cryo_lib").rglob("*.py")):
        tree, bare = ast.parse(path.read_text()), ast.parse(files.closure(path.read_text()))
        names = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert set(names) <= {n.name for n in ast.walk(bare) if isinstance(n, ast.FunctionDef | ast.ClassDef)}, path
