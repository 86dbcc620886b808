"""RELION's programs run on a star file of particles, and what they write read back: the paper's procedure.

`prepare`, `initial_model`, `classify`, `auto_refine`, `post_process`: each works in a project folder and keeps
`<step>.log` there, the exact command on its first line, then all that RELION printed. A step is not run again where
its log ends well, has the same command, and is newer than the step's inputs; else it starts anew.

Nothing of the truth is used: `prepare` gives RELION the images and their optics alone, without poses, half-sets or
classes, and every step searches all orientations.

Whether RELION corrects the CTF is the caller's choice, made in `prepare` for all steps: `ctf=True` for images that
still have it, which are run with `--ctf`; `ctf=False` for images that have none though their star has its columns, as
denoised ones, which are run without it.

Defaults are those of RELION 3.1's own window, with two exceptions, for denoised and clean images: `--dont_check_norm`,
since one factor scales the whole stack (see `prepare`); no `--norm` and `--scale`, whose factors come from each image's
residuals, almost nothing here (300 clean images of 32 px: they ran from 48 to 1271; the map after 7 iterations was as
good with as without: 0.98 correlation with the truth).

Source: Scheres (2012), J. Struct. Biol. 180, 519; Zivanov et al. (2018), eLife 7, e42166.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pandas as pd

from cryo_lib import checks
from cryo_lib.files import atomic
from cryo_lib.stacks.mrc import BATCH
from cryo_lib.stacks.particles import CTF_DEFAULTS, DEFOCUS, MICROSCOPE, ParticleStack, write
from cryo_lib.stacks.star import Star
from cryo_lib.stacks.star import text as star_text

PARTICLES = "particles.star"  # what `prepare` writes, in the project folder
COMMON = ("--zero_mask", "--flatten_solvent", "--dont_check_norm", "--dont_combine_weights_via_disc")
MPIRUN = "mpirun --oversubscribe"  # Open MPI's
_DONE = "[finished]"  # last line of a log


class RelionMissing(RuntimeError):
    """A program of RELION, or mpirun, is not on PATH."""


class RelionError(RuntimeError):
    """A program of RELION failed, or ended without its output."""


@dataclass(frozen=True)
class InitialModel:
    """`maps` of each class, their `occupancies` `(k,)`, and the fullest one, `map`."""

    map: Path
    maps: tuple[Path, ...]
    occupancies: np.ndarray


@dataclass(frozen=True)
class Classification:
    """`maps` of each class, their `occupancies` `(k,)` and `resolutions` `(k,)` in A; class numbers start at 1.

    `class_numbers` `(n,)` are in the rows of the star file that was classified; `map` is that of the `best` class, the
    fullest.
    """

    map: Path
    maps: tuple[Path, ...]
    occupancies: np.ndarray
    resolutions: np.ndarray
    class_numbers: np.ndarray
    best: int


@dataclass(frozen=True)
class Refinement:
    """The `map` from all particles, its two `half_maps` (unfiltered), and the gold-standard `resolution` in A, no mask.

    `model` is RELION's star file of the model, `particles` that of the refined poses, in RELION's order; `table` is the
    same, `(n,)` in the rows of the star file that was refined. `capped`: `max_iterations` ended it.
    """

    map: Path
    half_maps: tuple[Path, Path]
    resolution: float
    model: Path
    particles: Path
    table: pd.DataFrame
    capped: bool


@dataclass(frozen=True)
class PostProcess:
    """The FSC-weighted `map`, its `mask`, the `resolution` in A at FSC 0.143, and RELION's `fsc` table, a row a shell:

    rlnResolution (1/A), rlnAngstromResolution (A), rlnFourierShellCorrelationUnmaskedMaps, ...MaskedMaps,
    ...Corrected and rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps.
    """

    map: Path
    mask: Path
    resolution: float
    fsc: pd.DataFrame


def version() -> str:
    """Return RELION's version, as "3.1.3"; RelionMissing where it is not on PATH."""
    done = subprocess.run([_program("relion_refine"), "--version"], capture_output=True, text=True)
    found = re.search(r"RELION version:\s*(\S+)", done.stdout + done.stderr)
    if not found:
        raise RelionError(f"relion_refine --version: expected RELION's version, got {done.stdout + done.stderr!r}")
    return found[1]


