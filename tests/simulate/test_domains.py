"""Rigid bodies: those of a known hinge are found again, with any frame, name and noise."""

from __future__ import annotations

import numpy as np
import pytest

from cryo_lib.simulate import domains, matching, structures
from tests.simulate.helices import AWAY, moved, one_chain, peptide, toy


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_the_two_bodies_of_a_hinge_are_found_again(noise):
    common = matching.match(toy(0), moved(toy(1), *AWAY))
    blurred = common.b + np.random.default_rng(0).normal(0, noise, common.b.shape)
    larger, smaller = domains.two_largest(common.a, blurred)
    assert (larger == (common.chain == "D")).mean() > 0.99  # the clamp of 108 residues, the core of 72
    assert (smaller == (common.chain == "C")).mean() > 0.99


def test_local_fits_are_the_motion_of_their_body():
    common = matching.match(toy(0), toy(1))
    weights = domains.rigid_neighbours(common.a, common.index, common.b)
    rotations, before, after = domains.local_fits(weights, common.a, common.b)
    np.testing.assert_allclose(rotations[common.chain == "C"], np.broadcast_to(np.eye(3), (72, 3, 3)), atol=1e-6)
    np.testing.assert_allclose(before[common.chain == "C"], after[common.chain == "C"], atol=1e-6)
    angle = np.degrees(np.arccos((np.trace(rotations[common.chain == "D"], axis1=1, axis2=2) - 1) / 2))
    np.testing.assert_allclose(angle, 20.0, atol=1e-4)


def test_domains_within_a_chain_are_found_where_core_and_clamp_name_the_same():
    closed, opened = one_chain(toy(0)), one_chain(moved(toy(1), *AWAY))
    for both in ("C", ""):
        core, clamp = domains.core_and_clamp(closed, opened, both, both)
        assert (core, clamp) == ("C:601-1412", "C:1-512")
        assert structures.clamp_angle(closed, opened, core, clamp) == pytest.approx(20.0, abs=1e-6)
        assert structures.clamp_angle(closed, opened, both, both) == pytest.approx(20.0, abs=1e-6)


def test_given_domains_are_kept_unless_they_share_residues():
    closed, opened = one_chain(toy(0)), one_chain(toy(1))
    given = "C:1-512", "C:601-1412"
    assert domains.core_and_clamp(closed, opened, *given) == given
    assert structures.clamp_angle(closed, opened, *given) == pytest.approx(20.0, abs=1e-6)
    with pytest.raises(
        ValueError, match="core 'C' and clamp 'C:601-1412': expected no residue in both, got C:601-1412"
    ):
        domains.core_and_clamp(closed, opened, "C", "C:601-1412")


def test_structures_without_a_hinge_have_no_two_bodies():
    for a, b, found in ((toy(0), moved(toy(0), *AWAY), 1), (peptide(), peptide(), 0)):
        with pytest.raises(
            ValueError, match=f"expected two rigid bodies of at least 20 residues .*, got {found} among"
        ):
            domains.core_and_clamp(a, b, "", "")
