"""Atomic models: reading, fetching, superposing, and opening the clamp."""

from __future__ import annotations

import gzip
import http.server
import threading
from pathlib import Path

import gemmi
import numpy as np
import pytest
from scipy.spatial import cKDTree

from cryo_lib.simulate import density, structures
from cryo_lib.simulate.atoms import centred, with_positions
from cryo_lib.simulate.domains import core_and_clamp
from tests.simulate.helices import (
    AWAY,
    AXIS,
    TURN,
    helices,
    moved,
    one_chain,
    peptide,
    positions,
    renumbered,
    sequenced,
    toy,
)

SHARED = Path(__file__).resolve().parents[3] / "shared"
RNAP = SHARED / "data" / "rnap"
RIBOSOME = SHARED / "data" / "ribosome" / "6zu5.cif.gz"
needs_rnap = pytest.mark.skipif(not RNAP.is_dir(), reason=f"real RNA polymerase structures not found in {RNAP}")


def bond_lengths(structure):
    """CA-CA distances of residues with consecutive numbers in a chain."""
    lengths = []
    for chain in structure[0]:
        ca = np.array([residue["CA"][0].pos.tolist() for residue in chain])
        number = np.array([residue.seqid.num for residue in chain])
        lengths.append(np.linalg.norm(np.diff(ca, axis=0), axis=1)[np.diff(number) == 1])
    return np.concatenate(lengths)


def ca_of(structure, chain, first=0, stop=10_000):
    return np.array([r["CA"][0].pos.tolist() for r in structure[0][chain] if first <= r.seqid.num < stop])


def clashes(structure, distance):
    """Pairs of atoms closer than `distance`, of residues that are not the same nor next to one another."""
    xyz = positions(structure)
    owner = np.repeat(np.arange(sum(map(len, structure[0]))), [len(r) for chain in structure[0] for r in chain])
    i, j = owner[cKDTree(xyz).query_pairs(distance, output_type="ndarray")].T
    return int((abs(i - j) > 1).sum())


@pytest.fixture(scope="module")
def rnap():
    closed = structures.read(RNAP / "5uh6.pdb.gz", structures.CHAINS)
    open_ = structures.read(RNAP / "6fbv.pdb.gz", structures.CHAINS)
    return closed, open_, structures.morph(closed, open_, 5)


# --- reading and writing ---------------------------------------------------------------------------------------------


@needs_rnap
def test_4xln_filtered_to_the_polymerase_has_3496_residues():
    structure = structures.read(RNAP / "4xln.pdb.gz", list("ABCDEF"))
    assert sum(len(chain) for chain in structure[0]) == 3496
    assert 355e3 < structures.mass(structure) < 370e3
    assert [chain.name for chain in structures.read(RNAP / "4xln.pdb.gz")[0]] == list("ABCDEF")  # no DNA, no RNA


