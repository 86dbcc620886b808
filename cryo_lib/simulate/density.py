"""Atoms to density: the electrostatic potential of a structure on a grid, protein bright."""

from __future__ import annotations

import gemmi
import numpy as np

from cryo_lib import checks


def density(structure: gemmi.Structure, n: int, pixel_size: float, resolution: float) -> np.ndarray:
    """Return the electrostatic density of a structure, protein bright.

    Electron form factors (gemmi's `DensityCalculatorE`). The atoms' own B factors are replaced by
    8 pi^2 (0.225 resolution)^2, the Gaussian of that resolution; occupancies count.

    Parameters
    ----------
    structure : one model, coordinates in A; the origin falls on voxel `n // 2` along each axis. Left as it is.
    n : box side in voxels.
    pixel_size : A per voxel.
    resolution : in A, at least two voxels.

    Returns
    -------
    `(n, n, n)` float32, `[z, y, x]`; its sum times `pixel_size**3` is the sum of the form factors at zero angle.

    Raises
    ------
    TypeError, ValueError : bad numbers; not one model, no atoms, an unknown element or a coordinate that is not
        finite; atoms that reach within half the resolution of the faces of the box, or beyond.
    """
    n = checks.integer("n", n, low=4)
    pixel_size = checks.number("pixel_size", pixel_size, above=0)
    resolution = checks.number("resolution", resolution, low=2 * pixel_size)
    if len(structure) != 1:
        raise ValueError(f"structure {structure.name!r}: expected one model, got {len(structure)}; keep one of them")
    model = structure[0].clone()
    atoms = [site.atom for site in model.all()]
    if not atoms:
        raise ValueError(f"structure {structure.name!r}: expected atoms, got none; check the chains that were chosen")
    unknown = next((atom for atom in atoms if atom.element.name == "X"), None)
    if unknown is not None:
        raise ValueError(
            f"structure {structure.name!r}: atom {unknown.name!r} (serial {unknown.serial}) has no known element; "
            "set or remove it"
        )
    positions = np.array([atom.pos.tolist() for atom in atoms])
    _check_box(structure.name, positions, n, pixel_size, margin=resolution / 2)

    for atom, position in zip(atoms, positions + n // 2 * pixel_size):
        atom.pos = gemmi.Position(*position)
        atom.b_iso = 8 * np.pi**2 * (0.225 * resolution) ** 2
        atom.aniso = gemmi.SMat33f(0, 0, 0, 0, 0, 0)
    calculator = gemmi.DensityCalculatorE()
    side = n * pixel_size
    calculator.grid.set_unit_cell(gemmi.UnitCell(side, side, side, 90, 90, 90))
    calculator.grid.set_size(n, n, n)
    calculator.add_model_density_to_grid(model)
    return np.ascontiguousarray(calculator.grid.array.transpose(2, 1, 0), dtype=np.float32)


def _check_box(name: str, positions: np.ndarray, n: int, pixel_size: float, margin: float) -> None:
    if not np.isfinite(positions).all():
        raise ValueError(f"structure {name!r}: expected finite coordinates, got NaN or infinity; remove these atoms")
    low, high = positions.min(axis=0) - margin, positions.max(axis=0) + margin
    half = (n - 1) // 2  # voxels above the centre, the shorter side of an even box
    reach = max(high.max(), -low.min())
    if reach > half * pixel_size:
        extent = ", ".join(f"{axis} {a:.1f} to {b:.1f}" for axis, a, b in zip("xyz", low, high))
        box = 2 * int(np.ceil(reach / pixel_size)) + 2
        larger = np.ceil(1000 * reach / half) / 1000
        raise ValueError(
            f"structure {name!r}: its density spans {extent} A, so the box must reach {reach:.1f} A from the origin; "
            f"{n} voxels of {pixel_size:g} A reach {half * pixel_size:.1f} A; use n >= {box} or "
            f"pixel_size >= {larger:.3f} A, or centre the structure"
        )
