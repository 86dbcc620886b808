"""Minibatches are the rows asked for, wherever the pairs lie."""

import numpy as np
import pytest
import torch

from cryo_lib.networks.batches import HIDDEN, REACH, Batches, hidden, turned

CPU = torch.device("cpu")
ORDER = [torch.tensor([5, 0, 3]), torch.tensor([1, 2]), torch.tensor([4])]


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    return rng.random((6, 8, 8), np.float32), rng.standard_normal((6, 8, 8), np.float32)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("on_disk", [True, False])
def test_minibatches_are_the_rows_in_order(pairs, resident, on_disk, tmp_path):
    """Resident, or read ahead by other processes; from memory, or from files that are mapped."""
    x, y = pairs
    if on_disk:
        for name, images in (("x", x), ("y", y)):
            np.save(tmp_path / f"{name}.npy", images)
        mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="c") for name in "xy"]
    batches = Batches(*(mapped if on_disk else pairs), CPU, resident=resident)
    assert len(batches) == 6 and batches.resident == resident
    taken = list(batches.take(ORDER))
    assert len(taken) == len(ORDER)
    for rows, (got_x, got_y) in zip(ORDER, taken):
        np.testing.assert_array_equal(got_x[:, 0], x[rows.numpy()])
        np.testing.assert_array_equal(got_y[:, 0], y[rows.numpy()])
    np.testing.assert_array_equal(batches.noisy(2)[:, 0], y[:2])
    assert batches.noisy(100).shape == (6, 1, 8, 8)


def test_the_cpu_takes_pairs_where_they_lie(pairs):
    x, y = pairs
    batches = Batches(x, y, CPU)
    y[3, 4, 5] = 7.0
    assert batches.resident and batches.noisy(6)[3, 0, 4, 5] == 7.0


@pytest.mark.parametrize("resident", [True, False])
def test_pairs_at_16_bit_are_rounded_and_come_as_they_were_given(pairs, resident):
    """So that results do not depend on whether pairs fit the GPU."""
    x, y = pairs
    batches = Batches(x, y, CPU, half=True, resident=resident)
    ((got_x, got_y),) = batches.take([torch.arange(6)])
    assert got_x.dtype == got_y.dtype == batches.noisy(1).dtype == torch.float32
    np.testing.assert_array_equal(got_x[:, 0], x.astype(np.float16))
    np.testing.assert_allclose(got_y[:, 0], y, rtol=2**-11, atol=1e-7)


@pytest.mark.parametrize("free, resident", [(6 * 8 * 8 * 4 * 2 / 0.6 + 1, True), (6 * 8 * 8 * 4 * 2 / 0.6 - 2, False)])
@pytest.mark.parametrize("half", [False, True])
def test_pairs_go_to_a_gpu_where_they_fit_its_free_memory(pairs, free, resident, half, monkeypatch):
    """By the memory that the GPU says is free, of which they may take 60 %; at 16 bit they need half."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free / 2 if half else free), 0))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where: self)
    assert Batches(*pairs, torch.device("cuda"), half).resident == resident


def test_the_eight_turns_are_the_squares_symmetries_about_the_centre():
    """All differ, keep the centre, pixel h/2, and are closed: any turn of any turn is one of them."""
    images = torch.rand(1, 1, 8, 8)
    images[..., 0, :] = images[..., 0] = 0  # what a turn about pixel h/2 moves out of the box
    eight = turned(images.expand(8, 1, 8, 8), torch.arange(8))
    known = {image.numpy().tobytes() for image in eight}
    assert len(known) == 8 and (eight[:, 0, 4, 4] == images[0, 0, 4, 4]).all()
    twice = turned(eight.repeat_interleave(8, 0), torch.arange(8).repeat(8))
    assert {image.numpy().tobytes() for image in twice} == known


def test_hidden_pixels_are_replaced_by_pixels_around_them_and_are_all_that_has_a_target():
    """About 1.5 % of them; each of the 24 neighbours serves alike, the pixel itself never."""
    n, side = 20, 32
    images = torch.arange(n * side * side, dtype=torch.float32).view(n, 1, side, side)
    draws = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    targets, seen = hidden(images, draws)
    hides = ~targets.isnan()
    assert torch.equal(targets[hides], images[hides]) and torch.equal(seen[~hides], images[~hides])
    assert hides.float().mean().item() == pytest.approx(HIDDEN, rel=0.15)
    at, of = images[hides].long(), seen[hides].long()
    assert torch.equal(at // side**2, of // side**2)  # of the same image
    half = side // 2
    dy = ((of % side**2) // side - (at % side**2) // side + half) % side - half
    dx = (of % side - at % side + half) % side - half
    assert dy.abs().max() == dx.abs().max() == REACH and (dy.abs() + dx.abs()).min() > 0
    assert len(set(zip(dy.tolist(), dx.tolist()))) == 24
