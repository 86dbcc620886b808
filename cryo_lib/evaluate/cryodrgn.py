"""cryoDRGN's VAE on our stacks of known poses: its inputs written, its programs run, what they find read back.

`write_inputs`, `train`, `latent`, `volumes`. cryoDRGN 4 (GPL-3.0) lives in an environment of its own, `make cryodrgn`;
its command is called, nothing of it is imported.

Conventions, held by tests against cryoDRGN's own parser and back-projection. It turns the image's Fourier plane by rows
from the left, so its rotation is the transpose of ours. A translation moves an image to its centre: the shift of ours
with the other sign, in fractions of the box. Its CTF is RELION's with the other sign, and it inverts images unless told
not to: bright protein comes out bright if images that have a CTF are inverted and those that have none are not.

Source: Zhong et al. (2021), Nat. Methods 18, 176.
"""

from __future__ import annotations

import hashlib
import pickle
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cryo_lib import checks
from cryo_lib.files import atomic
from cryo_lib.stacks.mrc import BATCH, read_map
from cryo_lib.stacks.particles import DEFOCUS, ParticleStack, write

PROGRAM = "build/cryodrgn/bin/cryodrgn"  # where `make cryodrgn` puts it
_CTF = [*DEFOCUS, "rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast", "rlnPhaseShift"]  # its columns 2 to 8


class CryodrgnMissing(RuntimeError):
    """cryoDRGN's command is not there."""


class CryodrgnError(RuntimeError):
    """A program of cryoDRGN failed, or ended without its output."""


@dataclass(frozen=True)
class Inputs:
    """What cryoDRGN reads: the stack, the poses, and the CTF where the images have one."""

    particles: Path
    poses: Path
    ctf: Path | None

    @property
    def arguments(self) -> list[Any]:
        """The words of a command that takes these particles: `train_vae`, `backproject_voxel`."""
        contrast = ["--uninvert-data"] if self.ctf is None else ["--ctf", self.ctf]
        return [self.particles, "--poses", self.poses, *contrast]


def version(program: str | Path = PROGRAM) -> str:
    """Return cryoDRGN's version, as "4.3.1"; CryodrgnMissing where the command is not there."""
    done = subprocess.run([_found(program), "--version"], capture_output=True, text=True)
    if done.returncode or not done.stdout.startswith("cryoDRGN "):
        raise CryodrgnError(f"{program} --version: expected cryoDRGN's version, got {done.stdout + done.stderr!r}")
    return done.stdout.split()[1]


def write_inputs(stack: ParticleStack, folder: str | Path, *, ctf: bool = True) -> Inputs:
    """Write `folder/particles.mrcs`, `poses.pkl` and, where the stack has a CTF, `ctf.pkl`, row for row.

    Parameters
    ----------
    stack : of known poses; protein bright; an even, square box.
    ctf : False for images that have none though their star has its columns, as denoised ones.

    Raises
    ------
    ValueError : no poses or pixel size, an odd box, a B-factor or scale, which cryoDRGN's file has no place for.
    """
    folder, (n, h, w) = Path(folder), stack.images.shape
    poses, pixel_size = stack.poses, stack.pixel_size
    if poses is None:
        raise ValueError(
            f"{stack.path}: expected known poses, got no rlnAngleRot, rlnAngleTilt, rlnAnglePsi; give the star file of "
            "a refinement"
        )
    if pixel_size is None:
        raise ValueError(f"{stack.path}: expected a pixel size, got none; open it with pixel_size=...")
    if h != w or h % 2:
        raise ValueError(f"{stack.path}: expected images of an even, square box, got {h} x {w}; crop or pad them")
    table = stack.ctf if ctf else None
    if table is not None and ((table["rlnCtfBfactor"] != 0) | (table["rlnCtfScalefactor"] != 1)).any():
        raise ValueError(
            f"{stack.path}: expected rlnCtfBfactor 0 and rlnCtfScalefactor 1, as cryoDRGN has no others, got others; "
            "write the star file without these columns"
        )
    batches = (stack.images[start : start + BATCH] for start in range(0, n, BATCH))
    particles = write(folder / "particles.mrcs", batches, stack)
    rotations = poses.rotations.transpose(0, 2, 1)
    _pickle(folder / "poses.pkl", (rotations, 0.0 - poses.shifts / (pixel_size * w)))
    if table is not None:
        sizes = np.broadcast_to([w, pixel_size], (n, 2))
        _pickle(folder / "ctf.pkl", np.hstack([sizes, table[_CTF].to_numpy()]).astype(np.float32))
    return Inputs(particles, folder / "poses.pkl", None if table is None else folder / "ctf.pkl")


