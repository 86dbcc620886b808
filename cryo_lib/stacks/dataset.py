"""Training pairs by name: an experiment (noise, SNR, contamination), and the images of a scale on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from cryo_lib import checks
from cryo_lib.files import foreign, read_json
from cryo_lib.simulate import contamination
from cryo_lib.simulate.noise import PROTOCOLS, add_noise

SPLITS = ("train", "val", "test")
MEASURED = "measured"  # the protocol of images that are noisy as they were taken


@dataclass(frozen=True)
class Experiment:
    """A noise protocol, an SNR and a contamination, written `protocol-snr-contamination` such as `awgn-0.1-A_0.3`.

    `awgn-0.1-none-half1` and `-half2` train on disjoint halves of the pairs. Real particles have their own noise: there
    it is `measured-contamination`, such as `measured-none`.

    Attributes
    ----------
    protocol : "awgn" (Eq. 1 as printed), "clipped" (the noisy image clipped to [0, 1], as the authors' scripts), or
        "measured" (the noisy images of the data set itself).
    snr : Var(signal) / Var(noise) of each image, or of that which it is binned from, > 0; None for measured images.
    kind, eps : contamination of the fraction `eps` of the training pairs, Eq. (2), a key of `contamination.KINDS` or
        `contamination.HARDER`; "none" and 0 without. Those of `contamination.PROJECTED` need simulated images.
    half : 1 or 2, every other training pair from the first or the second on; 0, all of them.
    """

    protocol: str
    snr: float | None
    kind: str = "none"
    eps: float = 0.0
    half: int = 0

    def __post_init__(self) -> None:
        checks.choice("protocol", self.protocol, (*PROTOCOLS, MEASURED))
        if self.protocol != MEASURED:
            checks.number("snr", self.snr, above=0)
        elif self.snr is not None:
            raise ValueError(f"snr: expected None, since {MEASURED} images have their own noise, got {self.snr}")
        checks.choice("contamination", self.kind, ("none", *contamination.KINDS, *contamination.HARDER))
        if self.protocol == MEASURED and self.kind in contamination.PROJECTED:
            raise ValueError(
                f"contamination: {self.kind} projects references anew, which {MEASURED} images do not allow; use "
                "simulated ones"
            )
        if self.protocol == "clipped" and self.kind == "I":
            raise ValueError(
                "contamination: I adds ice to noisy images, after which clipped ones would leave [0, 1]; use awgn"
            )
        checks.number("eps", self.eps, low=0, high=1)
        checks.choice("half", self.half, (0, 1, 2))

    @classmethod
    def parse(cls, text: str) -> Experiment:
        """Read `protocol-snr-contamination`, `-half1` or `-half2` after it; ValueError names what is wrong."""
        match = re.fullmatch(r"([a-z]+)(?:-([0-9.]+))?-(?:none|([A-Z])_([0-9.]+))(?:-half([12]))?", str(text))
        if not match or (match[2] is None) != (match[1] == MEASURED):
            raise ValueError(
                "experiment: expected protocol-snr-contamination such as awgn-0.1-none, awgn-0.05-A_0.3 or, of "
                f"particles, {MEASURED}-none (-half1 or -half2 after it), got {text!r}"
            )
        protocol, snr, kind, eps, half = match.groups()
        try:
            experiment = cls(protocol, float(snr) if snr else None, kind or "none", float(eps or 0), int(half or 0))
        except ValueError as error:
            raise ValueError(f"experiment {text!r}: {error}") from error
        if str(experiment) != text:
            raise ValueError(
                f"experiment: expected the form {str(experiment)!r}, got {text!r}; names are keys, so one form is valid"
            )
        return experiment

    def __str__(self) -> str:
        kind = "none" if self.kind == "none" else f"{self.kind}_{self.eps:g}"
        noise = self.protocol if self.snr is None else f"{self.protocol}-{self.snr:g}"
        return f"{noise}-{kind}" + (f"-half{self.half}" if self.half else "")


@dataclass(frozen=True)
class Dataset:
    """The images of a scale, as notebook 01 (simulated) or 10 (particles) writes them.

    `volumes.npy`, `x_{train,val,test}.npy`, `poses.npz`, `card.json`; of particles also `y_{train,val,test}.npy`.

    Attributes
    ----------
    folder : where they lie; FileNotFoundError, when something is read, where they do not.
    """

    folder: Path

    @property
    def card(self) -> dict[str, Any]:
        """Image and pixel size (A), what it is binned from (px), resolution (A), seed, and digests of the images."""
        return read_json(self._file("card.json"))

    @property
    def poses(self) -> dict[str, np.ndarray]:
        """`<split>_rotations` `(n, 3, 3)`; `(n,)`: simulated, `<split>_conformations`; particles, `<split>_rows`."""
        return dict(self._load("poses.npz"))

    @property
    def volumes(self) -> np.ndarray:
        """The density of each conformation, `(conformations, n, n, n)` float32."""
        return self._load("volumes.npy")

    def clean(self, split: str) -> np.ndarray:
        """The references of a split, `(n, h, w)` float32 in [0, 1], mapped from their file."""
        return self._load(f"x_{checks.choice('split', split, SPLITS)}.npy", mmap_mode="c")

    def pairs(self, split: str, experiment: Experiment) -> tuple[np.ndarray, np.ndarray]:
        """References and noisy images of a split, Eq. (1): the same for every run, each split with noise of its own.

        Of the training split, the half that the experiment asks for.
        """
        x = self.clean(split)
        if experiment.protocol == MEASURED:
            y = self._load(f"y_{split}.npy", mmap_mode="c")
        else:
            y = self.noisy(x, experiment, len(SPLITS) * self.card["seed"] + SPLITS.index(split))
        kept = _kept(split, experiment)
        return x[kept], y[kept]

    def training_pairs(
        self, experiment: Experiment, seed: int, fresh: Any = None, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """The training pairs after contamination, Eq. (2); `options` are those of `contamination.contaminate`.

        fresh : the seed of other noise than that of `pairs`, of simulated images.
        """
        x, y = self.pairs("train", experiment)
        if fresh is not None:
            y = self.noisy(x, experiment, fresh)
        if experiment.kind == "none":
            return x, y
        views = self.views("train", experiment) if experiment.kind in contamination.PROJECTED else None
        return contamination.contaminate(x, y, experiment.kind, experiment.eps, seed, views=views, **options)[:2]

    def noisy(self, x: Any, experiment: Experiment, seed: Any) -> np.ndarray:
        """Images `(n, h, h)` with the noise of an experiment at this scale; see `noise.add_noise`."""
        return add_noise(x, experiment.snr, seed, experiment.protocol, self.card.get("binned_from"))

    def views(self, split: str, experiment: Experiment) -> contamination.Views:
        """What the references of `pairs(split, experiment)` were projected from; simulated images only."""
        poses, kept = self.poses, _kept(split, experiment)
        return contamination.Views(
            self.volumes, poses[f"{split}_rotations"][kept], poses[f"{split}_conformations"][kept]
        )

    def _load(self, name: str, **options: Any) -> Any:
        path = self._file(name)
        try:
            return np.load(path, **options)
        except (ValueError, EOFError, BadZipFile) as error:
            got = foreign(path) or "a damaged one, or one cut short"
            raise ValueError(f"data: expected {path} as it was written, got {got}; make it again") from error

    def _file(self, name: str) -> Path:
        path = Path(self.folder, name)
        if not path.is_file():
            raise FileNotFoundError(
                f"data: expected {path}, found nothing; make it with `dvc repro projections` (notebooks 00 and 01), "
                "or, for particles and their measured noise, with notebook 10"
            )
        return path


def _kept(split: str, experiment: Experiment) -> slice:
    """Which images of a split the experiment takes: of the training split, the half that it asks for."""
    return slice(experiment.half - 1, None, 2) if experiment.half and split == "train" else slice(None)
