"""Stacks on disk: what RELION and cryoSPARC wrote is read rightly, what we write RELION reads, bad files are named."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
from scipy.spatial.transform import Rotation

from cryo_lib.simulate import projection
from cryo_lib.stacks import mrc, particles
from cryo_lib.stacks.particles import ParticleStack

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "particles"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the test data {DATA} is not there")
needs_relion = pytest.mark.skipif(not shutil.which("relion_reconstruct"), reason="needs Debian's package relion")
SHARED = {  # shape, A, poses, CTF
    "empiar_10076_7.mrc": ((7, 320, 320), None, False, False),
    "empiar_10076_7.star": ((7, 320, 320), 5e4 / 38168, False, True),
    "relion31.mrcs": ((5, 256, 256), 1.0, False, False),  # as its header has it
    "relion31.star": ((5, 256, 256), 2.806, True, True),
    "rln_proj_65.mrcs": ((5, 65, 65), None, False, False),
    "rln_proj_65.star": ((5, 65, 65), None, True, False),
    "sample.mrcs": ((17, 200, 200), None, False, False),
    "sample_particles_relion31.star": ((17, 200, 200), 1.4, True, True),
}


def make_images(n: int, box: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, box, box)).astype(np.float32)


def make_stack(path: Path, images: np.ndarray, voxel: float = 0.0, order: str = "<") -> Path:
    """Write a stack by mrcfile alone, so that reading is not tested against our own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, images, overwrite=True) as mrc:
        mrc.set_image_stack()
        mrc.voxel_size = voxel
    if order == ">":
        content = path.read_bytes()
        header = np.frombuffer(content[:1024], mrcfile.dtypes.HEADER_DTYPE)[0].copy()
        swapped = np.array(header).astype(mrcfile.dtypes.HEADER_DTYPE.newbyteorder(">"))
        swapped["machst"] = (0x11, 0x11, 0, 0)
        path.write_bytes(swapped.tobytes() + images.astype(images.dtype.newbyteorder(">")).tobytes())
    return path


def make_star(path: Path, rows: str, columns: str = "rlnImageName rlnOpticsGroup", optics: str | None = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = "rlnOpticsGroup rlnImagePixelSize rlnVoltage rlnSphericalAberration rlnAmplitudeContrast rlnImageSize"
    optics = "1 1.5 300 2.7 0.1 8\n" if optics == "" else optics
    tables = {"optics": (labels, optics)} if optics else {}
    tables["particles"] = columns, rows
    text = ""
    for name, (labels, body) in tables.items():
        numbered = "".join(f"_{label} #{number}\n" for number, label in enumerate(labels.split(), 1))
        text += f"\n# version 30001\n\ndata_{name}\n\nloop_\n{numbered}{body}"
    path.write_text(text)
    return path


def make_particles(folder: Path, n: int, rows: str, *table: str | None, voxel: float = 0.0, **options: str) -> Path:
    """Write `n` images, s.mrcs, and a star file of them, x.star, whose columns and optics follow."""
    make_stack(folder / "s.mrcs", make_images(n), voxel)
    return make_star(folder / "x.star", rows, *table, **options)


def make_cs(path: Path, n: int, stack: str, drop: str = "none", **changes: np.ndarray) -> np.ndarray:
    scalars = "blob/psize_A ctf/accel_kv ctf/cs_mm ctf/amp_contrast ctf/df1_A ctf/df2_A ctf/df_angle_rad "
    scalars += "ctf/phase_shift_rad"
    dtype = [("uid", "<u8"), ("blob/path", "S40"), ("blob/idx", "<u4"), ("blob/shape", "<u4", (2,))]
    dtype += [(name, "<f4") for name in scalars.split()] + [("alignments3D/split", "<u4")]
    dtype += [("alignments3D/pose", "<f4", (3,)), ("alignments3D/shift", "<f4", (2,)), ("alignments3D/psize_A", "<f4")]
    cs = np.zeros(n, [field for field in dtype if not field[0].startswith(drop)])
    values = {"blob/path": f">{stack}".encode(), "blob/idx": np.arange(n)[::-1], "blob/shape": 8, "blob/psize_A": 1.5}
    values |= {"ctf/accel_kv": 300, "ctf/cs_mm": 2.7, "ctf/amp_contrast": 0.1, "ctf/df1_A": 12000, "ctf/df2_A": 11000}
    values |= {"ctf/df_angle_rad": np.pi / 4, "alignments3D/split": np.arange(n) % 2, "alignments3D/psize_A": 3.0}
    for name, value in (values | changes).items():
        if name in cs.dtype.names:
            cs[name] = value
    with open(path, "wb") as file:
        np.save(file, cs)
    return cs


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder: nothing is found by chance in the working directory."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


# ---- reading -----------------------------------------------------------------------------------------------


@needs_data
def test_every_shared_file_is_in_the_list():
    assert {path.name for path in DATA.iterdir()} == set(SHARED)


@needs_data
@pytest.mark.parametrize("name", SHARED)
def test_opens_every_shared_file_as_mrcfile_and_starfile_read_it(name):
    source, numbers = DATA / name, slice(None)
    stack = ParticleStack.open(source)
    if source.suffix == ".star":
        tables = starfile.read(source, always_dict=True)
        table = tables.get("particles", tables.get(""))
        assert list(stack.table) == list(table) and len(stack) == len(table)
        source = DATA / table["rlnImageName"].iloc[0].partition("@")[2]
        numbers = [int(reference.partition("@")[0]) - 1 for reference in table["rlnImageName"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one file has no map identifier
        with mrcfile.open(source, permissive=True) as mrc:
            np.testing.assert_array_equal(stack.images[:], mrc.data[numbers])


@needs_data
@pytest.mark.parametrize("name", SHARED)
def test_shape_pixel_size_poses_and_ctf_of_shared_files(name):
    shape, pixel_size, posed, has_ctf = SHARED[name]
    stack = ParticleStack.open(DATA / name)
    assert stack.images.shape == (len(stack), *shape[1:]) == shape
    assert stack.pixel_size == (pixel_size if pixel_size is None else pytest.approx(pixel_size, abs=1e-5))
    assert (stack.poses is not None) == posed and (stack.ctf is not None) == has_ctf


@needs_data
def test_ctf_joins_each_particles_own_optics_group():
    stack = ParticleStack.open(DATA / "sample_particles_relion31.star")
    groups = stack.table["rlnOpticsGroup"]
    assert stack.ctf["rlnVoltage"].tolist() == [{1: 300.0, 2: 200.0}[group] for group in groups]
    np.testing.assert_allclose(stack.ctf["rlnDefocusU"], stack.table["rlnDefocusU"])


@needs_data
def test_relions_projections_match_ours_at_the_poses_read():
    volume = DATA.parent / "ribosome" / "clean70SRibosome_vol_65p.mrc"
    with mrcfile.open(volume, permissive=True) as mrc:
        stack = ParticleStack.open(DATA / "rln_proj_65.star")
        ours = projection.project(mrc.data, stack.poses.rotations)
    for a, b in zip(ours, stack.images[:]):
        assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99


@needs_data
@pytest.mark.parametrize("name, contrast", [("empiar_10076_7", "dark"), ("sample_particles_relion31", "bright")])
def test_contrast_and_normalisation_of_real_particles(name, contrast):
    measured = ParticleStack.open(DATA / f"{name}.star").normalisation
    assert measured.contrast == contrast
    assert abs(measured.background_mean) < 0.05 and abs(measured.background_sd - 1) < 0.05


def test_normalisation_measures_the_background_without_the_particle(tmp_path):
    radius = np.hypot(*np.ogrid[-1:1:32j, -1:1:32j])
    path = make_stack(tmp_path / "x.mrcs", make_images(50, 32) - 40 * (radius < 0.6).astype(np.float32))
    measured = ParticleStack.open(path).normalisation
    assert measured.contrast == "dark" and abs(measured.background_mean) < 0.05
    assert measured.background_sd == pytest.approx(1, abs=0.05)
    measured = ParticleStack.open(make_stack(path, make_images(20, 32) * 3 + 5)).normalisation
    assert measured.contrast is None  # of pure noise it cannot be told
    assert measured.background_mean == pytest.approx(5, abs=0.1) and measured.background_sd == pytest.approx(3, abs=0.1)


def test_rows_and_image_numbers_in_any_order_from_many_stacks(tmp_path):
    stacks = [make_images(5, seed=seed) for seed in range(3)]
    for number, images in enumerate(stacks):
        make_stack(tmp_path / f"s{number}.mrcs", images, 1.5)
    order = np.random.default_rng(1).permutation(15)
    rows = "".join(f"{i % 5 + 1:06d}@s{i // 5}.mrcs 1\n" for i in order)
    images = ParticleStack.open(make_star(tmp_path / "x.star", rows)).images
    expected = np.concatenate(stacks)[order]
    assert images.shape == expected.shape and len(images) == 15 and images.dtype == np.float32
    mask = np.arange(15) % 4 == 0
    for key in (slice(None), slice(2, 11, 3), slice(4, 4), [7, 7, 0, -1], np.array([], int), mask, 3, -2, np.int64(5)):
        got = images[key]
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, expected[key])
    np.testing.assert_array_equal(np.asarray(images), expected)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(images))[:], expected)
    with pytest.raises(IndexError):
        images[15]


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.int16, np.uint16, np.float16])
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_real_mode_and_byte_order(tmp_path, dtype, order):
    images = (make_images(3) * 10 + 40).astype(dtype)
    stack = ParticleStack.open(make_stack(tmp_path / "x.mrcs", images, 2.0, order))
    np.testing.assert_array_equal(stack.images[:], images.astype(np.float32))
    assert stack.pixel_size == 2.0


