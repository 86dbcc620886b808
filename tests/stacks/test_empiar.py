"""EMPIAR-10028: the particles asked for and no more, whole, from servers and networks of every kind."""

from __future__ import annotations

import gzip
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote

import mrcfile
import numpy as np
import pytest

from cryo_lib.paper import notebooks
from cryo_lib.stacks import empiar
from cryo_lib.stacks.mrc import StackFile, write_map
from cryo_lib.stacks.particles import ParticleStack

ROOT = Path(__file__).resolve().parents[2]

BOX, IMAGE = 16, 4 * 16**2
BLOCK = 3 * IMAGE + 100  # as in life, images and files end within blocks
# The third name has to be quoted.
COUNTS = {"MRC_1901/001_shiny.mrcs": 12, "MRC_0601/001_shiny.mrcs": 5, "MRC_1901/002%.mrcs": 20, "MRC_0601/007.mrcs": 3}
ONE, FEW, MANY, LAST = COUNTS
LABELS = """rlnImageName rlnMicrographName rlnDefocusU rlnDefocusV rlnDefocusAngle rlnVoltage rlnSphericalAberration
rlnAmplitudeContrast rlnMagnification rlnDetectorPixelSize rlnAngleRot rlnAngleTilt rlnAnglePsi rlnOriginX rlnOriginY
rlnRandomSubset""".split()
HEAD = "\ndata_\n\nloop_\n" + "".join(f"_{label} #{i}\n" for i, label in enumerate(LABELS, 1))
LINE = HEAD.count("\n")  # of the last label


def row(i: int, image: str) -> str:
    """Row `i`, told by its defocus; its random subset is 9 in two of forty rows, and none of these nines is stray."""
    ctf = f"{10000 + i}.0 {9000 + i}.0 {i}.5 300.000000     2.000000     0.100000 104478.000000    14.000000"
    pose = f"{i}.1 {2 * i}.2 -{i}.3 0.25 -{i}.5 {9 if i in (2, 21) else i % 2 + 1}"
    return f"{image} mic/{image[-8:]}.mrc {ctf} {pose} \n"


def rows() -> list[str]:
    """The images of all stacks in one order drawn from a seed, neither stack by stack nor by number."""
    images = [f"{k:06d}@{name}" for name, n in COUNTS.items() for k in range(1, n + 1)]
    return [row(i, images[j]) for i, j in enumerate(np.random.default_rng(7).permutation(len(images)))]


def stack(path: Path, n: int, h: int = BOX, w: int = BOX, seed: int = 0, dtype: str = "f4", extended: int = 0) -> bytes:
    """A stack by mrcfile alone, so that nothing is tested against our own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = (100 * np.random.default_rng(seed).normal(size=(n, h, w))).astype(dtype)
    with mrcfile.new(path, images, overwrite=True) as mrc:
        mrc.set_image_stack()
        mrc.voxel_size = 1.34
        mrc.set_extended_header(np.zeros(extended, "V1"))
    return path.read_bytes()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`. Of each path, the next answers are cut after `cuts` bytes or have a status of `fails`; `log` has
    what was sent, `asked` every path that was asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.ranges, self.headers = files, True, {}
        self.cuts, self.fails, self.log, self.asked = {}, {}, [], set()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fetch(self, out: Path, n: int, **options) -> ParticleStack:
        """Fetch, and check the map and that no parts are left."""
        star, volume = empiar.fetch(out, n, particles_url=f"{self.url}/P", map_url=f"{self.url}/m.gz", **options)
        assert (star, volume) == (out / "particles.star", out / "map.mrc")
        assert volume.read_bytes() == gzip.decompress(self.files["/m.gz"])
        assert not leftovers(out)
        return ParticleStack.open(star, project=out)

    def served(self, path: str) -> list[tuple[int, int]]:
        """Where each answer of a path began, and how long it was."""
        return [(start, n) for name, start, n in self.log if name == path]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_GET(self):
        path, server = unquote(self.path), self.server
        server.asked.add(path)
        body, status, start, sent = server.files.get(path), 200, 0, {}
        expected = body is not None and self.headers["Accept-Encoding"] == "identity"  # else sizes are anyone's guess
        if fails := server.fails.get(path) or (not expected and [404]):
            body, status = b"no", fails.pop(0)
        elif server.ranges and "Range" in self.headers:
            start, stop = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
            sent["Content-Range"] = f"bytes {start}-{min(stop + 1, len(body)) - 1}/{len(body)}"
            body, status = body[start : stop + 1], 206
        self.send_response(status)
        for item in (sent | {"Content-Length": len(body)} | server.headers.get(path, {})).items():
            self.send_header(*map(str, item))
        self.end_headers()
        if self.command == "HEAD":
            return
        if status < 300 and server.cuts.get(path):
            body, self.close_connection = body[: server.cuts[path].pop(0)], True
        if status < 300:
            server.log.append((path, start, len(body)))
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The published folder, with its stray 9 in a line of its own, and the same without: `(files, truth)`."""
    folder = tmp_path_factory.mktemp("source")
    files = {f"/P/{name}": stack(folder / name, n, seed=n, extended=160 * (name == FEW)) for name, n in COUNTS.items()}
    (folder / "clean.star").write_text(HEAD + "".join(rows()))
    files["/P/shiny_2sets.star"] = (HEAD + "".join([*rows()[:11], "9\n", *rows()[11:]]) + "\n").encode()
    volume = np.random.default_rng(1).normal(size=(12, 12, 12)).astype(np.float32)
    files["/m.gz"] = gzip.compress(write_map(folder / "map.mrc", volume, 1.34).read_bytes())
    return files, ParticleStack.open(folder / "clean.star", project=folder)


