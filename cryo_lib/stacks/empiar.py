"""EMPIAR-10028 fetched: 105,247 particles of the 80S ribosome (360 px, 1.34 A, 51 GB), and its map EMD-2660.

As many particles come as are asked for, a share of every stack, in blocks by HTTP ranges (fsspec). A block that was cut
is asked for again. A call that was interrupted is gone on with by the next: files that are there whole are kept.

Source: Wong et al. 2014, eLife 3:e03080, doi 10.6019/EMPIAR-10028.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import fsspec
import numpy as np
import pandas as pd
from mrcfile.dtypes import HEADER_DTYPE
from tqdm import tqdm

from cryo_lib import checks
from cryo_lib.files import atomic
from cryo_lib.stacks.mrc import StackFile, read_map, write_stack
from cryo_lib.stacks.particles import ParticleStack
from cryo_lib.stacks.star import Star

PARTICLES = "https://ftp.ebi.ac.uk/empiar/world_availability/10028/data/Particles"
STAR = "shiny_2sets.star"
PUBLISHED_MAP = "emd_2660.map"
MAP = f"https://ftp.ebi.ac.uk/pub/databases/emdb/structures/EMD-2660/map/{PUBLISHED_MAP}.gz"
PAUSES = (1.0, 3.0, 9.0, 27.0)  # s, after the first, second, ... failure in a row of one block
PROGRESS = 10.0  # s from one line of progress to the next
BLOCK = 1 << 24  # bytes asked for at once

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
    ConnectionError : no network or server, or one that keeps failing; another call goes on with what is not there yet.
    OSError : too little room on the disk.
    """
    checks.integer("n_particles", n_particles, low=1)
    out, star, volume = Path(out), Path(out, "particles.star"), Path(out, "map.mrc")
    published, images = _kept(f"{particles_url}/{STAR}", out / STAR, bytes, _read)
    chosen = _first(images, n_particles)
    rows = images[chosen]
    _kept(map_url, out / PUBLISHED_MAP, gzip.decompress, _cube)
    with atomic(volume) as temporary:
        shutil.copyfile(out / PUBLISHED_MAP, temporary)
    numbers = {name: np.unique(group) for name, group in rows.groupby("name", sort=False)["number"]}
    _fetch_stacks(particles_url, out, numbers, connections)
    local = rows.groupby("name")["number"].rank(method="dense").astype(int)
    fields = [f"{n:0{len(digits)}d}@{name}" for n, digits, name in zip(local, rows["digits"], rows["name"])]
    with atomic(star) as temporary:
        block = published.find("rlnImageName")
        temporary.write_bytes(b"".join(published.replaced(block, {"rlnImageName": fields}, chosen)))
        ParticleStack.open(temporary, project=out)
    return star, volume


