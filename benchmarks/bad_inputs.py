"""Bad inputs of every kind that a user brings, and a few good ones that look bad; `reliability` tries them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mrcfile.dtypes import HEADER_DTYPE

from cryo_lib.files import write_json, write_text
from cryo_lib.networks import models
from cryo_lib.networks.algorithm import Settings
from cryo_lib.networks.engine import Trainer
from cryo_lib.networks.losses import Method
from cryo_lib.paper import notebooks
from cryo_lib.stacks import particles
from cryo_lib.stacks.columns import ANGLES, CTF_DEFAULTS, DEFOCUS, DETECTOR, MICROSCOPE, ORIGINS
from cryo_lib.stacks.dataset import Dataset
from cryo_lib.stacks.mrc import read_map, write_map, write_stack
from cryo_lib.stacks.particles import ParticleStack

OPTICS = dict(zip(["rlnOpticsGroup", "rlnImagePixelSize", "rlnImageSize", *MICROSCOPE], "1 1.5 8 300 2.7 0.1".split()))
ROW = dict.fromkeys([*ANGLES, *ORIGINS, *DEFOCUS, *CTF_DEFAULTS], "1") | {"rlnRandomSubset": "1", "rlnOpticsGroup": "1"}
OLD = {"rlnDetectorPixelSize": "1.5", "rlnMagnification": "10000", "rlnPixelSize": "1.5"}  # RELION 3.0


@dataclass(frozen=True)
class Input:
    """An input: its kind, what is wrong with it, who opens it, and what it reads as; None is to be refused."""

    kind: str
    what: str
    attempt: Callable[[], Any]
    reads: Any = None


def images(n: int = 3, box: int = 8) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, box, box)).astype(np.float32)


def table(name: str, rows: list[dict[str, str]]) -> str:
    """A table of a star file."""
    labels = "".join(f"_{label} #{number}\n" for number, label in enumerate(rows[0], 1))
    return f"\ndata_{name}\n\nloop_\n{labels}" + "".join(f"{' '.join(row.values())}\n" for row in rows)


def star(folder: Path, optics: dict | None = OPTICS, name: str = "x.star", **changes: str) -> Path:
    """A star file of three particles; `changes` are of the second one."""
    rows = [{"rlnImageName": f"{number}@s.mrcs"} | ROW for number in (1, 2, 3)]
    old = DETECTOR if set(changes) & set(DETECTOR) else set(changes) & set(OLD)  # one of the two says nothing alone
    rows = [row | {label: OLD[label] for label in old} for row in rows]
    rows[1] |= changes
    text = (table("optics", [optics]) if optics else "") + table("particles", rows)
    return write_text(folder / name, text)


def facts(path: Path, **options: Any) -> tuple[int, float | None]:
    """All that a stack is asked for: what is wrong must show at the latest now."""
    stack = ParticleStack.open(path, **options)
    _ = stack.poses, stack.ctf, stack.half_sets, stack.images[:]
    return len(stack), stack.pixel_size


def of_columns(folder: Path) -> Iterator[Input]:
    """One field of one column that is no number, or not a whole one."""
    for label in [*ROW, *OLD]:
        optics = None if label in OLD else OPTICS
        values = ["nan", "inf", "oops", "1,5", '""', "0x1"]
        values += ["1.5", "1e30"] if label in ("rlnRandomSubset", "rlnOpticsGroup") else []
        for number, value in enumerate(values):
            path = star(folder, optics, f"{label}{number}.star", **{label: value})
            yield Input("a column", f"{label} is {value}", lambda path=path: facts(path))
    for label in [*MICROSCOPE, "rlnImagePixelSize", "rlnImageSize", "rlnOpticsGroup"]:
        for number, value in enumerate(("nan", "oops", "2,7")):
            path = star(folder, OPTICS | {label: value}, f"optics{label}{number}.star")
            yield Input("an optics group", f"{label} is {value}", lambda path=path: facts(path))


def of_stars(folder: Path) -> Iterator[Input]:
    """The text of a star file, changed in one place."""
    text = star(folder).read_text()
    row = text.splitlines()[-2]
    changes = {
        "an unclosed double quote": (row, row.replace("2@", '"2@')),
        "an unclosed single quote": (row, row.replace("2@", "'2@")),
        "a row with a field too few": (row, row.rpartition(" ")[0]),
        "a row with a field too many": (row, f"{row} 7"),
        "a row cut in the middle": (row, row[:20]),
        "two rows in one line": (f"{row}\n", f"{row} "),
        "no rows": (text[text.index("1@s.mrcs") :], "\n"),
        "no rlnImageName": ("_rlnImageName", "_rlnMicrographName"),
        "a label twice": ("_rlnAngleTilt", "_rlnAngleRot"),
        "a block twice": ("data_particles", "data_optics"),
        "no table": (text, "some text\n"),
        "an empty file": (text, ""),
        "optics as a list": ("loop_\n", ""),
        "optics without its number": ("_rlnOpticsGroup #1", "_rlnOther #1"),
        "a group that is not in data_optics": ("\n1 1.5", "\n2 1.5"),
        "a group twice in data_optics": ("\n1 1.5", "\n1 1.5 8 300 2.7 0.1\n1 1.5"),
        "another box in data_optics": ("\n1 1.5 8", "\n1 1.5 16"),
        "3D particles in data_optics": ("_rlnImageSize", "_rlnImageDimensionality"),
        "old line ends": ("\n", "\r"),
        "a NUL": ("2@s.mrcs", "2@s\0.mrcs"),
        "stacks of tilts": ("\ndata_optics", "\ndata_general\n\n_rlnTomoSubTomosAre2DStacks 1\n\ndata_optics"),
        "a tomogram's column": ("_rlnAngleRot", "_rlnTomoParticleId"),
        "a web page": (text, "<!DOCTYPE html><html></html>"),
        "a Git LFS pointer": (text, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    }
    for number, (what, (old, new)) in enumerate(changes.items()):
        assert old in text, what
        path = write_text(folder / f"text{number}.star", text.replace(old, new))
        yield Input("a star file", what, lambda path=path: facts(path))
    (folder / "gz.star").write_bytes(b"\x1f\x8b\x08" + bytes(99))
    yield Input("a star file", "gzip", lambda: facts(folder / "gz.star"))
    (folder / "wide.star").write_bytes(text.encode("utf-16"))
    yield Input("a star file", "UTF-16", lambda: facts(folder / "wide.star"))
    rows = [{"rlnImageName": f"{i}@s.mrcs", "rlnGroupName": "p1", "rlnCtfBfactor": f"{4 * i}"} for i in (1, 2, 3)]
    rows = [row | {"rlnCtfScalefactor": f"0.{9 - i}"} for i, row in enumerate(rows)]
    series = write_text(folder / "warp.star", table("", rows))
    yield Input("a star file", "a tilt series of Warp or M", lambda: facts(series))
    read = {
        "blanks before data_": ("data_particles", "  data_particles"),
        "a byte order mark": (text, f"\ufeff{text}"),
        "line ends of Windows": ("\n", "\r\n"),
        "a comment after a row": (row, f"{row} # looked at"),
        "a comment between labels": ("_rlnAngleTilt", "# by a script\n_rlnAngleTilt"),
        "single quotes": ("2@s.mrcs", "'2@s.mrcs'"),
        "a format after the name": ("s.mrcs", "s.mrcs:mrcs"),
        "leading zeros": ("2@s.mrcs", "000000002@s.mrcs"),
        "blank lines between rows": (row, f"\n \n{row}"),
    }
    for number, (what, (old, new)) in enumerate(read.items()):
        path = write_text(folder / f"good{number}.star", text.replace(old, new))
        yield Input("a star file", what, lambda path=path: facts(path), (3, 1.5))
    alone = [{"rlnImageName": f"{number}@s.mrcs"} for number in (1, 2, 3)]
    path = write_text(folder / "alone.star", table("optics", [OPTICS]) + table("particles", alone))
    yield Input("a star file", "one optics group, not named by the particles", lambda: facts(path), (3, 1.5))


def of_references(folder: Path) -> Iterator[Input]:
    """What rlnImageName says."""
    write_stack(folder / "box.mrcs", images(2, 10), (2, 10, 10), 1.5)
    write_stack(folder / "short.mrcs", images(2), (2, 8, 8), 1.5)
    (folder / "cut.mrcs").write_bytes((folder / "s.mrcs").read_bytes()[:-7])
    write_map(folder / "cube.mrc", images(8), 1.5)
    names = (
        "0@s.mrcs 4@s.mrcs -1@s.mrcs 1.5@s.mrcs 1e0@s.mrcs x@s.mrcs @s.mrcs s.mrcs cube.mrc 1@ @ 1@gone.mrcs".split()
    )
    names += "1@box.mrcs 3@short.mrcs 1@cut.mrcs 1@. 1@x.star ٢@s.mrcs 99999999999999999999@s.mrcs".split() + ['""']
    for number, name in enumerate(names):
        path = star(folder, name=f"reference{number}.star", rlnImageName=name)
        yield Input("an image reference", name, lambda path=path: facts(path))


def of_headers(folder: Path) -> Iterator[Input]:
    """One field of an MRC header."""
    content = (folder / "s.mrcs").read_bytes()
    fields = {
        "nx": (0, -1, 9, 1 << 20),
        "ny": (0, 7, 1 << 30),
        "nz": (0, -3, 2, 4, 2**31 - 1),
        "mode": (3, 4, 101, -1, 99),
        "nsymbt": (-1, 4, 2**31 - 1),
        "mapc": (0, 2, 3, 7),
        "maps": (1, -1),
        "ispg": (401,),
        "cella": ((12, 24, 1), (-12, 12, 1), (np.nan, 12, 1), (np.inf, np.inf, 1)),
    }
    for name, values in fields.items():
        for value in values:
            header = np.frombuffer(content[:1024], HEADER_DTYPE).copy()
            header[name] = value
            path = folder / f"{name}{value}.mrcs".replace("/", "")
            path.write_bytes(header.tobytes() + content[1024:])
            yield Input("an MRC header", f"{name} is {value}", lambda path=path: facts(path))
    others = {"cut in its header": content[:1000], "cut": content[:-1], "longer than it says": content + b"\0"}
    others |= {"empty": b"", "zeros": bytes(2000), "text": b"No MRC file. " * 200, "gzip": b"\x1f\x8b" + content}
    others |= {"a TIFF file": b"II*\0" + content, "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n"}
    for number, (what, changed) in enumerate(others.items()):
        path = folder / f"other{number}.mrcs"
        path.write_bytes(changed)
        yield Input("an MRC file", what, lambda path=path: facts(path))
    for what, value in (("NaN", np.nan), ("infinity", np.inf), ("zero", 0.0)):
        changed = images()
        changed[1] = value
        path = folder / f"{what}.mrcs"
        path.write_bytes(content[:1024] + changed.tobytes())
        yield Input("an MRC file", f"an image of {what}", lambda path=path: facts(path))
    write_map(folder / "volume.mrc", images(8), 1.5)
    yield Input("an MRC file", "a volume as a stack", lambda: facts(folder / "volume.mrc"))
    yield Input("an MRC file", "not there", lambda: facts(folder / "gone.mrcs"))
    yield Input("an MRC file", "another suffix", lambda: facts(write_text(folder / "x.tif", "")))
    yield Input("a pixel size by hand", "zero", lambda: facts(folder / "s.mrcs", pixel_size=0.0))
    yield Input("a pixel size by hand", "NaN", lambda: facts(folder / "s.mrcs", pixel_size=np.nan))
    yield Input("a pixel size by hand", "text", lambda: facts(folder / "s.mrcs", pixel_size="1.5"))


def of_maps(folder: Path) -> Iterator[Input]:
    """Maps, and what is none."""
    good = write_map(folder / "map.mrc", images(8), 1.5).read_bytes()
    turned = np.frombuffer(good[:1024], HEADER_DTYPE).copy()
    turned["mapc"], turned["maps"] = 3, 1
    (folder / "turned.mrc").write_bytes(turned.tobytes() + images(8).transpose(2, 1, 0).tobytes())
    yield Input("a map", "axes 3, 2, 1", lambda: bool((read_map(folder / "turned.mrc")[0] == images(8)).all()), True)
    changed = {"cella": (12.0, 12.0, 24.0), "mapc": 2, "ispg": 401, "nz": 4, "mode": 4}
    for name, value in changed.items():
        header = np.frombuffer(good[:1024], HEADER_DTYPE).copy()
        header[name] = value
        path = folder / f"map{name}.mrc"
        path.write_bytes(header.tobytes() + good[1024:])
        yield Input("a map", f"{name} is {value}", lambda path=path: read_map(path))
    contents = {"gzip": b"\x1f\x8b" + good, "cut": good[:-1], "empty": b"", "a web page": b"<html>" + good}
    for number, (what, content) in enumerate(contents.items()):
        path = folder / f"nomap{number}.mrc"
        path.write_bytes(content)
        yield Input("a map", what, lambda path=path: read_map(path))
    yield Input("a map", "a stack of images", lambda: read_map(folder / "s.mrcs"))
    yield Input("a map", "not there", lambda: read_map(folder / "gone.mrc"))
    nan = write_map(folder / "nan.mrc", images(8), 1.5)
    nan.write_bytes(good[:1024] + np.full((8, 8, 8), np.nan, "f4").tobytes())
    yield Input("a map", "NaN in it", lambda: read_map(nan))
    silent = write_map(folder / "silent.mrc", images(8), 0.0)
    yield Input("a map", "no voxel size", lambda: read_map(silent))
    yield Input("a map", "NaN to be written", lambda: write_map(folder / "y.mrc", np.full((8, 8, 8), np.nan), 1.5))


def cs_bytes(folder: Path, **changes: Any) -> bytes:
    """A .cs file of two particles; `changes` are dtypes of fields and arrays, None leaves a field out."""
    fields = {"blob/path": "S9", "blob/idx": "<u4", "blob/shape": ("<u4", (2,)), "blob/psize_A": "<f4"}
    fields |= {"alignments3D/pose": ("<f4", (3,)), "alignments3D/shift": ("<f4", (2,)), "ctf/df1_A": "<f4"}
    dtypes = {name: changes[name] if isinstance(changes.get(name), str | tuple) else fields[name] for name in fields}
    kept = [name for name in dtypes if changes.get(name, "") is not None]
    cs = np.zeros(2, [(name, *([dtypes[name]] if isinstance(dtypes[name], str) else dtypes[name])) for name in kept])
    values = {"blob/path": b">s.mrcs", "blob/idx": [0, 1], "blob/shape": 8, "blob/psize_A": 1.5}
    values |= {name: change for name, change in changes.items() if isinstance(change, list | np.ndarray)}
    for name in values.keys() & set(kept):
        cs[name] = values[name]
    with open(folder / "made.cs", "wb") as file:
        np.save(file, cs, allow_pickle=True)
    return (folder / "made.cs").read_bytes()


def of_cs(folder: Path) -> Iterator[Input]:
    """cryoSPARC's files."""
    good = cs_bytes(folder)
    contents = {"an image number beyond the stack": cs_bytes(folder, **{"blob/idx": [0, 9]})}
    contents |= {"a stack that is not there": cs_bytes(folder, **{"blob/path": np.array([b">gone", b">gone"])})}
    contents |= {"another box": cs_bytes(folder, **{"blob/shape": np.full((2, 2), 16)})}
    for name, value in (("blob/psize_A", [1.5, np.nan]), ("blob/psize_A", [1.5, 3.0]), ("blob/psize_A", [0.0, 0.0])):
        contents[f"{name} {value}"] = cs_bytes(folder, **{name: np.array(value)})
    contents["a pose of NaN"] = cs_bytes(folder, **{"alignments3D/pose": np.full((2, 3), np.nan)})
    contents["a pose of one number"] = cs_bytes(folder, **{"alignments3D/pose": "<f4"})
    contents["a shift of three numbers"] = cs_bytes(folder, **{"alignments3D/shift": ("<f4", (3,))})
    contents["an image number that is text"] = cs_bytes(folder, **{"blob/idx": "S4"})
    contents["no image numbers"] = cs_bytes(folder, **{"blob/idx": None})
    contents["no paths"] = cs_bytes(folder, **{"blob/path": None})
    contents["objects, which are pickles"] = cs_bytes(folder, **{"blob/psize_A": "O"})
    contents |= {"cut": good[:-1], "cut in its header": good[:40], "empty": b"", "text": b"no .cs file" * 9}
    contents |= {"a zip archive": b"PK\x03\x04" + good, "gzip": b"\x1f\x8b" + good}
    plain = np.arange(5.0)
    with open(folder / "plain.cs", "wb") as file:
        np.save(file, plain)
    contents["an array without fields"] = (folder / "plain.cs").read_bytes()
    for number, (what, content) in enumerate(contents.items()):
        path = folder / f"cs{number}.cs"
        path.write_bytes(content)
        yield Input("a .cs file", what, lambda path=path: facts(path))
    (folder / "fine.cs").write_bytes(good)
    yield Input("a .cs file", "defocus without a voltage", lambda: facts_without_ctf(folder / "fine.cs"), (2, 1.5))


