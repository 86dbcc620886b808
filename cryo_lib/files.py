"""Files written whole or not at all, and where the process runs: its root, its cores, its code."""

from __future__ import annotations

import ast
import contextlib
import errno
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FOREIGN = {  # the first bytes, in lower case, of what is taken for another file
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself by `git lfs pull`",
    b"\x1f\x8b": "a gzip file: unpack it by `gunzip`",
    b"bzh": "a bzip2 file: unpack it by `bunzip2`",
    b"\xfd7zxz": "an xz file: unpack it by `unxz`",
    b"\x28\xb5\x2f\xfd": "a zstd file: unpack it by `unzstd`",
    b"\x89hdf": "an HDF5 file: convert it",
    b"ii*\x00": "a TIFF file: convert it",
    b"mm\x00*": "a TIFF file: convert it",
    b"<!doctype": "a web page: download the file itself",
    b"<html": "a web page: download the file itself",
}


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success flush it to disk and rename it, on failure remove it.

    A reader sees the old file or the whole new one, never a part. The temporary name keeps the suffix of `path`,
    since many writers choose their format by it.

    Raises
    ------
    OSError : the disk is full or the folder cannot be written; the message names the file and the way out.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem[:40]}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _explained(error, path) from error
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except Exception as error:
        raise _explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def _explained(error: Exception, path: Path) -> Exception:
    """The error with the way out where the disk is full (whatever a writer calls that) or closed; itself otherwise."""
    number = getattr(error, "errno", None)
    full = number in (errno.ENOSPC, errno.EDQUOT) or (
        path.parent.is_dir() and shutil.disk_usage(path.parent).free < 1 << 16
    )
    if full:
        number, advice = errno.ENOSPC, f"the disk is full; free space on the file system of {path.parent} and run again"
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = f"{path.parent} is not writable; choose another folder or change its permissions"
    else:
        return error
    return OSError(number, f"could not write {path}: {advice} (nothing half-written was left)")


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` to `path` atomically and return the path."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Write `value` as indented JSON to `path` atomically and return the path; ValueError for NaN and infinity."""
    try:
        text = json.dumps(value, indent=2, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: expected finite numbers, got NaN or infinity; nothing was written") from error
    return write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; ValueError where it is damaged, cut short or another file."""
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        got = foreign(path) or f"a damaged one, or one cut short ({error})"
        raise ValueError(
            f"{path}: expected a JSON file, got {got}; copy it again, or delete it and make it anew"
        ) from error


def foreign(file: str | Path | bytes) -> str:
    """What a file, or one that begins with these bytes, is in place of one of the field's formats; "" where unknown."""
    head = file
    if not isinstance(file, bytes):
        with open(file, "rb") as opened:
            head = opened.read(64)
    return next((what for sign, what in _FOREIGN.items() if head.lstrip().lower().startswith(sign)), "")


def enter_root() -> Path:
    """Change to the repository's root (the first folder upwards that holds `dvc.yaml`) and return it.

    JupyterLab starts a kernel in `notebooks/`, papermill in the root: after this call paths mean the same in both.
    """
    start = Path.cwd()
    for folder in (start, *start.parents):
        if (folder / "dvc.yaml").is_file():
            os.chdir(folder)
            return folder
    raise FileNotFoundError(
        f"expected dvc.yaml in {start} or a folder above it, found none; start inside the repository"
    )


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Bare(ast.NodeTransformer):
    """Takes away docstrings and descriptions of pydantic's fields, documentation too; comments are in no tree.

    f-strings become the calls that they stand for: Python writes their quotes otherwise from 3.12 on.
    """

    def visit(self, node: ast.AST) -> ast.AST:
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "description"]
        node = self.generic_visit(node)
        return _joined(node) if isinstance(node, ast.JoinedStr) else node


def _joined(node: ast.JoinedStr) -> ast.Call:
    """`f"{a!r:>9} b"` as `''.join((format(repr(a), '>9'), ' b'))`; what is within it has been seen to."""

    def call(name: str, *arguments: ast.expr) -> ast.Call:
        return ast.Call(ast.Name(name), list(arguments), [])

    parts = []
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            named = {ord("s"): "str", ord("r"): "repr", ord("a"): "ascii"}.get(part.conversion)
            value = call(named, part.value) if named else part.value
            part = call("format", value, *filter(None, [part.format_spec]))
        parts.append(part)
    return ast.Call(ast.Attribute(ast.Constant(""), "join"), [ast.Tuple(parts)], [])


def closure(source: str) -> str:
    """Python code and that of each module of this library that it imports, all the way down; no docstrings or comments.

    It changes where what the code does may change, and nowhere else: what a stage of the pipeline depends on, and what
    a checkpoint's card holds the digest of. Data that the code reads is not in it. ValueError for a relative import.
    """
    package = Path(__file__).parent
    found, todo = {}, {"": source}
    while todo:
        name, text = todo.popitem()
        found[name], modules = _bare(name, text)
        for module in modules:
            path = package.parent.joinpath(*module.split("."))
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if module not in found and path.is_file():
                todo[module] = path.read_text()
    return (
        "\n\n".join(f"# {name}\n{found[name]}" if name else found[name] for name in sorted(found) if found[name]) + "\n"
    )


@functools.cache
def _bare(name: str, source: str) -> tuple[str, tuple[str, ...]]:
    """A module's code without docstrings and comments, and what it imports from this library."""
    tree = ast.parse(source)
    modules = tuple(_imported(tree, name))
    return ast.unparse(_Bare().visit(tree)), modules


def _imported(tree: ast.Module, name: str) -> Iterator[str]:
    """The names of what a tree imports from this library; a name may be that of a module's attribute instead."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == __package__)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                where = f"{name or 'code'}, line {node.lineno}"
                raise ValueError(f"{where}: expected an import by full name, got a relative one; write it out")
            if node.module.split(".")[0] == __package__:
                yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
