"""Image references as RELION, Scipion and tomography write them; links and .. lead where the system takes them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import mrcfile
import numpy as np
import pytest

from cryo_lib.stacks import particles
from cryo_lib.stacks.particles import ParticleStack

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")


def stack(path: Path, n: int, box: int = 8) -> np.ndarray:
    """Image k has mean k, to a hundredth; written by mrcfile alone."""
    images = np.random.default_rng(0).normal(0, 1e-3, (n, box, box)).astype(np.float32)
    images += np.arange(n, dtype=np.float32)[:, None, None]
    path.parent.mkdir(parents=True, exist_ok=True)
    with mrcfile.new(path, images, overwrite=True) as file:
        file.set_image_stack()
    return images


def star(path: Path, *rows: str, labels: str = "rlnImageName", before: str = "") -> Path:
    lines = [f"_{label}" for label in labels.split()]
    path.write_text("\n".join([f"{before}data_\n\nloop_", *lines, *rows, ""]))
    return path


def means(path: Path, **options: object) -> list[float]:
    return ParticleStack.open(path, **options).images[:].mean(axis=(1, 2)).round(2).tolist()


def test_a_file_without_an_image_number_must_hold_one_image(tmp_path):
    stack(tmp_path / "one.mrc", 1)
    stack(tmp_path / "four.mrcs", 4)
    assert means(star(tmp_path / "x.star", "one.mrc")) == [0.0]
    with pytest.raises(ValueError, match=r"row 2: expected an image number .*four\.mrcs, a stack \(of the tilts of a"):
        ParticleStack.open(star(tmp_path / "x.star", "one.mrc", "four.mrcs"))
    mrcfile.write(tmp_path / "cube.mrc", np.zeros((8, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"row 1: .*cube\.mrc, a volume \(a 3D subtomogram\) of 8 sections"):
        ParticleStack.open(star(tmp_path / "x.star", "cube.mrc"))


@pytest.mark.parametrize("number", ["1.5", "1e0", "+1", "1_0", "٢", "", "9" * 30, "nan"])
def test_image_numbers_are_whole_and_in_digits(tmp_path, number):
    stack(tmp_path / "s.mrcs", 20)
    with pytest.raises(ValueError, match=r"x\.star, particle row 2: expected .*image number"):
        ParticleStack.open(star(tmp_path / "x.star", "1@s.mrcs", f"{number}@s.mrcs"))


def test_a_format_after_the_name_is_left_out_unless_it_is_a_part_of_it(tmp_path):
    stack(tmp_path / "s.mrcs", 3)
    assert means(star(tmp_path / "x.star", "3@s.mrcs:mrcs")) == [2.0]
    stack(tmp_path / "s.mrcs:mrcs", 4)
    assert means(star(tmp_path / "x.star", "4@s.mrcs:mrcs")) == [3.0]


def test_tomography_is_refused_by_name(tmp_path):
    stack(tmp_path / "s.mrcs", 4)
    flag = "data_general\n\n_rlnTomoSubTomosAre2DStacks 1\n\n"
    with pytest.raises(ValueError, match="expected single particles, got 2D stacks of tilts"):
        ParticleStack.open(star(tmp_path / "x.star", "1@s.mrcs", before=flag))
    assert means(star(tmp_path / "x.star", "1@s.mrcs", before=flag.replace(" 1", " 0"))) == [0.0]
    with pytest.raises(ValueError, match=r"got subtomograms \(rlnTomoName\); tomography is not read"):
        ParticleStack.open(star(tmp_path / "x.star", "1@s.mrcs TS1", labels="rlnImageName rlnTomoName"))


@pytest.mark.parametrize("scales, series", [((0.9, 0.8), True), ((1, 1), False)])
def test_rows_of_one_particle_by_warp_and_m_are_a_tilt_series_and_rows_of_one_micrograph_are_not(
    tmp_path, scales, series
):
    stack(tmp_path / "s.mrcs", 4)
    labels = "rlnImageName rlnGroupName rlnCtfScalefactor rlnCtfBfactor"
    rows = [f"{i}@s.mrcs p{(i + 1) // 2} {scales[i % 2]} {-4 * (i % 2)}" for i in (1, 2, 3, 4)]
    path = star(tmp_path / "x.star", *rows, labels=labels)
    if series:
        with pytest.raises(ValueError, match="got 2D tilt series, as Warp and M write"):
            ParticleStack.open(path)
    else:
        assert means(path) == [0.0, 1.0, 2.0, 3.0]


def test_b_factors_and_scales_fitted_to_particles_are_no_tilt_series(tmp_path):
    """RELION's CtfRefine fits both to each particle, whose group is its micrograph."""
    stack(tmp_path / "s.mrcs", 4)
    labels = "rlnImageName rlnGroupName rlnCtfScalefactor rlnCtfBfactor"
    fitted = [(1.02, -3.1), (0.97, 4.6), (1.01, 0.2), (0.99, -7.9)]
    rows = [f"{i + 1}@s.mrcs mic{i // 2} {scale} {b}" for i, (scale, b) in enumerate(fitted)]
    assert means(star(tmp_path / "x.star", *rows, labels=labels)) == [0.0, 1.0, 2.0, 3.0]


