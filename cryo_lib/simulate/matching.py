"""Which chains and residues of two structures are the same, whatever they are called in each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import gemmi
import numpy as np
import pandas as pd

SAME_NUMBERING = 0.9  # share of equal residues among those of equal number from which on the numbers are believed
SAME_PROTEIN, COVERED = 0.5, 0.3  # shares of equal residues in the shorter of two chains, and in the first, at least


class Common(NamedTuple):
    """Residues that two structures share, in the order of the first, `(n,)` each, and their CA atoms `(n, 3)`."""

    index: np.ndarray  # place in the first structure
    a: np.ndarray  # CA in the first
    b: np.ndarray  # CA in the second
    chain: np.ndarray  # name in the first
    number: np.ndarray  # in the first
    partner: np.ndarray  # the chain's name in the second

    def within(self, selection: str) -> np.ndarray:
        """Which of them are in a selection such as `C` or `A:1-29,60-121+B` of the first structure ("": all).

        Returns
        -------
        `(n,)` bool.

        Raises
        ------
        ValueError : no selection, or one with fewer than three of the residues.
        """
        if not selection:
            return np.ones(len(self.index), bool)
        chosen = np.zeros(len(self.index), bool)
        for chain, ranges in parse(selection):
            numbers = np.any([(self.number >= low) & (self.number <= high) for low, high in ranges], axis=0)
            chosen |= (self.chain == chain) & (numbers if ranges else True)
        if chosen.sum() < 3:
            raise ValueError(
                f"{selection!r}: expected at least 3 residues that both structures have, got {chosen.sum()}; both have "
                f"{', '.join(written(self.chain, self.number, self.chain == name) for name in names(self.chain))}"
            )
        return chosen


def require(structure: gemmi.Structure, chains: Sequence[str], where: str) -> None:
    """ValueError, which lists the chains there are, if one of these is absent or none is named."""
    present = [chain.name for chain in structure[0]]
    absent = [name for name in chains if name not in present]
    if absent or not len(chains):
        raise ValueError(
            f"{where}: expected chains {', '.join(chains) or '(none named)'}, got a structure without "
            f"{', '.join(absent) or 'any of them'}; its protein chains are {', '.join(present)}"
        )


def names(chain: np.ndarray) -> list[str]:
    """Each chain's name once, in order."""
    return list(dict.fromkeys(chain.tolist()))


def parse(selection: str) -> list[tuple[str, list[tuple[int, int]]]]:
    """Chains and their ranges of residue numbers (none: all) of a selection such as `C` or `A:1-29,60-121+B`.

    Raises ValueError where it is not written so.
    """
    chains = []
    for part in selection.split("+"):
        chain, _, ranges = part.partition(":")
        found = [re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", ends) for ends in ranges.split(",") if ranges]
        if not chain or None in found:
            raise ValueError(
                f"selection {selection!r}: expected a chain's name, or residues such as A:1-29,60-121 "
                f"(+ joins several), got {part!r}; name the first and the last residue of each range"
            )
        chains.append((chain, [(int(ends[1]), int(ends[2] or ends[1])) for ends in found]))
    return chains


def written(chain: np.ndarray, number: np.ndarray, chosen: np.ndarray) -> str:
    """The selection, as `parse` reads it, of the chosen residues of a list; what lies between two of them is in it."""
    parts = []
    for name in names(chain[chosen]):
        mine, here = number[chain == name], chosen[chain == name]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], here, [False]]).astype(int))).reshape(-1, 2)
        parts.append(f"{name}:" + ",".join(f"{mine[start]}-{mine[stop - 1]}" for start, stop in edges))
    return "+".join(parts)


