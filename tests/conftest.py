"""What every test shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_torch():
    """Weights and images that a test draws from torch are the same in every run and in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """One thread for torch, however many cores there are: sums are then taken in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def double():
    """Double precision, in which rounding cannot hide behind Adam's normalisation of tiny gradients."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
