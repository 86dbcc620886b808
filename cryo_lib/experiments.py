"""What is computed at a scale: parameter files, experiments, and the grid of training runs they expand to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cryo_lib import checks, contamination, imaging
from cryo_lib.losses import METHODS

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Experiment:
    """A noise protocol, an SNR and a contamination, written `protocol-snr-contamination`: `awgn-0.1-none`, `awgn-0.1-A_0.3`.

    Attributes
    ----------
    protocol : "awgn" (Eq. 1 as printed) or "clipped" (the noisy image clipped to [0, 1], as the authors' scripts).
    snr : Var(signal) / Var(noise) of each image, > 0.
    kind, eps : contamination "A", "B" or "C" of the fraction `eps` of the training pairs, Eq. (2); "none" and 0 without.
    """

    protocol: str
    snr: float
    kind: str = "none"
    eps: float = 0.0

    def __post_init__(self) -> None:
        checks.choice("protocol", self.protocol, imaging.PROTOCOLS)
        checks.number("snr", self.snr, above=0)
        checks.choice("contamination", self.kind, ("none", *contamination.KINDS))
        checks.number("eps", self.eps, low=0, high=1)

    @classmethod
    def parse(cls, text: str) -> Experiment:
        """Read `protocol-snr-contamination`; ValueError names what is wrong."""
        match = re.fullmatch(r"([a-z]+)-([0-9.]+)-(?:none|([A-Z])_([0-9.]+))", str(text))
        if not match:
            raise ValueError(f"experiment: expected protocol-snr-contamination such as awgn-0.1-none or awgn-0.05-A_0.3, got {text!r}")
        protocol, snr, kind, eps = match.groups()
        return cls(protocol, float(snr), kind or "none", float(eps or 0))

    def __str__(self) -> str:
        kind = "none" if self.kind == "none" else f"{self.kind}_{self.eps:g}"
        return f"{self.protocol}-{self.snr:g}-{kind}"

    def noisy(self, x: Any, data_seed: int, split: str) -> np.ndarray:
        """The noisy images of a split, Eq. (1): the same for every run of the experiment, other noise for other splits."""
        split_seed = len(SPLITS) * data_seed + SPLITS.index(checks.choice("split", split, SPLITS))
        return imaging.add_noise(x, self.snr, split_seed, self.protocol)

    def contaminated(self, x: Any, y: Any, seed: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """The training pairs after contamination, Eq. (2); `options` are those of `contamination.contaminate`."""
        if self.kind == "none":
            return x, y
        return contamination.contaminate(x, y, self.kind, self.eps, seed, **options)[:2]


@dataclass(frozen=True)
class Run:
    """One training: a method on an experiment with a seed (initial weights, minibatch order, choice of contaminated pairs)."""

    method: str
    experiment: str
    seed: int

    def __post_init__(self) -> None:
        checks.choice("method", self.method, METHODS)
        Experiment.parse(self.experiment)
        checks.integer("seed", self.seed, low=0)

    @property
    def folder(self) -> Path:
        """Where the run's outputs lie below its study's folder."""
        return Path(self.method, self.experiment, f"seed{self.seed}")


def expand(study: dict[str, Any]) -> list[Run]:
    """The runs of a study `{methods, experiments, seeds}`, seeds outermost, so that a first result of everything comes early."""
    missing = {"methods", "experiments", "seeds"} ^ set(study)
    if missing:
        raise ValueError(f"study: expected the keys methods, experiments and seeds, got {sorted(study)}")
    return [
        Run(method, experiment, seed)
        for seed in study["seeds"]
        for experiment in study["experiments"]
        for method in study["methods"]
    ]


def read_scale(path: str | Path) -> dict[str, Any]:
    """Read a parameter file (`params.yaml`, `scales/*.yaml`) and check that every study in it expands.

    Raises
    ------
    FileNotFoundError, ValueError : no such file, not YAML, an unknown method or experiment, a study without its entry.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"parameters: expected the file {path}, found nothing; copy one of scales/*.yaml there")
    try:
        params = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"parameters {path}: not valid YAML: {error}") from error
    try:
        for name in params["studies"]:
            expand(params["study"][name])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"parameters {path}: {error}") from error
    return params


def differing_keys(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Dotted names of the keys that only one of two nested dictionaries has (lists and values are not compared)."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return
    for key in sorted(set(a) ^ set(b)):
        yield f"{where}{key}"
    for key in sorted(set(a) & set(b)):
        yield from differing_keys(a[key], b[key], f"{where}{key}.")
