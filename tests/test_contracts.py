"""The house: what other programs call is where they call it, and no room imports from one further down."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parents[1] / "cryo_lib"
ROOMS = ("simulate", "stacks", "networks", "denoisers", "evaluate", "paper")  # in the order in which data flows
CONTRACTS = """
networks.losses.score_real networks.losses.score_fake
evaluate.metrics.mse evaluate.metrics.psnr evaluate.metrics.ssim
simulate.noise.add_noise simulate.contamination.contaminate
simulate.projection.project simulate.projection.rotation_from_euler simulate.projection.simulate
stacks.particles.ParticleStack.open stacks.particles.write stacks.particles.new
denoisers.apply.denoise_stack
denoisers.posterior.posterior_mean denoisers.posterior.posterior_map denoisers.bound.bayes_mean
evaluate.reconstruction.reconstruct evaluate.reconstruction.fsc evaluate.reconstruction.resolution
""".split()


@pytest.mark.parametrize("contract", CONTRACTS)
def test_contracts_are_kept(contract):
    room, module, *names = contract.split(".")
    found = importlib.import_module(f"cryo_lib.{room}.{module}")
    for name in names:
        found = getattr(found, name)
    assert callable(found)


def imported(path: Path) -> set[str]:
    """The library's modules that a file imports, without `cryo_lib`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    inside = {name.removeprefix("cryo_lib.") for name in names if name.startswith("cryo_lib.")}
    return {name for name in inside if (LIBRARY / f"{name.replace('.', '/')}.py").is_file()}


def test_rooms_import_from_themselves_and_from_rooms_above():
    assert {path.parent.name for path in LIBRARY.glob("*/__init__.py")} == set(ROOMS)
    edges = {(path, name) for path in LIBRARY.rglob("*.py") for name in imported(path)}
    assert len(edges) > 50
    for path, name in edges:
        above = () if path.parent == LIBRARY else ROOMS[: ROOMS.index(path.parent.name) + 1]
        assert name in ("checks", "files", "npz") or name.split(".")[0] in above, f"{path} imports {name}"
