"""Topaz-Denoise's released network, where topaz-em lies in a folder of its own (GPL-3.0: called, and no dependency)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

FOLDER = Path("build/topaz")  # where `make topaz` puts it, below the repository's root
MODEL = "unet_L2_v0.2.2.sav"  # `topaz denoise`'s own choice: trained on pairs of half movies (Bepler et al. 2020)


def installed(folder: str | Path = FOLDER) -> bool:
    """Whether topaz-em and its weights lie in a folder."""
    return _weights(folder).is_file()


def load(folder: str | Path = FOLDER, device: str = "cpu") -> Any:
    """Topaz's `Denoise` of its U-net with the weights it ships; its `denoise` takes and gives images `(n, h, w)`.

    It brings the images that it gets together to mean 0 and sd 1, and back: any grey scale will do.

    FileNotFoundError where topaz-em is not installed.
    """
    if not installed(folder):
        raise FileNotFoundError(f"{folder}: expected topaz-em with its weights, found none; install it: make topaz")
    sys.path.append(str(folder))
    from topaz.denoise import Denoise  # noqa: PLC0415
    from topaz.denoising.models import UDenoiseNet  # noqa: PLC0415

    network = UDenoiseNet(base_width=11, top_width=5)
    network.load_state_dict(torch.load(_weights(folder), map_location="cpu", weights_only=True))
    return Denoise(torch.nn.Sequential(network), use_cuda=device == "cuda")


def _weights(folder: str | Path) -> Path:
    return Path(folder) / "topaz" / "pretrained" / "denoise" / MODEL
