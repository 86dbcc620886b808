"""Chains and residues that are the same in two structures, whatever their names and numbers."""

from __future__ import annotations

import numpy as np
import pytest

from cryo_lib.simulate import matching
from tests.simulate.helices import helices, renumbered, sequenced, toy


def protein(**seeds):
    """Chains of seven helices 20 A apart, their residues drawn by the seeds."""
    return sequenced(
        helices(**{name: [(20 * x, 40 * y, 0) for x in range(7)] for y, name in enumerate(seeds)}), **seeds
    )


def without(structure, chain, places):
    for place in sorted(places, reverse=True):
        del structure[0][chain][place]
    return structure


def test_chains_of_other_names_and_residues_of_other_numbers_are_found_by_sequence():
    a, b = protein(A=1, B=2), renumbered(protein(B=1, X=2), 7)
    common = matching.match(a, b)
    assert set(zip(common.chain, common.partner)) == {("A", "B"), ("B", "X")}
    np.testing.assert_array_equal(common.index, np.arange(168))
    np.testing.assert_array_equal(common.a, common.b)  # each residue lies where its counterpart lies
    np.testing.assert_array_equal(matching.match(a, b, "B").b, common.b[common.chain == "B"])


@pytest.mark.parametrize("by", [0, 7])
def test_what_only_one_structure_has_is_left_out_and_counted(by):
    a, b = without(protein(A=1, B=2), "A", [0, 1, 40]), protein(A=1, B=2)
    b = renumbered(without(b, "B", [30, 31, 32, 33]), by)
    common = matching.match(a, b)
    np.testing.assert_array_equal(common.a, common.b)
    assert matching.table(a, b).values.tolist() == [["A", "A", 81, 0, 3], ["B", "B", 80, 4, 0]]


def test_a_mutated_residue_is_matched_by_its_number():
    b = protein(A=1)
    b[0]["A"][30].name = "UNK"
    assert len(matching.match(protein(A=1), b).index) == 84
    assert len(matching.match(protein(A=1), renumbered(b, 7)).index) == 83


def test_copies_keep_their_names():
    """C and A are copies of one protein; A's name is there, and C takes what is left although A comes first."""
    common = matching.match(protein(C=1, A=1), protein(A=1, B=1))
    assert set(zip(common.chain, common.partner)) == {("A", "A"), ("C", "B")}
    common = matching.match(protein(A=1, B=1), renumbered(protein(B=1, A=1), 7))
    assert set(zip(common.chain, common.partner)) == {("A", "A"), ("B", "B")}


@pytest.mark.parametrize("seed", range(5))
def test_another_protein_is_no_counterpart(seed):
    with pytest.raises(
        ValueError, match=r"chain A of .* \(84 residues\): expected the same protein .*got Q \(84 resid"
    ):
        matching.match(protein(A=seed), renumbered(protein(Q=100 + seed), 7))


def test_selections_of_chains_and_residues():
    common = matching.match(toy(0), toy(1))
    whole = common.within("C")
    assert whole.sum() == 72 and common.within("C+D").all() and common.within("").all()
    some = common.within("C:1-12,205+D:3-5")
    assert common.number[some].tolist() == [*range(1, 13), 205, 3, 4, 5]
    assert matching.written(common.chain, common.number, some) == "C:1-12,205-205+D:3-5"
    assert (common.within(matching.written(common.chain, common.number, some)) == some).all()
    assert matching.parse("A:-5--2,7") == [("A", [(-5, -2), (7, 7)])]


@pytest.mark.parametrize("selection", ["C:x", "C:1-2-3", "+C", "C:1,,2"])
def test_a_selection_that_is_not_one_is_refused(selection):
    with pytest.raises(ValueError, match="expected a chain's name, or residues such as A:1-29,60-121 .*, got "):
        matching.match(toy(0), toy(1), selection)


def test_a_selection_without_residues_lists_those_there_are():
    with pytest.raises(
        ValueError, match=r"'C:900-990': expected at least 3 residues that both structures have, got 0; .*C:1-"
    ):
        matching.match(toy(0), toy(1)).within("C:900-990")
    with pytest.raises(ValueError, match="expected chains Q, got a structure without Q; its protein chains are C, D"):
        matching.match(toy(0), toy(1), "Q")
