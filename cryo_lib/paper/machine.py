"""What numbers were measured on, in words: the device, torch, and the commit of the sources."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import torch


def revision(root: str | Path) -> str:
    """The commit of a checkout, "-dirty" where files have changed since, or that which `cluster/pack.sh` packed."""
    root = Path(root)
    packed = root / "build" / "revision"
    if packed.is_file() and not (root / ".git").exists():
        return packed.read_text().strip()
    if shutil.which("git") is None:
        return "unknown"
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def device_name(device: str | torch.device) -> str:
    """What a GPU, or the processor, is called."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return named[0].split(":", 1)[1].strip() if named else platform.machine()
