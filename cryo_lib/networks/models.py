"""Generators and discriminators (Figure 2), and their weights on disk."""

from __future__ import annotations

import contextlib
import copy
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cryo_lib import checks
from cryo_lib.files import atomic, foreign, read_json, write_json
from cryo_lib.networks import parallel, pggan


class Residual(nn.Module):
    """ReLU(x + BN(conv3x3(x))): one residual block, `(n, c, h, w)` in and out."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class SameConv(nn.Conv2d):
    """A 4x4 convolution that keeps the size: padded by one pixel before and two after."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 2, 1, 2)))


class Wide(nn.Module):
    """ReLU(x + f(x)), f a 1x1, a 4x4 and a 1x1 convolution with batch norm, ReLU between: the 256 px networks' block.

    All of one width, so the 4x4 convolution holds nearly all parameters.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        convolutions = nn.Conv2d(channels, channels, 1), SameConv(channels, channels), nn.Conv2d(channels, channels, 1)
        layers = [layer for conv in convolutions for layer in (conv, nn.BatchNorm2d(channels), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.layers(x))


class Level(nn.Module):
    """A change of resolution and the residual blocks after it.

    `resample` is a stride-2 convolution (down) or transposed convolution (up), 4x4, then batch norm; its output, plus
    `skip` where one is given, goes through ReLU and `blocks` residual blocks of the kind `block`. `forward` returns the
    level's output and its map before the ReLU, which is what skips carry.
    """

    def __init__(self, resample: nn.Module, blocks: int, block: type[nn.Module] = Residual) -> None:
        super().__init__()
        channels = resample.out_channels
        self.resample = resample
        self.norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(*(block(channels) for _ in range(blocks)))

    def forward(self, x: Tensor, skip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        before_relu = self.norm(self.resample(x))
        if skip is not None:
            before_relu = before_relu + skip
        return self.blocks(torch.relu(before_relu)), before_relu


def _down(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)


def _up(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)


def _initialise(module: nn.Module) -> None:
    """Convolutions N(0, 0.02), biases 0 (Radford et al. 2016), which the paper's GANs follow."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)


class ResNetGenerator(nn.Module):
    """The denoising autoencoder G of Figure 2(b).

    Three stride-2 levels of `width`, 2 and 4 times `width` channels, three residual blocks each, mirrored by transposed
    convolutions; the encoder's maps before ReLU are added at the two inner resolutions; batch norm and tanh at the end.
    4,195,843 parameters at the paper's width of 64.

    Parameters
    ----------
    image_size : side of the square images in pixels, a multiple of 8.
    width : channels of the first level, >= 1.

    Raises
    ------
    ValueError : image_size or width is not as stated; in `forward`, images of another size.
    """

    multiples, blocks, block = (1, 2, 4), (3, 3, 3), Residual  # of the encoder's levels; the decoder mirrors them

    def __init__(self, image_size: int, width: int = 64) -> None:
        super().__init__()
        smallest = 2 ** len(self.multiples)
        self.image_size = checks.integer("image_size", image_size, low=smallest, multiple_of=smallest)
        width = checks.integer("width", width, low=1)
        channels = [multiple * width for multiple in self.multiples]
        down, up = zip(_pairs(1, *channels), self.blocks), zip(_pairs(*channels[::-1]), self.blocks[-2::-1])
        self.down = nn.ModuleList([Level(_down(i, o), blocks, self.block) for (i, o), blocks in down])
        self.up = nn.ModuleList([Level(_up(i, o), blocks, self.block) for (i, o), blocks in up])
        self.last = nn.Sequential(_up(width, 1), nn.BatchNorm2d(1), nn.Tanh())
        self.apply(_initialise)

    def forward(self, y: Tensor) -> Tensor:
        """Noisy images `(n, 1, h, w)` to denoised images of the same shape, in (-1, 1)."""
        checks.network_input(y, self.image_size)
        skips = []
        for level in self.down:
            y, before_relu = level(y)
            skips.append(before_relu)
        for level, skip in zip(self.up, skips[-2::-1]):
            y, _ = level(y, skip)
        return self.last(y)


class DeepGenerator(ResNetGenerator):
    """The generator for 256 px (EMPIAR-10028): six stride-2 levels of up to 8 times `width` channels, `Wide` blocks.

    Skips at every level. 78.8 million parameters at the paper's width of 64; `image_size` a multiple of 64.
    """

    multiples, blocks, block = (1, 2, 4, 8, 8, 8), (3, 3, 3, 3, 2, 0), Wide