class _Remote:
    """A file on a server."""

    def __init__(self, url: str) -> None:
        self.url = url

    @cached_property
    def size(self) -> int | None:
        """Bytes; None where the server does not say, as of what it calls gzip-encoded."""
        return self._answer(lambda server: server.info(self.url)["size"])

    @cached_property
    def header(self) -> StackFile:
        """The header of a stack of square float32 images and nothing else."""
        with self.content("a stack"):
            size = self.size or 0
            file = StackFile.of(self.url, self.read(0, min(size, HEADER_DTYPE.itemsize)), size)
            n, h, w = file.shape
            if h != w or file.dtype != "<f4" or size != file.offset + 4 * n * h * w:
                got = f"{n} of {h} x {w} {file.dtype} in {size:,} bytes"
                raise ValueError(f"expected square images of float32 and nothing else, got {got}")
        return file

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`."""

        def answer(server: Any) -> bytes:
            with server.open(self.url, size=self.size, cache_type="none") as file:
                file.seek(start)
                content = file.read(stop - start)
            if len(content) != stop - start:
                raise aiohttp.ClientPayloadError(f"{len(content):,} bytes of {stop - start:,}")
            return content

        return self._answer(answer) if stop > start else b""

    def whole(self) -> bytes:
        """The file, block by block."""
        if self.size is None:
            return self._answer(lambda server: server.cat_file(self.url))
        with _Progress(self.url.rpartition("/")[2], self.size) as progress:
            starts = range(0, self.size, BLOCK)
            return b"".join(progress.add(self.read(at, min(at + BLOCK, self.size))) for at in starts)

    def _answer(self, ask: Callable[[Any], Any]) -> Any:
        """What the server says; where its answer is cut, or an error of its own, it is asked again."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=30)
        session = {"timeout": timeout, "trust_env": True, "auto_decompress": False}
        server = fsspec.filesystem("http", headers={"Accept-Encoding": "identity"}, client_kwargs=session)
        for pause in (*PAUSES, None):
            try:
                return ask(server)
            except (OSError, aiohttp.ClientError) as error:  # fsspec's info() calls every failure a missing file
                cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
                status = 404 if isinstance(cause, FileNotFoundError) else getattr(cause, "status", 500)
                problem = f"fetch {self.url}: expected a file, got {type(cause).__name__} ({cause})"
                if status in (404, 410):
                    raise FileNotFoundError(f"{problem}; {_WAY_OUT}") from error
                if pause is None or (status < 500 and status not in (408, 429)):
                    raise ConnectionError(f"{problem}; run again to go on from there, or {_WAY_OUT}") from error
                time.sleep(pause)

    @contextlib.contextmanager
    def content(self, expected: str) -> Iterator[None]:
        """What is refused inside is what came from this file."""
        try:
            yield
        except (ValueError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            got = f"got another content ({error}); {_WAY_OUT}"
            raise ValueError(f"fetch {self.url}: expected {expected}, {got}") from error


class _Progress(tqdm):
    """A bar on a terminal; elsewhere, as in a notebook's log, a line every `PROGRESS` seconds."""

    def __init__(self, what: str, total: int) -> None:
        options = {"mininterval": PROGRESS, "delay": PROGRESS, "miniters": 1}
        options["bar_format"] = "{desc}: {n_fmt} of {total_fmt}B ({percentage:.0f}%), {rate_fmt}"
        options = {} if sys.stdout.isatty() else options
        super().__init__(desc=what, total=total, unit="B", unit_scale=True, file=sys.stdout, **options)

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        return tqdm.status_printer(file) if file.isatty() else lambda line: print(line, file=file, flush=True)

    def add(self, content: bytes) -> bytes:
        """Count bytes that came."""
        with self.get_lock():
            self.update(len(content))
        return content


def _kept(url: str, path: Path, unpack: Callable[[bytes], bytes], read: Callable[[Path], Any]) -> Any:
    """Read `path`; where it is not there, fetch it."""
    if path.is_file():
        return read(path)
    remote = _Remote(url)
    with remote.content(path.name), atomic(path) as made:
        made.write_bytes(unpack(remote.whole()))
        return read(made)


def _read(path: Path) -> tuple[Star, pd.DataFrame]:
    """The published star file, and of each row's image the stack's `name`, the `number` and its `digits`.

    The file has a stray 9 at line 5476 (ASPIRE-Python, issue 630): a 9 that stands alone in its line, or in a row with
    one field too many, is taken out.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    columns = sum(line.startswith(b"_") for line in lines)
    for number, line in enumerate(lines):
        fields = line.split()
        if fields.count(b"9") == 1 and len(fields) in (1, columns + 1):
            print(f"{STAR}: line {number + 1}: took out a stray 9")
            lines[number] = re.sub(rb"(?<!\S)9(?!\S)", b"", line)
    star = Star(path, b"".join(lines))
    named = star.table(star.find("rlnImageName"))["rlnImageName"]
    images = named.str.extract(r"^(?P<digits>0*[1-9]\d*)@(?P<name>(?!/|.*\.\.).+)")  # no name leads out of the folder
    if (bad := images["name"].isna()).any():
        row = int(np.argmax(bad))
        problem = f"expected an image, as 000001@MRC_1901/a.mrcs, got {named[row]!r}"
        raise ValueError(f"{path}, row {row + 1}: {problem}; mend it, or delete the file and run again")
    return star, images.assign(number=images["digits"].astype(int))


def _cube(path: Path) -> None:
    """ValueError where a map is none, or no cube."""
    shape = read_map(path)[0].shape
    if len(set(shape)) > 1:
        raise ValueError(f"{path}: expected a cubic map, got {shape}; pad or crop it")


def _first(images: pd.DataFrame, n: int) -> np.ndarray:
    """Which rows are taken, a mask: of every stack the first, `n` in all and of each stack its share, rounded."""
    if n > len(images):
        raise ValueError(f"n_particles: expected at most {len(images)}, as {STAR} has, got {n}; ask for fewer")
    stack, _ = pd.factorize(images["name"])
    ends = (2 * n * np.bincount(stack).cumsum() + len(images)) // (2 * len(images))
    return (images.groupby("name").cumcount() < np.diff(ends, prepend=0)[stack]).to_numpy()


def _fetch_stacks(url: str, out: Path, numbers: dict[str, np.ndarray], connections: int) -> None:
    """Fetch of each stack the images `numbers`, ascending from 1, unless there is a stack of so many."""
    missing = [name for name in numbers if not _is_whole(out / name, len(numbers[name]))]
    if not missing:
        return
    remotes = {name: _Remote(f"{url}/{quote(name.removeprefix('Particles/'))}") for name in missing}
    box = remotes[missing[0]].header.shape[1]
    total, free = sum(4 * box**2 * len(numbers[name]) for name in missing), shutil.disk_usage(out).free
    if free < total:
        message = f"{out}: expected room for {total:,} bytes, got {free:,}; free some, or fetch fewer particles"
        raise OSError(errno.ENOSPC, message)
    with _Progress(f"{len(missing)} stacks", total) as progress, ThreadPoolExecutor(connections) as pool:
        list(pool.map(lambda name: _fetch_stack(remotes[name], out / name, numbers[name], box, progress), missing))


def _is_whole(path: Path, n: int) -> bool:
    """Whether a local file is a stack of `n` images of float32, and nothing else."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        file = StackFile.read_header(str(path))
        return file.shape[0] == n and path.stat().st_size == file.offset + 4 * np.prod(file.shape)
    return False


def _fetch_stack(remote: _Remote, path: Path, numbers: np.ndarray, box: int, progress: _Progress) -> None:
    """Fetch the images `numbers` as they are; the header is written anew."""
    header, size = remote.header, 4 * box**2
    if header.shape[1] != box or header.shape[0] < numbers[-1]:
        expected = f"{numbers[-1]} or more images of {box} x {box}, as the star and the other stacks say"
        raise ValueError(f"fetch {remote.url}: expected {expected}, got {header.shape}; {_WAY_OUT}")

    def batches() -> Iterator[np.ndarray]:
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
        for run in runs:
            for part in np.split(run, range(step := max(1, BLOCK // size), len(run), step)):
                start = header.offset + size * (int(part[0]) - 1)
                content = progress.add(remote.read(start, start + size * len(part)))
                yield np.frombuffer(content, header.dtype).reshape(-1, box, box)

    with remote.content(path.name), atomic(path) as made:
        write_stack(made, batches(), (len(numbers), box, box), header.pixel_size)