@pytest.fixture
def truth(source):
    return source[1]


@pytest.fixture
def server(source, monkeypatch):
    monkeypatch.setattr(empiar, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(empiar, "PROGRESS", 1e6)  # said by one test alone
    monkeypatch.setattr(empiar, "BLOCK", BLOCK)
    with Server(dict(source[0])) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def leftovers(out: Path) -> list[str]:
    """Files that are neither the star files, the maps nor stacks."""
    known = (".star", ".map", ".mrc", ".mrcs", "")
    return [path.name for path in out.rglob("*") if path.suffix not in known or path.name.startswith(".")]


def chosen(particles: ParticleStack) -> np.ndarray:
    """Which rows of the published file these are."""
    return particles.table["rlnDefocusU"].to_numpy(int) - 10000


def require_right(particles: ParticleStack, truth: ParticleStack) -> None:
    """Every row is one of the published, in its order, and has its image to the bit."""
    which = chosen(particles)
    assert (np.diff(which) > 0).all()
    assert particles.images[:].tobytes() == truth.images[which].tobytes()
    others = [column for column in truth.table if column != "rlnImageName"]
    assert particles.table[others].equals(truth.table.loc[which, others].reset_index(drop=True))
    here, there = (table["rlnImageName"].str[7:].tolist() for table in (particles.table, truth.table.loc[which]))
    assert here == there
    assert particles.pixel_size == pytest.approx(1.34, rel=1e-5)


# --- what comes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 23, 40])
def test_so_many_particles_come_with_their_own_images_a_share_of_each_stack(server, truth, tmp_path, n):
    particles = server.fetch(tmp_path, n)
    assert len(particles) == n
    require_right(particles, truth)
    stacks = [name.split("@")[1] for name in truth.table["rlnImageName"]]
    taken = Counter(stacks[i] for i in chosen(particles))
    names = list(dict.fromkeys(stacks))
    shares = n / 40 * np.cumsum([COUNTS[name] for name in names])
    assert np.abs(np.cumsum([taken[name] for name in names]) - shares).max() <= 0.5
    for name in names:
        first = [i for i in range(40) if stacks[i] == name][: taken[name]]
        assert [i for i in chosen(particles) if stacks[i] == name] == first
        assert (tmp_path / name).exists() == (taken[name] > 0)


def test_all_particles_make_the_published_star_to_the_letter_but_for_its_stray_9(server, tmp_path, capsys):
    server.fetch(tmp_path, 40)
    assert (tmp_path / "particles.star").read_text() == HEAD + "".join(rows()) + "\n"
    line = LINE + 12
    assert capsys.readouterr().out == f"shiny_2sets.star: line {line}: took out a stray 9\n"
    assert server.files["/P/shiny_2sets.star"].splitlines()[line - 1] == b"9"


def test_the_header_and_the_rows_are_kept_but_for_the_numbers(server, tmp_path):
    server.fetch(tmp_path, 11)
    text = (tmp_path / "particles.star").read_text()
    published = [line[6:] for line in rows()]
    assert text.startswith(HEAD) and text.count("\n") == LINE + 11 + 1
    assert {line[6:] for line in text[len(HEAD) : -1].splitlines(keepends=True)} <= set(published)


def test_names_with_the_folder_in_front_are_found_and_kept(server, truth, tmp_path):
    server.files["/P/shiny_2sets.star"] = server.files["/P/shiny_2sets.star"].replace(b"@MRC", b"@Particles/MRC")
    particles = server.fetch(tmp_path, 20)
    assert particles.images[:].tobytes() == truth.images[chosen(particles)].tobytes()
    assert all("@Particles/MRC_" in name for name in particles.table["rlnImageName"])
    assert (tmp_path / "Particles" / ONE).is_file()


def test_an_image_that_two_rows_share_comes_once(server, truth, tmp_path):
    lines = rows()
    lines[1] = row(1, lines[0].split()[0])
    server.files["/P/shiny_2sets.star"] = (HEAD + "".join(lines)).encode()
    particles = server.fetch(tmp_path, 40)
    wanted = truth.images[[0, 0, *range(2, 40)]]
    assert particles.images[:].tobytes() == wanted.tobytes()


def test_only_what_was_asked_for_is_served(server, tmp_path):
    server.fetch(tmp_path, 8)
    stacks = sum(n for path, _, n in server.log if path.endswith(".mrcs"))
    assert stacks == 8 * IMAGE + 4 * 1024
    for path in ("/P/shiny_2sets.star", "/m.gz"):
        assert sum(n for _, n in server.served(path)) == len(server.files[path])


def test_neighbouring_images_come_in_one_answer_as_many_as_a_block_holds(server, tmp_path):
    server.fetch(tmp_path, 40)
    assert server.served(f"/P/{FEW}") == [(0, 1024), (1024 + 160, 3 * IMAGE), (1024 + 160 + 3 * IMAGE, 2 * IMAGE)]


def test_a_second_call_fetches_nothing_and_another_number_only_the_stacks(server, truth, tmp_path):
    server.fetch(tmp_path, 8)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mrcs")}
    server.asked.clear()
    require_right(server.fetch(tmp_path, 8), truth)
    assert not server.asked and before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mrcs")}
    require_right(server.fetch(tmp_path, 9), truth)
    assert server.asked < {f"/P/{name}" for name in COUNTS}


@pytest.mark.parametrize("spoil", ["short", "long", "number", "mode", "removed"])
def test_a_stack_that_is_not_the_one_wanted_is_fetched_again(server, truth, tmp_path, spoil):
    server.fetch(tmp_path, 20)
    path, content = tmp_path / MANY, (tmp_path / MANY).read_bytes()
    n = StackFile.read_header(str(path)).shape[0]
    path.unlink()
    if spoil in ("short", "long"):
        path.write_bytes(content[:-4] if spoil == "short" else content + b"\0")
    elif spoil == "mode":
        stack(path, 2 * n, dtype="i2")  # as many bytes
    elif spoil != "removed":
        stack(path, n + 1)
    server.log.clear()
    require_right(server.fetch(tmp_path, 20), truth)
    assert path.read_bytes() == content and MANY in "".join(path for path, *_ in server.log)
    assert sum(n for _, _, n in server.log) <= 2 * 1024 + n * IMAGE


def test_files_of_the_same_names_in_the_working_directory_are_not_taken(server, tmp_path, monkeypatch):
    stack(tmp_path / "here" / MANY, 1)
    monkeypatch.chdir(tmp_path / "here")
    server.fetch(tmp_path / "out", 40)


def test_a_map_that_the_server_calls_gzip_encoded_is_unzipped_once(server, tmp_path):
    server.headers["/m.gz"] = {"Content-Encoding": "x-gzip"}
    server.fetch(tmp_path, 1)


def test_progress_is_said_with_its_share(server, tmp_path, monkeypatch, capsys):
    """In lines, where the output is no terminal: a bar's carriage returns would flood a log."""
    monkeypatch.setattr(empiar, "PROGRESS", 0.0)
    server.fetch(tmp_path, 40)
    said = capsys.readouterr().out
    shares = [int(share) for share in re.findall(r"^4 stacks: \S+ of 41.0kB \((\d+)%\), .*/s$", said, re.M)]
    assert shares[-1] == 100 and len(shares) >= 4 and shares == sorted(shares) and "\r" not in said


# --- cut and gone on with --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/P/shiny_2sets.star", f"/P/{MANY}", "/m.gz"])
def test_a_block_that_was_cut_is_asked_for_again_and_no_other(server, truth, tmp_path, path):
    server.cuts[path] = [300, 0, BLOCK, 10]
    require_right(server.fetch(tmp_path, 40), truth)
    first, second = (1024, 1024) if "MRC" in path else (BLOCK, BLOCK)
    starts = [start for start, _ in server.served(path)]
    assert starts[:5] == [0, 0, 0, second, second] and len(set(starts[4:])) == len(starts[4:])
    assert [n for _, n in server.served(path)[:4]] == [300, 0, first, 10]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_error_is_waited_out(server, truth, tmp_path, status):
    server.fails = {path: [status, status] for path in server.files}
    require_right(server.fetch(tmp_path, 23), truth)


def test_pauses_grow_and_begin_anew_with_each_block(server, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(empiar, "PAUSES", (1.0, 3.0, 9.0))
    monkeypatch.setattr(empiar.time, "sleep", pauses.append)
    server.cuts["/m.gz"] = [0, 100, BLOCK, 0, 0, 0, 0]
    with pytest.raises(ConnectionError, match="m.gz: expected a file, got .*; run again to go on from there"):
        server.fetch(tmp_path, 1)
    assert pauses == [1.0, 3.0, 1.0, 3.0, 9.0]


def test_another_map_in_the_same_folder_is_replaced(server, tmp_path):
    """That of the stand-in, after a change of the source."""
    write_map(tmp_path / "map.mrc", np.ones((8, 8, 8)), 5.36)
    server.fetch(tmp_path, 1)


def test_the_pipelines_notebook_fetches_through_its_parameters(server, truth, tmp_path):
    """Notebook 09 with `source: empiar`, from the root of a repository whose data lie elsewhere."""
    (tmp_path / "dvc.yaml").touch()
    options = {
        "source": "empiar",
        "n_particles": 20,
        "particles_url": f"{server.url}/P",
        "map_url": f"{server.url}/m.gz",
    }
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        notebooks.run(ROOT / "notebooks" / "09_fetch_particles.ipynb", tmp_path / "out.ipynb", options)
    finally:
        os.chdir(here)
    folder = tmp_path / "data" / "laptop" / "particles"
    require_right(ParticleStack.open(folder / "particles.star", project=folder), truth)


def test_no_server_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(empiar, "PAUSES", (0.0,))
    with pytest.raises(
        ConnectionError, match="shiny_2sets.star: expected a file, got .*127.0.0.1.*; run again to go on"
    ):
        empiar.fetch(tmp_path, 1, particles_url="http://127.0.0.1:9")


# --- refused ---------------------------------------------------------------------------------------------------------


def require_refused(server, out: Path, error: type, message: str, n: int = 40) -> None:
    with pytest.raises(error, match=message):
        server.fetch(out, n)
    assert not (out / "particles.star").exists() and not leftovers(out)


PATHS = ["/P/shiny_2sets.star", f"/P/{ONE}", f"/P/{LAST}", "/m.gz"]


@pytest.mark.parametrize("path", PATHS)
def test_a_file_that_is_not_there_is_named_and_comes_later(server, truth, tmp_path, path):
    content = server.files.pop(path)
    require_refused(server, tmp_path, FileNotFoundError, f"{path}: expected a file, got .*404.*; see what")
    server.files[path] = content
    require_right(server.fetch(tmp_path, 40), truth)


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_a_web_page_in_place_of_a_file_is_named_and_kept_nowhere(server, truth, tmp_path, path, typed):
    content = server.files[path]
    server.files[path] = b"<html>please log in</html>\n" * 99
    server.headers[path] = {"Content-Type": "text/html; charset=utf-8"} if typed else {}
    require_refused(server, tmp_path, ValueError, f"{path}: expected .*, got .*; see what a browser gets there")
    server.files[path] = content
    server.headers.clear()
    require_right(server.fetch(tmp_path, 40), truth)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [0, 27])
def test_an_all_too_short_file_is_named(server, tmp_path, path, size):
    server.files[path] = b"x" * size
    require_refused(server, tmp_path, ValueError, f"{path}: expected .*, got another content")


def test_a_server_that_sends_no_parts_of_files_is_named(server, tmp_path):
    server.ranges = False
    require_refused(
        server, tmp_path, ValueError, "shiny_2sets.star, got another content .*server doesn.t appear to support range"
    )


def test_a_refusal_of_the_server_is_no_reason_to_ask_again(server, tmp_path):
    server.fails["/m.gz"] = [403, 403, 500]  # the first two asked for its size
    require_refused(server, tmp_path, ConnectionError, "m.gz: expected a file, got .*403")
    assert server.fails["/m.gz"] == [500]


def other(tmp_path: Path, **options) -> bytes:
    return stack(tmp_path / "other" / "a.mrcs", 20, **options)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda t: other(t)[:-1], r"expected a stack.* short, expected 21504 bytes .*, got 21503"),
        (lambda t: other(t) + b"x", r"expected a stack.* nothing else, got 20 of 16 x 16 <f4 in 21,505 bytes"),
        (lambda t: other(t, h=12, w=12), r"expected 20 or more images of 16 x 16, .*, got \(20, 12, 12\)"),
        (lambda t: other(t, w=12), "expected a stack.* square images of float32 .*, got 20 of 16 x 12"),
        (lambda t: other(t)[:12] + b"\1" + other(t)[13:], "expected a stack.* square images .*, got 20 of 16 x 16 <i2"),
        (lambda t: stack(t / "other" / "a.mrcs", 19), r"expected 20 or more images .*, got \(19, 16, 16\)"),
        (lambda t: other(t)[:-4] + b"\xff" * 4, "expected 002%.mrcs, got another .* from 18 on.* in 1 of 2"),
    ],
)
def test_a_stack_that_cannot_be_is_named(server, tmp_path, make, message):
    server.files[f"/P/{MANY}"] = make(tmp_path)
    shutil.rmtree(tmp_path / "other")
    require_refused(server, tmp_path / "out", ValueError, f"/P/MRC_1901/002%25.mrcs: {message}")


