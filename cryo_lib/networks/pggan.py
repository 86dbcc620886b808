"""Progressive growing (Karras et al. 2018) of a denoiser: encoder, generator and critic that start at 4 px and grow.

As there: equalised learning rates, pixel norm, the minibatch's standard deviation, levels that fade in, a critic
trained by WGAN-gp. Not as there: an encoder stands in front of the generator, the averaged copy of the generator's
weights and the drift term of the critic's loss are left out, and the levels come in equal steps of the training's
first half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cryo_lib import checks
from cryo_lib.networks import parallel

GROWTH = 0.5  # share of the training over which levels are added; from then on the networks are whole


def sizes(image_size: int) -> list[int]:
    """Sides in pixels of the levels, each twice the one before: from 4 (5, 6, 7 where it has to be) to `image_size`.

    ValueError where halving leads to none of these.
    """
    smallest = checks.integer("image_size", image_size, low=8)
    while smallest % 2 == 0 and smallest > 7:
        smallest //= 2
    if not 4 <= smallest <= 7:
        raise ValueError(
            f"image_size: expected 4, 5, 6 or 7 times a power of two, got {image_size}; crop or pad the images"
        )
    return [smallest << level for level in range(int(math.log2(image_size // smallest)) + 1)]


def at(progress: float, levels: int) -> tuple[int, float]:
    """The highest level in use at `progress` in [0, 1] of a training, and how far it has faded in, in [0, 1].

    Growth takes equal steps: over the first half of each a level stands, over the second the next one fades in.
    """
    time = progress * (levels - 1) / GROWTH
    level, rest = int(time), time % 1
    if level >= levels - 1:
        return levels - 1, 1.0
    return (level, 1.0) if rest < 0.5 else (level + 1, 2 * rest - 1)


def _pool(images: Tensor, side: int) -> Tensor:
    return images if images.shape[-1] == side else nn.functional.avg_pool2d(images, images.shape[-1] // side)


def _enlarge(images: Tensor, side: int) -> Tensor:
    return images if images.shape[-1] == side else nn.functional.interpolate(images, size=side, mode="nearest")


def seen(images: Tensor, progress: float) -> Tensor:
    """References as the networks see them at `progress`: `(n, 1, h, h)`, averaged over the pixels of the level in use.

    While a level fades in, it is mixed with the one below as the networks mix their own images.
    """
    side = images.shape[-1]
    sides = sizes(side)
    level, fade = at(progress, len(sides))
    shown = _pool(images, sides[level])
    if fade < 1:
        shown = torch.lerp(_enlarge(_pool(shown, sides[level - 1]), sides[level]), shown, fade)
    return _enlarge(shown, side)


class Scaled(nn.Conv2d):
    """A convolution whose weights are N(0, 1) and scaled by He's constant at run time ("equalised learning rate").

    Keeps the size, but for `padding=0`. `gain` is sqrt(2) before a ReLU and 1 where none follows.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, padding: int | None = None, gain: float = 2**0.5
    ) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2 if padding is None else padding)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)
        self.scale = gain / math.sqrt(inputs * kernel**2)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.scale, self.bias)


