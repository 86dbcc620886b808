"""The stand-in has the shape, the optics and the noise that it claims."""

from pathlib import Path

import gemmi
import mrcfile
import numpy as np
import pytest
from scipy import stats

from cryo_lib.simulate import ctf, density, noise, projection, standin
from cryo_lib.stacks.mrc import write_map
from cryo_lib.stacks.particles import ParticleStack, new

RIBOSOME = Path(__file__).resolve().parents[3] / "shared" / "data" / "ribosome"
needs_shared = pytest.mark.skipif(not RIBOSOME.is_dir(), reason="needs the real data of ../shared, which is absent")
OPTIONS = {"box": 48, "pixel_size": 10.0, "resolution": 20.0, "seed": 3}


def written(folder, n=400, **changes):
    """The stand-in on disk, as notebook 09 writes it."""
    volume, made = standin.make(n, **OPTIONS | {"snr": 0.1} | changes)
    write_map(folder / "map.mrc", volume, OPTIONS["pixel_size"])
    return ParticleStack.open(new(folder / "particles.star", **made))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    return written(folder), mrcfile.read(folder / "map.mrc"), folder / "map.mrc"


@needs_shared
def test_the_model_is_that_of_the_pdb_entry():
    centres, electrons = standin.coarse(gemmi.read_structure(str(RIBOSOME / "6zu5.cif.gz")))
    stored = np.load(standin.MODEL)
    np.testing.assert_allclose(0.1 * stored["centres"], centres, atol=0.051)
    np.testing.assert_allclose(stored["electrons"], electrons, atol=0.51)


@needs_shared
def test_at_low_resolution_the_coarse_model_is_the_atomic_one():
    structure = gemmi.read_structure(str(RIBOSOME / "6zu5.cif.gz"))
    atoms = np.array([site.atom.pos.tolist() for site in structure[0].all()])
    for shift, site in zip(atoms - _middle(structure), structure[0].all()):
        site.atom.pos = gemmi.Position(*shift)
    atomic, coarse = (density.density(s, 64, 6.0, 20.0) for s in (structure, standin.ribosome()))
    assert np.corrcoef(atomic.ravel(), coarse.ravel())[0, 1] > 0.98


def _middle(structure):
    centres = []
    for residue in [residue for chain in structure[0] for residue in chain]:
        weights = [atom.element.atomic_number * atom.occ for atom in residue]
        centres.append(np.average([atom.pos.tolist() for atom in residue], axis=0, weights=weights))
    return (np.min(centres, axis=0) + np.max(centres, axis=0)) / 2


@needs_shared
def test_defocus_astigmatism_and_its_direction_are_those_of_empiar_10028():
    real = np.load(RIBOSOME / "empiar10028_ctf_per_micrograph.npz")
    ours = standin.microscope(2000 * standin.A_MICROGRAPH, 0).groupby("rlnMicrographName").first()
    u, v, angle = real["defocus_u"], real["defocus_v"], real["angle_deg"]
    angle = np.where(u < v, angle, angle + 90)  # the same ellipse, u its smaller axis
    for ours_, real_, limit in [
        ((ours["rlnDefocusU"] + ours["rlnDefocusV"]) / 2, (u + v) / 2, 0.05),
        (ours["rlnDefocusV"] - ours["rlnDefocusU"], np.abs(v - u), 0.08),
        (ours["rlnDefocusAngle"], angle, 0.08),
    ]:
        assert stats.ks_2samp(ours_, real_).statistic < limit
    assert real["n_particles"].mean() == pytest.approx(standin.A_MICROGRAPH, rel=0.01)


def test_particles_are_projections_of_the_map_with_their_ctf_at_the_stated_snr(made):
    """The noise that is left when the fitted signal is taken away has the variance that the SNR asks for."""
    stack, volume, _ = made
    shifts = stack.poses.shifts / stack.pixel_size
    signal = ctf.apply_ctf(projection.project(volume, stack.poses.rotations, shifts), stack.ctf, stack.pixel_size)
    gains = np.array([np.polyfit(s.ravel(), y.ravel(), 1)[0] for s, y in zip(signal, stack.images[:])])
    residual = stack.images[:] - gains[:, None, None] * signal
    ratio = (gains**2 * signal.var(axis=(1, 2))).mean() / residual.var(axis=(1, 2)).mean()
    assert ratio == pytest.approx(0.1, rel=0.05)


def test_the_files_say_what_they_hold(made):
    stack, volume, path = made
    assert len(stack) == 400 and stack.images.shape[1:] == (48, 48) and volume.shape == (48,) * 3
    assert stack.pixel_size == 10.0 and mrcfile.open(path).voxel_size.x == pytest.approx(10.0)
    optics = stack.ctf.iloc[0]
    assert (optics["rlnVoltage"], optics["rlnSphericalAberration"], optics["rlnAmplitudeContrast"]) == (300, 2.0, 0.1)
    assert stack.table["rlnMicrographName"].nunique() == 5 and set(stack.half_sets) == {1, 2}
    assert stack.normalisation.contrast == "bright"
    mean, sd = noise.background(stack.images[:])
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    np.testing.assert_allclose(sd, 1, rtol=1e-4)


def test_noise_is_white_at_high_frequency_and_coloured_by_the_ctf_at_low():
    parameters = standin.microscope(200, 1).assign(rlnDefocusU=20000.0, rlnDefocusV=20000.0)
    images = standin.noise(parameters, 96, 4.0, np.random.default_rng(0))
    assert images.std() == pytest.approx(1, abs=0.02)
    images -= images.mean(axis=(1, 2), keepdims=True)
    frequency, power = noise.power_spectrum(images, 4.0)
    transfer = ctf.ctf(parameters.iloc[:1], 96, 4.0)[0, :49, 0]
    shot = power[frequency > 0.1].mean()
    assert power[frequency > 0.1].std() < 0.05 * shot
    chosen = slice(8, 30)  # beyond the gradients
    expected = 1 + standin.ICE * transfer[chosen] ** 2 * np.exp(-standin.ICE_B * frequency[chosen] ** 2)
    np.testing.assert_allclose(power[chosen] / shot, expected, rtol=0.15)


def test_ice_gradients_have_the_stated_slope():
    images = standin.noise(standin.microscope(2000, 1), 32, 4.0, np.random.default_rng(0))
    across = np.linspace(-0.5, 0.5, 32)
    slopes = np.polyfit(across, images.mean(axis=1).T, 1)[0]
    white = 12 / 32**2  # variance of a slope fitted to shot noise of sd 1
    assert slopes.var() - white == pytest.approx(standin.GRADIENT**2, rel=0.5)
    assert slopes.var() > 3 * white


def test_the_seed_fixes_every_bit_and_a_longer_stack_begins_as_the_shorter(made, tmp_path):
    again = written(tmp_path, 300)
    np.testing.assert_array_equal(again.images[:256], made[0].images[:256])
    other = written(tmp_path, 300, seed=4)
    assert not np.array_equal(other.images[0], made[0].images[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"box": 47}, "box: expected a multiple of 2, got 47"),
        ({"snr": 0}, "snr: expected a finite number > 0"),
        ({"pixel_size": 4.0, "resolution": 8.0}, "the box must reach"),
    ],
)
def test_what_cannot_be_made_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        standin.make(10, **OPTIONS | {"snr": 0.1} | change)
