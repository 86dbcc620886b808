"""cryoDRGN reads what we write as we mean it: poses, shifts, CTF and contrast; and what is wrong is said."""

from __future__ import annotations

import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cryo_lib.evaluate import cryodrgn, reconstruction
from cryo_lib.simulate import density, projection
from cryo_lib.simulate.ctf import apply_ctf
from cryo_lib.simulate.phantom import phantom
from cryo_lib.stacks import particles
from cryo_lib.stacks.mrc import read_map
from cryo_lib.stacks.particles import ParticleStack

BOX, PIXEL, N = 32, 6.4, 200
PROGRAM = Path(__file__).resolve().parents[2] / cryodrgn.PROGRAM
needs_cryodrgn = pytest.mark.skipif(not PROGRAM.is_file(), reason="cryoDRGN is not installed (make cryodrgn)")


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return density.density(phantom(2)[0], BOX, PIXEL, 2.5 * PIXEL)


@pytest.fixture(scope="module")
def star(tmp_path_factory, volume) -> Path:
    """Clean images off the centre, by whole and by broken pixels, through the CTF."""
    path, rng = tmp_path_factory.mktemp("stack") / "particles.star", np.random.default_rng(1)
    rotations, shifts = projection.random_rotations(N, 2), rng.normal(0, 2, (N, 2))
    defocus = rng.uniform(8000, 30000, N)
    columns = {"rlnDefocusU": defocus, "rlnDefocusV": defocus - 800, "rlnDefocusAngle": 30.0, "rlnPhaseShift": 10.0}
    x, options = projection.project(volume, rotations, shifts), {"shifts": shifts * PIXEL, "columns": columns}
    particles.new(path, x, rotations, PIXEL, **options)
    return particles.new(path, apply_ctf(x, ParticleStack.open(path).ctf, PIXEL), rotations, PIXEL, **options)


def unpickled(path: Path):
    with open(path, "rb") as file:
        return pickle.load(file)


