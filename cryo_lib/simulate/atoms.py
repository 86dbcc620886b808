"""The atoms of a structure as arrays, and what moves them: fitted, carried along screws, mended, centred.

Lengths are in Angstrom, rotation vectors in radians.
"""

from __future__ import annotations

from typing import NamedTuple

import gemmi
import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from threadpoolctl import threadpool_limits

PEPTIDE = {  # distances between atoms of a residue and of the next
    ("C", "N"): 1.33,
    ("CA", "N"): 2.43,
    ("C", "CA"): 2.43,
    ("O", "N"): 2.25,
    ("O", "CA"): 2.78,
    ("CA", "CA"): 3.80,
}


class Atoms(NamedTuple):
    """A structure's atoms, in its order, and how its residues hang together."""

    xyz: np.ndarray  # (atoms, 3)
    residue: np.ndarray  # (atoms,), the residue each belongs to
    backbone: dict[str, np.ndarray]  # (residues,) each: the residue's N, CA, C and O among the atoms, -1 where absent
    linked: np.ndarray  # (residues - 1,), whether a residue is bound to the next

    @classmethod
    def of(cls, structure: gemmi.Structure) -> Atoms:
        """The atoms of a structure of one model whose residues all have a CA, as those of `structures.read`."""
        residues = [(chain.name, residue) for chain in structure[0] for residue in chain]
        xyz = np.array([atom.pos.tolist() for _, residue in residues for atom in residue])
        owner = np.repeat(np.arange(len(residues)), [len(residue) for _, residue in residues])
        names = np.array([atom.name for _, residue in residues for atom in residue])
        backbone = {}
        for name in ("N", "CA", "C", "O"):
            backbone[name] = np.full(len(residues), -1)
            backbone[name][owner[names == name]] = np.flatnonzero(names == name)
        chain = np.array([name for name, _ in residues])
        step = np.linalg.norm(np.diff(xyz[backbone["CA"]], axis=0), axis=1)
        return cls(xyz, owner, backbone, (chain[1:] == chain[:-1]) & (step < 4.5))

    @property
    def ca_xyz(self) -> np.ndarray:
        """`(residues, 3)`."""
        return self.xyz[self.backbone["CA"]]


def with_positions(structure: gemmi.Structure, xyz: np.ndarray) -> gemmi.Structure:
    """A copy of the structure with its atoms at `xyz`, `(atoms, 3)`."""
    copy = structure.clone()
    for site, position in zip(copy[0].all(), xyz.tolist(), strict=True):
        site.atom.pos = gemmi.Position(*position)
    return copy


def fit(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotation matrix `(3, 3)` and shift `(3,)` that take points `a` to `b`, `(n, 3)` each, with the least squares."""
    rotation = Rotation.align_vectors(b - b.mean(0), a - a.mean(0))[0].as_matrix()
    return rotation, b.mean(0) - rotation @ a.mean(0)


def centred(structures: list[gemmi.Structure]) -> list[gemmi.Structure]:
    """Put the middle of the box around all atoms of all structures at the origin: so they fit the smallest image."""
    positions = [Atoms.of(structure).xyz for structure in structures]
    corners = np.concatenate([[xyz.min(axis=0), xyz.max(axis=0)] for xyz in positions])
    centre = (corners.min(axis=0) + corners.max(axis=0)) / 2
    return [with_positions(structure, xyz - centre) for structure, xyz in zip(structures, positions, strict=True)]


def carry(closed: gemmi.Structure, turn: np.ndarray, shift: np.ndarray, n: int) -> list[gemmi.Structure]:
    """Carry each residue on its screw: `n` structures, after 0, 1/(n-1), ..., 1 of the motion, chains mended.

    `turn` and `shift`, `(residues, 3)`, are each residue's rotation vector and the displacement of its CA. The first
    structure is `closed` itself.
    """
    atoms = Atoms.of(closed)
    size = np.maximum(np.linalg.norm(turn, axis=1, keepdims=True), 1e-3)
    axis = np.where(size > 1e-3, turn / size, (0.0, 0.0, 1.0))
    along = (shift * axis).sum(1, keepdims=True) * axis
    across = shift - along
    arm = 0.5 * (across + np.cross(axis, across) / np.tan(0.5 * size))  # from the CA to its screw axis
    structures = [closed]
    for fraction in np.linspace(0.0, 1.0, n)[1:]:
        rotation = Rotation.from_rotvec(fraction * size * axis)
        ca = atoms.ca_xyz + arm - rotation.apply(arm) + fraction * along
        xyz = ca[atoms.residue] + rotation[atoms.residue].apply(atoms.xyz - atoms.ca_xyz[atoms.residue])
        structures.append(with_positions(closed, mend(atoms, xyz)))
    return structures


def mend(atoms: Atoms, xyz: np.ndarray, ideal: bool = False) -> np.ndarray:
    """Move `xyz` the least that restores the residues' shapes and peptide links of `atoms` and parts clashing atoms.

    `ideal`: give links the distances of `PEPTIDE` and part all atoms to 3 A, whatever they have in `atoms`.
    """
    pairs = []
    for offset in range(1, 24):  # atoms of a residue are neighbours in the list; the largest residue has 14
        i = np.flatnonzero(atoms.residue[:-offset] == atoms.residue[offset:])
        pairs.append(np.stack([i, i + offset], axis=1))
    for first, second in PEPTIDE:
        pair = np.stack([atoms.backbone[first][:-1], atoms.backbone[second][1:]], axis=1)[atoms.linked]
        pairs.append(pair[(pair >= 0).all(axis=1)])
    lengths = [np.linalg.norm(atoms.xyz[i] - atoms.xyz[j], axis=1) for i, j in (pair.T for pair in pairs)]
    if ideal:
        links = pairs[-len(PEPTIDE) :]
        lengths[-len(PEPTIDE) :] = [np.full(len(p), d) for p, d in zip(links, PEPTIDE.values(), strict=True)]
    bound = sum(map(len, pairs))

    contact = cKDTree(xyz).query_pairs(3.4, output_type="ndarray")
    i, j = np.sort(atoms.residue[contact], axis=1).T
    near = (i == j) | ((j == i + 1) & np.append(atoms.linked, False)[i])
    contact = contact[~near]
    apart = np.full(len(contact), 3.0)
    if not ideal:
        apart = np.minimum(apart, np.linalg.norm(atoms.xyz[contact[:, 0]] - atoms.xyz[contact[:, 1]], axis=1))
    pairs, length = np.concatenate([*pairs, contact]), np.concatenate([*lengths, apart])

    count = np.arange(len(pairs))
    signs = np.repeat([1.0, -1.0], len(pairs))
    difference = sparse.csr_array((signs, (np.tile(count, 2), pairs.T.ravel())), shape=(len(pairs), len(xyz)))
    transposed = difference.T.tocsr()

    def strain(flat: np.ndarray) -> tuple[float, np.ndarray]:
        now = flat.reshape(-1, 3)
        vector = difference @ now
        distance = np.maximum(np.linalg.norm(vector, axis=1), 1e-6)
        error = distance - length
        error[bound:] = np.minimum(error[bound:], 0.0)
        drift = now - xyz
        gradient = transposed @ ((2 * error / distance)[:, None] * vector) + 0.04 * drift
        return float((error**2).sum() + 0.02 * (drift**2).sum()), gradient.ravel()

    options = {"maxiter": 30, "maxcor": 4}
    with threadpool_limits(1, user_api="blas"):  # the sums of several threads differ in their last digits
        return minimize(strain, xyz.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(-1, 3)
