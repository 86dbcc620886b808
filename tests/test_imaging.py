"""The forward model: conventions against RELION's own images, physics of the density, statistics of poses and noise."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import gemmi
import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
from scipy import ndimage, stats
from scipy.spatial.transform import Rotation

from cryo_lib import imaging, mrc, particles
from cryo_lib.phantom import phantom

SHARED = Path(__file__).resolve().parents[2] / "shared"
RIBOSOME = SHARED / "data/ribosome/clean70SRibosome_vol_65p.mrc"
RELION_STAR = SHARED / "data/particles/rln_proj_65.star"
needs_ribosome = pytest.mark.skipif(not RELION_STAR.exists(), reason=f"test data missing: {RELION_STAR}")
needs_relion = pytest.mark.skipif(shutil.which("relion_project") is None, reason="relion_project is not on the PATH")


def correlations(a, b):
    return np.array([np.corrcoef(x.ravel(), y.ravel())[0, 1] for x, y in zip(a, b)])


class Blobs:
    """An asymmetric sum of Gaussians, whose projections are known in closed form."""

    def __init__(self, n, reach, seed=0, count=8):
        rng = np.random.default_rng(seed)
        direction = rng.standard_normal((count, 3))
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        self.n = n
        self.positions = direction * rng.uniform(0, reach, (count, 1))
        self.sigma = rng.uniform(1.3, 2.2, count)
        self.weight = rng.uniform(0.5, 1.5, count)

    def _profile(self, at):
        return np.exp(-((np.arange(self.n) - at[:, None]) ** 2) / (2 * self.sigma[:, None] ** 2))

    def volume(self):
        x, y, z = (self._profile(self.n // 2 + at) for at in self.positions.T)
        return np.einsum("k,kz,ky,kx->zyx", self.weight, z, y, x, optimize=True).astype(np.float32)

    def image(self, rotation, shift=(0.0, 0.0)):
        at = (self.positions @ rotation)[:, :2] + shift + (self.n + 1) // 2  # rows of positions @ R are R.T @ position
        amplitude = self.weight * self.sigma * np.sqrt(2 * np.pi)
        return np.einsum("k,ky,kx->yx", amplitude, self._profile(at[:, 1]), self._profile(at[:, 0]))


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


@pytest.fixture(scope="module")
def clean():
    blobs = Blobs(48, reach=14)
    images, _, _ = imaging.simulate([blobs.volume()], 60, seed=1)
    return images


# Density


@pytest.mark.parametrize("n", [31, 32])
def test_an_atom_has_its_form_factor_as_mass_and_sits_where_it_should(n):
    position = np.array([5.0, -7.5, 2.5])
    volume = imaging.density(carbon(position), n, pixel_size=2.0, resolution=7.0)
    assert volume.shape == (n, n, n) and volume.dtype == np.float32
    assert volume.sum() * 2.0**3 == pytest.approx(gemmi.Element("C").c4322.calculate_sf(0.0), rel=0.01)
    centre = np.array(ndimage.center_of_mass(volume))[::-1]  # x, y, z
    np.testing.assert_allclose((centre - n // 2) * 2.0, position, atol=0.02)
    assert volume.max() > 0 and volume.min() >= 0


def test_resolution_sets_the_width_and_own_b_factors_do_not_count():
    def variance(resolution, b_iso=50.0, u_aniso=0.0):
        structure = carbon((0, 0, 0), b_iso=b_iso)
        structure[0][0][0][0].aniso = gemmi.SMat33f(u_aniso, u_aniso, u_aniso, 0, 0, 0)
        volume = imaging.density(structure, 32, 1.5, resolution)
        x = (np.arange(32) - 16) * 1.5
        return (volume.sum(axis=(0, 1)) * x**2).sum() / volume.sum()

    assert variance(10.0) - variance(6.0) == pytest.approx(0.225**2 * (10.0**2 - 6.0**2), rel=0.03)
    assert variance(8.0, b_iso=300.0) == variance(8.0, u_aniso=2.0) == variance(8.0)


def test_density_is_additive_and_leaves_the_structure_alone():
    a, b = (6.0, 0.0, 0.0), (-3.0, 4.0, 9.0)
    both = carbon(a, b)
    volume = imaging.density(both, 24, 2.0, 6.0)
    parts = imaging.density(carbon(a), 24, 2.0, 6.0) + imaging.density(carbon(b), 24, 2.0, 6.0)
    np.testing.assert_allclose(volume, parts, atol=1e-6)
    assert [site.atom.pos.tolist() for site in both[0].all()] == [list(a), list(b)]
    assert both[0][0][0][0].b_iso == 50.0


def test_density_refuses_atoms_that_do_not_fit_and_says_which_box_does():
    structure = carbon((0, 0, 0), (0, 40.0, 0))
    message = r"y -3\.0 to 43\.0, .*32 voxels of 2 A reach 30\.0 A; use n >= 46 or pixel_size >= 2\.867"
    with pytest.raises(ValueError, match=message):
        imaging.density(structure, 32, 2.0, 6.0)
    imaging.density(structure, 46, 2.0, 6.0)
    imaging.density(structure, 32, 2.867, 6.0)


def test_density_refuses_bad_structures_and_numbers():
    empty, two, unknown = gemmi.Structure(), carbon((0, 0, 0)), carbon((0, 0, 0))
    empty.add_model(gemmi.Model(1))
    two.add_model(gemmi.Model(2))
    unknown[0][0][0][0].element = gemmi.Element("X")
    for structure, message in [
        (empty, "expected atoms, got none"),
        (two, "expected one model, got 2"),
        (unknown, "'CA'.*no known element"),
        (carbon((0, np.nan, 0)), "finite coordinates"),
    ]:
        with pytest.raises(ValueError, match=message):
            imaging.density(structure, 16, 2.0, 6.0)
    for arguments, message in [
        ((2, 2.0, 6.0), "n: expected an integer >= 4"),
        ((16, 0.0, 6.0), "pixel_size: .* > 0"),
        ((16, 2.0, 3.9), "resolution: .* >= 4.0, got 3.9"),
    ]:
        with pytest.raises(ValueError, match=message):
            imaging.density(carbon((0, 0, 0)), *arguments)


# Rotations


def test_random_rotations_are_uniform_on_so3():
    rotations = imaging.random_rotations(4000, seed=3)
    assert rotations.shape == (4000, 3, 3) and rotations.dtype == np.float64
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-12)
    rot, tilt, psi = imaging.euler_from_rotation(rotations).T
    samples = {
        "viewing direction": (np.cos(np.radians(tilt)) + 1) / 2,
        "rot": rot % 360 / 360,
        "psi": psi % 360 / 360,
        "in-plane axis": (rotations[:, 0, 0] + 1) / 2,
    }
    for name, values in samples.items():
        assert stats.kstest(values, "uniform").pvalue > 0.01, name
    angle = Rotation.from_matrix(rotations).magnitude()
    assert stats.kstest(angle, lambda t: (t - np.sin(t)) / np.pi).pvalue > 0.01


def test_random_rotations_follow_the_seed():
    first = imaging.random_rotations(5, seed=1)
    np.testing.assert_array_equal(first, imaging.random_rotations(5, seed=1))
    assert not np.allclose(first, imaging.random_rotations(5, seed=2))
    with pytest.raises(ValueError, match="n: expected an integer >= 1"):
        imaging.random_rotations(0, seed=1)


def test_euler_angles_go_there_and_back():
    rng = np.random.default_rng(0)
    angles = np.stack([rng.uniform(-180, 180, 50), rng.uniform(1, 179, 50), rng.uniform(-180, 180, 50)], axis=-1)
    np.testing.assert_allclose(imaging.euler_from_rotation(imaging.rotation_from_euler(*angles.T)), angles, atol=1e-9)


@pytest.mark.parametrize("tilt", [0.0, 180.0])
def test_euler_angles_at_the_poles_still_give_the_rotation(tilt):
    rotations = imaging.rotation_from_euler([30.0, 80.0], tilt, [50.0, -70.0])
    back = imaging.rotation_from_euler(*imaging.euler_from_rotation(rotations).T)
    np.testing.assert_allclose(back, rotations, atol=1e-7)


def test_rotation_from_euler_takes_scalars_and_refuses_the_rest():
    np.testing.assert_allclose(imaging.rotation_from_euler(0, 0, 0), np.eye(3)[None])
    # RELION: tilt turns about y; seen at tilt 90, the volume's z axis lies along the image's -x
    np.testing.assert_allclose(imaging.rotation_from_euler(0, 90, 0)[0].T @ [0, 0, 1], [-1, 0, 0], atol=1e-12)
    for arguments, message in [
        (([1, 2], [1, 2, 3], 0), r"one length n >= 1, got shapes \[\(2,\), \(3,\), \(\)\]"),
        (([], [], []), "n >= 1"),
        (([[1]], 0, 0), "scalars or"),
        (([np.nan], 0, 0), "finite angles"),
    ]:
        with pytest.raises(ValueError, match=message):
            imaging.rotation_from_euler(*arguments)


# Projection


@needs_ribosome
def test_projections_agree_with_relions_own_images():
    volume, particles = mrcfile.read(RIBOSOME), starfile.read(RELION_STAR)
    relion = mrcfile.read(RELION_STAR.with_suffix(".mrcs"))
    rotations = imaging.rotation_from_euler(particles.rlnAngleRot, particles.rlnAngleTilt, particles.rlnAnglePsi)
    ours = correlations(imaging.project(volume, rotations), relion)
    wrong = correlations(imaging.project(volume, rotations.transpose(0, 2, 1)), relion)
    assert ours.min() > 0.99, ours
    assert wrong.max() < 0.6, wrong


@needs_relion
@pytest.mark.parametrize("n", [48, 49])
def test_random_poses_and_shifts_agree_with_relion_project(tmp_path, n):
    count = 20
    volume = Blobs(n, reach=14).volume()
    with mrcfile.new(tmp_path / "volume.mrc") as file:
        file.set_data(volume)
        file.voxel_size = 2.0
    rotations = imaging.random_rotations(count, seed=5)
    shifts = np.random.default_rng(6).uniform(-4, 4, (count, 2))
    poses = pd.DataFrame(
        np.hstack([imaging.euler_from_rotation(rotations), -shifts * 2.0]),
        columns=["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"],
    )
    poses["rlnOpticsGroup"] = 1
    optics = {"rlnOpticsGroupName": "o", "rlnOpticsGroup": 1, "rlnImagePixelSize": 2.0, "rlnImageSize": n}
    optics |= {"rlnImageDimensionality": 2, "rlnVoltage": 300.0, "rlnSphericalAberration": 2.0}
    starfile.write({"optics": pd.DataFrame([optics]), "particles": poses}, tmp_path / "poses.star")
    command = ["relion_project", "--i", "volume.mrc", "--o", "images", "--ang", "poses.star", "--angpix", "2"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    relion = mrcfile.read(tmp_path / "images.mrcs")
    assert correlations(imaging.project(volume, rotations, shifts), relion).min() > 0.99


@pytest.mark.parametrize("n", [20, 21])
def test_a_lattice_rotation_is_the_plain_sum_along_an_axis(n):
    volume = np.random.default_rng(0).standard_normal((n, n, n)).astype(np.float32)
    images = imaging.project(volume, imaging.rotation_from_euler(0, [0, 90], 0))
    along_z, along_x = volume.sum(axis=0), volume.sum(axis=2)
    odd = n % 2  # RELION centres odd images one pixel further on than volumes: the last row and column are cut off
    np.testing.assert_allclose(images[0, odd:, odd:], along_z[: n - odd, : n - odd], atol=1e-3)
    # at tilt 90 image x is volume -z, which takes voxel k to pixel n - k
    np.testing.assert_allclose(images[1, odd:, 1:], along_x.T[: n - odd, :0:-1], atol=1e-3)


@pytest.mark.parametrize("n", [40, 41])
def test_projections_equal_the_closed_form_wherever_the_blobs_are(n):
    blobs = Blobs(n, reach=0.45 * n)  # close to the faces: turned and shifted, some leave the window
    volume = blobs.volume()
    rotations = imaging.random_rotations(12, seed=2)
    shifts = np.random.default_rng(3).uniform(-9, 9, (12, 2))
    expected = np.stack([blobs.image(rotation, shift) for rotation, shift in zip(rotations, shifts)])
    images = imaging.project(volume, rotations, shifts)
    assert images.shape == (12, n, n) and images.dtype == np.float32
    assert np.abs(images - expected).max() < 0.02 * expected.max()
    assert (correlations(images, expected) > 0.9999).all()
    wrong = imaging.project(volume, rotations.transpose(0, 2, 1), shifts)
    assert np.median(correlations(wrong, expected)) < 0.8


def test_density_outside_the_window_is_cut_off_not_wrapped():
    n = 32
    blob = Blobs(n, reach=0, count=1)
    blob.positions[:] = 12, 12, 0  # a turn in the plane by 45 degrees moves it across the right edge, to x = 17
    seen, leaving = imaging.project(blob.volume(), imaging.rotation_from_euler(0, 0, [0, 45]))
    assert np.unravel_index(seen.argmax(), seen.shape) == (28, 28)
    assert leaving[:, -1].max() > 0.1 * seen.max()
    assert np.abs(leaving[:, : n // 2]).max() < 0.01 * seen.max()
    gone = imaging.project(blob.volume(), np.eye(3)[None], shifts=[[25, 0]])
    assert np.abs(gone).max() < 0.01 * seen.max()


def test_frequencies_beyond_those_of_the_voxels_are_zero():
    point = np.zeros((21, 21, 21), np.float32)
    point[10, 10, 10] = 1
    spectrum = np.abs(np.fft.fft2(imaging.project(point, imaging.rotation_from_euler(0, 0, 45))[0]))
    assert spectrum[0, 10] == pytest.approx(1, abs=1e-3)  # on the image's axis: within the turned cube
    assert spectrum[10, 10] == pytest.approx(0, abs=1e-3)  # on its diagonal: outside


def test_projection_is_the_same_for_any_batch_and_threads():
    volume, rotations = Blobs(24, reach=7).volume(), imaging.random_rotations(10, seed=0)
    whole = imaging.project(volume, rotations, batch=10, threads=1)
    np.testing.assert_array_equal(whole, imaging.project(volume, rotations, batch=3, threads=2))
    np.testing.assert_array_equal(whole[4:5], imaging.project(volume, rotations[4:5]))


def test_project_refuses_bad_input():
    volume, rotations = np.ones((8, 8, 8), np.float32), np.eye(3)[None]
    mirror = np.stack([np.eye(3), np.diag([1.0, 1.0, -1.0])])
    broken = volume.copy()
    broken[3, 2, 1] = np.nan
    for arguments, message in [
        ((volume[:7], rotations), r"a cube \(n, n, n\), got \(7, 8, 8\)"),
        ((broken, rotations), "volume: expected finite"),
        ((volume, np.eye(3)), "rotations: expected images of shape"),
        ((volume, np.zeros((2, 3))[None]), r"rotations: expected shape \(n, 3, 3\)"),
        ((volume, mirror), r"got 1 that are not, the first is rotation 1"),
        ((volume, 2 * rotations), "orthonormal"),
        ((volume, rotations, np.zeros((2, 2))), r"shifts: .* of shape \(1, 2\), got shape \(2, 2\)"),
        ((volume, rotations, [[np.nan, 0]]), "shifts: expected finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            imaging.project(*arguments)
    with pytest.raises(ValueError, match="batch: expected an integer >= 1"):
        imaging.project(volume, rotations, batch=0)
    with pytest.raises(ValueError, match="threads: expected an integer >= 1"):
        imaging.project(volume, rotations, threads=0)


# Images and noise


def test_rescale_is_linear_onto_0_1():
    images = np.random.default_rng(0).normal(5, 3, (4, 9, 9))
    scaled = imaging.rescale(images)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled.min(axis=(1, 2)), 0)
    np.testing.assert_array_equal(scaled.max(axis=(1, 2)), 1)
    np.testing.assert_allclose(correlations(scaled, images), 1)
    images[2] = 7.0
    with pytest.raises(ValueError, match=r"got 1 constant of 4, the first is image 2 \(value 7\)"):
        imaging.rescale(images)


@pytest.mark.parametrize("snr", [0.05, 0.1, 2.0])
def test_the_snr_is_met_image_by_image(clean, snr):
    noise = imaging.add_noise(clean, snr, seed=0) - clean
    realised = clean.var(axis=(1, 2)) / noise.var(axis=(1, 2))
    assert np.mean(realised) == pytest.approx(snr, rel=0.02)
    np.testing.assert_allclose(realised, snr, rtol=5 * np.sqrt(2 / clean[0].size))  # 5 sd of a sample variance
    np.testing.assert_allclose(noise.std(axis=(1, 2)), imaging.noise_sigma(clean, snr), rtol=0.08)


def test_the_noise_is_gaussian_white_and_independent(clean):
    noise = imaging.add_noise(clean, 0.1, seed=0) - clean
    noise /= imaging.noise_sigma(clean, 0.1)[:, None, None]
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    power = (np.abs(np.fft.fft2(noise)) ** 2).mean(axis=0)[:, 1:24] / noise[0].size
    assert stats.kstest(power.ravel() * 2 * len(noise), stats.chi2(2 * len(noise)).cdf).pvalue > 0.01
    lag = np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]
    assert abs(lag) < 4 / np.sqrt(noise[1:].size)


def test_clipped_is_awgn_clipped(clean):
    awgn, clipped = (imaging.add_noise(clean, 0.1, seed=4, protocol=protocol) for protocol in imaging.PROTOCOLS)
    assert awgn.min() < 0 and awgn.max() > 1
    assert clipped.min() == 0 and clipped.max() == 1
    np.testing.assert_array_equal(clipped, np.clip(awgn, 0, 1))


def test_noise_follows_the_seed_and_the_order_only(clean):
    untouched = clean.copy()
    y = imaging.add_noise(clean, 0.1, seed=7)
    assert y.dtype == np.float32 and y.shape == clean.shape
    np.testing.assert_array_equal(clean, untouched)
    np.testing.assert_array_equal(y, imaging.add_noise(clean, 0.1, seed=7))
    np.testing.assert_array_equal(y[:13], imaging.add_noise(clean[:13], 0.1, seed=7))
    assert not np.allclose(y, imaging.add_noise(clean, 0.1, seed=8))


def test_noise_refuses_bad_input(clean):
    constant, broken = clean.copy(), clean.copy()
    constant[5], broken[3, 0, 0] = 0.1, np.nan
    for arguments, message in [
        ((clean, 0.0, 1), "snr: expected a finite number > 0.*got 0.0"),
        ((clean, -1.0, 1), "snr"),
        ((clean, np.inf, 1), "snr: expected a finite"),
        ((clean, np.nan, 1), "snr: expected a finite"),
        ((constant, 0.1, 1), "x: expected images that vary, got 1 constant of 60, the first is image 5"),
        ((broken, 0.1, 1), "x: expected finite pixels.*the first is image 3"),
        ((clean, 0.1, 1, "poisson"), "protocol: expected one of awgn, clipped, got 'poisson'"),
    ]:
        with pytest.raises(ValueError, match=message):
            imaging.add_noise(*arguments)
    with pytest.raises(TypeError, match="snr: expected a number, got '0.1'"):
        imaging.noise_sigma(clean, "0.1")


# Simulation


def test_simulate_projects_every_conformation_in_equal_shares():
    volumes = [Blobs(20, reach=5, seed=seed).volume() for seed in range(3)]
    images, rotations, conformations = imaging.simulate(volumes, 16, seed=9)
    assert images.shape == (16, 20, 20) and images.dtype == np.float32
    assert sorted(np.bincount(conformations)) == [5, 5, 6]
    assert (np.diff(conformations) < 0).any() and (np.diff(conformations) > 0).any()
    for i in (0, 7, 15):
        expected = imaging.rescale(imaging.project(volumes[conformations[i]], rotations[i : i + 1]))
        np.testing.assert_array_equal(images[i : i + 1], expected)


def test_simulate_follows_the_seed():
    volumes = [Blobs(20, reach=5, seed=seed).volume() for seed in range(2)]
    one, again, other = (imaging.simulate(volumes, 6, seed=seed) for seed in (1, 1, 2))
    for a, b in zip(one, again):
        np.testing.assert_array_equal(a, b)
    assert not np.allclose(one[1], other[1])


def test_simulate_refuses_bad_input():
    volume = Blobs(20, reach=5).volume()
    for arguments, message in [
        (([], 4, 0), "volumes: expected one or more"),
        (([volume, volume[:18, :18, :18]], 4, 0), r"of one shape, got \[\(20, 20, 20\), \(18, 18, 18\)\]"),
        (([volume], 0, 0), "n_images"),
        (([volume], 4, -1), "seed"),
        (([np.zeros_like(volume)], 4, 0), "images: expected images that vary"),
    ]:
        with pytest.raises(ValueError, match=message):
            imaging.simulate(*arguments)


def test_views_show_the_volumes_they_are_said_to_show():
    volumes = [np.zeros((16, 16, 16), np.float32) for _ in range(2)]
    volumes[0][8, 8, 11], volumes[1][8, 11, 8] = 1, 1
    rotations, shown = imaging.random_views(9, 2, 3)
    assert sorted(np.bincount(shown)) == [4, 5]
    images = imaging.views(volumes, rotations, shown)
    for image, rotation, index in zip(images, rotations, shown):
        np.testing.assert_array_equal(image, imaging.rescale(imaging.project(volumes[index], rotation[None]))[0])
    parts = np.concatenate([imaging.views(volumes, rotations[p], shown[p]) for p in (slice(0, 4), slice(4, 9))])
    np.testing.assert_array_equal(parts, images)
    shifts = np.random.default_rng(0).normal(0, 1, (9, 2))
    for i, image in enumerate(imaging.views(volumes, rotations, shown, shifts)):
        moved = imaging.project(volumes[shown[i]], rotations[i : i + 1], shifts[i : i + 1])
        np.testing.assert_array_equal(image, imaging.rescale(moved)[0])
    with pytest.raises(ValueError, match="shown: expected 9 indices below 2, got"):
        imaging.views(volumes, rotations, shown + 1)


def test_jittered_views_turn_by_the_angle_asked_for():
    (view,) = imaging.random_rotations(1, 0)
    turned = imaging.jittered(view, 4000, 2.0, 1)
    vectors = np.rad2deg(Rotation.from_matrix(view.T @ turned).as_rotvec())
    np.testing.assert_allclose(vectors.std(axis=0), 2.0, rtol=0.05)
    np.testing.assert_allclose(imaging.jittered(view, 3, 0.0, 1), [view] * 3, atol=1e-12)
    with pytest.raises(ValueError, match="rotation: expected one, or one for each of 3, got 2"):
        imaging.jittered(imaging.random_rotations(2, 0), 3, 1.0, 0)
    each = imaging.random_rotations(5, 2)
    np.testing.assert_allclose(imaging.jittered(each, 5, 0.0, 1), each, atol=1e-12)
    one = [imaging.jittered(rotation, 5, 2.0, 1)[i] for i, rotation in enumerate(each)]
    np.testing.assert_allclose(imaging.jittered(each, 5, 2.0, 1), one, atol=1e-12)


@pytest.mark.parametrize("mirrored", [False, True])
def test_poses_of_another_frame_and_hand_are_brought_into_that_of_the_truth(mirrored):
    """A turned (and mirrored) volume explains the same images; a third of the poses may be plain wrong."""
    truth, (frame,) = imaging.random_rotations(300, 0), imaging.random_rotations(1, 1)
    error = Rotation.from_rotvec(np.deg2rad(1.0) * np.random.default_rng(0).standard_normal((300, 3))).as_matrix()
    found = frame @ truth @ (np.diag([-1.0, -1.0, 1.0]) if mirrored else np.eye(3)) @ error
    found[:100] = imaging.random_rotations(100, 2)
    turned, errors, was_mirrored = imaging.in_frame(found, truth)
    assert was_mirrored == mirrored and np.median(errors[100:]) < 2.0 and np.median(errors[:100]) > 45
    again = np.rad2deg(Rotation.from_matrix(truth[100:].transpose(0, 2, 1) @ turned[100:]).magnitude())
    np.testing.assert_allclose(again, errors[100:], atol=1e-6)


def test_a_mirrored_volume_gives_the_same_images_at_poses_turned_by_half_a_turn():
    """What `in_frame` rests on: the projections of v(-r) at R Rz(180) are those of v at R."""
    volume = np.random.default_rng(0).random((17, 17, 17)).astype(np.float32)
    rotations = imaging.random_rotations(5, 0)
    mirrored = imaging.project(volume[::-1, ::-1, ::-1], rotations @ np.diag([-1.0, -1.0, 1.0]))
    np.testing.assert_allclose(mirrored, imaging.project(volume, rotations), atol=2e-3)


def microscope(m: int, seed: int = 0) -> pd.DataFrame:
    """CTF parameters of `m` images like EMPIAR-10028's, some with phase shift, B factor and scale, under RELION's labels."""
    rng = np.random.default_rng(seed)
    u = rng.uniform(8000, 39000, m)
    extra = np.arange(m) % 2
    return pd.DataFrame(
        {
            "rlnDefocusU": u, "rlnDefocusV": u - rng.uniform(0, 2000, m), "rlnDefocusAngle": rng.uniform(-90, 90, m),
            "rlnPhaseShift": 60.0 * extra, "rlnVoltage": 300.0, "rlnSphericalAberration": 2.0, "rlnAmplitudeContrast": 0.1,
            "rlnCtfBfactor": 40.0 * extra, "rlnCtfScalefactor": 1.0 - 0.2 * extra,
        }
    )  # fmt: skip


def test_ctf_zeros_lie_where_the_formula_puts_them():
    """Without astigmatism and aberration and at amplitude contrast 0: sin(pi lambda z k^2), lambda 0.0197 A at 300 kV."""
    plain = microscope(1).assign(rlnDefocusU=15000.0, rlnDefocusV=15000.0, rlnSphericalAberration=0.0, rlnAmplitudeContrast=0.0)
    (curve,) = imaging.ctf(plain, 256, 1.0)
    k = np.arange(129) / 256
    np.testing.assert_allclose(curve[0], np.sin(np.pi * 0.0196875 * 15000 * k**2), atol=2e-3)
    assert (imaging.ctf(microscope(8), 64, 2.0)[:, 0, 0] > 0).all()  # bright protein stays bright


def test_astigmatism_is_along_its_angle():
    """Along the angle of rlnDefocusU the defocus is U, across it V."""
    tilted = microscope(1).assign(rlnDefocusU=20000.0, rlnDefocusV=10000.0, rlnDefocusAngle=90.0)
    (curve,) = imaging.ctf(tilted, 128, 2.0)
    for along, defocus in ((curve[:65, 0], 20000.0), (curve[0, :], 10000.0)):  # the y axis, the x axis
        (round_,) = imaging.ctf(tilted.assign(rlnDefocusU=defocus, rlnDefocusV=defocus), 128, 2.0)
        np.testing.assert_allclose(np.abs(along), np.abs(round_[0, :]), atol=1e-4)


@needs_relion
def test_ctf_agrees_with_relions_to_numerical_precision(tmp_path):
    """relion_project --ctf of a point (transform 1 everywhere) is the point spread function itself."""
    n, m, pixel_size = 64, 6, 1.34
    volume = np.zeros((n, n, n), np.float32)
    volume[n // 2, n // 2, n // 2] = 1
    table = microscope(m)
    path = particles.new(
        tmp_path / "p.star", np.random.default_rng(0).random((m, n, n)).astype(np.float32), imaging.random_rotations(m, 0),
        pixel_size, spherical_aberration=2.0, amplitude_contrast=0.1,
        columns={label: table[label] for label in table if label not in particles.MICROSCOPE},
    )  # fmt: skip
    mrc.write_map(tmp_path / "point.mrc", volume, pixel_size)
    images = []
    for flags in ([], ["--ctf"]):
        command = ["relion_project", "--i", "point.mrc", "--ang", path.name, "--o", f"out{len(flags)}", "--angpix", str(pixel_size)]
        subprocess.run([*command, *flags], cwd=tmp_path, check=True, capture_output=True)
        images.append(mrcfile.read(tmp_path / f"out{len(flags)}.mrcs"))
    without, theirs = images
    assert np.abs(theirs - without).max() > 0.5 * np.abs(without).max()
    ours = imaging.apply_ctf(without, particles.ParticleStack.open(path).ctf, pixel_size)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rlnVoltage": 0.0}, "expected rlnVoltage > 0"),
        ({"rlnAmplitudeContrast": 1.5}, r"rlnAmplitudeContrast in \[0, 1\]"),
        ({"rlnDefocusV": np.nan}, "expected finite parameters, got rlnDefocusV nan in row 1"),
    ],
)
def test_bad_ctf_parameters_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        imaging.ctf(microscope(3).assign(**change), 32, 2.0)
    with pytest.raises(ValueError, match="got no rlnDefocusU; add them"):
        imaging.ctf(microscope(3).drop(columns="rlnDefocusU"), 32, 2.0)
    with pytest.raises(ValueError, match=r"images: expected \(3, n, n\)"):
        imaging.apply_ctf(np.ones((2, 32, 32)), microscope(3), 2.0)


def waves(n: int, seed: int = 0) -> np.ndarray:
    """Images of a few plane waves below half of Nyquist, as values of a function of the position in pixels."""
    rng = np.random.default_rng(seed)
    return rng.integers(-(n // 8), n // 8 + 1, (6, 2)), rng.normal(size=6), rng.uniform(0, 6, 6)


def evaluate(parts, n: int, x: np.ndarray) -> np.ndarray:
    k, amplitude, phase = parts
    angle = 2 * np.pi / n * (k[:, 1, None, None] * x[:, None] + k[:, 0, None, None] * x) + phase[:, None, None]
    return np.einsum("k,kyx->yx", amplitude, np.cos(angle))


@pytest.mark.parametrize("n, to", [(64, 1.0), (32, 2.0), (90, 64 / 90), (40, 1.5), (50, 1.1)])
def test_resampling_evaluates_the_band_limited_function_about_the_same_centre(n, to):
    parts, side = waves(64), 64
    image = evaluate(parts, side, np.arange(side) - side // 2)
    places = (np.arange(n) - n // 2) * to
    inside = (places >= -32.5) & (places <= 31.5)
    ours = imaging.resample(image[None], 1.0, n, to)[0]
    expected = evaluate(parts, side, places)
    np.testing.assert_allclose(ours[np.ix_(inside, inside)], expected[np.ix_(inside, inside)], atol=2e-4)
    assert not ours[~inside].any() and not ours[:, ~inside].any()


def test_resampling_crops_pads_and_keeps_what_lies_on_the_same_grid():
    images = np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)
    np.testing.assert_array_equal(imaging.resample(images, 1.34, 32, 1.34), images)
    np.testing.assert_allclose(imaging.resample(images, 1.34, 20, 1.34), images[:, 6:26, 6:26], atol=1e-6)
    padded = imaging.resample(images, 1.34, 40, 1.34)
    np.testing.assert_allclose(padded[:, 4:36, 4:36], images, atol=1e-6)
    assert not padded[:, :4].any() and not padded[:, :, 36:].any()


def test_resampling_removes_what_the_coarser_grid_cannot_hold():
    x = np.arange(64)
    image = np.cos(2 * np.pi * 20 / 64 * x) + np.zeros((64, 1))
    assert np.abs(imaging.resample(image[None], 1.0, 32, 2.0)).max() < 1e-5


def test_a_resampled_volume_projects_to_resampled_projections():
    structure = phantom(2, 20.0, 0)[0]
    fine = imaging.density(structure, 64, 3.2, 16.0)
    rotations = imaging.random_rotations(4, 0)
    coarse = imaging.resample_volume(fine, 3.2, 32, 6.4)
    ours = imaging.project(coarse, rotations) * 2  # line integrals in voxels
    np.testing.assert_allclose(ours, imaging.resample(imaging.project(fine, rotations), 3.2, 32, 6.4), atol=0.01 * ours.max())


@pytest.mark.parametrize("contrast, sign", [("bright", 1), ("dark", -1)])
@pytest.mark.parametrize("n, to", [(48, 1.0), (32, 1.0), (24, 2.0), (64, 1.0)])
def test_standardised_backgrounds_have_mean_0_and_sd_1(contrast, sign, n, to):
    """Also where a larger box surrounds the image with 0; a bright disc comes out bright, a dark one inverted."""
    rng = np.random.default_rng(0)
    y, x = np.ogrid[-1:1:48j, -1:1:48j]
    images = 7 + sign * 3 * (np.hypot(x, y) < 0.3) + 2 * rng.normal(size=(50, 48, 48))
    ours = imaging.standardise(images, 1.0, n, to, contrast)
    mean, sd = imaging.background(ours, min(1.0, 48 / (n * to)))
    np.testing.assert_allclose(mean, 0, atol=1e-5)
    np.testing.assert_allclose(sd, 1, rtol=1e-5)
    assert ours[:, n // 2, n // 2].mean() > 1


def test_a_background_that_does_not_vary_is_named():
    images = np.random.default_rng(0).normal(size=(3, 16, 16))
    y, x = np.ogrid[-1:1:16j, -1:1:16j]
    images[1][np.hypot(y, x) > 1] = 0
    with pytest.raises(ValueError, match="expected backgrounds that vary, got 1 constant of 3, the first of image 1"):
        imaging.standardise(images, 1.0, 16, 1.0)


def test_the_power_spectrum_of_white_noise_is_flat_at_its_variance():
    images = 3 * np.random.default_rng(0).normal(size=(200, 32, 32))
    frequency, power = imaging.power_spectrum(images, 2.0)
    np.testing.assert_allclose(power[2:], 9, rtol=0.1)
    assert frequency[-1] == pytest.approx(0.25) and len(frequency) == 17
    with pytest.raises(ValueError, match="images: expected square ones, got 16 x 20; crop or pad them"):
        imaging.power_spectrum(np.ones((1, 16, 20)), 1.0)


def test_odd_boxes_keep_their_centre():
    """RELION centres an image of 65 px on pixel 33: a point there stays in the middle of whatever box."""
    image = np.zeros((1, 65, 65))
    image[0, 33, 33] = 1.0
    for n, to in ((64, 1.0), (33, 2.0), (32, 2.0), (90, 0.7)):
        y, x = np.unravel_index(imaging.resample(image, 1.0, n, to)[0].argmax(), (n, n))
        assert (y, x) == ((n + 1) // 2,) * 2



def test_the_first_transform_of_a_projection_is_alone(monkeypatch):
    """Two at once can crash a process whose finufft has not been called before."""
    transform, spans = imaging.finufft.nufft3d2, []

    def watched(*arguments, **options):
        started = time.monotonic()
        time.sleep(0.05)
        found = transform(*arguments, **options)
        spans.append((started, time.monotonic()))
        return found

    monkeypatch.setattr(imaging.finufft, "nufft3d2", watched)
    volume = np.random.default_rng(0).random((8, 8, 8), np.float32)
    imaging.project(volume, imaging.random_rotations(12, 0), batch=2, threads=4)
    (_, first_ended), *others = sorted(spans)
    assert len(others) == 5 and all(started >= first_ended for started, _ in others)
    assert others[1][0] < others[0][1], "the others run side by side"
