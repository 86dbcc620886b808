"""Atomic models of the particle: read, fetch, superpose, and open its clamp; and a built-in phantom.

Structures are `gemmi.Structure` objects of one model. Lengths are in Angstrom, angles in degrees.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gemmi
import numpy as np
import pooch
import requests
from scipy import sparse
from scipy.cluster.vq import kmeans2
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from . import checks
from .files import atomic

SOURCES = ("phantom", "pdb", "files")
CHAINS = ("A", "B", "C", "D", "E", "F")  # alpha, alpha, beta, beta', omega, sigma
FORMATS = {".pdb": gemmi.CoorFormat.Pdb, ".cif": gemmi.CoorFormat.Mmcif}
RCSB = "https://files.rcsb.org/download"
RESIDUES, DOMAIN_RESIDUES = 3520, 160  # of the phantom, and of one of its domains
RESIDUE_VOLUME, HELIX_SPACING = 133.0, 9.9  # A^3 (1.21 A^3/Da), and A between the axes of packed helices
COLUMN_POINTS = HELIX_SPACING**2 * 0.75**0.5 / 2.5**3  # grid points an A of a helix's column
PEPTIDE = {  # distances between atoms of a residue and of the next
    ("C", "N"): 1.33, ("CA", "N"): 2.43, ("C", "CA"): 2.43, ("O", "N"): 2.25, ("O", "CA"): 2.78, ("CA", "CA"): 3.80,
}


def prepare(
    source: str,
    n_conformations: int = 5,
    *,
    seed: int = 0,
    opening: float = 20.0,
    open_entry: str = "1L9U",
    closed_entry: str = "4XLN",
    open_file: str | Path | None = None,
    closed_file: str | Path | None = None,
    chains: Sequence[str] = CHAINS,
    core_chain: str = "C",
    clamp_chain: str = "D",
    cache_dir: str | Path = "data/pdb",
) -> list[gemmi.Structure]:
    """Make the conformations of the data set, closed to open at equally spaced clamp angles.

    Parameters
    ----------
    source : "phantom" (built in; uses `seed` and `opening`), "pdb" (the two entries, fetched into `cache_dir`) or
        "files" (`closed_file` and `open_file`). One never stands in for another.
    n_conformations : number of structures returned, at least 2.
    chains, core_chain, clamp_chain : chains kept of the closed structure; the one to superpose on; the one that turns.

    Returns
    -------
    list of gemmi.Structure, the mean of all atoms of all conformations at the origin, the core at one place in all.

    Raises
    ------
    ValueError : unknown source, missing file names, chains that are absent; and what `fetch`, `read`, `morph` raise.
    """
    checks.choice("source", source, SOURCES)
    if source == "phantom":
        return phantom(n_conformations, opening, seed)
    if source == "pdb":
        closed_file, open_file = (fetch(entry, cache_dir) for entry in (closed_entry, open_entry))
    if closed_file is None or open_file is None:
        missing = "closed_file" if closed_file is None else "open_file"
        raise ValueError(f"{missing}: source 'files' needs the path of a coordinate file, got None; set {missing}")
    closed, open_ = read(closed_file, chains), read(open_file)
    return _centred(morph(closed, open_, n_conformations, core_chain=core_chain, clamp_chain=clamp_chain))


def fetch(entry: str, cache_dir: str | Path, base_url: str = RCSB) -> Path:
    """Download a PDB entry as `<cache_dir>/<entry>.cif.gz`, unless it is there, and return its path.

    The file gets its name only after it has parsed and shown protein atoms.

    Raises
    ------
    ValueError : `entry` is not a PDB identifier, or the server's answer is not a coordinate file.
    FileNotFoundError : the server has no such entry.
    ConnectionError : no network or server, a connection cut short, or a server error.
    """
    if not (isinstance(entry, str) and entry.isalnum() and len(entry) == 4 and entry[0].isdigit()):
        raise ValueError(f"entry: expected a four-character PDB identifier such as 4XLN, got {entry!r}")
    path = Path(cache_dir) / f"{entry.lower()}.cif.gz"
    url = f"{base_url}/{entry.upper()}.cif.gz"
    way_out = f"put the file at {path} yourself, or use source: files"
    if path.exists():
        _parse(path, gemmi.CoorFormat.Mmcif)
        return path
    try:
        with atomic(path) as temporary:
            pooch.HTTPDownloader(timeout=30)(url, str(temporary), None)
            _parse(temporary, gemmi.CoorFormat.Mmcif)
    except requests.HTTPError as error:
        status = error.response.status_code
        if status in (404, 410):
            raise FileNotFoundError(f"fetch {url}: expected entry {entry}, got {status}: no such entry; "
                                    f"check the identifier, or {way_out}") from error
        raise ConnectionError(f"fetch {url}: expected a file, got HTTP {status}; "
                              f"try again later, or {way_out}") from error
    except requests.RequestException as error:
        raise ConnectionError(f"fetch {url}: expected a whole file, got {error}; "
                              f"check the network and run again, or {way_out}") from error
    except ValueError as error:
        raise ValueError(f"fetch {url}: expected a coordinate file, got another content ({error}); "
                         f"{way_out}") from error
    return path


def read(path: str | Path, chains: Sequence[str] | None = None) -> gemmi.Structure:
    """Read the protein of a .pdb or .cif file (.gz or not): first model, first alternative locations, no hydrogens.

    Parameters
    ----------
    chains : names of the chains to keep, all of which must be there; None keeps every protein chain.

    Raises
    ------
    FileNotFoundError : no such file.
    ValueError : unknown suffix, a damaged, empty or protein-free file, or chains that are not in it (those are listed).
    """
    path = Path(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: expected a file named {', '.join(FORMATS)} (or these with .gz), got {path.name!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a coordinate file, got nothing there; check the path")
    structure = _parse(path, FORMATS[suffix])
    if chains is not None:
        _require(structure, chains, str(path))
        for chain in [chain.name for chain in structure[0] if chain.name not in chains]:
            structure[0].remove_chain(chain)
    structure.name = path.name.split(".")[0]
    return structure


def _parse(path: Path, form: gemmi.CoorFormat) -> gemmi.Structure:
    """The protein residues (with a CA) of the first model; ValueError if the file is damaged or has none."""
    try:
        structure = gemmi.read_structure(str(path), format=form)
    except (RuntimeError, ValueError, IndexError, OSError) as error:  # gemmi's ways to say no
        raise ValueError(f"{path}: expected a whole coordinate file, got a damaged one ({error}); "
                         "delete it and fetch it again") from error
    structure.setup_entities()
    del structure[1:]
    structure.remove_alternative_conformations()
    structure.remove_hydrogens()
    structure.remove_ligands_and_waters()
    for chain in structure[0] if len(structure) else ():
        for n in reversed(range(len(chain))):
            if chain[n].find_atom("CA", "*", gemmi.Element("C")) is None:
                del chain[n]
    structure.remove_empty_chains()
    if not len(structure) or not len(structure[0]):
        raise ValueError(f"{path}: expected protein chains, got none; it is empty, truncated or of something else")
    return structure


def _require(structure: gemmi.Structure, chains: Sequence[str], where: str) -> None:
    present = [chain.name for chain in structure[0]]
    absent = [name for name in chains if name not in present]
    if absent or not len(chains):
        raise ValueError(f"{where}: expected chains {', '.join(chains) or '(none named)'}, got a structure without "
                         f"{', '.join(absent) or 'any of them'}; its protein chains are {', '.join(present)}")


def write(structure: gemmi.Structure, path: str | Path) -> Path:
    """Write mmCIF (.cif) or PDB (.pdb) by the suffix, atomically; ValueError for another suffix."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected one of the suffixes {', '.join(FORMATS)}, got {path.suffix!r}")
    with atomic(path) as temporary:
        if path.suffix.lower() == ".pdb":
            structure.write_pdb(str(temporary))
        else:
            structure.make_mmcif_document().write_file(str(temporary))
    return path


