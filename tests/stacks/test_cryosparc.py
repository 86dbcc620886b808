"""cryoSPARC's files: what `>` means, classes in 2D, headers of any length."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest

from cryo_lib.stacks import particles
from cryo_lib.stacks.mrc import write_stack
from cryo_lib.stacks.particles import ParticleStack

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
BLOB = [("blob/path", "S20"), ("blob/idx", "<u4"), ("blob/shape", "<u4", (2,)), ("blob/psize_A", "<f4")]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(4, 8, 8)).astype(np.float32)


def cs(path: Path, name: bytes, *fields: tuple, **values: object) -> Path:
    """A .cs file of the images 4, 3, 2, 1 of a stack."""
    made = np.zeros(4, [*BLOB, *fields])
    given = {"blob/path": name, "blob/idx": [3, 2, 1, 0], "blob/shape": 8, "blob/psize_A": 1.5} | values
    for field, value in given.items():
        made[field] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.save(file, made)
    return path


def test_a_name_after_the_mark_lies_beside_the_file_whatever_lies_elsewhere(tmp_path):
    for seed, folder in enumerate((tmp_path / "job", tmp_path / "cwd", tmp_path)):
        folder.mkdir(exist_ok=True)
        write_stack(folder / "s.mrc", images(seed), (4, 8, 8), 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        marked = ParticleStack.open(cs(tmp_path / "job" / "x.cs", b">s.mrc"))
    np.testing.assert_array_equal(marked.images[:], images(0)[::-1])
    assert marked.table["rlnImageName"][0] == "000004@s.mrc"
    with pytest.warns(UserWarning, match="in more than one place"):
        plain = ParticleStack.open(cs(tmp_path / "job" / "y.cs", b"s.mrc"))
    np.testing.assert_array_equal(plain.images[:], images(1)[::-1])


def test_classes_in_2d_keep_psi_class_micrograph_and_coordinates_as_a_star(tmp_path):
    write_stack(tmp_path / "s.mrc", images(), (4, 8, 8), 1.5)
    pose, group, location = "alignments2D/pose", "alignments2D/class", "location/micrograph"
    fields = [(pose, "<f4"), ("alignments2D/shift", "<f4", (2,)), (group, "<u4"), (f"{location}_path", "S20")]
    fields += [(f"{location}_shape", "<u4", (2,)), ("location/center_x_frac", "<f4"), ("location/center_y_frac", "<f4")]
    values = {pose: [0, np.pi / 2, -np.pi, 1], "alignments2D/shift": [2, -1], group: [0, 1, 2, 3]}
    values |= {f"{location}_path": b">m/a b.mrc", f"{location}_shape": [100, 200]}
    values |= {"location/center_x_frac": 0.5, "location/center_y_frac": 0.25}
    stack = ParticleStack.open(cs(tmp_path / "x.cs", b">s.mrc", *fields, **values))
    again = ParticleStack.open(particles.write(tmp_path / "out" / "y.star", stack.images, stack)).table
    np.testing.assert_allclose(again["rlnAnglePsi"], [0, 90, -180, np.rad2deg(1)], atol=1e-4)
    assert again["rlnClassNumber"].tolist() == [1, 2, 3, 4] and stack.poses is None
    assert again["rlnMicrographName"].tolist() == ["m/a b.mrc"] * 4
    assert again["rlnCoordinateX"].tolist() == [100.0] * 4 and again["rlnCoordinateY"].tolist() == [25.0] * 4
    np.testing.assert_allclose(again[particles.ORIGINS], [[3.0, -1.5]] * 4)
    assert ParticleStack.open(tmp_path / "out" / "y.star").pixel_size == 1.5


def test_a_header_of_any_length_is_read(tmp_path):
    write_stack(tmp_path / "s.mrc", images(), (4, 8, 8), 1.5)
    fields = [(f"alignments_class_{number}/a_long_name", "<f4") for number in range(400)]
    path = cs(tmp_path / "x.cs", b">s.mrc", *fields)
    assert path.stat().st_size > 4 * 1600 + 10_000
    assert ParticleStack.open(path).pixel_size == 1.5


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the cases {CASES} are not there")
def test_the_long_header_of_the_cases_is_read():
    stack = ParticleStack.open(CASES / "long_header.cs")
    np.testing.assert_allclose(stack.images[:].mean(axis=(1, 2)), np.arange(6), atol=0.2)


def test_pickles_are_refused_and_nobody_is_told_to_allow_them(tmp_path):
    made = np.zeros(2, [("blob/path", "O"), *BLOB[1:]])
    with open(tmp_path / "x.cs", "wb") as file:
        np.save(file, made, allow_pickle=True)
    with pytest.raises(ValueError, match=r"x\.cs: expected a cryoSPARC \.cs file, got one that numpy") as caught:
        ParticleStack.open(tmp_path / "x.cs")
    assert "allow" not in str(caught.value)


@pytest.mark.skipif(not shutil.which("relion_image_handler"), reason="needs Debian's package relion")
@pytest.mark.parametrize("kind", ["x.cs", "s.mrc"])
def test_relion_opens_the_star_of_a_cs_without_a_ctf_and_of_a_bare_stack(tmp_path, kind):
    write_stack(tmp_path / "s.mrc", images(), (4, 8, 8), 1.5)
    cs(tmp_path / "x.cs", b">s.mrc")
    stack = ParticleStack.open(tmp_path / kind)
    particles.write(tmp_path / "y.star", stack.images, stack)
    command = ["relion_image_handler", "--i", "y.star", "--stats"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    found = [float(line.split("avg=")[1].split()[0]) for line in said.splitlines() if "avg=" in line]
    np.testing.assert_allclose(found, stack.images[:].mean(axis=(1, 2)), atol=1e-5)
