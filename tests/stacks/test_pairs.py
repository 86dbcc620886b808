"""References lie where their particles lie, and a map that does not belong to the poses is found out."""

import re
from itertools import permutations, product

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from cryo_lib.simulate import ctf, density, projection, standin
from cryo_lib.stacks import mrc, particles
from cryo_lib.stacks.pairs import Computed, Copies, Pairs, choose
from cryo_lib.stacks.particles import ParticleStack

BOX, PIXEL = 48, 10.0


@pytest.fixture(scope="module")
def volume():
    return density.density(standin.ribosome(), BOX, PIXEL, 20.0)


def write(folder, volume, n=60, noise=5.0, contrast=1.0, with_ctf=True, rotated=None):
    """Particles of a known volume off the middle by some pixels, as a star file."""
    rng = np.random.default_rng(0)
    rotations = projection.random_rotations(n, 1)
    shifts = rng.uniform(-40, 40, (n, 2))
    parameters = standin.microscope(n, 0)
    x = projection.project(volume, rotations, shifts / PIXEL)
    if with_ctf:
        x = ctf.apply_ctf(x, parameters, PIXEL)
    y = contrast * x + noise * x.std() * rng.standard_normal(x.shape, dtype=np.float32)
    columns = {label: parameters[label] for label in ctf.CTF_LABELS[:4]} if with_ctf else {}
    options = {"shifts": shifts, "columns": columns, "spherical_aberration": 2.0}
    return ParticleStack.open(particles.new(folder / "p.star", y, rotations, PIXEL, **options))


def test_references_are_projections_in_the_frame_of_the_images(volume, tmp_path):
    """Without noise and CTF an image and its reference are one picture, shifts, crop and binning included."""
    stack = write(tmp_path, volume, noise=1e-4, with_ctf=False)
    for n, pixel_size in ((BOX, PIXEL), (40, PIXEL), (32, 15.0)):
        pairs = Pairs(stack, volume, PIXEL, n, pixel_size)
        x, y = pairs.clean(np.arange(20)), pairs.noisy(np.arange(20))
        assert x.shape == y.shape == (20, n, n)
        correlation = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(x, y)]
        assert min(correlation) > 0.995, (n, pixel_size)


def test_a_map_on_another_grid_gives_the_same_references(volume, tmp_path):
    """At 18 A, which both grids hold, a finer map of the same density makes the same pictures."""
    stack = write(tmp_path, volume, with_ctf=False)
    fine = density.density(standin.ribosome(), 72, PIXEL / 1.5, 20.0)
    ours, theirs = (Pairs(stack, v, p, 32, 15.0).clean(np.arange(5)) for v, p in ((volume, PIXEL), (fine, PIXEL / 1.5)))
    np.testing.assert_allclose(ours, theirs, atol=0.03)


def test_agreement_finds_gain_and_snr(volume, tmp_path):
    """Noise of 5 signal sd: the background's sd is 1 after normalisation, so the SNR and the gain follow."""
    stack = write(tmp_path, volume, n=200)
    pairs = Pairs(stack, volume, PIXEL, BOX, PIXEL, "bright")
    found = pairs.agreement(np.arange(200))
    assert found.snr == pytest.approx(1 / 25, rel=0.1)
    signal = ctf.apply_ctf(pairs.clean(np.arange(200)), stack.ctf, PIXEL)
    assert found.gain**2 * signal.var(axis=(1, 2)).mean() == pytest.approx(found.snr, rel=0.05)
    assert found.own > 2 * abs(found.others) and found.excess > 20


def oriented(volume, axes, flipped):
    flips = tuple(axis for axis in range(3) if flipped[axis])
    return np.roll(np.flip(volume.transpose(axes), flips), len(flips) * [1], flips)


@pytest.fixture(scope="module")
def stack(volume, tmp_path_factory):
    return write(tmp_path_factory.mktemp("pairs"), volume, n=100)


@pytest.mark.parametrize("axes, flipped", [*product(permutations(range(3)), product((False, True), repeat=3))][1::4])
def test_a_turned_or_mirrored_map_is_found_out_with_the_way_back(volume, stack, axes, flipped):
    """What the message advises, done to the wrong map, gives the right one."""
    wrong = np.ascontiguousarray(oriented(volume, axes, flipped))
    with pytest.raises(ValueError) as found:
        Pairs(stack, wrong, PIXEL, BOX, PIXEL, "bright").agreement(np.arange(100))
    if "is it the map of this refinement" in str(found.value):
        return
    *words, frame = re.search(r"z, y, x taken as (-?.), (-?.), (-?.) \((.*)\);", str(found.value)).groups()
    mended = oriented(wrong, ["zyx".index(word[-1]) for word in words], [word[0] == "-" for word in words])
    assert np.corrcoef(mended.ravel(), volume.ravel())[0, 1] > 0.99
    mirrored = np.linalg.det(np.eye(3)[list(axes)]) * (-1) ** sum(flipped) < 0
    assert frame == ("the other hand" if mirrored else "another frame")


