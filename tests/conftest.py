"""What every test shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded_torch():
    """Weights and images that a test draws from torch are the same in every run and in any order of the tests."""
    torch.manual_seed(0)