def prepare(star: str | Path, folder: str | Path, particle_diameter: float, *, ctf: bool | None = None) -> Path:
    """Write `folder/particles.star` and `.mrcs`, the particles as RELION wants them, and return the star's path.

    The mean of each image outside the particle's circle is subtracted, and all are divided by one number, the standard
    deviation of the stack there. RELION's own normalisation divides each image by its own: that of a denoised image is
    almost nothing and varies (clean images of 32 px: 0.0005 to 0.002 on a scale of [0, 1]), and would set its weight.

    The star has rlnImageName, rlnOpticsGroup and, with `ctf`, the CTF: no poses, half-sets or classes reach RELION.
    Rows keep their order. The stack is streamed twice, in constant memory.

    Parameters
    ----------
    star : RELION 3.1 particles, protein bright.
    particle_diameter : A, at most the box.
    ctf : whether the images have the CTF of their columns: True keeps these, and the steps are run with `--ctf`; False
        drops them. None is for a star without such columns.

    Raises
    ------
    ValueError : a box smaller than the particle, protein dark, a CTF and no choice, `ctf` and no CTF, no optics groups
        or pixel size, no background.
    """
    folder, stack = _folder(folder), ParticleStack.open(star)
    radius = _diameter(stack, particle_diameter) / 2
    if stack.optics is None or stack.pixel_size is None:
        raise ValueError(f"{star}: expected RELION 3.1 particles with data_optics, got none; write it by particles.new")
    ctf = _has_ctf(stack, ctf)
    if stack.normalisation.contrast == "dark":
        raise ValueError(f"{star}: expected bright protein, as RELION does, got dark; multiply the images by -1")
    out, log = folder / PARTICLES, folder / "prepare.log"
    inputs = [Path(star), *(Path(file.path) for file in stack.images.files)]
    command = f"prepare {_inside(folder, star)} {particle_diameter:g}" + " --ctf" * ctf
    if out.resolve() in [path.resolve() for path in inputs]:
        raise ValueError(f"folder: expected another folder than that of {star}, got {folder}; choose a new one")
    if _is_done(log, command, inputs, [out, out.with_suffix(".mrcs")]):
        return out
    background = _circle(stack) > radius
    outside = (_centred(images, background)[:, background] for images in _batches(stack))
    squares = sum(np.square(values, dtype=float).sum() for values in outside)
    sd = float(squares / (len(stack) * background.sum())) ** 0.5
    if not sd > 0:
        raise ValueError(f"{star}: expected a background that varies, got a constant; lower particle_diameter")
    write(out.with_suffix(".mrcs"), (_centred(images, background) / sd for images in _batches(stack)), stack)
    names = [f"{number:06d}@{out.stem}.mrcs" for number in range(1, len(stack) + 1)]
    table = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": stack.table["rlnOpticsGroup"]})
    if ctf:
        own = [label for label in MICROSCOPE if label in stack.table]  # a particle's own comes before its group's
        table = table.join(stack.ctf[[*DEFOCUS, *CTF_DEFAULTS, *own]])
    optics = stack.optics
    if ctf and (missing := [label for label in MICROSCOPE if label not in optics]):
        optics = optics.join(stack.ctf[missing].groupby(stack.table["rlnOpticsGroup"]).first(), on="rlnOpticsGroup")
    _write_star(out, {"optics": optics, "particles": table})
    log.write_text(f"{command}\nbackground sd {sd}\n{_DONE}\n")
    return out


def select(folder: str | Path, star: str | Path, rows: Any, name: str = "selected.star") -> Path:
    """Write `folder/name` of some rows of the star of `prepare`, such as those of one class, and return its path.

    A file that holds these particles already, and is newer than the star, is left as it is, so that the steps after it
    are not run again.

    Parameters
    ----------
    rows : indices or a mask. ValueError where they are none.
    """
    stack, out = ParticleStack.open(star, project=folder), Path(folder) / name
    table = stack.table.iloc[np.arange(len(stack))[rows]]
    if table.empty:
        raise ValueError(f"rows: expected some of the {len(stack)} particles of {star}, got none")
    tables = {"optics": stack.optics, "particles": table}
    old = not out.is_file() or out.stat().st_mtime_ns < Path(star).stat().st_mtime_ns
    if old or out.read_bytes() != star_text(tables):
        _write_star(out, tables)
    return out