def facts_without_ctf(path: Path) -> tuple[int, float | None]:
    stack = ParticleStack.open(path)
    return len(stack), stack.pixel_size


def of_checkpoints(folder: Path) -> Iterator[Input]:
    """Networks, their cards, states of trainings, data of trainings."""
    card = {"architecture": "conv", "image_size": 16, "width": 2}
    torch.manual_seed(0)
    network = models.ConvGenerator(16, 2)

    def checkpoint(
        name: str, weights: Callable[[bytes], bytes] = bytes, text: Callable[[bytes], bytes] = bytes
    ) -> Path:
        path = models.save(folder / f"{name}.safetensors", network, card)
        path.write_bytes(weights(path.read_bytes()))
        path.with_suffix(".json").write_bytes(text(path.with_suffix(".json").read_bytes()))
        return path

    changes = {
        "weights cut": (lambda b: b[:-9], bytes),
        "weights cut in their header": (lambda b: b[:20], bytes),
        "empty weights": (lambda b: b"", bytes),
        "weights that are text": (lambda b: b"no weights " * 50, bytes),
        "a Git LFS pointer": (lambda b: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", bytes),
        "a pickle": (lambda b: b"\x80\x02}q\x00." * 20, bytes),
        "a card cut": (bytes, lambda b: b[:-9]),
        "an empty card": (bytes, lambda b: b""),
        "a card that is no text": (bytes, lambda b: b"\xff\xfe\x00" * 9),
        "a card that is a list": (bytes, lambda b: b"[1, 2]"),
        "a card without a width": (bytes, lambda b: b.replace(b"width", b"height")),
        "another width": (bytes, lambda b: b.replace(b'"width": 2', b'"width": 4')),
        "an architecture that is unknown": (bytes, lambda b: b.replace(b"conv", b"unet")),
        "an image size that is text": (bytes, lambda b: b.replace(b"16", b'"16"')),
    }
    for number, (what, change) in enumerate(changes.items()):
        path = checkpoint(f"net{number}", *change)
        yield Input("a checkpoint", what, lambda path=path: models.load(path))
    yield Input("a checkpoint", "not there", lambda: models.load(folder / "gone.safetensors"))
    settings = Settings(architecture="conv", width=2, epochs=1, batch_size=2, log_every=1)
    trainer = Trainer(
        Method.parse("l1_ae"), settings, lambda epoch: (images(4, 16), images(4, 16)), 0, torch.device("cpu")
    )
    trainer.save_state(folder / "state.pt")
    good = (folder / "state.pt").read_bytes()
    torch.save({"iteration": 1}, folder / "other.pt")
    states = {"cut": good[:-99], "empty": b"", "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n"}
    states |= {"a pickle of code": b"cos\nsystem\n(S'true'\ntR.", "another's": (folder / "other.pt").read_bytes()}
    for number, (what, content) in enumerate(states.items()):
        path = folder / f"state{number}.pt"
        path.write_bytes(content)
        yield Input("a resumable state", what, lambda path=path: trainer.load_state(path))
    np.save(folder / "x_train.npy", images())
    cut = (folder / "x_train.npy").read_bytes()[:-5]
    (folder / "x_train.npy").write_bytes(cut)
    write_text(folder / "card.json", '{"seed": ')
    yield Input("a data set", "images cut", lambda: Dataset(folder).clean("train"))
    yield Input("a data set", "a card cut", lambda: Dataset(folder).card)
    yield Input("a data set", "not there", lambda: Dataset(folder).volumes)
    yield Input("JSON to be written", "NaN", lambda: write_json(folder / "y.json", {"a": float("nan")}))


def of_parameters(folder: Path) -> Iterator[Input]:
    """What `cryo` is given, with a notebook that prints its parameters."""
    code = "particles = 'x'\nn = 1\nrate = 0.5\nsizes = [1]\nfast = True"
    metadata = {"tags": ["parameters"]}
    cells = [
        {"cell_type": "code", "source": code, "metadata": metadata, "outputs": [], "execution_count": None, "id": "a"}
    ]
    notebook = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path = write_json(folder / "n.ipynb", notebook)
    write_text(folder / "bad.yaml", "a: [1")
    write_text(folder / "text.yaml", "words")
    write_text(folder / "no.ipynb", "no notebook")
    write_text(folder / "old.ipynb", "{}")

    def cryo(*words: str) -> str:
        said = StringIO()
        with redirect_stderr(said):
            code = notebooks.main(["script", *words])
        if code:
            raise notebooks.NotebookError(said.getvalue().removeprefix("error: ").strip())
        return ""

    for text in ("a #1.star", "a: b.star", "[a].star", "{a}.star", "5", "true", "null", "", "'a'", "*x", "- a"):
        yield Input("a parameter", f"-p particles {text!r}", lambda text=text: value(path, "particles", text), text)
    for name, text in (("n", "1.5"), ("n", "one"), ("n", "true"), ("n", "[1"), ("rate", "fast"), ("rate", "1,5")):
        yield Input("a parameter", f"-p {name} {text!r}", lambda n=name, t=text: cryo(str(path), "-p", n, t))
    for name, text in (
        ("sizes", "1"),
        ("sizes", "[1, "),
        ("fast", "1"),
        ("fast", "maybe"),
        ("other", "1"),
        ("n", "a: b: c"),
    ):
        yield Input("a parameter", f"-p {name} {text!r}", lambda n=name, t=text: cryo(str(path), "-p", n, t))
    yield Input("a parameter", "-p rate '1e-3'", lambda: value(path, "rate", "1e-3"), 1e-3)
    yield Input("a parameter", "-p rate '2'", lambda: value(path, "rate", "2"), 2)
    for what in ("gone.ipynb", "no.ipynb", "old.ipynb"):
        yield Input("a notebook", what, lambda what=what: cryo(str(folder / what)))
    for what in ("bad.yaml", "text.yaml", "gone.yaml"):
        words = (str(path), "-s", "study", "--params", str(folder / what))
        yield Input("a parameter file", what, lambda words=words: cryo(*words))


def value(path: Path, name: str, text: str) -> Any:
    """A parameter as a notebook gets it."""
    with redirect_stderr(StringIO()) as said:
        known = notebooks.declared(notebooks.nbformat.read(path, as_version=4), path.name)
        got = notebooks.value_of(name, text, known[name])
        notebooks.check_parameters(path.name, known, {name: got})
    assert not said.getvalue()
    return got


def of_outputs(folder: Path) -> Iterator[Input]:
    """What is to be written."""
    like = ParticleStack.open(star(folder))
    nan = images()
    nan[1, 2, 3] = np.nan
    given = {"images with NaN": nan, "too few images": images(2), "too many images": images(4)}
    given |= {"images of another box": images(3, 10), "one image": images()[0], "text": np.full((3, 8, 8), "a")}
    for what, value in given.items():
        yield Input("images to be written", what, lambda v=value: particles.write(folder / "y.star", v, like))
    for name in (
        "a b.star",
        "a@b.star",
        "a#b.star",
        "a:b.star",
        'a"b.star',
        "y.mrc",
        "y",
        "x.star",
        "s.mrcs",
        "s.star",
    ):
        yield Input("a name to write to", name, lambda n=name: particles.write(folder / n, images(), like))
    columns = {"NaN": [1, np.nan, 3], "text": ["a", "b", "c"], "two for three": [1, 2], "nothing": [None] * 3}
    for what, values in columns.items():
        more = {"new": values}
        yield Input(
            "a column to be written", what, lambda c=more: particles.write(folder / "y.star", images(), like, columns=c)
        )
    rotations = np.eye(3)[None].repeat(3, 0)
    texts = {
        "None": ["a", None, "c"],
        "NaN": [1.0, np.nan, 2.0],
        "both quotes": ["a", "\"'", "c"],
        "a line end": ["a\n", "b", "c"],
    }
    for what, values in (texts | {"too few": [1.0, 2.0]}).items():
        new = {"rlnMicrographName": values}
        yield Input(
            "a column of a new stack",
            what,
            lambda c=new: particles.new(folder / "n.star", images(), rotations, 1.5, columns=c),
        )
    empty = {"rlnMicrographName": ["", "a b", "it's"]}
    yield Input(
        "a column of a new stack",
        "empty text, a blank, a quote",
        lambda: (
            ParticleStack.open(particles.new(folder / "t.star", images(), rotations, 1.5, columns=empty))
            .table["rlnMicrographName"]
            .tolist()
        ),
        ["", "a b", "it's"],
    )
    wrong = star(folder, OPTICS | {"rlnImagePixelSize": "3.0"}, "wrong.star")
    yield Input("a pixel size", "the star's 3.0, the header's 1.5", lambda: facts(wrong))
    hand = lambda: ParticleStack.open(wrong, pixel_size=1.5)  # noqa: E731
    yield Input(
        "a pixel size",
        "the same, by hand, written and opened again",
        lambda: facts(particles.write(folder / "again.star", images(), hand())),
        (3, 1.5),
    )


FAMILIES = (of_columns, of_stars, of_references, of_headers, of_maps, of_cs, of_checkpoints, of_parameters, of_outputs)


def inputs(family: Callable[[Path], Iterator[Input]], folder: Path) -> Iterator[Input]:
    """The inputs of a family, made in a folder that has a good stack."""
    write_stack(folder / "s.mrcs", images(), (3, 8, 8), 1.5)
    yield from family(folder)