def train(
    inputs: Inputs,
    out: str | Path,
    program: str | Path = PROGRAM,
    *,
    zdim: int = 8,
    epochs: int = 20,
    width: int = 1024,
    layers: int = 3,
    batch_size: int = 16,
    rate: float = 1e-4,
    beta: float | None = None,
    seed: int = 0,
) -> Path:
    """Run `train_vae` into the folder `out`, unless that is done, and return it; the defaults are cryoDRGN's own.

    Parameters
    ----------
    zdim : dimensions of the latent space. width, layers : of the encoder and of the decoder.
    epochs, batch_size, rate : passes, images a step, Adam's learning rate.
    beta : weight of the latent's divergence; None is 1 / zdim.
    seed : of the weights, of what the latent draws, and of the order of images.

    Raises
    ------
    CryodrgnMissing, CryodrgnError ; TypeError, ValueError : bad numbers.
    """
    whole = {"zdim": zdim, "num-epochs": epochs, "batch-size": batch_size}
    whole |= {
        f"{part}-{size}": value for part in ("enc", "dec") for size, value in (("dim", width), ("layers", layers))
    }
    words = ["train_vae", *inputs.arguments, "-o", out, "--no-analysis", "--checkpoint", 0]
    for name, value in whole.items():
        words += [f"--{name}", checks.integer(name, value, low=1)]
    words += ["--lr", checks.number("rate", rate, above=0.0)]
    words += [] if beta is None else ["--beta", checks.number("beta", beta, low=0.0)]
    words += ["--seed", checks.integer("seed", seed, low=0), "--shuffle-seed", seed]
    read = [path for path in (inputs.particles, inputs.poses, inputs.ctf) if path is not None]
    return _run(program, words, read, out, ["z.pkl", "weights.pkl", "config.yaml"])


def latent(out: str | Path) -> np.ndarray:
    """Return each image's mean in the latent space, `(n, zdim)`, of a training in the folder `out`, row for row."""
    path = Path(out, "z.pkl")
    try:
        with open(path, "rb") as file:
            z = np.asarray(pickle.load(file), float)  # the first of two: the second is the log of the variance
    except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CryodrgnError(f"{path}: expected what train_vae writes, got none ({error}); train again") from error
    if z.ndim != 2 or not np.isfinite(z).all():
        raise CryodrgnError(f"{path}: expected finite numbers (n, zdim), got shape {z.shape}, or NaN; train again")
    return z


def volumes(out: str | Path, z: Any, pixel_size: float, program: str | Path = PROGRAM) -> np.ndarray:
    """Return the decoder's volumes, `(m, n, n, n)` float32 `[z, y, x]`, at points `z` `(m, zdim)` of the latent space.

    Raises
    ------
    CryodrgnMissing, CryodrgnError : such as for points of another dimension than the training's.
    """
    out, z = Path(out), np.atleast_2d(np.asarray(z, float))
    zdim = latent(out).shape[1]
    if z.ndim != 2 or z.shape[1] != zdim or not np.isfinite(z).all():
        raise ValueError(f"z: expected finite points of shape (m, {zdim}), as the training's, got shape {z.shape}")
    chosen, found = out / "chosen.txt", out / "volumes"
    with atomic(chosen) as part:
        np.savetxt(part, z)
    names = [f"volumes/vol_{number:03d}.mrc" for number in range(1, len(z) + 1)]
    words = ["eval_vol", out / "weights.pkl", "-c", out / "config.yaml", "--zfile", chosen, "-o", found]
    words += ["--Apix", checks.number("pixel_size", pixel_size, above=0.0)]
    _run(program, words, [out / "weights.pkl", chosen], out, names)
    return np.stack([read_map(out / name)[0] for name in names])


def _found(program: str | Path) -> str:
    found = shutil.which(str(program))
    if found is None:
        raise CryodrgnMissing(
            f"{program}: expected cryoDRGN's command, got no such program; `make cryodrgn` installs it"
        )
    return found


def _run(program: str | Path, words: list[Any], inputs: list[Path], out: str | Path, outputs: list[str]) -> Path:
    """Run a program of cryoDRGN unless it is done, and return the folder `out` of its outputs.

    All it prints goes into `out/<program>.log`, after a line of the command and the digest of the inputs. Done is a
    program whose log begins with the same line and whose outputs are there: they go before each start.
    """
    command, out = [_found(program), *map(str, words)], Path(out)
    digest, log = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)), out / f"{words[0]}.log"
    line = f"{shlex.join(command)}  # inputs {digest.hexdigest()[:16]}"
    if log.is_file() and log.read_text(errors="replace").partition("\n")[0] == line and not _missing(out, outputs):
        return out
    out.mkdir(parents=True, exist_ok=True)
    for name in outputs:
        (out / name).unlink(missing_ok=True)
    with open(log, "w") as file:
        file.write(line + "\n")
        file.flush()
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file).returncode
    if code or _missing(out, outputs):
        problem = f"exit code {code}" + f", but no {', '.join(_missing(out, outputs)[:3])}" * (not code)
        said = "\n".join(f"  {each}" for each in log.read_text(errors="replace").splitlines()[1:][-8:])
        log.rename(failed := log.with_suffix(".failed.log"))
        raise CryodrgnError(f"cryodrgn {words[0]}: {problem}; it said last:\n{said}\nThe full log: {failed}")
    return out


def _missing(out: Path, outputs: list[str]) -> list[str]:
    return [name for name in outputs if not (out / name).is_file()]


def _pickle(path: Path, value: Any) -> None:
    with atomic(path) as part:
        part.write_bytes(pickle.dumps(value, protocol=4))
