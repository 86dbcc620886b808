"""The built-in phantom: an RNA-polymerase-like particle with a clamp that opens, made by one seed."""

from __future__ import annotations

import gemmi
import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from cryo_lib import checks
from cryo_lib.simulate.atoms import Atoms, carry, centred, mend, with_positions

RESIDUES, DOMAIN_RESIDUES = 3520, 160  # of the phantom, and of one of its domains
RESIDUE_VOLUME, HELIX_SPACING = 133.0, 9.9  # A^3 (1.21 A^3/Da), and A between the axes of packed helices
GRID_STEP = 2.5  # A
COLUMN_POINTS = HELIX_SPACING**2 * 0.75**0.5 / GRID_STEP**3  # grid points an A of a helix's column
SHAPE = (  # capsules (chain, end, end, radius): a crab claw seen from the front, cleft up, its floor at the origin
    ("A", (-8, -64, 18), (-16, -46, 8), 17),
    ("B", (14, -62, -18), (14, -44, -8), 17),
    ("C", (14, -34, 0), (26, -8, -14), 24),
    ("C", (28, -10, 16), (38, 24, 14), 18),
    ("C", (38, 14, -16), (30, 56, -4), 18),
    ("C", (30, 54, -2), (20, 64, 10), 14),
    ("D", (-14, -34, 2), (-20, -8, 16), 22),
    ("D", (-6, -10, -30), (0, -28, -26), 18),
    ("D", (-28, 0, -10), (-36, 34, -8), 19),
    ("D", (-36, 24, 14), (-27, 58, 4), 17),
    ("D", (-26, 58, 4), (-16, 66, -6), 14),
    ("D", (-24, -20, -18), (-40, -36, -16), 15),
    ("E", (-36, -52, 6), (-28, -58, -8), 14),
    ("F", (-34, 8, 38), (-20, 26, 40), 14),
    ("F", (-18, 10, 40), (14, -6, 42), 9),
    ("F", (20, -22, 36), (32, -40, 28), 15),
)
HINGE, HINGE_AXIS = np.array([-36.0, -6.0, 0.0]), np.array([0.15, 0.1, 1.0]) / np.linalg.norm([0.15, 0.1, 1.0])
SIDE_CHAINS = {  # share of the residues; atoms as (name, the three atoms it hangs on, bond, angle, torsion)
    "ALA": (0.14, ()),
    "SER": (0.08, (("OG", "N CA CB", 1.42, 111, -65),)),
    "VAL": (0.12, (("CG1", "N CA CB", 1.52, 111, 175), ("CG2", "N CA CB", 1.52, 111, -62))),
    "LEU": (
        0.18,
        (("CG", "N CA CB", 1.53, 116, -65), ("CD1", "CA CB CG", 1.52, 111, 175), ("CD2", "CA CB CG", 1.52, 111, -63)),
    ),
    "ASP": (
        0.08,
        (("CG", "N CA CB", 1.52, 113, -70), ("OD1", "CA CB CG", 1.25, 118, -15), ("OD2", "CA CB CG", 1.25, 118, 165)),
    ),
    "GLU": (
        0.14,
        (
            ("CG", "N CA CB", 1.52, 114, -65),
            ("CD", "CA CB CG", 1.52, 113, 180),
            ("OE1", "CB CG CD", 1.25, 118, -10),
            ("OE2", "CB CG CD", 1.25, 118, 170),
        ),
    ),
    "LYS": (
        0.10,
        (
            ("CG", "N CA CB", 1.52, 114, -65),
            ("CD", "CA CB CG", 1.52, 111, 180),
            ("CE", "CB CG CD", 1.52, 111, 180),
            ("NZ", "CG CD CE", 1.49, 112, 180),
        ),
    ),
    "ARG": (
        0.09,
        (
            ("CG", "N CA CB", 1.52, 114, -65),
            ("CD", "CA CB CG", 1.52, 111, 180),
            ("NE", "CB CG CD", 1.46, 112, 180),
            ("CZ", "CG CD NE", 1.33, 124, 180),
            ("NH1", "CD NE CZ", 1.33, 120, 0),
            ("NH2", "CD NE CZ", 1.33, 120, 180),
        ),
    ),
    "PHE": (
        0.07,
        (
            ("CG", "N CA CB", 1.50, 114, -68),
            ("CD1", "CA CB CG", 1.39, 121, 85),
            ("CD2", "CA CB CG", 1.39, 121, -95),
            ("CE1", "CB CG CD1", 1.39, 120, 180),
            ("CE2", "CB CG CD2", 1.39, 120, 180),
            ("CZ", "CG CD1 CE1", 1.39, 120, 0),
        ),
    ),
}


def phantom(n_conformations: int = 5, opening: float = 20.0, seed: int = 0) -> list[gemmi.Structure]:
    """Make an RNA-polymerase-like particle of about 370 kDa (modelled atoms), closed to open, by one seed.

    A crab claw of chains A-F (two alpha, beta, beta', omega, sigma), about 165 x 130 x 105 A from outermost atom to
    outermost: rough capsules, cut into domains of about 17 kDa, each filled with alpha-helices 9.9 A apart, protein's
    density, and loops; residues with backbone and side chains, of no real protein's sequence. The clamp (D's
    left pincer and the part of F on it) turns as a rigid body by `opening` degrees about a hinge at its root.

    Returns
    -------
    list of `n_conformations` gemmi.Structure, closed to open, the middle of the box around them at the origin.

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
    ca = Atoms.of(closed).ca_xyz
    names = np.repeat([chain.name for chain in closed[0]], [len(chain) for chain in closed[0]])
    share = np.clip((ca[:, 1] - HINGE[1]) / 20.0, 0.0, 1.0) * np.isin(names, ["D", "F"])
    share[names == "F"] *= np.clip((-8.0 - ca[names == "F", 0]) / 12.0, 0.0, 1.0)  # sigma's right half stays
    turn = np.radians(opening) * (share**2 * (3.0 - 2.0 * share))[:, None] * HINGE_AXIS
    shift = Rotation.from_rotvec(turn).apply(ca - HINGE) + HINGE - ca
    return centred(carry(closed, turn, shift, n_conformations))


def _domains(rng: np.random.Generator, volume: float) -> dict[str, list[np.ndarray]]:
    """Grid points `(k, 3)` of the domains of each chain, in the order of its capsules; `volume` A^3 in all."""
    axis = np.arange(-100.0, 100.0, GRID_STEP)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    depth = []
    for _, start, end, radius in SHAPE:
        start, along = np.array(start, float), np.subtract(end, start)
        foot = np.clip((grid - start) @ along / (along @ along), 0.0, 1.0)
        depth.append(np.linalg.norm(grid - start - foot[:, None] * along, axis=1) - radius)
    owner = np.argmin(depth, axis=0)
    rough = gaussian_filter(rng.standard_normal((len(axis),) * 3), 6.0 / GRID_STEP).ravel()
    surface = np.min(depth, axis=0) + 3.0 * rough / rough.std()
    inside = np.argsort(surface)[: int(volume / GRID_STEP**3)]
    domains: dict[str, list[np.ndarray]] = {}
    for capsule, (chain, *_) in enumerate(SHAPE):
        points = grid[inside[owner[inside] == capsule]]
        k = max(1, round(len(points) * GRID_STEP**3 / (DOMAIN_RESIDUES * RESIDUE_VOLUME)))
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
    atoms = Atoms.of(structure)
    xyz = atoms.xyz
    for _ in range(3):  # contacts are found anew each time
        xyz = mend(atoms, xyz, ideal=True)
    return with_positions(structure, xyz)
