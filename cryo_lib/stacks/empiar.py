"""EMPIAR-10028 fetched: 105,247 particles of the 80S ribosome (360 px, 1.34 A, 51 GB), and its map EMD-2660.

Of the particles come as many as are asked for, a share of every stack, by HTTP ranges. Whole files that are there are
kept; what was cut lies in a `.part` beside its file and is gone on with, within a call and from call to call.

Source: Wong et al. 2014, eLife 3:e03080, doi 10.6019/EMPIAR-10028.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import requests
import urllib3
from mrcfile.dtypes import HEADER_DTYPE

from cryo_lib import checks
from cryo_lib.files import atomic
from cryo_lib.stacks.mrc import StackFile, write_stack
from cryo_lib.stacks.particles import ParticleStack

PARTICLES = "https://ftp.ebi.ac.uk/empiar/world_availability/10028/data/Particles"
STAR = "shiny_2sets.star"
PUBLISHED_MAP = "emd_2660.map"
MAP = f"https://ftp.ebi.ac.uk/pub/databases/emdb/structures/EMD-2660/map/{PUBLISHED_MAP}.gz"
PAUSES = (1.0, 3.0, 9.0, 27.0)  # s, after the first, second, ... answer in a row that was cut or a server error
PROGRESS = 10.0  # s from one line of progress to the next
CHUNK = 1 << 16  # bytes read at once

_CUT = (requests.ConnectionError, requests.Timeout, requests.HTTPError, urllib3.exceptions.HTTPError)
_WAY_OUT = "see what a browser gets there, or name another server (particles_url, map_url)"


def fetch(
    out: str | Path, n_particles: int, *, particles_url: str = PARTICLES, map_url: str = MAP, connections: int = 4
) -> tuple[Path, Path]:
    """Make `out/particles.star`, the stacks it names below `out`, and `out/map.mrc`; return the star and the map.

    Of every stack come the rows that the published file (kept in `out`, as the map is) lists first, in proportion. The
    star has these rows in their order and to the letter, but for the image numbers: those in the local stacks.

    Parameters
    ----------
    n_particles : how many, of 105,247.
    particles_url, map_url : the folder of `shiny_2sets.star` and the stacks; a gzipped MRC map.
    connections : stacks fetched at once.

    Raises
    ------
    ValueError : more particles than there are, or an answer that is not the file, damaged, or does not fit the others
        (image numbers beyond their stack, mixed boxes).
    FileNotFoundError : the server has no such file.
    ConnectionError : no network or server, or one that keeps failing; another call goes on from there.
    OSError : too little room on the disk.
    """
    checks.integer("n_particles", n_particles, low=1)
    out, star, volume = Path(out), Path(out, "particles.star"), Path(out, "map.mrc")
    with requests.Session() as session:
        published = _Remote(session, f"{particles_url}/{STAR}")
        head, rows = _kept(published, out / STAR, shutil.copyfile, _read)
        rows = _first(rows, n_particles)
        _kept(_Remote(session, map_url), out / PUBLISHED_MAP, _unzip, _require_map)
        with atomic(volume) as temporary:
            shutil.copyfile(out / PUBLISHED_MAP, temporary)
        numbers = {name: np.unique(group) for name, group in rows.groupby("name", sort=False)["number"]}
        _fetch_stacks(session, particles_url, out, numbers, connections)
    local = rows.groupby("name")["number"].rank(method="dense").astype(int)
    columns = rows["before"], rows["digits"], local, rows["after"]
    with atomic(star) as temporary:
        temporary.write_bytes(head + b"".join(b"%b%0*d%b" % (a, len(b), n, c) for a, b, n, c in zip(*columns)))
        try:
            ParticleStack.open(temporary, project=out)
        except ValueError as error:
            expected = "expected particles that can be opened"
            raise ValueError(f"{published.url}: {expected}, got ({error}); mend {out / STAR} and run again") from error
    return star, volume


class _Remote:
    """A file on a server; its size is that of the first answer, ever after."""

    def __init__(self, session: requests.Session, url: str) -> None:
        self.session, self.url, self._size = session, url, None

    @cached_property
    def head(self) -> bytes:
        """The first 1,024 bytes: the header, in an MRC file."""
        return b"".join(self.pieces([range(HEADER_DTYPE.itemsize)]))

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.head and self._size

    def pieces(self, ranges: list[range], done: int = 0) -> Iterator[bytes]:
        """The bytes in `ranges`, one range after the other, from byte `done` of all these on."""
        total, failures = sum(map(len, ranges)), 0
        while done < total:
            before = done
            try:
                starts = accumulate(map(len, ranges), initial=0)
                for piece in self._answer([left for r, at in zip(ranges, starts) if (left := r[max(done - at, 0) :])]):
                    done += len(piece)
                    yield piece
            except _CUT as error:
                failures = 1 if done > before else failures + 1
                if failures > len(PAUSES):
                    raise ConnectionError(
                        f"fetch {self.url}: expected {total:,} bytes, got {done:,} ({error}); "
                        f"run again to go on from there, or {_WAY_OUT}"
                    ) from error
                time.sleep(PAUSES[failures - 1])

    def _answer(self, ranges: list[range]) -> Iterator[bytes]:
        """The bytes in the first range or, of a server that knows no ranges, in all of them, as far as they come."""
        headers = {"Range": f"bytes={ranges[0].start}-{ranges[0].stop - 1}", "Accept-Encoding": "identity"}
        with self.session.get(self.url, headers=headers, stream=True, timeout=30) as response:
            self._check(response, ranges)
            at, ranges = (ranges[0].start, ranges[:1]) if response.status_code == 206 else (0, ranges)
            for chunk in response.raw.stream(CHUNK, decode_content=False):
                yield from filter(None, (chunk[max(r.start - at, 0) : max(r.stop - at, 0)] for r in ranges))
                at += len(chunk)
                if at >= ranges[-1].stop:
                    return
        raise requests.ConnectionError(f"the answer ended at byte {at:,} of the file")

    def _check(self, response: requests.Response, ranges: list[range]) -> None:
        """Refuse what is no answer to `ranges`, and take note of the file's size."""
        status = response.status_code
        if status in (404, 410):
            raise FileNotFoundError(f"fetch {self.url}: expected a file, got HTTP {status}: no such file; {_WAY_OUT}")
        if status in (408, 429) or status >= 500:
            response.raise_for_status()
        said = response.headers.get("Content-Range" if status == 206 else "Content-Length", "")
        size = re.fullmatch(rf"(?:bytes {ranges[0].start}-\d+/)?(\d+)", said)
        if status not in (200, 206) or not size:
            got = f"got HTTP {status} and the size {said or 'unknown'}"
            raise ValueError(f"fetch {self.url}: expected a file of known size, {got}; {_WAY_OUT}")
        size = int(size[1])
        if size < ranges[-1].stop or self._size not in (None, size):
            expected = f"{self._size:,}" if self._size else f"{ranges[-1].stop:,} or more"
            raise ValueError(f"fetch {self.url}: expected {expected} bytes, got {size:,}; {_WAY_OUT}")
        self._size = size