def edited(server, edit) -> None:
    server.files["/P/shiny_2sets.star"] = (HEAD + "".join(edit(rows()))).encode()


@pytest.mark.parametrize(
    "image", ["000000@MRC/a.mrcs", "MRC/a.mrcs", "1@../a.mrcs", "1@MRC/../../a.mrcs", "1@/tmp/a.mrcs", "-1@a.mrcs"]
)
def test_a_row_without_an_image_below_the_folder_is_named(server, tmp_path, image):
    edited(server, lambda lines: [*lines[:3], row(3, image), *lines[4:]])
    message = f"shiny_2sets.star: .* row 4: expected an image, as .*, got '{image}'"
    require_refused(server, tmp_path, ValueError, message)
    assert not any("mrcs" in path for path, *_ in server.log)


def test_a_star_file_of_something_else_is_named(server, tmp_path):
    server.files["/P/shiny_2sets.star"] = ("data_\nloop_\n_rlnMicrographName #1\n" + "a.mrc\n" * 999).encode()
    require_refused(server, tmp_path, ValueError, "expected one table with rlnImageName, got .*rlnMicrographName")


@pytest.mark.parametrize("place", [0, 5, 16])
def test_a_stray_9_in_a_row_is_taken_out_and_said(server, truth, tmp_path, capsys, place):
    def put(line):
        fields = line.split()
        return " ".join([*fields[:place], "9", *fields[place:]]) + "\n"

    edited(server, lambda lines: [*lines[:6], put(lines[6]), *lines[7:]])
    require_right(server.fetch(tmp_path, 40), truth)
    assert capsys.readouterr().out == f"shiny_2sets.star: line {LINE + 7}: took out a stray 9\n"