def test_wrong_machine_stamp_does_not_mislead_and_an_extended_header_is_skipped(tmp_path):
    images = make_images(3)
    path = make_stack(tmp_path / "x.mrcs", images, 1.5, ">")
    content = bytearray(path.read_bytes())
    content[212:216] = b"\x44\x44\x00\x00"  # claims little-endian
    path.write_bytes(content)
    np.testing.assert_array_equal(ParticleStack.open(path).images[:], images)
    with mrcfile.new(path, images, overwrite=True) as mrc:
        mrc.set_extended_header(np.full(400, 7, "V1"))
    np.testing.assert_array_equal(ParticleStack.open(path).images[:], images)


def test_single_image_reference_without_a_number_and_stack_names_with_an_at_sign(tmp_path):
    assert ParticleStack.open(make_stack(tmp_path / "a@b.mrcs", make_images(2))).images.shape == (2, 8, 8)
    images = make_images(1)
    make_stack(tmp_path / "one.mrc", images)
    np.testing.assert_array_equal(ParticleStack.open(make_star(tmp_path / "x.star", "one.mrc 1\n")).images[:], images)


def test_relion_30_origins_are_pixels_and_31_origins_angstrom(tmp_path):
    make_stack(tmp_path / "s.mrcs", make_images(1))
    common = "rlnImageName rlnAngleRot rlnAngleTilt rlnAnglePsi"
    old = f"{common} rlnOriginX rlnOriginY rlnMagnification rlnDetectorPixelSize"
    new = f"{common} rlnOriginXAngst rlnOriginYAngst rlnOpticsGroup"
    shifts, rotations = [], []
    for columns, rest, optics in ((old, "2 -3 25000 5", None), (new, "4 -6 1", "1 2.0 300 2.7 0.1 8\n")):
        stack = ParticleStack.open(make_star(tmp_path / "x.star", f"1@s.mrcs 10 20 30 {rest}\n", columns, optics))
        assert stack.pixel_size == 2.0
        shifts.append(stack.poses.shifts)
        rotations.append(stack.poses.rotations)
    np.testing.assert_allclose(shifts, [[[-4, 6]]] * 2)
    np.testing.assert_allclose(rotations, [Rotation.from_euler("ZYZ", [[10, 20, 30]], degrees=True).as_matrix()] * 2)


