"""Projections go back to the volume they came from; FSC and resolution are what they say, and what RELION says."""

import shutil
import subprocess
import tracemalloc
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from scipy.ndimage import gaussian_filter

from cryo_lib.evaluate import reconstruction
from cryo_lib.evaluate.reconstruction import fsc, half_maps, masked_fsc, reconstruct, resolution, soft_mask
from cryo_lib.simulate import density, noise, projection
from cryo_lib.simulate.ctf import apply_ctf
from cryo_lib.simulate.phantom import phantom
from cryo_lib.stacks import mrc, particles

RELION_MAP = Path(__file__).resolve().parents[3] / "shared/data/ribosome/clean70SRibosome_vol_65p.mrc"
needs_relion = pytest.mark.skipif(
    shutil.which("relion_reconstruct") is None, reason="RELION is not installed (Debian package `relion`)"
)


def blobs(n: int, seed: int = 0, sigma: float = 0.8) -> np.ndarray:
    """A volume of random detail down to the voxel inside half the box."""
    rng = np.random.default_rng(seed)
    axis = np.arange(n) - n // 2
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < (0.32 * n) ** 2
    return gaussian_filter(inside * rng.standard_normal((n,) * 3), sigma).astype(np.float32)


@pytest.fixture(scope="module")
def clean():
    """A volume of 40 voxels, rotations, and its projections."""
    volume, rotations = blobs(40), projection.random_rotations(600, 1)
    return volume, rotations, projection.project(volume, rotations)


def noisy(images: np.ndarray, snr: float, seed: int) -> np.ndarray:
    return noise.add_noise(images, snr, seed)


@pytest.mark.parametrize("n", [32, 40, 45])
def test_projecting_and_reconstructing_gives_the_volume_back(n):
    """FSC > 0.99 to 80 % of Nyquist on clean images, on the volume's own scale, for even and odd boxes."""
    volume, rotations = blobs(n), projection.random_rotations(400, 1)
    again = reconstruct(projection.project(volume, rotations), rotations)
    assert fsc(again, volume)[: int(0.8 * n / 2) + 1].min() > 0.99
    assert (again * volume).sum() / np.square(volume).sum() == pytest.approx(1, abs=0.05)


def test_it_is_the_least_squares_volume(clean):
    """No nudge inside the sphere, either way, lowers ||A v - y||^2 + kappa n ||v||^2 up to Nyquist."""
    _, rotations, images = clean
    rotations, images, kappa = rotations[:80], noisy(images[:80], 1.0, 0), 0.5
    best = reconstruct(images, rotations, regularisation=kappa, iterations=60)
    frequency = np.fft.fftfreq(40)
    below_nyquist = np.hypot(frequency[:, None], frequency) < 0.5

    def objective(volume):
        difference = np.fft.fft2(projection.project(volume, rotations) - images)[:, below_nyquist] / 40
        return np.square(np.abs(difference)).sum() + kappa * 40 * np.square(volume, dtype=float).sum()

    nudges = [
        0.05 * blob * best.std() / blob.std() for blob in (blobs(40, 1, 2.0), blobs(40, 2, 1.0), blobs(40, 3, 0.5))
    ]
    assert all(objective(best) < objective(best + sign * nudge) for nudge in nudges for sign in (-1, 1))


def test_shifts_are_undone(clean):
    volume, rotations, _ = clean
    shifts = np.random.default_rng(2).uniform(-4, 4, (600, 2))
    images = projection.project(volume, rotations, shifts)
    poses = particles.Poses(rotations, 2.5 * shifts)
    right, wrong = reconstruct(images, poses, pixel_size=2.5), reconstruct(images, rotations)
    assert fsc(right, volume)[:17].min() > 0.99 and fsc(wrong, volume)[10:17].max() < 0.8


def test_threads_and_batches_do_not_change_the_result(clean, monkeypatch):
    _, rotations, images = clean
    one, four = (reconstruct(images[:100], rotations[:100], threads=threads) for threads in (1, 4))
    np.testing.assert_array_equal(one, four)
    monkeypatch.setattr(reconstruction, "POINTS", 20_000)
    small = [reconstruct(images[:100], rotations[:100], threads=threads) for threads in (1, 3)]
    np.testing.assert_array_equal(*small)
    np.testing.assert_allclose(small[0], one, atol=1e-3 * np.abs(one).max())


