"""Atomic models of the particle: read, fetch, superpose, and open its clamp.

Structures are `gemmi.Structure` objects of one model. Lengths are in Angstrom, angles in degrees.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import gemmi
import numpy as np
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from cryo_lib import checks
from cryo_lib.files import atomic
from cryo_lib.simulate.atoms import Atoms, carry, centred, fit, with_positions
from cryo_lib.simulate.phantom import phantom

SOURCES = ("phantom", "pdb", "files")
CHAINS = ("A", "B", "C", "D", "E", "F")  # alpha, alpha, beta, beta', omega, sigma
FORMATS = {".pdb": gemmi.CoorFormat.Pdb, ".cif": gemmi.CoorFormat.Mmcif}
RCSB = "https://files.rcsb.org/download"


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
    chains : chains kept of the closed structure.
    core_chain, clamp_chain : the chain to superpose on, and the one that turns; both structures must have them.

    Returns
    -------
    list of gemmi.Structure, the middle of the box around all their atoms at the origin, the core at one place in all.

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
    _require(open_, (core_chain, clamp_chain), str(open_file))
    return centred(morph(closed, open_, n_conformations, core_chain=core_chain, clamp_chain=clamp_chain))


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
    import aiohttp  # not where trainings alone run
    import fsspec

    session = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=30), "trust_env": True}
    try:
        with atomic(path) as temporary:
            fsspec.filesystem("http", client_kwargs=session).get_file(url, str(temporary))
            _parse(temporary, gemmi.CoorFormat.Mmcif)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"fetch {url}: expected entry {entry}, got none there; check the identifier, or {way_out}"
        ) from error
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ConnectionError(
            f"fetch {url}: expected a whole file, got {type(error).__name__} ({error}); check the network and run "
            f"again, or {way_out}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"fetch {url}: expected a coordinate file, got another content ({error}); {way_out}"
        ) from error
    return path


def read(path: str | Path, chains: Sequence[str] | None = None) -> gemmi.Structure:
    """Read the protein of a .pdb or .cif file (.gz or not): first model, first alternative locations, no hydrogens.

    Parameters
    ----------
    chains : names of the chains to keep, all of which must be there; None keeps every protein chain.

    Raises
    ------
    FileNotFoundError : no such file.
    ValueError : unknown suffix, a damaged, empty or protein-free file, one cut short (a .pdb without its END; a .cif
        that stops inside a category or lists polymers without atoms), or chains that are not in it (those are listed).
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
        text = path.read_bytes()
        if text.startswith(b"\x1f\x8b"):
            text = gzip.decompress(text)
        structure = gemmi.read_structure_string(text, format=form)
    except (RuntimeError, ValueError, IndexError, OSError, EOFError, zlib.error) as error:  # gemmi's and gzip's no
        raise ValueError(
            f"{path}: expected a whole coordinate file, got a damaged one ({error}); delete it and fetch it again"
        ) from error
    _require_whole(structure, text, form, path)
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


def _require_whole(structure: gemmi.Structure, text: bytes, form: gemmi.CoorFormat, path: Path) -> None:
    """ValueError if `text` stops before its end mark, or lists polymers (mmCIF _struct_asym) that have no atoms."""
    last = text.rstrip().rpartition(b"\n")[2]
    if form == gemmi.CoorFormat.Pdb:
        mark, whole = "END", last.strip() == b"END"
    else:  # the PDB closes each category with a '#' line; gemmi's files have none
        mark, whole = "#", last.startswith(b"#") or b"\n#" not in text
    if not whole:
        raise ValueError(
            f"{path}: expected {mark} as the last line, got {last.decode(errors='replace')!r}: "
            f"a file cut short; fetch or copy it again, or, if it is whole, add a line {mark} at its end"
        )
    listed = {
        name
        for entity in structure.entities
        if entity.entity_type == gemmi.EntityType.Polymer
        for name in entity.subchains
    }
    absent = listed - {part.subchain_id() for model in structure for part in model.subchains()}
    if absent:
        raise ValueError(
            f"{path}: expected atoms of all {len(listed)} polymer chains that it lists, got none of "
            f"{', '.join(sorted(absent))}: a file cut short; fetch or copy it again, or, if it is whole, "
            "take these out of its _struct_asym table"
        )


def _require(structure: gemmi.Structure, chains: Sequence[str], where: str) -> None:
    present = [chain.name for chain in structure[0]]
    absent = [name for name in chains if name not in present]
    if absent or not len(chains):
        raise ValueError(
            f"{where}: expected chains {', '.join(chains) or '(none named)'}, got a structure without "
            f"{', '.join(absent) or 'any of them'}; its protein chains are {', '.join(present)}"
        )


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
    rotation, shift = fit(common.a, common.b)
    return with_positions(mobile, Atoms.of(mobile).xyz @ rotation.T + shift)


def clamp_rotation(a: gemmi.Structure, b: gemmi.Structure, core_chain: str = "C", clamp_chain: str = "D") -> np.ndarray:
    """The rotation by which the clamp turns from `a` to `b`, cores superposed: a vector `(3,)`, radians, frame of `b`.

    The clamp is the largest rigid body among the residues of the clamp chain that move: those displaced by more than
    0.4 of the 80th percentile, of which a least-squares fit keeps, in turns, what lies within 1.5 times its median
    error.

    Raises
    ------
    ValueError : a chain is absent, or is another protein in `b`.
    """
    common = _match(a, b, (core_chain, clamp_chain))
    core = common.chain == core_chain
    rotation, shift = fit(common.a[core], common.b[core])
    before, after = (common.a @ rotation.T + shift)[~core], common.b[~core]
    moved = np.linalg.norm(before - after, axis=1)
    kept = moved >= 0.4 * np.percentile(moved, 80)
    before, after = before[kept], after[kept]
    kept = np.ones(len(before), bool)
    for _ in range(20):
        rotation, shift = fit(before[kept], after[kept])
        error = np.linalg.norm(before @ rotation.T + shift - after, axis=1)
        kept = error <= 1.5 * np.median(error)
    return Rotation.from_matrix(rotation).as_rotvec()


