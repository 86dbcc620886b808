"""Particle stacks on disk: .star (RELION 3.0, 3.1 and later), .mrc, .mrcs and cryoSPARC .cs in; .mrcs + .star out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cryo_lib import checks
from cryo_lib.files import atomic
from cryo_lib.simulate.projection import euler_from_rotation, rotation_from_euler
from cryo_lib.stacks import cryosparc
from cryo_lib.stacks.columns import (
    ANGLES,
    CTF_DEFAULTS,
    DEFOCUS,
    DETECTOR,
    MICROSCOPE,
    ORIGINS,
    numbers,
    pixel_size_of,
    require,
    resized,
)
from cryo_lib.stacks.locate import find_images
from cryo_lib.stacks.mrc import BATCH, Images, StackFile, write_stack
from cryo_lib.stacks.star import Star
from cryo_lib.stacks.star import text as star_text


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
    _by_hand: bool = False  # the pixel size, which may not be what the file says

    @classmethod
    def open(cls, path: str | Path, *, project: Path | str | None = None, pixel_size: Any = None) -> ParticleStack:
        """Open a .star, .cs, .mrcs or .mrc file; headers and image numbers are checked now, images are read later.

        Parameters
        ----------
        project : the folder that image references are relative to; None searches, see `stacks.locate`.
        pixel_size : A, in place of what the files say; needed where they disagree.

        Raises
        ------
        FileNotFoundError : the file, or a stack it names, is not there.
        ValueError : not such a file, missing columns, an image number beyond its stack, damaged or short stacks, mixed
            boxes, pixel sizes that are mixed or disagree, volumes, tilt series and subtomograms.
        """
        path, star, optics = Path(path), None, None
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected a .star, .cs, .mrcs or .mrc file, got no file; check the path")
        suffix = checks.choice(f"{path}: file type", path.suffix, (".star", ".cs", ".mrcs", ".mrc"))
        if suffix in (".mrcs", ".mrc"):
            file = StackFile.read_header(str(path.absolute())).images(numbered=False)
            table, images = pd.DataFrame(index=range(file.shape[0])), Images.of(file)
        else:
            table, optics, star = _read_star(path) if suffix == ".star" else (*cryosparc.read(path), None)
            images = find_images(path, table["rlnImageName"], project)
            if star is None:  # the mark of a .cs has had its use
                table["rlnImageName"] = table["rlnImageName"].str.replace("@>", "@")
        used = None if optics is None else optics.iloc[np.unique(_optics_rows(path, table, optics, images.shape[2]))]
        if by_hand := pixel_size is not None:
            pixel_size = checks.number("pixel_size", pixel_size, above=0.0)
        else:
            pixel_size = pixel_size_of(path, table, used, images.files)
        return cls(path, table, optics, images, pixel_size, star, by_hand)

    def __len__(self) -> int:
        return len(self.table)

    def spread(self, most: int) -> np.ndarray:
        """Rows that lie evenly over the stack, ascending, at most so many."""
        return np.unique(np.linspace(0, len(self) - 1, most).astype(int))

    @cached_property
    def poses(self) -> Poses | None:
        """The poses, or None where the table lacks any of the three angles; origins left out are zero, as in RELION."""
        if not set(ANGLES) <= set(self.table):
            return None
        rotations = rotation_from_euler(*numbers(self.path, self.table[ANGLES]).to_numpy().T)
        labels = ORIGINS if set(ORIGINS) & set(self.table) else ["rlnOriginX", "rlnOriginY"]
        origins = numbers(self.path, self.table.reindex(columns=labels, fill_value=0.0)).to_numpy()
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
        if "rlnRandomSubset" not in self.table:
            return None
        return numbers(self.path, self.table[["rlnRandomSubset"]], whole=True).to_numpy(np.int64)[:, 0]

    @cached_property
    def ctf(self) -> pd.DataFrame | None:
        """CTF parameters, a row a particle, under RELION's labels (A, degrees, kV, mm); None where there is no defocus.

        As in RELION, a particle's own value comes before its optics group's, and rlnPhaseShift, rlnCtfBfactor and
        rlnCtfScalefactor are 0, 0 and 1 where left out.
        """
        table = self.table
        if not set(DEFOCUS) <= set(table):
            return None
        if self.optics is not None:
            rows = _optics_rows(self.path, table, self.optics, self.images.shape[2])
            optics = self.optics.iloc[rows].set_axis(table.index)
            table = pd.concat([table, optics[optics.columns.difference(table.columns)]], axis=1)
        require(self.path, table, MICROSCOPE)
        table = table.assign(**{label: value for label, value in CTF_DEFAULTS.items() if label not in table})
        return numbers(self.path, table[DEFOCUS + MICROSCOPE + list(CTF_DEFAULTS)])

    @cached_property
    def normalisation(self) -> Normalisation:
        """Background level and spread, and the sign of the contrast, of up to 256 images spread over the stack."""
        images = self.images[self.spread(BATCH)]
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
    if what := _tomography(star, table):
        raise ValueError(
            f"{path}: expected single particles, got {what}; tomography is not read: use RELION's own tools"
        )
    _as_taken(path, table, table)
    if "optics" not in star.blocks:
        return table, None, star
    if not star.blocks["optics"].loop:
        raise ValueError(f"{path}: expected data_optics as a table, got no loop_ in it; write it as RELION does")
    optics = star.table("optics")
    require(path, optics, ["rlnOpticsGroup"])
    _as_taken(path, table, optics)
    if "rlnOpticsGroup" not in table and len(optics) == 1:
        table["rlnOpticsGroup"] = optics["rlnOpticsGroup"].iloc[0]
    return table, optics, star


def _as_taken(path: Path, table: pd.DataFrame, marked: pd.DataFrame) -> None:
    """Raise ValueError where particles have a CTF that RELION says images were multiplied by, or its sign, before."""
    for label in ("rlnCtfDataArePhaseFlipped", "rlnCtfDataAreCtfPremultiplied"):
        if set(DEFOCUS) <= set(table) and label in marked and numbers(path, marked[[label]])[label].any():
            raise ValueError(
                f"{path}: expected images with the CTF that they were taken with, got {label} 1, to which it would be "
                f"applied again; extract them without, or leave out {DEFOCUS[0]}: then no CTF is applied"
            )


def _tomography(star: Star, table: pd.DataFrame) -> str:
    """What a star file of tomography holds, by its labels; "" for single particles.

    RELION 5 says that its images are stacks of tilts; RELION 4 and 5 have labels of their own; Warp and M write the
    tilts of a particle as rows of one group, whose B-factor is the dose and whose scale the tilt: both vary within a
    group, and the doses of one group are those of others. B-factors that RELION fitted to particles recur nowhere; of
    one group alone there is no telling, and it is taken for tilts.
    """
    flag = "rlnTomoSubTomosAre2DStacks"
    if any(
        (star.table(name)[flag].astype(str) == "1").any() for name in star.blocks if flag in star.blocks[name].labels
    ):
        return f"2D stacks of tilts ({flag} 1)"
    if labels := [label for label in table if label.startswith("rlnTomo")]:
        return f"subtomograms ({labels[0]})"
    series = ["rlnGroupName", "rlnCtfBfactor", "rlnCtfScalefactor"]
    if set(series) <= set(table):
        kinds = table[series].groupby("rlnGroupName").nunique()
        recur = len(kinds) == 1 or 2 * table["rlnCtfBfactor"].nunique() <= len(table)
        if recur and (kinds > 1).all(axis=1).any():
            return "2D tilt series, as Warp and M write (rlnCtfScalefactor varies within rlnGroupName)"
    return ""


def _optics_rows(path: Path, table: pd.DataFrame, optics: pd.DataFrame, box: int) -> np.ndarray:
    """Return each particle's row in the optics table, after checking that the two and the box belong together."""
    require(path, table, ["rlnOpticsGroup"])
    groups = numbers(path, optics[["rlnOpticsGroup"]], True, "data_optics row")["rlnOpticsGroup"].astype(int)
    wanted = numbers(path, table[["rlnOpticsGroup"]], True)["rlnOpticsGroup"].astype(int)
    if groups.duplicated().any():
        raise ValueError(f"{path}: data_optics: expected each group once, got {groups.tolist()}; number them anew")
    rows = pd.Index(groups).get_indexer(wanted)
    if (rows < 0).any():
        row = int(np.argmin(rows))
        got = f"got {wanted[row]}; add it to data_optics"
        raise ValueError(f"{path}, particle row {row + 1}: expected an optics group of {groups.tolist()}, {got}")
    for column, expected in (("rlnImageDimensionality", 2), ("rlnImageSize", box)):
        if got := set(optics.iloc[np.unique(rows)].get(column, [])) - {expected}:
            way = "correct it" if column == "rlnImageSize" else "3D subtomograms are not read"
            raise ValueError(f"{path}: data_optics: expected {column} {expected}, as the stacks, got {got}; {way}")
    return rows


