"""The posterior is Bayes's: closed forms of small worlds, turns, evidence, and the bound that maps converge to."""

import numpy as np
import pytest
import torch
from scipy import fft
from scipy.spatial.transform import Rotation

from cryo_lib.denoisers import bound
from cryo_lib.denoisers.posterior import References, choose_temperature, mirrored, posterior_map, posterior_mean
from cryo_lib.denoisers.steerable import Basis
from cryo_lib.denoisers.summing import PosteriorSum, noise_level
from cryo_lib.denoisers.templates import directions
from cryo_lib.evaluate.metrics import psnr
from cryo_lib.simulate.ctf import ctf
from cryo_lib.simulate.projection import project, random_rotations, rescale
from cryo_lib.simulate.standin import microscope
from tests.simulate.blobs import Blobs

N = 32
pytestmark = pytest.mark.usefixtures("one_thread")


def turned(rotations, degrees):
    """Poses whose images are turned in the plane, from x towards y."""
    return rotations @ Rotation.from_rotvec([0, 0, -degrees], degrees=True).as_matrix()


@pytest.fixture(scope="module")
def world():
    """Two volumes, 60 references of each at random poses, and 40 images that are turned references."""
    volumes = [Blobs(N, reach=8, seed=seed).volume() for seed in (0, 1)]
    poses = random_rotations(60, 0)
    references = np.concatenate([rescale(project(volume, poses)) for volume in volumes])
    rng = np.random.default_rng(1)
    chosen, degrees = rng.integers(0, 120, 40), rng.uniform(0, 360, 40)
    x = [rescale(project(volumes[c // 60], turned(poses[[c % 60]], d)))[0] for c, d in zip(chosen, degrees)]
    return volumes, poses, references, np.array(x), chosen, degrees


def noisy(x, sigma, seed=0):
    return x + np.float32(sigma) * np.random.default_rng(seed).standard_normal(x.shape, np.float32)


@pytest.mark.parametrize("n", [32, 33])
def test_coefficients_keep_inner_products_and_give_the_images_back(n):
    x = rescale(project(Blobs(n, reach=8).volume(), random_rotations(20, 3)))
    basis = Basis(x, tolerance=0)
    values = basis.expand(x)
    products = (values @ values.conj().T).real.numpy()
    np.testing.assert_allclose(products, x.reshape(20, -1) @ x.reshape(20, -1).T, rtol=2e-3)
    assert np.abs(basis.images(values) - x).max() < 0.02


@pytest.mark.parametrize("n", [32, 33])
def test_a_turn_is_a_phase(n):
    volume, poses = Blobs(n, reach=8).volume(), random_rotations(4, 0)
    basis = Basis(project(volume, random_rotations(300, 1)), tolerance=1e-6)
    ours = basis.images(basis.turned(basis.expand(project(volume, poses)), torch.full((4,), np.deg2rad(40.0))))
    expected = project(volume, turned(poses, 40.0))
    assert np.abs(ours - expected).max() < 0.02 * expected.max()


@pytest.mark.parametrize("n", [32, 33])
def test_a_mirror_image_is_the_projection_from_the_opposite_side(n):
    volume, poses = Blobs(n, reach=8).volume(), random_rotations(4, 0)
    expected = project(volume, poses @ np.diag([-1.0, 1.0, -1.0]))
    assert np.abs(mirrored(project(volume, poses)) - expected).max() < 1e-3 * expected.max()


def test_mirror_images_are_references_of_their_own(world):
    volume, poses = world[0][0], world[1]
    opposite = rescale(project(volume, turned(poses[:10] @ np.diag([-1.0, 1.0, -1.0]), 50.0)))
    y = noisy(opposite, 0.05)
    found = References(world[2][:60], 1e-6, "cpu", mirrors=True).posterior(y, 0.05)
    assert (found.reference == 60 + np.arange(10)).all()
    gained = psnr(opposite, found.x_hat) - psnr(opposite, posterior_mean(y, world[2][:60], 0.05))
    assert gained.mean() > 3


@pytest.fixture(scope="module")
def turns(world):
    """The first 20 references turned degree by degree, on the grey scale of those not turned."""
    volume, poses = world[0][0], world[1][:20]
    low, high = (getattr(project(volume, poses), end)(axis=(1, 2))[:, None, None, None] for end in ("min", "max"))
    images = np.stack([project(volume, turned(poses, degrees)) for degrees in range(360)], 1)
    return ((images - low) / (high - low)).reshape(-1, N, N)


def brute_force(y, references, sigma, transfer=None):
    """The sum in pixels: the posterior mean, and the mean likelihood over that of noise alone, logarithms."""
    seen = references if transfer is None else fft.irfft2(fft.rfft2(references) * transfer, s=references.shape[1:])
    flat = seen.reshape(len(seen), -1).astype(float)
    logs = (y.reshape(len(y), -1) @ flat.T - 0.5 * np.square(flat).sum(axis=1)) / sigma**2
    weights = np.exp(logs - logs.max(axis=1, keepdims=True))
    mean = np.tensordot(weights / weights.sum(axis=1, keepdims=True), references, axes=1)
    return mean.astype(np.float32), np.log(weights.mean(axis=1)) + logs.max(axis=1)


@pytest.mark.parametrize("sigma", [0.15, 0.6])
def test_the_posterior_is_the_brute_force_sum_to_a_twentieth_of_a_decibel(world, turns, sigma):
    references, x = world[2], world[3]
    y = noisy(x, sigma)
    expected, evidence = brute_force(y, turns, sigma)
    posterior = References(references[:20], 1e-6, "cpu").posterior(y, sigma)
    assert psnr(x, posterior.x_hat).mean() == pytest.approx(psnr(x, expected).mean(), abs=0.05)
    np.testing.assert_allclose(posterior.evidence, evidence, rtol=0.01, atol=0.1)


def test_of_two_references_the_weights_are_logistic_in_the_difference_of_likelihoods():
    """Two discs, which no turn changes: E[x | y] is the closed form of a world of two."""
    y, x = np.mgrid[:N, :N] - N // 2
    discs = np.stack([np.exp(-(np.hypot(x, y) ** 2) / (2 * width**2)) for width in (3.0, 4.0)]).astype(np.float32)
    sigma, seen = 1.0, noisy(np.repeat(discs, 10, axis=0), 1.0)
    posterior = References(discs, tolerance=0, device="cpu").posterior(seen, sigma)
    d = (np.square(seen - discs[0]).sum(axis=(1, 2)) - np.square(seen - discs[1]).sum(axis=(1, 2))) / (2 * sigma**2)
    weight = 1 / (1 + np.exp(-d))
    expected = discs[0] + weight[:, None, None] * (discs[1] - discs[0])
    np.testing.assert_allclose(posterior.x_hat, expected, atol=0.01)


def test_a_quarter_turn_of_the_image_turns_the_estimate(world):
    _, _, references, x, *_ = world
    y, back = noisy(x[:8], 0.3), (-np.arange(N)) % N
    posterior = References(references, 1e-6, "cpu")
    there, after = (posterior.posterior(images, 0.3).x_hat for images in (y, y.transpose(0, 2, 1)[:, :, back]))
    np.testing.assert_allclose(after, there.transpose(0, 2, 1)[:, :, back], atol=0.02)


def test_at_low_noise_reference_angle_and_label_are_found(world):
    _, _, references, x, chosen, degrees = world
    kept = References(references, 1e-6, "cpu")
    total = PosteriorSum(kept.basis, noisy(x, 0.02), 0.02, labels=2)
    for label in (0, 1):
        total.add(kept.coefficients[60 * label : 60 * (label + 1)], label)
    posterior = total.result()
    right = posterior.reference == chosen  # but for views that look the same
    off = (posterior.angle - degrees + 180) % 360 - 180
    assert right.mean() > 0.85 and np.abs(off[right]).max() < 2.5 and psnr(x, posterior.x_hat).mean() > 40
    assert (posterior.labels.argmax(1) == chosen // 60).all()
    np.testing.assert_allclose(posterior.labels.sum(1), 1, rtol=1e-5)


def test_the_sum_does_not_depend_on_the_parts_that_it_is_taken_in(world):
    _, _, references, x, *_ = world
    kept, y = References(references, 1e-6, "cpu"), noisy(x, 0.4)
    total = PosteriorSum(kept.basis, y, 0.4)
    for part in kept.coefficients.split(7):
        total.add(part)
    whole, parts = kept.posterior(y, 0.4), total.result()
    np.testing.assert_allclose(parts.x_hat, whole.x_hat, atol=1e-4)
    np.testing.assert_allclose(parts.evidence, whole.evidence, atol=1e-3)
    assert (parts.reference == whole.reference).all()


@pytest.mark.parametrize("sigma", [0.05, 0.4, 3.0])
def test_what_is_left_out_matters_to_nothing(world, sigma):
    """References that the bound discards, against every pair; and the sum as a GPU takes it, which leaves out none."""
    _, _, references, x, *_ = world
    kept, y = References(references, 1e-6, "cpu"), noisy(x, sigma)
    order = torch.randperm(120)
    sums = [PosteriorSum(kept.basis, y, sigma) for _ in range(3)]
    sums[2].everything = True
    for part in kept.coefficients[order].split(40):
        discarded = [total.add(part, scores=scores) for total, scores in zip(sums, (True, False, False))][1]
        assert discarded is None
    exact = sums[0].result()
    for total in sums[1:]:
        result = total.result()
        np.testing.assert_allclose(result.x_hat, exact.x_hat, atol=1e-4)
        np.testing.assert_allclose(result.evidence, exact.evidence, rtol=1e-4, atol=1e-3)
        assert (result.reference == exact.reference).all() and (total.numbers == sums[0].numbers).float().mean() > 0.99
        torch.testing.assert_close(total.likelihoods, sums[0].likelihoods, rtol=1e-4, atol=1e-3)


def test_no_bit_depends_on_how_many_threads_there_are(world):
    kept, y, found = References(world[2], 1e-6, "cpu"), noisy(world[3], 0.4), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(kept.posterior(y, 0.4).x_hat)
        assert torch.get_num_threads() == threads
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
def test_on_a_gpu_the_sum_is_that_of_the_cpu_and_waits_for_nothing(world):
    references, y = world[2], noisy(world[3], 0.4)
    kept = References(references, 1e-6, "cuda")
    total = PosteriorSum(kept.basis, y, 0.4)
    total.add(kept.coefficients[:60], scores=False)
    torch.cuda.set_sync_debug_mode("error")
    try:
        total.add(kept.coefficients[60:], scores=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = References(references, 1e-6, "cpu").posterior(y, 0.4)
    np.testing.assert_allclose(total.result().x_hat, expected.x_hat, atol=1e-3)
    np.testing.assert_allclose(total.result().evidence, expected.evidence, rtol=1e-3, atol=0.01)


@pytest.mark.parametrize(("sigma", "least", "most"), [(0.05, 0.1, 0.7), (3.0, 1, 1)])
def test_few_pairs_are_transformed_where_there_is_little_noise(world, sigma, least, most):
    volumes, _, _, x, *_ = world
    kept = References(rescale(project(volumes[0], random_rotations(600, 5))), 1e-6, "cpu")
    total, count = PosteriorSum(kept.basis, noisy(x, sigma), sigma), []
    whole = total._of_angles
    total._of_angles = lambda products, room: (count.append(len(products)), whole(products, room))[1]
    for part in kept.coefficients.split(100):
        total.add(part, scores=False)
    assert least <= sum(count) / (600 * 40) <= most


def moved(images, shift):
    """Images moved by whole pixels (x, y)."""
    return np.roll(images, (shift[1], shift[0]), axis=(1, 2))


def test_shifts_are_those_of_the_brute_force_sum(world, turns):
    references, x = world[2][:20], world[3][:12]
    rng = np.random.default_rng(4)
    grid = [(i, j) for i in (-2, 0, 2) for j in (-2, 0, 2) if abs(i) + abs(j) < 4]
    chosen = rng.integers(0, len(grid), len(x))
    x = np.concatenate([moved(each[None], grid[c]) for each, c in zip(x, chosen)])
    for sigma in (0.15, 0.6):
        y = noisy(x, sigma)
        expected, evidence = brute_force(y, np.concatenate([moved(turns[::2], shift) for shift in grid]), sigma)
        posterior = References(references, 1e-6, "cpu").posterior(y, sigma, shifts=(2, 2))
        assert psnr(x, posterior.x_hat).mean() == pytest.approx(psnr(x, expected).mean(), abs=0.05)
        np.testing.assert_allclose(posterior.evidence, evidence, rtol=0.01, atol=0.1)
        centred = posterior_mean(y, references, sigma)
        np.testing.assert_array_equal(posterior_mean(y, references, sigma, shifts=(0, 1)), centred)
    assert not References(references, 1e-6, "cpu").posterior(y, sigma).shift.any()


def test_maps_find_the_shift_of_each_image(world):
    volume, poses = world[0][0], world[1][:10]
    shifts = np.random.default_rng(3).integers(-2, 3, (10, 2)).astype(float)
    x = rescale(project(volume, poses, shifts))
    given = {"coarse": 200, "levels": 1}
    found = posterior_map(noisy(x, 0.1), [volume], 0.1, shifts=(3, 1), **given)
    assert np.abs(found.shift - shifts).mean() < 0.4
    centred = posterior_map(noisy(x, 0.1), [volume], 0.1, **given)
    assert psnr(x, found.x_hat).mean() > psnr(x, centred.x_hat).mean() + 3


def test_the_evidence_tells_particles_from_noise_alone(world):
    _, _, references, x, *_ = world
    kept, sigma = References(references, 1e-6, "cpu"), 0.6
    particles, noise = (kept.posterior(noisy(images, sigma, 5), sigma).evidence for images in (x, 0 * x))
    assert particles.min() > 0 > noise.max()


def test_the_noise_level_is_estimated_where_no_particle_is(world):
    x = world[3]
    assert noise_level(noisy(x, 0.4)).mean() == pytest.approx(0.4, rel=0.02)


def test_ctf_and_coloured_noise_are_those_of_the_brute_force_sum(world, turns):
    """A transfer function and a spectrum that depend on the ring alone, for which the sum is exact."""
    references, x = world[2][:20], world[3]
    k = np.hypot(fft.fftfreq(N)[:, None], fft.rfftfreq(N))
    transfer, ring = np.cos(12 * k**2).astype(np.float32), np.rint(k * N).astype(int)
    spectrum = 1 + 3 * np.exp(-np.arange(N // 2 + 1) / 3.0)
    colour = np.sqrt(np.interp(ring, np.arange(N // 2 + 1), spectrum))
    noise = fft.irfft2(fft.rfft2(noisy(0 * x, 0.3, 2)) * colour, s=x.shape[1:])
    y = fft.irfft2(fft.rfft2(x) * transfer, s=x.shape[1:]) + noise
    given = {"transfer": np.repeat(transfer[None], len(y), 0), "spectrum": spectrum}
    ours = References(references, 1e-6, "cpu").posterior(y, 0.3, **given).x_hat
    white = fft.irfft2(fft.rfft2(y) / colour, s=x.shape[1:])
    expected, _ = brute_force(white, turns, 0.3, transfer / colour)
    assert psnr(x, ours).mean() == pytest.approx(psnr(x, expected).mean(), abs=0.1)
    assert psnr(x, ours).mean() > psnr(x, posterior_mean(y, references, 0.3)).mean()


def test_between_sparse_references_a_local_model_is_better_where_there_is_little_noise(world):
    """The temperature is chosen on validation pairs: above 1 there, and 1 where the noise is strong."""
    volumes = world[0]
    references = rescale(project(volumes[0], random_rotations(300, 7)))
    kept = References(references, 1e-6, "cpu")
    (x_val, x) = (rescale(project(volumes[0], random_rotations(30, seed))) for seed in (8, 9))
    for sigma, warm in ((0.05, True), (1.0, False)):
        chosen = choose_temperature(kept, x_val, noisy(x_val, sigma, 3), sigma)
        assert (chosen > 1) == warm
        plain, local = (psnr(x, kept.posterior(noisy(x, sigma, 4), sigma, t).x_hat).mean() for t in (1.0, chosen))
        assert local > plain + 0.5 if warm else local == plain


def test_directions_are_even_and_follow_the_seed():
    points = directions(500, 0)[:, :, 2]
    nearest = np.sort(np.arccos(np.clip(points @ points.T, -1, 1)), axis=1)[:, 1]
    assert nearest.min() > 0.6 * np.sqrt(4 * np.pi / 500) and np.abs(points.mean(0)).max() < 0.01
    np.testing.assert_array_equal(directions(500, 0), directions(500, 0))
    assert not np.allclose(directions(500, 0), directions(500, 1))


def test_the_bound_grows_with_its_templates_and_maps_converge_to_it(world):
    volumes, x, chosen = world[0], world[3], world[4]
    for sigma in (0.2, 0.6):
        y = noisy(x, sigma, 6)
        steps = list(bound.growth(y, volumes, sigma, 4000, 0, doublings=2))
        assert [count for count, _ in steps] == [1000, 2000, 4000]
        values = [psnr(x, each.x_hat).mean() for _, each in steps]
        assert values[-1] > values[0] - 0.05
        mapped = posterior_map(y, volumes, sigma, coarse=200, levels=2)
        assert psnr(x, mapped.x_hat).mean() > values[-1] - 0.3
    assert mapped.labels.shape == (40, 2) and (mapped.labels.argmax(1) == chosen // 60).mean() > 0.7
    np.testing.assert_allclose(bound.bayes_mean(y, volumes, sigma, 400, 3).shape, x.shape)


def test_with_a_ctf_maps_converge_to_its_bound_and_beat_those_without(world):
    volumes, x = world[0], world[3]
    names = ("DefocusAngle", "PhaseShift", "SphericalAberration", "AmplitudeContrast", "CtfBfactor")
    parameters = {f"rln{name}": np.full(40, value) for name, value in zip(names, (20.0, 0.0, 2.7, 0.1, 0.0))}
    parameters |= {"rlnVoltage": np.full(40, 300.0), "rlnCtfScalefactor": np.ones(40)}
    defocus = np.random.default_rng(5).uniform(8000, 20000, 40)
    transfer = ctf(parameters | {"rlnDefocusU": defocus + 300, "rlnDefocusV": defocus}, N, 5.0)
    y = noisy(fft.irfft2(fft.rfft2(x) * transfer, s=x.shape[1:]), 0.2, 6)
    given = {"transfer": transfer, "spectrum": np.ones(N // 2 + 1)}
    ((_, best),) = bound.growth(y, volumes, 0.2, 2000, 0, doublings=0, **given)
    ours = posterior_map(y, volumes, 0.2, coarse=200, levels=2, **given)
    assert psnr(x, ours.x_hat).mean() > psnr(x, best.x_hat).mean() - 0.3
    ignorant = bound.bayes_mean(y, volumes, 0.2, 1000, 0)
    assert psnr(x, ours.x_hat).mean() > psnr(x, ignorant).mean() + 1


def test_a_map_gives_the_pose_of_each_image(world):
    volumes, poses, _, x, chosen, degrees = world
    first = chosen < 60
    found = posterior_map(noisy(x[first], 0.1), volumes[:1], 0.1, coarse=200, levels=2).rotations
    truth = np.concatenate([turned(poses[[c]], d) for c, d in zip(chosen[first], degrees[first])])
    errors = Rotation.from_matrix(truth.transpose(0, 2, 1) @ found).magnitude()
    assert np.rad2deg(np.median(errors)) < 4


def test_the_temperature_is_that_of_the_least_loss_and_references_are_summed_once(world, monkeypatch):
    _, _, references, x, *_ = world
    kept, y, added = References(references, 1e-6, "cpu"), noisy(x, 0.1), []
    add = PosteriorSum.add
    monkeypatch.setattr(PosteriorSum, "add", lambda self, *given, **named: added.append(add(self, *given, **named)))
    chosen = choose_temperature(kept, x, y, 0.1, among=(1.0, 3.0, 9.0))
    assert len(added) == 1
    losses = [np.log(np.square(kept.posterior(y, 0.1, t).x_hat - x).mean(axis=(1, 2))).mean() for t in (1.0, 3.0, 9.0)]
    assert chosen == (1.0, 3.0, 9.0)[int(np.argmin(losses))]


@pytest.mark.parametrize(
    "change", [lambda y: 10 * y, lambda y: y + 5, lambda y: -y, lambda y: 0.02 * y, lambda y: 1 - y]
)
def test_another_grey_scale_is_named(world, change):
    volumes, _, references, x, *_ = world
    y = change(noisy(x, 0.1))
    sigma = float(noise_level(y).mean())
    for work in (lambda: posterior_mean(y, references, sigma), lambda: posterior_map(y, volumes, sigma, coarse=50)):
        with pytest.raises(ValueError, match="y: expected images on the grey scale of the references, got a median"):
            work()


def test_inverted_images_are_named_through_a_ctf_and_an_offset_of_others_is_not_taken_for_it(world):
    volumes, _, _, x, *_ = world
    transfer = ctf(microscope(len(x), 0), N, 8.0)
    y = noisy(fft.irfft2(fft.rfft2(x) * transfer, s=x.shape[1:]), 0.1)
    given = {"transfer": transfer, "spectrum": np.linspace(1.5, 0.5, N // 2 + 1), "coarse": 50}
    with pytest.raises(ValueError, match="times their mean, beside an offset, of which"):
        posterior_map(0.16 - y, volumes, 0.1, **given)
    assert np.isfinite(posterior_map(y + 0.02, volumes, 0.1, **given).x_hat).all()


def test_contaminated_stacks_and_strong_noise_are_on_the_grey_scale(world):
    _, _, references, x, *_ = world
    kept = References(references, 1e-6, "cpu")
    for seen, sigma in ((noisy(x, 5.0), 5.0), (noisy(np.concatenate([x[:12], 0 * x[:20], 20 * x[:5]]), 0.3), 0.3)):
        assert np.isfinite(kept.posterior(seen, sigma).x_hat).all()
    for each in noisy(x, 0.3)[:5]:
        kept.posterior(each[None], 0.3)


@pytest.mark.parametrize("sigma", [0, -1.0, np.nan, np.inf, None, "white", np.ones(3)])
def test_a_noise_level_that_is_none_is_named(world, sigma):
    with pytest.raises(ValueError, match="sigma: expected the noise's sd, one finite number > 0 or 40, got"):
        posterior_mean(world[3], world[2], sigma)
    with pytest.raises(ValueError, match="sigma: expected the noise's sd, one finite number > 0 or 40, got"):
        posterior_map(world[3], world[0], sigma, coarse=10)


def test_what_does_not_go_together_is_named(world):
    _, _, references, x, *_ = world
    kept = References(references, 1e-6, "cpu")
    with pytest.raises(ValueError, match="images: expected 32 x 32 px, as the references, got 16"):
        kept.posterior(x[:, 8:24, 8:24], 0.1)
    with pytest.raises(ValueError, match="transfer: expected one for each of 40 images or one for all, got"):
        kept.posterior(x, 0.1, transfer=np.ones((3, N, N // 2 + 1)))
    with pytest.raises(ValueError, match="transfer: expected finite values of shape"):
        kept.posterior(x, 0.1, transfer=np.ones((40, N, N)))
    with pytest.raises(ValueError, match="spectrum: expected 17 finite powers > 0"):
        kept.posterior(x, 0.1, spectrum=np.zeros(17))
    with pytest.raises(ValueError, match="temperature: expected 1 with a transfer, a spectrum or shifts, got 2"):
        kept.posterior(x, 0.1, 2.0, spectrum=np.ones(17))
    with pytest.raises(ValueError, match="references: expected one or more, got none"):
        PosteriorSum(kept.basis, x, 0.1).result()
    with pytest.raises(ValueError, match="references: expected images of shape .* got .0, 32, 32"):
        posterior_mean(x, references[:0], 0.1)
    with pytest.raises(ValueError, match="references: expected images that show something, got 3 that are 0"):
        posterior_mean(x, 0 * references[:3], 0.1)
    with pytest.raises(ValueError, match="x, y: expected two or more pairs of one size, got shapes .1, 32, 32"):
        choose_temperature(kept, x[:1], x[:1], 0.1)
    with pytest.raises(ValueError, match="y: expected noise outside the particle, got none in 1 of 2 images"):
        noise_level(np.stack([noisy(x, 0.1)[0], np.zeros((N, N))]))
    with pytest.raises(ValueError, match="shifts: expected less than half of the box of 32 px"):
        kept.posterior(x, 0.1, shifts=(16, 4))
    with pytest.raises(ValueError, match="shifts: expected reach and step, px, such as"):
        kept.posterior(x, 0.1, shifts=4)
    with pytest.raises(ValueError, match="volumes: expected one or more, got none"):
        posterior_map(x, [], 0.1)