@pytest.mark.parametrize(
    "change, voxel_size, message",
    [
        (lambda v: np.roll(v, 2, 0), PIXEL, "moved by -2 voxels along z"),
        (lambda v: np.roll(v, -1, 2), PIXEL, "moved by 1 voxels along x"),
        (lambda v: v, 1.06 * PIXEL, "with a voxel size of 0.94 times its own"),
        (
            lambda v: np.random.default_rng(0).random(v.shape),
            PIXEL,
            "expected images to agree .* is it the map of this",
        ),
        (lambda v: -v, PIXEL, "expected images to agree .* got -"),
    ],
    ids=["up", "aside", "scaled", "random", "negative"],
)
def test_maps_that_do_not_belong_are_found_out(volume, stack, change, voxel_size, message):
    with pytest.raises(ValueError, match=f"p.star: .*{message}"):
        Pairs(stack, change(volume), voxel_size, BOX, PIXEL, "bright").agreement(np.arange(100))


@pytest.mark.parametrize("with_ctf", [False, True])
def test_a_map_with_a_negative_halo_gives_the_same_grey_scale(volume, tmp_path, with_ctf):
    """Its references' background is not 0; gain, SNR and level say so: noisy / gain + level lies on their scale."""
    fringed = volume - 0.3 * gaussian_filter(volume, 4.0)
    stack = write(tmp_path, fringed, n=200, noise=2.0, with_ctf=with_ctf)
    pairs = Pairs(stack, fringed, PIXEL, BOX, PIXEL, "bright")
    found, rows = pairs.agreement(np.arange(200)), np.arange(200)
    assert found.level > 0.05 and found.snr == pytest.approx(0.25, rel=0.1)
    if not with_ctf:
        x, y = pairs.clean(rows).mean(axis=0), pairs.noisy(rows).mean(axis=0) / found.gain + found.level
        slope, offset = np.polyfit(x.ravel(), y.ravel(), 1)
        assert slope == pytest.approx(1, abs=0.1) and offset == pytest.approx(0, abs=0.05)


def test_training_rows_alternate_between_half_sets_and_no_row_is_in_two_splits():
    half_sets = np.random.default_rng(0).integers(1, 3, 500)
    rows = choose(half_sets, 500, {"train": 101, "val": 20, "test": 30}, 0)
    assert (half_sets[rows["train"][0::2]] == 1).all() and (half_sets[rows["train"][1::2]] == 2).all()
    assert [len(part) for part in rows.values()] == [101, 20, 30, 349]
    assert len(np.unique(np.concatenate(list(rows.values())))) == 500
    bare = choose(None, 500, {"train": 101, "val": 20, "test": 30}, 0)
    assert len(np.unique(np.concatenate(list(bare.values())))) == 500
    assert not np.array_equal(bare["train"], np.arange(101))


def test_too_few_rows_are_counted():
    with pytest.raises(ValueError, match=r"particles: expected 90 \(train\) \+ 20 \(test\) or more, got 100; ask for"):
        choose(None, 100, {"train": 90, "test": 20}, 0)
    few = "half_sets: expected {} rows or more of half-sets 1 and 2, got {}; ask for fewer pairs"
    with pytest.raises(ValueError, match=few.format("40 and 40", "90 and 10")):
        choose(np.repeat([1, 2], [90, 10]), 100, {"train": 80, "test": 10}, 0)
    with pytest.raises(ValueError, match=few.format("2 and 1", "1 and 5")):  # of 3 pairs the first half has two
        choose(np.array([1, 2, 2, 2, 2, 2]), 6, {"train": 3, "val": 1}, 0)
    assert (choose(np.array([1, 1, 2]), 3, {"train": 3}, 0)["train"][[0, 2]] < 2).all()


def test_inverted_particles_are_found_out_and_inverted_on_request(volume, tmp_path):
    stack = write(tmp_path, volume, n=200, noise=3.0, contrast=-1.0)
    with pytest.raises(ValueError, match="expected images to agree"):
        Pairs(stack, volume, PIXEL, BOX, PIXEL, "bright").agreement(np.arange(200))
    assert Pairs(stack, volume, PIXEL, BOX, PIXEL, "dark").agreement(np.arange(200)).own > 0.2


def test_dark_particles_want_a_decision(volume, tmp_path):
    stack = write(tmp_path, volume, n=100, noise=1.0, contrast=-1.0, with_ctf=False)
    with pytest.raises(ValueError, match="p.star: expected particles brighter than .*, got dark .* contrast dark"):
        Pairs(stack, volume, PIXEL, BOX, PIXEL)
    with pytest.raises(ValueError, match="contrast: expected one of bright, dark, got 'black'"):
        Pairs(stack, volume, PIXEL, BOX, PIXEL, "black")


