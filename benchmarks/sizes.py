"""How much is measured: a quick size, for tests, and the full one, on a CPU or a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from cryo_lib import checks

PAPER = ("l1_ae", "l2_ae", "js_l1", "beta_1_1_l1", "beta_05_05_l1", "wgan_gp_l1")  # the methods of Table 1
KINDS = ("l1_ae", "beta_05_05_l1", "wgan_gp_l1")  # one of each kind of step


@dataclass(frozen=True)
class Configuration:
    """What a training step is timed at.

    Attributes
    ----------
    name : in tables. size : px. width : channels. batch, pairs : pairs a minibatch and in all.
    precision : of our engine. methods : ids, see `losses.Method.parse`.
    seconds : that one timing takes, or an iteration where that is longer. repeats : timings of each.
    """

    name: str
    size: int
    width: int
    batch: int
    pairs: int
    precision: str
    methods: tuple[str, ...]
    seconds: float
    repeats: int


@dataclass(frozen=True)
class Curve:
    """One growth curve of a training: `axis` ("size", "width" or "pairs") takes `values`, the rest is as in `base`."""

    axis: str
    values: tuple[int, ...]
    base: dict[str, int]


@dataclass(frozen=True)
class Size:
    """All that is measured.

    Attributes
    ----------
    steps : configurations of the training step.
    gemm_sizes : sides of the matrices tried for the ceiling. copy_mib : MiB copied at a time.
    repeats : timings of each of these.
    denoise : of the stack denoised beside Topaz and of our network: size (px), width (channels), images in all and a
        batch, and repeats, the timings of each. precisions : of our network.
    memory_images : lengths of the `.mrcs` stacks of 32 px whose denoising must not take more memory. memory_star : of a
        `.star` stack.
    geometry : size (px), and images, the projections made and reconstructed from.
    accuracy : of the trainings whose PSNR is compared by precision: size (px), width, batch, pairs, validation
        (images), epochs, seeds.
    posterior : of the stack denoised by our network and by the posterior over references: size (px), width, images in
        all, batch (of the network), references, and repeats. posterior_growth : numbers of references, and of images.
    growth : curves of the training. growth_seconds, growth_repeats : of the timings of each of their points.
    """

    steps: tuple[Configuration, ...]
    growth: tuple[Curve, ...]
    gemm_sizes: tuple[int, ...]
    copy_mib: int
    repeats: int
    denoise: dict[str, int]
    memory_images: tuple[int, ...]
    memory_star: int
    geometry: dict[str, int]
    growth_seconds: float
    growth_repeats: int
    accuracy: dict[str, int]
    posterior: dict[str, int]
    posterior_growth: dict[str, tuple[int, ...]]
    precisions: tuple[str, ...] = ("float32", "bf16")  # of the CPU; a GPU has tf32 as well


def size_of(name: str, device: str) -> Size:
    """The size called "quick" or "full" for a device, "cpu" or "cuda"; ValueError for others."""
    checks.choice("size", name, ("quick", "full"))
    checks.choice("device", device, ("cpu", "cuda"))
    if name == "quick":
        step = Configuration("Test, 32 px, width 2", 32, 2, 4, 16, "float32", ("wgan_gp_l1",), 0.1, 3)
        return Size(
            steps=(step,),
            growth=(Curve("width", (2, 4), {"size": 32, "batch": 4, "pairs": 16}),),
            gemm_sizes=(64, 128),
            copy_mib=16,
            repeats=3,
            denoise={"size": 32, "width": 2, "images": 16, "batch": 8, "repeats": 2},
            memory_images=(200, 400),
            memory_star=200,
            geometry={"size": 32, "images": 64},
            growth_seconds=0.1,
            growth_repeats=2,
            accuracy={"size": 32, "width": 2, "batch": 8, "pairs": 32, "validation": 8, "epochs": 1, "seeds": 2},
            posterior={"size": 32, "width": 2, "images": 8, "batch": 8, "references": 20, "repeats": 2},
            posterior_growth={"references": (20, 40), "images": (8, 16)},
        )
    both = {"memory_images": (10**3, 10**4, 10**5, 10**6), "memory_star": 10**5}
    both |= {"growth_seconds": 1.0, "growth_repeats": 3}
    both["posterior_growth"] = {"references": (1_000, 4_000, 16_000), "images": (100, 400, 1_600)}
    if device == "cpu":
        return Size(
            steps=(
                Configuration("Laptop, 48 px, width 8", 48, 8, 10, 1800, "float32", PAPER, 1.0, 5),
                Configuration("Paper's network, 128 px, width 64", 128, 64, 4, 40, "bf16", KINDS, 1.0, 3),
            ),
            growth=(
                Curve("size", (32, 64, 96, 128), {"width": 8, "batch": 10, "pairs": 100}),
                Curve("width", (4, 8, 16, 32, 64), {"size": 48, "batch": 10, "pairs": 100}),
                Curve("pairs", (1_000, 10_000, 100_000), {"size": 32, "width": 4, "batch": 10}),
            ),
            gemm_sizes=(512, 1024, 2048),
            copy_mib=256,
            repeats=5,
            denoise={"size": 128, "width": 64, "images": 48, "batch": 16, "repeats": 3},
            geometry={"size": 64, "images": 1000},
            **both,
            accuracy={"size": 48, "width": 8, "batch": 10, "pairs": 1800, "validation": 200, "epochs": 1, "seeds": 3},
            posterior={"size": 128, "width": 64, "images": 100, "batch": 16, "references": 2_000, "repeats": 3},
        )
    return Size(
        steps=(Configuration("Paper, 128 px, width 64", 128, 64, 20, 5000, "bf16", KINDS, 1.0, 5),),
        growth=(
            Curve("size", (32, 64, 96, 128), {"width": 64, "batch": 20, "pairs": 1000}),
            Curve("width", (4, 16, 32, 64), {"size": 128, "batch": 20, "pairs": 1000}),
            Curve("pairs", (1_000, 10_000, 100_000), {"size": 32, "width": 16, "batch": 20}),
        ),
        gemm_sizes=(2048, 4096, 8192),
        copy_mib=1024,
        repeats=20,
        denoise={"size": 128, "width": 64, "images": 4000, "batch": 100, "repeats": 3},
        precisions=("float32", "tf32", "bf16"),
        geometry={"size": 128, "images": 2000},
        **both,
        accuracy={"size": 128, "width": 64, "batch": 20, "pairs": 5000, "validation": 200, "epochs": 1, "seeds": 3},
        posterior={"size": 128, "width": 64, "images": 400, "batch": 100, "references": 25_000, "repeats": 3},
    )
