"""Which chains and residues of two structures are the same, whatever they are called in each."""

from __future__ import annotations

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
    """Chains and their ranges of residue numbers (none: all) of a selection such as `C` or `A:1-29,60-121+B`."""
    chains = []
    for part in selection.split("+"):
        chain, _, ranges = part.partition(":")
        try:
            ends = [
                ends.rpartition("-") if "-" in ends[1:] else (ends, "-", ends) for ends in ranges.split(",") if ends
            ]
            chains.append((chain, [(int(low), int(high)) for low, _, high in ends]))
        except ValueError as error:
            raise ValueError(
                f"selection {selection!r}: expected a chain's name, or residues such as A:1-29,60-121 "
                f"(chains joined by +), got {part!r}; name the first and the last residue of each range"
            ) from error
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

    A chain's counterpart is that chain of `b`, taken once, with the most residues in common that are equal; of equal
    ones that of the same name, then the first. Residues are matched by number where the numbers agree, else by
    the alignment of their sequences.

    Raises
    ------
    ValueError : a chain is not in `a`, or has no counterpart in `b`; that message lists the chains there are.
    """
    present = {chain.name: chain for chain in a[0]}
    chains = list(dict.fromkeys(chain for selection in selections if selection for chain, _ in parse(selection)))
    chains = chains if all(selections) and selections else list(present)
    require(a, chains, f"structure {a.name}")
    starts = dict(zip(present, np.cumsum([0, *map(len, present.values())])))
    others, rows = {chain.name: chain for chain in b[0]}, []
    for name, chain in ((name, chain) for name, chain in present.items() if name in chains):
        pairs = {other: _pairs(chain, others[other]) for other in sorted(others, key=lambda other: other != name)}
        equal = {other: sum(chain[i].name == others[other][j].name for i, j in found) for other, found in pairs.items()}
        best = max(equal, key=equal.__getitem__, default=None)
        needed = max(SAME_PROTEIN * min(len(chain), len(others[best])), COVERED * len(chain)) if others else 0
        if not others or equal[best] < needed:
            sizes = ", ".join(f"{other} ({len(residues)} residues)" for other, residues in others.items())
            raise ValueError(
                f"chain {name} of {a.name} ({len(chain)} residues): expected the same protein in {b.name}, "
                f"got {sizes or 'no other chain'}; choose other chains or files"
            )
        partner = others.pop(best)
        for i, j in pairs[best]:
            rows.append((starts[name] + i, ca(chain[i]), ca(partner[j]), name, chain[i].seqid.num, best))
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


def _pairs(a: gemmi.Chain, b: gemmi.Chain) -> list[tuple[int, int]]:
    """Places in two chains of the residues that are the same."""
    places = {str(residue.seqid): j for j, residue in enumerate(b)}
    pairs = [(i, places[str(residue.seqid)]) for i, residue in enumerate(a) if str(residue.seqid) in places]
    equal = sum(a[i].name == b[j].name for i, j in pairs)
    if equal >= max(SAME_NUMBERING * len(pairs), SAME_PROTEIN * min(len(a), len(b))):
        return pairs
    return sorted(_aligned(a, b) & {(i, j) for j, i in _aligned(b, a)})  # what depends on the order is a guess


def _aligned(a: gemmi.Chain, b: gemmi.Chain) -> set[tuple[int, int]]:
    """Places of the equal residues in the alignment of two sequences; gaps are cheap where `b` is broken."""
    alignment = gemmi.align_sequence_to_polymer([r.name for r in a], b.whole(), gemmi.PolymerType.PeptideL)
    here, there = (np.array(list(alignment.add_gaps("x" * len(x), k))) == "x" for k, x in ((1, a), (2, b)))
    columns = zip(np.cumsum(here)[here & there] - 1, np.cumsum(there)[here & there] - 1)
    return {(int(i), int(j)) for i, j in columns if a[int(i)].name == b[int(j)].name}
