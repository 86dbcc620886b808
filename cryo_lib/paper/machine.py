"""The machine: what numbers were measured on, and whether it has what params.yaml asks for.

`python -m cryo_lib.paper.machine` fails where RELION is to run and is not there: at once, and not after a night.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
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


def main() -> None:
    """The command line; exits with what is missing, if anything is."""
    # What trainings alone run on has not the libraries of these.
    from cryo_lib.evaluate import relion
    from cryo_lib.paper.experiments import read_scale

    try:
        if read_scale("params.yaml")["relion"]["run_relion"]:
            print(f"RELION {relion.version()}")
    except relion.RelionMissing as error:
        sys.exit(f"error: {error}; or set run_relion: false in params.yaml")


if __name__ == "__main__":
    main()
