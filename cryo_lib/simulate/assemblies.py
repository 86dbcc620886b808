"""Particles of many shapes: symmetric assemblies of a structure, complexes of two, filaments, and blobs of residues.

All are drawn at random; lengths are in A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from cryo_lib import checks
from cryo_lib.simulate.library import MOST, Points

CONTACT = 4.0  # A, between the closest points of two neighbours
PROBED = 800  # points of a structure among which its contacts are sought
ORDERS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)  # of symmetry, drawn with weights 1 / (order + 2)
RESIDUE = 54.0, 135.0  # electrons and A^3, the mean of proteins


def symmetric(part: Points, n: int, dihedral: bool, rng: np.random.Generator) -> Points:
    """`n` copies in a ring that touch each other, Cn; `dihedral`: two rings back to back, Dn. At a random pose.

    `n` is 1 or more; C1 is the part itself.
    """
    n = checks.integer("n", n, low=1)
    copies = n * (1 + dihedral)
    part = part.thinned(max(1, MOST // copies))
    xyz = Rotation.random(rng=rng).apply(part.xyz - part.middle)
    turns = Rotation.from_rotvec(np.outer(np.arange(n) * 2 * np.pi / n, (0, 0, 1)))
    if n > 1:
        xyz = xyz + (_closest(lambda r: (xyz + (r, 0, 0), turns[1].apply(xyz + (r, 0, 0))), part.diameter * n), 0, 0)
    ring = np.concatenate([turn.apply(xyz) for turn in turns])
    if dihedral:
        turned = Rotation.from_rotvec((np.pi, 0, 0)) * Rotation.from_rotvec((0, 0, rng.uniform(0, 2 * np.pi)))
        other = turned.apply(ring)
        height = _closest(lambda h: (ring + (0, 0, h / 2), other - (0, 0, h / 2)), 2 * part.diameter)
        ring = np.concatenate([ring + (0, 0, height / 2), other - (0, 0, height / 2)])
    name = f"{part.name} {'D' if dihedral else 'C'}{n}" if copies > 1 else part.name
    return Points(name, ring, np.tile(part.electrons, copies))


def complex_of(a: Points, b: Points, rng: np.random.Generator) -> Points:
    """Two structures that touch, `b` at a random pose and in a random direction from the middle of `a`."""
    a, b = a.thinned(MOST // 2), b.thinned(MOST // 2)
    direction = Rotation.random(rng=rng).apply((0, 0, 1))
    xyz, other = a.xyz - a.middle, Rotation.random(rng=rng).apply(b.xyz - b.middle)
    away = _closest(lambda r: (xyz, other + r * direction), a.diameter + b.diameter)
    electrons = np.concatenate([a.electrons, b.electrons])
    return Points(f"{a.name} + {b.name}", np.concatenate([xyz, other + away * direction]), electrons)


def filament(part: Points, length: float, rng: np.random.Generator) -> Points:
    """Copies of a structure along a helix about z, `length` A: one, two or three strands, of random rise and twist."""
    strands, twist = int(rng.integers(1, 4)), rng.uniform(0, np.pi)
    ring = symmetric(part, strands, False, rng)
    xyz = ring.xyz - ring.middle if strands == 1 else ring.xyz
    turn = Rotation.from_rotvec((0, 0, twist))
    rise = max(CONTACT, _closest(lambda h: (xyz, turn.apply(xyz) + (0, 0, h)), 2 * ring.diameter))
    count = max(1, int(length / rise))
    thin = Points(ring.name, xyz, ring.electrons).thinned(max(1, MOST // count))
    turns = Rotation.from_rotvec(np.outer(np.arange(count) * twist, (0, 0, 1)))
    along = (np.arange(count) - (count - 1) / 2) * rise
    xyz = np.concatenate([turn.apply(thin.xyz) + (0, 0, z) for turn, z in zip(turns, along)])
    return Points(f"filament of {part.name}", xyz, np.tile(thin.electrons, count))


def blob(rng: np.random.Generator) -> Points:
    """Two to eight balls of residues, of random radii (12-40 A), each stuck to those before it."""
    ball = None
    for _ in range(rng.integers(2, 9)):
        radius = rng.uniform(12.0, 40.0)
        count = int(4 / 3 * np.pi * radius**3 / RESIDUE[1])
        inside = rng.standard_normal((count, 3))
        inside *= radius * rng.random((count, 1)) ** (1 / 3) / np.linalg.norm(inside, axis=1, keepdims=True)
        stretched = Points("blob", inside * rng.uniform(0.6, 1.4, 3), np.full(count, RESIDUE[0]))
        ball = stretched if ball is None else complex_of(ball, stretched, rng)
    return ball._replace(name="blob")


def draw(
    structures: Sequence[Points], smallest: float, largest: float, rng: np.random.Generator, tries: int = 60
) -> Points:
    """A particle of `smallest` to `largest` A in diameter, made of one of the structures or of several.

    Three in five of the structures of that size stay as they are. Of the others one to four parts are stuck together,
    and then Cn or Dn is made of these.

    Raises
    ------
    ValueError : none of so many tries had this size.
    """
    for _ in range(tries):
        part = structures[rng.integers(len(structures))]
        if not (smallest <= part.diameter <= largest and rng.random() < 0.6):
            for _ in range(rng.choice(4, p=(0.4, 0.2, 0.2, 0.2))):
                part = complex_of(part, structures[rng.integers(len(structures))], rng)
            weights = 1 / (np.array(ORDERS) + 2)
            order = int(rng.choice(ORDERS, p=weights / weights.sum()))
            part = symmetric(part, order, order > 1 and bool(rng.random() < 0.4), rng)
        if smallest <= part.diameter <= largest:
            return part
    raise ValueError(
        f"diameter: expected particles of {smallest:g} to {largest:g} A, got none in {tries} tries; widen the range"
    )


def _closest(placed: Callable[[float], tuple[np.ndarray, np.ndarray]], far: float) -> float:
    """The least distance, coming from `far`, at which two placed parts are `CONTACT` apart; to 0.5 A."""

    def apart(distance: float) -> bool:
        a, b = (xyz[:: -(-len(xyz) // PROBED)] for xyz in placed(distance))
        return cKDTree(a).query(b, distance_upper_bound=CONTACT)[0].min() > CONTACT

    low = far
    while low > 0 and apart(low):
        low -= max(far / 40, CONTACT)
    high = low + max(far / 40, CONTACT)
    while high - low > 0.5:
        middle = (low + high) / 2
        low, high = (low, middle) if apart(middle) else (middle, high)
    return max(high, 0.0)
