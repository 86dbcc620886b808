"""Structures of packages: the split keeps relatives together, and what is fetched is what was listed."""

import hashlib
import io
import tarfile

import gemmi
import numpy as np
import pytest

from cryo_lib.simulate import library

HEADER = "entry,split,group,assembly,package,version,form,file,sha256\n"


def model(path):
    """A dipeptide and a water, with a hydrogen, and an assembly of two copies 50 A apart."""
    lines = [
        "REMARK 350 BIOMOLECULE: 1",
        "REMARK 350 APPLY THE FOLLOWING TO CHAINS: A",
        "REMARK 350   BIOMT1   1  1.000000  0.000000  0.000000        0.00000",
        "REMARK 350   BIOMT2   1  0.000000  1.000000  0.000000        0.00000",
        "REMARK 350   BIOMT3   1  0.000000  0.000000  1.000000        0.00000",
        "REMARK 350   BIOMT1   2  1.000000  0.000000  0.000000       50.00000",
        "REMARK 350   BIOMT2   2  0.000000  1.000000  0.000000        0.00000",
        "REMARK 350   BIOMT3   2  0.000000  0.000000  1.000000        0.00000",
        "ATOM      1  N   GLY A   1       0.000   0.000   0.000  1.00 20.00           N",
        "ATOM      2  CA  GLY A   1       1.450   0.000   0.000  1.00 20.00           C",
        "ATOM      3  HA2 GLY A   1       1.900   0.900   0.000  1.00 20.00           H",
        "ATOM      4  C   GLY A   1       2.000   1.400   0.000  0.00 20.00           C",
        "ATOM      5  CA  ALA A   2       4.200   2.300   0.000  1.00 20.00           C",
        "TER       6      ALA A   2",
        "HETATM    7  O   HOH A   3       9.000   9.000   9.000  1.00 20.00           O",
        "END",
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """A list of one entry, in an archive of one file; where the list and the archive are."""
    content = model(tmp_path / "x.pdb").read_bytes()
    archive = tmp_path / "pack-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as opened:
        member = tarfile.TarInfo("pack-1.0/tests/x.pdb")
        member.size = len(content)
        opened.addfile(member, io.BytesIO(content))
    path = tmp_path / "list.csv"
    row = f"1ABC,train,1ABC,1,pack,1.0,sdist,tests/x.pdb,{hashlib.sha256(content).hexdigest()}\n"
    path.write_text(HEADER + row)
    monkeypatch.setattr(library, "LIST", path)
    monkeypatch.setattr(library, "_download", lambda *_: archive)
    return path


def test_a_third_is_held_out_and_no_group_is_on_both_sides():
    table = library.entries()
    assert table.index.is_unique and table.index.str.fullmatch("[0-9][A-Z0-9]{3}").all()
    sides = table.groupby("group")["split"].nunique()
    assert (sides == 1).all()
    assert 0.32 < (table["split"] == "held_out").mean() < 0.36
    assert len(library.entries("train")) + len(library.entries("held_out")) == len(table)
    assert table["sha256"].str.fullmatch("[0-9a-f]{64}").all()
    assert table["split"]["6ZU5"] == "held_out"  # the ribosome of the stand-in is a particle never seen


def test_what_is_fetched_is_kept_and_mended(listed, tmp_path, monkeypatch):
    folder = tmp_path / "structures"
    library.fetch(folder)
    path = library.path_of(folder, "1ABC")
    assert path.name == "1ABC.pdb" and path.read_bytes() == (tmp_path / "x.pdb").read_bytes()
    path.write_text("damaged")
    library.fetch(folder)
    assert path.read_bytes() == (tmp_path / "x.pdb").read_bytes()
    monkeypatch.setattr(library, "_download", lambda *_: pytest.fail("fetched again"))
    library.fetch(folder)


def test_another_content_and_a_missing_file_are_refused_and_nothing_is_left(listed, tmp_path):
    text = listed.read_text()
    listed.write_text(text.replace("tests/x.pdb", "tests/y.pdb"))
    with pytest.raises(ValueError, match="pack 1.0: expected tests/y.pdb with entry 1ABC .* got no such file; take"):
        library.fetch(tmp_path / "structures")
    listed.write_text(text[:-10] + "000000000\n")
    with pytest.raises(ValueError, match="got another content"):
        library.fetch(tmp_path / "structures")
    assert not list((tmp_path / "structures").glob("*"))


def test_without_an_index_the_error_says_so(tmp_path, monkeypatch):
    for name, value in {"INDEX_URL": "http://127.0.0.1:9", "RETRIES": "0", "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ConnectionError, match="fetch beta-gan-nothing 1.0: expected its wheel by pip, got .*; check"):
        library._download("beta-gan-nothing", "1.0", "wheel", tmp_path)


def test_reading_builds_the_assembly_of_heavy_atoms_without_water(listed, tmp_path):
    library.fetch(tmp_path)
    points = library.read(tmp_path, "1ABC")
    np.testing.assert_array_equal(points.electrons, [7, 6, 6, 6] * 2)
    np.testing.assert_allclose(points.xyz[4:] - points.xyz[:4], np.tile((50.0, 0, 0), (4, 1)), atol=1e-6)
    with pytest.raises(ValueError, match="entry: expected one of 1ABC, got '2XYZ'"):
        library.read(tmp_path, "2XYZ")
    with pytest.raises(FileNotFoundError, match="expected entry 1ABC, found nothing; run notebook 40"):
        library.read(tmp_path / "elsewhere", "1ABC")


def test_thinning_keeps_electrons_and_their_centre():
    rng = np.random.default_rng(0)
    points = library.Points("p", rng.normal(0, 20, (1003, 3)), rng.uniform(1, 9, 1003))
    thin = points.thinned(100)
    assert len(thin.xyz) <= 100
    np.testing.assert_allclose(thin.electrons.sum(), points.electrons.sum())
    np.testing.assert_allclose(thin.electrons @ thin.xyz, points.electrons @ points.xyz)
    np.testing.assert_allclose(points.thinned(2000).xyz, points.xyz)


def test_as_a_structure_the_points_are_around_the_origin():
    rng = np.random.default_rng(1)
    points = library.Points("p", rng.normal(30, 20, (50, 3)), rng.uniform(1, 60, 50))
    structure = points.structure()
    xyz = np.array([site.atom.pos.tolist() for site in structure[0].all()])
    np.testing.assert_allclose(xyz.min(axis=0) + xyz.max(axis=0), 0, atol=1e-9)
    assert np.linalg.norm(xyz, axis=1).max() == pytest.approx(points.diameter / 2)
    electrons = [6 * site.atom.occ for site in structure[0].all()]
    np.testing.assert_allclose(electrons, points.electrons, rtol=1e-6)
    assert isinstance(structure, gemmi.Structure)