@pytest.mark.parametrize("end", [" 1 8\n", " 9 9\n", "\n"])
def test_any_other_fault_in_a_row_is_refused_before_stacks_are_fetched(server, tmp_path, capsys, end):
    edited(server, lambda lines: [*lines[:6], lines[6][:-4] + end, *lines[7:]])
    message = r"/P/shiny_2sets.star: expected .* row 7: expected 16 fields, got 1[57]; the file is damaged"
    require_refused(server, tmp_path, ValueError, message)
    assert "stray" not in capsys.readouterr().out and not any("mrcs" in path for path in server.asked)


@pytest.mark.parametrize(
    "n, error", [(41, "at most 40, as shiny_2sets.star has, got 41"), (0, "an integer >= 1, got 0")]
)
def test_more_particles_than_there_are_or_none_are_refused(server, tmp_path, n, error):
    require_refused(server, tmp_path, ValueError, f"n_particles: expected {error}", n)
    assert server.asked <= {"/P/shiny_2sets.star"}


def cut_off(packed: bytes) -> bytes:
    return packed[:-400]


def crc(packed: bytes) -> bytes:
    return packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:]


def no_deflate(packed: bytes) -> bytes:
    return packed[:10] + b"\xff" + packed[11:]


@pytest.mark.parametrize("spoil", [cut_off, crc, no_deflate])
def test_a_damaged_gzip_file_is_named_and_fetched_afresh_once_it_is_whole(server, tmp_path, spoil):
    whole = server.files["/m.gz"]
    server.files["/m.gz"] = spoil(whole)
    require_refused(server, tmp_path, ValueError, "m.gz: expected emd_2660.map, got another content")
    assert not (tmp_path / "map.mrc").exists()
    server.files["/m.gz"] = whole
    server.fetch(tmp_path, 1)


