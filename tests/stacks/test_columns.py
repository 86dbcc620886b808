"""Every column goes through one check; no default is believed where a source speaks."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.bad_inputs import OPTICS, images, star, table
from cryo_lib.stacks import particles
from cryo_lib.stacks.mrc import write_stack
from cryo_lib.stacks.particles import ParticleStack


@pytest.fixture
def folder(tmp_path):
    """Three images whose header says 1.5 A."""
    write_stack(tmp_path / "s.mrcs", images(), (3, 8, 8), 1.5)
    return tmp_path


def test_a_particles_own_value_comes_before_its_optics_groups(folder):
    ctf = ParticleStack.open(star(folder, rlnImageName="2@s.mrcs")).ctf
    assert ctf["rlnVoltage"].tolist() == [300.0] * 3
    rows = [{"rlnImageName": f"{i}@s.mrcs", "rlnOpticsGroup": "1"} for i in (1, 2, 3)]
    own = {"rlnDefocusU": "9e3", "rlnDefocusV": "8e3", "rlnDefocusAngle": "5", "rlnVoltage": "200"}
    text = table("optics", [OPTICS | {"rlnPhaseShift": "30"}]) + table("particles", [row | own for row in rows])
    (folder / "y.star").write_text(text)
    ctf = ParticleStack.open(folder / "y.star").ctf
    assert ctf["rlnVoltage"].tolist() == [200.0] * 3 and ctf["rlnPhaseShift"].tolist() == [30.0] * 3
    assert ctf["rlnSphericalAberration"].tolist() == [2.7] * 3 and ctf["rlnCtfScalefactor"].tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "columns, header, expected",
    [
        ({"rlnPixelSize": "2.62"}, 1.0, 2.62),
        ({"rlnPixelSize": "2.62"}, 0.0, 2.62),
        ({"rlnDetectorPixelSize": "5", "rlnMagnification": "50000"}, 1.0, 1.0),
        ({"rlnDetectorPixelSize": "5", "rlnMagnification": "25000"}, 1.0, 2.0),
        ({"rlnDetectorPixelSize": "5"}, 1.7, pytest.approx(1.7)),
        ({}, 1.0, 1.0),
        ({}, 0.0, None),
    ],
)
def test_the_header_is_the_last_to_be_believed_where_it_says_one(tmp_path, columns, header, expected):
    write_stack(tmp_path / "s.mrcs", images(), (3, 8, 8), header)
    rows = [{"rlnImageName": f"{i}@s.mrcs", "rlnOriginX": "3", "rlnOriginY": "-4"} | columns for i in (1, 2, 3)]
    (tmp_path / "x.star").write_text(table("images", rows))
    assert ParticleStack.open(tmp_path / "x.star").pixel_size == expected


@pytest.mark.parametrize("columns", [{"rlnPixelSize": "0"}, {"rlnDetectorPixelSize": "5", "rlnMagnification": "0"}])
def test_a_pixel_size_of_nothing_is_none(folder, columns):
    path = star(folder, None, **columns)
    with pytest.raises(ValueError, match=r"x\.star: expected one pixel size, got \(A\) (0\.0|1\.5, inf|inf)"):
        ParticleStack.open(path)


def test_origins_in_pixels_take_the_pixel_size_that_the_star_says(tmp_path):
    write_stack(tmp_path / "s.mrcs", images(1), (1, 8, 8), 1.0)
    row = {"rlnImageName": "1@s.mrcs", "rlnPixelSize": "2.62", "rlnOriginX": "3", "rlnOriginY": "-4"}
    row |= {"rlnAngleRot": "0", "rlnAngleTilt": "0", "rlnAnglePsi": "0"}
    (tmp_path / "x.star").write_text(table("images", [row]))
    np.testing.assert_allclose(ParticleStack.open(tmp_path / "x.star").poses.shifts, [[-3 * 2.62, 4 * 2.62]])


def test_one_optics_group_needs_no_column_and_two_do(folder):
    rows = [{"rlnImageName": f"{i}@s.mrcs"} for i in (1, 2, 3)]
    (folder / "x.star").write_text(table("optics", [OPTICS]) + table("particles", rows))
    stack = ParticleStack.open(folder / "x.star")
    assert stack.pixel_size == 1.5 and stack.table["rlnOpticsGroup"].tolist() == [1, 1, 1]
    again = particles.write(folder / "y.star", stack.images, stack)
    assert "_rlnOpticsGroup" not in again.read_text().partition("data_particles")[2]
    assert ParticleStack.open(again).pixel_size == 1.5
    two = table("optics", [OPTICS, OPTICS | {"rlnOpticsGroup": "2"}])
    (folder / "x.star").write_text(two + table("particles", rows))
    with pytest.raises(ValueError, match="got no rlnOpticsGroup"):
        ParticleStack.open(folder / "x.star")


@pytest.mark.parametrize(
    "columns",
    [
        {"rlnImagePixelSize": "3.0"},
        {"rlnPixelSize": "3.0"},
        {"rlnDetectorPixelSize": "3.0", "rlnMagnification": "10000"},
    ],
)
def test_a_pixel_size_by_hand_is_what_is_written_wherever_the_star_said_another(folder, columns):
    rows = [{"rlnImageName": f"{i}@s.mrcs"} | columns for i in (1, 2, 3)]
    (folder / "x.star").write_text(table("", rows))
    (folder / "y.star").write_text(table("optics", [OPTICS | {"rlnImagePixelSize": "3.0"}]) + table("particles", rows))
    for name in ("x", "y"):
        with pytest.raises(ValueError, match=r"expected one pixel size, got \(A\) 3\.0"):
            ParticleStack.open(folder / f"{name}.star")
        stack = ParticleStack.open(folder / f"{name}.star", pixel_size=1.5)
        again = ParticleStack.open(particles.write(folder / f"{name}2.star", stack.images, stack))
        assert again.pixel_size == 1.5
        assert particles.write(folder / f"{name}3.mrcs", stack.images, stack).exists()
        assert ParticleStack.open(folder / f"{name}3.mrcs").pixel_size == 1.5


def test_a_pixel_size_by_hand_that_agrees_changes_no_byte(folder):
    path = star(folder)
    texts = []
    for size in (None, 1.5):
        stack = ParticleStack.open(path, pixel_size=size)
        texts.append(particles.write(folder / "y.star", stack.images, stack).read_bytes())
    assert texts[0] == texts[1]


def test_a_ctf_that_is_incomplete_is_refused_where_it_is_asked_for_and_not_before(folder):
    rows = [{"rlnImageName": "1@s.mrcs", "rlnDefocusU": "1", "rlnDefocusV": "1", "rlnDefocusAngle": "1"}]
    (folder / "x.star").write_text(table("", rows))
    stack = ParticleStack.open(folder / "x.star")
    particles.write(folder / "y.star", stack.images, stack)
    with pytest.raises(ValueError, match="got no rlnVoltage"):
        _ = stack.ctf


@pytest.mark.parametrize("size", [None, 2.0])
def test_a_bare_stack_becomes_a_star_with_the_columns_that_are_added(tmp_path, size):
    write_stack(tmp_path / "s.mrcs", images(), (3, 8, 8), size)
    stack = ParticleStack.open(tmp_path / "s.mrcs")
    out = particles.write(tmp_path / "y.star", stack.images, stack, columns={"rlnClassNumber": [1, 2, 3]})
    again = ParticleStack.open(out)
    assert again.pixel_size == size and again.table["rlnClassNumber"].tolist() == [1, 2, 3]
    np.testing.assert_array_equal(again.images[:], stack.images[:])


def test_half_sets_are_whole_numbers(folder):
    with pytest.raises(ValueError, match="row 2: expected a whole rlnRandomSubset, got 1.5 .*correct"):
        _ = ParticleStack.open(star(folder, rlnRandomSubset="1.5")).half_sets
