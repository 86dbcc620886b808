"""Robust denoising of cryo-EM images via beta-GAN: models, losses, metrics, what notebooks need; a module, a job."""