@pytest.mark.parametrize(
    "shape, voxel, got", [((12, 12, 11), 1.34, r"a cubic map, got \(12, 12, 11\)"), ((12, 12, 12), 0.0, "a voxel size")]
)
def test_a_map_that_is_no_cube_or_has_no_voxel_size_is_refused(server, tmp_path, shape, voxel, got):
    path = tmp_path / "other.mrc"
    mrcfile.write(path, np.random.default_rng(0).normal(size=shape).astype(np.float32), voxel_size=voxel)
    server.files["/m.gz"] = gzip.compress(path.read_bytes())
    require_refused(server, tmp_path, ValueError, f"m.gz: .*expected {got}")
    shutil.copy(path, tmp_path / empiar.PUBLISHED_MAP)
    require_refused(server, tmp_path, ValueError, f"emd_2660.map: expected {got}")


def test_a_disk_that_is_too_small_for_the_stacks_is_said_beforehand(server, truth, tmp_path, monkeypatch):
    free = 40 * IMAGE - 1
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, free))
        with pytest.raises(OSError, match=f"expected room for {40 * IMAGE:,} bytes, got {free:,}; free some, or"):
            server.fetch(tmp_path, 40)
    assert all(n == 1024 for path, _, n in server.log if "mrcs" in path)
    require_right(server.fetch(tmp_path, 40), truth)