def write(
    path: str | Path,
    images: Any,
    like: ParticleStack,
    *,
    columns: Mapping[str, Any] | None = None,
    project: str | Path | None = None,
) -> Path:
    """Write `images` in place of those of `like`: a `.star` and the `.mrcs` beside it, or the `.mrcs` alone.

    The star keeps every row, order and column of `like` to the letter, but for the image references, `columns`, and a
    pixel size that was given by hand; from a .cs file it has poses, CTF, half-sets, classes and micrographs under
    RELION's labels, from a bare stack what its header says. Files appear whole or not at all.

    Parameters
    ----------
    path : ends in .star or .mrcs.
    images : `(n, h, w)`, or an iterable of batches `(m, h, w)`, written as they come: constant memory.
    like : the stack whose rows, box and pixel size these images have.
    columns : finite numbers, `(n,)` of each label: more columns, or in place of those that are there.
    project : the folder that RELION will be run in; None is the star's own folder.

    Raises
    ------
    ValueError : another number or size of images, NaN, a name that would replace an input; columns of another length,
        or for a .mrcs alone.
    OSError : the disk is full or not writable.
    """
    star, stack, references = _targets(path, len(like), project)
    inputs = {os.path.realpath(name) for name in (like.path, *(file.path for file in like.images.files))}
    if inputs & {os.path.realpath(stack), os.path.realpath(star)}:
        raise ValueError(f"{path}: expected a new name, got one that would replace an input; choose another")
    columns = {label: np.asarray(values) for label, values in (columns or {}).items()}
    for label, values in columns.items():
        numeric = values.dtype.kind in "fiub" and np.isfinite(values).all()
        if Path(path) == stack or values.shape != (len(like),) or not numeric:
            got = f"shape {values.shape}" if numeric else "NaN, infinity or text"
            problem = f"expected a .star and {len(like)} numbers for it, one a row, got {got}"
            raise ValueError(f"{path}: {label}: {problem}")
    if Path(path) == stack:
        with atomic(stack) as part:
            write_stack(part, images, like.images.shape, like.pixel_size)
        return stack
    with atomic(star) as star_part, atomic(stack) as part:
        write_stack(part, images, like.images.shape, like.pixel_size)
        with open(star_part, "wb") as file:
            file.writelines(_star_like(like, columns, references))
    return star