def test_dots_in_a_reference_lead_where_the_links_before_them_lead(tmp_path):
    """project/job is a link to disk/deep/job: from there .. is disk/deep, and not the project."""
    images = stack(tmp_path / "disk" / "deep" / "s.mrcs", 2)
    (tmp_path / "disk" / "deep" / "job").mkdir()
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "job").symlink_to(tmp_path / "disk" / "deep" / "job")
    path = star(tmp_path / "project" / "x.star", "2@job/../s.mrcs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(ParticleStack.open(path).images[0], images[1])


def test_references_that_are_written_hold_from_within_a_linked_project(tmp_path):
    stack(tmp_path / "s.mrcs", 2)
    like = ParticleStack.open(star(tmp_path / "x.star", "1@s.mrcs", "2@s.mrcs"))
    (tmp_path / "disk" / "project").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "project")
    out = particles.write(tmp_path / "out" / "y.star", like.images, like, project=tmp_path / "link")
    name = ParticleStack.open(out, project=tmp_path / "link").table["rlnImageName"][0].partition("@")[2]
    os.chdir(tmp_path / "link")  # as RELION is started
    assert os.path.samefile(name, tmp_path / "out" / "y.mrcs")


def test_a_stack_in_a_linked_folder_of_the_project_is_in_the_project(tmp_path):
    stack(tmp_path / "disk" / "job" / "s.mrcs", 1)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "job").symlink_to(tmp_path / "disk" / "job")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert means(star(tmp_path / "project" / "x.star", "1@job/s.mrcs"), project=tmp_path / "project") == [0.0]


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the cases {CASES} are not there")
@pytest.mark.parametrize(
    "name, expected",
    [
        ("a #1", 5.36),
        ("blank_before_data", 2.62),
        ("byte_order_mark", 2.62),
        ("comment_after_row", 5.36),
        ("comment_between_labels", 5.36),
        ("ctf_in_both_tables", 5.36),
        ("format_suffix", 5.36),
        ("rlnPixelSize_30", 2.62),
        ("single_quotes", 5.36),
        ("fractional_number", "a whole image number from 1 to 6"),
        ("relion5_2dstacks", "2D stacks of tilts"),
        ("subtomograms", "3D subtomogram"),
        ("unclosed_quote", "row 1: expected a closing"),
        ("wrong_pixel_size", "1.0 by rlnImagePixelSize of data_optics; 5.36 by the MRC headers"),
    ],
)
def test_every_case_is_read_as_it_stands_or_refused(name, expected):
    """Image k of the stack has mean k."""
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            ParticleStack.open(CASES / f"{name}.star")
        return
    opened = ParticleStack.open(CASES / f"{name}.star")
    assert opened.pixel_size == expected
    np.testing.assert_allclose(opened.images[:].mean(axis=(1, 2)), np.arange(6), atol=0.2)
    if name == "ctf_in_both_tables":
        assert opened.ctf["rlnVoltage"].eq(200).all() and opened.ctf["rlnAmplitudeContrast"].eq(0.07).all()
