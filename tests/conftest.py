"""What every test shares."""

import pytest
import torch

LONGEST = ("test_pipeline.py", "test_cluster.py", "test_jupyterlab.py", "test_book.py", "test_classical.py")


def pytest_collection_modifyitems(items):
    """The files that take longest start first: of two processes none waits for the other at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


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
