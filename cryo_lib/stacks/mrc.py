"""MRC files: headers read and checked, images read as they are asked for, stacks and maps written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
from mrcfile.dtypes import HEADER_DTYPE

from cryo_lib import checks
from cryo_lib.files import atomic, foreign

BATCH = 256  # images in memory while streaming
PIXEL_TOLERANCE = 0.005  # relative; sources of the pixel size that differ by more disagree
_MODES = {0: "i1", 1: "i2", 2: "f4", 6: "u2", 12: "f2"}  # MRC modes that hold real images


@dataclass(frozen=True)
class StackFile:
    """Where the pixels of an MRC file lie, and what its header says of them.

    Attributes
    ----------
    shape : `(n, h, w)`: sections, rows, columns.
    voxel : A along x, y and z; 0 where the header has none.
    axes : which of x, y and z columns, rows and sections run along.
    holds : "images", "a volume" or "volumes"; None where the header does not tell.
    """

    path: str
    offset: int
    dtype: str
    shape: tuple[int, int, int]
    voxel: tuple[float, ...]
    axes: tuple[int, ...]
    holds: str | None

    @classmethod
    def read_header(cls, path: str) -> StackFile:
        """Read and check the header of an MRC file of either byte order; ValueError for a damaged file."""
        with open(path, "rb") as file:
            return cls.of(path, file.read(HEADER_DTYPE.itemsize), os.path.getsize(path))

    @classmethod
    def of(cls, path: str, head: bytes, size: int) -> StackFile:
        """Check the header of a file of `size` bytes, `head`."""
        start = HEADER_DTYPE.itemsize
        if what := foreign(head):
            raise ValueError(f"{path}: expected an MRC file, got {what}")
        if len(head) < start:
            raise ValueError(
                f"{path}: damaged, expected an MRC header of {start} bytes, got {len(head)}; copy it again"
            )
        raw = np.frombuffer(head, HEADER_DTYPE)
        # Machine stamps are often missing or wrong: the right byte order is the one in which the box is below 65,536.
        order = next((order for order in "<>" if 0 < raw.view(raw.dtype.newbyteorder(order))["nx"][0] < 2**16), "<")
        header = raw.view(raw.dtype.newbyteorder(order))[0]
        n, h, w, mode, extended, group = (int(header[name]) for name in ("nz", "ny", "nx", "mode", "nsymbt", "ispg"))
        if not (n > 0 and 0 < h < 2**16 and 0 < w < 2**16 and extended >= 0 and mode in _MODES):
            raise ValueError(
                f"{path}: expected an MRC stack of real numbers (modes {', '.join(map(str, _MODES))}), got {n} images "
                f"of {h} x {w} pixels in mode {mode}; the file is damaged, no MRC file, or to be converted first"
            )
        dtype = np.dtype(order + _MODES[mode])
        expected = start + extended + n * h * w * dtype.itemsize
        if size != expected:
            found = "short" if size < expected else "longer than its header says"
            raise ValueError(
                f"{path}: {found}, expected {expected} bytes ({n} x {h} x {w}), got {size}; copy it again or mend it"
            )
        axes = tuple(int(header[name]) - 1 for name in ("mapc", "mapr", "maps"))
        axes = (0, 1, 2) if axes == (-1, -1, -1) else axes  # not set
        if sorted(axes) != [0, 1, 2]:
            got = ", ".join(str(axis + 1) for axis in axes)
            raise ValueError(f"{path}: expected axes (MAPC, MAPR, MAPS) 1, 2 and 3, got {got}; the header is damaged")
        cell = [(float(header["cella"][name]), int(header[f"m{name}"])) for name in "xyz"]
        depth = cell[axes[2]][1]  # sections of one volume
        holds = "volumes" if 400 < group <= 630 else "a volume" if 0 < group <= 230 and depth == n else None
        holds = "images" if group == 0 and depth == 1 < n else holds
        voxel = tuple(length / count if count > 0 else 0.0 for length, count in cell)
        return cls(path, start + extended, dtype.str, (n, h, w), voxel, axes, holds)

    @property
    def pixel_size(self) -> float:
        """A of a pixel, 0 where the header has none; ValueError where it is not that of x and of y."""
        return self._size(2)

    @property
    def voxel_size(self) -> float:
        """A of a voxel, as `pixel_size`, of all three axes."""
        return self._size(3)

    def _size(self, axes: int) -> float:
        sizes = [size for size in self.voxel[:axes] if size != 0]
        if sizes and not 0 < max(sizes) <= min(sizes) * (1 + PIXEL_TOLERANCE):
            got = ", ".join(f"{size:g}" for size in self.voxel[:axes])
            raise ValueError(f"{self.path}: expected one pixel size on all axes, got {got} A; give it by hand")
        return sizes[0] if sizes else 0.0

    def images(self, numbered: bool) -> StackFile:
        """Itself, where it may hold images: `numbered` ones, as `3@x.mrc`, or all of them; ValueError for volumes."""
        n, h, w = self.shape
        volume = self.holds == "a volume" and n == h == w > 1 and not self.path.endswith(".mrcs")
        if self.holds == "volumes" or (volume and not numbered):
            way = "extract 2D images" + "; a stack of images is named .mrcs" * volume
            raise ValueError(f"{self.path}: expected 2D images, got {self.holds} (a map, or 3D subtomograms); {way}")
        if self.axes != (0, 1, 2):
            got = ", ".join("xyz"[axis] for axis in self.axes)
            raise ValueError(f"{self.path}: expected columns, rows and images along x, y, z, got {got}; convert it")
        return self

    def map(self) -> np.memmap:
        """Map the images, read-only and afresh: no file stays open, however many there are."""
        try:
            return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        except ValueError as error:
            raise ValueError(
                f"{self.path}: expected {self.shape[0]} images, as when it was opened, got a shorter file ({error}); "
                "open it again"
            ) from error


class Images(Sequence):
    """The images of a stack in row order, read when asked for: `(n, h, w)` float32.

    `images[i]` is one image `(h, w)`; a slice, an index array or a mask gives `(m, h, w)`. One access maps each file
    once and reads it in ascending order, whatever the order of the rows. NaN, infinite or constant images (all zero,
    for one) raise a ValueError that names the row and the file.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, files: list[StackFile], code: np.ndarray, index: np.ndarray) -> None:
        self.files, self._code, self._index = files, code, index
        self._rows = np.arange(len(code))
        self.shape = (len(code), *files[0].shape[1:])

    @classmethod
    def of(cls, file: StackFile) -> Images:
        """All images of one file."""
        n = file.shape[0]
        return cls([file], np.broadcast_to(0, n), np.arange(n))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        rows = self._rows[key]
        images = self._read(np.atleast_1d(rows))
        return images if np.ndim(rows) else images[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def _read(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self.shape[1:]), np.float32)
        code, index = self._code[rows], self._index[rows]
        order = np.lexsort((index, code))
        for group in np.split(order, np.flatnonzero(np.diff(code[order])) + 1) if len(rows) else []:
            images[group] = self.files[code[group[0]]].map()[index[group]]
        low, high = images.min(axis=(1, 2)), images.max(axis=(1, 2))
        bad = np.flatnonzero(~(np.isfinite(low) & np.isfinite(high) & (low < high)))
        if len(bad):
            i, file = bad[0], self.files[code[bad[0]]].path
            raise ValueError(
                f"particle row {rows[i] + 1} (image {index[i] + 1} of {file}): expected finite, varying pixels, got "
                f"values from {low[i]} to {high[i]} ({len(bad)} such images in this read); remove these rows"
            )
        return images