def mass(structure: gemmi.Structure) -> float:
    """Mass in Da of the modelled atoms; without hydrogens, as after `read`, about 7 % below that of the molecule."""
    return structure[0].calculate_mass()


def superpose(mobile: gemmi.Structure, fixed: gemmi.Structure, core_chain: str = "C") -> gemmi.Structure:
    """Return `mobile` moved so that the CA atoms of its core chain fit those of `fixed` best (least squares).

    Residues are matched by chain and number, see `morph`. Raises ValueError where the chain is absent or another
    protein.
    """
    common = _match(mobile, fixed, (core_chain,))
    rotation, shift = _fit(common.a, common.b)
    atoms = _atoms(mobile)
    return _with_positions(mobile, atoms.xyz @ rotation.T + shift)


def clamp_angle(a: gemmi.Structure, b: gemmi.Structure, core_chain: str = "C", clamp_chain: str = "D") -> float:
    """Degrees by which the clamp turns from `a` to `b`, after superposing the core chains by all their common CA atoms.

    The clamp is the largest rigid body among the residues of the clamp chain that move: those displaced by more than
    0.4 of the 80th percentile, of which a least-squares fit keeps, in turns, what lies within 1.5 times its median
    error.

    Raises
    ------
    ValueError : a chain is absent, or is another protein in `b`.
    """
    common = _match(a, b, (core_chain, clamp_chain))
    core = common.chain == core_chain
    rotation, shift = _fit(common.a[core], common.b[core])
    before, after = (common.a @ rotation.T + shift)[~core], common.b[~core]
    moved = np.linalg.norm(before - after, axis=1)
    kept = moved >= 0.4 * np.percentile(moved, 80)
    before, after = before[kept], after[kept]
    kept = np.ones(len(before), bool)
    for _ in range(20):
        rotation, shift = _fit(before[kept], after[kept])
        error = np.linalg.norm(before @ rotation.T + shift - after, axis=1)
        kept = error <= 1.5 * np.median(error)
    return float(np.degrees(Rotation.from_matrix(rotation).magnitude()))


