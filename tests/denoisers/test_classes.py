"""Class averages need a stack and nothing else: known templates come back, turns and junk do not matter."""

import numpy as np
import pytest

from cryo_lib.denoisers.classes import Classes
from cryo_lib.evaluate.metrics import psnr
from cryo_lib.simulate.projection import project, random_rotations, rescale
from tests.denoisers.test_posterior import N, turned
from tests.simulate.blobs import Blobs

SIGMA = 0.3
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world():
    """Two views of a volume, and 80 images of each of the first and second in turn, turned in the plane."""
    volume, poses = Blobs(N, reach=8, seed=0).volume(), random_rotations(2, 0)
    degrees = np.random.default_rng(1).uniform(0, 360, 160)
    x = rescale(project(volume, np.stack([turned(poses[k % 2], d) for k, d in enumerate(degrees)])))
    return volume, poses, x


def noisy(x, seed=0):
    return x + SIGMA * np.random.default_rng(seed).standard_normal(x.shape).astype(np.float32)


def nearest(volume, pose, image):
    """The least squared error between an image and a view in 180 turns, over the view's variance."""
    views = rescale(project(volume, np.stack([turned(pose, d) for d in range(0, 360, 2)])))
    return np.square(views - image).mean((1, 2)).min() / views[0].var()


def test_a_world_of_two_templates_is_found_up_to_turns(world):
    volume, poses, x = world
    classes = Classes(noisy(x), SIGMA, 2, 8, seed=1)
    errors = [[nearest(volume, pose, image * SIGMA) for pose in poses] for image in classes.images()]
    right, wrong = sorted([errors[0][0] + errors[1][1], errors[0][1] + errors[1][0]])
    assert right < 0.1 * wrong
    np.testing.assert_allclose(classes.counts, 80, atol=0.5)


def test_estimates_are_better_than_those_of_one_class_which_is_a_wiener_filter(world):
    _, _, x = world
    y = noisy(x)
    one, two = (psnr(x, Classes(y, SIGMA, k, 8, seed=1).denoise(y, SIGMA)[0]).mean() for k in (1, 2))
    assert two > one + 1 > psnr(x, y).mean() + 8


@pytest.mark.parametrize("n_classes", [1, 2, 7])
def test_the_log_posterior_never_decreases(world, n_classes):
    history = Classes(noisy(world[2]), SIGMA, n_classes, 10, seed=0).history
    assert len(history) == 10 and (np.diff(history) > -1e-3).all() and history[-1] > history[0]


def test_turned_images_are_denoised_to_turned_estimates(world):
    y = noisy(world[2])
    y[:, 0] = y[:, :, 0] = 0  # without a counterpart about pixel n / 2
    classes = Classes(y, SIGMA, 3, 3, seed=0)
    about = np.roll(np.rot90(y, axes=(1, 2)), 1, axis=1)
    x_hat, turned_hat = (classes.denoise(each, SIGMA)[0] for each in (y, about))
    expected = np.roll(np.rot90(x_hat, axes=(1, 2)), 1, axis=1)
    np.testing.assert_allclose(turned_hat[:, 1:, 1:], expected[:, 1:, 1:], atol=2e-3)


def test_the_scale_of_images_and_noise_is_theirs(world):
    y = noisy(world[2])
    one, ten = (Classes(s * y, s * SIGMA, 2, 2, 0).denoise(s * y, s * SIGMA) for s in (1, 8))
    np.testing.assert_allclose(ten[0], 8 * one[0], atol=1e-3)
    np.testing.assert_allclose(ten[1], one[1], rtol=1e-4, atol=1e-2)


def test_images_without_a_particle_neither_move_templates_nor_count(world):
    y = noisy(world[2])
    junk = SIGMA * np.random.default_rng(5).standard_normal((80, N, N)).astype(np.float32)
    classes = Classes(np.concatenate([y, junk]), SIGMA, 2, 8, seed=1)
    x_hat, evidence = classes.denoise(np.concatenate([y, junk]), SIGMA)
    assert evidence[: len(y)].min() > 0 > evidence[len(y) :].max()
    assert classes.counts.sum() == pytest.approx(len(y), abs=0.5)
    assert np.square(x_hat[len(y) :]).mean() < 1e-3 * np.square(x_hat[: len(y)]).mean()


def test_mirror_images_are_images_of_the_stack(world):
    y = noisy(world[2][:20])
    assert Classes(y, SIGMA, 4, 1, 0, mirrors=True).counts.sum() == pytest.approx(40, abs=0.1)


def test_temperature_1_is_the_default_and_a_high_one_tends_to_the_mean_of_all(world):
    y = noisy(world[2])
    classes = Classes(y, SIGMA, 2, 4, seed=1)
    np.testing.assert_array_equal(classes.denoise(y, SIGMA)[0], classes.denoise(y, SIGMA, 1.0)[0])
    found = classes._weigh(classes.basis.expand(y / SIGMA), 1e6)
    outside = classes.basis.frequencies > 0
    assert float(found.mean[:, outside].abs().max()) < 0.05


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y": np.ones((1, 8, 8))}, "y: expected two images or more, got 1"),
        ({"n_classes": 9}, "n_classes: expected at most 6, one an image, got 9"),
        ({"sigma": 1e3}, "y: expected images that show more than noise"),
        ({"sigma": np.ones(5)}, "sigma: expected the noise's sd"),
        ({"iterations": 0}, "iterations: expected"),
        ({"y": np.ones((6, 8, 9))}, "y: expected"),
    ],
)
def test_bad_input_is_named(change, message):
    y = np.random.default_rng(0).standard_normal((6, 8, 8)).astype(np.float32)
    given = {"y": y, "sigma": 0.5, "n_classes": 2, "iterations": 1, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        Classes(**given)


def test_images_of_another_size_are_refused(world):
    classes = Classes(noisy(world[2]), SIGMA, 2, 1, 0)
    with pytest.raises(ValueError, match=f"images: expected {N} x {N} px"):
        classes.denoise(np.zeros((2, 16, 16), np.float32), SIGMA)