def initial_model(
    folder: str | Path,
    star: str | Path,
    particle_diameter: float,
    *,
    classes: int = 1,
    iterations: Sequence[int] = (50, 200, 50),
    resolutions: Sequence[float] = (35.0, 15.0),
    subsets: Sequence[int] = (100, 500),
    healpix_order: int = 1,
    oversampling: int = 1,
    offset_range: float = 6.0,
    threads: int = 1,
    seed: int = 0,
) -> InitialModel:
    """Make a map from the particles alone, by stochastic gradient descent from random orientations.

    RELION refines the angular step by itself to what the resolution asks for, and its cost with it: 30 degrees hold to
    50 A for a particle of 190 A, 15 degrees to 25 A, at 8 times the work. The hand of the map is a coin's toss.

    Parameters
    ----------
    folder, star, particle_diameter : the project, the star of `prepare` in it, A.
    iterations : initial, in between, final.
    resolutions, subsets : A, and particles an iteration, at the start and at the end.
    healpix_order, oversampling : the angular step is 60 degrees / 2**(their sum).
    offset_range : pixels; the step is 2.

    Raises
    ------
    RelionMissing, RelionError ; ValueError : bad numbers, or a particle larger than the box.
    """
    command = _refine(folder, star, particle_diameter, "initial_model", threads, seed)
    command += ["--sgd", "--denovo_3dref", "--K", checks.integer("classes", classes, low=1), "--iter", 1, "--pad", 1]
    for name, count in zip(("ini", "inbetween", "fin"), iterations, strict=True):
        command += [f"--sgd_{name}_iter", checks.integer("iterations", count, low=1)]
    for name, resolution, size in zip(("ini", "fin"), resolutions, subsets, strict=True):
        command += [f"--sgd_{name}_resol", checks.number("resolutions", resolution, above=0.0)]
        command += [f"--sgd_{name}_subset", checks.integer("subsets", size, low=1)]
    command += ["--sgd_write_iter", 10, *_sampling(healpix_order, oversampling, offset_range)]
    last = f"initial_model/run_it{sum(iterations):03d}"
    _run(folder, "initial_model", command, [star], [f"{last}_model.star"])
    maps, occupancies, _ = _classes(folder, last)
    return InitialModel(maps[int(np.argmax(occupancies))], maps, occupancies)


def classify(
    folder: str | Path,
    star: str | Path,
    reference: str | Path | Sequence[str | Path],
    particle_diameter: float,
    *,
    classes: int = 2,
    iterations: int = 25,
    ini_high: float = 60.0,
    healpix_order: int = 2,
    oversampling: int = 1,
    offset_range: float = 5.0,
    threads: int = 1,
    seed: int = 0,
) -> Classification:
    """Sort the particles into classes, each refined from the reference low-passed to `ini_high` A.

    Parameters
    ----------
    folder, star, particle_diameter : the project, the star of `prepare` in it, A.
    reference : a map, or one a class, with the particles' box and pixel size; its grey scale does not matter.
    healpix_order, oversampling, offset_range : see `initial_model`.

    Raises
    ------
    RelionMissing, RelionError ; ValueError : bad numbers, another box or pixel size, a particle larger than the box.
    """
    references = [reference] if isinstance(reference, (str, Path)) else list(reference)
    classes = checks.integer("classes", classes, low=1)
    if len(references) not in (1, classes):
        raise ValueError(f"reference: expected one map or {classes}, one a class, got {len(references)}")
    command = _refine(folder, star, particle_diameter, "classify", threads, seed)
    checked = [_reference(folder, star, name) for name in references]
    if len(checked) > 1:
        chosen = Path(folder) / "classify_references.star"
        _write_star(chosen, {"": pd.DataFrame({"rlnReferenceImage": checked})})
        command += ["--ref", chosen.name]
    else:
        command += ["--ref", checked[0]]
    iterations = checks.integer("iterations", iterations, low=1)
    command += ["--firstiter_cc", "--ini_high", checks.number("ini_high", ini_high, above=0.0), "--K", classes]
    command += ["--iter", iterations, "--tau2_fudge", 4.0, "--pad", 2]
    command += _sampling(healpix_order, oversampling, offset_range)
    last = f"classify/run_it{iterations:03d}"
    _run(folder, "classify", command, [star, *references], [f"{last}_model.star", f"{last}_data.star"])
    maps, occupancies, resolutions = _classes(folder, last)
    numbers = _particles(folder, star, f"{last}_data.star")["rlnClassNumber"].to_numpy(int)
    best = int(np.argmax(occupancies))
    return Classification(maps[best], maps, occupancies, resolutions, numbers, best + 1)