def morph(
    closed: gemmi.Structure, open_: gemmi.Structure, n: int, *, core_chain: str = "C", clamp_chain: str = "D"
) -> list[gemmi.Structure]:
    """Open the clamp: `n` conformations from `closed` to `open_` at equally spaced clamp angles, cores superposed.

    All atoms of `closed` are carried, residue by residue, as rigid bodies: each residue's rotation is fitted to the
    neighbours that keep their distances to it (so rigid domains are found, not named), and it moves on the screw path
    with that rotation that takes its CA from `closed` to `open_`. Then chains are mended and clashes removed: residues
    keep their shape, peptides their geometry, atoms of different residues stay 3 A apart or as near as in `closed`.
    The first conformation is `closed` itself. The last has its atoms at the CA trace of `open_` (within about 0.2 A
    RMSD), with the rotamers of `closed`. A stretch of `closed` that `open_` lacks moves as one body with what is
    near its two ends.

    Chains are matched by name, or where that is another protein by the first in the file with the same residues, and
    residues by number.

    Raises
    ------
    ValueError : `n` < 2, the chains are absent, or a chain of `closed` has no counterpart with its numbering.
    """
    n = checks.integer("n_conformations", n, low=2)
    _require(closed, (core_chain, clamp_chain), f"closed structure {closed.name}")
    common = _match(closed, open_, [chain.name for chain in closed[0]])
    core = common.chain == core_chain
    rotation, shift = _fit(common.b[core], common.a[core])
    target = common.b @ rotation.T + shift

    ca = _atoms(closed).ca_xyz
    weights = _rigid_neighbours(ca, common.index, target)
    rotations, centre, moved_centre = _local_fits(weights, common.a, target)
    goal = moved_centre + np.einsum("nij,nj->ni", rotations, ca - centre)
    goal[common.index] = target
    turn = Rotation.from_matrix(rotations).as_rotvec()
    return _open(closed, turn, goal - ca, n)


class _Common(NamedTuple):
    """CA atoms that two structures share: number in the first, positions in both, chain name in the first."""

    index: np.ndarray
    a: np.ndarray
    b: np.ndarray
    chain: np.ndarray