@pytest.mark.parametrize("suffix", [".cif", ".pdb"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    written = toy(1)
    path = structures.write(written, tmp_path / f"toy{suffix}")
    back = structures.read(path)
    assert [(c.name, [str(r) for r in c]) for c in back[0]] == [(c.name, [str(r) for r in c]) for c in written[0]]
    assert np.abs(positions(back) - positions(written)).max() < 2e-3
    with pytest.raises(ValueError, match=r"expected one of the suffixes .pdb, .cif, got '.xyz'"):
        structures.write(peptide(), tmp_path / "a.xyz")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_only_the_first_altloc_and_model_and_the_protein_are_read(tmp_path):
    line = "{:6}{:5d}  {:3}{:1}{:3} C{:4d}    {:8.3f}{:8.3f}{:8.3f}  1.00 20.00           {}\n".format
    atoms = line("ATOM", 1, "CA", "A", "ALA", 1, 0, 0, 0, "C") + line("ATOM", 2, "CA", "B", "ALA", 1, 1, 0, 0, "C")
    atoms += line("ATOM", 3, "CA", " ", "GLY", 2, 3.8, 0, 0, "C") + "TER\n"
    atoms += line("HETATM", 4, "O", " ", "HOH", 9, 9, 9, 9, "O")
    path = tmp_path / "small.pdb"
    path.write_text(f"MODEL        1\n{atoms}ENDMDL\nMODEL        2\n{atoms}ENDMDL\nEND\n")
    structure = structures.read(path)
    assert len(structure) == 1
    assert positions(structure).tolist() == [[0, 0, 0], [3.8, 0, 0]]


def test_files_of_molecular_dynamics_without_elements_and_chain_names_are_read(tmp_path):
    """Names from the 13th column on, as CHARMM writes them: CA reads as calcium there, HG as mercury, NE as neon."""
    names = "N HN CA HA CB CG CD NE HE CZ C OT1 OT2".split()
    line = "ATOM  {:5d} {:4} ARG  {:4d}    {:8.3f}{:8.3f}{:8.3f}  1.00 20.00      4AKE\n".format
    atoms = [line(k, name, 1 + k // 13, 1.5 * k, 0, 0) for k, name in enumerate(3 * names)]
    (tmp_path / "md.pdb").write_text("".join(atoms) + "END\n")
    structure = structures.read(tmp_path / "md.pdb", ["A"])
    found = [(site.atom.name, site.atom.element.name) for site in structure[0].all()]
    assert found == 3 * [(name, name[0]) for name in names if name[0] != "H"]


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


def cut_after(text, mark):
    """`text` up to the end of the line in which `mark` first occurs."""
    return text[: text.index("\n", text.index(mark)) + 1]


CUT_SHORT = "a file cut short; fetch or copy it again, or, if it is whole, "


def test_read_refuses_a_pdb_file_cut_between_its_chains_until_told_that_it_is_whole(tmp_path):
    text = toy(0).make_pdb_string()
    path = tmp_path / "cut.pdb"
    path.write_text(cut_after(text, "TER"))
    with pytest.raises(ValueError, match=f"cut.pdb: expected END as the last line, got 'TER .*: {CUT_SHORT}add a line"):
        structures.read(path)
    path.write_text(cut_after(text, "TER") + "END\n")
    assert [chain.name for chain in structures.read(path)[0]] == ["C"]


@pytest.mark.parametrize("mark", ["ATOM 400 ", "ATOM 719 "])
def test_read_refuses_a_cif_file_in_the_style_of_the_pdb_cut_in_its_atoms(tmp_path, mark):
    text = toy(0).make_mmcif_document().as_string(gemmi.cif.Style.Pdbx)
    path = tmp_path / "cut.cif"
    path.write_text(cut_after(text, mark))
    with pytest.raises(ValueError, match=f"cut.cif: expected # as the last line, got '{mark}.*: {CUT_SHORT}add a line"):
        structures.read(path)
    path.write_text(text)
    assert [chain.name for chain in structures.read(path)[0]] == ["C", "D"]


def test_read_refuses_a_cif_file_that_lists_a_chain_without_atoms(tmp_path):
    path = structures.write(toy(0), tmp_path / "cut.cif")
    path.write_text(cut_after(path.read_text(), "ATOM 200 "))
    with pytest.raises(ValueError, match=f"cut.cif: expected atoms of all 2 .*, got none of Dxp: {CUT_SHORT}take"):
        structures.read(path)


@needs_rnap
@pytest.mark.skipif(not RIBOSOME.is_file(), reason=f"real ribosome structure not found at {RIBOSOME}")
@pytest.mark.parametrize("source, last", [(RNAP / "6fbv.pdb.gz", "END"), (RIBOSOME, "#")])
def test_read_refuses_half_of_a_real_file_of_the_pdb(tmp_path, source, last):
    text = gzip.decompress(source.read_bytes())
    path = tmp_path / f"half{source.suffixes[0]}"
    path.write_bytes(text[: text.index(b"\n", len(text) // 2) + 1])
    with pytest.raises(ValueError, match=f"half.*: expected {last} as the last line, got 'ATOM "):
        structures.read(path)
    if source == RIBOSOME:
        assert len(structures.read(source)[0]) == 71  # the polypeptide strands of its _entity_poly table


# --- superposing, measuring, opening ---------------------------------------------------------------------------------


def test_superpose_undoes_any_rigid_motion():
    away = moved(toy(0), *AWAY)
    assert np.abs(positions(structures.superpose(away, toy(1), "C")) - positions(toy(0))).max() < 1e-6


def test_superpose_refuses_another_protein():
    stranger = peptide()
    stranger.name = "stranger"
    for residue in stranger[0]["C"]:
        residue.name = "GLY"
    with pytest.raises(ValueError, match=r"chain C of .* expected the same protein .* in stranger, got C \(12 res"):
        structures.superpose(peptide(), stranger, "C")


def test_chains_with_other_names_are_paired_by_their_residues():
    renamed = toy(1)
    renamed[0]["D"].name = "H"
    assert structures.clamp_angle(toy(0), renamed) == pytest.approx(20.0, abs=1e-6)


def test_clamp_rotation_is_the_turn_in_the_frame_of_the_second_structure():
    np.testing.assert_allclose(structures.clamp_rotation(toy(0), toy(1)), TURN, atol=1e-6)
    away = moved(toy(1), *AWAY)
    np.testing.assert_allclose(structures.clamp_rotation(toy(0), away), AWAY[0].apply(TURN), atol=1e-6)
    np.testing.assert_allclose(structures.clamp_rotation(away, toy(0)), -TURN, atol=1e-6)
    assert structures.clamp_angle(toy(0), away) == pytest.approx(20.0, abs=1e-6)


def test_cleft_view_looks_along_the_hinge_with_the_clamp_at_the_top():
    opened = moved(toy(1), *AWAY)
    view = structures.cleft_view(toy(0), opened)
    np.testing.assert_allclose(view @ view.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(view) == pytest.approx(1.0)
    np.testing.assert_allclose(view[:, 2], AWAY[0].apply(AXIS), atol=1e-6)
    x, y, _ = (ca_of(opened, "D") @ view).mean(axis=0) - (ca_of(opened, "C") @ view).mean(axis=0)
    assert y < -10.0 and abs(x) < 1e-6  # straight up: rows of an image count downwards


def test_cleft_view_refuses_a_clamp_that_does_not_turn():
    still = moved(toy(0.004), *AWAY)  # 0.08 degree
    with pytest.raises(ValueError, match=r"clamp \('D'\) to turn by at least 0.1 degree .*got 0.08 .*: no hinge"):
        structures.cleft_view(toy(0), still)
    with pytest.raises(ValueError, match="to turn by at least 0.1 degree"):
        structures.cleft_view(toy(0), toy(0))
    assert np.linalg.det(structures.cleft_view(toy(0), moved(toy(0.006), *AWAY))) == pytest.approx(1.0)


def test_views_and_angles_need_both_chains():
    with pytest.raises(ValueError, match="expected chains C, Q, got a structure without Q; its protein chains are C"):
        structures.cleft_view(toy(0), toy(1), clamp_chain="Q")
    only_core = toy(1)
    only_core[0].remove_chain("D")
    with pytest.raises(ValueError, match="chain D of .*expected the same protein .*got no other chain"):
        structures.clamp_angle(toy(0), only_core)


def test_morph_moves_a_rigid_clamp_on_its_screw():
    with pytest.raises(ValueError, match="n_conformations: expected an integer >= 2, got 1"):
        structures.morph(toy(0), toy(1), 1)
    path = structures.morph(toy(0), moved(toy(1), *AWAY), 3)
    assert np.array_equal(positions(path[0]), positions(toy(0)))
    for conformation, fraction in zip(path[1:], (0.5, 1.0), strict=True):
        assert np.abs(positions(conformation) - positions(toy(fraction))).max() < 0.01


def test_residues_that_only_the_closed_structure_has_move_with_their_neighbours():
    short = toy(1)
    chain = short[0]["D"]
    for n in reversed(range(len(chain))):
        if chain[n].seqid.num // 100 == 4:  # the helix in the middle of the clamp
            del chain[n]
    carried = structures.morph(toy(0), short, 2)[-1]
    assert np.abs(positions(carried) - positions(toy(1))).max() < 0.01


def test_a_chain_of_few_residues_is_carried_too():
    """Eighteen residues in both structures, fewer than the neighbours that a lost stretch else moves with."""
    closed, opened = (sequenced(helices(C=[(0, 0, 0), (10, 0, 0)]), C=1) for _ in range(2))
    del opened[0]["C"][3:9]
    carried = structures.morph(closed, opened, 2, core_chain="C:1-12", clamp_chain="C:101-112")[-1]
    assert np.abs(positions(carried) - positions(closed)).max() < 0.01


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
    ends = (path[-1], structures.superpose(open_, closed))
    ours, theirs = ({(c.name, str(r.seqid)): r["CA"][0].pos.tolist() for c in s[0] for r in c} for s in ends)
    distance = np.array([np.subtract(ours[key], theirs[key]) for key in ours.keys() & theirs.keys()])
    assert len(distance) == 3205
    assert np.sqrt((distance**2).sum(axis=1).mean()) < 0.3


@needs_rnap
def test_the_path_is_no_straight_line_and_keeps_the_clamp_rigid(rnap):
    """Half-way along a straight line the clamp shrinks by 1 - cos(half the turn); on the path it keeps its size."""
    closed, _, path = rnap
    clamp = [ca_of(s, "D", 21, 120) for s in (closed, path[2], path[4])]

    def size(x):
        return np.linalg.norm(x - x.mean(axis=0), axis=1).mean()

    line = 0.5 * (clamp[0] + clamp[2])
    ends = 0.5 * (size(clamp[0]) + size(clamp[2]))
    assert abs(size(clamp[1]) / ends - 1) < 0.2 * (1 - size(line) / ends)


def test_prepare_from_files_gives_centred_conformations_of_the_chains_named(tmp_path):
    closed = structures.write(toy(0), tmp_path / "closed.pdb")
    opened = structures.write(toy(1), tmp_path / "open.cif")
    made = structures.prepare("files", 3, closed_file=closed, open_file=opened, chains=["C", "D"])
    box = np.concatenate([positions(structure) for structure in made])
    np.testing.assert_allclose(box.max(axis=0), -box.min(axis=0), atol=1e-6)
    angles = [structures.clamp_angle(made[0], structure) for structure in made]
    np.testing.assert_allclose(angles, [0, 10, 20], atol=0.05)
    with pytest.raises(ValueError, match="closed.pdb: expected chains C, X, got a structure without X"):
        structures.prepare("files", 2, closed_file=closed, open_file=opened, chains=["C", "X"])
    core = structures.write(peptide(), tmp_path / "core.cif")
    with pytest.raises(ValueError, match=r"chain C of closed \(72 residues\): expected .* in core, got C \(12"):
        structures.prepare("files", 2, closed_file=closed, open_file=core, chains=["C", "D"])
    with pytest.raises(ValueError, match="source: expected one of phantom, pdb, files, got 'rcsb'"):
        structures.prepare("rcsb")
    with pytest.raises(ValueError, match="open_file: source 'files' needs the path of a coordinate file, got None"):
        structures.prepare("files", closed_file="closed.pdb")


def test_a_hinge_within_one_chain_of_another_name_is_opened(tmp_path):
    """Core and clamp in one chain; in the open file it has another name and other numbers, and lacks its first turn."""
    closed, opened = (sequenced(one_chain(x), C=1) for x in (toy(0), moved(toy(1), *AWAY)))
    renumbered(opened, 7)[0]["C"].name = "X"
    del opened[0]["X"][:4]
    files = {"closed_file": structures.write(closed, tmp_path / "closed.pdb")}
    files["open_file"] = structures.write(opened, tmp_path / "open.cif")
    made = structures.prepare("files", 3, **files, chains=["C"], core_chain="C", clamp_chain="C")
    core, clamp = core_and_clamp(made[0], made[-1], "C", "C")
    angles = [structures.clamp_angle(made[0], structure, core, clamp) for structure in made]
    np.testing.assert_allclose(angles, [0, 10, 20], atol=0.05)
    view = structures.cleft_view(made[0], made[-1], core, clamp)
    np.testing.assert_allclose(view @ view.T, np.eye(3), atol=1e-9)


def test_a_lopsided_structure_fits_the_smallest_box_that_can_hold_it():
    """As 4XLN, 150 x 113 x 184 A with its mass off the middle: centred on its mass it would need a wider box."""
    lopsided = helices(C=[(x, y, 0) for x in (0, 10, 20) for y in (0, 10, 20)], D=[(145, 108, 162)])
    (structure,) = centred([lopsided])
    pixel_size, resolution = 4.0, 8.0
    half = np.ceil((np.ptp(positions(structure), axis=0).max() + resolution) / 2 / pixel_size)
    n = 2 * int(half) + 1
    assert density.density(structure, n, pixel_size, resolution).shape == (n, n, n)
    massed = with_positions(lopsided, positions(lopsided) - positions(lopsided).mean(axis=0))
    with pytest.raises(ValueError, match="box"):
        density.density(massed, n, pixel_size, resolution)


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
    by_hand = tmp_path / "1aaa.pdb.gz"
    by_hand.write_bytes(gzip.compress(gemmi.read_structure(str(path)).make_pdb_string().encode()))
    path.unlink()
    assert structures.fetch("1AAA", tmp_path, "http://127.0.0.1:9") == by_hand
    by_hand.unlink()
    with pytest.raises(ConnectionError, match="check the network and run again, or put the file at .*, or use source"):
        structures.fetch("1AAA", tmp_path, "http://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("2BBB", ValueError, "expected a coordinate file, got another content"),
        ("3CCC", ConnectionError, "expected a whole file, got .*; check the network and run again"),
        ("4DDD", FileNotFoundError, "expected entry 4DDD, got none there; check the identifier"),
        ("5EEE", ConnectionError, "expected a whole file, got .*500.*; check the network and run again"),
    ],
)
def test_fetch_explains_a_bad_answer_and_leaves_nothing(server, tmp_path, entry, error, message):
    with pytest.raises(error, match=f"{entry}.cif.gz: {message}.*{entry.lower()}.pdb.gz yourself, or use"):
        structures.fetch(entry, tmp_path, server)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("entry", ["", "../x", "4XLNX", "ABCD", 1234])
def test_fetch_refuses_what_is_no_identifier(tmp_path, entry):
    with pytest.raises(ValueError, match="expected a four-character PDB identifier such as 4XLN"):
        structures.fetch(entry, tmp_path)