@pytest.mark.parametrize("column, value, y", [("", "", 0.0), ("rlnOriginYAngst", "4", -4.0)])
def test_origins_left_out_are_zero_and_one_alone_is_read(tmp_path, column, value, y):
    columns = f"rlnImageName rlnAngleRot rlnAngleTilt rlnAnglePsi {column}"
    path = make_particles(tmp_path, 1, f"1@s.mrcs 1 2 3 {value}\n", columns, None)
    assert ParticleStack.open(path).poses.shifts.tolist() == [[0.0, y]]


def test_pixel_origins_without_a_pixel_size_are_refused(tmp_path):
    columns = "rlnImageName rlnAngleRot rlnAngleTilt rlnAnglePsi rlnOriginX rlnOriginY"
    path = make_particles(tmp_path, 1, "1@s.mrcs 10 20 30 2 -3\n", columns, None)
    with pytest.raises(ValueError, match=r"x\.star: expected a pixel size.*pixel_size=") as error:
        _ = ParticleStack.open(path).poses
    assert "rlnOriginX" in str(error.value)
    np.testing.assert_allclose(ParticleStack.open(path, pixel_size=2.0).poses.shifts, [[-4, 6]])


def test_cryosparc_poses_ctf_and_images(tmp_path):
    images = make_images(4)
    make_stack(tmp_path / "J1" / "s.mrc", images, 1.5)
    rotations = projection.random_rotations(4, 0)
    (tmp_path / "J2").mkdir()
    pose = {"alignments3D/pose": Rotation.from_matrix(rotations).as_rotvec(), "alignments3D/shift": [2.0, -1.0]}
    cs = make_cs(tmp_path / "J2" / "x.cs", 4, "J1/s.mrc", **pose)
    stack = ParticleStack.open(tmp_path / "J2" / "x.cs")
    np.testing.assert_array_equal(stack.images[:], images[cs["blob/idx"]])
    np.testing.assert_allclose(stack.poses.rotations, rotations, atol=1e-5)
    np.testing.assert_allclose(stack.poses.shifts, [[-6.0, 3.0]] * 4)  # pixels of the alignment, 3 A each
    assert stack.pixel_size == 1.5 and stack.table["rlnRandomSubset"].tolist() == [1, 2, 1, 2]
    assert stack.ctf.iloc[0].tolist() == pytest.approx([12000, 11000, 45, 300, 2.7, 0.1, 0, 0, 1])
    again = ParticleStack.open(particles.write(tmp_path / "out" / "x.star", stack.images, stack))
    np.testing.assert_array_equal(again.images[:], stack.images[:])
    np.testing.assert_allclose(again.poses.rotations, rotations, atol=1e-5)
    np.testing.assert_allclose(again.ctf, stack.ctf, atol=1e-4)


# ---- where images are looked for ---------------------------------------------------------------------------


def test_search_order_is_project_or_cwd_then_star_folder_then_upwards(tmp_path):
    star = make_star(tmp_path / "p" / "job" / "run" / "x.star", "1@s.mrcs 1\n")
    places = [tmp_path, tmp_path / "p", tmp_path / "p" / "job", star.parent, Path.cwd()]
    for level, folder in enumerate(places, 1):  # each later place comes before the earlier ones
        make_stack(folder / "s.mrcs", make_images(1, seed=level))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            images = ParticleStack.open(star).images
        np.testing.assert_array_equal(images[:], make_images(1, seed=level))
        assert [("in more than one place" in str(w.message)) for w in caught] == [True] * (level > 1)
    np.testing.assert_array_equal(ParticleStack.open(star, project=tmp_path / "p").images[:], make_images(1, seed=2))
    with pytest.raises(FileNotFoundError, match=r"s\.mrcs under one of .*empty, got no such file.*project="):
        ParticleStack.open(star, project=tmp_path / "empty")


def test_working_directory_comes_first_even_where_it_holds_the_star(tmp_path, monkeypatch):
    star = make_star(tmp_path / "p" / "job" / "x.star", "1@s.mrcs 1\n")
    make_stack(tmp_path / "p" / "s.mrcs", make_images(1, seed=1))
    make_stack(star.parent / "s.mrcs", make_images(1, seed=2))
    monkeypatch.chdir(tmp_path / "p")
    with pytest.warns(UserWarning, match="in more than one place: open with project="):
        images = ParticleStack.open("job/x.star").images
    np.testing.assert_array_equal(images[:], make_images(1, seed=1))


@pytest.mark.parametrize("reference", ["../away/s.mrcs", "{root}/away/s.mrcs"])
def test_images_outside_the_project_are_read_and_said(tmp_path, reference):
    make_stack(tmp_path / "away" / "s.mrcs", make_images(1))
    star = make_star(tmp_path / "project" / "x.star", f"1@{reference.format(root=tmp_path)} 1\n")
    with pytest.warns(UserWarning, match=r"x\.star: 1 image files are outside its project folder.*away.s\.mrcs"):
        stack = ParticleStack.open(star)
    np.testing.assert_array_equal(stack.images[:], make_images(1))


