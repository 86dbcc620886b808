"""Atomic models: the phantom, reading, fetching, superposing, and opening the clamp."""

from __future__ import annotations

import gzip
import http.server
import threading
from pathlib import Path

import gemmi
import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from cryo_lib import structures

SHARED = Path(__file__).resolve().parents[2] / "shared"
RNAP = SHARED / "data" / "rnap"
needs_rnap = pytest.mark.skipif(not RNAP.is_dir(), reason=f"real RNA polymerase structures not found in {RNAP}")


def bond_lengths(structure):
    """CA-CA distances of residues with consecutive numbers in a chain."""
    lengths = []
    for chain in structure[0]:
        ca = np.array([residue["CA"][0].pos.tolist() for residue in chain])
        number = np.array([residue.seqid.num for residue in chain])
        lengths.append(np.linalg.norm(np.diff(ca, axis=0), axis=1)[np.diff(number) == 1])
    return np.concatenate(lengths)


def positions(structure):
    return np.array([site.atom.pos.tolist() for site in structure[0].all()])


def ca_of_d(structure, first, stop):
    return np.array([r["CA"][0].pos.tolist() for r in structure[0]["D"] if first <= r.seqid.num < stop])


def clashes(structure, distance):
    """Pairs of atoms closer than `distance`, of residues that are not the same nor next to one another."""
    xyz = positions(structure)
    owner = np.repeat(np.arange(sum(map(len, structure[0]))), [len(r) for chain in structure[0] for r in chain])
    i, j = owner[cKDTree(xyz).query_pairs(distance, output_type="ndarray")].T
    return int((abs(i - j) > 1).sum())


@pytest.fixture(scope="module")
def claw():
    return structures.phantom(3, opening=20.0, seed=1)


@pytest.fixture(scope="module")
def rnap():
    closed = structures.read(RNAP / "5uh6.pdb.gz", structures.CHAINS)
    open_ = structures.read(RNAP / "6fbv.pdb.gz", structures.CHAINS)
    return closed, open_, structures.morph(closed, open_, 5)


def peptide(n=12, name="C"):
    """A small helix of alanines in one chain."""
    structure, chain = gemmi.Structure(), gemmi.Chain(name)
    for k in range(n):
        residue = gemmi.Residue()
        residue.name, residue.seqid, residue.entity_type = "ALA", gemmi.SeqId(k + 1, " "), gemmi.EntityType.Polymer
        places = (("N", 1.5, -28, -0.9), ("CA", 2.3, 0, 0.0), ("C", 1.7, 27, 1.1), ("O", 2.0, 20, 2.3))
        for atom_name, radius, turn, z in places:
            angle = np.radians(100 * k + turn)
            atom = gemmi.Atom()
            atom.name, atom.element = atom_name, gemmi.Element(atom_name[0])
            atom.pos = gemmi.Position(radius * np.cos(angle), radius * np.sin(angle), 1.5 * k + z)
            residue.add_atom(atom)
        chain.add_residue(residue)
    structure.add_model(gemmi.Model(1))
    structure[0].add_chain(chain)
    structure.setup_entities()
    return structure


# --- the phantom ---------------------------------------------------------------------------------------------------


def test_phantom_has_the_mass_size_and_chains_of_rna_polymerase(claw):
    assert 355e3 < structures.mass(claw[0]) < 385e3
    assert [chain.name for chain in claw[0][0]] == list("ABCDEF")
    extent = np.sort(np.ptp(positions(claw[0]), axis=0))
    assert (extent > (85, 100, 130)).all() and (extent < (125, 145, 180)).all()


def test_phantom_is_packed_like_protein(claw):
    """A point in the interior sees the atoms of protein: about one heavy atom in 17-19 A^3, in a 10 A ball."""
    tree = cKDTree(positions(claw[0]))
    counts = tree.query_ball_point(positions(claw[0])[::50], 10.0, return_length=True)
    density = np.percentile(counts, 80) / (4 / 3 * np.pi * 10.0**3)
    assert 0.045 < density < 0.075


def test_phantom_chains_hold_and_atoms_do_not_clash_in_any_conformation(claw):
    for structure in claw:
        lengths = bond_lengths(structure)
        assert len(lengths) > 3000
        assert np.mean((lengths > 3.6) & (lengths < 4.0)) > 0.99
        assert clashes(structure, 2.0) <= 5


