"""One training or one denoising over several processes, a GPU each, as torchrun starts them.

Outside of torchrun there is one process, and everything here leaves what it is given as it is. Sums over processes are
differentiable, twice as well, which `torch.nn.SyncBatchNorm` is not and the gradient penalty (Eq. 8) needs; so
gradients are summed here and not by `DistributedDataParallel`.
"""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def size() -> int:
    """Processes that work together: torchrun's WORLD_SIZE, or 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Which of them this one is, from 0; the first one writes the files."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """Which of this machine's processes, and so of its GPUs, this one is, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


@cache
def _join() -> None:
    """Meet the other processes, once: tensors on a GPU go by NCCL, those on the CPU by gloo."""
    with_gpus = dist.is_nccl_available() and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if with_gpus else "gloo")
    atexit.register(dist.destroy_process_group)


def part(n: int) -> slice:
    """This process's share of `n` things in a row: as equal as can be, the first ones longer."""
    least, longer = divmod(n, size())
    start = rank() * least + min(rank(), longer)
    return slice(start, start + least + (rank() < longer))


class _Sum(torch.autograd.Function):
    """The sum of a tensor over the processes; so is its gradient, since each process's loss depends on all."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return _Sum.apply(upstream)


def total(values: Tensor) -> Tensor:
    """Sum over the processes, elementwise, with exact gradients of every order."""
    if size() == 1:
        return values
    _join()
    return _Sum.apply(values)


def gathered(values: Tensor) -> Tensor:
    """The values `(n,)` of all processes, which may have different numbers of them, in one row."""
    if size() == 1:
        return values
    _join()
    counts = values.new_zeros(size())
    counts[rank()] = len(values)
    counts = total(counts).long().tolist()
    row = values.new_zeros(sum(counts))
    row.split(counts)[rank()].copy_(values)
    return total(row)


def moments(x: Tensor, dims: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | int]:
    """Mean and biased variance of `x` over `dims`, kept with length 1, over all processes; how many values each has.

    `dims` holds 0, the images, of which processes may have different numbers.
    """
    dims = tuple(dims)
    if size() == 1:
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        return mean, variance, x.numel() // mean.numel()
    local = x.sum(dims, keepdim=True)
    n = math.prod(x.shape[dim] for dim in dims)
    sums = total(torch.cat([local.flatten(), local.new_full((1,), n)]))
    mean = (sums[:-1] / sums[-1]).view_as(local)
    return mean, total((x - mean).square().sum(dims, keepdim=True)) / sums[-1], sums[-1]


class SynchronisedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the minibatch of all processes in training; by its stored statistics, as always, in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        """`(n, c, h, w)` in and out."""
        if not self.training:
            return super().forward(x)
        exact = x.to(self.weight.dtype)
        mean, variance, n = moments(exact, (0, 2, 3))
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.flatten(), momentum)
            self.running_var.lerp_(variance.flatten() * (n / (n - 1)), momentum)
        scale = self.weight[:, None, None] * torch.rsqrt(variance + self.eps)
        return ((exact - mean) * scale + self.bias[:, None, None]).to(x.dtype)


def synchronise(model: nn.Module) -> None:
    """Let a network's batch norms take their statistics over all processes; parameters and names stay."""
    if size() > 1:
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SynchronisedBatchNorm


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace each gradient by its sum over the processes, in one exchange."""
    if size() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        whole = total(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, summed in zip(gradients, whole.split([gradient.numel() for gradient in gradients])):
            gradient.copy_(summed.view_as(gradient))


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives, or raises, in the first process, in all of them; the others do not call it, and wait."""
    if size() == 1:
        return make()
    _join()
    answer: list[Any] = [None, None]
    if rank() == 0:
        try:
            answer[0] = make()
        except Exception as error:
            answer[1] = error
    dist.broadcast_object_list(answer, device=torch.device("cpu"))
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def in_order(images: np.ndarray, most: int) -> list[np.ndarray]:
    """The images `(m, h, w)` float32, m <= `most`, of all processes in order, in the first; none in the others."""
    if size() == 1:
        return [images]
    _join()
    padded, counts = torch.zeros(most, *images.shape[1:]), torch.zeros(size(), dtype=torch.int64)
    padded[: len(images)], counts[rank()] = torch.from_numpy(images), len(images)
    counts = total(counts).tolist()
    everyones = [torch.empty_like(padded) for _ in counts] if rank() == 0 else None
    dist.gather(padded, everyones)
    return [each[:count].numpy() for each, count in zip(everyones or (), counts) if count]