class PixelNorm(nn.Module):
    """Each pixel's channels divided by their root mean square."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


def _block(inputs: int, between: int, outputs: int, norm: type[nn.Module] = nn.Identity) -> nn.Sequential:
    convolutions = Scaled(inputs, between, 3), Scaled(between, outputs, 3)
    return nn.Sequential(*(layer for conv in convolutions for layer in (conv, nn.LeakyReLU(0.2), norm())))


class Growing(nn.Module):
    """What encoder and critic share: levels from the image's side down to the smallest; the upper ones fade in.

    `progress` in [0, 1] says how far the training is, and so which levels are in use; 1, the default, is all.
    Level i has min(8, 2**(6 - i)) times `width` channels, as Karras et al.'s networks do at their width of 64.
    """

    def __init__(self, image_size: int, width: int) -> None:
        super().__init__()
        self.image_size, self.progress = image_size, 1.0
        self.sides = sizes(image_size)
        width = checks.integer("width", width, low=1)
        self.channels = [max(1, min(8 * width, 64 * width >> level)) for level in range(len(self.sides))]
        self.from_grey = nn.ModuleList(nn.Sequential(Scaled(1, c, 1), nn.LeakyReLU(0.2)) for c in self.channels)
        self.down = nn.ModuleList(_block(c, c, below) for below, c in zip(self.channels, self.channels[1:]))

    def get_extra_state(self) -> Tensor:
        """`progress`, so that a network saved before it is whole comes back as it was."""
        return torch.tensor(self.progress)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up a saved `progress`."""
        self.progress = float(state)

    def _lowest(self, images: Tensor) -> Tensor:
        """Images `(n, 1, h, h)` to features of the smallest level."""
        checks.network_input(images, self.image_size)
        level, fade = at(self.progress, len(self.sides))
        images = _pool(images, self.sides[level])
        features = self.from_grey[level](images)
        for i in range(level, 0, -1):
            features = nn.functional.avg_pool2d(self.down[i - 1](features), 2)
            if i == level and fade < 1:
                features = torch.lerp(self.from_grey[i - 1](_pool(images, self.sides[i - 1])), features, fade)
        return features


class Generator(Growing):
    """The denoiser: an encoder to the smallest level, and a generator back up, mirrored, with pixel norm.

    Parameters
    ----------
    image_size : side of the square images: 4 to 7 times a power of two.
    width : an eighth of the channels of the lowest levels, >= 1 (Karras et al.: 64).
    """

    def __init__(self, image_size: int, width: int = 64) -> None:
        super().__init__(image_size, width)
        lowest = self.channels[0]
        self.middle = _block(lowest, lowest, lowest, PixelNorm)
        self.up = nn.ModuleList(_block(below, c, c, PixelNorm) for below, c in zip(self.channels, self.channels[1:]))
        self.to_grey = nn.ModuleList(Scaled(c, 1, 1, gain=1.0) for c in self.channels)

    def forward(self, y: Tensor) -> Tensor:
        """Noisy images `(n, 1, h, h)` to denoised images of the same shape, made of the level in use."""
        level, fade = at(self.progress, len(self.sides))
        features = self.middle(self._lowest(y))
        for i in range(1, level + 1):
            before = features
            features = self.up[i - 1](nn.functional.interpolate(features, scale_factor=2, mode="nearest"))
        x_hat = self.to_grey[level](features)
        if fade < 1:
            x_hat = torch.lerp(_enlarge(self.to_grey[level - 1](before), self.sides[level]), x_hat, fade)
        return _enlarge(x_hat, self.image_size)


class Discriminator(Growing):
    """The critic: one score an image, `(n, 1, 1, 1)`, with the minibatch's standard deviation as one more channel.

    Pooling is part of it, so the slope that the gradient penalty (Eq. 8) looks at is that with respect to images at
    full size, whichever level is in use.
    """

    def __init__(self, image_size: int, width: int = 64) -> None:
        super().__init__(image_size, width)
        lowest = self.channels[0]
        self.last = nn.Sequential(
            Scaled(lowest + 1, lowest, 3),
            nn.LeakyReLU(0.2),
            Scaled(lowest, lowest, self.sides[0], padding=0),
            nn.LeakyReLU(0.2),
            Scaled(lowest, 1, 1, gain=1.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images `(n, 1, h, h)` to scores `(n, 1, 1, 1)`."""
        features = self._lowest(x)
        _, variance, _ = parallel.moments(features, (0,))
        deviation = torch.sqrt(variance + 1e-8).mean()
        return self.last(torch.cat([features, deviation.expand(len(features), 1, *features.shape[2:])], dim=1))