class ResNetDiscriminator(nn.Module):
    """The patch discriminator D of Figure 2(a): scores before the sigmoid.

    Three stride-2 levels of `width`, 2 and 4 times `width` channels with 2, 2 and 3 residual blocks, then a valid 4x4
    convolution to one map: 13x13 patch scores for 128 px. 2,803,393 parameters at the paper's width of 64. D sees one
    image, unconditionally. The sigmoid belongs to the score (`losses`), so that WGAN uses the same network.

    Parameters
    ----------
    image_size : side of the square images in pixels, a multiple of 8, at least 32.
    width : channels of the first level, >= 1.
    """

    levels = (_down, 1, 2), (_down, 2, 2), (_down, 4, 3)  # resampling, channels in widths, residual blocks
    block, smallest = Residual, 32

    def __init__(self, image_size: int, width: int = 64) -> None:
        super().__init__()
        self.image_size = checks.integer("image_size", image_size, low=self.smallest, multiple_of=8)
        width = checks.integer("width", width, low=1)
        channels = [1, *(multiple * width for _, multiple, _ in self.levels)]
        steps = zip(self.levels, _pairs(*channels))
        self.down = nn.ModuleList(
            [Level(resample(i, o), blocks, self.block) for (resample, _, blocks), (i, o) in steps]
        )
        self.last = self._scores(channels[-1])
        self.apply(_initialise)

    def _scores(self, channels: int) -> nn.Module:
        return nn.Conv2d(channels, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(n, 1, h, w)` to logits `(n, 1, h/8 - 3, w/8 - 3)`; `DeepDiscriminator`'s are 3 fewer a side."""
        checks.network_input(x, self.image_size)
        for level in self.down:
            x, _ = level(x)
        return self.last(x)


class DeepDiscriminator(ResNetDiscriminator):
    """The discriminator for 256 px: a fourth level of 8 times `width` channels, then two valid convolutions.

    `Wide` blocks, 2, 2, 3 and 2 a level: 26x26 patch scores for 256 px. 20.7 million parameters at the paper's
    width of 64, which is what fixes the blocks that the text leaves open. `image_size` a multiple of 8, at least 64.
    """

    levels = *ResNetDiscriminator.levels, (SameConv, 8, 2)
    block, smallest = Wide, 64

    def _scores(self, channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, channels, 4), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 1, 4)
        )


def _pairs(*channels: int) -> list[tuple[int, int]]:
    return list(zip(channels[:-1], channels[1:]))


class ConvGenerator(nn.Module):
    """The convolutional network without residual blocks and without skips: a plain denoising autoencoder.

    Four stride-2 4x4 convolutions of 1, 2, 4 and 8 times `width` channels and four transposed ones back, batch norm and
    ReLU after each but the last, which tanh follows (Radford et al. 2016). `image_size` a multiple of 16.
    """

    multiples = 1, 2, 4, 8

    def __init__(self, image_size: int, width: int = 64) -> None:
        super().__init__()
        self.image_size = checks.integer("image_size", image_size, low=16, multiple_of=16)
        channels = [1, *(multiple * checks.integer("width", width, low=1) for multiple in self.multiples)]
        steps = [_down(i, o) for i, o in _pairs(*channels)] + [_up(i, o) for i, o in _pairs(*channels[::-1])]
        layers = [layer for step in steps[:-1] for layer in (step, nn.BatchNorm2d(step.out_channels), nn.ReLU())]
        self.layers = nn.Sequential(*layers, steps[-1], nn.Tanh())
        self.apply(_initialise)

    def forward(self, y: Tensor) -> Tensor:
        """Noisy images `(n, 1, h, w)` to denoised images of the same shape, in (-1, 1)."""
        checks.network_input(y, self.image_size)
        return self.layers(y)


class ConvDiscriminator(nn.Module):
    """The discriminator beside `ConvGenerator`: the same levels with leaky ReLU (0.01), then a valid 4x4 convolution.

    5x5 patch scores for 128 px. A last map that is smaller than 4x4 (48 px and less) is covered by the convolution.
    """

    def __init__(self, image_size: int, width: int = 64) -> None:
        super().__init__()
        self.image_size = checks.integer("image_size", image_size, low=16, multiple_of=16)
        channels = [1, *(multiple * checks.integer("width", width, low=1) for multiple in ConvGenerator.multiples)]
        layers = [layer for i, o in _pairs(*channels) for layer in (_down(i, o), nn.LeakyReLU(0.01))]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, min(4, image_size // 16)))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Images `(n, 1, h, w)` to logits `(n, 1, h/16 - 3, w/16 - 3)`, at least one."""
        checks.network_input(x, self.image_size)
        return self.layers(x)


class Change(nn.Module):
    """x + conv3x3(SiLU(conv3x3(x))), the last one 0 at first: a residual block without normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class UNet(nn.Module):
    """A U-Net whose result depends on its image alone and turns with its grey scale, f(a y + b) = a f(y) + b for a > 0.

    Each image is standardised, and its result brought back; no batch norm. Levels of `width`, 2, 4 and 8 times `width`
    channels; 2x2 means go down, bilinear upsampling goes up, so that no stride leaves a pattern; two `Change` blocks a
    level, four at the bottom. Source: Ronneberger et al. 2015; Odena et al. 2016 (upsampling); Lim et al. 2017 (no
    normalisation).

    Parameters
    ----------
    image_size : side of the square images in pixels, a multiple of 8.
    width : channels of the first level, >= 1.
    """

    multiples, blocks, bottom = (1, 2, 4, 8), 2, 4

    def __init__(self, image_size: int, width: int = 64) -> None:
        super().__init__()
        self.image_size = checks.integer("image_size", image_size, low=8, multiple_of=8)
        channels = [multiple * checks.integer("width", width, low=1) for multiple in self.multiples]
        self.first = nn.Conv2d(1, channels[0], 3, padding=1)
        self.down = nn.ModuleList([self._blocks(n, self.blocks) for n in channels[:-1]])
        self.narrow = nn.ModuleList([nn.Conv2d(i, o, 1) for i, o in _pairs(*channels)])
        self.middle = self._blocks(channels[-1], self.bottom)
        self.widen = nn.ModuleList([nn.Conv2d(i, o, 1) for i, o in _pairs(*channels[::-1])])
        self.up = nn.ModuleList([self._blocks(n, self.blocks) for n in channels[-2::-1]])
        self.last = nn.Conv2d(channels[0], 1, 3, padding=1)

    def _blocks(self, channels: int, number: int) -> nn.Module:
        return nn.Sequential(*(Change(channels) for _ in range(number)))

    def forward(self, y: Tensor) -> Tensor:
        """Noisy images `(n, 1, h, w)` to denoised images of the same shape, on the grey scale of `y`."""
        checks.network_input(y, self.image_size)
        sd, mean = torch.std_mean(y, dim=(1, 2, 3), keepdim=True)
        sd = sd.clamp(min=torch.finfo(y.dtype).tiny)
        x, skips = self.first((y - mean) / sd), []
        for blocks, narrow in zip(self.down, self.narrow):
            x = blocks(x)
            skips.append(x)
            x = narrow(nn.functional.avg_pool2d(x, 2))
        x = self.middle(x)
        for blocks, widen, skip in zip(self.up, self.widen, skips[::-1]):
            x = blocks(skip + nn.functional.interpolate(widen(x), scale_factor=2, mode="bilinear"))
        return mean + sd * self.last(x)


GENERATORS = {
    "resnet": ResNetGenerator,
    "resnet256": DeepGenerator,
    "conv": ConvGenerator,
    "pggan": pggan.Generator,
    "unet": UNet,
}
DISCRIMINATORS = {
    "resnet": ResNetDiscriminator,
    "resnet256": DeepDiscriminator,
    "conv": ConvDiscriminator,
    "pggan": pggan.Discriminator,
    "unet": ResNetDiscriminator,
}


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


PRECISIONS = (
    "float32",
    "tf32",
    "bf16",
)  # of the networks' passes: IEEE single, its products at 10 bits, or 7 bits throughout


@contextlib.contextmanager
def arithmetic(precision: str, one_size: bool = False) -> Iterator[None]:
    """How a GPU multiplies float32 numbers within: exactly for "float32", rounded to tf32 for the other `PRECISIONS`.

    Where minibatches are of `one_size`, cuDNN tries once which of its convolutions is fastest.
    """
    kinds = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before, searching = [kind.fp32_precision for kind in kinds], torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = one_size
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee" if checks.choice("precision", precision, PRECISIONS) == "float32" else "tf32"
        yield
    finally:
        torch.backends.cudnn.benchmark = searching
        for kind, value in zip(kinds, before):
            kind.fp32_precision = value


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """For one forward pass: convolutions in bfloat16 where `precision` is "bf16", as they are otherwise.

    Weights are cast anew in each pass, since a step of the optimiser may lie between two.
    """
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def pick_device(device: str = "auto") -> torch.device:
    """The device to compute on: "auto" takes a GPU that torch can use, else the CPU; any other name is used or refused.

    Of several processes that torchrun started, each takes a GPU of its own; RuntimeError or ValueError where it cannot.
    A GPU that is in the machine but that torch cannot use is warned of.
    """
    if device != "auto":
        chosen = torch.device(device)
        if chosen.type == "cuda" and parallel.size() > 1 and chosen.index is not None:
            raise ValueError(
                f"device: expected cuda, of which each of {parallel.size()} processes takes its own, got {device}"
            )
        if chosen.type == "cuda" and torch.cuda.is_available():
            torch.cuda.set_device(parallel.local_rank() if chosen.index is None else chosen.index)
        torch.zeros(1, device=chosen)
        return chosen
    if torch.cuda.is_available():
        try:
            torch.cuda.set_device(parallel.local_rank())
            (torch.zeros(8, 8, device="cuda") @ torch.zeros(8, 8, device="cuda")).cpu()
            return torch.device("cuda")
        except RuntimeError as error:
            if parallel.size() > 1:
                raise  # the others wait on a GPU for this one
            warnings.warn(
                f"A GPU is present but torch {torch.__version__} cannot run on it, so the CPU is used: {error}",
                stacklevel=2,
            )
    elif shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
        warnings.warn(
            f"nvidia-smi lists a GPU but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it, so the "
            "CPU is used: install the torch build for your driver",
            stacklevel=2,
        )
    return torch.device("cpu")


@torch.no_grad()
def denoise_images(
    model: torch.nn.Module, y: Any, batch_size: int = 100, batch_statistics: bool = False, precision: str = "float32"
) -> np.ndarray:
    """`G(y)` of images `(n, h, w)`, of the dtype of the weights as `y` is, in batches; the model is left as it was.

    In eval mode, with batch norm's stored statistics; or with `batch_statistics` those of each batch, as the authors'
    scripts do, so that an image's result depends on its batch. `precision` as in `PRECISIONS`: "bf16" is up to several
    times faster, and its images differ by about 1 % of their range at most.
    """
    device = next(model.parameters()).device
    was_training = model.training
    chosen = copy.deepcopy(model).train() if batch_statistics else model.eval()
    if not isinstance(y, Tensor):
        y = torch.from_numpy(np.ascontiguousarray(y, np.asarray(y).dtype.newbyteorder("=")))
    out = []
    with arithmetic(precision), autocast(device, precision):
        for batch in y.split(batch_size):
            out.append(chosen(batch.unsqueeze(1).to(device)).squeeze(1).to(batch.dtype).cpu())
    model.train(was_training)
    return torch.cat(out).numpy()


def save(path: str | Path, generator: nn.Module, card: dict[str, Any]) -> Path:
    """Write `path` (safetensors) and the card beside it (`.json`), each atomically; never new ones beside old ones.

    `card` must hold `architecture`, `image_size` and `width`, from which `load` rebuilds the generator.
    """
    path = Path(path)
    path.unlink(missing_ok=True)
    write_json(path.with_suffix(".json"), card)
    with atomic(path) as temporary:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in generator.state_dict().items()}, temporary
        )
    return path


def load(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Read a generator written by `save`: the network in eval mode on the CPU, and its card. No code is run.

    Raises
    ------
    FileNotFoundError : the weights or the card are missing.
    ValueError : the card does not describe a known network, or the weights do not fit it.
    """
    path = Path(path)
    for needed in (path, path.with_suffix(".json")):
        if not needed.is_file():
            raise FileNotFoundError(
                f"checkpoint: expected {needed}, found nothing; it is a .safetensors file with a .json card beside it"
            )
    card = read_json(path.with_suffix(".json"))
    try:
        build = GENERATORS[checks.choice("architecture", card["architecture"], GENERATORS)]
        model = build(card["image_size"], card["width"])
        model.load_state_dict(load_file(path))
    except SafetensorError as error:
        got = foreign(path) or f"a damaged file, or one cut short ({error}): copy it again"
        raise ValueError(f"checkpoint {path}: expected weights as safetensors, got {got}") from error
    except KeyError as error:
        raise ValueError(
            f"checkpoint {path}: expected a generator's card, its card has no {error}: it is not this library's"
        ) from error
    except (RuntimeError, ValueError, TypeError) as error:
        problem = f"weights and card do not fit together or are damaged: {error}"
        raise ValueError(f"checkpoint {path}: expected weights that its card describes, {problem}") from error
    return model.eval(), card