def test_few_particles_or_none_with_poses_are_refused(volume, tmp_path):
    stack = write(tmp_path, volume, n=30)
    with pytest.raises(ValueError, match="rows: expected at least 20 .* got 5"):
        Pairs(stack, volume, PIXEL, BOX, PIXEL, "bright").agreement(np.arange(5))
    bare = ParticleStack.open(tmp_path / "p.mrcs")
    with pytest.raises(ValueError, match="p.mrcs: expected rlnAngleRot, rlnAngleTilt and rlnAnglePsi, got none"):
        Pairs(bare, volume, PIXEL, BOX, PIXEL)
    with pytest.raises(ValueError, match="voxel_size: expected a finite number > 0"):
        Pairs(stack, volume, 0.0, BOX, PIXEL, "bright")


def test_computed_images_are_made_for_the_rows_that_are_asked_for(volume, tmp_path):
    stack = write(tmp_path, volume, n=30)
    pairs = Pairs(stack, volume, PIXEL, 40, PIXEL, "bright")
    images = Computed(pairs.noisy, np.array([7, 3, 20]), 40)
    assert images.shape == (3, 40, 40) and len(images) == 3
    np.testing.assert_array_equal(images[np.array([2, 0])], pairs.noisy(np.array([20, 7])))


def two(folder, volume, n=60, shared=0.0, order=None, noise=3.0, **columns):
    """Two stacks of one row of particles, noise of `noise` signal sd each, whose share `shared` both have."""
    rng = np.random.default_rng(0)
    x = projection.project(volume, projection.random_rotations(n, 1))
    parts = rng.standard_normal((3, *x.shape), np.float32)
    stacks = []
    for k, name in enumerate(("even", "odd")):
        y = x + noise * x.std() * (shared**0.5 * parts[2] + (1 - shared) ** 0.5 * parts[k])
        y = y if order is None or not k else y[order]
        path = particles.new(folder / f"{name}.star", y, np.tile(np.eye(3), (n, 1, 1)), PIXEL, columns=columns)
        stacks.append(ParticleStack.open(path))
    return stacks


def test_copies_are_the_other_stacks_images_and_their_covariance_is_the_signals(volume, tmp_path):
    even, odd = two(tmp_path, volume, 200)
    pairs, rows = Copies(even, odd, BOX, PIXEL, "bright"), np.arange(200)
    np.testing.assert_array_equal(pairs.clean(rows), Copies(odd, even, BOX, PIXEL, "bright").noisy(rows))
    found = pairs.agreement(rows)
    assert found.snr == pytest.approx(1 / 9, rel=0.1) and (found.gain, found.level) == (1.0, 0.0)
    assert found.own == pytest.approx(0.1, abs=0.01) and found.excess > 5


def test_copies_of_other_particles_or_of_the_same_noise_are_refused(volume, tmp_path):
    order = np.roll(np.arange(60), 7)
    with pytest.raises(ValueError, match="odd.star: expected copies to agree .* are they the same particles, in one"):
        Copies(*two(tmp_path, volume, order=order), BOX, PIXEL, "bright").agreement(np.arange(60))
    with pytest.raises(ValueError, match=r"expected other noise than in .* correlates by 0\.9"):
        Copies(*two(tmp_path, volume, shared=0.97), BOX, PIXEL, "bright").agreement(np.arange(60))
    even, odd = two(tmp_path, volume, shared=0.3)  # of ice, which both halves of a movie see
    assert Copies(even, odd, BOX, PIXEL, "bright").agreement(np.arange(60)).excess > 5


def test_stacks_that_are_no_copies_of_each_other_are_named(volume, tmp_path):
    for name in ("first", "few", "bare"):
        (tmp_path / name).mkdir()
    even, odd = two(tmp_path / "first", volume, rlnCoordinateX=np.arange(60.0), rlnCoordinateY=np.zeros(60))
    Copies(even, odd, BOX, PIXEL, "bright")
    odd.table.loc[3:, "rlnCoordinateX"] += 5
    with pytest.raises(ValueError, match="odd.star: .* other rlnCoordinateX and rlnCoordinateY in 57 rows, .* row 4"):
        Copies(even, odd, BOX, PIXEL, "bright")
    fewer = two(tmp_path / "few", volume, 30)[1]
    with pytest.raises(ValueError, match="odd.star: expected 60 images, as .*even.star has, got 30; give the same"):
        Copies(even, fewer, BOX, PIXEL, "bright")
    mrc.write_stack(tmp_path / "bare" / "fine.mrcs", [odd.images[:]], odd.images.shape, PIXEL)
    assert Copies(even, ParticleStack.open(tmp_path / "bare" / "fine.mrcs"), BOX, PIXEL, "bright").n == BOX
    mrc.write_stack(tmp_path / "bare" / "odd.mrcs", [odd.images[:]], odd.images.shape, 2 * PIXEL)
    with pytest.raises(ValueError, match="odd.mrcs: expected 10.0 A a pixel, as .* has, got 20.0"):
        Copies(even, ParticleStack.open(tmp_path / "bare" / "odd.mrcs"), BOX, PIXEL, "bright")
