"""From noisy to denoised without training, and the use of what was trained."""