def write_stack(path: Path, images: Any, shape: tuple, pixel_size: float | None) -> tuple[int, int, int]:
    """Write batches of images as an MRC stack of `shape` (a box of None: that of the first batch); return its shape."""
    if hasattr(images, "shape"):
        images = map(images.__getitem__, (slice(start, start + BATCH) for start in range(0, len(images), BATCH)))
    (n, h, w), done, low, high, sums = shape, 0, np.inf, -np.inf, np.zeros(2)
    with open(path, "wb") as file:
        file.seek(HEADER_DTYPE.itemsize)
        for batch in images:
            batch = checks.as_images(f"images from {done} on", batch)
            h, w, done = h or batch.shape[1], w or batch.shape[2], done + len(batch)
            if batch.shape[1:] != (h, w) or done > n:
                got = f"got {done} or more, the last in a batch of shape {batch.shape}"
                raise ValueError(f"images: expected {n} of {h} x {w} pixels, {got}")
            file.write(np.ascontiguousarray(batch, "<f4"))
            low, high = min(low, batch.min()), max(high, batch.max())
            sums += batch.sum(dtype=float), np.square(batch, dtype=float).sum()
        if done != n:
            raise ValueError(f"images: expected {n}, one a row, got {done}; nothing was written")
        mean, square = sums / (n * h * w)
        header = np.zeros((), HEADER_DTYPE.newbyteorder("<"))
        fields = {"nx": w, "ny": h, "nz": n, "mx": w, "my": h, "mz": 1, "mode": 2, "ispg": 0, "nversion": 20141}
        fields |= {"mapc": 1, "mapr": 2, "maps": 3, "map": b"MAP ", "machst": (0x44, 0x44, 0, 0), "cellb": (90, 90, 90)}
        fields |= {"dmin": low, "dmax": high, "dmean": mean, "rms": max(square - mean**2, 0.0) ** 0.5}
        fields |= {"cella": tuple(size * (pixel_size or 0.0) for size in (w, h, 1))}
        for name, value in fields.items():
            header[name] = value
        file.seek(0)
        file.write(header.tobytes())
    return n, h, w


def read_map(path: str | Path, voxel_size: float | None = None) -> tuple[np.ndarray, float]:
    """Read a map, float32, [z, y, x] whatever the order in its file, and its voxel size in A: given, or the header's.

    Raises
    ------
    FileNotFoundError, ValueError : no such file, a damaged one, a stack, NaN, no voxel size.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: expected an .mrc map, got no file; check the path")
    file = StackFile.read_header(str(path))
    stack = file.holds in ("images", "volumes") or Path(path).suffix == ".mrcs"
    if stack or (len(set(file.shape)) > 1 and file.holds != "a volume"):
        raise ValueError(f"{path}: expected a cubic map, got {file.shape}; is it a stack of images? pad or crop it")
    voxel_size = file.voxel_size if voxel_size is None else voxel_size
    if voxel_size <= 0:
        raise ValueError(f"{path}: expected a voxel size, got none in the header; give it as voxel_size")
    order = [file.axes[::-1].index(axis) for axis in (2, 1, 0)]
    return checks.as_images(str(path), file.map().transpose(order)), checks.number("voxel_size", voxel_size, above=0)


def write_map(path: str | Path, volume: np.ndarray, pixel_size: float) -> Path:
    """Write a volume `(n, n, n)`, [z, y, x], as an MRC map with its voxel size in A, atomically; return the path."""
    with atomic(path) as temporary:
        with mrcfile.new(temporary, checks.as_images(str(path), volume), overwrite=True) as file:
            file.voxel_size = pixel_size
            file.header.label[0] = (
                "Created by cryo_lib"  # mrcfile's label holds the time: no two files would be the same
            )
    return Path(path)