class _Progress:
    """Says, every `PROGRESS` seconds at most, how much of `total` bytes is there and how fast it comes."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._there, self._come, self._lock = what, total, 0, 0, threading.Lock()
        self._begun = self._said = time.monotonic()

    def add(self, n: int, come: bool = True) -> None:
        """Count `n` more bytes, which have come or, from an earlier call, were there."""
        with self._lock:
            self._there, self._come, now = self._there + n, self._come + n * come, time.monotonic()
            if come and now - self._said >= PROGRESS:
                share, rate = self._there / self._total, self._come / (now - self._begun)
                print(f"{self._what}: {self._there:,} bytes ({share:.0%}), {rate / 1e6:.1f} MB/s", flush=True)
                self._said = now


@contextlib.contextmanager
def _fetched(remote: _Remote, path: Path, ranges: list[range], progress: _Progress) -> Iterator[Path]:
    """Give a `.part` beside `path` with the bytes in `ranges`; remove it once it was used, or refused (ValueError)."""
    key = hashlib.sha256(repr((remote.url, remote.size, ranges)).encode()).hexdigest()[:12]
    part = path.with_name(f"{path.name}.{key}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "ab") as file:
        done = file.tell()
        _require_room(path.parent, sum(map(len, ranges)) - done)
        progress.add(done, come=False)
        for piece in remote.pieces(ranges, done):
            file.write(piece)
            progress.add(len(piece))
    try:
        yield part
    except ValueError as error:
        part.unlink()
        got = f"got another content ({error}); {_WAY_OUT}"
        raise ValueError(f"fetch {remote.url}: expected {path.name}, {got}") from error
    for used in path.parent.glob(f"{path.name}.*.part"):  # also those of other selections
        used.unlink()


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"{folder}: expected room for {needed:,} bytes, got {free:,}; free some, or fetch fewer particles"
        raise OSError(errno.ENOSPC, message)


def _kept(remote: _Remote, path: Path, make: Callable[[Path, Path], Any], read: Callable[[Path], Any]) -> Any:
    """Read `path`; where it is not there, first `make` it from the whole remote file."""
    if path.is_file():
        return read(path)
    with _fetched(remote, path, [range(remote.size)], _Progress(path.name, remote.size)) as part, atomic(path) as made:
        make(part, made)
        return read(made)


def _unzip(packed: Path, path: Path) -> None:
    try:
        with gzip.open(packed) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"expected a whole gzip file, got {error}") from error


def _require_map(path: Path) -> None:
    file = StackFile.read_header(str(path))
    if len(set(file.shape)) > 1 or not file.pixel_size > 0:
        got = f"{file.shape} voxels of {file.pixel_size:g} A"
        raise ValueError(f"{path}: expected a cubic map with its voxel size, got {got}; delete it and run again")


def _read(path: Path) -> tuple[bytes, pd.DataFrame]:
    """The text before the rows, and of each row: the stack's `name`, the image's `number`, its `digits` and the text
    `before` and `after` them.

    The published file has a stray 9 at line 5476 (ASPIRE-Python, issue 630): a 9 that stands alone in its line, or in a
    row with one field too many, is taken out. Other faults are left to `ParticleStack.open`, if the row has an image.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    labels = [number for number, line in enumerate(lines) if line.startswith(b"_")]
    columns = [lines[number].split()[0] for number in labels]
    if columns.count(b"_rlnImageName") != 1:
        got = f"got the columns {columns}; delete it and run again"
        raise ValueError(f"{path}: expected one table with _rlnImageName, {got}")
    # An image is a number from 1 on, and a name that does not lead out of the folder.
    image = rb"(\s*(?:\S+\s+){%d})(0*[1-9]\d*)(@((?!/|\S*\.\.)\S+)(?:\s.*)?)" % columns.index(b"_rlnImageName")
    rows, pattern = [], re.compile(image, re.DOTALL)
    for number, line in enumerate(lines[labels[-1] + 1 :], labels[-1] + 2):
        fields = line.split()
        if fields.count(b"9") == 1 and len(fields) in (1, len(columns) + 1):
            print(f"{STAR}: line {number}: took out a stray 9")
            line = re.sub(rb"(?<!\S)9(?!\S)", b"", line)
        if line.isspace() or line.lstrip().startswith(b"#"):
            continue
        if not (row := pattern.fullmatch(line)):
            got = f"got {line!r}; mend it, or delete the file and run again"
            raise ValueError(f"{path}: line {number}: expected a row with an image, as 000001@MRC_1901/a.mrcs, {got}")
        rows.append(row.groups())
    table = pd.DataFrame(rows, columns=["before", "digits", "after", "name"])
    table["number"], table["name"] = table["digits"].astype(int), table["name"].str.decode("utf-8")
    return b"".join(lines[: labels[-1] + 1]), table


