"""The built-in phantom: an RNA polymerase in size, packing and motion."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree
from test_structures import bond_lengths, ca_of, clashes, positions

from cryo_lib.simulate import phantom, structures


@pytest.fixture(scope="session")
def claw():
    return structures.phantom(3, opening=20.0, seed=1)


def test_phantom_has_the_mass_size_and_chains_of_rna_polymerase(claw):
    assert 355e3 < structures.mass(claw[0]) < 385e3
    assert [chain.name for chain in claw[0][0]] == list("ABCDEF")
    extent = np.sort(np.ptp(positions(claw[0]), axis=0))
    assert (extent > (85, 100, 130)).all() and (extent < (125, 145, 180)).all()


def test_phantom_is_packed_like_protein(claw):
    """A point in the interior sees the atoms of protein: about one heavy atom in 17-19 A^3, in a 10 A ball."""
    tree = cKDTree(positions(claw[0]))
    counts = tree.query_ball_point(positions(claw[0])[::50], 10.0, return_length=True)
    density = np.percentile(counts, 80) / (4 / 3 * np.pi * 10.0**3)
    assert 0.045 < density < 0.075


def test_phantom_chains_hold_and_atoms_do_not_clash_in_any_conformation(claw):
    for structure in claw:
        lengths = bond_lengths(structure)
        assert len(lengths) > 3000
        assert np.mean((lengths > 3.6) & (lengths < 4.0)) > 0.99
        assert clashes(structure, 2.0) <= 5


def test_phantom_clamp_opens_by_equal_angles_and_the_core_stays(claw):
    assert structures.clamp_angle(claw[0], claw[2]) == pytest.approx(20.0, abs=0.2)
    assert structures.clamp_angle(claw[0], claw[1]) == pytest.approx(10.0, abs=0.2)
    core = [ca_of(structure, "C") for structure in claw]
    assert np.sqrt(((core[2] - core[0]) ** 2).sum(1).mean()) < 0.3
    gap = [np.linalg.norm(positions(s), axis=1).mean() for s in claw]
    assert gap[0] < gap[1] < gap[2]


def test_cleft_view_of_the_phantom_is_along_its_hinge_with_the_clamp_at_the_top(claw):
    view = structures.cleft_view(claw[0], claw[2])
    assert np.linalg.det(view) == pytest.approx(1.0)
    assert view[:, 2] @ phantom.HINGE_AXIS > np.cos(np.radians(1.0))
    height = {chain: (ca_of(claw[2], chain) @ view)[:, 1].mean() for chain in "CD"}
    assert height["D"] < height["C"] - 20.0  # rows of an image count downwards


def test_phantom_box_is_centred_over_all_conformations(claw):
    box = np.concatenate([positions(structure) for structure in claw])
    np.testing.assert_allclose(box.max(axis=0), -box.min(axis=0), atol=1e-6)


def test_phantom_is_made_by_its_seed_alone(claw):
    again = structures.prepare("phantom", 3, seed=1, opening=20.0)
    assert all(np.array_equal(positions(a), positions(b)) for a, b in zip(claw, again, strict=True))


@pytest.mark.parametrize("opening", [0.0, -3.0, 90.0, float("nan")])
def test_phantom_refuses_an_impossible_opening_and_fewer_than_two_conformations(opening):
    with pytest.raises(ValueError, match="n_conformations: expected an integer >= 2, got 1"):
        structures.phantom(1)
    with pytest.raises(ValueError, match="opening: expected a finite number > 0.0 and <= 40.0"):
        structures.phantom(2, opening)
