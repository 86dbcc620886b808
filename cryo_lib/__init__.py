"""Robust denoising of cryo-EM images via beta-GAN: models, losses, metrics and what the notebooks need; one module, one job."""