def _first(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """The first rows of every stack, `n` in all and of each stack its share, rounded; in the order of the table."""
    if n > len(rows):
        raise ValueError(f"n_particles: expected at most {len(rows)}, as {STAR} has, got {n}; ask for fewer")
    stack, _ = pd.factorize(rows["name"])
    ends = (2 * n * np.bincount(stack).cumsum() + len(rows)) // (2 * len(rows))
    return rows[rows.groupby("name").cumcount() < np.diff(ends, prepend=0)[stack]]


def _fetch_stacks(
    session: requests.Session, url: str, out: Path, numbers: dict[str, np.ndarray], connections: int
) -> None:
    """Fetch of each stack the images `numbers`, ascending from 1, unless there is a stack of so many."""
    boxes = {name: _box(out / name, len(images)) for name, images in numbers.items()}
    if len(set(boxes.values())) == 1 and None not in boxes.values():
        return
    remotes = {name: _Remote(session, f"{url}/{quote(name.removeprefix('Particles/'))}") for name in numbers}
    box = _header(remotes[min(boxes, key=lambda name: boxes[name] is not None)]).shape[1]  # the first that is missing
    missing = [name for name in numbers if boxes[name] != box]
    total = sum(4 * box**2 * len(numbers[name]) for name in missing)
    _require_room(out, total)
    progress = _Progress(f"{len(missing)} stacks", total)
    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(lambda name: _fetch_stack(remotes[name], out / name, numbers[name], box, progress), missing))