def _match(a: gemmi.Structure, b: gemmi.Structure, chains: Sequence[str]) -> _Common:
    _require(a, chains, f"structure {a.name}")
    others = {
        chain.name: {(r.seqid.num, r.seqid.icode): (r.name, r["CA"][0].pos.tolist()) for r in chain} for chain in b[0]
    }
    rows, start = [], 0
    for chain in a[0]:
        here = {(r.seqid.num, r.seqid.icode): (r.name, r["CA"][0].pos.tolist(), start + k) for k, r in enumerate(chain)}
        start += len(chain)
        if chain.name not in chains:
            continue
        for name in sorted(others, key=lambda other: other != chain.name):
            shared = [key for key in here if key in others[name]]
            same = sum(here[key][0] == others[name][key][0] for key in shared)
            if len(shared) >= 0.3 * len(here) and same >= 0.5 * len(shared):
                break
        else:
            sizes = ", ".join(f"{name} ({len(residues)} residues)" for name, residues in others.items())
            raise ValueError(f"chain {chain.name} of {a.name} ({len(here)} residues): expected the same protein with "
                             f"the same residue numbers in {b.name}, got {sizes or 'no other chain'}; "
                             "choose other chains or renumber")
        partner = others.pop(name)
        rows += [(here[key][2], here[key][1], partner[key][1], chain.name) for key in shared]
    index, first, second, names = zip(*rows)
    return _Common(np.array(index), np.array(first), np.array(second), np.array(names))