def auto_refine(
    folder: str | Path,
    star: str | Path,
    reference: str | Path,
    particle_diameter: float,
    *,
    ini_high: float = 60.0,
    healpix_order: int = 2,
    local_healpix_order: int = 4,
    offset_range: float = 5.0,
    faster: bool = False,
    max_iterations: int = 25,
    processes: int = 3,
    threads: int = 1,
    seed: int = 0,
    mpirun: str = MPIRUN,
) -> Refinement:
    """Refine two random halves apart (gold standard) until neither map nor poses change, then join them.

    From denoised and clean images RELION believes ever finer angles: 300 clean images of 32 px (`faster`) went to steps
    of 0.23 degrees in 12 iterations and 130 s, with poses no better than after 7 (median error 1.8 degrees). So after
    `max_iterations` it is told to join the halves as they are.

    Parameters
    ----------
    folder, star, particle_diameter : the project, the star of `prepare` in it, A.
    reference : a map with the particles' box and pixel size; its grey scale does not matter.
    healpix_order, local_healpix_order : the angular step is 30 degrees / 2**order at the start, and from which on only
        the neighbourhood of each pose is searched.
    offset_range : pixels; the step is 2.
    faster : refine the angles as the resolution asks for, whether or not the poses have settled.
    processes : of MPI, at least 3: a leader and one a half.
    mpirun : command before `-n`; as root, Open MPI also gets --allow-run-as-root.

    Raises
    ------
    RelionMissing, RelionError ; ValueError : bad numbers, another box or pixel size, a particle larger than the box.
    """
    processes = checks.integer("processes", processes, low=3)
    max_iterations = checks.integer("max_iterations", max_iterations, low=1)
    ends = ["_class001.mrc", "_half1_class001_unfil.mrc", "_half2_class001_unfil.mrc", "_data.star", "_model.star"]
    command = _refine(folder, star, particle_diameter, "auto_refine", threads, seed)
    launcher = shlex.split(mpirun)
    root = ["--allow-run-as-root"] if os.geteuid() == 0 and Path(launcher[0]).name == "mpirun" else []
    mpi = [*launcher, *root, "-n", processes, "relion_refine_mpi"]
    command = [*mpi, *command[1:], "--auto_refine", "--split_random_halves"]
    command += ["--ref", _reference(folder, star, reference)]
    command += ["--firstiter_cc", "--ini_high", checks.number("ini_high", ini_high, above=0.0), "--pad", 2]
    command += ["--low_resol_join_halves", 40, "--auto_iter_max", max_iterations]
    command += ["--auto_local_healpix_order", checks.integer("local_healpix_order", local_healpix_order, low=0)]
    command += ["--auto_ignore_angles", "--auto_resol_angles"] * bool(faster)
    command += _sampling(healpix_order, 1, offset_range)
    last = f"auto_refine/run_it{max_iterations:03d}_optimiser.star"
    _run(folder, "auto_refine", command, [star, reference], ["auto_refine/run_it001_optimiser.star"])
    capped = not (Path(folder) / "auto_refine/run_model.star").is_file()
    name = "auto_refine/joined" if capped else "auto_refine/run"
    outputs = [f"{name}{end}" for end in ends]
    if capped:
        _expect(folder, "auto_refine", [last])
        join = [*mpi, "--continue", last, "--force_converge", "--o", name, "--j", threads, "--pool", 30]
        join += ["--preread_images", "--dont_check_norm", "--dont_combine_weights_via_disc"]
        _run(folder, "auto_refine_join", join, [Path(folder) / last], outputs)
    else:
        _expect(folder, "auto_refine", outputs)
    paths = [Path(folder) / output for output in outputs]
    resolution = float(_table(paths[4], "model_general")["rlnCurrentResolution"].item())
    table = _particles(folder, star, outputs[3])
    return Refinement(paths[0], (paths[1], paths[2]), resolution, paths[4], paths[3], table, capped)


