"""Particle stacks on disk: .star (RELION 3.0, 3.1 and later), .mrc, .mrcs and cryoSPARC .cs in; .mrcs + .star out.

A stack named by a .star or .cs file is looked for in this order; the first hit is taken, with a warning where another
place holds a different file of that name:

1. an absolute path, as it is;
2. under `project`, and nowhere else, where the caller gives it;
3. under the working directory: RELION's and cryoSPARC's project directory;
4. under the folder of the .star or .cs file, then under each folder above it, nearest first.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

from cryo_lib import checks
from cryo_lib.files import atomic
from cryo_lib.simulate.projection import euler_from_rotation, rotation_from_euler
from cryo_lib.stacks.mrc import BATCH, Images, StackFile, write_stack
from cryo_lib.stacks.star import Star
from cryo_lib.stacks.star import text as star_text

ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
ORIGINS = ["rlnOriginXAngst", "rlnOriginYAngst"]
DEFOCUS = ["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"]
MICROSCOPE = ["rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"]
CTF_DEFAULTS = {"rlnPhaseShift": 0.0, "rlnCtfBfactor": 0.0, "rlnCtfScalefactor": 1.0}

_PIXEL_TOLERANCE = 0.005  # relative; sources of the pixel size that differ by more disagree


@dataclass(frozen=True)
class Poses:
    """`rotations` `(n, 3, 3)`, image axes to volume axes; `shifts` `(n, 2)`, (x, y) in A by which each projection was
    moved in its image: the negative of RELION's origins, and, in pixels, what `projection.project` takes."""

    rotations: np.ndarray
    shifts: np.ndarray


@dataclass(frozen=True)
class Normalisation:
    """Grey levels outside the inscribed circle (background), and the particles' `contrast` to it: "bright" or "dark".

    None where the images do not tell: the centre (to a third of the radius) less the background is, over the images,
    within three standard errors of zero, or there are fewer than three images.
    """

    background_mean: float
    background_sd: float
    contrast: str | None


@dataclass(frozen=True, eq=False)
class ParticleStack:
    """Particle images and what their file says of them; `ParticleStack.open` makes one."""

    path: Path
    table: pd.DataFrame  # the particles, a row each, in the file's order, under RELION's labels; of .mrcs no columns
    optics: pd.DataFrame | None  # the optics groups; RELION 3.0 and .mrcs have none
    images: Images  # lazy, (n, h, w) float32
    pixel_size: float | None  # A; None where no source says it
    _star: Star | None

    @classmethod
    def open(cls, path: str | Path, *, project: Path | str | None = None, pixel_size: Any = None) -> ParticleStack:
        """Open a .star, .cs, .mrcs or .mrc file; headers and image numbers are checked now, images are read later.

        Parameters
        ----------
        project : the folder that image references are relative to; None searches, see the top of this module.
        pixel_size : A, in place of what the files say; needed where they disagree.

        Raises
        ------
        FileNotFoundError : the file, or a stack it names, is not there.
        ValueError : not such a file, missing columns, an image number beyond its stack, damaged or short stacks, mixed
            boxes, pixel sizes that are mixed or disagree.
        """
        path, star, optics = Path(path), None, None
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a .star, .cs, .mrcs or .mrc file, got no file; check the path")
        suffix = checks.choice(f"{path}: file type", path.suffix, (".star", ".cs", ".mrcs", ".mrc"))
        if suffix in (".mrcs", ".mrc"):
            file = StackFile.read_header(str(path.absolute()))
            table, images = pd.DataFrame(index=range(file.shape[0])), Images.of(file)
        else:
            table, optics, star = _read_star(path) if suffix == ".star" else (*_read_cs(path), None)
            images = _find_images(path, table["rlnImageName"], project)
        used = None if optics is None else optics.iloc[np.unique(_optics_rows(path, table, optics, images.shape[2]))]
        if pixel_size is None:
            pixel_size = _pixel_size(path, table, used, images.files)
        else:
            pixel_size = checks.number("pixel_size", pixel_size, above=0.0)
        return cls(path, table, optics, images, pixel_size, star)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def poses(self) -> Poses | None:
        """The poses, or None where the table lacks any of the three angles; origins left out are zero, as in RELION."""
        if not set(ANGLES) <= set(self.table):
            return None
        rotations = rotation_from_euler(*_numbers(self.path, self.table[ANGLES]).to_numpy().T)
        labels = ORIGINS if set(ORIGINS) & set(self.table) else ["rlnOriginX", "rlnOriginY"]
        origins = _numbers(self.path, self.table.reindex(columns=labels, fill_value=0.0)).to_numpy()
        if labels == ORIGINS:
            return Poses(rotations, 0.0 - origins)
        if origins.any() and self.pixel_size is None:
            raise ValueError(
                f"{self.path}: expected a pixel size, for rlnOriginX and rlnOriginY, got none; open with pixel_size=..."
            )
        return Poses(rotations, 0.0 - origins * (self.pixel_size or 0.0))

    @property
    def half_sets(self) -> np.ndarray | None:
        """rlnRandomSubset, `(n,)` int64, or None where the table lacks it."""
        return self.table["rlnRandomSubset"].to_numpy(np.int64) if "rlnRandomSubset" in self.table else None

    @cached_property
    def ctf(self) -> pd.DataFrame | None:
        """CTF parameters, a row a particle, under RELION's labels (A, degrees, kV, mm); None where there is no defocus.

        rlnPhaseShift, rlnCtfBfactor and rlnCtfScalefactor are 0, 0 and 1 where left out, as in RELION.
        """
        table = self.table
        if not set(DEFOCUS) <= set(table):
            return None
        if self.optics is not None:
            rows = _optics_rows(self.path, table, self.optics, self.images.shape[2])
            optics = self.optics.iloc[rows].set_axis(table.index)
            table = pd.concat([optics, table[table.columns.difference(optics.columns)]], axis=1)
        _require(self.path, table, MICROSCOPE)
        return _numbers(
            self.path, table.reindex(columns=DEFOCUS + MICROSCOPE + list(CTF_DEFAULTS)).fillna(CTF_DEFAULTS)
        )

    @cached_property
    def normalisation(self) -> Normalisation:
        """Background level and spread, and the sign of the contrast, of up to 256 images spread over the stack."""
        images = self.images[np.unique(np.linspace(0, len(self) - 1, BATCH).astype(int))]
        h, w = self.images.shape[1:]
        radius = np.hypot(*np.ogrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j])
        background = images[:, radius > 1]
        excess = images[:, radius < 1 / 3].mean(axis=1, dtype=float) - background.mean(axis=1, dtype=float)
        tells = len(images) > 2 and abs(excess.mean()) > 3 * excess.std(ddof=1) / len(images) ** 0.5
        contrast = ("bright" if excess.mean() > 0 else "dark") if tells else None
        return Normalisation(float(background.mean(dtype=float)), float(background.std(dtype=float)), contrast)


