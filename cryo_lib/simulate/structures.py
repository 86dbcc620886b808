"""Atomic models of the particle: read, fetch, superpose, and open its clamp.

Structures are `gemmi.Structure` objects of one model. Lengths are in Angstrom, angles in degrees.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase

import gemmi
import numpy as np
from scipy.spatial.transform import Rotation

from cryo_lib import checks
from cryo_lib.files import atomic
from cryo_lib.simulate.atoms import Atoms, carry, centred, fit, with_positions
from cryo_lib.simulate.domains import core_and_clamp, local_fits, rigid_neighbours
from cryo_lib.simulate.matching import Common, match, require
from cryo_lib.simulate.phantom import phantom

SOURCES = ("phantom", "pdb", "files")
CHAINS = ("A", "B", "C", "D", "E", "F")  # alpha, alpha, beta, beta', omega, sigma
FORMATS = {".pdb": gemmi.CoorFormat.Pdb, ".cif": gemmi.CoorFormat.Mmcif}
PROTEIN_ELEMENTS = ("H", "D", "C", "N", "O", "S", "Se", "P")
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
    source : "phantom" (built in; uses `seed` and `opening`), or what `ends` reads. One never stands in for another.
    n_conformations : number of structures returned, at least 2.
    core_chain, clamp_chain : what is superposed, and what turns, of the closed structure: a chain `C`, residues such as
        `A:1-29,60-121`, or several joined by +. Both the same, or both "" (all chains): found, see `core_and_clamp`.

    Returns
    -------
    list of gemmi.Structure, the middle of the box around all their atoms at the origin, the core at one place in all.

    Raises
    ------
    ValueError : unknown source; and what `ends` and `morph` raise.
    """
    checks.choice("source", source, SOURCES)
    if source == "phantom":
        return phantom(n_conformations, opening, seed)
    pair = ends(
        source,
        open_entry=open_entry,
        closed_entry=closed_entry,
        open_file=open_file,
        closed_file=closed_file,
        chains=chains,
        cache_dir=cache_dir,
    )
    return centred(morph(*pair, n_conformations, core_chain=core_chain, clamp_chain=clamp_chain))


def ends(
    source: str,
    *,
    open_entry: str = "1L9U",
    closed_entry: str = "4XLN",
    open_file: str | Path | None = None,
    closed_file: str | Path | None = None,
    chains: Sequence[str] = CHAINS,
    cache_dir: str | Path = "data/pdb",
) -> tuple[gemmi.Structure, gemmi.Structure]:
    """Read the closed and the open structure.

    Parameters
    ----------
    source : "pdb" (the two entries, fetched into `cache_dir`) or "files" (`closed_file` and `open_file`).
    chains : chains kept of the closed structure. The open one keeps all, under whatever names.

    Raises
    ------
    ValueError : unknown source, missing file names, chains that are absent; and what `fetch` and `read` raise.
    """
    checks.choice("source", source, SOURCES[1:])
    if source == "pdb":
        closed_file, open_file = (fetch(entry, cache_dir) for entry in (closed_entry, open_entry))
    for name, file in (("closed_file", closed_file), ("open_file", open_file)):
        if not file:
            raise ValueError(f"{name}: source 'files' needs the path of a coordinate file, got {file!r}; set {name}")
    return read(closed_file, chains), read(open_file)


def fetch(entry: str, cache_dir: str | Path, base_url: str = RCSB) -> Path:
    """Download a PDB entry as `<cache_dir>/<entry>.cif.gz`, unless it is there, and return its path.

    The file gets its name only after it has parsed and shown protein atoms. An `<entry>.pdb.gz` put by hand will do.

    Raises
    ------
    ValueError : `entry` is not a PDB identifier, or the server's answer is not a coordinate file.
    FileNotFoundError : the server has no such entry.
    ConnectionError : no network or server, a connection cut short, or a server error.
    """
    if not (isinstance(entry, str) and entry.isalnum() and len(entry) == 4 and entry[0].isdigit()):
        raise ValueError(f"entry: expected a four-character PDB identifier such as 4XLN, got {entry!r}")
    path, by_hand = (Path(cache_dir) / f"{entry.lower()}.{kind}.gz" for kind in ("cif", "pdb"))
    url = f"{base_url}/{entry.upper()}.cif.gz"
    way_out = f"put the file at {path} or {by_hand} yourself, or use source: files"
    for there, form in ((path, gemmi.CoorFormat.Mmcif), (by_hand, gemmi.CoorFormat.Pdb)):
        if there.exists():
            _parse(there, form)
            return there
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
        require(structure, chains, str(path))
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
    _name_all(structure)
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


