"""The forward model: how a clean and a noisy image come about."""
