"""Conventions against RELION's own images, statistics of poses, closed forms of projections and other grids."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
from scipy import stats
from scipy.spatial.transform import Rotation

from cryo_lib.simulate import density, projection
from cryo_lib.simulate.phantom import phantom
from tests.simulate.blobs import Blobs, correlations

SHARED = Path(__file__).resolve().parents[3] / "shared"
RIBOSOME = SHARED / "data/ribosome/clean70SRibosome_vol_65p.mrc"
RELION_STAR = SHARED / "data/particles/rln_proj_65.star"
needs_ribosome = pytest.mark.skipif(not RELION_STAR.exists(), reason=f"test data missing: {RELION_STAR}")
needs_relion = pytest.mark.skipif(shutil.which("relion_project") is None, reason="relion_project is not on the PATH")


def test_random_rotations_are_uniform_on_so3():
    rotations = projection.random_rotations(4000, seed=3)
    assert rotations.shape == (4000, 3, 3) and rotations.dtype == np.float64
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-12)
    rot, tilt, psi = projection.euler_from_rotation(rotations).T
    samples = {"direction": (np.cos(np.radians(tilt)) + 1) / 2, "in-plane axis": (rotations[:, 0, 0] + 1) / 2}
    for name, values in (samples | {"rot": rot % 360 / 360, "psi": psi % 360 / 360}).items():
        assert stats.kstest(values, "uniform").pvalue > 0.01, name
    angle = Rotation.from_matrix(rotations).magnitude()
    assert stats.kstest(angle, lambda t: (t - np.sin(t)) / np.pi).pvalue > 0.01


def test_random_rotations_follow_the_seed():
    first = projection.random_rotations(5, seed=1)
    np.testing.assert_array_equal(first, projection.random_rotations(5, seed=1))
    assert not np.allclose(first, projection.random_rotations(5, seed=2))
    with pytest.raises(ValueError, match="n: expected an integer >= 1"):
        projection.random_rotations(0, seed=1)


def test_euler_angles_go_there_and_back():
    rng = np.random.default_rng(0)
    angles = np.stack([rng.uniform(-180, 180, 50), rng.uniform(1, 179, 50), rng.uniform(-180, 180, 50)], axis=-1)
    back = projection.euler_from_rotation(projection.rotation_from_euler(*angles.T))
    np.testing.assert_allclose(back, angles, atol=1e-9)


@pytest.mark.parametrize("tilt", [0.0, 180.0])
def test_euler_angles_at_the_poles_still_give_the_rotation(tilt):
    rotations = projection.rotation_from_euler([30.0, 80.0], tilt, [50.0, -70.0])
    back = projection.rotation_from_euler(*projection.euler_from_rotation(rotations).T)
    np.testing.assert_allclose(back, rotations, atol=1e-7)


def test_rotation_from_euler_takes_scalars_and_refuses_the_rest():
    np.testing.assert_allclose(projection.rotation_from_euler(0, 0, 0), np.eye(3)[None])
    # RELION: tilt turns about y; seen at tilt 90, the volume's z axis lies along the image's -x
    np.testing.assert_allclose(projection.rotation_from_euler(0, 90, 0)[0].T @ [0, 0, 1], [-1, 0, 0], atol=1e-12)
    for arguments, message in [
        (([1, 2], [1, 2, 3], 0), r"one length n >= 1, got shapes \[\(2,\), \(3,\), \(\)\]"),
        (([], [], []), "n >= 1"),
        (([[1]], 0, 0), "scalars or"),
        (([np.nan], 0, 0), "finite angles"),
    ]:
        with pytest.raises(ValueError, match=message):
            projection.rotation_from_euler(*arguments)


@needs_ribosome
def test_projections_agree_with_relions_own_images():
    volume, particles = mrcfile.read(RIBOSOME), starfile.read(RELION_STAR)
    relion = mrcfile.read(RELION_STAR.with_suffix(".mrcs"))
    rotations = projection.rotation_from_euler(particles.rlnAngleRot, particles.rlnAngleTilt, particles.rlnAnglePsi)
    ours = correlations(projection.project(volume, rotations), relion)
    wrong = correlations(projection.project(volume, rotations.transpose(0, 2, 1)), relion)
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
    rotations = projection.random_rotations(count, seed=5)
    shifts = np.random.default_rng(6).uniform(-4, 4, (count, 2))
    columns = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"]
    poses = pd.DataFrame(np.hstack([projection.euler_from_rotation(rotations), -shifts * 2.0]), columns=columns)
    poses["rlnOpticsGroup"] = 1
    optics = {"rlnOpticsGroupName": "o", "rlnOpticsGroup": 1, "rlnImagePixelSize": 2.0, "rlnImageSize": n}
    optics |= {"rlnImageDimensionality": 2, "rlnVoltage": 300.0, "rlnSphericalAberration": 2.0}
    starfile.write({"optics": pd.DataFrame([optics]), "particles": poses}, tmp_path / "poses.star")
    command = ["relion_project", "--i", "volume.mrc", "--o", "images", "--ang", "poses.star", "--angpix", "2"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    relion = mrcfile.read(tmp_path / "images.mrcs")
    assert correlations(projection.project(volume, rotations, shifts), relion).min() > 0.99


@pytest.mark.parametrize("n", [20, 21])
def test_a_lattice_rotation_is_the_plain_sum_along_an_axis(n):
    volume = np.random.default_rng(0).standard_normal((n, n, n)).astype(np.float32)
    images = projection.project(volume, projection.rotation_from_euler(0, [0, 90], 0))
    along_z, along_x = volume.sum(axis=0), volume.sum(axis=2)
    odd = n % 2  # RELION centres odd images one pixel further on than volumes: the last row and column are cut off
    np.testing.assert_allclose(images[0, odd:, odd:], along_z[: n - odd, : n - odd], atol=1e-3)
    # at tilt 90 image x is volume -z, which takes voxel k to pixel n - k
    np.testing.assert_allclose(images[1, odd:, 1:], along_x.T[: n - odd, :0:-1], atol=1e-3)


@pytest.mark.parametrize("n", [40, 41])
def test_projections_equal_the_closed_form_wherever_the_blobs_are(n):
    blobs = Blobs(n, reach=0.45 * n)  # close to the faces: turned and shifted, some leave the window
    volume = blobs.volume()
    rotations = projection.random_rotations(12, seed=2)
    shifts = np.random.default_rng(3).uniform(-9, 9, (12, 2))
    expected = np.stack([blobs.image(rotation, shift) for rotation, shift in zip(rotations, shifts)])
    images = projection.project(volume, rotations, shifts)
    assert images.shape == (12, n, n) and images.dtype == np.float32
    assert np.abs(images - expected).max() < 0.02 * expected.max()
    assert (correlations(images, expected) > 0.9999).all()
    wrong = projection.project(volume, rotations.transpose(0, 2, 1), shifts)
    assert np.median(correlations(wrong, expected)) < 0.8


def test_density_outside_the_window_is_cut_off_not_wrapped():
    n = 32
    blob = Blobs(n, reach=0, count=1)
    blob.positions[:] = 12, 12, 0  # a turn in the plane by 45 degrees moves it across the right edge, to x = 17
    seen, leaving = projection.project(blob.volume(), projection.rotation_from_euler(0, 0, [0, 45]))
    assert np.unravel_index(seen.argmax(), seen.shape) == (28, 28)
    assert leaving[:, -1].max() > 0.1 * seen.max()
    assert np.abs(leaving[:, : n // 2]).max() < 0.01 * seen.max()
    gone = projection.project(blob.volume(), np.eye(3)[None], shifts=[[25, 0]])
    assert np.abs(gone).max() < 0.01 * seen.max()


def test_frequencies_beyond_those_of_the_voxels_are_zero():
    point = np.zeros((21, 21, 21), np.float32)
    point[10, 10, 10] = 1
    spectrum = np.abs(np.fft.fft2(projection.project(point, projection.rotation_from_euler(0, 0, 45))[0]))
    assert spectrum[0, 10] == pytest.approx(1, abs=1e-3)  # on the image's axis: within the turned cube
    assert spectrum[10, 10] == pytest.approx(0, abs=1e-3)  # on its diagonal: outside


def test_projection_is_the_same_for_any_batch_and_threads():
    volume, rotations = Blobs(24, reach=7).volume(), projection.random_rotations(10, seed=0)
    whole = projection.project(volume, rotations, batch=10, threads=1)
    np.testing.assert_array_equal(whole, projection.project(volume, rotations, batch=3, threads=2))
    np.testing.assert_array_equal(whole[4:5], projection.project(volume, rotations[4:5]))


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
            projection.project(*arguments)
    for name in ("batch", "threads"):
        with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1"):
            projection.project(volume, rotations, **{name: 0})


def test_rescale_is_linear_onto_0_1():
    images = np.random.default_rng(0).normal(5, 3, (4, 9, 9))
    scaled = projection.rescale(images)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled.min(axis=(1, 2)), 0)
    np.testing.assert_array_equal(scaled.max(axis=(1, 2)), 1)
    np.testing.assert_allclose(correlations(scaled, images), 1)
    images[2] = 7.0
    with pytest.raises(ValueError, match=r"got 1 constant of 4, the first is image 2 \(value 7\)"):
        projection.rescale(images)


def test_simulate_projects_every_conformation_in_equal_shares():
    volumes = [Blobs(20, reach=5, seed=seed).volume() for seed in range(3)]
    images, rotations, conformations = projection.simulate(volumes, 16, seed=9)
    assert images.shape == (16, 20, 20) and images.dtype == np.float32
    assert sorted(np.bincount(conformations)) == [5, 5, 6]
    assert (np.diff(conformations) < 0).any() and (np.diff(conformations) > 0).any()
    for i in (0, 7, 15):
        expected = projection.rescale(projection.project(volumes[conformations[i]], rotations[i : i + 1]))
        np.testing.assert_array_equal(images[i : i + 1], expected)


def test_simulate_follows_the_seed():
    volumes = [Blobs(20, reach=5, seed=seed).volume() for seed in range(2)]
    one, again, other = (projection.simulate(volumes, 6, seed=seed) for seed in (1, 1, 2))
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
            projection.simulate(*arguments)


def test_views_show_the_volumes_they_are_said_to_show():
    volumes = [np.zeros((16, 16, 16), np.float32) for _ in range(2)]
    volumes[0][8, 8, 11], volumes[1][8, 11, 8] = 1, 1
    rotations, shown = projection.random_views(9, 2, 3)
    assert sorted(np.bincount(shown)) == [4, 5]
    images = projection.views(volumes, rotations, shown)
    for image, rotation, index in zip(images, rotations, shown):
        np.testing.assert_array_equal(image, projection.rescale(projection.project(volumes[index], rotation[None]))[0])
    parts = np.concatenate([projection.views(volumes, rotations[p], shown[p]) for p in (slice(0, 4), slice(4, 9))])
    np.testing.assert_array_equal(parts, images)
    shifts = np.random.default_rng(0).normal(0, 1, (9, 2))
    for i, image in enumerate(projection.views(volumes, rotations, shown, shifts)):
        moved = projection.project(volumes[shown[i]], rotations[i : i + 1], shifts[i : i + 1])
        np.testing.assert_array_equal(image, projection.rescale(moved)[0])
    with pytest.raises(ValueError, match="shown: expected 9 indices below 2, got"):
        projection.views(volumes, rotations, shown + 1)


def test_jittered_views_turn_by_the_angle_asked_for():
    (view,) = projection.random_rotations(1, 0)
    turned = projection.jittered(view, 4000, 2.0, 1)
    vectors = np.rad2deg(Rotation.from_matrix(view.T @ turned).as_rotvec())
    np.testing.assert_allclose(vectors.std(axis=0), 2.0, rtol=0.05)
    np.testing.assert_allclose(projection.jittered(view, 3, 0.0, 1), [view] * 3, atol=1e-12)
    with pytest.raises(ValueError, match="rotation: expected one, or one for each of 3, got 2"):
        projection.jittered(projection.random_rotations(2, 0), 3, 1.0, 0)
    each = projection.random_rotations(5, 2)
    np.testing.assert_allclose(projection.jittered(each, 5, 0.0, 1), each, atol=1e-12)
    one = [projection.jittered(rotation, 5, 2.0, 1)[i] for i, rotation in enumerate(each)]
    np.testing.assert_allclose(projection.jittered(each, 5, 2.0, 1), one, atol=1e-12)


@pytest.mark.parametrize("mirrored", [False, True])
def test_poses_of_another_frame_and_hand_are_brought_into_that_of_the_truth(mirrored):
    """A turned (and mirrored) volume explains the same images; a third of the poses may be plain wrong."""
    truth, (frame,) = projection.random_rotations(300, 0), projection.random_rotations(1, 1)
    error = Rotation.from_rotvec(np.deg2rad(1.0) * np.random.default_rng(0).standard_normal((300, 3))).as_matrix()
    found = frame @ truth @ (np.diag([-1.0, -1.0, 1.0]) if mirrored else np.eye(3)) @ error
    found[:100] = projection.random_rotations(100, 2)
    turned, errors, was_mirrored = projection.in_frame(found, truth)
    assert was_mirrored == mirrored and np.median(errors[100:]) < 2.0 and np.median(errors[:100]) > 45
    again = np.rad2deg(Rotation.from_matrix(truth[100:].transpose(0, 2, 1) @ turned[100:]).magnitude())
    np.testing.assert_allclose(again, errors[100:], atol=1e-6)


def test_a_mirrored_volume_gives_the_same_images_at_poses_turned_by_half_a_turn():
    """What `in_frame` rests on: the projections of v(-r) at R Rz(180) are those of v at R."""
    volume = np.random.default_rng(0).random((17, 17, 17)).astype(np.float32)
    rotations = projection.random_rotations(5, 0)
    mirrored = projection.project(volume[::-1, ::-1, ::-1], rotations @ np.diag([-1.0, -1.0, 1.0]))
    np.testing.assert_allclose(mirrored, projection.project(volume, rotations), atol=2e-3)


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
    ours = projection.resample(image[None], 1.0, n, to)[0]
    expected = evaluate(parts, side, places)
    np.testing.assert_allclose(ours[np.ix_(inside, inside)], expected[np.ix_(inside, inside)], atol=2e-4)
    assert not ours[~inside].any() and not ours[:, ~inside].any()


def test_resampling_crops_pads_and_keeps_what_lies_on_the_same_grid():
    images = np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)
    np.testing.assert_array_equal(projection.resample(images, 1.34, 32, 1.34), images)
    np.testing.assert_allclose(projection.resample(images, 1.34, 20, 1.34), images[:, 6:26, 6:26], atol=1e-6)
    padded = projection.resample(images, 1.34, 40, 1.34)
    np.testing.assert_allclose(padded[:, 4:36, 4:36], images, atol=1e-6)
    assert not padded[:, :4].any() and not padded[:, :, 36:].any()


def test_resampling_removes_what_the_coarser_grid_cannot_hold():
    x = np.arange(64)
    image = np.cos(2 * np.pi * 20 / 64 * x) + np.zeros((64, 1))
    assert np.abs(projection.resample(image[None], 1.0, 32, 2.0)).max() < 1e-5


def test_a_resampled_volume_projects_to_resampled_projections():
    structure = phantom(2, 20.0, 0)[0]
    fine = density.density(structure, 64, 3.2, 16.0)
    rotations = projection.random_rotations(4, 0)
    coarse = projection.resample_volume(fine, 3.2, 32, 6.4)
    ours = projection.project(coarse, rotations) * 2  # line integrals in voxels
    theirs = projection.resample(projection.project(fine, rotations), 3.2, 32, 6.4)
    np.testing.assert_allclose(ours, theirs, atol=0.01 * ours.max())


def test_odd_boxes_keep_their_centre():
    """RELION centres an image of 65 px on pixel 33: a point there stays in the middle of whatever box."""
    image = np.zeros((1, 65, 65))
    image[0, 33, 33] = 1.0
    for n, to in ((64, 1.0), (33, 2.0), (32, 2.0), (90, 0.7)):
        y, x = np.unravel_index(projection.resample(image, 1.0, n, to)[0].argmax(), (n, n))
        assert (y, x) == ((n + 1) // 2,) * 2


def test_the_first_transform_of_a_projection_is_alone(monkeypatch):
    """Two at once can crash a process whose finufft has not been called before."""
    transform, events, together = projection.finufft.nufft3d2, [], threading.Barrier(5)

    def watched(*arguments, **options):
        events.append("begun")
        if "ended" in events:
            together.wait(60)  # passes once all others have begun: side by side, or not at all
        found = transform(*arguments, **options)
        events.append("ended")
        return found

    monkeypatch.setattr(projection.finufft, "nufft3d2", watched)
    volume = np.random.default_rng(0).random((8, 8, 8), np.float32)
    projection.project(volume, projection.random_rotations(12, 0), batch=2, threads=5)
    assert events[:3] == ["begun", "ended", "begun"] and events.count("ended") == 6