def test_what_is_whole_is_kept_when_another_stack_fails_and_the_next_call_goes_on(server, truth, tmp_path):
    server.cuts[f"/P/{LAST}"] = [1024, *[0] * 3]
    with pytest.raises(ConnectionError, match=r"MRC_0601/007.mrcs: expected .*; run again to go on from there"):
        server.fetch(tmp_path, 40)
    assert not (tmp_path / "particles.star").exists() and not leftovers(tmp_path)
    kept = {f"/P/{name}" for name in COUNTS if (tmp_path / name).exists()}
    server.asked.clear()
    require_right(server.fetch(tmp_path, 40), truth)
    assert kept and f"/P/{LAST}" in server.asked and not server.asked & {*kept, "/m.gz", "/P/shiny_2sets.star"}


def test_a_fetch_that_is_killed_goes_on_and_ends_the_same(server, truth, tmp_path):
    """kill -9 after the first answers, again and again: what is left of it is of no file's name."""
    out, killed = tmp_path / "out", 0
    code = f"from cryo_lib.stacks import empiar; empiar.BLOCK = {BLOCK}; empiar.fetch({str(out)!r}, 40, "
    code += f"particles_url='{server.url}/P', map_url='{server.url}/m.gz')"
    for answers in (1, 2, 3, 5, 8):
        server.log.clear()
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        while len(server.log) < answers and process.poll() is None:
            time.sleep(0.001)
        killed += process.poll() is None
        process.kill()
        process.wait()
    assert killed >= 3
    for name in leftovers(out):
        assert fnmatch(name, ".*-????????.*")
        next(out.rglob(name)).unlink()
    require_right(server.fetch(out, 40), truth)
    server.fetch(tmp_path / "whole", 40)
    for path in filter(Path.is_file, (tmp_path / "whole").rglob("*")):
        assert (out / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
