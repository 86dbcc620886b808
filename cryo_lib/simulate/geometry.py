"""Whether conformations are molecules: their chains whole, their atoms apart, their size between that of the ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import gemmi
import numpy as np
from scipy.spatial import cKDTree

from cryo_lib.simulate.atoms import Atoms

CLASH = 2.0  # A: atoms of residues that are not bound to each other are further apart
CA_MARGIN, RESIDUES_A_CLASH, RADIUS_MARGIN = 0.3, 200, 0.05  # of `Limits`


class Geometry(NamedTuple):
    """What is measured on a structure."""

    ca_distances: np.ndarray  # (links,) A, between CA atoms of residues bound to each other
    clashes: int  # pairs of atoms nearer than `CLASH`, of residues neither the same nor bound
    radius: float  # A, of gyration, all atoms alike


def measure(structure: gemmi.Structure, like: gemmi.Structure | None = None) -> Geometry:
    """The geometry of a structure; residues are bound where they are in `like` (None: itself), of the same residues."""
    atoms = Atoms.of(structure)
    linked = (atoms if like is None else Atoms.of(like)).linked
    i, j = np.sort(atoms.residue[cKDTree(atoms.xyz).query_pairs(CLASH, output_type="ndarray")], axis=1).T
    bound = (i == j) | ((j == i + 1) & np.append(linked, False)[i])
    distances = np.linalg.norm(np.diff(atoms.ca_xyz, axis=0), axis=1)[linked]
    return Geometry(distances, int((~bound).sum()), float(np.sqrt(atoms.xyz.var(axis=0).sum())))


class Limits(NamedTuple):
    """What conformations between two structures may have."""

    ca_distances: tuple[float, float]  # A: those of both ends, and `CA_MARGIN` beyond
    clashes: float  # as many as in the worse end, and one for each `RESIDUES_A_CLASH` residues
    radius: tuple[float, float]  # A: those of both ends, and `RADIUS_MARGIN` of them beyond


def limits(closed: gemmi.Structure, open_: gemmi.Structure) -> Limits:
    """What conformations between two structures may have, by what these two have themselves."""
    ends = [measure(closed), measure(open_)]
    distances, radii = np.concatenate([end.ca_distances for end in ends]), [end.radius for end in ends]
    return Limits(
        (float(distances.min() - CA_MARGIN), float(distances.max() + CA_MARGIN)),
        max(end.clashes for end in ends) + sum(map(len, closed[0])) / RESIDUES_A_CLASH,
        (min(radii) * (1 - RADIUS_MARGIN), max(radii) * (1 + RADIUS_MARGIN)),
    )


def require_sound(measured: Sequence[Geometry], limits: Limits) -> None:
    """ValueError that lists what is beyond the limits in which conformations."""
    faults = []
    for k, (distances, clashes, radius) in enumerate(measured):
        for value in (distances.min(), distances.max()):
            if not limits.ca_distances[0] <= value <= limits.ca_distances[1]:
                faults.append(f"conformation {k}: CA atoms of bound residues {value:.2f} A apart")
        if clashes > limits.clashes:
            faults.append(f"conformation {k}: {clashes} pairs of atoms under {CLASH:g} A")
        if not limits.radius[0] <= radius <= limits.radius[1]:
            faults.append(f"conformation {k}: radius of gyration {radius:.1f} A")
    if faults:
        (low, high), (small, large) = limits.ca_distances, limits.radius
        raise ValueError(
            f"conformations: expected CA-CA distances of {low:.2f} to {high:.2f} A, at most {limits.clashes:.0f} "
            f"clashes and radii of gyration of {small:.1f} to {large:.1f} A, by the two structures themselves; got "
            f"{'; '.join(faults)}. No path leads from the one to the other: look at the counterparts of the chains "
            "(copies of one protein are paired by name: rename those of the open file), take two states of one "
            "assembly, or leave out chains that move through others"
        )
