"""Physics of the density."""

from __future__ import annotations

import gemmi
import numpy as np
import pytest
from scipy import ndimage

from cryo_lib.simulate import density


def carbon(*positions, b_iso=50.0):
    structure = gemmi.Structure()
    structure.name = "test"
    model, chain, residue = gemmi.Model(1), gemmi.Chain("A"), gemmi.Residue()
    for position in positions:
        atom = gemmi.Atom()
        atom.name, atom.element, atom.pos, atom.b_iso = "CA", gemmi.Element("C"), gemmi.Position(*position), b_iso
        residue.add_atom(atom)
    chain.add_residue(residue)
    model.add_chain(chain)
    structure.add_model(model)
    return structure


@pytest.mark.parametrize("n", [31, 32])
def test_an_atom_has_its_form_factor_as_mass_and_sits_where_it_should(n):
    position = np.array([5.0, -7.5, 2.5])
    volume = density.density(carbon(position), n, pixel_size=2.0, resolution=7.0)
    assert volume.shape == (n, n, n) and volume.dtype == np.float32
    assert volume.sum() * 2.0**3 == pytest.approx(gemmi.Element("C").c4322.calculate_sf(0.0), rel=0.01)
    centre = np.array(ndimage.center_of_mass(volume))[::-1]  # x, y, z
    np.testing.assert_allclose((centre - n // 2) * 2.0, position, atol=0.02)
    assert volume.max() > 0 and volume.min() >= 0


def test_resolution_sets_the_width_and_own_b_factors_do_not_count():
    def variance(resolution, b_iso=50.0, u_aniso=0.0):
        structure = carbon((0, 0, 0), b_iso=b_iso)
        structure[0][0][0][0].aniso = gemmi.SMat33f(u_aniso, u_aniso, u_aniso, 0, 0, 0)
        volume = density.density(structure, 32, 1.5, resolution)
        x = (np.arange(32) - 16) * 1.5
        return (volume.sum(axis=(0, 1)) * x**2).sum() / volume.sum()

    assert variance(10.0) - variance(6.0) == pytest.approx(0.225**2 * (10.0**2 - 6.0**2), rel=0.03)
    assert variance(8.0, b_iso=300.0) == variance(8.0, u_aniso=2.0) == variance(8.0)


def test_density_is_additive_and_leaves_the_structure_alone():
    a, b = (6.0, 0.0, 0.0), (-3.0, 4.0, 9.0)
    both = carbon(a, b)
    volume = density.density(both, 24, 2.0, 6.0)
    parts = density.density(carbon(a), 24, 2.0, 6.0) + density.density(carbon(b), 24, 2.0, 6.0)
    np.testing.assert_allclose(volume, parts, atol=1e-6)
    assert [site.atom.pos.tolist() for site in both[0].all()] == [list(a), list(b)]
    assert both[0][0][0][0].b_iso == 50.0


def test_density_refuses_atoms_that_do_not_fit_and_says_which_box_does():
    structure = carbon((0, 0, 0), (0, 40.0, 0))
    with pytest.raises(ValueError, match=r"y -3\.0 to 43\.0, .*2 A reach 30\.0 A; use n >= 46 or pixel_size >= 2\.867"):
        density.density(structure, 32, 2.0, 6.0)
    density.density(structure, 46, 2.0, 6.0)
    density.density(structure, 32, 2.867, 6.0)


def test_density_refuses_bad_structures_and_numbers():
    empty, two, unknown = gemmi.Structure(), carbon((0, 0, 0)), carbon((0, 0, 0))
    empty.add_model(gemmi.Model(1))
    two.add_model(gemmi.Model(2))
    unknown[0][0][0][0].element = gemmi.Element("X")
    for arguments, message in [
        ((empty, 16, 2.0, 6.0), "expected atoms, got none"),
        ((two, 16, 2.0, 6.0), "expected one model, got 2"),
        ((unknown, 16, 2.0, 6.0), "'CA'.*no known element"),
        ((carbon((0, np.nan, 0)), 16, 2.0, 6.0), "finite coordinates"),
        ((carbon((0, 0, 0)), 2, 2.0, 6.0), "n: expected an integer >= 4"),
        ((carbon((0, 0, 0)), 16, 0.0, 6.0), "pixel_size: .* > 0"),
        ((carbon((0, 0, 0)), 16, 2.0, 3.9), "resolution: .* >= 4.0, got 3.9"),
    ]:
        with pytest.raises(ValueError, match=message):
            density.density(*arguments)
