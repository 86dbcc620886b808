"""A stack on disk goes through a network in batches, and RELION opens what comes out."""

import dataclasses
import shutil
import subprocess
import threading
import time
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from cryo_lib.denoisers import apply
from cryo_lib.denoisers.ofstack import OfStack
from cryo_lib.networks import models
from cryo_lib.simulate import noise, projection, standin
from cryo_lib.simulate.ctf import phase_flip
from cryo_lib.stacks import particles


@pytest.fixture
def stack(tmp_path):
    y = np.random.default_rng(0).normal(0.2, 1, (7, 32, 32)).astype(np.float32)
    path = particles.new(tmp_path / "noisy.star", y, projection.random_rotations(7, 0), 6.4)
    return path, y


def network():
    torch.manual_seed(0)
    return models.ResNetGenerator(32, 4).eval()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_stack_is_the_networks_output_whatever_the_batch(stack, batch_size, tmp_path):
    path, y = stack
    model = network()
    written = apply.denoise_stack(model, path, tmp_path / "denoised.star", batch_size=batch_size)
    with torch.no_grad():
        expected = model(torch.as_tensor(y)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(particles.ParticleStack.open(written).images[:], expected, atol=1e-6)


def test_what_a_model_returns_has_the_images_shape(stack, tmp_path):
    """One image is not taken for the denoised images of a whole batch."""
    with pytest.raises(
        ValueError, match=r"what the model returned of them: expected the same shape, got \(7, 32, 32\)"
    ):
        apply.denoise_stack(lambda y: y.mean(0), stack[0], tmp_path / "mean.star")
    assert not (tmp_path / "mean.star").exists()


def test_rows_and_columns_are_kept_and_only_the_reference_changes(stack, tmp_path):
    before = particles.ParticleStack.open(stack[0]).table
    after = particles.ParticleStack.open(apply.denoise_stack(network(), stack[0], tmp_path / "d.star")).table
    assert list(before) == list(after)
    assert before.drop(columns="rlnImageName").equals(after.drop(columns="rlnImageName"))
    assert after["rlnImageName"].str.contains("d.mrcs").all()


def test_numbers_become_columns_of_the_star_and_nothing_else_has_room_for_them(stack, tmp_path):
    evidence = np.linspace(-3, 3, 7)
    apply.denoise_stack(network(), stack[0], tmp_path / "d.star", columns={"rlnParticleFigureOfMerit": evidence})
    before, after = (particles.ParticleStack.open(path).table for path in (stack[0], tmp_path / "d.star"))
    assert list(after) == [*before, "rlnParticleFigureOfMerit"]
    np.testing.assert_allclose(after["rlnParticleFigureOfMerit"], evidence, atol=1e-6)
    for name, values in (("e.star", evidence[1:]), ("e.mrcs", evidence)):
        with pytest.raises(ValueError, match=f"{name}: new: expected a .star and 7 numbers for it, one a row, got"):
            apply.denoise_stack(network(), stack[0], tmp_path / name, columns={"new": values})


def test_a_project_is_where_references_start_in_and_out(tmp_path):
    """As RELION has it: the star below the project, images relative to the project."""
    y = np.random.default_rng(0).normal(size=(3, 32, 32)).astype(np.float32)
    source = tmp_path / "Extract" / "job001" / "x.star"
    particles.new(source, y, projection.random_rotations(3, 0), 6.4, project=tmp_path)
    out = apply.denoise_stack(lambda y: 2 * y, source, tmp_path / "Denoise" / "d.star", project=tmp_path)
    written = particles.ParticleStack.open(out, project=tmp_path)
    np.testing.assert_allclose(written.images[:], 2 * y)
    assert written.table["rlnImageName"][0] == "000001@Denoise/d.mrcs"


def test_a_pixel_size_by_hand_is_written_so_that_the_stack_opens_again(stack, tmp_path):
    path, _ = stack
    wrong = tmp_path / "wrong.star"
    wrong.write_text(path.read_text().replace("6.400000", "1.000000"))
    with pytest.raises(ValueError, match="expected one pixel size"):
        particles.ParticleStack.open(wrong)
    opened = particles.ParticleStack.open(wrong, pixel_size=6.4)
    denoise = apply.fit(Seen(), CARD, opened, contrast="bright")
    assert particles.ParticleStack.open(apply.denoise_stack(denoise, opened, tmp_path / "d.star")).pixel_size == 6.4


def test_any_function_of_images_is_a_denoiser(stack, tmp_path):
    written = apply.denoise_stack(lambda y: 2 * y, stack[0], tmp_path / "d.star", batch_size=2)
    np.testing.assert_allclose(particles.ParticleStack.open(written).images[:], 2 * stack[1])


def test_a_network_in_training_mode_is_used_in_eval_mode_and_left_as_it_was(stack):
    model = network().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = models.denoise_images(model, stack[1])
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    np.testing.assert_array_equal(first, models.denoise_images(model.eval(), stack[1]))


def test_a_stack_of_another_box_is_refused(stack, tmp_path):
    with pytest.raises(ValueError, match="particles: this network denoises 40 x 40 px images, got 32 x 32"):
        apply.denoise_stack(models.ResNetGenerator(40, 2), stack[0], tmp_path / "d.star")
    assert not (tmp_path / "d.star").exists() and not (tmp_path / "d.mrcs").exists()


def test_each_half_set_goes_through_its_own_network(stack, tmp_path):
    path, y = stack
    written = apply.denoise_stack({1: lambda y: y + 1, 2: lambda y: 2 * y}, path, tmp_path / "d.star", batch_size=3)
    half_sets = particles.ParticleStack.open(path).half_sets
    expected = np.where(half_sets[:, None, None] == 1, y + 1, 2 * y)
    np.testing.assert_array_equal(particles.ParticleStack.open(written).images[:], expected)


def test_half_sets_without_a_network_are_named(stack, tmp_path):
    with pytest.raises(ValueError, match=r"expected the half-sets \[1\], one a model, got \[1, 2\]"):
        apply.denoise_stack({1: network()}, stack[0], tmp_path / "d.star")
    with pytest.raises(ValueError, match=r"expected the half-sets \[1, 2\], one a model, got no rlnRandomSubset"):
        apply.denoise_stack({1: network(), 2: network()}, stack[0].with_suffix(".mrcs"), tmp_path / "d.mrcs")
    with pytest.raises(ValueError, match="this network denoises 40 x 40 px images, got 32 x 32"):
        apply.denoise_stack({1: network(), 2: models.ResNetGenerator(40, 4)}, stack[0], tmp_path / "d.star")


@pytest.mark.skipif(not shutil.which("relion_reconstruct"), reason="needs Debian's package relion")
def test_relion_reconstructs_from_the_denoised_stack(stack, tmp_path):
    apply.denoise_stack(network(), stack[0], tmp_path / "d.star")
    for command in ("relion_image_handler --i d.star --stats", "relion_reconstruct --i d.star --o map.mrc"):
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "handler" not in command or "(x,y,z,n)=32x32x1x1" in done.stdout.replace(" ", ""), done.stdout
    volume = mrcfile.read(tmp_path / "map.mrc")
    assert volume.shape == (32, 32, 32) and np.isfinite(volume).all() and volume.std() > 0


CARD = {"image_size": 32, "pixel_size": 6.4, "background": {"mean": 0.1, "sd": 0.5}}


class Seen(torch.nn.Module):
    """A network that gives back what it sees, and remembers it."""

    image_size = 32

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, y):
        self.last = y.numpy()[:, 0]
        return y