def _star_like(like: ParticleStack, columns: Mapping[str, np.ndarray], references: Iterator[str]) -> Iterable[bytes]:
    """The text of the star file of images in place of those of `like`."""
    star, optics, table, sizes = like._star, like.optics, like.table, {}
    if like._by_hand:
        columns = resized(table, like.pixel_size) | columns
        sizes = {} if optics is None else resized(optics, like.pixel_size)
    if star is None:
        tables = {} if optics is None else {"optics": optics.assign(**sizes)}
        if optics is None or not set(MICROSCOPE) <= set(optics):  # RELION takes no such groups; it does as in 3.0
            detector = dict(zip(DETECTOR, (like.pixel_size, 1e4))) if like.pixel_size else {}
            tables, table = {}, table.assign(**detector).drop(columns="rlnOpticsGroup", errors="ignore")
        table = table.assign(**columns)
        table = table.reindex(columns=["rlnImageName", *table.columns.drop("rlnImageName", errors="ignore")])
        return [star_text(tables | {"particles": table.assign(rlnImageName=list(references))})]
    if sizes:
        star = Star(star.path, b"".join(star.replaced("optics", _as_text(sizes))))
    return star.replaced(star.find("rlnImageName"), {"rlnImageName": references} | _as_text(columns))


def _as_text(columns: Mapping[str, np.ndarray]) -> dict[str, Iterator[str]]:
    return {label: map("{:.6f}".format, values) for label, values in columns.items()}


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
    columns : more columns, finite numbers or text, `(n,)` or one for all: rlnDefocusU, rlnMicrographName, ...

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
    for label, values in (columns := {label: np.asarray(values) for label, values in (columns or {}).items()}).items():
        if values.shape not in ((), (n,)) or (values.dtype.kind == "f" and not np.isfinite(values).all()):
            raise ValueError(f"{label}: expected {n} finite numbers or texts, got shape {values.shape}, or NaN in it")
    table = table.assign(**{"rlnRandomSubset": half_sets.astype(int), "rlnOpticsGroup": 1} | columns)
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
    stack, folder = path.with_suffix(".mrcs"), os.path.realpath(path.parent)  # RELION takes .. where links lead
    name = os.path.relpath(
        os.path.join(folder, stack.name), os.path.realpath(path.parent if project is None else project)
    )
    if re.search(r"[\s@\"#:]", name):
        raise ValueError(
            f"{path}: expected a name RELION can read, got blanks, @, #, : or quotes in {name!r}; rename it"
        )
    return path.with_suffix(".star"), stack, _references(name, n)


def _references(stack: str, n: int) -> Iterator[str]:
    return (f"{number:06d}@{stack}" for number in range(1, n + 1))