def contrast_of(stack: ParticleStack, given: str | None = None) -> str:
    """Return "bright" or "dark", the particles' contrast: as `given`, or as measured where that is bright.

    Raises
    ------
    ValueError : not given, and dark (to invert images is the caller's decision) or not to be told.
    """
    if given is not None:
        return checks.choice("contrast", given, ("bright", "dark"))
    measured = stack.normalisation.contrast
    if measured != "bright":
        unclear = "images that do not tell; pass contrast bright or dark"
        found = "dark ones; to invert them, pass contrast dark" if measured else unclear
        raise ValueError(f"{stack.path}: expected particles brighter than their background, got {found}")
    return measured


def _read_star(path: Path) -> tuple[pd.DataFrame, pd.DataFrame | None, Star]:
    star = Star(path)
    table = star.table(star.find("rlnImageName"))
    if "optics" in star.blocks and not star.blocks["optics"].loop:
        raise ValueError(f"{path}: expected data_optics as a table, got no loop_ in it; write it as RELION does")
    return table, star.table("optics") if "optics" in star.blocks else None, star


def _read_cs(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read a .cs file into RELION's columns: its poses are rotation vectors of our R, its shifts RELION's origins.

    Source: pyem (metadata/cryosparc2.py) and cryoDRGN (parse_pose_csparc), which agree.
    """
    try:
        cs = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected a cryoSPARC .cs file, got one that numpy cannot read ({error})") from error
    names, needed = cs.dtype.names or (), ("blob/path", "blob/idx", "blob/shape", "blob/psize_A")
    if not set(needed) <= set(names) or not len(cs):
        raise ValueError(
            f"{path}: expected particles with {', '.join(needed)}, got {len(cs)} rows of {', '.join(names) or 'none'}; "
            "a passthrough file has none: open the job's main particles .cs"
        )
    paths = (value.decode().lstrip(">") for value in cs["blob/path"])
    table = pd.DataFrame({"rlnImageName": [f"{i + 1:06d}@{name}" for i, name in zip(cs["blob/idx"].tolist(), paths)]})
    optics = pd.DataFrame({"rlnImagePixelSize": cs["blob/psize_A"].astype(float).round(6)})
    optics["rlnImageSize"], optics["rlnImageDimensionality"] = cs["blob/shape"][:, 0].astype(int), 2
    if "alignments3D/pose" in names:
        table[ANGLES] = euler_from_rotation(Rotation.from_rotvec(cs["alignments3D/pose"].astype(float)).as_matrix())
        scale = cs["alignments3D/psize_A" if "alignments3D/psize_A" in names else "blob/psize_A"].astype(float)
        table[ORIGINS] = cs["alignments3D/shift"] * scale[:, None]
    if "alignments3D/split" in names:
        table["rlnRandomSubset"] = cs["alignments3D/split"].astype(int) + 1
    if "ctf/accel_kv" in names:
        for column, name in zip(DEFOCUS + ["rlnPhaseShift"], ("df1_A", "df2_A", "df_angle_rad", "phase_shift_rad")):
            values = cs[f"ctf/{name}"].astype(float)
            table[column] = np.rad2deg(values) if name.endswith("rad") else values
        for column, name in zip(MICROSCOPE, ("accel_kv", "cs_mm", "amp_contrast")):
            optics[column] = cs[f"ctf/{name}"].astype(float).round(6)
    group = optics.groupby(list(optics.columns), sort=False).ngroup()
    table["rlnOpticsGroup"] = group + 1
    optics = optics[~group.duplicated()].reset_index(drop=True)
    optics.insert(0, "rlnOpticsGroup", optics.index + 1)
    optics.insert(0, "rlnOpticsGroupName", [f"opticsGroup{number}" for number in optics["rlnOpticsGroup"]])
    return table, optics


def _find_images(path: Path, references: Iterable[str], project: str | Path | None) -> Images:
    """Find the stack and the image of every row; references are `000007@stack.mrcs`, or a file of one image."""
    parts = [reference.split("@", 1) if "@" in reference else ("1", reference) for reference in references]
    code, names = pd.factorize(np.array([name for _, name in parts], dtype=object))
    numbers = pd.to_numeric(pd.Series([number for number, _ in parts]), errors="coerce")
    index = numbers.fillna(0).to_numpy(np.int64) - 1
    files = [StackFile.read_header(name) for name in _find_files(path, names, project)]
    counts = np.array([file.shape[0] for file in files])[code]
    bad = np.flatnonzero((index < 0) | (index >= counts))
    if len(bad):
        row, stack = bad[0], files[code[bad[0]]].path
        raise ValueError(
            f"{path}, particle row {row + 1}: expected an image number from 1 to {counts[row]}, as in {stack}, got "
            f"{'@'.join(parts[row])!r} ({len(bad)} such rows); the stack was cut short, or is another's"
        )
    boxes = {file.shape[1:]: file.path for file in reversed(files)}
    if len(boxes) > 1:
        found = ", ".join(f"{h} x {w} in {name}" for (h, w), name in boxes.items())
        raise ValueError(f"{path}: expected images of one size, got {found}; split the particles by box")
    return Images(files, code, index)


def _find_files(path: Path, names: Iterable[str], project: str | Path | None) -> list[str]:
    """Find image files in the order given above; warn of those outside the project and of ambiguous ones."""
    here = path.absolute().parent
    roots = [os.getcwd(), str(here)] if project is None else [os.path.abspath(project)]
    folders = roots + [str(folder) for folder in here.parents if project is None]
    found, outside, ambiguous = [], [], []
    for name in names:
        places = {}
        for folder in folders:
            places.setdefault(os.path.normpath(os.path.join(folder, name)), folder)
        hits = [place for place in places if os.path.isfile(place)]
        if not hits:
            raise FileNotFoundError(
                f"{path}: expected {name} under one of {', '.join(folders)}, got no such file; open with project=..."
            )
        found.append(hits[0])
        allowed = roots if os.path.isabs(name) else [places[hits[0]]]
        if not any(hits[0].startswith(os.path.join(root, "")) for root in allowed):
            outside.append(hits[0])
        ambiguous += [f"{hits[0]} (taken) and {hit}" for hit in hits[1:] if not os.path.samefile(hit, hits[0])]
    for files, trouble in (
        (outside, "outside its project folder: they are read, but do not go where the project is copied"),
        (ambiguous, "in more than one place: open with project=... to say which"),
    ):
        if files:
            warnings.warn(f"{path}: {len(files)} image files are {trouble}; the first is {files[0]}", stacklevel=4)
    return found


def _require(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{path}: expected the columns {', '.join(columns)}, got no {', '.join(missing)}; add them")


def _numbers(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table in float64; ValueError names the first field that is no finite number."""
    numbers = table.apply(pd.to_numeric, errors="coerce").astype(float)
    bad = np.argwhere(~np.isfinite(numbers.to_numpy()))
    if len(bad):
        row, column = bad[0]
        got = f"got {table.iloc[row, column]} ({len(bad)} such fields); correct or remove these rows"
        raise ValueError(f"{path}, particle row {row + 1}: expected a finite {table.columns[column]}, {got}")
    return numbers


def _optics_rows(path: Path, table: pd.DataFrame, optics: pd.DataFrame, box: int) -> np.ndarray:
    """Return each particle's row in the optics table, after checking that the two and the box belong together."""
    _require(path, table, ["rlnOpticsGroup"])
    _require(path, optics, ["rlnOpticsGroup"])
    rows = pd.Index(optics["rlnOpticsGroup"]).get_indexer(table["rlnOpticsGroup"])
    if (rows < 0).any():
        row, groups = int(np.argmin(rows)), optics["rlnOpticsGroup"].tolist()
        got = f"got {table['rlnOpticsGroup'][row]}; add it to data_optics"
        raise ValueError(f"{path}, particle row {row + 1}: expected an optics group of {groups}, {got}")
    for column, expected in (("rlnImageDimensionality", 2), ("rlnImageSize", box)):
        if got := set(optics.iloc[np.unique(rows)].get(column, [])) - {expected}:
            raise ValueError(f"{path}: data_optics: expected {column} {expected}, as the stacks, got {got}; correct it")
    return rows


def _pixel_size(path: Path, table: pd.DataFrame, optics: pd.DataFrame | None, files: list[StackFile]) -> float | None:
    """Return the pixel size all sources agree on; a header's 0 says nothing, its 1.0 only where no other speaks."""
    said = {}
    for name, frame in (("data_optics", optics), ("the particles", table)):
        if frame is not None and "rlnImagePixelSize" in frame:
            said[f"rlnImagePixelSize of {name}"] = frame["rlnImagePixelSize"].to_numpy(float)
    if {"rlnDetectorPixelSize", "rlnMagnification"} <= set(table):
        ratio = table["rlnDetectorPixelSize"] / table["rlnMagnification"]
        said["rlnDetectorPixelSize / rlnMagnification"] = 1e4 * ratio.to_numpy(float)
    headers = np.array([file.pixel_size for file in files])
    said["the MRC headers"] = headers[(headers > 0) & ((headers != 1.0) | (not said))]
    said = {source: np.unique(values.round(6)) for source, values in said.items() if len(values)}
    values = np.concatenate([*said.values(), []])
    if len(values) and not 0 < values.max() <= values.min() * (1 + _PIXEL_TOLERANCE):
        found = "; ".join(f"{', '.join(map(str, sizes[:5]))} by {source}" for source, sizes in said.items())
        raise ValueError(
            f"{path}: expected one pixel size, got (A) {found}; split the particles by it, or open with pixel_size=..."
        )
    return float(values[0]) if len(values) else None


def write(
    path: str | Path,
    images: Any,
    like: ParticleStack,
    *,
    columns: Mapping[str, Any] | None = None,
    project: str | Path | None = None,
) -> Path:
    """Write `images` in place of those of `like`: a `.star` and the `.mrcs` beside it, or the `.mrcs` alone.

    The star keeps every row, order and column of `like` to the letter, but for the image references and `columns`; from
    a .cs file it has poses, CTF and half-sets under RELION's labels. Files appear whole or not at all.

    Parameters
    ----------
    path : ends in .star or .mrcs.
    images : `(n, h, w)`, or an iterable of batches `(m, h, w)`, written as they come: constant memory.
    like : the stack whose rows, box and pixel size these images have.
    columns : numbers, `(n,)` of each label: more columns, or in place of those that are there.
    project : the folder that RELION will be run in; None is the star's own folder.

    Raises
    ------
    ValueError : another number or size of images, NaN, a name that would replace an input, no table to make a star of;
        columns of another length, or for a .mrcs alone.
    OSError : the disk is full or not writable.
    """
    star, stack, references = _targets(path, len(like), project)
    inputs = {os.path.realpath(name) for name in (like.path, *(file.path for file in like.images.files))}
    if inputs & {os.path.realpath(stack), os.path.realpath(star)}:
        raise ValueError(f"{path}: expected a new name, got one that would replace an input; choose another")
    columns = {label: np.asarray(values, np.float64) for label, values in (columns or {}).items()}
    for label, values in columns.items():
        if Path(path) == stack or values.shape != (len(like),):
            problem = f"expected a .star and {len(like)} numbers for it, one a row, got shape {values.shape}"
            raise ValueError(f"{path}: {label}: {problem}")
    if Path(path) == stack:
        with atomic(stack) as part:
            write_stack(part, images, like.images.shape, like.pixel_size)
        return stack
    if like._star is None and like.optics is None:
        raise ValueError(f"{path}: expected a like with a particle table, got {like.path}; write a .mrcs, or use new()")
    with atomic(star) as star_part, atomic(stack) as part:
        write_stack(part, images, like.images.shape, like.pixel_size)
        with open(star_part, "wb") as file:
            if like._star is None:
                table = like.table.assign(rlnImageName=list(references), **columns)
                file.write(star_text({"optics": like.optics, "particles": table}))
            else:
                name = like._star.find("rlnImageName")
                fields = {label: map("{:.6f}".format, values) for label, values in columns.items()}
                file.writelines(like._star.replaced(name, {"rlnImageName": references} | fields))
    return star


def new(
    path: str | Path,
    images: Any,
    rotations: Any,
    pixel_size: float,
    *,
    shifts: Any = None,
    voltage: float = 300.0,
    spherical_aberration: float = 2.26,
    amplitude_contrast: float = 0.1,
    half_sets: Any = None,
    columns: Mapping[str, Any] | None = None,
    project: str | Path | None = None,
) -> Path:
    """Write simulated images as a RELION 3.1 `.star` of one optics group, and the `.mrcs` beside it.

    Parameters
    ----------
    path : ends in .star; `images`, `project` as for `write`, the images square.
    rotations : `(n, 3, 3)`, image axes to volume axes.
    pixel_size : A.
    shifts : `(n, 2)` in A, how far (x, y) each projection was moved in its image; None for centred.
    voltage, spherical_aberration, amplitude_contrast : kV, mm, fraction.
    half_sets : `(n,)` of 1 and 2; None alternates them.
    columns : more columns under RELION's labels, `(n,)` each: rlnDefocusU, rlnMicrographName, ...

    Raises
    ------
    ValueError : lengths that differ, images not square, NaN, not rotations, half-sets other than 1 and 2.
    OSError : the disk is full or not writable.
    """
    table = pd.DataFrame(euler_from_rotation(rotations), columns=ANGLES)
    n = len(table)
    star, stack, references = _targets(path, n, project)
    checks.choice(f"{path}: file type", Path(path).suffix, [".star"])
    shifts = np.zeros((n, 2)) if shifts is None else np.asarray(shifts, float)
    if shifts.shape != (n, 2) or not np.isfinite(shifts).all():
        raise ValueError(f"shifts: expected finite A of shape ({n}, 2), got shape {shifts.shape}")
    half_sets = np.arange(n) % 2 + 1 if half_sets is None else np.asarray(half_sets)
    if half_sets.shape != (n,) or not np.isin(half_sets, (1, 2)).all():
        raise ValueError(f"half_sets: expected {n} values of 1 or 2, got {half_sets.size} of {np.unique(half_sets)}")
    table[ORIGINS] = 0.0 - shifts
    table = table.assign(rlnRandomSubset=half_sets.astype(int), rlnOpticsGroup=1, **(columns or {}))
    table.insert(0, "rlnImageName", list(references))
    optics = {"rlnOpticsGroupName": "opticsGroup1", "rlnOpticsGroup": 1, "rlnImageDimensionality": 2}
    optics["rlnImagePixelSize"] = checks.number("pixel_size", pixel_size, above=0.0)
    for column, value in zip(MICROSCOPE, (voltage, spherical_aberration, amplitude_contrast)):
        optics[column] = checks.number(column, value, low=0.0)
    with atomic(star) as star_part, atomic(stack) as part:
        _, h, w = write_stack(part, images, (n, None, None), pixel_size)
        if h != w:
            raise ValueError(f"images: expected square ones, as RELION does, got {h} x {w}; crop or pad them")
        optics = pd.DataFrame([optics | {"rlnImageSize": w}])
        star_part.write_bytes(star_text({"optics": optics, "particles": table}))
    return star


def _targets(path: str | Path, n: int, project: str | Path | None) -> tuple[Path, Path, Iterator[str]]:
    path = Path(path)
    checks.choice(f"{path}: file type", path.suffix, (".star", ".mrcs"))
    stack = path.with_suffix(".mrcs")
    name = os.path.relpath(stack, path.parent if project is None else project)
    if re.search(r"[\s@\"]", name):
        raise ValueError(f"{path}: expected a name RELION can read, got blanks, @ or quotes in {name!r}; rename it")
    return path.with_suffix(".star"), stack, _references(name, n)


def _references(stack: str, n: int) -> Iterator[str]:
    return (f"{number:06d}@{stack}" for number in range(1, n + 1))