def particle_stack(folder, n=20, box=32, pixel_size=6.4, sign=1.0):
    """Discs, three background sd above (or below) a background of mean 5 and sd 2."""
    y, x = (np.ogrid[-1 : 1 : box * 1j, -1 : 1 : box * 1j][axis] * box * pixel_size / 204.8 for axis in (0, 1))
    images = 5 + sign * 6 * (np.hypot(x, y) < 0.4) + 2 * np.random.default_rng(0).normal(size=(n, box, box))
    written = particles.new(folder / "p.star", images, projection.random_rotations(n, 0), pixel_size)
    return particles.ParticleStack.open(written)


def test_images_are_given_the_grey_scale_that_the_network_was_trained_on(tmp_path):
    stack, model = particle_stack(tmp_path), Seen()
    apply.denoise_stack(apply.fit(model, CARD, stack), stack, tmp_path / "d.star")
    mean, sd = noise.background(model.last)
    np.testing.assert_allclose(mean, 0.1, atol=1e-5)
    np.testing.assert_allclose(sd, 0.5, rtol=1e-4)
    assert model.last[:, 16, 16].mean() == pytest.approx(0.1 + 0.5 * 3, rel=0.2)


def test_what_was_trained_on_copies_has_no_range_of_clean_images(tmp_path):
    """Its references were noisy images, on no scale of [0, 1]: none of its images is broken for leaving that."""
    stack, model = particle_stack(tmp_path), Seen()
    assert apply.fit(model, CARD, stack).grey == (0.0, 1.0)
    assert apply.fit(model, CARD | {"data": {"copies": "odd.star"}}, stack).grey is None