def test_phantom_clamp_opens_by_equal_angles_and_the_core_stays(claw):
    assert structures.clamp_angle(claw[0], claw[2]) == pytest.approx(20.0, abs=0.2)
    assert structures.clamp_angle(claw[0], claw[1]) == pytest.approx(10.0, abs=0.2)
    core = [np.array([r["CA"][0].pos.tolist() for r in s[0]["C"]]) for s in claw]
    assert np.sqrt(((core[2] - core[0]) ** 2).sum(1).mean()) < 0.3
    gap = [np.linalg.norm(positions(s), axis=1).mean() for s in claw]
    assert gap[0] < gap[1] < gap[2]


def test_phantom_is_centred_and_made_by_its_seed_alone(claw):
    centre = np.mean([positions(s).mean(axis=0) for s in claw], axis=0)
    assert np.abs(centre).max() < 1e-6
    again = structures.prepare("phantom", 3, seed=1, opening=20.0)
    assert all(np.array_equal(positions(a), positions(b)) for a, b in zip(claw, again, strict=True))


@pytest.mark.parametrize("opening", [0.0, -3.0, 90.0, float("nan")])
def test_phantom_refuses_an_impossible_opening(opening):
    with pytest.raises(ValueError, match="opening: expected a finite number > 0.0 and <= 40.0"):
        structures.phantom(2, opening)


def test_fewer_than_two_conformations_are_refused():
    with pytest.raises(ValueError, match="n_conformations: expected an integer >= 2, got 1"):
        structures.phantom(1)
    with pytest.raises(ValueError, match="n_conformations: expected an integer >= 2, got 1"):
        structures.morph(peptide(), peptide(), 1)


# --- reading and writing ---------------------------------------------------------------------------------------------


@needs_rnap
def test_4xln_filtered_to_the_polymerase_has_3496_residues():
    structure = structures.read(RNAP / "4xln.pdb.gz", list("ABCDEF"))
    assert sum(len(chain) for chain in structure[0]) == 3496
    assert 355e3 < structures.mass(structure) < 370e3
    assert [chain.name for chain in structures.read(RNAP / "4xln.pdb.gz")[0]] == list("ABCDEF")  # no DNA, no RNA


@pytest.mark.parametrize("suffix", [".cif", ".pdb"])
def test_what_is_written_is_read_back(claw, tmp_path, suffix):
    path = structures.write(claw[0], tmp_path / f"claw{suffix}")
    back = structures.read(path)
    assert [(c.name, [r.name for r in c]) for c in back[0]] == [(c.name, [r.name for r in c]) for c in claw[0][0]]
    assert np.abs(positions(back) - positions(claw[0])).max() < 2e-3
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_write_refuses_an_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"expected one of the suffixes .pdb, .cif, got '.xyz'"):
        structures.write(peptide(), tmp_path / "a.xyz")


def test_only_the_first_altloc_and_model_and_the_protein_are_read(tmp_path):
    line = "{:6}{:5d}  {:3}{:1}{:3} C{:4d}    {:8.3f}{:8.3f}{:8.3f}  1.00 20.00           {}\n".format
    atoms = (line("ATOM", 1, "CA", "A", "ALA", 1, 0, 0, 0, "C") + line("ATOM", 2, "CA", "B", "ALA", 1, 1, 0, 0, "C")
             + line("ATOM", 3, "CA", " ", "GLY", 2, 3.8, 0, 0, "C") + "TER\n"
             + line("HETATM", 4, "O", " ", "HOH", 9, 9, 9, 9, "O"))
    path = tmp_path / "small.pdb"
    path.write_text(f"MODEL        1\n{atoms}ENDMDL\nMODEL        2\n{atoms}ENDMDL\nEND\n")
    structure = structures.read(path)
    assert len(structure) == 1
    assert positions(structure).tolist() == [[0, 0, 0], [3.8, 0, 0]]


def test_read_names_the_chains_that_are_there(tmp_path):
    path = structures.write(peptide(name="X"), tmp_path / "x.pdb")
    with pytest.raises(ValueError, match="chains C, D, got a structure without C, D; its protein chains are X"):
        structures.read(path, ["C", "D"])


