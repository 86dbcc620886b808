"""The methods of the paper, one entry each: what tables and figures call them, and how they draw them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

PAIRS, LEVEL, STACK = "training pairs", "the noise level", "the stack of noisy images"
COPIES = "two noisy images of each particle"
REFERENCES, TRUTH, NOTHING = "clean references", "the true volumes", "nothing"

CLEAN = (PAIRS, REFERENCES, TRUTH)  # what holds clean images


class Entry(NamedTuple):
    """What is shown of a method.

    Attributes
    ----------
    label : its name in tables and figures, as printed in Table 1.
    kind : "network" (of the paper) | "classical" | "ours" | "self-supervised" | "released" (trained by its authors) |
        "posterior" | "bound" | "reference".
    colour, marker : matplotlib's. needs : what it is told beside the noisy image.
    """

    label: str
    kind: str
    colour: str
    marker: str
    needs: str


METHODS: dict[str, Entry] = {  # in the order of tables; Okabe-Ito's and Tol's colours, told apart without colour vision
    "clean": Entry("Clean images", "reference", "#000000", "o", NOTHING),
    "noisy": Entry("Noisy input", "reference", "#bbbbbb", "o", NOTHING),
    "average": Entry("Average reference", "reference", "#444444", "o", PAIRS),
    "gaussian": Entry("Gaussian low-pass", "classical", "#999999", "o", PAIRS),
    "bm3d": Entry("BM3D", "classical", "#777777", "o", f"{LEVEL}, {PAIRS}"),
    "ksvd": Entry("K-SVD", "classical", "#555555", "o", f"{LEVEL}, {STACK}"),
    "nlm": Entry("Non-local means", "classical", "#8c6d46", "o", f"{LEVEL}, {PAIRS}"),
    "cwf": Entry("CWF", "classical", "#5b4a8a", "o", f"{LEVEL}, {STACK}"),
    "rir": Entry("Class averages (ASPIRE)", "classical", "#b0907a", "o", f"{LEVEL}, {STACK}"),
    "l2_ae": Entry("ℓ2-Autoencoder", "network", "#0072b2", "s", PAIRS),
    "l1_ae": Entry("ℓ1-Autoencoder", "network", "#56b4e9", "o", PAIRS),
    "trimmed_ae": Entry("Trimmed ℓ2-Autoencoder", "network", "#44aa99", "H", PAIRS),
    "welsch_ae": Entry("Welsch-Autoencoder", "network", "#661100", "8", PAIRS),
    "js_l1": Entry("(0,0)-GAN + ℓ1", "network", "#009e73", "v", PAIRS),
    "wgan_gp_l1": Entry("WGANgp + ℓ1", "network", "#e69f00", "^", PAIRS),
    "beta_1_1_l1": Entry("(1,1)-GAN + ℓ1", "network", "#cc79a7", "P", PAIRS),
    "beta_05_05_l1": Entry("(.5,.5)-GAN + ℓ1", "network", "#d55e00", "D", PAIRS),
    "beta_m05_m05_l1": Entry("(−.5,−.5)-GAN + ℓ1", "network", "#332288", "<", PAIRS),
    "beta_m1_m1_l1": Entry("(−1,−1)-GAN + ℓ1", "network", "#882255", ">", PAIRS),
    "beta_1_m1_l1": Entry("(1,−1)-GAN + ℓ1", "network", "#999933", "X", PAIRS),
    "beta_05_m05_l1": Entry("(.5,−.5)-GAN + ℓ1", "network", "#117733", "p", PAIRS),
    "beta_01_m01_l1": Entry("(.1,−.1)-GAN + ℓ1", "network", "#ccae51", "h", PAIRS),
    "ours": Entry("U-Net, screened", "ours", "#004488", "d", PAIRS),
    "noise2noise": Entry("Noise2Noise", "self-supervised", "#6699cc", "1", COPIES),
    "noise2void": Entry("Noise2Void", "self-supervised", "#997700", "2", STACK),
    "topaz": Entry("Topaz-Denoise", "released", "#88ccee", "3", NOTHING),
    "classes": Entry("Class averages (EM)", "posterior", "#ee7733", "d", STACK),
    "posterior": Entry("Posterior", "posterior", "#7b3294", "*", f"{REFERENCES}, {LEVEL}"),
    "bayes_bound": Entry("Bayes bound", "bound", "#a50026", "", f"{TRUTH}, {LEVEL}"),
}

# What the paper has not.
BEYOND = {name for name, entry in METHODS.items() if entry.kind not in ("network", "classical", "reference")}


def among(names: Iterable[str]) -> dict[str, Entry]:
    """The entries of the methods that `names` hold, in the order of tables; ValueError for one that has no entry."""
    names = set(names)
    if unknown := sorted(names - set(METHODS)):
        known = ", ".join(METHODS)
        raise ValueError(f"method: expected some of {known}, got {', '.join(unknown)}; add it to METHODS in {__name__}")
    return {name: entry for name, entry in METHODS.items() if name in names}


def shown_as(study: str, method: str) -> str:
    """The entry of a run: that of its study, where this has one, else that of its method."""
    return study if study in METHODS else method


def labels() -> dict[str, str]:
    """What every method is called in tables and figures."""
    return {name: entry.label for name, entry in METHODS.items()}