def test_dark_particles_are_refused_or_inverted(tmp_path):
    stack, model = particle_stack(tmp_path, sign=-1.0), Seen()
    with pytest.raises(ValueError, match="expected particles brighter than .*, got dark ones; to invert them, pass"):
        apply.fit(model, CARD, stack)
    apply.fit(model, CARD, stack, contrast="dark")(stack.images[:])
    assert model.last[:, 16, 16].mean() == pytest.approx(0.1 + 0.5 * 3, rel=0.2)


@pytest.mark.parametrize("box, pixel_size", [(48, 6.4), (64, 3.2), (24, 6.4), (80, 3.2)])
def test_another_box_or_pixel_size_is_refused_unless_allowed(tmp_path, box, pixel_size):
    """The network then sees the disc at its own scale, and what comes back has the stack's box and scale."""
    stack, model = particle_stack(tmp_path, box=box, pixel_size=pixel_size), Seen()
    needed = "crop" if (box, pixel_size) == (48, 6.4) else "rescale"
    for less in apply.RESIZES[: apply.RESIZES.index(needed)]:
        message = f"32 x 32 px of 6.4 A, .*, got {box} x {box} px of {pixel_size:g} A; allow resize {needed}"
        with pytest.raises(ValueError, match=message):
            apply.fit(model, CARD, stack, resize=less)
    back = apply.fit(model, CARD, stack, resize=needed)(stack.images[:])
    radius = np.hypot(*np.ogrid[-16:16, -16:16]) * 6.4
    reach = min(32 * 6.4, box * pixel_size) / 2
    inside, ring = model.last[:, radius < 30].mean(), model.last[:, (radius > 55) & (radius < min(90, reach))].mean()
    assert inside - ring > 1.0
    assert back.shape == stack.images.shape
    own = np.hypot(*np.ogrid[-(box // 2) : box - box // 2, -(box // 2) : box - box // 2]) * pixel_size
    np.testing.assert_allclose(back[:, own < 30].mean(), inside, rtol=0.05)


@pytest.mark.parametrize("box, pixel_size", [(32, 6.4), (48, 3.2), (80, 1.1)])
def test_a_network_of_any_pixel_size_sees_the_whole_box(tmp_path, box, pixel_size):
    """The disc takes the same share of the network's box as of the stack's; what comes back lies where it lay."""
    stack, model = particle_stack(tmp_path, box=box, pixel_size=pixel_size), Seen()
    denoiser = apply.fit(model, CARD | {"pixel_size": None}, stack)
    back = denoiser(stack.images[:])
    assert denoiser.grey is None and model.last.shape == (20, 32, 32)
    share = 0.2 * 204.8 / (box * pixel_size)
    for images in (model.last, back):
        n = images.shape[-1]
        inside = np.hypot(*np.ogrid[-n // 2 : n - n // 2, -n // 2 : n - n // 2]) / n
        assert images[:, inside < 0.9 * share].mean() > 0.1 + 0.5 * 2
    np.testing.assert_allclose(noise.background(model.last)[0], 0.1, atol=1e-4)


def test_beyond_the_networks_box_lies_its_background(tmp_path):
    stack = particle_stack(tmp_path, box=48)
    back = apply.fit(Seen(), CARD, stack, resize="crop")(stack.images[:])
    assert np.ptp(back[:, :8], axis=(1, 2)).max() < 1e-6
    np.testing.assert_allclose(back[:, 0, 0], 0.1, atol=1e-4)


def test_what_a_card_or_a_stack_does_not_say_is_asked_for(tmp_path):
    stack = particle_stack(tmp_path)
    with pytest.raises(ValueError, match="card: expected image_size, .* and background, got no background; train it"):
        apply.fit(Seen(), {"image_size": 32, "pixel_size": 6.4}, stack)
    with pytest.raises(ValueError, match="resize: expected one of none, crop, rescale, got 'yes'"):
        apply.fit(Seen(), CARD, stack, resize="yes")
    silent = particles.ParticleStack.open(particles.write(tmp_path / "s.mrcs", stack.images, stack))
    object.__setattr__(silent, "pixel_size", None)
    with pytest.raises(ValueError, match="s.mrcs: expected a pixel size, got none; open it with pixel_size"):
        apply.fit(Seen(), CARD, silent)


def test_a_pixel_size_that_differs_by_a_rounding_changes_no_pixel(tmp_path):
    stack, model = particle_stack(tmp_path, pixel_size=6.42), Seen()
    apply.fit(model, CARD, stack)(stack.images[:])
    assert min(np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(stack.images[:], model.last)) > 0.99999


DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "particles"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data of ../shared, which is absent")
@pytest.mark.parametrize(
    "name, contrast, pixel_size",
    [
        ("rln_proj_65.star", None, 5.0),
        ("rln_proj_65.mrcs", None, 5.0),
        ("sample_particles_relion31.star", None, None),
        ("sample.mrcs", None, 1.4),
        ("empiar_10076_7.star", "dark", None),
        ("empiar_10076_7.mrc", "dark", 1.31),
        ("relion31.star", "dark", None),
        ("relion31.mrcs", "dark", None),
    ],
)
def test_every_real_file_is_denoised(name, contrast, pixel_size, tmp_path):
    """Resampled to the network's grid and back; the rows, the box and the pixel size stay."""
    stack = particles.ParticleStack.open(DATA / name, pixel_size=pixel_size)
    denoise = apply.fit(network(), CARD, stack, resize="rescale", contrast=contrast)
    out = tmp_path / ("d.star" if name.endswith(".star") else "d.mrcs")
    written = particles.ParticleStack.open(apply.denoise_stack(denoise, stack, out), pixel_size=pixel_size)
    assert written.images.shape == stack.images.shape
    assert written.pixel_size == pytest.approx(stack.pixel_size, rel=1e-4)
    assert np.isfinite(written.images[:]).all()
    if out.suffix == ".star":
        assert written.table.drop(columns="rlnImageName").equals(stack.table.drop(columns="rlnImageName"))


class Rows(OfStack):
    """Adds to each image the number of its row."""

    def __call__(self, images, rows=slice(None)):
        return images + np.arange(len(self.stack), dtype=np.float32)[rows][:, None, None]


def test_a_denoiser_of_the_stack_is_told_the_rows_of_each_half_set_too(stack, tmp_path):
    opened = particles.ParticleStack.open(stack[0])
    of = Rows(opened, 32, 6.4, "bright")
    expected = stack[1] + np.arange(7, dtype=np.float32)[:, None, None]
    for model in (of, {0: of}, {1: of, 2: of}):
        written = apply.denoise_stack(model, opened, tmp_path / "d.star", batch_size=3)
        np.testing.assert_array_equal(particles.ParticleStack.open(written).images[:], expected)


class Backwards(Rows):
    """Ends with the first batch after the last one has ended."""

    threads, last = 3, threading.Event()

    def __call__(self, images, rows=slice(None)):
        if 0 in rows:
            assert self.last.wait(timeout=30)
        x_hat = super().__call__(images, rows)
        if 6 in rows:
            self.last.set()
        return x_hat


def test_batches_of_several_threads_are_written_in_the_order_of_the_stack(stack, tmp_path):
    opened = particles.ParticleStack.open(stack[0])
    written = apply.denoise_stack(Backwards(opened, 32, 6.4, "bright"), opened, tmp_path / "d.star", batch_size=3)
    expected = stack[1] + np.arange(7, dtype=np.float32)[:, None, None]
    np.testing.assert_array_equal(particles.ParticleStack.open(written).images[:], expected)


def test_networks_of_several_threads_multiply_as_asked_and_leave_no_trace(stack, tmp_path):
    """The images are those of one thread; passes, of either half-set's, which set how the process multiplies, are in
    turn."""
    seen, alone, opened = [], threading.Lock(), particles.ParticleStack.open(stack[0])

    class Multiplying(models.ResNetGenerator):
        def forward(self, y):
            assert alone.acquire(blocking=False)
            time.sleep(0.02)
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            alone.release()
            return super().forward(y)

    torch.manual_seed(0)
    networks = [Multiplying(32, 4).eval() for _ in range(2)]
    before, written = torch.backends.cuda.matmul.fp32_precision, {}
    for threads in (1, 3):
        fitted = [apply.fit(each, CARD, opened, contrast="bright", precision="tf32") for each in networks]
        for each in fitted:
            each.threads = threads
        out = tmp_path / f"{threads}.star"
        apply.denoise_stack(dict(enumerate(fitted, 1)), opened, out, batch_size=2)
        written[threads] = particles.ParticleStack.open(out).images[:]
    assert set(seen) == {"tf32"} and torch.backends.cuda.matmul.fp32_precision == before
    np.testing.assert_array_equal(written[3], written[1])


def test_what_watches_sees_each_batch_and_fills_columns_that_are_written(stack, tmp_path):
    column, seen = np.zeros(7), []

    def watch(rows, x_hat):
        seen.append((rows.start, rows.stop))
        column[rows] = x_hat.mean(axis=(1, 2))

    given = {"columns": {"rlnParticleSelectZScore": column}, "watch": watch, "batch_size": 3}
    written = apply.denoise_stack(lambda y: 2 * y, stack[0], tmp_path / "d.star", **given)
    assert seen == [(0, 3), (3, 6), (6, 7)]
    table = particles.ParticleStack.open(written).table
    np.testing.assert_allclose(table["rlnParticleSelectZScore"], 2 * stack[1].mean(axis=(1, 2)), atol=1e-5)


def test_references_are_relative_to_the_project(stack, tmp_path):
    written = apply.denoise_stack(lambda y: y, stack[0], tmp_path / "job/d.star", project=tmp_path)
    table = particles.ParticleStack.open(written, project=tmp_path).table
    assert table["rlnImageName"].str.endswith("@job/d.mrcs").all()


def test_a_network_of_flipped_phases_sees_them_flipped_and_no_other_does(tmp_path):
    """The card says it; without a CTF such a network is refused."""
    table = standin.microscope(20, 0)
    y = np.random.default_rng(0).standard_normal((20, 32, 32)).astype(np.float32)
    given = {"spherical_aberration": 2.0, "columns": {label: table[label] for label in particles.DEFOCUS}}
    stack = particles.ParticleStack.open(
        particles.new(tmp_path / "p.star", y, projection.random_rotations(20, 0), 6.4, **given)
    )
    flipped = phase_flip(y, stack.ctf, 6.4)
    rows = np.array([3, 11])
    for card, expected in ((CARD, y), (CARD | {"phase_flipped": False}, y), (CARD | {"phase_flipped": True}, flipped)):
        model = Seen()
        apply.fit(model, card, stack, contrast="bright")(y[rows], rows)
        np.testing.assert_allclose(model.last, 0.1 + 0.5 * noise.standardise(expected[rows], 6.4, 32, 6.4), atol=1e-5)
    bare = dataclasses.replace(stack, table=stack.table.drop(columns="rlnDefocusU"))
    with pytest.raises(ValueError, match="expected a CTF, since this network was trained on images whose phases were"):
        apply.fit(Seen(), CARD | {"phase_flipped": True}, bare, contrast="bright")


def test_checkpoints_become_one_network_or_one_for_each_half_set(stack, tmp_path):
    opened = particles.ParticleStack.open(stack[0])
    card = CARD | {"architecture": "resnet", "width": 4}
    files = [models.save(tmp_path / f"{i}.safetensors", network(), card) for i in (1, 2)]
    for some, halves in ((files[:1], {0}), (files, {1, 2})):
        made = apply.of_checkpoints(some, opened, "cpu", contrast="bright")
        assert set(made) == halves and all(each.n == 32 for each in made.values())
        assert next(iter(made.values())).facts["architecture"] == "resnet"
        apply.denoise_stack(made, opened, tmp_path / "d.star")


def test_progress_is_printed(stack, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(apply, "PRINT_EVERY", -1)
    apply.denoise_stack(network(), stack[0], tmp_path / "d.star", batch_size=3, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("3 of 7 images, ")
