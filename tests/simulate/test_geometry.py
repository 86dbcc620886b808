"""The geometry of a conformation, on chains whose distances and clashes are known."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryo_lib.simulate import geometry, structures
from cryo_lib.simulate.atoms import with_positions
from tests.simulate.helices import helices, moved, positions, toy


def chain_of_ca(count):
    """CA atoms 3.8 A apart on a straight line."""
    structure = gemmi.Structure()
    structure.add_model(gemmi.Model(1))
    chain = gemmi.Chain("A")
    for k in range(count):
        residue, atom = gemmi.Residue(), gemmi.Atom()
        residue.name, residue.seqid, residue.entity_type = "ALA", gemmi.SeqId(k + 1, " "), gemmi.EntityType.Polymer
        atom.name, atom.element, atom.pos = "CA", gemmi.Element("C"), gemmi.Position(3.8 * k, 0, 0)
        residue.add_atom(atom)
        chain.add_residue(residue)
    structure[0].add_chain(chain)
    return structure


def with_atoms_at(structure, places):
    """The structure with some of its atoms elsewhere."""
    xyz = positions(structure)
    for atom, place in places.items():
        xyz[atom] = place
    return with_positions(structure, xyz)


def test_an_ideal_chain():
    distances, clashes, radius = geometry.measure(chain_of_ca(50))
    np.testing.assert_allclose(distances, np.full(49, 3.8), atol=1e-9)
    assert clashes == 0
    assert radius == pytest.approx(3.8 * np.sqrt((50**2 - 1) / 12))  # of equally spaced points


def test_clashes_are_pairs_of_residues_that_are_not_bound():
    ideal = chain_of_ca(50)
    bent = with_atoms_at(ideal, {40: (3.8 * 10, 1.9, 0), 45: (3.8 * 20, 0, 1.9), 49: (3.8 * 30, 0, 2.1)})
    assert geometry.measure(bent, ideal).clashes == 2  # the third is 2.1 A away
    near = with_atoms_at(ideal, {21: (3.8 * 20, 0, 1.0)})
    assert geometry.measure(near, ideal).clashes == 0  # 20 and 21 are bound


def test_a_torn_link_is_measured_where_the_whole_chain_has_it():
    ideal = chain_of_ca(50)
    torn = with_atoms_at(ideal, {k: (3.8 * k + 5.7, 0, 0) for k in range(25, 50)})
    assert geometry.measure(torn, ideal).ca_distances.max() == pytest.approx(9.5)
    assert geometry.measure(torn).ca_distances.max() == pytest.approx(3.8)  # by itself it is two chains
    limits = geometry.limits(ideal, ideal)
    assert limits.ca_distances == pytest.approx((3.5, 4.1))
    with pytest.raises(
        ValueError, match="3.50 to 4.10 A, .*; got conformation 1: CA atoms of bound residues 9.50 A apart"
    ):
        geometry.require_sound([geometry.measure(ideal), geometry.measure(torn, ideal)], limits)


def test_limits_are_those_of_the_two_structures():
    ideal = chain_of_ca(100)
    crowded = with_atoms_at(ideal, {40: (3.8 * 10, 1.9, 0), 45: (3.8 * 20, 0, 1.9)})
    limits = geometry.limits(ideal, crowded)
    assert limits.clashes == 2.5
    radii = [geometry.measure(structure).radius for structure in (ideal, crowded)]
    assert limits.radius == pytest.approx((0.95 * min(radii), 1.05 * max(radii)))
    measured = geometry.measure(crowded)
    geometry.require_sound([measured._replace(ca_distances=np.array([3.8]))], limits)
    with pytest.raises(
        ValueError, match="conformation 0: 3 pairs of atoms under 2 A; conformation 0: radius of gyration 1"
    ):
        geometry.require_sound([measured._replace(ca_distances=np.array([3.8]), clashes=3, radius=1.0)], limits)


def test_a_hinge_has_a_path():
    closed, opened = toy(0), toy(1)
    path = structures.morph(closed, opened, 5)
    geometry.require_sound([geometry.measure(s, closed) for s in path], geometry.limits(closed, opened))


def test_copies_that_change_places_have_no_path():
    """Four copies about an axis: with two of their names exchanged both ends are sound, and what is between is not."""
    corners = [(15 + x, 15 + y, 0) for x in (0, 10, 20) for y in (0, 10)]
    closed = helices(A=corners, B=corners, C=corners, D=corners)
    for k, name in enumerate("ABCD"):
        closed = moved(closed, Rotation.from_euler("z", 90 * k, degrees=True), np.zeros(3), [name])
    swapped = closed.clone()
    swapped[0]["B"].name, swapped[0]["D"].name = "x", "B"
    swapped[0]["x"].name = "D"
    assert structures.clamp_angle(closed, swapped, "A", "B") == pytest.approx(180.0)
    measured = [
        geometry.measure(s, closed) for s in structures.morph(closed, swapped, 5, core_chain="A", clamp_chain="B")
    ]
    limits = geometry.limits(closed, swapped)
    geometry.require_sound([measured[0], measured[-1]], limits)
    with pytest.raises(ValueError, match="conformation 2: .*No path leads from the one to the other"):
        geometry.require_sound(measured, limits)
