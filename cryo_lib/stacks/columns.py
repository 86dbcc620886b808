"""RELION's labels, the one check that every column of numbers goes through, and what columns say of the pixel size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cryo_lib.stacks.mrc import PIXEL_TOLERANCE, StackFile

ANGLES = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
ORIGINS = ["rlnOriginXAngst", "rlnOriginYAngst"]
DEFOCUS = ["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"]
MICROSCOPE = ["rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"]
CTF_DEFAULTS = {"rlnPhaseShift": 0.0, "rlnCtfBfactor": 0.0, "rlnCtfScalefactor": 1.0}
DETECTOR = ["rlnDetectorPixelSize", "rlnMagnification"]  # RELION 3.0: um, and times
SIZES = ["rlnImagePixelSize", "rlnPixelSize"]  # RELION 3.1's, and what RELION 3.0 writes of references


def require(path: Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    """ValueError unless a table has these columns."""
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{path}: expected the columns {', '.join(columns)}, got no {', '.join(missing)}; add them")


def numbers(path: Path, table: pd.DataFrame, whole: bool = False, row: str = "particle row") -> pd.DataFrame:
    """The table in float64; ValueError names the first field that is no finite number, or no `whole` one.

    RELION reads a number's first characters, `1,5` as 1; here such a field is none.
    """
    found = table.apply(pd.to_numeric, errors="coerce").astype(float)
    values = found.to_numpy()
    words = np.array([column.dtype.kind == "b" for _, column in table.items()], bool)  # True and False
    bad = np.argwhere(~np.isfinite(values) | words | (whole & ((np.trunc(values) != values) | (abs(values) > 2**53))))
    if len(bad):
        at, column = bad[0]
        kind, like = ("whole", "1") if whole else ("finite", "1.5")
        got = f"got {table.iloc[at, column]} ({len(bad)} such fields); correct (as {like}) or remove these rows"
        raise ValueError(f"{path}, {row} {at + 1}: expected a {kind} {table.columns[column]}, {got}")
    return found


def pixel_size_of(path: Path, table: pd.DataFrame, optics: pd.DataFrame | None, files: list[StackFile]) -> float | None:
    """Return the pixel size all sources agree on; a header's 0 says nothing, its 1.0 only where no other speaks."""
    said = {}
    for name, frame in (("data_optics", optics), ("the particles", table)):
        if frame is not None:
            labels = [*SIZES, *DETECTOR * (set(DETECTOR) <= set(frame))]
            frame = numbers(path, frame[[label for label in labels if label in frame]], row=f"row of {name}")
            said |= {f"{label} of {name}": frame[label].to_numpy() for label in SIZES if label in frame}
            if DETECTOR[0] in frame:
                with np.errstate(divide="ignore", invalid="ignore"):
                    said["rlnDetectorPixelSize / rlnMagnification"] = 1e4 * np.divide(*frame[DETECTOR].to_numpy().T)
    headers = np.array([file.pixel_size for file in files])
    said["the MRC headers"] = headers[(headers > 0) & ((headers != 1.0) | (not said))]
    said = {source: np.unique(values.round(6)) for source, values in said.items() if len(values)}
    values = np.concatenate([*said.values(), []])
    if len(values) and not 0 < values.max() <= values.min() * (1 + PIXEL_TOLERANCE) < np.inf:
        found = "; ".join(f"{', '.join(map(str, sizes[:5]))} by {source}" for source, sizes in said.items())
        raise ValueError(
            f"{path}: expected one pixel size, got (A) {found}; split the particles by it, or open with pixel_size=..."
        )
    return float(values[0]) if len(values) else None


def resized(frame: pd.DataFrame, pixel_size: float) -> dict[str, np.ndarray]:
    """The columns of a table that say another pixel size, as they must be to say this one."""
    said = frame[[label for label in (*SIZES, *DETECTOR) if label in frame]].apply(pd.to_numeric, errors="coerce")
    wanted = {label: np.full(len(frame), pixel_size) for label in SIZES if label in frame}
    if set(DETECTOR) <= set(frame):
        wanted[DETECTOR[0]] = 1e-4 * pixel_size * said[DETECTOR[1]].to_numpy(float)
    return {
        label: values for label, values in wanted.items() if not np.allclose(said[label], values, PIXEL_TOLERANCE, 0)
    }