def clamp_angle(a: gemmi.Structure, b: gemmi.Structure, core_chain: str = "C", clamp_chain: str = "D") -> float:
    """Degrees by which the clamp turns from `a` to `b`, see `clamp_rotation`."""
    return float(np.degrees(np.linalg.norm(clamp_rotation(a, b, core_chain, clamp_chain))))


def cleft_view(a: gemmi.Structure, b: gemmi.Structure, core_chain: str = "C", clamp_chain: str = "D") -> np.ndarray:
    """The orientation that shows the clamp open best: looking along its hinge, the clamp chain at the top.

    Returns
    -------
    `(3, 3)`, image axes to volume axes, as `projection.project` takes it, in the frame of `b`.

    Raises
    ------
    ValueError : as `clamp_rotation`; `b` has no chain of one of these names; or the clamp turns by less than 0.1
        degree, so that it has no hinge to look along.
    """
    z = clamp_rotation(a, b, core_chain, clamp_chain)
    turn = np.linalg.norm(z)
    if np.degrees(turn) < 0.1:
        raise ValueError(
            f"cleft_view: expected the clamp (chain {clamp_chain}) to turn by at least 0.1 degree from "
            f"{a.name or 'a'} to {b.name or 'b'}, got {np.degrees(turn):.2g} degrees: no hinge to look "
            "along; pass a closed and an open structure"
        )
    z /= turn
    up = _mean_ca(b, clamp_chain) - _mean_ca(b, core_chain)
    y = -(up - (up @ z) * z)
    y /= np.linalg.norm(y)
    return np.stack([np.cross(y, z), y, z], axis=1)


def _mean_ca(structure: gemmi.Structure, chain: str) -> np.ndarray:
    _require(structure, (chain,), f"structure {structure.name}")
    return np.mean([_ca(residue) for residue in structure[0][chain]], axis=0)


def _ca(residue: gemmi.Residue) -> list[float]:
    return residue["CA"][0].pos.tolist()


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
    rotation, shift = fit(common.b[core], common.a[core])
    target = common.b @ rotation.T + shift

    ca = Atoms.of(closed).ca_xyz
    weights = _rigid_neighbours(ca, common.index, target)
    rotations, centre, moved_centre = _local_fits(weights, common.a, target)
    goal = moved_centre + np.einsum("nij,nj->ni", rotations, ca - centre)
    goal[common.index] = target
    turn = Rotation.from_matrix(rotations).as_rotvec()
    return carry(closed, turn, goal - ca, n)


class _Common(NamedTuple):
    """CA atoms that two structures share: number in the first, positions in both, chain name in the first."""

    index: np.ndarray
    a: np.ndarray
    b: np.ndarray
    chain: np.ndarray


def _match(a: gemmi.Structure, b: gemmi.Structure, chains: Sequence[str]) -> _Common:
    _require(a, chains, f"structure {a.name}")
    others = {chain.name: {str(residue.seqid): residue for residue in chain} for chain in b[0]}
    rows, start = [], 0
    for chain in a[0]:
        here = {str(residue.seqid): (number, residue) for number, residue in enumerate(chain, start)}
        start += len(chain)
        if chain.name not in chains:
            continue
        for name in sorted(others, key=lambda other: other != chain.name):
            shared = [key for key in here if key in others[name]]
            same = sum(here[key][1].name == others[name][key].name for key in shared)
            if len(shared) >= 0.3 * len(here) and same >= 0.5 * len(shared):
                break
        else:
            sizes = ", ".join(f"{name} ({len(residues)} residues)" for name, residues in others.items())
            raise ValueError(
                f"chain {chain.name} of {a.name} ({len(here)} residues): expected the same protein with "
                f"the same residue numbers in {b.name}, got {sizes or 'no other chain'}; "
                "choose other chains or renumber"
            )
        partner = others.pop(name)
        rows += [(here[key][0], _ca(here[key][1]), _ca(partner[key]), chain.name) for key in shared]
    index, first, second, names = zip(*rows)
    return _Common(np.array(index), np.array(first), np.array(second), np.array(names))


def _rigid_neighbours(ca: np.ndarray, known: np.ndarray, target: np.ndarray) -> sparse.csr_array:
    """Row-normalised `(residues, known)` weights: near (4 A sd) and rigid (distance kept, 1 A sd)."""
    tree, n = cKDTree(ca[known]), len(known)
    i, j = tree.query_pairs(12.0, output_type="ndarray").T
    before, after = np.linalg.norm(ca[known[i]] - ca[known[j]], axis=1), np.linalg.norm(target[i] - target[j], axis=1)
    weight = np.exp(-0.5 * (before / 4.0) ** 2 - 0.5 * (after - before) ** 2)
    lost = np.setdiff1d(np.arange(len(ca)), known)
    near = np.empty((len(lost), 50), int)
    edges = np.flatnonzero(np.diff(lost, prepend=-2, append=len(ca) + 1) > 1)
    for start, stop in pairwise(edges):  # an absent stretch moves as one body
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