def test_read_explains_a_missing_or_wrongly_named_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pdb: expected a coordinate file, got nothing there"):
        structures.read(tmp_path / "none.pdb")
    with pytest.raises(ValueError, match="expected a file named .pdb, .cif"):
        structures.read(tmp_path / "none.txt")


@pytest.mark.parametrize("name", ["empty.pdb", "empty.cif", "empty.pdb.gz", "empty.cif.gz"])
def test_read_explains_an_empty_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name}: expected"):
        structures.read(tmp_path / name)


def test_read_explains_a_truncated_file(tmp_path):
    whole = gzip.compress(peptide().make_mmcif_document().as_string().encode())
    path = tmp_path / "cut.cif.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.cif.gz: expected a whole coordinate file, got a damaged one"):
        structures.read(path)


# --- superposing, measuring, opening ---------------------------------------------------------------------------------


def moved(structure, rotation, shift):
    copy = structure.clone()
    for site, position in zip(copy[0].all(), (positions(structure) @ rotation.T + shift).tolist(), strict=True):
        site.atom.pos = gemmi.Position(*position)
    return copy


def test_superpose_undoes_any_rigid_motion(claw):
    rotation = Rotation.from_euler("ZYZ", [50, 80, 20], degrees=True).as_matrix()
    away = moved(claw[0], rotation, np.array([30.0, -9.0, 4.0]))
    assert np.abs(positions(structures.superpose(away, claw[0], "C")) - positions(claw[0])).max() < 1e-6
    assert structures.clamp_angle(away, claw[0]) < 1e-3


def test_superpose_refuses_another_protein(claw):
    with pytest.raises(ValueError, match="chain C of phantom .* expected the same protein .* in stranger, got C"):
        stranger = peptide()
        stranger.name = "stranger"
        structures.superpose(claw[0], stranger, "C")


def test_chains_with_other_names_are_paired_by_their_residues(claw):
    renamed = claw[1].clone()
    renamed[0]["F"].name = "H"
    assert structures.clamp_angle(claw[0], renamed, "C", "F") == structures.clamp_angle(claw[0], claw[1], "C", "F")


@needs_rnap
def test_the_real_clamp_turns_18_8_degrees_and_in_equal_steps(rnap):
    closed, open_, path = rnap
    assert structures.clamp_angle(closed, open_) == pytest.approx(18.8, abs=0.1)
    angles = [structures.clamp_angle(path[0], conformation) for conformation in path]
    assert np.allclose(angles, np.linspace(0, 18.8, 5), atol=0.4)
    assert np.ptp(np.diff(angles)) < 0.2


@needs_rnap
def test_the_path_tears_no_chain_and_makes_no_clash(rnap):
    closed, _, path = rnap
    sound = (bond_lengths(closed) > 3.6) & (bond_lengths(closed) < 4.0)
    for conformation in path:
        lengths = bond_lengths(conformation)[sound]
        assert np.mean((lengths > 3.6) & (lengths < 4.0)) >= 0.999
        assert clashes(conformation, 2.0) <= 2
        assert clashes(conformation, 2.4) <= clashes(closed, 2.4)


@needs_rnap
def test_the_path_ends_at_the_two_structures(rnap):
    closed, open_, path = rnap
    assert np.array_equal(positions(path[0]), positions(closed))
    keys = [{(c.name, str(r.seqid)): r["CA"][0].pos.tolist() for c in s[0] for r in c} for s in
            (path[-1], structures.superpose(open_, closed))]
    common = keys[0].keys() & keys[1].keys()
    distance = np.array([np.subtract(keys[0][k], keys[1][k]) for k in common])
    assert len(common) == 3205
    assert np.sqrt((distance**2).sum(axis=1).mean()) < 0.3


@needs_rnap
def test_the_path_is_no_straight_line_and_keeps_the_clamp_rigid(rnap):
    """Half-way along a straight line the clamp shrinks by 1 - cos(half the turn); on the path it keeps its size."""
    closed, _, path = rnap
    clamp = [ca_of_d(s, 21, 120) for s in (closed, path[2], path[4])]

    def size(x):
        return np.linalg.norm(x - x.mean(axis=0), axis=1).mean()

    line = 0.5 * (clamp[0] + clamp[2])
    ends = 0.5 * (size(clamp[0]) + size(clamp[2]))
    assert abs(size(clamp[1]) / ends - 1) < 0.2 * (1 - size(line) / ends)