def _box(path: Path, n: int) -> int | None:
    """The box of a local stack, if it is a whole one of `n` images."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        file = StackFile.read_header(str(path))
        box = file.shape[1]
        if file.shape == (n, box, box) and path.stat().st_size == file.offset + 4 * n * box**2:
            return box


def _fetch_stack(remote: _Remote, path: Path, numbers: np.ndarray, box: int, progress: _Progress) -> None:
    """Fetch the images `numbers` as they are; the header is written anew."""
    header, size = _header(remote), 4 * box**2
    if header.shape[1] != box or header.shape[0] < numbers[-1]:
        raise ValueError(
            f"fetch {remote.url}: expected {numbers[-1]} or more images of {box} x {box}, as the star "
            f"and the other stacks say, got {header.shape}; {_WAY_OUT}"
        )
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    ranges = [range(header.offset + size * int(run[0] - 1), header.offset + size * int(run[-1])) for run in runs]
    shape = (len(numbers), box, box)
    with _fetched(remote, path, ranges, progress) as part, atomic(path) as made:
        write_stack(made, np.memmap(part, header.dtype, "r", shape=shape), shape, header.pixel_size)


def _header(remote: _Remote) -> StackFile:
    """The header of a remote stack of square float32 images that is as long as it says."""
    header = np.frombuffer(remote.head, HEADER_DTYPE)[0]
    n, h, w, mode, extended, mx = (int(header[name]) for name in ("nz", "ny", "nx", "mode", "nsymbt", "mx"))
    start = HEADER_DTYPE.itemsize + extended
    if not (n > 0 and 0 < h == w and mode == 2 and extended >= 0 and start + 4 * n * h * w == remote.size):
        raise ValueError(
            f"fetch {remote.url}: expected a whole stack of square images of float32 (mode 2), got {n} of "
            f"{h} x {w} in mode {mode}, {remote.size:,} bytes; {_WAY_OUT}"
        )
    return StackFile(remote.url, start, "<f4", (n, h, w), float(header["cella"]["x"]) / mx if mx > 0 else 0.0)
