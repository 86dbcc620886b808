"""Where the images lie that a .star or .cs file names.

A stack named by a .star or .cs file is looked for in this order; the first hit is taken, with a warning where another
place holds a different file of that name:

1. an absolute path, as it is;
2. under `project`, and nowhere else, where the caller gives it;
3. of a .cs file, where its name begins with `>`: under the folder of the .cs file;
4. under the working directory: RELION's and cryoSPARC's project directory;
5. under the folder of the .star or .cs file, then under each folder above it, nearest first.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from cryo_lib.stacks.mrc import Images, StackFile


def find_images(path: Path, references: Iterable[str], project: str | Path | None) -> Images:
    """Find the stack and the image of every row; references are `000007@stack.mrcs`, or a file of one image."""
    parts = [reference.split("@", 1) if "@" in reference else ("", reference) for reference in references]
    code, names = pd.factorize(np.array([name for _, name in parts], dtype=object))
    files = [StackFile.read_header(name).images(numbered=True) for name in _find_files(path, names, project)]
    counts = np.array([file.shape[0] for file in files])[code]
    alone = np.array([not number for number, _ in parts])
    if (bad := np.flatnonzero(alone & (counts != 1))).size:
        row, file = bad[0], files[code[bad[0]]]
        what = "a volume (a 3D subtomogram)" if file.holds == "a volume" else "a stack (of the tilts of a particle)"
        raise ValueError(
            f"{path}, particle row {row + 1}: expected an image number before @, or a file of one image, got "
            f"{file.path}, {what} of {counts[row]} sections ({len(bad)} such rows); write 1@..., or, of "
            "tomography, use other tools"
        )
    index = np.array([_whole(number) for number, _ in parts], np.int64) - ~alone
    bad = np.flatnonzero((index < 0) | (index >= counts))
    if len(bad):
        row, stack = bad[0], files[code[bad[0]]].path
        got = repr("@".join(parts[row]).replace("@>", "@"))
        raise ValueError(
            f"{path}, particle row {row + 1}: expected a whole image number from 1 to {counts[row]}, as in {stack}, "
            f"got {got} ({len(bad)} such rows); the stack was cut short, or is another's"
        )
    boxes = {file.shape[1:]: file.path for file in reversed(files)}
    if len(boxes) > 1:
        found = ", ".join(f"{h} x {w} in {name}" for (h, w), name in boxes.items())
        raise ValueError(f"{path}: expected images of one size, got {found}; split the particles by box")
    return Images(files, code, index)


def _whole(number: str) -> int:
    """An image number; 0, which is none, for other text."""
    return int(number) if re.fullmatch("[0-9]{1,18}", number) else 0


def _find_files(path: Path, names: Iterable[str], project: str | Path | None) -> list[str]:
    """Find image files in the order given above; warn of those outside the project and of ambiguous ones.

    A name `x.mrcs:mrcs` is that of x.mrcs and its format, as RELION takes it, unless there is a file of this name.
    """
    here = path.absolute().parent
    roots = [os.getcwd(), str(here)] if project is None else [os.path.abspath(project)]
    folders = roots + [str(folder) for folder in here.parents if project is None]
    found, outside, ambiguous = [], [], []
    for marked in names:
        name = marked.removeprefix(">")
        beside = [str(here)] * (name != marked)
        for wanted in (name, name.rpartition(":")[0] or name):
            places = {os.path.join(folder, wanted): folder for folder in dict.fromkeys(beside + folders)}
            if hits := [place for place in places if os.path.isfile(place)]:
                break
        if not hits:
            raise FileNotFoundError(
                f"{path}: expected {name} under one of {', '.join(beside + folders)}, got no such file; open with "
                "project=..."
            )
        found.append(hits[0])
        allowed = roots + beside if os.path.isabs(name) else [places[hits[0]]]
        if not any(_within(hits[0], root) for root in allowed):
            outside.append(hits[0])
        sure = name != marked and places[hits[0]] == str(here)
        others = [] if sure else [hit for hit in hits[1:] if not os.path.samefile(hit, hits[0])]
        ambiguous += [f"{hits[0]} (taken) and {hit}" for hit in others]
    for files, trouble in (
        (outside, "outside its project folder: they are read, but do not go where the project is copied"),
        (ambiguous, "in more than one place: open with project=... to say which"),
    ):
        if files:
            warnings.warn(f"{path}: {len(files)} image files are {trouble}; the first is {files[0]}", stacklevel=4)
    return found


def _within(path: str, root: str) -> bool:
    """Whether a path lies below a folder, as it is written or where its links lead."""
    return any(form(path).startswith(os.path.join(form(root), "")) for form in (os.path.normpath, os.path.realpath))