@needs_rnap
def test_residues_that_only_the_closed_structure_has_move_with_their_neighbours(rnap):
    closed, open_, path = rnap
    short = open_.clone()
    chain = short[0]["D"]
    for n in reversed(range(len(chain))):
        if 150 <= chain[n].seqid.num < 230:  # an insertion on the clamp
            del chain[n]
    carried = structures.morph(closed, short, 2)[-1]
    assert sum(map(len, carried[0])) == sum(map(len, closed[0]))
    lengths, sound = bond_lengths(carried), np.abs(bond_lengths(closed) - 3.8) < 0.2
    assert np.mean(np.abs(lengths[sound] - 3.8) < 0.2) > 0.999
    before, after, truth = (ca_of_d(s, 150, 230) for s in (closed, carried, path[-1]))
    assert np.linalg.norm(after - truth, axis=1).mean() < 0.5 * np.linalg.norm(before - truth, axis=1).mean()


@needs_rnap
def test_prepare_from_files_gives_centred_conformations():
    made = structures.prepare("files", 2, closed_file=RNAP / "5uh6.pdb.gz", open_file=RNAP / "6fbv.pdb.gz")
    assert np.abs(np.mean([positions(s).mean(axis=0) for s in made], axis=0)).max() < 1e-6
    assert structures.clamp_angle(*made) == pytest.approx(18.8, abs=0.4)


def test_prepare_refuses_an_unknown_source_and_missing_files():
    with pytest.raises(ValueError, match="source: expected one of phantom, pdb, files, got 'rcsb'"):
        structures.prepare("rcsb")
    with pytest.raises(ValueError, match="open_file: source 'files' needs the path of a coordinate file, got None"):
        structures.prepare("files", closed_file="closed.pdb")


# --- fetching --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """A local server: entry 1AAA good, 2BBB a web page, 3CCC cut half-way, 5EEE broken, all others 404."""
    good = gzip.compress(peptide().make_mmcif_document().as_string().encode())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            entry = self.path.split("/")[-1][:4]
            status = {"1AAA": 200, "2BBB": 200, "3CCC": 200, "5EEE": 500}.get(entry, 404)
            body = b"<html>please log in</html>" if entry == "2BBB" else good
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if entry == "3CCC" else body)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_fetch_keeps_a_good_file_and_needs_no_server_the_second_time(server, tmp_path):
    path = structures.fetch("1aaa", tmp_path, server)
    assert path == tmp_path / "1aaa.cif.gz"
    assert sum(map(len, structures.read(path)[0])) == 12
    assert structures.fetch("1AAA", tmp_path, "http://127.0.0.1:9") == path


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("2BBB", ValueError, "expected a coordinate file, got another content"),
        ("3CCC", ConnectionError, "expected a whole file, got .*; check the network and run again"),
        ("4DDD", FileNotFoundError, "expected entry 4DDD, got 404: no such entry; check the identifier"),
        ("5EEE", ConnectionError, "expected a file, got HTTP 500; try again later"),
    ],
)
def test_fetch_explains_a_bad_answer_and_leaves_nothing(server, tmp_path, entry, error, message):
    with pytest.raises(error, match=f"{entry}.cif.gz: {message}.*{entry.lower()}.cif.gz yourself, or use"):
        structures.fetch(entry, tmp_path, server)
    assert list(tmp_path.iterdir()) == []


def test_fetch_explains_that_there_is_no_server(tmp_path):
    with pytest.raises(ConnectionError, match="check the network and run again, or put the file at .*, or use source"):
        structures.fetch("1AAA", tmp_path, "http://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entry", ["", "../x", "4XLNX", "ABCD", 1234])
def test_fetch_refuses_what_is_no_identifier(tmp_path, entry):
    with pytest.raises(ValueError, match="expected a four-character PDB identifier such as 4XLN"):
        structures.fetch(entry, tmp_path)