def post_process(
    folder: str | Path, refinement: Refinement, *, threshold: float | None = None, threads: int = 1
) -> PostProcess:
    """Mask the half-maps, correct their FSC for the mask by phase randomisation, and weight the map by it.

    No sharpening: a B factor is fitted beyond 10 A, which maps of these boxes do not reach. Of denoised images the FSC
    of half-maps is no resolution: the network saw both halves. Compare with the truth, too.

    The mask begins where the map, low-passed to 15 A or two voxels, passes the threshold; it is one voxel wider, with a
    soft edge of three (RELION's window has more, for finer voxels: at 6.4 A, 3 and 6 fill most of the box). Phases are
    randomised from where the half-maps' FSC falls below 0.8; where it never does, as from clean images (RELION stops
    there), from four voxels on: half the Nyquist frequency.

    Parameters
    ----------
    threshold : grey level of the low-passed map at which the mask begins; None is a fifth of the map's 99.9th
        percentile: 8 to 10 % of the phantom's box (RELION's window has 0.02, to be set anew for each map).

    Raises
    ------
    RelionMissing, RelionError ; ValueError : bad numbers, or a threshold that no voxel or every voxel passes.
    """
    folder = _folder(folder)
    with mrcfile.open(refinement.map, permissive=True) as map_file:
        volume, pixel_size = map_file.data.copy(), float(map_file.voxel_size.x)
    threshold = 0.2 * float(np.percentile(volume, 99.9)) if threshold is None else checks.number("threshold", threshold)
    lowpass = max(15.0, 2 * pixel_size)
    (folder / "post_process").mkdir(exist_ok=True)
    mask, name = "post_process/mask.mrc", "post_process/run"
    command = ["relion_mask_create", "--i", _inside(folder, refinement.map), "--o", mask]
    command += ["--lowpass", lowpass, "--ini_threshold", threshold, "--angpix", pixel_size]
    command += ["--j", checks.integer("threads", threads, low=1)]
    command += ["--extend_inimask", 1, "--width_soft_edge", 3]
    _run(folder, "mask_create", command, [refinement.map], [mask])
    with mrcfile.open(folder / mask, permissive=True) as mask_file:
        inside = float((mask_file.data > 0.5).mean())
    if not 0 < inside < 1:
        found = f"{inside:.0%} of the box at {threshold:g}"
        raise ValueError(f"threshold: expected a mask around the particle, got {found}; choose another grey level")
    command = ["relion_postprocess", "--i", _inside(folder, refinement.half_maps[0])]
    command += ["--i2", _inside(folder, refinement.half_maps[1]), "--o", name, "--mask", mask, "--angpix", pixel_size]
    fsc = _table(refinement.model, "model_class_1")["rlnGoldStandardFsc"]
    if fsc.iloc[1:].min() >= 0.8:
        command += ["--randomize_at_A", 4 * pixel_size]
    outputs = [f"{name}.mrc", f"{name}.star"]
    _run(folder, "post_process", command, [*refinement.half_maps, folder / mask], outputs)
    resolution = float(_table(folder / outputs[1], "general")["rlnFinalResolution"].item())
    return PostProcess(folder / outputs[0], folder / mask, resolution, _table(folder / outputs[1], "fsc"))


def commands(folder: str | Path) -> dict[str, str]:
    """Return the commands run in a project folder, by step, in the order in which they ended."""
    logs = sorted(Path(folder).glob("*.log"), key=lambda log: log.stat().st_mtime_ns)
    return {log.stem: log.read_text(errors="replace").partition("\n")[0] for log in logs}


def _refine(folder: str | Path, star: str | Path, diameter: float, step: str, threads: int, seed: int) -> list[Any]:
    """What all refinements have in common; refuses a star with poses or of larger particles than its box.

    RELION's flags take no value: `--ctf false` is `--ctf`. References are free of CTF: `--ctf_corrected_ref`.
    """
    if Path(star).absolute().parent != Path(folder).absolute():
        raise ValueError(f"{star}: expected a star file in {folder}, where RELION runs; give the star of prepare()")
    stack = ParticleStack.open(star, project=folder)
    _diameter(stack, diameter)
    if stack.poses is not None or "rlnClassNumber" in stack.table:
        raise ValueError(f"{star}: expected particles without poses or classes, got them; give the star of prepare()")
    command = ["relion_refine", "--i", _inside(folder, star), "--o", f"{step}/run", "--particle_diameter", diameter]
    command += [*COMMON, "--sym", "C1", "--pool", 30, "--preread_images"]
    if stack.ctf is not None:
        command += ["--ctf"] + ["--ctf_corrected_ref"] * (step != "initial_model")
    command += ["--j", checks.integer("threads", threads, low=1), "--random_seed", checks.integer("seed", seed, low=0)]
    return command