def command(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


# ---- without cryoDRGN --------------------------------------------------------------------------------------


def test_the_inputs_by_their_closed_form(tmp_path):
    """A quarter turn in the plane; an image that lies 3 px to the right and 1 px up of a box of 8."""
    rotation = projection.rotation_from_euler(0.0, 0.0, 90.0)
    columns = {"rlnDefocusU": 12000.0, "rlnDefocusV": 11000.0, "rlnDefocusAngle": 20.0}
    images = np.random.default_rng(0).standard_normal((1, 8, 8)).astype(np.float32)
    path = particles.new(tmp_path / "a.star", images, rotation, 2.0, shifts=[[6.0, -2.0]], columns=columns)
    inputs = cryodrgn.write_inputs(ParticleStack.open(path), tmp_path / "in")
    rotations, translations = unpickled(inputs.poses)
    # a point on the image's x axis, as the row (1, 0, 0), is turned by this matrix from the right
    assert np.allclose(np.array([1.0, 0.0, 0.0]) @ rotations[0], rotation[0] @ [1.0, 0.0, 0.0])
    assert np.allclose(translations, [[-3 / 8, 1 / 8]])
    expected = [8, 2.0, 12000, 11000, 20, 300, 2.26, 0.1, 0]
    assert np.allclose(unpickled(inputs.ctf), [expected]) and unpickled(inputs.ctf).dtype == np.float32
    assert np.array_equal(ParticleStack.open(inputs.particles).images[:], images)


def test_bright_images_are_inverted_where_they_have_a_ctf_and_only_there(star, tmp_path):
    stack = ParticleStack.open(star)
    with_ctf = cryodrgn.write_inputs(stack, tmp_path / "with").arguments
    without = cryodrgn.write_inputs(stack, tmp_path / "without", ctf=False).arguments
    assert "--ctf" in with_ctf and "--uninvert-data" not in with_ctf
    assert "--uninvert-data" in without and "--ctf" not in without and not (tmp_path / "without/ctf.pkl").exists()


@pytest.mark.parametrize("damage", ["poses", "box", "b_factor"])
def test_a_stack_that_cannot_be_handed_over_is_refused(star, tmp_path, damage):
    stack, path = ParticleStack.open(star), tmp_path / "a.star"
    if damage == "poses":
        path, message = particles.write(tmp_path / "a.mrcs", stack.images[:], like=stack), "known poses, got no rlnAng"
    elif damage == "box":
        message = "even, square box, got 31 x 31"
        particles.new(path, stack.images[:][:, 1:, 1:], stack.poses.rotations, PIXEL)
    else:
        message = "expected rlnCtfBfactor 0"
        particles.write(path, stack.images[:], like=stack, columns={"rlnCtfBfactor": np.full(N, 50.0)})
    with pytest.raises(ValueError, match=message):
        cryodrgn.write_inputs(ParticleStack.open(path), tmp_path / "in")
    assert not (tmp_path / "in/particles.mrcs").exists()


def test_a_missing_program_is_named_with_the_way_to_it(star, tmp_path):
    inputs = cryodrgn.write_inputs(ParticleStack.open(star), tmp_path)
    with pytest.raises(cryodrgn.CryodrgnMissing, match=r"build/none/cryodrgn: .* `make cryodrgn` installs it"):
        cryodrgn.train(inputs, tmp_path / "out", "build/none/cryodrgn")


def test_a_failing_program_is_quoted_and_its_log_named(star, tmp_path):
    inputs = cryodrgn.write_inputs(ParticleStack.open(star), tmp_path)
    failing = command(tmp_path / "failing", "echo started; echo 'ValueError: no such thing' >&2; exit 3")
    with pytest.raises(cryodrgn.CryodrgnError) as error:
        cryodrgn.train(inputs, tmp_path / "out", failing)
    log = tmp_path / "out/train_vae.failed.log"
    assert "exit code 3" in str(error.value) and "ValueError: no such thing" in str(error.value)
    assert str(log) in str(error.value) and log.read_text().splitlines()[0].startswith(f"{failing} train_vae ")


def test_a_program_that_leaves_its_output_out_has_failed_even_where_an_older_one_lies_there(star, tmp_path):
    inputs = cryodrgn.write_inputs(ParticleStack.open(star), tmp_path)
    (tmp_path / "z.pkl").write_bytes(pickle.dumps(np.zeros((N, 2))))
    with pytest.raises(cryodrgn.CryodrgnError, match="exit code 0, but no z.pkl"):
        cryodrgn.train(inputs, tmp_path, command(tmp_path / "lazy", "exit 0"))


def test_a_training_that_is_done_is_not_run_again_and_one_that_failed_is(star, tmp_path):
    """Another setting or other images are another training."""
    inputs, out = cryodrgn.write_inputs(ParticleStack.open(star), tmp_path / "in"), tmp_path / "out"
    makes = f"cd {out}; echo x >> runs; touch z.pkl weights.pkl config.yaml; test ! -e {tmp_path}/broken"
    program, runs = command(tmp_path / "program", makes), []
    for epochs, broken, changed in ((1, 0, 0), (1, 0, 0), (2, 0, 0), (2, 0, 1), (3, 1, 0), (3, 0, 0)):
        if changed:
            inputs.poses.write_bytes(pickle.dumps("others"))
        if broken:
            (tmp_path / "broken").touch()
            with pytest.raises(cryodrgn.CryodrgnError, match="exit code 1"):
                cryodrgn.train(inputs, out, program, epochs=epochs)
            (tmp_path / "broken").unlink()
        else:
            cryodrgn.train(inputs, out, program, epochs=epochs)
        runs.append(len((out / "runs").read_text().split()))
    assert runs == [1, 1, 2, 3, 4, 5]


def test_a_damaged_latent_and_points_of_another_dimension_are_refused(tmp_path):
    (tmp_path / "z.pkl").write_bytes(pickle.dumps(np.zeros((N, 2)))[:40])
    with pytest.raises(cryodrgn.CryodrgnError, match="expected what train_vae writes"):
        cryodrgn.latent(tmp_path)
    (tmp_path / "z.pkl").write_bytes(pickle.dumps(np.zeros((N, 2))))
    with pytest.raises(ValueError, match=r"z: expected finite points of shape \(m, 2\)"):
        cryodrgn.volumes(tmp_path, np.zeros((1, 3)), PIXEL, command(tmp_path / "never", "exit 1"))


# ---- with cryoDRGN -----------------------------------------------------------------------------------------


@needs_cryodrgn
def test_poses_and_ctf_are_what_its_own_parser_makes_of_our_star_file(star, tmp_path):
    inputs = cryodrgn.write_inputs(ParticleStack.open(star), tmp_path)
    for ours, parse in ((inputs.poses, "parse_pose_star"), (inputs.ctf, "parse_ctf_star")):
        subprocess.run([PROGRAM, parse, star, "-o", tmp_path / f"{parse}.pkl"], check=True, capture_output=True)
        for mine, theirs in zip(unpickled(ours), unpickled(tmp_path / f"{parse}.pkl"), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


@needs_cryodrgn
def test_its_back_projection_of_our_inputs_is_the_volume_bright_and_of_our_hand(star, volume, tmp_path):
    """Rotations, shifts, the CTF's sign and the contrast at once; the mirror image would agree in no fine shell."""
    inputs = cryodrgn.write_inputs(ParticleStack.open(star), tmp_path)
    words = [PROGRAM, "backproject_voxel", *inputs.arguments, "-o", tmp_path / "out", "--no-half-maps"]
    subprocess.run(words, check=True, capture_output=True)
    found, _ = read_map(tmp_path / "out/backproject.mrc")
    curve = reconstruction.fsc(found, volume)
    assert curve[2:12].min() > 0.9
    assert reconstruction.fsc(found[::-1], volume)[6:12].max() < 0.5


@needs_cryodrgn
def test_a_training_and_its_volumes(star, tmp_path):
    """A point of the latent space for each image, not all the same; and volumes on our grid."""
    inputs = cryodrgn.write_inputs(ParticleStack.open(star), tmp_path)
    options = {"zdim": 2, "epochs": 1, "width": 16, "layers": 1, "rate": 1e-3}
    z = cryodrgn.latent(cryodrgn.train(inputs, tmp_path / "out", PROGRAM, **options))
    assert z.shape == (N, 2) and z.std(axis=0).min() > 0
    found = cryodrgn.volumes(tmp_path / "out", z[:2], PIXEL, PROGRAM)
    assert found.shape == (2, BOX, BOX, BOX) and np.isfinite(found).all()
    assert cryodrgn.version(PROGRAM).startswith("4.")
