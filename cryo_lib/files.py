"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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
    full = number in (errno.ENOSPC, errno.EDQUOT) or (path.parent.is_dir() and shutil.disk_usage(path.parent).free < 1 << 16)
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
    """Write `value` as indented JSON to `path` atomically and return the path; NaN is refused."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