def _name_all(structure: gemmi.Structure) -> None:
    """Name a chain without a name by the first free letter; take elements that are absent from the atoms' names.

    Molecular dynamics programs leave both out, and put atom names where `CA` reads as calcium.
    """
    for model in structure:
        taken = {chain.name for chain in model}
        free = (name for name in itertools.chain(ascii_uppercase, map(str, itertools.count(1))) if name not in taken)
        for chain in model:
            chain.name = chain.name.strip() or next(free)
            for residue in chain:
                if {"N", "CA", "C"} <= {atom.name for atom in residue}:
                    for atom in residue:
                        if atom.element.name not in PROTEIN_ELEMENTS:
                            atom.element = gemmi.Element(atom.name.lstrip("0123456789")[:1])


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

    `core_chain` : a chain or other selection of `mobile`. Raises ValueError where `match` does.
    """
    common = match(mobile, fixed, core_chain)
    core = common.within(core_chain)
    rotation, shift = fit(common.a[core], common.b[core])
    return with_positions(mobile, Atoms.of(mobile).xyz @ rotation.T + shift)


def clamp_rotation(a: gemmi.Structure, b: gemmi.Structure, core_chain: str = "C", clamp_chain: str = "D") -> np.ndarray:
    """The rotation by which the clamp turns from `a` to `b`, cores superposed: a vector `(3,)`, radians, frame of `b`.

    It is that of the largest rigid body among the residues of the clamp (see `prepare`) that move: those displaced by
    more than 0.4 of the 80th percentile, of which a least-squares fit keeps, in turns, what lies within 1.5 times its
    median error.

    Raises
    ------
    ValueError : a chain is absent, or is another protein in `b`; and what `core_and_clamp` raises.
    """
    common, core, clamp = _bodies(a, b, core_chain, clamp_chain)
    rotation, shift = fit(common.a[core], common.b[core])
    before, after = (common.a @ rotation.T + shift)[clamp], common.b[clamp]
    moved = np.linalg.norm(before - after, axis=1)
    kept = moved >= 0.4 * np.percentile(moved, 80)
    before, after = before[kept], after[kept]
    kept = np.ones(len(before), bool)
    for _ in range(20):
        rotation, shift = fit(before[kept], after[kept])
        error = np.linalg.norm(before @ rotation.T + shift - after, axis=1)
        kept = error <= 1.5 * np.median(error)
    return Rotation.from_matrix(rotation).as_rotvec()


def _bodies(a: gemmi.Structure, b: gemmi.Structure, core: str, clamp: str) -> tuple[Common, np.ndarray, np.ndarray]:
    """The residues in common, and which of them are the core and the clamp."""
    core, clamp = core_and_clamp(a, b, core, clamp)
    common = match(a, b, core, clamp)
    return common, common.within(core), common.within(clamp)


def clamp_angle(a: gemmi.Structure, b: gemmi.Structure, core_chain: str = "C", clamp_chain: str = "D") -> float:
    """Degrees by which the clamp turns from `a` to `b`, see `clamp_rotation`."""
    return float(np.degrees(np.linalg.norm(clamp_rotation(a, b, core_chain, clamp_chain))))


def cleft_view(a: gemmi.Structure, b: gemmi.Structure, core_chain: str = "C", clamp_chain: str = "D") -> np.ndarray:
    """The orientation that shows the clamp open best: looking along its hinge, the clamp at the top.

    Returns
    -------
    `(3, 3)`, image axes to volume axes, as `projection.project` takes it, in the frame of `b`.

    Raises
    ------
    ValueError : as `clamp_rotation`; or the clamp turns by less than 0.1 degree, so that it has no hinge to look
        along.
    """
    z = clamp_rotation(a, b, core_chain, clamp_chain)
    turn = np.linalg.norm(z)
    if np.degrees(turn) < 0.1:
        raise ValueError(
            f"cleft_view: expected the clamp ({clamp_chain!r}) to turn by at least 0.1 degree from "
            f"{a.name or 'a'} to {b.name or 'b'}, got {np.degrees(turn):.2g} degrees: no hinge to look "
            "along; pass a closed and an open structure"
        )
    z /= turn
    common, core, clamp = _bodies(a, b, core_chain, clamp_chain)
    up = common.b[clamp].mean(axis=0) - common.b[core].mean(axis=0)
    y = -(up - (up @ z) * z)
    y /= np.linalg.norm(y)
    return np.stack([np.cross(y, z), y, z], axis=1)


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

    Raises
    ------
    ValueError : `n` < 2; and what `matching.match` and `core_and_clamp` raise.
    """
    n = checks.integer("n_conformations", n, low=2)
    common = match(closed, open_)
    core = common.within(core_and_clamp(closed, open_, core_chain, clamp_chain)[0])
    rotation, shift = fit(common.b[core], common.a[core])
    target = common.b @ rotation.T + shift

    ca = Atoms.of(closed).ca_xyz
    weights = rigid_neighbours(ca, common.index, target)
    rotations, centre, moved_centre = local_fits(weights, common.a, target)
    goal = moved_centre + np.einsum("nij,nj->ni", rotations, ca - centre)
    goal[common.index] = target
    turn = Rotation.from_matrix(rotations).as_rotvec()
    return carry(closed, turn, goal - ca, n)
