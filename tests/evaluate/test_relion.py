"""RELION's programs on our star files: they run, agree with the truth, and say what is wrong where it is."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import starfile

from cryo_lib.evaluate import relion
from cryo_lib.simulate import density, noise, projection
from cryo_lib.simulate.ctf import apply_ctf
from cryo_lib.simulate.phantom import phantom
from cryo_lib.stacks import particles
from cryo_lib.stacks.mrc import write_map
from cryo_lib.stacks.particles import ParticleStack

BOX, PIXEL, DIAMETER, N = 32, 6.4, 190.0, 200
needs_relion = pytest.mark.skipif(
    shutil.which("relion_refine_mpi") is None or shutil.which("mpirun") is None,
    reason="RELION is not installed (Debian package relion)",
)


def read_map(path: Path) -> np.ndarray:
    with mrcfile.open(path, permissive=True) as mrc:
        return mrc.data.astype(float)


def low_passed(volume: np.ndarray, resolution: float) -> np.ndarray:
    k = np.fft.fftfreq(BOX, PIXEL)
    keep = k[:, None, None] ** 2 + k[:, None] ** 2 + k**2 < resolution**-2
    return np.fft.ifftn(np.fft.fftn(volume) * keep).real


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of two maps inside the particle's sphere: outside, RELION's gridding correction makes the corners anything."""
    axis = (np.arange(BOX) - BOX // 2) * PIXEL
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < (DIAMETER / 2) ** 2
    return float(np.corrcoef(a[inside], b[inside])[0, 1])


@dataclass(frozen=True)
class Simulated:
    volume: np.ndarray
    rotations: np.ndarray
    clean: Path
    noisy: Path
    reference: Path


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Simulated:
    folder = tmp_path_factory.mktemp("simulated")
    volume = density.density(phantom(2)[0], BOX, PIXEL, 2.5 * PIXEL)
    x, rotations, _ = projection.simulate([volume], N, 1)
    stars = []
    for name, images in (("clean", x), ("noisy", noise.add_noise(x, 1.0, 2))):
        stars.append(particles.new(folder / f"{name}.star", images, rotations, PIXEL, columns={"rlnClassNumber": 1}))
    return Simulated(volume, rotations, *stars, write_map(folder / "reference.mrc", low_passed(volume, 40.0), PIXEL))


@pytest.fixture(scope="module")
def with_ctf(simulated) -> Path:
    """The clean images through the CTF of defocus values that leave no frequency unseen."""
    clean, star = ParticleStack.open(simulated.clean), simulated.clean.with_name("with_ctf.star")
    defocus = np.random.default_rng(3).uniform(8000, 30000, N)
    columns = {"rlnDefocusU": defocus, "rlnDefocusV": defocus - 500, "rlnDefocusAngle": 30.0, "rlnPhaseShift": 10.0}
    particles.new(star, clean.images, simulated.rotations, PIXEL, columns=columns)
    seen = apply_ctf(clean.images[:], ParticleStack.open(star).ctf, PIXEL)
    return particles.new(star, seen, simulated.rotations, PIXEL, columns=columns)


# ---- without RELION ----------------------------------------------------------------------------------------


def test_missing_relion_says_how_to_get_it(simulated, tmp_path, monkeypatch):
    star = relion.prepare(simulated.noisy, tmp_path, DIAMETER)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(relion.RelionMissing, match=r"relion_refine: .*on PATH.*apt-get install relion.*module"):
        relion.version()
    with pytest.raises(relion.RelionMissing, match=r"relion_refine: "):
        relion.initial_model(tmp_path, star, DIAMETER)
    with pytest.raises(relion.RelionMissing, match=r"(mpirun|relion_refine_mpi): "):
        relion.auto_refine(tmp_path, star, simulated.reference, DIAMETER)
    assert not list(tmp_path.glob("[!p]*.log"))  # nothing was begun


@pytest.mark.parametrize("name", ["clean", "noisy"])
def test_prepare_scales_by_the_stacks_background_and_hides_the_truth(simulated, tmp_path, name):
    source = ParticleStack.open(getattr(simulated, name))
    star = relion.prepare(source.path, tmp_path, DIAMETER)
    stack = ParticleStack.open(star)
    assert list(stack.table) == ["rlnImageName", "rlnOpticsGroup"] and stack.poses is None
    assert stack.pixel_size == pytest.approx(PIXEL)
    axis = (np.arange(BOX) - BOX // 2) * PIXEL
    outside = stack.images[:][:, np.hypot(axis[:, None], axis) > DIAMETER / 2]
    np.testing.assert_allclose(outside.mean(axis=1), 0, atol=1e-3)
    assert outside.std() == pytest.approx(1, abs=0.01)
    for before, after in zip(source.images[:5], stack.images[:5]):  # the same factor for every image, and order kept
        assert after.std() / before.std() == pytest.approx(stack.images[0].std() / source.images[0].std(), rel=1e-4)
        assert np.corrcoef(before.ravel(), after.ravel())[0, 1] > 0.9999


def test_prepare_is_not_repeated_for_the_same_particles(simulated, tmp_path):
    star = relion.prepare(simulated.noisy, tmp_path, DIAMETER)
    before = star.stat().st_mtime_ns
    assert relion.prepare(simulated.noisy, tmp_path, DIAMETER).stat().st_mtime_ns == before
    relion.prepare(simulated.clean, tmp_path, DIAMETER)
    assert star.stat().st_mtime_ns > before


def test_a_selection_keeps_rows_and_is_not_written_twice(simulated, tmp_path):
    star = relion.prepare(simulated.noisy, tmp_path, DIAMETER)
    chosen = relion.select(tmp_path, star, np.arange(N) % 3 == 0)
    before = chosen.stat().st_mtime_ns
    assert ParticleStack.open(chosen).table["rlnImageName"].str[:6].astype(int).tolist() == list(range(1, N + 1, 3))
    assert relion.select(tmp_path, star, range(0, N, 3)).stat().st_mtime_ns == before
    assert len(ParticleStack.open(relion.select(tmp_path, star, [5]))) == 1
    with pytest.raises(ValueError, match=f"rows: expected some of the {N} particles of .*, got none"):
        relion.select(tmp_path, star, [])


def test_prepare_refuses_what_relion_would_take_silently(simulated, tmp_path):
    images = ParticleStack.open(simulated.noisy).images[:]
    with pytest.raises(ValueError, match="particle_diameter: expected at most the box .* 204.8 A, got 300 A; give A"):
        relion.prepare(simulated.noisy, tmp_path / "a", 300.0)
    with pytest.raises(ValueError, match="particle_diameter: "):
        relion.prepare(simulated.noisy, tmp_path / "a", -1)
    dark = particles.new(tmp_path / "dark.star", -images, simulated.rotations, PIXEL)
    with pytest.raises(ValueError, match="expected bright protein.*got dark; multiply"):
        relion.prepare(dark, tmp_path / "a", DIAMETER)


def test_ctf_is_the_callers_choice(simulated, with_ctf, tmp_path):
    choice = r"with_ctf\.star: expected a choice of ctf .*, got None; pass ctf=True where .*or ctf=False where"
    for star, ctf, message in (
        (with_ctf, None, choice),
        (simulated.noisy, True, r"noisy\.star: expected rlnDefocusU, .* for ctf=True, got no such"),
        (with_ctf, "false", "ctf: expected one of None, True, False, got 'false'"),
    ):
        with pytest.raises(ValueError, match=message):
            relion.prepare(star, tmp_path, DIAMETER, ctf=ctf)
    assert not list(tmp_path.iterdir())


def test_prepare_keeps_the_ctf_or_drops_it(with_ctf, tmp_path):
    names = ["rlnImageName", "rlnOpticsGroup"]
    assert list(ParticleStack.open(relion.prepare(with_ctf, tmp_path, DIAMETER, ctf=False)).table) == names
    first = ParticleStack.open(relion.select(tmp_path, tmp_path / relion.PARTICLES, range(9)))
    assert first.ctf is None
    stack = ParticleStack.open(relion.prepare(with_ctf, tmp_path, DIAMETER, ctf=True))
    np.testing.assert_allclose(stack.ctf, ParticleStack.open(with_ctf).ctf, atol=1e-5)
    assert list(stack.table)[:2] == names and stack.poses is None and stack.half_sets is None
    again = ParticleStack.open(relion.select(tmp_path, stack.path, range(9)))  # the other choice makes it anew
    np.testing.assert_allclose(again.ctf, stack.ctf[:9])


def test_steps_refuse_poses_large_particles_and_maps_of_another_frame(simulated, tmp_path):
    star = relion.prepare(simulated.noisy, tmp_path, DIAMETER)
    with pytest.raises(ValueError, match="particle_diameter: expected at most the box"):
        relion.initial_model(tmp_path, star, 500.0)
    with pytest.raises(ValueError, match=r"expected a star file in .*prepare\(\)"):
        relion.initial_model(tmp_path, simulated.noisy, DIAMETER)
    for path in (simulated.noisy, simulated.noisy.with_suffix(".mrcs")):
        shutil.copy(path, tmp_path)
    with pytest.raises(ValueError, match=r"without poses or classes.*prepare\(\)"):
        relion.initial_model(tmp_path, tmp_path / "noisy.star", DIAMETER)
    for volume, pixel_size in ((simulated.volume, 1.0), (simulated.volume[1:, 1:, 1:], PIXEL)):
        with pytest.raises(ValueError, match="expected a map of .*voxels of 6.4 A.*voxel size in its header"):
            relion.auto_refine(tmp_path, star, write_map(tmp_path / "bad.mrc", volume, pixel_size), DIAMETER)
    with pytest.raises(FileNotFoundError, match="expected a map"):
        relion.classify(tmp_path, star, tmp_path / "none.mrc", DIAMETER)
    with pytest.raises(ValueError, match="processes: expected an integer >= 3"):
        relion.auto_refine(tmp_path, star, simulated.reference, DIAMETER, processes=2)


# ---- with RELION -------------------------------------------------------------------------------------------


@needs_relion
def test_version_is_read():
    assert relion.version()[0].isdigit()


@needs_relion
@pytest.mark.parametrize("step", ["initial_model", "auto_refine"])
def test_failure_shows_relions_own_words_and_the_log(simulated, tmp_path, step):
    star = relion.prepare(simulated.noisy, tmp_path, DIAMETER)
    star.write_text(star.read_text().replace("rlnVoltage", "rlnSomething"))
    with pytest.raises(relion.RelionError) as caught:
        if step == "initial_model":
            relion.initial_model(tmp_path, star, DIAMETER)
        else:
            relion.auto_refine(tmp_path, star, simulated.reference, DIAMETER)
    message = str(caught.value)
    program = "relion_refine_mpi" if step == "auto_refine" else "relion_refine"
    assert message.startswith(f"{program}: exit code ") and f"in {tmp_path}" in message
    assert "ERROR" in message and "oltage" in message and len(message) < 3000
    log = Path(message.rpartition("The full log: ")[2])
    assert log == tmp_path / f"{step}.log" and program in log.read_text().splitlines()[0]


@needs_relion
def test_refinement_of_noisy_images_finds_map_and_poses(simulated, tmp_path):
    star = relion.prepare(simulated.noisy, tmp_path, DIAMETER)
    options = {"ini_high": 40.0, "healpix_order": 1, "local_healpix_order": 2, "offset_range": 2.0, "faster": True}
    refined = relion.auto_refine(tmp_path, star, simulated.reference, DIAMETER, seed=1, max_iterations=6, **options)
    assert refined.capped and "--force_converge" in relion.commands(tmp_path)["auto_refine_join"]
    assert correlation(low_passed(read_map(refined.map), 25.0), low_passed(simulated.volume, 25.0)) > 0.97
    for half in refined.half_maps:
        assert correlation(low_passed(read_map(half), 25.0), low_passed(simulated.volume, 25.0)) > 0.9
    assert 2 * PIXEL <= refined.resolution < 40.0

    angles = refined.table[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(float)
    cosine = (np.einsum("nij,nij->n", projection.rotation_from_euler(*angles.T), simulated.rotations) - 1) / 2
    assert np.median(np.degrees(np.arccos(cosine.clip(-1, 1)))) < 10.0  # degrees; 90 images a half, 4 to 8 measured
    assert refined.table["rlnImageName"].tolist() == ParticleStack.open(star).table["rlnImageName"].tolist()
    assert refined.table["rlnRandomSubset"].nunique() == 2

    done = relion.post_process(tmp_path, refined)
    shells = done.fsc["rlnResolution"].to_numpy(float)  # RELION gives shell 0 as 999 A
    np.testing.assert_allclose(shells[1:], np.arange(1, BOX // 2 + 1) / (BOX * PIXEL), atol=1e-5)
    assert np.isfinite(done.fsc.iloc[1:].to_numpy(float)).all() and 2 * PIXEL <= done.resolution < 40.0
    assert done.fsc["rlnFourierShellCorrelationUnmaskedMaps"][1] > 0.95
    mask = read_map(done.mask)
    assert mask.min() >= 0 and mask.max() == pytest.approx(1) and 0.03 < (mask > 0.5).mean() < 0.5
    assert correlation(mask, simulated.volume) > 0.4 and read_map(done.map).shape == (BOX,) * 3

    times = {log: log.stat().st_mtime_ns for log in tmp_path.glob("*.log")}  # the same again is not run again
    again = relion.auto_refine(tmp_path, star, simulated.reference, DIAMETER, seed=1, max_iterations=6, **options)
    assert again.resolution == refined.resolution
    assert relion.post_process(tmp_path, again).resolution == done.resolution
    assert times == {log: log.stat().st_mtime_ns for log in tmp_path.glob("*.log")}
    with pytest.raises(ValueError, match="threshold: expected a mask around the particle, got 0% of the box"):
        relion.post_process(tmp_path, refined, threshold=1e6)


@needs_relion
def test_the_whole_procedure_from_clean_images_alone(simulated, tmp_path):
    star = relion.prepare(simulated.clean, tmp_path, DIAMETER)
    options = {"healpix_order": 1, "offset_range": 2.0, "seed": 1}
    sgd = {"iterations": (5, 5, 5), "resolutions": (50.0, 50.0), "subsets": (50, 100), "oversampling": 0}
    model = relion.initial_model(tmp_path, star, DIAMETER, **options, **sgd)
    assert model.occupancies == pytest.approx([1.0]) and model.map == model.maps[0]
    sorted_ = relion.classify(tmp_path, star, model.map, DIAMETER, iterations=2, oversampling=0, **options)
    assert sorted_.occupancies.sum() == pytest.approx(1, abs=1e-3) and len(sorted_.maps) == 2
    assert sorted_.best == 1 + np.argmax(sorted_.occupancies) and sorted_.map == sorted_.maps[sorted_.best - 1]
    assert sorted_.class_numbers.shape == (N,) and set(sorted_.class_numbers) <= {1, 2}
    refined = relion.auto_refine(tmp_path, star, sorted_.map, DIAMETER, max_iterations=2, faster=True, **options)
    done = relion.post_process(tmp_path, refined)
    assert refined.capped and 2 * PIXEL <= done.resolution < 60.0
    for path in (model.map, sorted_.map, refined.map, done.map):
        assert read_map(path).shape == (BOX,) * 3 and np.isfinite(read_map(path)).all()
    steps = ["prepare", "initial_model", "classify", "auto_refine", "auto_refine_join", "mask_create", "post_process"]
    assert list(relion.commands(tmp_path)) == steps
    assert not any(" --ctf" in command for command in relion.commands(tmp_path).values())
    # paths are relative
    assert not any(str(tmp_path.parent) in command for command in relion.commands(tmp_path).values())


@needs_relion
@pytest.mark.parametrize("ctf", [True, False])
def test_refinements_correct_the_ctf_or_not_as_prepare_was_told(simulated, with_ctf, tmp_path, ctf):
    star = relion.prepare(with_ctf, tmp_path, DIAMETER, ctf=ctf)
    star = relion.select(tmp_path, star, range(40))
    options = {"healpix_order": 1, "offset_range": 2.0}
    relion.classify(tmp_path, star, simulated.reference, DIAMETER, classes=1, iterations=1, oversampling=0, **options)
    if ctf:
        sgd = {"iterations": (1, 1, 1), "resolutions": (50.0, 50.0), "subsets": (40, 40), "oversampling": 0}
        relion.initial_model(tmp_path, star, DIAMETER, **sgd, **options)
        relion.auto_refine(tmp_path, star, simulated.reference, DIAMETER, max_iterations=1, **options)
    commands = relion.commands(tmp_path)
    for step in {"classify", "initial_model", "auto_refine"} & set(commands):
        words = commands[step].split()
        assert words.count("--ctf") == ctf and (not ctf or words[words.index("--ctf") + 1].startswith("--"))
        assert ("--ctf_corrected_ref" in words) == (ctf and step != "initial_model")
    optimisers = list(tmp_path.glob("*/*_optimiser.star"))
    assert any(path.name.startswith("joined") for path in optimisers) == ctf  # --continue remembers it
    for path in optimisers:
        general = starfile.read(path, always_dict=True)["optimiser_general"]
        assert general["rlnDoCorrectCtf"] == ctf and general["rlnRefsAreCtfCorrected"] == ctf, path
