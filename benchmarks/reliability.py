"""`make reliability`: every bad input and interruption is tried; docs/reliability.md says what comes of each."""

from __future__ import annotations

import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import cryo_lib
from benchmarks import interrupted
from benchmarks.bad_inputs import FAMILIES, Input, cs_bytes, facts, images, inputs, star
from cryo_lib.files import write_text
from cryo_lib.networks import models
from cryo_lib.paper.notebooks import NotebookError
from cryo_lib.stacks.columns import ANGLES, DEFOCUS, DETECTOR, MICROSCOPE, ORIGINS
from cryo_lib.stacks.mrc import read_map, write_map, write_stack
from cryo_lib.stacks.particles import ParticleStack

MUTATIONS = 2000  # of each kind of file, drawn at random
ROWS = 1_000_000  # of the star file whose opening is measured


def outcome(given: Input, folder: Path) -> tuple[str, bool]:
    """What an input says, and whether that is right: read as it should be, or refused by this library in plain words.

    Plain words name what was expected; the error is raised by a line of this library, not by one of those it calls.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = given.attempt()
    except Exception as error:
        message = f"{type(error).__name__}: {error}".replace(f"{folder}/", "").replace(str(folder), ".")
        own = Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(
            Path(cryo_lib.__file__).parent
        )
        own |= isinstance(error, NotebookError)
        plain = any(
            word in message for word in ("expected", "expects", "unknown parameter", "no such notebook", "no section")
        )
        plain &= not any(word in message for word in ("allow_pickle", "weights_only", "Traceback"))
        kind = isinstance(error, ValueError | TypeError | FileNotFoundError | NotebookError)
        return message, given.reads is None and own and plain and kind
    return f"read: {found}", given.reads is not None and found == given.reads


def mutated(folder: Path, n: int, seed: int = 0) -> Iterator[tuple[str, Input]]:
    """Good files of each kind with a few bytes changed, cut or doubled, at random: the kind, and the input."""
    write_stack(folder / "s.mrcs", images(), (3, 8, 8), 1.5)
    card = {"architecture": "conv", "image_size": 16, "width": 1}
    network = models.save(folder / "mutated.safetensors", models.ConvGenerator(16, 1), card)
    (folder / "fine.cs").write_bytes(cs_bytes(folder))
    files: dict[str, tuple[Path, int, Callable[[Path], Any]]] = {  # a good file, where it is changed, who reads it
        "star": (star(folder), 1000, facts),
        "MRC stack": (folder / "s.mrcs", 256, facts),
        "map": (write_map(folder / "map.mrc", images(8), 1.5), 256, read_map),
        "cs": (folder / "fine.cs", 500, facts),
        "weights": (network, 400, models.load),
        "card": (network.with_suffix(".json"), 90, lambda path: models.load(network)),
    }
    rng = np.random.default_rng(seed)
    for kind, (path, reach, reader) in files.items():
        good, changed = path.read_bytes(), folder / f"mutated{path.suffix}"
        for number in range(n):
            content = bytearray(good)
            for at, size in rng.integers((0, 1), (min(reach, len(good)), 9), (rng.integers(1, 4), 2)):
                piece = bytes(content[at : at + size])
                noise, text = (
                    rng.choice(values, len(piece)) for values in (np.arange(256), list(b"0123456789.,-@#'\"\n"))
                )
                changes = bytes(noise.astype(np.uint8)), bytes(text.astype(np.uint8)), b"", piece * 2
                content[at : at + size] = changes[rng.integers(4)]
            changed.write_bytes(content)
            yield kind, Input(kind, f"number {number}", lambda path=changed, reader=reader: reader(path))
        changed.write_bytes(good)


def opened(folder: Path, rows: int) -> tuple[float, float]:
    """CPU seconds and megabytes that opening a star file of so many rows takes; its images are holes on the disk."""
    path = folder / "big.mrcs"
    write_stack(path, images(1, 64), (1, 64, 64), 1.5)
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(np.int32(rows).tobytes())
        file.truncate(1024 + rows * 64 * 64 * 4)
    labels = ("rlnImageName", *ANGLES, *ORIGINS, *DEFOCUS, *DETECTOR, *MICROSCOPE)
    with open(folder / "big.star", "w") as file:
        file.write("data_\n\nloop_\n" + "".join(f"_{label}\n" for label in labels))
        for i in range(1, rows + 1):
            file.write(f"{i:07d}@big.mrcs {i % 360}.25 9 8 0.5 -0.5 9e3 8e3 45 1.5 10000 300 2.7 0.1\n")
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    ParticleStack.open(folder / "big.star")
    seconds = time.process_time() - started
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main(out: Path = Path("docs/reliability.md")) -> int:
    """Try everything, write the page, return how many outcomes are not right."""
    rows, wrong, counts = [], [], Counter()
    with tempfile.TemporaryDirectory() as name:
        seconds, megabytes = opened(Path(name), ROWS)
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as name:
            for given in inputs(family, Path(name)):
                said, right = outcome(given, Path(name))
                said = re.sub("under one of .*, got", "under one of ..., got", said)  # folders of this machine
                fields = (given.kind, given.what, said.replace("\0", "NUL"))
                rows.append(f"| {' | '.join(' '.join(text.split()).replace('|', '/') for text in fields)} |")
                wrong += [] if right else [rows[-1]]
    with tempfile.TemporaryDirectory() as name:
        for kind, given in mutated(Path(name), MUTATIONS):
            said, right = outcome(given, Path(name))
            result = 0 if said.startswith("read: ") else 1 if right else 2
            wrong += [f"{kind}, {given.what}: {said}"] if result == 2 else []
            counts[kind, result] += 1
    stops = interrupted.measure()
    wrong += [f"{what}: {came}" for what, came, right in stops if not right]
    kinds = dict.fromkeys(kind for kind, _ in counts)
    parts = [
        "# Bad inputs, and what they say",
        f"`make reliability` tries {len(rows)} inputs and writes this page. Each is read as it should be, or refused\n"
        "by an error of this library that says what, where, expected, got and the way out.",
        f"A star file of {ROWS:,} rows and 14 columns opens in {seconds:.0f} s of one core and {megabytes:.0f} MB;\n"
        "images stay on the disk.",
        f"Of {MUTATIONS} good files of each kind with a few bytes changed at random:",
        "| Kind | Read | Refused | Another library's error |\n|---|---|---|---|\n"
        + "\n".join(f"| {kind} | {' | '.join(str(counts[kind, result]) for result in range(3))} |" for kind in kinds),
        f"`dvc repro {' '.join(interrupted.TARGETS)}` at the ci scale, interrupted:",
        "| Interruption | Outcome |\n|---|---|\n" + "\n".join(f"| {what} | {came} |" for what, came, _ in stops),
        "| Kind | Input | Outcome |\n|---|---|---|\n" + "\n".join(rows),
    ]
    write_text(out, "\n\n".join(parts) + "\n")
    print(f"{len(rows)} inputs, {sum(counts.values())} at random; not right: {len(wrong)}", *wrong[:40], sep="\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main() > 0)
