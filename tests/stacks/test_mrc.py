"""The facts of an MRC header are compared with each other: axes, cell, space group, length."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pytest

from cryo_lib.stacks.mrc import read_map, write_map
from cryo_lib.stacks.particles import ParticleStack

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"


def volume(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def written(path: Path, data: np.ndarray, voxel: tuple = (2.0, 2.0, 2.0), **fields: int) -> Path:
    """Write by mrcfile alone, then set fields of the header."""
    with mrcfile.new(path, data, overwrite=True) as file:
        file.voxel_size = voxel
        for name, value in fields.items():
            file.header[name] = value
    return path


@pytest.mark.parametrize("axes", [(1, 2, 3), (3, 2, 1), (2, 1, 3), (2, 3, 1), (3, 1, 2), (1, 3, 2)])
def test_a_map_is_the_same_whatever_the_order_of_its_axes(tmp_path, axes):
    """Columns, rows and sections of the file run along `axes` of x, y, z."""
    x_y_z = volume(8, 10, 12).transpose()
    data = x_y_z.transpose([axis - 1 for axis in axes[::-1]])
    fields = dict(zip(("mapc", "mapr", "maps"), axes)) | {"mx": 12, "my": 10, "mz": 8}
    path = written(tmp_path / "x.mrc", np.ascontiguousarray(data), (1.0, 1.0, 1.0), **fields, cella=(24.0, 20.0, 16.0))
    read, voxel_size = read_map(path)
    np.testing.assert_array_equal(read, x_y_z.transpose())
    assert voxel_size == 2.0


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the cases {CASES} are not there")
def test_the_maps_of_the_cases_are_one_volume():
    (a, size_a), (b, size_b) = (read_map(CASES / f"{name}.mrc") for name in ("map_xyz", "map_axes_321"))
    np.testing.assert_array_equal(a, b)
    assert size_a == size_b == 2.0
    with pytest.raises(ValueError, match="map.map.gz: expected an MRC file, got a gzip file: unpack it by `gunzip`"):
        read_map(CASES / "map.map.gz")


@pytest.mark.parametrize("axes", [(1, 1, 3), (0, 2, 3), (1, 2, 4)])
def test_axes_that_are_none_are_refused(tmp_path, axes):
    path = written(tmp_path / "x.mrc", volume(8, 8, 8), **dict(zip(("mapc", "mapr", "maps"), axes)))
    with pytest.raises(ValueError, match=rf"x\.mrc: expected axes .* 1, 2 and 3, got {', '.join(map(str, axes))}"):
        read_map(path)


@pytest.mark.parametrize("voxel", [(2.0, 2.0, 3.0), (2.0, 1.0, 2.0), (-2.0, 2.0, 2.0), (np.nan, 2.0, 2.0)])
def test_a_cell_that_is_no_cube_has_no_voxel_size_but_one_by_hand(tmp_path, voxel):
    path = written(tmp_path / "x.mrc", volume(8, 8, 8), voxel)
    with pytest.raises(ValueError, match=r"x\.mrc: expected one pixel size on all axes, got .* A; give it by hand"):
        read_map(path)
    assert read_map(path, 2.5)[1] == 2.5


def test_pixels_that_are_no_squares_are_refused_but_not_the_third_axis_of_a_stack(tmp_path):
    path = written(tmp_path / "x.mrcs", volume(3, 8, 8), (2.0, 2.0, 7.0))
    assert ParticleStack.open(path).pixel_size == 2.0
    written(path, volume(3, 8, 8), (2.0, 2.1, 2.0))
    with pytest.raises(ValueError, match="expected one pixel size on all axes, got 2, 2.1 A"):
        ParticleStack.open(path)
    assert ParticleStack.open(path, pixel_size=2.0).pixel_size == 2.0


def test_a_volume_is_no_stack_and_a_stack_no_volume(tmp_path):
    cube = write_map(tmp_path / "x.mrc", volume(8, 8, 8), 2.0)
    with pytest.raises(ValueError, match=r"x\.mrc: expected 2D images, got a volume \(a map, or 3D subtomograms\)"):
        ParticleStack.open(cube)
    assert len(ParticleStack.open(cube.rename(tmp_path / "x.mrcs"))) == 8  # by RELION's names it is a stack
    for name, fields in (("y.mrc", {"ispg": 0, "mz": 1}), ("z.mrc", {"ispg": 401, "mz": 4}), ("a.mrcs", {})):
        path = written(tmp_path / name, volume(8, 8, 8), **fields)
        with pytest.raises(ValueError, match="expected a cubic map, .* is it a stack of images"):
            read_map(path)
    with pytest.raises(ValueError, match=r"z\.mrc: expected 2D images, got volumes"):
        ParticleStack.open(tmp_path / "z.mrc")


def test_images_along_other_axes_are_refused(tmp_path):
    path = written(tmp_path / "x.mrcs", volume(3, 8, 8), mapc=2, mapr=1)
    with pytest.raises(ValueError, match="expected columns, rows and images along x, y, z, got y, x, z; convert it"):
        ParticleStack.open(path)


def test_bytes_beyond_those_of_the_header_are_not_left_out_in_silence(tmp_path):
    path = written(tmp_path / "x.mrcs", volume(3, 8, 8))
    content = path.read_bytes()
    path.write_bytes(content + content[1024:])  # three images more than the header says
    with pytest.raises(ValueError, match=r"x\.mrcs: longer than its header says, expected 1792 bytes .*, got 2560"):
        ParticleStack.open(path)


def test_a_map_with_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"y\.mrc: expected finite pixels"):
        write_map(tmp_path / "y.mrc", np.full((8, 8, 8), np.nan), 2.0)
    assert not list(tmp_path.iterdir())
