"""cryoSPARC's .cs files: particles under RELION's labels."""

from __future__ import annotations

import tokenize
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

from cryo_lib.files import foreign
from cryo_lib.simulate.projection import euler_from_rotation
from cryo_lib.stacks.columns import ANGLES, DEFOCUS, MICROSCOPE, ORIGINS


def read(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read a .cs file into RELION's columns: its poses are rotation vectors of our R, its shifts RELION's origins.

    Poses in 3D, or else those in 2D (psi). Coordinates are pixels of the micrograph as its file has them. A file's name
    keeps the `>` before it.

    Source: pyem (metadata/cryosparc2.py) and cryoDRGN (parse_pose_csparc), which agree.
    """
    try:
        with open(path, "rb") as file:
            cs = np.lib.format.read_array(file, allow_pickle=False, max_header_size=1 << 24)
    except (ValueError, EOFError, SyntaxError, TypeError, MemoryError, tokenize.TokenError) as error:
        got = foreign(path) or "one that numpy cannot read: damaged, cut short or no .cs file; copy it again"
        raise ValueError(f"{path}: expected a cryoSPARC .cs file, got {got}") from error
    names, needed = cs.dtype.names or (), ("blob/path", "blob/idx", "blob/shape", "blob/psize_A")
    if not set(needed) <= set(names) or cs.ndim != 1 or not len(cs):
        raise ValueError(
            f"{path}: expected particles with {', '.join(needed)}, got shape {cs.shape} of "
            f"{', '.join(names) or 'none'}; a passthrough file has none: open the job's main particles .cs"
        )

    def column(name: str, *shape: int) -> np.ndarray:
        values = cs[name] if name in names else np.array(0)
        if values.shape != (len(cs), *shape) or values.dtype.kind not in "fiu" or not np.isfinite(values).all():
            got = f"{values.dtype} of shape {values.shape}, or NaN or infinity among them"
            raise ValueError(f"{path}: {name}: expected finite numbers of shape {(len(cs), *shape)}, got {got}")
        return values.astype(float)

    files = _texts(cs["blob/path"])
    numbers = column("blob/idx").astype(int) + 1
    table = pd.DataFrame({"rlnImageName": [f"{number:06d}@{name}" for number, name in zip(numbers.tolist(), files)]})
    optics = pd.DataFrame({"rlnImagePixelSize": column("blob/psize_A").round(6)})
    optics["rlnImageSize"], optics["rlnImageDimensionality"] = column("blob/shape", 2)[:, 1].astype(int), 2
    poses = next((group for group in ("alignments3D", "alignments2D") if f"{group}/pose" in names), None)
    if poses:
        if poses == "alignments3D":
            rotations = Rotation.from_rotvec(column(f"{poses}/pose", 3)).as_matrix()
            table[ANGLES] = euler_from_rotation(rotations)
        else:
            table["rlnAnglePsi"] = np.rad2deg(column(f"{poses}/pose"))
        scale = column(f"{poses}/psize_A" if f"{poses}/psize_A" in names else "blob/psize_A")
        table[ORIGINS] = column(f"{poses}/shift", 2) * scale[:, None]
        for label, name in (("rlnRandomSubset", f"{poses}/split"), ("rlnClassNumber", f"{poses}/class")):
            if name in names:
                table[label] = column(name).astype(int) + 1
    if "location/micrograph_path" in names:
        table["rlnMicrographName"] = [name.lstrip(">") for name in _texts(cs["location/micrograph_path"])]
        size = column("location/micrograph_shape", 2)
        for axis, label in enumerate(("rlnCoordinateX", "rlnCoordinateY")):
            table[label] = column(f"location/center_{'xy'[axis]}_frac") * size[:, 1 - axis]
    for frame, labels, fields in (
        (table, [*DEFOCUS, "rlnPhaseShift"], ("df1_A", "df2_A", "df_angle_rad", "phase_shift_rad")),
        (optics, MICROSCOPE, ("accel_kv", "cs_mm", "amp_contrast")),
    ):
        for label, field in zip(labels, fields):
            if f"ctf/{field}" in names:
                values = column(f"ctf/{field}")
                frame[label] = np.rad2deg(values) if field.endswith("rad") else values.round(6)
    group = optics.groupby(list(optics.columns), sort=False).ngroup()
    table["rlnOpticsGroup"] = group + 1
    optics = optics[~group.duplicated()].reset_index(drop=True)
    optics.insert(0, "rlnOpticsGroup", optics.index + 1)
    optics.insert(0, "rlnOpticsGroupName", [f"opticsGroup{number}" for number in optics["rlnOpticsGroup"]])
    return table, optics


def _texts(values: np.ndarray) -> list[str]:
    return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values.tolist()]