def _sampling(healpix_order: int, oversampling: int, offset_range: float) -> list[Any]:
    """The grid of poses; RELION counts its offset step, here 2 pixels, before oversampling."""
    return [
        "--healpix_order",
        checks.integer("healpix_order", healpix_order, low=0),
        "--oversampling",
        checks.integer("oversampling", oversampling, low=0),
        "--offset_range",
        checks.number("offset_range", offset_range, low=0.0),
        "--offset_step",
        2,
    ]


def _folder(folder: str | Path) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _inside(folder: str | Path, path: str | Path) -> str:
    """The path as RELION, run in `folder`, is to be given it."""
    return os.path.relpath(Path(path).absolute(), Path(folder).absolute())


def _has_ctf(stack: ParticleStack, ctf: bool | None) -> bool:
    """Whether the images have the CTF of their columns: the caller's choice, where there is one."""
    checks.choice("ctf", ctf, (None, True, False))
    if ctf and stack.ctf is None:
        raise ValueError(
            f"{stack.path}: expected {', '.join(DEFOCUS)} for ctf=True, got no such columns; add them, or leave ctf out"
        )
    if ctf is None and set(DEFOCUS) & set(stack.table):
        raise ValueError(
            f"{stack.path}: expected a choice of ctf for a star with CTF columns, got None; pass ctf=True where the "
            "images have that CTF, as noisy ones do: RELION corrects it; or ctf=False where they have none, as those "
            "denoised by a network trained on references without CTF: RELION ignores the columns"
        )
    return bool(ctf)


def _diameter(stack: ParticleStack, diameter: float) -> float:
    diameter = checks.number("particle_diameter", diameter, above=0.0)
    if stack.pixel_size is None:
        raise ValueError(f"{stack.path}: expected a pixel size, got none; write the particles by particles.new")
    side = stack.images.shape[2] * stack.pixel_size
    if diameter > side:
        raise ValueError(
            f"particle_diameter: expected at most the box of {stack.path}, {stack.images.shape[2]} pixels of "
            f"{stack.pixel_size:g} A = {side:g} A, got {diameter:g} A; give A, not pixels, or use a larger box"
        )
    return diameter


