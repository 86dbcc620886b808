"""Rigid bodies in the motion from one structure to another: how each neighbourhood turns, and the two largest."""

from __future__ import annotations

from itertools import pairwise

import gemmi
import numpy as np
from scipy import sparse
from scipy.ndimage import median_filter
from scipy.spatial import cKDTree

from cryo_lib.simulate.atoms import fit
from cryo_lib.simulate.matching import match, written

RIGID = 2.0  # A: CA atoms of one body lie as near as this to their places in the other structure, the body superposed
SMALLEST = 20  # residues of a body
SMOOTHED = 9  # residues of a chain among which most decide


def core_and_clamp(a: gemmi.Structure, b: gemmi.Structure, core: str, clamp: str) -> tuple[str, str]:
    """The residues that are superposed and those that turn, as selections of `a`'s residues (`matching.parse`).

    Two selections are returned as they are. Where both are the same (one chain; or "", all chains), the two largest
    rigid bodies among these residues are found, the larger the core.

    Raises
    ------
    ValueError : the selections share residues or lack some, or there are no two bodies; and what `match` raises.
    """
    common = match(a, b, core, clamp)
    among, turns = common.within(core), common.within(clamp)
    if core != clamp:
        if (among & turns).any():
            raise ValueError(
                f"core {core!r} and clamp {clamp!r}: expected no residue in both, got "
                f"{written(common.chain, common.number, among & turns)}; take it out of one, or give both the same "
                "chains to find the domains in them"
            )
        return core, clamp
    try:
        bodies = two_largest(common.a[among], common.b[among])
    except ValueError as error:
        raise ValueError(f"{core or 'all chains'} of {a.name} and {b.name}: {error}") from error
    larger, smaller = (written(common.chain[among], common.number[among], body) for body in bodies)
    return larger, smaller


def two_largest(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two largest rigid bodies among CA atoms at `a` that are found again at `b`, `(n, 3)` each.

    Each residue's neighbourhood proposes a motion; that which takes most residues within `RIGID` of their places is
    fitted to them, in turns, and so is the best of what then is left. A residue belongs to the body that
    explains it better. After Hayward and Berendsen, Proteins 30, 144 (1998), whose windows are stretches of a chain.

    Returns
    -------
    Two masks `(n,)` bool, the larger body first.

    Raises
    ------
    ValueError : fewer than two bodies of `SMALLEST` residues.
    """
    rotations, before, after = local_fits(rigid_neighbours(a, np.arange(len(a)), b), a, b)
    left, errors = np.ones(len(a), bool), []
    for count in range(2):
        body = np.zeros(len(a), bool)
        for i in np.flatnonzero(left)[:: 1 + len(a) // 1000]:
            near = np.linalg.norm((a - before[i]) @ rotations[i].T + after[i] - b, axis=1) < RIGID
            body = max(body, left & near, key=np.sum)
        for _ in range(50):
            _require(body, count)
            rotation, shift = fit(a[body], b[body])
            error, last = np.linalg.norm(a @ rotation.T + shift - b, axis=1), body
            body = left & (error < RIGID)
            if (body == last).all():
                break
        errors.append(error)
        left &= ~body
    near, nearest = np.min(errors, axis=0) < RIGID, np.argmin(errors, axis=0)
    bodies = [median_filter(near & (nearest == k), SMOOTHED, mode="nearest") for k in range(2)]
    larger, smaller = sorted(bodies, key=np.sum, reverse=True)
    _require(smaller, 1)
    return larger, smaller


def _require(body: np.ndarray, found: int) -> None:
    if body.sum() < SMALLEST:
        raise ValueError(
            f"expected two rigid bodies of at least {SMALLEST} residues that move against each other, got {found} "
            f"among the {len(body)} residues that both have; name the residues of each, or take files with a hinge"
        )


def rigid_neighbours(ca: np.ndarray, known: np.ndarray, target: np.ndarray) -> sparse.csr_array:
    """Row-normalised `(residues, known)` weights: near (4 A sd) and rigid (distance kept, 1 A sd)."""
    tree, n, k = cKDTree(ca[known]), len(known), min(25, len(known))
    i, j = tree.query_pairs(12.0, output_type="ndarray").T
    before, after = np.linalg.norm(ca[known[i]] - ca[known[j]], axis=1), np.linalg.norm(target[i] - target[j], axis=1)
    weight = np.exp(-0.5 * (before / 4.0) ** 2 - 0.5 * (after - before) ** 2)
    lost = np.setdiff1d(np.arange(len(ca)), known)
    near = np.empty((len(lost), 2 * k), int)
    edges = np.flatnonzero(np.diff(lost, prepend=-2, append=len(ca) + 1) > 1)
    for start, stop in pairwise(edges):  # an absent stretch moves as one body
        near[start:stop] = tree.query(ca[lost[[start, stop - 1]]], k)[1].ravel()
    rows = np.concatenate([known[i], known[j], known, np.repeat(lost, 2 * k)])
    columns = np.concatenate([j, i, np.arange(n), near.ravel()])
    values = np.concatenate([weight, weight, np.ones(n + near.size)])
    weights = sparse.csr_array((values, (rows, columns)), shape=(len(ca), n))
    return sparse.diags_array(1.0 / weights.sum(axis=1)) @ weights


def local_fits(weights: sparse.csr_array, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each row of `weights` the rotation matrix that takes `a` to `b`, and the centres before and after."""
    mean_a, mean_b = weights @ a, weights @ b
    cross = (weights @ (b[:, :, None] * a[:, None, :]).reshape(-1, 9)).reshape(-1, 3, 3)
    u, _, vt = np.linalg.svd(cross - mean_b[:, :, None] * mean_a[:, None, :])
    u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
    return u @ vt, mean_a, mean_b