def test_arrays_tensors_and_lazy_stacks_give_the_same(clean, tmp_path):
    _, rotations, images = clean
    path = particles.new(tmp_path / "x.star", images[:50], rotations[:50], 2.0)
    stack = particles.ParticleStack.open(path)
    expected = reconstruct(images[:50], rotations[:50])
    np.testing.assert_array_equal(reconstruct(torch.as_tensor(images[:50]), rotations[:50]), expected)
    lazily = reconstruct(stack.images, stack.poses, pixel_size=stack.pixel_size)
    assert np.corrcoef(lazily.ravel(), expected.ravel())[0, 1] > 0.99999  # angles are written with six decimals


def test_memory_does_not_grow_with_the_number_of_images(monkeypatch):
    monkeypatch.setattr(reconstruction, "POINTS", 40_000)

    class Endless:
        """Images made when they are asked for."""

        def __init__(self, m):
            self.shape = (m, 24, 24)

        def __len__(self):
            return self.shape[0]

        def __getitem__(self, rows):
            return np.random.default_rng(0).random((len(rows), 24, 24), np.float32)

    peaks = []
    for m in (400, 4000):
        tracemalloc.start()
        reconstruct(Endless(m), projection.random_rotations(m, 0), threads=1, iterations=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    poses = 3600 * 9 * 8 * 6  # the rotations themselves, and what checks them
    assert peaks[1] < peaks[0] + poses


def test_half_maps_share_nothing_and_add_up(clean):
    """Each half-map is the reconstruction of its half-set; images of half-set 0 are left out."""
    _, rotations, images = clean
    half_sets = np.arange(120) % 3
    first, second, both = half_maps(images[:120], rotations[:120], half_sets)
    np.testing.assert_array_equal(first, reconstruct(images[1:120:3], rotations[1:120:3]))
    np.testing.assert_array_equal(second, reconstruct(images[2:120:3], rotations[2:120:3]))
    used = half_sets > 0
    together = reconstruct(images[:120][used], rotations[:120][used])
    np.testing.assert_allclose(both, together, atol=2e-3 * np.abs(together).max())


def test_half_map_fsc_predicts_the_fsc_against_the_truth(clean):
    """C_ref = sqrt(2 FSC / (1 + FSC)) for independent noise, Rosenthal & Henderson 2003: 0.143 means 0.5."""
    volume, rotations, images = clean
    first, second, both = half_maps(noisy(images, 0.05, 0), rotations, np.arange(600) % 2 + 1)
    halves, truth = fsc(first, second)[2:17], fsc(both, volume)[2:17]
    assert 0.05 < halves.min() < 0.5  # the noise matters
    np.testing.assert_allclose(truth, np.sqrt(2 * halves / (1 + halves)), atol=0.08)


def microscope(m: int) -> pd.DataFrame:
    """CTF parameters of `m` images at defocus values that leave no frequency unseen."""
    u = np.random.default_rng(0).uniform(8000, 30000, m)
    table = {
        "rlnDefocusU": u,
        "rlnDefocusV": u - 500,
        "rlnDefocusAngle": 30.0,
        "rlnPhaseShift": 0.0,
        "rlnVoltage": 300.0,
    }
    table |= {
        "rlnSphericalAberration": 2.0,
        "rlnAmplitudeContrast": 0.1,
        "rlnCtfBfactor": 0.0,
        "rlnCtfScalefactor": 1.0,
    }
    return pd.DataFrame(table)


def test_ctf_is_undone(clean):
    """Images through the CTF of many defocus values: the volume comes back with it, and not without."""
    volume, rotations, images = clean
    ctf, pixel_size = microscope(600), 2.0
    seen = apply_ctf(images, ctf, pixel_size)
    right = reconstruct(seen, rotations, ctf=ctf, pixel_size=pixel_size, iterations=20)
    wrong = reconstruct(seen, rotations)
    assert fsc(right, volume)[2:17].min() > 0.99 and fsc(wrong, volume)[2:17].min() < 0.9
    assert (right * volume).sum() / np.square(volume).sum() == pytest.approx(1, abs=0.1)
    halves = half_maps(seen[:200], rotations[:200], np.arange(200) % 2 + 1, ctf=ctf[:200], pixel_size=pixel_size)
    assert fsc(halves[0], halves[1])[2:12].min() > 0.8


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ctf": microscope(3), "pixel_size": 1.0}, "ctf: expected 4 rows, one an image, got 3"),
        ({"ctf": microscope(4)}, "pixel_size: expected A per pixel, .* or for the CTF, got None"),
        ({"poses": None}, r"poses: expected rotations or Poses, got None: the star file lacks rlnAngleRot"),
        (
            {"images": np.ones((3, 32, 32), np.float32)},
            r"images: expected square ones, one a pose, of shape \(4, n, n\), got \(3, 32, 32\)",
        ),
        ({"images": np.ones((4, 32, 30), np.float32)}, r"got \(4, 32, 30\)"),
        (
            {"poses": particles.Poses(projection.random_rotations(4, 0), np.ones((4, 2)))},
            "pixel_size: expected A per pixel, since the poses",
        ),
        ({"poses": 2 * projection.random_rotations(4, 0)}, "rotations: expected orthonormal matrices"),
        ({"images": np.full((4, 32, 32), np.nan, np.float32)}, "images 0 to 3: expected finite pixels"),
        ({"regularisation": -1}, "regularisation: expected a finite number >= 0"),
        ({"iterations": 0}, "iterations: expected an integer >= 1"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"images": np.ones((4, 32, 32), np.float32), "poses": projection.random_rotations(4, 0)} | change
    with pytest.raises(ValueError, match=message):
        reconstruct(**arguments)


@pytest.mark.parametrize(
    "half_sets, message",
    [
        (np.ones(4), "with 4 in half-set 1 and 0 in half-set 2"),
        (np.array([1, 2, 3, 1]), r"half_sets: expected 4 values of 1 and 2"),
        (np.array([1, 2]), r"got shape \(2,\)"),
    ],
)
def test_half_sets_that_are_empty_or_wrong_are_named(half_sets, message):
    with pytest.raises(ValueError, match=message):
        half_maps(np.ones((4, 32, 32), np.float32), projection.random_rotations(4, 0), half_sets)


def test_fsc_of_equal_opposite_and_independent_volumes():
    a = np.random.default_rng(0).standard_normal((32, 32, 32)).astype(np.float32)
    b = np.random.default_rng(1).standard_normal((32, 32, 32)).astype(np.float32)
    np.testing.assert_allclose(fsc(a, 3 * a), 1, atol=1e-6)
    np.testing.assert_allclose(fsc(a, -a), -1, atol=1e-6)
    assert fsc(a, b).shape == (17,) and np.abs(fsc(a, b)[4:]).max() < 0.15
    assert (fsc(a, np.zeros_like(a)) == 0).all()


def test_fsc_of_a_known_signal_to_noise_ratio():
    """Two volumes of one signal and independent noise: FSC = SNR / (1 + SNR) in every shell."""
    rng = np.random.default_rng(0)
    signal, *noise = (rng.standard_normal((64, 64, 64)).astype(np.float32) for _ in range(3))
    snr = 0.5
    curve = fsc(*(np.sqrt(snr) * signal + each for each in noise))
    assert curve[8:].mean() == pytest.approx(snr / (1 + snr), abs=0.01)


def test_fsc_names_volumes_of_different_size():
    with pytest.raises(ValueError, match="a and b: expected the same shape"):
        fsc(np.ones((8, 8, 8)), np.ones((10, 10, 10)))
    with pytest.raises(ValueError, match="b: expected a cube"):
        fsc(np.ones((8, 8, 8)), np.ones((8, 8, 6)))


def test_resolution_is_where_the_curve_first_crosses():
    curve = np.array([1.0, 0.9, 0.6, 0.4, 0.1, 0.3])  # a box of 10: shell s lies at s / 10 of a cycle a voxel
    assert resolution(curve, 0.5) == pytest.approx(10 / 2.5)
    assert resolution(curve, 0.5, pixel_size=1.6) == pytest.approx(16 / 2.5)
    assert resolution(curve, 0.143) == pytest.approx(10 / (3 + 0.257 / 0.3))  # not the later rise above it
    assert resolution(curve, 0.143, box=11) == pytest.approx(11 / (3 + 0.257 / 0.3))
    assert resolution(np.ones(6), 0.143, pixel_size=2.0) == pytest.approx(2 * 2.0)  # Nyquist
    assert resolution(np.array([1.0, 0.1, 0.9]), 0.5) == np.inf
    for wrong, message in ((np.ones((2, 2)), "finite curve"), (np.array([1, np.nan]), "finite curve")):
        with pytest.raises(ValueError, match=message):
            resolution(wrong)
    with pytest.raises(ValueError, match=r"box: expected 2 \(len\(fsc\) - 1\) = 10, or one more, got 12"):
        resolution(curve, box=12)


def test_a_soft_mask_is_one_inside_zero_outside_and_falls_as_it_should():
    axis = np.arange(48) - 24
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    mask = soft_mask((radius <= 8).astype(np.float32), 0.5, extend=3, edge=4)
    assert (mask[radius <= 10] == 1).all() and (mask[radius > 15.5] == 0).all()
    assert mask[24, 24, 24 + 13] == pytest.approx(0.5, abs=1e-6)  # half way: 8 + 3 + 2
    for level in (-1.0, 2.0):
        with pytest.raises(ValueError, match="level: expected a density that some voxels exceed, not all"):
            soft_mask((radius <= 8).astype(np.float32), level)


def test_the_correction_takes_away_what_a_mask_correlates():
    """A tight mask makes half-maps of pure noise beyond some shell agree; corrected, they do not."""
    rng = np.random.default_rng(0)
    low = gaussian_filter(blobs(48, 3, 1.0), 2.0)
    halves = [low / low.std() + 3 * rng.standard_normal(low.shape).astype(np.float32) for _ in range(2)]
    mask = soft_mask(gaussian_filter(np.abs(low), 2), np.quantile(np.abs(low), 0.97), 0, 1)
    masked, corrected = masked_fsc(*halves, mask)
    tail = slice(14, 24)
    assert np.abs(corrected[tail]).mean() < np.abs(masked[tail]).mean() or np.abs(masked[tail]).mean() < 0.1
    assert np.abs(corrected[tail].mean()) < 0.1
    np.testing.assert_array_equal(masked_fsc(*halves, mask)[1], corrected)  # seeded


def test_low_pass_halves_at_the_resolution():
    n, pixel_size = 48, 2.0
    wave = np.cos(2 * np.pi * np.arange(n) * 6 / n) * np.ones((n, n, 1))  # period n / 6 voxels: 16 A
    kept = reconstruction.low_pass(wave, 16.0, pixel_size)
    np.testing.assert_allclose(kept, 0.5 * wave, atol=1e-5)


def test_a_map_on_disk_keeps_its_voxels_and_their_size(tmp_path):
    volume = blobs(16)
    with mrcfile.open(mrc.write_map(tmp_path / "m.mrc", volume, 1.25), header_only=False) as file:
        np.testing.assert_array_equal(file.data, volume)
        assert file.voxel_size.x == pytest.approx(1.25) and file.is_volume()


@needs_relion
def test_agrees_with_relion_on_the_same_star_file(clean, tmp_path):
    """relion_reconstruct's map: same frame, same hand, FSC > 0.98 between the two; ours no further from the truth."""
    volume, rotations, images = clean
    images = noisy(images, 1.0, 0)
    shifts = np.random.default_rng(2).uniform(-3, 3, (600, 2))
    images = noisy(projection.project(volume, rotations, shifts), 1.0, 0)
    particles.new(tmp_path / "x.star", images, rotations, 2.0, shifts=2.0 * shifts)
    command = ["relion_reconstruct", "--i", "x.star", "--o", "relion.mrc"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    theirs = mrcfile.read(tmp_path / "relion.mrc")
    stack = particles.ParticleStack.open(tmp_path / "x.star")
    ours = reconstruct(stack.images, stack.poses, pixel_size=stack.pixel_size)
    assert fsc(ours, theirs)[:17].min() > 0.98
    assert (fsc(ours, volume)[1:17] > fsc(theirs, volume)[1:17] - 0.01).all()


@needs_relion
def test_agrees_with_relion_on_images_with_ctf(clean, tmp_path):
    """relion_reconstruct --ctf on the same star file: FSC > 0.97 between the two, ours no further from the truth."""
    volume, rotations, images = clean
    ctf = microscope(600)
    seen = noisy(apply_ctf(images, ctf, 2.0), 1.0, 0)
    columns = {label: ctf[label] for label in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle")}
    options = {"spherical_aberration": 2.0, "amplitude_contrast": 0.1, "columns": columns}
    particles.new(tmp_path / "x.star", seen, rotations, 2.0, **options)
    command = ["relion_reconstruct", "--i", "x.star", "--o", "relion.mrc", "--ctf"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    theirs, stack = mrcfile.read(tmp_path / "relion.mrc"), particles.ParticleStack.open(tmp_path / "x.star")
    ours = reconstruct(stack.images, stack.poses, pixel_size=stack.pixel_size, ctf=stack.ctf, iterations=40)
    assert fsc(ours, theirs)[2:17].min() > 0.97
    assert (fsc(ours, volume)[2:17] > fsc(theirs, volume)[2:17] - 0.01).all()


@needs_relion
@pytest.mark.parametrize("n", [32, 33])
def test_fsc_is_relions(n, tmp_path, monkeypatch):
    """The same shells; RELION counts the plane k_x = 0 with its mates, twice as much as the rest: so do we here."""
    a, b = blobs(n, 0, 0.7), blobs(n, 0, 0.7) + 0.5 * blobs(n, 1, 0.7)
    for name, volume in (("a", a), ("b", b)):
        mrc.write_map(tmp_path / f"{name}.mrc", volume, 2.0)
    command = ["relion_image_handler", "--i", "a.mrc", "--fsc", "b.mrc", "--angpix", "2"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    (tmp_path / "fsc.star").write_text(done.stdout[done.stdout.index("data_") :])
    theirs = starfile.read(tmp_path / "fsc.star")["rlnFourierShellCorrelation"].to_numpy()
    np.testing.assert_allclose(fsc(a, b)[1 : len(theirs)], theirs[1:], atol=0.02)
    shells = reconstruction._shells
    monkeypatch.setattr(reconstruction, "_shells", lambda n: (shells(n)[0], np.ones_like(shells(n)[1])))
    np.testing.assert_allclose(fsc(a, b)[1 : len(theirs)], theirs[1:], atol=2e-6)


@pytest.mark.skipif(
    not RELION_MAP.is_file(), reason=f"{RELION_MAP.name}, a test map kept outside the repository, is not there"
)
def test_a_real_ribosome_goes_there_and_back():
    volume = mrcfile.read(RELION_MAP)
    axis = np.arange(65) - 32
    volume = volume * (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < 32**2)  # what every view shows whole
    rotations = projection.random_rotations(700, 0)
    again = reconstruct(projection.project(volume, rotations), rotations)
    assert fsc(again, volume)[:27].min() > 0.99


def test_comparing_maps_gives_their_curves_and_resolutions():
    """Half-maps of a known volume with independent noise: every number is that of the function that makes it."""
    volume = density.density(phantom(2, 20.0, 0)[0], 32, 6.4, 13.0)
    first, second = volume + 0.3 * volume.std() * np.random.default_rng(0).normal(size=(2, *volume.shape)).astype(
        np.float32
    )
    mask = reconstruction.soft_mask(volume, 0.15 * volume.max())
    curves, table = reconstruction.compare(
        {"a": (first, second, (first + second) / 2), "b": (volume,) * 3}, volume, mask, 6.4
    )
    assert list(curves["stack"].unique()) == list(table.index) == ["a", "b"] and len(curves) == 34
    rows = curves[curves["stack"] == "a"]
    np.testing.assert_array_equal(rows["halves"], reconstruction.fsc(first, second))
    np.testing.assert_array_equal(rows["truth"], reconstruction.fsc((first + second) / 2, volume))
    np.testing.assert_allclose(rows["frequency"], np.arange(17) / 204.8)
    assert table.loc["a", "halves 0.143"] == reconstruction.resolution(rows["halves"], pixel_size=6.4)
    np.testing.assert_allclose(table.loc["b"], 12.8)


def test_a_shown_map_is_eight_bit_and_as_smooth_as_its_resolution():
    volume = np.random.default_rng(0).random((32, 32, 32))
    smooth = reconstruction.low_pass(volume, 20.0, 4.0)
    shown = reconstruction.shown(volume, 20.0, 4.0)
    assert shown.dtype == np.uint8 and shown.max() == 255
    np.testing.assert_allclose(shown / 255, np.clip(smooth / smooth.max(), 0, 1), atol=1 / 509)
    np.testing.assert_array_equal(reconstruction.shown(volume, np.inf, 4.0), reconstruction.shown(volume, 32.0, 4.0))