def test_absolute_path_within_the_project_gives_no_warning(tmp_path):
    stack = make_stack(tmp_path / "p" / "s.mrcs", make_images(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ParticleStack.open(make_star(tmp_path / "p" / "x.star", f"1@{stack} 1\n"))


# ---- bad input ---------------------------------------------------------------------------------------------


def refused(path: Path, *parts: str, error: type[Exception] = ValueError, **options: object) -> None:
    with pytest.raises(error) as caught:
        ParticleStack.open(path, **options)
    for part in (path.name, *parts):
        assert part in str(caught.value), str(caught.value)


@pytest.mark.parametrize("number", ["4", "0", "-1", "x"])
def test_image_number_beyond_the_stack(tmp_path, number):
    path = make_particles(tmp_path, 3, f"3@s.mrcs 1\n{number}@s.mrcs 1\n")
    refused(path, "particle row 2", "from 1 to 3", "s.mrcs", f"'{number}@s.mrcs'")


def test_mixed_boxes(tmp_path):
    make_stack(tmp_path / "a.mrcs", make_images(1, 8))
    make_stack(tmp_path / "b.mrcs", make_images(1, 10))
    path = make_star(tmp_path / "x.star", "1@a.mrcs 1\n1@b.mrcs 1\n")
    refused(path, "one size", "8 x 8", "10 x 10", "b.mrcs", "split")


def test_mixed_optics_are_refused_and_unused_or_equal_ones_are_not(tmp_path):
    optics = "1 1.5 300 2.7 0.1 8\n2 1.2 300 2.7 0.1 8\n"
    mixed = make_particles(tmp_path, 2, "1@s.mrcs 1\n2@s.mrcs 2\n", optics=optics)
    refused(mixed, "one pixel size", "1.2, 1.5", "split")
    unused = make_star(tmp_path / "y.star", "1@s.mrcs 1\n2@s.mrcs 1\n", optics=optics)
    assert ParticleStack.open(unused).pixel_size == 1.5
    optics = "1 1.5 300 2.7 0.1 8\n2 1.5 300 2.7 0.1 10\n"
    boxes = make_star(tmp_path / "z.star", "1@s.mrcs 1\n2@s.mrcs 2\n", optics=optics)
    refused(boxes, "data_optics", "expected rlnImageSize 8, as the stacks", "got {10}", "correct")


@pytest.mark.parametrize("label", ["rlnCtfDataArePhaseFlipped", "rlnCtfDataAreCtfPremultiplied"])
def test_images_to_which_the_ctf_was_applied_already_are_refused(tmp_path, label):
    """RELION says so in data_optics. Where it says 0, or nothing is known of the CTF, images are taken as they are."""
    defocus, rows = "rlnDefocusU rlnDefocusV rlnDefocusAngle", "1@s.mrcs 1 1e4 1e4 0 {}\n2@s.mrcs 1 1e4 1e4 0 {}\n"
    each = make_particles(tmp_path, 2, rows.format(0, 1), f"rlnImageName rlnOpticsGroup {defocus} {label}")
    refused(each, f"got {label} 1", "extract them", "leave out rlnDefocusU")
    for columns, flag, taken in ((defocus, 0, True), (defocus, 1, False), ("rlnX rlnY rlnZ", 1, True)):
        path = make_particles(tmp_path, 2, rows.format("", ""), f"rlnImageName rlnOpticsGroup {columns}")
        text = path.read_text().replace("_rlnImageSize #6", f"_rlnImageSize #6\n_{label} #7")
        path.write_text(text.replace("0.1 8\n", f"0.1 8 {flag}\n"))
        if taken:
            assert len(ParticleStack.open(path)) == 2
        else:
            refused(path, f"got {label} 1", "extract them", "leave out rlnDefocusU")


def test_optics_group_that_is_not_there(tmp_path):
    refused(make_particles(tmp_path, 2, "1@s.mrcs 1\n2@s.mrcs 7\n"), "particle row 2", "optics group of [1], got 7")
    listed = make_star(tmp_path / "y.star", "1@s.mrcs 1\n")
    listed.write_text(listed.read_text().replace("loop_\n", "", 1))
    refused(listed, "expected data_optics as a table, got no loop_", "write it as RELION does")


def test_optics_box_or_dimensionality_that_is_not_the_stacks(tmp_path):
    path = make_particles(tmp_path, 1, "1@s.mrcs 1\n", optics="1 1.5 300 2.7 0.1 64\n")
    refused(path, "rlnImageSize 8", "got {64}")
    path.write_text(path.read_text().replace("rlnImageSize", "rlnImageDimensionality").replace("64", "3"))
    refused(path, "rlnImageDimensionality 2", "got {3}")


@pytest.mark.parametrize("voxel, agrees", [(0.0, True), (1.0, True), (1.503, True), (2.0, False)])
def test_pixel_size_of_headers_must_agree(tmp_path, voxel, agrees):
    path = make_particles(tmp_path, 1, "1@s.mrcs 1\n", voxel=voxel)
    if agrees:
        assert ParticleStack.open(path).pixel_size == 1.5
    else:
        refused(path, "1.5 by rlnImagePixelSize of data_optics", "2.0 by the MRC headers", "pixel_size=")
        assert ParticleStack.open(path, pixel_size=2.0).pixel_size == 2.0


@pytest.mark.parametrize(
    "columns, row, optics, sources",
    [
        ("rlnMagnification rlnDetectorPixelSize", "25000 5", None, ("2.0 by rlnDetectorPixelSize", "1.5 by the MRC")),
        ("rlnOpticsGroup rlnImagePixelSize", "1 2.5", "", ("1.5 by rlnImagePixelSize of data_optics", "2.5 by")),
    ],
)
def test_sources_of_the_pixel_size_must_agree(tmp_path, columns, row, optics, sources):
    path = make_particles(tmp_path, 1, f"1@s.mrcs {row}\n", f"rlnImageName {columns}", optics, voxel=1.5)
    refused(path, "expected one pixel size", *sources, "pixel_size=")


def test_missing_columns(tmp_path):
    path = make_particles(tmp_path, 1, "m.mrc 1\n", "rlnMicrographName rlnOpticsGroup")
    refused(path, "rlnImageName", "rlnMicrographName")
    columns = "rlnImageName rlnDefocusU rlnDefocusV rlnDefocusAngle rlnVoltage"
    stack = ParticleStack.open(make_star(tmp_path / "y.star", "1@s.mrcs 1 1 1 300\n", columns, None))
    with pytest.raises(ValueError, match=r"y\.star: .*got no rlnSphericalAberration, rlnAmplitudeContrast"):
        _ = stack.ctf
    assert stack.poses is None


@pytest.mark.parametrize("column", ["rlnAngleTilt", "rlnOriginXAngst", "rlnDefocusU"])
@pytest.mark.parametrize("value", ["nan", "inf", "oops"])
def test_numbers_that_are_none_are_named(tmp_path, column, value):
    columns = [*particles.ANGLES, *particles.ORIGINS, *particles.DEFOCUS]
    bad = " ".join(value if label == column else "1" for label in columns)
    rows = f"1@s.mrcs 1 {'1 ' * 8}\n2@s.mrcs 1 {bad}\n"
    stack = ParticleStack.open(make_particles(tmp_path, 2, rows, f"rlnImageName rlnOpticsGroup {' '.join(columns)}"))
    with pytest.raises(ValueError, match=rf"x\.star, particle row 2: expected a finite {column}, got {value} .*remove"):
        _ = stack.poses, stack.ctf


def test_missing_file_unknown_type_and_bad_pixel_size(tmp_path):
    refused(tmp_path / "x.star", "got no file", error=FileNotFoundError)
    (tmp_path / "x.tif").touch()
    refused(tmp_path / "x.tif", ".star, .cs, .mrcs, .mrc", "'.tif'")
    with pytest.raises(ValueError, match="pixel_size: expected"):
        ParticleStack.open(make_stack(tmp_path / "s.mrcs", make_images(1)), pixel_size=0.0)


def test_short_and_damaged_stacks_are_named(tmp_path):
    content = make_stack(tmp_path / "x.mrcs", make_images(3)).read_bytes()
    path = tmp_path / "x.mrcs"
    path.write_bytes(content[:-10])
    refused(path, "short", f"expected {len(content)} bytes", f"got {len(content) - 10}")
    path.write_bytes(content[:500])
    refused(path, "header of 1024 bytes, got 500")
    path.write_bytes(b"\x00" * 4096)
    refused(path, "no MRC file")
    path.write_bytes(content[:12] + b"\x04" + content[13:])  # complex numbers
    refused(path, "in mode 4", "convert")
    star = make_star(tmp_path / "y.star", "1@x.mrcs 1\n")
    with pytest.raises(ValueError, match=r"x\.mrcs: .*in mode 4"):
        ParticleStack.open(star)


@pytest.mark.parametrize("content", [b"This is no MRC file. " * 100, b"\xff" * 4096, bytes(range(256)) * 8])
def test_bytes_that_make_no_sense_in_either_order(tmp_path, content):
    (tmp_path / "x.mrcs").write_bytes(content)
    refused(tmp_path / "x.mrcs", "expected an MRC stack of real numbers", "pixels in mode", "damaged, no MRC file")


def test_stack_cut_after_opening_is_an_error_not_a_crash(tmp_path):
    path = make_stack(tmp_path / "x.mrcs", make_images(3))
    images = ParticleStack.open(path).images
    os.truncate(path, 1500)
    with pytest.raises(ValueError, match=r"x\.mrcs: expected 3 images, as when it was opened, got a shorter file"):
        images[0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mrcfile warns of what this test writes
@pytest.mark.parametrize("value, got", [(np.nan, "nan to nan"), (-np.inf, "-inf to -inf"), (0.0, "0.0 to 0.0")])
def test_nan_and_zero_images_are_named_when_read(tmp_path, value, got):
    images = make_images(5)
    images[3] = value
    make_stack(tmp_path / "s.mrcs", images)
    rows = "".join(f"{number}@s.mrcs 1\n" for number in (5, 4, 3))
    stack = ParticleStack.open(make_star(tmp_path / "x.star", rows))
    assert stack.images[[0, 2]].shape == (2, 8, 8)  # good ones are served
    for key in (slice(None), 1, [2, 1]):
        with pytest.raises(ValueError, match=rf"row 2 \(image 4 of .*s\.mrcs\): .*got values from {got} \(1 such"):
            stack.images[key]


def test_bad_cs_files(tmp_path):
    path = tmp_path / "x.cs"
    make_cs(path, 2, "s.mrcs", drop="blob")
    refused(path, "expected particles with blob/path", "alignments3D/pose", "passthrough")
    path.write_bytes(b"garbage")
    refused(path, "numpy cannot read")
    make_stack(tmp_path / "s.mrcs", make_images(2))
    make_cs(path, 2, "s.mrcs", **{"blob/psize_A": [1.5, 1.2]})
    refused(path, "one pixel size", "1.2, 1.5")
    make_cs(path, 3, "s.mrcs")
    refused(path, "particle row 1", "from 1 to 2", "000003@s.mrcs")


# ---- writing -----------------------------------------------------------------------------------------------

AWKWARD = """# a comment
data_general

_rlnTomoSubTomosAre2DStacks                       0

# version 50001

data_optics

loop_
_rlnOpticsGroup #1
_rlnImagePixelSize #2 [A comment]
_rlnNewIn50 #3
           1     1.500000 [0.1,0.2]

# version 50001

data_particles

loop_
_rlnMicrographName #1
_rlnImageName #2
_rlnOpticsGroup #3
_rlnNewIn50 #4
_rlnGroupName #5
  "a name.mrc"  00003@s.mrcs   1   1.42611e+05  00017
  None\t1@s.mrcs\t1\t0.10\tNaN
b.mrc 000002@s.mrcs 1 -0.000 7@x

data_after

loop_
_rlnSomething #1
5
"""


def test_write_changes_only_the_image_references(tmp_path):
    make_stack(tmp_path / "s.mrcs", make_images(3), 1.5)
    (tmp_path / "x.star").write_text(AWKWARD)
    like = ParticleStack.open(tmp_path / "x.star")
    assert like.table["rlnGroupName"].tolist() == ["00017", "NaN", "7@x"]
    assert like.table["rlnMicrographName"].tolist() == ["a name.mrc", "None", "b.mrc"]
    out = particles.write(tmp_path / "out" / "y.star", like.images[:] + 1, like)
    expected = AWKWARD
    for number, old in enumerate(("00003@s.mrcs", "1@s.mrcs", "000002@s.mrcs"), 1):
        expected = expected.replace(old, f"{number:06d}@y.mrcs", 1)
    lines = [line for line in out.read_text().split("\n") if line]
    assert lines == [line for line in expected.split("\n") if line]
    again = ParticleStack.open(out)
    np.testing.assert_array_equal(again.images[:], like.images[:] + 1)
    assert again.pixel_size == 1.5


@needs_data
@pytest.mark.parametrize("name", ["empiar_10076_7", "relion31", "rln_proj_65", "sample_particles_relion31"])
def test_shared_star_files_keep_rows_order_and_columns(tmp_path, name):
    like = ParticleStack.open(DATA / f"{name}.star")
    out = particles.write(tmp_path / "y.star", like.images, like)
    again = ParticleStack.open(out)
    np.testing.assert_array_equal(again.images[:], like.images[:])
    pd.testing.assert_frame_equal(again.table.drop(columns="rlnImageName"), like.table.drop(columns="rlnImageName"))
    assert list(again.table) == list(like.table)
    assert again.table["rlnImageName"].tolist() == [f"{i:06d}@y.mrcs" for i in range(1, len(like) + 1)]


def test_written_stack_is_valid_and_repeats_byte_for_byte(tmp_path):
    images = make_images(300)
    like = ParticleStack.open(make_stack(tmp_path / "x.mrcs", images, 1.5))
    out = particles.write(tmp_path / "a.mrcs", images, like)
    assert mrcfile.validate(out)
    with mrcfile.open(out) as mrc:
        assert mrc.is_image_stack() and mrc.header.mode == 2 and mrc.header.ispg == 0
        assert mrc.voxel_size.tolist() == pytest.approx((1.5, 1.5, 1.5))
        assert mrc.header.dmin == images.min() and mrc.header.dmax == images.max()
        assert mrc.header.rms == pytest.approx(images.std(), rel=1e-5)
        np.testing.assert_array_equal(mrc.data, images)
    batches = particles.write(tmp_path / "b.mrcs", (images[i : i + 70].copy() for i in range(0, 300, 70)), like)
    with mrcfile.open(batches) as mrc:
        np.testing.assert_array_equal(mrc.data, images)
    particles.write(tmp_path / "c.mrcs", images, like)
    assert out.read_bytes() == (tmp_path / "c.mrcs").read_bytes()


def test_write_streams_one_batch_at_a_time(tmp_path):
    images = make_images(40)
    like = ParticleStack.open(make_stack(tmp_path / "x.mrcs", images))
    sizes = []

    def batches():
        for start in range(0, 40, 10):
            part = list(tmp_path.glob(".y-*.mrcs"))
            sizes.append(part[0].stat().st_size)
            yield images[start : start + 10]

    particles.write(tmp_path / "y.mrcs", batches(), like)
    assert sizes == sorted(sizes) and sizes[-1] >= 1024 + 20 * 256  # on disk before the last is made


@pytest.mark.parametrize(
    "images, message",
    [
        (make_images(2), "expected 3, one a row, got 2"),
        (make_images(4), "expected 3 of 8 x 8 pixels, got 4"),
        (make_images(3, 10), r"expected 3 of 8 x 8 pixels, .*\(3, 10, 10\)"),
        (np.where(np.arange(3)[:, None, None] == 1, np.nan, 0.0 * make_images(3)), "images from 0 .*first is image 1"),
        ([], "expected 3, one a row, got 0"),
        (make_images(3)[0], "expected images of shape"),
    ],
)
def test_bad_images_leave_nothing_behind(tmp_path, images, message):
    like = ParticleStack.open(make_particles(tmp_path, 3, "1@s.mrcs 1\n2@s.mrcs 1\n3@s.mrcs 1\n", voxel=1.5))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        particles.write(tmp_path / "y.star", images, like)
    assert sorted(tmp_path.rglob("*")) == before


def test_full_disk_is_said_and_leaves_nothing(tmp_path):
    like = ParticleStack.open(make_particles(tmp_path, 3, "1@s.mrcs 1\n2@s.mrcs 1\n3@s.mrcs 1\n", voxel=1.5))
    before = sorted(tmp_path.rglob("*"))

    def batches():
        yield make_images(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    for attempt in (
        lambda: particles.write(tmp_path / "y.mrcs", batches(), like),
        lambda: particles.write(tmp_path / "y.star", batches(), like),
        lambda: particles.new(tmp_path / "y.star", batches(), projection.random_rotations(3, 0), 1.5),
    ):
        with pytest.raises(OSError, match=r"y\.(mrcs|star): the disk is full"):
            attempt()
        assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here: it takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_keeps_what_it_had(tmp_path, small_disk):
    rows, columns = "".join(f"{i}@s.mrcs {'x' * 600}\n" for i in range(1, 101)), "rlnImageName rlnMicrographName"
    likes = []
    for box in (16, 8):  # 102 kB of images; 26 kB, which fit, with a star file of 60 kB, which then does not
        make_stack(tmp_path / f"{box}" / "s.mrcs", make_images(100, box), 1.5)
        likes.append(ParticleStack.open(make_star(tmp_path / f"{box}" / "x.star", rows, columns, None)))
    for name in ("y.mrcs", "y.star"):
        (small_disk / name).write_text("old")
    for attempt in (
        lambda: particles.write(small_disk / "y.mrcs", likes[0].images, likes[0]),
        lambda: particles.write(small_disk / "y.star", likes[0].images, likes[0]),
        lambda: particles.write(small_disk / "y.star", likes[1].images, likes[1]),
        lambda: particles.new(small_disk / "y.star", likes[0].images, projection.random_rotations(100, 0), 1.5),
    ):
        with pytest.raises(OSError, match=r"disk/y\.(mrcs|star): the disk is full; free space on .*half-written"):
            attempt()
        assert {path.name: path.read_text() for path in small_disk.iterdir()} == {"y.mrcs": "old", "y.star": "old"}


def test_inputs_are_never_replaced_and_names_are_checked(tmp_path):
    like = ParticleStack.open(make_particles(tmp_path, 1, "1@s.mrcs 1\n", voxel=1.5))
    for name in ("s.mrcs", "x.star", "s.star"):
        with pytest.raises(ValueError, match=f"{name}: expected a new name, got one that would replace an input"):
            particles.write(tmp_path / name, like.images, like)
    with pytest.raises(ValueError, match=r"y\.mrc: file type: expected one of \.star, \.mrcs"):
        particles.write(tmp_path / "y.mrc", like.images, like)
    with pytest.raises(ValueError, match="a name RELION can read, got blanks"):
        particles.write(tmp_path / "a b.star", like.images, like)
    for name in ("a#b", "a:b", "a@b", 'a"b'):  # RELION takes what follows for a format
        with pytest.raises(ValueError, match="a name RELION can read"):
            particles.write(tmp_path / f"{name}.star", like.images, like)


def test_references_can_be_relative_to_a_project(tmp_path):
    images = make_images(2)
    out = particles.new(tmp_path / "Denoise" / "x.star", images, np.eye(3)[None].repeat(2, 0), 1.5, project=tmp_path)
    assert ParticleStack.open(out).table["rlnImageName"].tolist() == ["000001@Denoise/x.mrcs", "000002@Denoise/x.mrcs"]
    np.testing.assert_array_equal(ParticleStack.open(out).images[:], images)


# ---- new stacks --------------------------------------------------------------------------------------------


def test_new_reads_back_with_poses_shifts_half_sets_and_ctf(tmp_path):
    n = 50
    rotations, images = projection.random_rotations(n, 3), make_images(n)
    shifts = np.random.default_rng(4).uniform(-5, 5, (n, 2))
    defocus = {"rlnDefocusU": np.linspace(1e4, 2e4, n), "rlnDefocusV": 1e4, "rlnDefocusAngle": 30.0}
    options = {"shifts": shifts, "spherical_aberration": 2.0, "columns": defocus}
    out = particles.new(tmp_path / "x.star", images, rotations, 1.34, **options)
    stack = ParticleStack.open(out)
    np.testing.assert_allclose(stack.poses.rotations, rotations, atol=1e-6)
    np.testing.assert_allclose(stack.poses.shifts, shifts, atol=1e-6)
    np.testing.assert_allclose(stack.table["rlnOriginXAngst"], -shifts[:, 0], atol=1e-6)
    np.testing.assert_array_equal(stack.images[:], images)
    assert stack.pixel_size == pytest.approx(1.34)
    assert stack.table["rlnRandomSubset"].value_counts().to_dict() == {1: 25, 2: 25}
    np.testing.assert_allclose(stack.ctf["rlnDefocusU"], defocus["rlnDefocusU"], atol=1e-6)
    assert stack.ctf["rlnSphericalAberration"].eq(2.0).all()
    tables = starfile.read(out)
    needed = {"rlnOpticsGroupName", "rlnOpticsGroup", "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"}
    assert needed | {"rlnImagePixelSize", "rlnImageSize", "rlnImageDimensionality"} == set(tables["optics"])
    first = out.read_bytes()
    particles.new(out, images, rotations, 1.34, **options)
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shifts": np.zeros((2, 2))}, r"shifts: expected finite A of shape \(3, 2\), got shape \(2, 2\)"),
        ({"shifts": np.full((3, 2), np.nan)}, "shifts: expected finite"),
        ({"half_sets": [0, 1, 1]}, "half_sets: expected 3 values of 1 or 2"),
        ({"pixel_size": -1.0}, "pixel_size: expected"),
        ({"voltage": -1.0}, "rlnVoltage: expected"),
        ({"rotations": np.zeros((3, 3, 3))}, "rotations: expected orthonormal"),
        ({"images": make_images(2)}, "images: expected 3, one a row, got 2"),
        ({"images": make_images(3)[:, :6]}, "expected square ones.*6 x 8"),
        ({"path": "x.mrcs"}, r"x\.mrcs: file type: expected one of \.star"),
    ],
)
def test_new_refuses(tmp_path, change, message):
    arguments = {"path": "x.star", "images": make_images(3), "rotations": np.eye(3)[None].repeat(3, 0)}
    arguments |= {"pixel_size": 1.5} | change
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        particles.new(tmp_path / arguments.pop("path"), **arguments)
    assert sorted(tmp_path.rglob("*")) == before


# ---- size --------------------------------------------------------------------------------------------------


def memory(field: str) -> int:
    """Bytes of this process, by a line of its status such as RssAnon."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc (Linux)")
def test_streaming_a_stack_takes_memory_for_a_batch_only(tmp_path):
    n, box = 4096, 64  # 67 MB of images
    path = tmp_path / "x.mrcs"
    make_stack(path, make_images(1, box))
    with mrcfile.mmap(path, "r+") as mrc:
        mrc.set_data(np.broadcast_to(make_images(1, box)[0], (n, box, box)))
    stack = ParticleStack.open(path)
    before, most = memory("RssAnon"), 0

    def batches():
        nonlocal most
        for start in range(0, n, 128):
            yield stack.images[start : start + 128]
            most = max(most, memory("RssAnon"))

    particles.write(tmp_path / "y.mrcs", batches(), stack)
    assert (tmp_path / "y.mrcs").stat().st_size == 1024 + n * box * box * 4
    assert most - before < 25e6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc (Linux)")
def test_a_million_rows_open_in_seconds_and_their_images_stay_on_disk(tmp_path):
    n, box = 1_000_000, 64  # 16 GB of images, holes but for those that are read
    path, rng = make_stack(tmp_path / "s.mrcs", make_images(1, box), 1.5), np.random.default_rng(0)
    chosen, images = rng.choice(n, 256, replace=False), make_images(256, box)
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(np.int32(n).tobytes())
        for i, image in zip(chosen, images):
            file.seek(1024 + int(i) * image.nbytes)
            file.write(image.tobytes())
        file.truncate(1024 + n * images[0].nbytes)
    columns = "rlnImageName rlnAngleRot rlnAngleTilt rlnAnglePsi rlnOriginXAngst rlnOriginYAngst rlnOpticsGroup"
    rows = "".join(f"{n - i:07d}@s.mrcs {i % 360}.25 90.5 12.125 0.5 -0.5 1\n" for i in range(n))  # last image first
    star = make_star(tmp_path / "x.star", rows, columns, f"1 1.5 300 2.7 0.1 {box}\n")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    before, start = memory("VmHWM"), time.process_time()  # of this process: other programs take none of it
    stack = ParticleStack.open(star)
    opened = time.process_time()
    for order in (np.arange(256), np.argsort(-chosen)):  # random rows, sorted rows
        np.testing.assert_array_equal(stack.images[n - 1 - chosen[order]], images[order])
    read = time.process_time()
    assert stack.images.shape == (n, box, box)
    assert opened - start < 60 and read - opened < 5  # seconds; 5 and 0.01 measured
    assert memory("VmHWM") - before < 1e9  # 0.5 measured


# ---- RELION ------------------------------------------------------------------------------------------------


def relion(folder: Path, *command: object) -> str:
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def blob_volume(box: int) -> np.ndarray:
    """An asymmetric volume of Gaussian blobs, inside the sphere that RELION reconstructs."""
    rng = np.random.default_rng(5)
    z, y, x = np.ogrid[:box, :box, :box]
    volume = np.zeros((box, box, box), np.float32)
    for centre in box // 2 + rng.uniform(-box / 5, box / 5, (8, 3)):
        volume += np.exp(-((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2) / 6).astype(np.float32)
    return volume


@needs_relion
def test_relion_reconstructs_the_volume_from_new_and_from_written_stacks(tmp_path):
    box, n, pixel_size = 32, 400, 2.5
    volume, rotations = blob_volume(box), projection.random_rotations(n, 6)
    shifts = np.random.default_rng(7).uniform(-3, 3, (n, 2)) * pixel_size
    images = projection.project(volume, rotations, shifts / pixel_size)
    particles.new(tmp_path / "x.star", images, rotations, pixel_size, shifts=shifts)
    stack = ParticleStack.open(tmp_path / "x.star")
    particles.write(tmp_path / "y.star", stack.images, stack)
    for name in ("x", "y"):
        relion(tmp_path, "relion_reconstruct", "--i", f"{name}.star", "--o", f"{name}.mrc")
        with mrcfile.open(tmp_path / f"{name}.mrc", permissive=True) as mrc:
            assert np.corrcoef(mrc.data.ravel(), volume.ravel())[0, 1] > 0.97
            assert mrc.voxel_size.x == pytest.approx(pixel_size, rel=1e-3)
    relion(tmp_path, "relion_reconstruct", "--i", "x.star", "--o", "half.mrc", "--subset", 1)
    assert (tmp_path / "half.mrc").exists()


def statistics(folder: Path, name: str) -> np.ndarray:
    """Mean, standard deviation, minimum and maximum of each image, and the pixel size, as RELION has them."""
    output = relion(folder, "relion_image_handler", "--i", name, "--stats")
    found = re.findall(r"avg= (\S+) stddev= (\S+) minval= (\S+) maxval= (\S+); angpix = (\S+)", output)
    return np.array(found, float)


@needs_relion
@pytest.mark.parametrize("name", ["x.mrcs", "x.star", "y.mrcs", "y.star", "z.mrcs"])
def test_relions_statistics_of_what_new_and_write_wrote_are_numpys(tmp_path, name):
    images = make_images(5, 16) * 3 + np.arange(5, dtype=np.float32)[:, None, None]
    stack = ParticleStack.open(particles.new(tmp_path / "x.star", images, projection.random_rotations(5, 0), 2.0))
    particles.write(tmp_path / "y.star", stack.images, stack)
    particles.write(tmp_path / "z.mrcs", stack.images, stack)
    expected = [[image.mean(), image.std(), image.min(), image.max(), 2.0] for image in images]
    np.testing.assert_allclose(statistics(tmp_path, name), expected, rtol=1e-5)


@needs_data
@needs_relion
@pytest.mark.parametrize("name", ["relion31", "empiar_10076_7", "sample_particles_relion31"])
def test_relion_reads_real_particles_that_we_wrote(tmp_path, name):
    like = ParticleStack.open(DATA / f"{name}.star")
    particles.write(tmp_path / "y.star", like.images, like)
    found = statistics(tmp_path, "y.star")
    np.testing.assert_allclose(found[:, 0], like.images[:].mean(axis=(1, 2)), atol=1e-5)
    np.testing.assert_allclose(found[:, 4], like.pixel_size, rtol=1e-4)


@needs_data
@needs_relion
def test_relion_reconstructs_from_a_written_star_as_from_the_original(tmp_path):
    like = ParticleStack.open(DATA / "relion31.star")
    particles.write(tmp_path / "y.star", like.images, like)
    for name in ("relion31.star", "relion31.mrcs"):
        shutil.copy(DATA / name, tmp_path)
    maps = []
    for name in ("relion31", "y"):
        options = ["--ctf", "--pad", 1, "--maxres", 30]
        relion(tmp_path, "relion_reconstruct", "--i", f"{name}.star", "--o", f"{name}.mrc", *options)
        maps.append(mrcfile.read(tmp_path / f"{name}.mrc"))
    assert maps[0].std() > 0
    np.testing.assert_allclose(maps[1], maps[0], rtol=0, atol=1e-4 * maps[0].std())


def test_a_map_is_read_with_its_voxel_size_or_the_one_that_is_given_and_holds_no_time(tmp_path):
    """The same volume gives the same bytes, whenever it is written: mrcfile's own label is dated."""
    volume = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    path = mrc.write_map(tmp_path / "map.mrc", volume, 1.34)
    for given, expected in ((None, 1.34), (2.0, 2.0)):
        read, voxel_size = mrc.read_map(path, given)
        np.testing.assert_array_equal(read, volume)
        assert voxel_size == pytest.approx(expected)
    with mrcfile.open(path) as file:
        assert file.get_labels() == ["Created by cryo_lib"] and file.voxel_size.x == pytest.approx(1.34)


def test_what_is_no_map_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.mrc: expected an .mrc map, got no file; check the path"):
        mrc.read_map(tmp_path / "gone.mrc")
    path = tmp_path / "stack.mrcs"
    mrc.write_stack(path, np.random.default_rng(0).normal(size=(3, 8, 8)), (3, 8, 8), 1.0)
    with pytest.raises(ValueError, match=r"stack.mrcs: expected a cubic map, got \(3, 8, 8\); is it a stack of images"):
        mrc.read_map(path)
    silent = mrc.write_map(tmp_path / "silent.mrc", np.ones((8, 8, 8)), 0.0)
    with pytest.raises(ValueError, match="silent.mrc: expected a voxel size, got none .*; give it as voxel_size"):
        mrc.read_map(silent)
