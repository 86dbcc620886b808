"""Assemblies have the symmetry of their names and touch; sizes are as asked for."""

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from cryo_lib.simulate import assemblies, atoms
from cryo_lib.simulate.library import Points


@pytest.fixture
def part():
    """A lopsided body of 400 points, 40 A across."""
    rng = np.random.default_rng(0)
    xyz = rng.uniform(-1, 1, (400, 3)) * (18, 10, 7) + (5, -3, 8)
    return Points("part", xyz, rng.uniform(5, 9, 400))


def nearest(a, b):
    return cKDTree(a).query(b)[0].min()


@pytest.mark.parametrize("n", [2, 3, 7])
def test_a_ring_is_itself_after_a_turn_and_its_neighbours_touch(part, n):
    ring = assemblies.symmetric(part, n, False, np.random.default_rng(n))
    turned = Rotation.from_rotvec((0, 0, 2 * np.pi / n)).apply(ring.xyz)
    assert cKDTree(ring.xyz).query(turned)[0].max() < 1e-6
    assert ring.name == f"part C{n}" and ring.electrons.sum() == pytest.approx(n * part.electrons.sum())
    gap = nearest(ring.xyz[:400], ring.xyz[400:800])
    assert assemblies.CONTACT - 1 < gap < assemblies.CONTACT + 1
    np.testing.assert_allclose(
        np.sort(np.linalg.norm(ring.xyz[0] - ring.xyz[:400], axis=1)),
        np.sort(np.linalg.norm(part.xyz[0] - part.xyz, axis=1)),
    )


def test_a_dihedral_assembly_has_twofold_axes_across_its_own(part):
    both = assemblies.symmetric(part, 4, True, np.random.default_rng(5))
    upper, lower = np.split(both.xyz, 2)
    turn, shift = atoms.fit(upper, lower)
    np.testing.assert_allclose(upper @ turn.T + shift, lower, atol=1e-6)
    np.testing.assert_allclose(lower @ turn.T + shift, upper, atol=1e-6)
    assert np.trace(turn) == pytest.approx(-1) and turn[2, 2] == pytest.approx(-1)
    assert 1 < nearest(upper, lower) < assemblies.CONTACT + 1  # contacts are sought among half of these points


def test_one_copy_is_the_part_turned(part):
    one = assemblies.symmetric(part, 1, False, np.random.default_rng(2))
    turn, shift = atoms.fit(part.xyz, one.xyz)
    np.testing.assert_allclose(part.xyz @ turn.T + shift, one.xyz, atol=1e-6)
    assert one.name == "part"


def test_a_complex_holds_both_parts_and_they_touch(part):
    other = Points("other", part.xyz[:150] * 1.5, part.electrons[:150])
    pair = assemblies.complex_of(part, other, np.random.default_rng(3))
    assert len(pair.xyz) == 550
    assert assemblies.CONTACT - 1 < nearest(pair.xyz[:400], pair.xyz[400:]) < assemblies.CONTACT + 1


@pytest.mark.parametrize("seed", range(3))
def test_a_filament_is_a_helix_along_z(part, seed):
    """Its copies repeat after one rise and twist, and fill the length."""
    made = assemblies.filament(part, 600.0, np.random.default_rng(seed))
    low, high = made.xyz[:, 2].min(), made.xyz[:, 2].max()
    assert 500 < high - low < 680 and low + high == pytest.approx(0, abs=45)
    assert np.hypot(*made.xyz[:, :2].T).max() < 100
    rises = np.diff(np.sort(made.xyz[:, 2]))
    assert rises.max() < 40  # no gap along it


def test_a_blob_is_of_the_density_of_protein():
    made = assemblies.blob(np.random.default_rng(1))
    assert set(made.electrons.round(6)) == {assemblies.RESIDUE[0]} and 2 * 12 < made.diameter < 8 * 2 * 1.4 * 45


def test_drawn_particles_have_the_size_and_come_again_with_their_seed(part):
    drawn = [assemblies.draw([part], 80, 200, np.random.default_rng(seed)) for seed in range(12)]
    assert all(80 <= points.diameter <= 200 for points in drawn)
    assert len({points.name for points in drawn}) > 3
    np.testing.assert_array_equal(drawn[3].xyz, assemblies.draw([part], 80, 200, np.random.default_rng(3)).xyz)
    with pytest.raises(ValueError, match="expected particles of 1 to 2 A, got none in 60 tries; widen"):
        assemblies.draw([part], 1, 2, np.random.default_rng(0))