def match(a: gemmi.Structure, b: gemmi.Structure, *selections: str) -> Common:
    """The residues that the chains of `a` named by these selections (none, or "": all) have in common with `b`.

    Residues are matched by number where the numbers agree, else by the alignment of their sequences. A chain's
    counterpart is that of the same name where their numbers agree; else, of the chains that are left, that with the
    most equal residues, of equal ones that of the same name, then the first.

    Raises
    ------
    ValueError : a chain is not in `a`, or has no counterpart in `b`; that message lists the chains there are.
    """
    chains = list(dict.fromkeys(chain for selection in selections if selection for chain, _ in parse(selection)))
    chains = chains if selections and all(selections) else [chain.name for chain in a[0]]
    require(a, chains, f"structure {a.name}")
    counterparts, others, rows, start = _counterparts(a, b), {chain.name: chain for chain in b[0]}, [], 0
    for chain in a[0]:
        name, pairs = counterparts.get(chain.name, ("", []))
        if chain.name in chains and not pairs:
            free = others.keys() - {taken for taken, _ in counterparts.values()}
            sizes = ", ".join(f"{other} ({len(others[other])} residues)" for other in others if other in free)
            raise ValueError(
                f"chain {chain.name} of {a.name} ({len(chain)} residues): expected the same protein (by number or "
                f"alignment of its residues) in {b.name}, got {sizes or 'no other chain'}; choose other chains or files"
            )
        if chain.name in chains:
            for i, j in pairs:
                rows.append((start + i, ca(chain[i]), ca(others[name][j]), chain.name, chain[i].seqid.num, name))
        start += len(chain)
    return Common(*map(np.array, zip(*rows)))


def table(a: gemmi.Structure, b: gemmi.Structure) -> pd.DataFrame:
    """Each chain of `a`: its counterpart in `b`, the residues in both, and those that only one of the two has."""
    common, length = match(a, b), {chain.name: len(chain) for chain in b[0]}
    rows = []
    for chain in a[0]:
        here = common.chain == chain.name
        partner, both = str(common.partner[here][0]), int(here.sum())
        rows.append((chain.name, partner, both, len(chain) - both, length[partner] - both))
    return pd.DataFrame(rows, columns=["chain", "counterpart", "in both", "only closed", "only open"])


def ca(residue: gemmi.Residue) -> list[float]:
    """Position of the residue's CA."""
    return residue["CA"][0].pos.tolist()


def _counterparts(a: gemmi.Structure, b: gemmi.Structure) -> dict[str, tuple[str, list[tuple[int, int]]]]:
    """For chains of `a` their counterpart's name in `b`, and the places of the residues that are the same in both."""
    others, found = {chain.name: chain for chain in b[0]}, {}
    for chain in (chain for chain in a[0] if chain.name in others):
        if pairs := _numbered(chain, others[chain.name]):
            found[chain.name] = chain.name, pairs
    for chain in (chain for chain in a[0] if chain.name not in found):
        free = [name for name in others if name not in {taken for taken, _ in found.values()}]
        pairs = {name: _numbered(chain, others[name]) or _aligned(chain, others[name]) for name in free}
        best = max(pairs, key=lambda name: (_equal(chain, others[name], pairs[name]), name == chain.name), default=None)
        if pairs.get(best):
            found[chain.name] = best, pairs[best]
    return found


def _equal(a: gemmi.Chain, b: gemmi.Chain, pairs: list[tuple[int, int]]) -> int:
    return sum(a[i].name == b[j].name for i, j in pairs)


def _same(a: gemmi.Chain, b: gemmi.Chain, pairs: list[tuple[int, int]]) -> bool:
    return _equal(a, b, pairs) >= max(SAME_PROTEIN * min(len(a), len(b)), COVERED * len(a))


def _numbered(a: gemmi.Chain, b: gemmi.Chain) -> list[tuple[int, int]]:
    """Places in two chains of the residues of the same number; none where these are others."""
    places = {str(residue.seqid): j for j, residue in enumerate(b)}
    pairs = [(i, places[str(residue.seqid)]) for i, residue in enumerate(a) if str(residue.seqid) in places]
    return pairs if _same(a, b, pairs) and _equal(a, b, pairs) >= SAME_NUMBERING * len(pairs) else []


def _aligned(a: gemmi.Chain, b: gemmi.Chain) -> list[tuple[int, int]]:
    """Places of the equal residues that are together in the alignment of either sequence to the other; none if few."""
    found = []
    for query, target in ((a, b), (b, a)):  # gaps are cheap where the target is broken
        sequence = [residue.name for residue in query]
        alignment = gemmi.align_sequence_to_polymer(
            sequence, target.whole(), gemmi.PolymerType.PeptideL, gemmi.AlignmentScoring()
        )
        first = np.array(list(alignment.add_gaps("x" * len(query), 1))) == "x"
        second = np.array(list(alignment.add_gaps("x" * len(target), 2))) == "x"
        found.append(np.stack([first.cumsum(), second.cumsum()], axis=1)[first & second] - 1)
    both = set(map(tuple, found[0].tolist())) & set(map(tuple, found[1][:, ::-1].tolist()))
    pairs = sorted((i, j) for i, j in both if a[i].name == b[j].name)
    return pairs if _same(a, b, pairs) else []