def _fit(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotation matrix and shift that take points `a` to `b` with the least squares."""
    rotation = Rotation.align_vectors(b - b.mean(0), a - a.mean(0))[0].as_matrix()
    return rotation, b.mean(0) - rotation @ a.mean(0)


def _rigid_neighbours(ca: np.ndarray, known: np.ndarray, target: np.ndarray) -> sparse.csr_array:
    """Row-normalised `(residues, known)` weights: near (4 A sd) and rigid (distance kept, 1 A sd)."""
    tree, n = cKDTree(ca[known]), len(known)
    i, j = tree.query_pairs(12.0, output_type="ndarray").T
    before, after = np.linalg.norm(ca[known[i]] - ca[known[j]], axis=1), np.linalg.norm(target[i] - target[j], axis=1)
    weight = np.exp(-0.5 * (before / 4.0) ** 2 - 0.5 * (after - before) ** 2)
    lost = np.setdiff1d(np.arange(len(ca)), known)
    near = np.empty((len(lost), 50), int)
    starts = np.flatnonzero(np.diff(lost, prepend=-2) > 1)
    for start, stop in zip(starts, [*starts[1:], len(lost)], strict=True):  # an absent stretch moves as one body
        near[start:stop] = tree.query(ca[lost[[start, stop - 1]]], 25)[1].ravel()
    rows = np.concatenate([known[i], known[j], known, np.repeat(lost, 50)])
    columns = np.concatenate([j, i, np.arange(n), near.ravel()])
    values = np.concatenate([weight, weight, np.ones(n + near.size)])
    weights = sparse.csr_array((values, (rows, columns)), shape=(len(ca), n))
    return sparse.diags_array(1.0 / weights.sum(axis=1)) @ weights


def _local_fits(weights: sparse.csr_array, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row of `weights` the rotation matrix that takes `a` to `b`, and the centres before and after."""
    mean_a, mean_b = weights @ a, weights @ b
    cross = (weights @ (b[:, :, None] * a[:, None, :]).reshape(-1, 9)).reshape(-1, 3, 3)
    u, _, vt = np.linalg.svd(cross - mean_b[:, :, None] * mean_a[:, None, :])
    u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
    return u @ vt, mean_a, mean_b


def _open(closed: gemmi.Structure, turn: np.ndarray, shift: np.ndarray, n: int) -> list[gemmi.Structure]:
    """Conformations after 0, 1/(n-1), ..., 1 of each residue's screw: its rotation vector (rad) and CA displacement."""
    atoms = _atoms(closed)
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
        structures.append(_with_positions(closed, _mend(atoms, xyz)))
    return structures


class _Atoms(NamedTuple):
    """Positions, residue of each atom, each residue's backbone atoms (-1: none), whether it is linked to the next."""

    xyz: np.ndarray
    residue: np.ndarray
    backbone: dict[str, np.ndarray]
    linked: np.ndarray

    @property
    def ca_xyz(self) -> np.ndarray:
        return self.xyz[self.backbone["CA"]]


def _atoms(structure: gemmi.Structure) -> _Atoms:
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
    return _Atoms(xyz, owner, backbone, (chain[1:] == chain[:-1]) & (step < 4.5))


def _with_positions(structure: gemmi.Structure, xyz: np.ndarray) -> gemmi.Structure:
    copy = structure.clone()
    for site, position in zip(copy[0].all(), xyz.tolist(), strict=True):
        site.atom.pos = gemmi.Position(*position)
    return copy


def _centred(structures: list[gemmi.Structure]) -> list[gemmi.Structure]:
    """The mean of all atoms of all structures put at the origin."""
    positions = [_atoms(structure).xyz for structure in structures]
    centre = np.mean([xyz.mean(axis=0) for xyz in positions], axis=0)
    return [_with_positions(structure, xyz - centre) for structure, xyz in zip(structures, positions, strict=True)]


def _mend(atoms: _Atoms, xyz: np.ndarray, ideal: bool = False) -> np.ndarray:
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
        links = pairs[-len(PEPTIDE):]
        lengths[-len(PEPTIDE):] = [np.full(len(p), d) for p, d in zip(links, PEPTIDE.values(), strict=True)]
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
    return minimize(strain, xyz.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(-1, 3)


SHAPE = (  # capsules (chain, end, end, radius): a crab claw seen from the front, cleft up, its floor at the origin
    ("A", (-8, -64, 18), (-16, -46, 8), 17), ("B", (14, -62, -18), (14, -44, -8), 17),
    ("C", (14, -34, 0), (26, -8, -14), 24), ("C", (28, -10, 16), (38, 24, 14), 18),
    ("C", (38, 14, -16), (30, 56, -4), 18), ("C", (30, 54, -2), (20, 64, 10), 14),
    ("D", (-14, -34, 2), (-20, -8, 16), 22), ("D", (-6, -10, -30), (0, -28, -26), 18),
    ("D", (-28, 0, -10), (-36, 34, -8), 19), ("D", (-36, 24, 14), (-27, 58, 4), 17),
    ("D", (-26, 58, 4), (-16, 66, -6), 14), ("D", (-24, -20, -18), (-40, -36, -16), 15),
    ("E", (-36, -52, 6), (-28, -58, -8), 14),
    ("F", (-34, 8, 38), (-20, 26, 40), 14), ("F", (-18, 10, 40), (14, -6, 42), 9),
    ("F", (20, -22, 36), (32, -40, 28), 15),
)
HINGE, HINGE_AXIS = np.array([-36.0, -6.0, 0.0]), np.array([0.15, 0.1, 1.0]) / np.linalg.norm([0.15, 0.1, 1.0])
SIDE_CHAINS = {  # share of the residues; atoms as (name, the three atoms it hangs on, bond, angle, torsion)
    "ALA": (0.14, ()),
    "SER": (0.08, (("OG", "N CA CB", 1.42, 111, -65),)),
    "VAL": (0.12, (("CG1", "N CA CB", 1.52, 111, 175), ("CG2", "N CA CB", 1.52, 111, -62))),
    "LEU": (0.18, (("CG", "N CA CB", 1.53, 116, -65), ("CD1", "CA CB CG", 1.52, 111, 175),
                   ("CD2", "CA CB CG", 1.52, 111, -63))),
    "ASP": (0.08, (("CG", "N CA CB", 1.52, 113, -70), ("OD1", "CA CB CG", 1.25, 118, -15),
                   ("OD2", "CA CB CG", 1.25, 118, 165))),
    "GLU": (0.14, (("CG", "N CA CB", 1.52, 114, -65), ("CD", "CA CB CG", 1.52, 113, 180),
                   ("OE1", "CB CG CD", 1.25, 118, -10), ("OE2", "CB CG CD", 1.25, 118, 170))),
    "LYS": (0.10, (("CG", "N CA CB", 1.52, 114, -65), ("CD", "CA CB CG", 1.52, 111, 180),
                   ("CE", "CB CG CD", 1.52, 111, 180), ("NZ", "CG CD CE", 1.49, 112, 180))),
    "ARG": (0.09, (("CG", "N CA CB", 1.52, 114, -65), ("CD", "CA CB CG", 1.52, 111, 180),
                   ("NE", "CB CG CD", 1.46, 112, 180), ("CZ", "CG CD NE", 1.33, 124, 180),
                   ("NH1", "CD NE CZ", 1.33, 120, 0), ("NH2", "CD NE CZ", 1.33, 120, 180))),
    "PHE": (0.07, (("CG", "N CA CB", 1.50, 114, -68), ("CD1", "CA CB CG", 1.39, 121, 85),
                   ("CD2", "CA CB CG", 1.39, 121, -95), ("CE1", "CB CG CD1", 1.39, 120, 180),
                   ("CE2", "CB CG CD2", 1.39, 120, 180), ("CZ", "CG CD1 CE1", 1.39, 120, 0))),
}


def phantom(n_conformations: int = 5, opening: float = 20.0, seed: int = 0) -> list[gemmi.Structure]:
    """Make an RNA-polymerase-like particle of about 370 kDa (modelled atoms), closed to open, by one seed.

    A crab claw of chains A-F (two alpha, beta, beta', omega, sigma), about 165 x 130 x 105 A from outermost atom to
    outermost: rough capsules, cut into domains of about 17 kDa, each filled with alpha-helices 9.9 A apart, protein's
    density, and loops; residues with backbone and side chains, of no real protein's sequence. The clamp (D's
    left pincer and the part of F on it) turns as a rigid body by `opening` degrees about a hinge at its root.

    Returns
    -------
    list of `n_conformations` gemmi.Structure, closed to open, mean of all their atoms at the origin.

    Raises
    ------
    TypeError, ValueError : `n_conformations` < 2, or `opening` outside (0, 40].
    """
    n_conformations = checks.integer("n_conformations", n_conformations, low=2)
    opening = checks.number("opening", opening, above=0.0, high=40.0)
    seed, fill = checks.integer("seed", seed, low=0), 1.1
    for _ in range(20):  # the yield of a shape varies by some percent: search the volume that gives the mass
        rng = np.random.default_rng(seed)
        traces = _traces(_domains(rng, fill * RESIDUES * RESIDUE_VOLUME), rng)
        ratio = sum(len(piece) for pieces in traces.values() for piece in pieces) / RESIDUES
        if abs(ratio - 1.0) < 0.02:
            break
        fill /= ratio**0.7
    else:
        raise RuntimeError(f"seed: expected a phantom of {RESIDUES} residues, got none from {seed}; take another seed")
    closed = _build(traces, rng)
    ca = _atoms(closed).ca_xyz
    names = np.repeat([chain.name for chain in closed[0]], [len(chain) for chain in closed[0]])
    share = np.clip((ca[:, 1] - HINGE[1]) / 20.0, 0.0, 1.0) * np.isin(names, ["D", "F"])
    share[names == "F"] *= np.clip((-8.0 - ca[names == "F", 0]) / 12.0, 0.0, 1.0)  # sigma's right half stays
    turn = np.radians(opening) * (share**2 * (3.0 - 2.0 * share))[:, None] * HINGE_AXIS
    shift = Rotation.from_rotvec(turn).apply(ca - HINGE) + HINGE - ca
    return _centred(_open(closed, turn, shift, n_conformations))


def _domains(rng: np.random.Generator, volume: float, step: float = 2.5) -> dict[str, list[np.ndarray]]:
    """Grid points `(k, 3)` of the domains of each chain, in the order of its capsules; `volume` A^3 in all."""
    axis = np.arange(-100.0, 100.0, step)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    depth = []
    for _, start, end, radius in SHAPE:
        start, along = np.array(start, float), np.subtract(end, start)
        foot = np.clip((grid - start) @ along / (along @ along), 0.0, 1.0)
        depth.append(np.linalg.norm(grid - start - foot[:, None] * along, axis=1) - radius)
    owner = np.argmin(depth, axis=0)
    rough = gaussian_filter(rng.standard_normal((len(axis),) * 3), 6.0 / step).ravel()
    surface = np.min(depth, axis=0) + 3.0 * rough / rough.std()
    inside = np.argsort(surface)[: int(volume / step**3)]
    domains: dict[str, list[np.ndarray]] = {}
    for capsule, (chain, *_) in enumerate(SHAPE):
        points = grid[inside[owner[inside] == capsule]]
        k = max(1, round(len(points) * step**3 / (DOMAIN_RESIDUES * RESIDUE_VOLUME)))
        centres, label = kmeans2(points, k, seed=rng, minit="++")
        order = np.argsort(centres @ np.subtract(SHAPE[capsule][2], SHAPE[capsule][1]))
        domains.setdefault(chain, []).extend(points[label == i] for i in order)
    return domains


def _traces(domains: dict[str, list[np.ndarray]], rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """CA traces of each chain through its domains: helices joined by loops, cut where a loop is long or collides."""
    traces, placed = {}, np.full((1, 3), np.inf)
    for chain, cells in domains.items():
        pieces: list[np.ndarray] = []
        end = cells[0][0]
        for start, stop in (helix for points in cells for helix in _bundle(points, rng)):
            if np.linalg.norm(stop - end) < np.linalg.norm(start - end):
                start, stop = stop, start
            helix = _helix(start + rng.normal(0, 0.7, 3), stop + rng.normal(0, 0.7, 3), rng.uniform(0, 2 * np.pi))
            free = _nearest(placed, helix) > 4.5
            edges = np.flatnonzero(np.diff(np.concatenate([[False], free, [False]]).astype(int))).reshape(-1, 2)
            first, last = max(edges, key=lambda edge: edge[1] - edge[0], default=(0, 0))
            helix = helix[first:last]
            if len(helix) < 6:
                continue
            loop = _loop(pieces[-1], helix, placed) if pieces else None
            if loop is None:
                pieces.append(helix)
                placed = np.concatenate([placed, helix])
            else:
                pieces[-1] = np.concatenate([pieces[-1], loop, helix])
                placed = np.concatenate([placed, loop, helix])
            end = helix[-1]
        traces[chain] = pieces
    return traces


def _nearest(placed: np.ndarray, points: np.ndarray) -> np.ndarray:
    return cKDTree(placed[1:]).query(points)[0] if len(placed) > 1 else np.full(len(points), np.inf)


def _bundle(points: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Ends `(2, 3)` of parallel helices on a hexagonal lattice that fill a domain's points, row after row."""
    centre, frame, height = points.mean(axis=0), Rotation.random(rng=rng), HELIX_SPACING * 0.75**0.5
    local = frame.apply(points - centre)
    rows = np.round(local[:, 1] / height).astype(int)
    columns = np.round(local[:, 0] / HELIX_SPACING + 0.5 * (rows % 2)).astype(int)
    helices = []
    for row in np.unique(rows):
        line = np.unique(columns[rows == row])
        for column in line if row % 2 else line[::-1]:
            z = local[(rows == row) & (columns == column), 2]
            low, high = np.percentile(z, (8, 92))
            if len(z) >= 0.4 * COLUMN_POINTS * (high - low) / 0.84 and high - low > 8.0:
                x, y = (column - 0.5 * (row % 2)) * HELIX_SPACING, row * height
                helices.append(frame.inv().apply([(x, y, low), (x, y, high)]) + centre)
    return helices


def _loop(tail: np.ndarray, head: np.ndarray, placed: np.ndarray) -> np.ndarray | None:
    """CA atoms 3.7 A apart on a parabola from `tail`'s end to `head`'s start; None if too long or colliding."""
    if np.linalg.norm(head[0] - tail[-1]) > 22.0:
        return None
    out = (tail[-1] - tail[-5]) / np.linalg.norm(tail[-1] - tail[-5])
    t, candidates = np.linspace(0, 1, 60)[:, None], []
    for bulge in (2.0, 7.0, 12.0):
        middle = 0.5 * (tail[-1] + head[0]) + bulge * out
        curve = (1 - t) ** 2 * tail[-1] + 2 * t * (1 - t) * middle + t**2 * head[0]
        length = np.append(0, np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1)))
        at = np.linspace(0, length[-1], max(2, round(length[-1] / 3.7) + 1))[1:-1]
        loop = np.stack([np.interp(at, length, curve[:, axis]) for axis in range(3)], axis=1)
        room = min(_nearest(np.concatenate([placed[:1], placed[1:-3], head[3:]]), loop), default=np.inf)
        candidates.append((room, loop))
    room, loop = max(candidates, key=lambda candidate: candidate[0])
    return loop if room > 3.6 else None


def _helix(start: np.ndarray, stop: np.ndarray, phase: float) -> np.ndarray:
    """CA atoms of an alpha-helix (rise 1.5 A, 100 degrees, radius 2.3 A) about the line from `start` to `stop`."""
    along = (stop - start) / np.linalg.norm(stop - start)
    count = int(np.linalg.norm(stop - start) / 1.5)
    side = np.cross(along, (1.0, 0.0, 0.0) if abs(along[0]) < 0.8 else (0.0, 1.0, 0.0))
    side /= np.linalg.norm(side)
    angle = phase + np.radians(100.0) * np.arange(count)[:, None]
    circle = np.cos(angle) * side + np.sin(angle) * np.cross(along, side)
    return start + 1.5 * np.arange(count)[:, None] * along + 2.3 * circle


def _place(a: np.ndarray, b: np.ndarray, c: np.ndarray, bond: float, angle: float, torsion: float) -> np.ndarray:
    """Position of the atom bound to `c`, by its angle there with `b` and its torsion about b-c with `a` (degrees)."""
    angle, torsion = np.radians(angle), np.radians(torsion)
    x = (c - b) / np.linalg.norm(c - b)
    z = np.cross(b - a, x)
    z /= np.linalg.norm(z)
    local = np.array([-np.cos(angle), np.sin(angle) * np.cos(torsion), np.sin(angle) * np.sin(torsion)])
    return c + bond * local @ np.stack([x, np.cross(z, x), z])


def _templates() -> dict[str, dict[str, np.ndarray]]:
    """Atoms of each residue type in an alpha-helix (phi -57, psi -47), in the frame of its CA and those beside it."""
    chain = [np.array([0.0, 0.0, 0.0]), np.array([1.46, 0.0, 0.0]), np.array([2.0, 1.4, 0.0])]
    for _ in range(2):
        for bond, angle, torsion in ((1.33, 117, -47), (1.46, 122, 180), (1.53, 111, -57)):
            chain.append(_place(*chain[-3:], bond, angle, torsion))
    before, (n, ca, c), (after_n, after) = chain[1], chain[3:6], chain[6:8]
    base = {"N": n, "CA": ca, "C": c}
    base |= {"O": _place(after, after_n, c, 1.23, 123, 0), "CB": _place(after_n, c, ca, 1.53, 110, 74)}
    frame, templates = _frames(np.array([before, ca, after]))[1], {}
    for name, (_, side) in SIDE_CHAINS.items():
        atoms = dict(base)
        for atom, parents, *geometry in side:
            atoms[atom] = _place(*(atoms[parent] for parent in parents.split()), *geometry)
        templates[name] = {atom: frame @ (position - ca) for atom, position in atoms.items()}
    return templates


def _frames(ca: np.ndarray) -> np.ndarray:
    """Orthonormal rows `(k, 3, 3)` at each CA of a trace: along the chain, out of its bend, and across."""
    x = ca[2:] - ca[:-2]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    bend = 2 * ca[1:-1] - ca[:-2] - ca[2:] + 1e-3 * np.roll(x, 1, axis=1)
    z = np.cross(x, bend)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    return np.pad(np.stack([x, np.cross(z, x), z], axis=1), ((1, 1), (0, 0), (0, 0)), mode="edge")


def _build(traces: dict[str, list[np.ndarray]], rng: np.random.Generator) -> gemmi.Structure:
    """Random residues put on the CA traces, links mended and clashes parted; numbers jump where a chain is cut."""
    templates, structure, model = _templates(), gemmi.Structure(), gemmi.Model(1)
    shares = np.array([share for share, _ in SIDE_CHAINS.values()])
    for name, pieces in traces.items():
        chain, number = gemmi.Chain(name), 0
        for ca in pieces:
            number += 10
            types = rng.choice(list(SIDE_CHAINS), len(ca), p=shares / shares.sum())
            for origin, frame, kind in zip(ca, _frames(ca), types, strict=True):
                residue, number = gemmi.Residue(), number + 1
                residue.name, residue.seqid = kind, gemmi.SeqId(number, " ")
                residue.entity_type = gemmi.EntityType.Polymer
                for atom_name, position in templates[kind].items():
                    atom = gemmi.Atom()
                    atom.name, atom.element, atom.b_iso = atom_name, gemmi.Element(atom_name[0]), 50.0
                    atom.pos = gemmi.Position(*(origin + position @ frame))
                    residue.add_atom(atom)
                chain.add_residue(residue)
        model.add_chain(chain)
    structure.add_model(model)
    structure.name = "phantom"
    structure.setup_entities()
    atoms = _atoms(structure)
    xyz = atoms.xyz
    for _ in range(3):  # contacts are found anew each time
        xyz = _mend(atoms, xyz, ideal=True)
    return _with_positions(structure, xyz)
