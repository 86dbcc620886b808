"""Training pairs as the device takes them: all of them on it where they fit, else streamed to it ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SHARE = 0.6  # of a GPU's free memory that pairs may take; the rest is for the networks and their passes
HIDDEN, REACH = 0.015, 2  # share of an image's pixels that Noise2Void hides; pixels to those that stand in for them
WORKERS, AHEAD = 2, 4  # processes that read streamed minibatches, and how many each reads ahead


class _Rows(Dataset):
    """Rows of arrays that may lie on disk, as tensors `(m, 1, h, w)`, at 16 bit if `half`."""

    def __init__(self, arrays: Sequence[Any], half: bool) -> None:
        self.arrays, self.half = arrays, half

    def __getitem__(self, rows: Tensor) -> tuple[Tensor, ...]:
        taken = (torch.from_numpy(array[rows.numpy()]).unsqueeze(1) for array in self.arrays)
        return tuple(images.half() if self.half else images for images in taken)


class Batches:
    """Minibatches of pairs, by their rows.

    Parameters
    ----------
    x, y : references and noisy images, `(n, h, w)` numpy arrays; they may be memory-mapped.
    device : where minibatches are wanted. On the CPU pairs stay as they are. On a GPU they move there once, if they
        take at most `SHARE` of its free memory, and are then picked there; if not, processes read them ahead into
        pinned memory, from which they are copied while the GPU computes.
    half : keep or send pairs at 16 bit (float16, which is finer than what networks with bf16 arithmetic see of them).
    resident : True or False instead of this choice.

    Attributes
    ----------
    resident : whether the pairs lie on the device.
    """

    def __init__(self, x: Any, y: Any, device: torch.device, half: bool = False, resident: bool | None = None) -> None:
        self.device, self._rows = device, _Rows((x, y), half)
        self._dtype = torch.as_tensor(x[:0]).dtype
        if resident is None:
            needed = 2 * x.size * (2 if half else 4)
            resident = device.type != "cuda" or needed <= SHARE * torch.cuda.mem_get_info(device)[0]
        self.resident = resident
        if resident:
            kept = torch.float16 if half else self._dtype
            self._pairs = [torch.as_tensor(images).unsqueeze(1).to(device, kept) for images in (x, y)]

    def __len__(self) -> int:
        return len(self._rows.arrays[0])

    def noisy(self, n: int) -> Tensor:
        """The first `n` noisy images, `(n, 1, h, w)`, on the device."""
        if self.resident:
            return self._pairs[1][:n].to(self._dtype)
        return self._rows[torch.arange(min(n, len(self)))][1].to(self.device, self._dtype)

    def take(self, order: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """References and noisy images, `(m, 1, h, w)` each, of every minibatch, given by its rows, on the device."""
        if self.resident:
            for rows in torch.cat(list(order)).to(self.device).split([len(rows) for rows in order]):
                x, y = (pairs[rows].to(self._dtype) for pairs in self._pairs)
                yield x, y
            return
        options = {"num_workers": WORKERS, "prefetch_factor": AHEAD, "multiprocessing_context": "fork"}
        for pairs in DataLoader(
            self._rows, batch_size=None, sampler=order, pin_memory=self.device.type == "cuda", **options
        ):
            x, y = (images.to(self.device, non_blocking=True).to(self._dtype) for images in pairs)
            yield x, y


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Images `(m, 1, h, h)`, each turned by right angles about its centre, pixel h/2, or mirrored: turns `(m,)` of 0-7.

    The side h is even.

    The mirror image of a projection is the projection from the opposite side, so all are images of the same volume.
    """
    for bit, change in enumerate((lambda a: a.mT, lambda a: a.flip(-1).roll(1, -1), lambda a: a.flip(-2).roll(1, -2))):
        images = torch.where((turns >> bit & 1).bool()[:, None, None, None], change(images), images)
    return images


def hidden(images: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy images as targets and as a network may see them, where it must not learn to copy noise (Noise2Void).

    Parameters
    ----------
    images : `(m, 1, h, w)`. draws : as `images`, uniform on [0, 1): which pixels are hidden, about the share `HIDDEN`.

    Returns
    -------
    The images at hidden pixels and NaN elsewhere; and the images with one of the 24 pixels around it, at random, in the
    place of each hidden one (over the edge, from the other side). Source: Krull et al. 2019.
    """
    side = 2 * REACH + 1
    hides = draws < HIDDEN
    pick = (draws * ((side**2 - 1) / HIDDEN)).long().clamp(max=side**2 - 2)
    pick = pick + (pick >= side**2 // 2)  # not the pixel itself
    (h, w), device = images.shape[-2:], images.device
    rows = (torch.arange(h, device=device)[:, None] + pick // side - REACH) % h
    columns = (torch.arange(w, device=device) + pick % side - REACH) % w
    around = images.flatten(2).gather(2, (rows * w + columns).flatten(2)).view_as(images)
    return images.where(hides, torch.nan), around.where(hides, images)