def _circle(stack: ParticleStack) -> np.ndarray:
    """Distance `(h, w)` of each pixel from the centre, A."""
    h, w = stack.images.shape[1:]
    return np.hypot(*np.ogrid[-(h // 2) : h - h // 2, -(w // 2) : w - w // 2]) * stack.pixel_size


def _batches(stack: ParticleStack) -> Iterator[np.ndarray]:
    return (stack.images[start : start + BATCH] for start in range(0, len(stack), BATCH))


def _centred(images: np.ndarray, background: np.ndarray) -> np.ndarray:
    return images - images[:, background].mean(axis=1)[:, None, None]


def _reference(folder: str | Path, star: str | Path, reference: str | Path) -> str:
    """Check that a map has the particles' box and, in its header, pixel size; return its path from `folder`."""
    stack = ParticleStack.open(star, project=folder)
    if not Path(reference).is_file():
        raise FileNotFoundError(f"{reference}: expected a map (.mrc), got no file; check the path")
    with mrcfile.open(reference, permissive=True, header_only=True) as file:
        found, voxel = (int(file.header.nz), int(file.header.ny), int(file.header.nx)), float(file.voxel_size.x)
    expected = (stack.images.shape[2],) * 3
    if found != expected or abs(voxel - stack.pixel_size) > 0.005 * stack.pixel_size:
        raise ValueError(
            f"{reference}: expected a map of {expected} voxels of {stack.pixel_size:g} A, as {star}, got {found} of "
            f"{voxel:g} A; resample it, or set the voxel size in its header"
        )
    return _inside(folder, reference)


def _classes(folder: str | Path, last: str) -> tuple[tuple[Path, ...], np.ndarray, np.ndarray]:
    """Maps, occupancies and resolutions (A) of the classes in a model star."""
    table = _table(Path(folder) / f"{last}_model.star", "model_classes")
    maps = tuple(Path(folder) / name for name in table["rlnReferenceImage"])
    return maps, table["rlnClassDistribution"].to_numpy(float), table["rlnEstimatedResolution"].to_numpy(float)


def _particles(folder: str | Path, star: str | Path, name: str) -> pd.DataFrame:
    """The particles that RELION wrote, put back into the rows of `star`; RELION sorts them as it likes."""
    table = _table(Path(folder) / name, "particles").set_index("rlnImageName", drop=False)
    names = ParticleStack.open(star, project=folder).table["rlnImageName"]
    if sorted(table.index) != sorted(names):
        got = f"{len(table)} that are not the same; run it again"
        raise RelionError(f"{Path(folder) / name}: expected the {len(names)} particles of {star}, got {got}")
    return table.loc[names].reset_index(drop=True)


def _write_star(out: Path, tables: dict[str, pd.DataFrame]) -> None:
    with atomic(out) as part:
        part.write_bytes(star_text(tables))


def _table(path: Path, name: str) -> pd.DataFrame:
    """A table of a star file that RELION wrote; RelionError where it is not there."""
    try:
        return Star(path).table(name)
    except ValueError as error:
        raise RelionError(f"{error}; run it again") from error


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise RelionMissing(
            f"{name}: expected RELION on PATH, got no such program; install it (Debian: apt-get install relion), or "
            "load your cluster's module"
        )
    return found


def _is_done(log: Path, command: str, inputs: Sequence[str | Path], outputs: Sequence[str | Path]) -> bool:
    """Whether `log` is that of the same command, well ended, with its outputs there and newer than its inputs."""
    if not log.is_file() or not all(Path(output).is_file() for output in outputs):
        return False
    text, written = log.read_text(errors="replace"), log.stat().st_mtime_ns
    same = text.startswith(command + "\n") and text.rstrip().endswith(_DONE)
    return same and all(Path(path).stat().st_mtime_ns <= written for path in inputs)


def _run(
    folder: str | Path, step: str, command: Sequence[Any], inputs: Sequence[str | Path], outputs: Sequence[str | Path]
) -> None:
    """Run a program in `folder`, its output into `<step>.log`, unless it is done; what an earlier run left goes first.

    `outputs` are relative to `folder`, or absolute.
    """
    folder = Path(folder)
    words = [f"{word:g}" if isinstance(word, float) else str(word) for word in command]
    log, line = folder / f"{step}.log", shlex.join(words)
    if _is_done(log, line, inputs, [folder / output for output in outputs]):
        return
    for program in {words[0], *(word for word in words if word.startswith("relion_"))}:
        _program(program)
    if f"{step}/run" in words and {"relion_refine", "relion_refine_mpi"} & set(words):
        shutil.rmtree(folder / step, ignore_errors=True)
        (folder / step).mkdir()
    for output in outputs:
        (folder / output).unlink(missing_ok=True)
    with open(log, "w") as file:
        file.write(line + "\n")
        file.flush()
        code = subprocess.run(words, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file).returncode
    if code:
        raise RelionError(_failure(words, folder, log, f"exit code {code}"))
    _expect(folder, step, outputs)
    with open(log, "a") as file:
        file.write(f"\n{_DONE}\n")


def _expect(folder: str | Path, step: str, outputs: Sequence[str | Path]) -> None:
    """RelionError where a program that returned 0 left one of its outputs out."""
    missing = [str(output) for output in outputs if not (Path(folder) / output).is_file()]
    if missing:
        log = Path(folder) / f"{step}.log"
        words = shlex.split(log.read_text(errors="replace").partition("\n")[0])
        raise RelionError(_failure(words, Path(folder), log, f"exit code 0, but no {', '.join(missing)}"))


def _failure(words: Sequence[str], folder: Path, log: Path, problem: str) -> str:
    """What failed, and RELION's own words: its ERROR lines (or the line after one), else the last of the log."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace"))[1:] if line.strip()]
    errors = [
        line
        for before, line in zip(["", *lines], lines)
        if re.search(r"ERROR:?\s*\w|^in: |error:|WARNING: Option", line) or (before == "ERROR:" and line != "ERROR:")
    ]
    said = "\n".join(f"  {line}" for line in dict.fromkeys(errors or lines[-8:]))
    program = next((word for word in words if word.startswith("relion_")), words[0])
    return f"{program}: {problem}, in {folder}; it said:\n{said[-2000:]}\nThe full log: {log}"
