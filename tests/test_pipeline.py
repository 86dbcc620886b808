"""The pipeline is whole: dependencies declared, parameters one and the same, and a ci-scale run from nothing to figures."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from cryo_lib import notebooks, particles

ROOT = Path(__file__).resolve().parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
RUNS = {name: stage for name, stage in STAGES.items() if "notebooks run" in stage["cmd"]}
EXEMPT = {"notebooks"}  # moves to the root and runs notebooks; what it does is not in any result


def imported(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "cryo_lib":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cryo_lib."):
            found.add(node.module.split(".")[1])
    return found


def modules_below(source: str) -> set[str]:
    found, todo = set(), imported(source) - EXEMPT
    while todo:
        module = todo.pop()
        found.add(module)
        todo |= imported((ROOT / "cryo_lib" / f"{module}.py").read_text()) - found
    return found


def notebook_of(stage: dict) -> Path:
    return ROOT / next(word for word in stage["cmd"].split() if word.endswith(".ipynb"))


def code_of(path: Path) -> str:
    return "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")


@pytest.mark.parametrize("name", RUNS)
def test_a_stage_depends_on_every_module_its_notebook_imports(name):
    declared = {Path(dep).stem for dep in RUNS[name]["deps"] if dep.startswith("cryo_lib/")}
    assert declared == modules_below(code_of(notebook_of(RUNS[name])))
    assert f"build/nbsrc/{notebook_of(RUNS[name]).stem}.py" in RUNS[name]["deps"]


def test_every_notebook_has_one_stage():
    assert sorted(notebook_of(stage) for stage in RUNS.values()) == sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", RUNS)
def test_parameters_are_the_same_in_notebook_command_and_file(name):
    """What the command passes is what the notebook declares, all of it, and laptop values are the notebook's defaults."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    words, given = RUNS[name]["cmd"].split(), {}
    for word, value in zip(words, words[1:]):
        if word == "-s":
            given |= notebooks.section(params, value.replace("${item.study}", "table1"))
        elif word == "-p":
            given[value] = None
    known = notebooks.declared(nbformat.read(notebook_of(RUNS[name]), as_version=4), name)
    assert set(given) <= set(known)
    if name.startswith("figure") or name == "table1":
        return
    assert set(given) == set(known)
    differing = {k for k, v in given.items() if v is not None and v != known[k]} - {"methods", "experiments", "seeds"}
    assert not differing


def test_a_stage_tracks_the_sections_it_reads():
    for name, stage in RUNS.items():
        words = stage["cmd"].split()
        sections = {value for word, value in zip(words, words[1:]) if word == "-s"}
        assert sections <= set(stage.get("params", [])), name


def test_module_imports_flow_one_way():
    """No cycle: the library's modules can be laid in a line."""
    edges = {p.stem: imported(p.read_text()) for p in (ROOT / "cryo_lib").glob("*.py") if p.stem != "__init__"}
    while edges:
        free = [m for m, needs in edges.items() if not needs & set(edges)]
        assert free, f"an import cycle among {sorted(edges)}"
        for module in free:
            del edges[module]


@pytest.fixture(scope="session")
def ci_run(tmp_path_factory):
    """A copy of the sources at the ci scale, after one `dvc repro` from nothing."""
    folder = tmp_path_factory.mktemp("ci")
    for name in ("cryo_lib", "notebooks", "scales", ".dvc/config"):
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            shutil.copy(source, target)
    for name in ("dvc.yaml", ".dvcignore", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "results" / "preprint", folder / "results" / "preprint")
    shutil.copy(ROOT / "scales" / "ci.yaml", folder / "params.yaml")
    with (folder / ".dvc" / "config").open("a") as config:
        config.write("    no_scm = true\n")
    done = repro(folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder


def repro(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder)}
    return subprocess.run(["dvc", "repro", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def test_the_ci_scale_makes_every_output(ci_run):
    for stage in STAGES.values():
        for out in stage["outs"]:
            path = (next(iter(out)) if isinstance(out, dict) else out).replace("${item.scale}", "ci")
            for study in ("table1", "clipped", "contamination"):
                assert (ci_run / path.replace("${item.study}", study)).exists(), path
    assert len(pd.read_csv(ci_run / "results/ci/metrics.csv")) == 12 + 4 + 2 + 2


def test_a_second_run_is_up_to_date(ci_run):
    done = repro(ci_run)
    assert done.returncode == 0 and "Running stage" not in done.stdout, done.stdout
    assert "Data and pipelines are up to date" in done.stdout


def test_prose_and_saved_outputs_rerun_only_the_export(ci_run):
    path = ci_run / "notebooks" / "03_train_networks.ipynb"
    before = path.read_text()
    executed = next((ci_run / "executed/ci").glob("03_*.ipynb"))
    saved = nbformat.read(path, as_version=4)
    saved.cells[0].source += "\n\nMore prose."
    saved.cells[-1].outputs = nbformat.read(executed, as_version=4).cells[-1].outputs
    nbformat.write(saved, path)
    done = repro(ci_run)
    path.write_text(before)
    assert [line for line in done.stdout.splitlines() if line.startswith("Running stage")] == ["Running stage 'nbsrc':"]
    assert repro(ci_run).returncode == 0


def test_a_figure_is_redrawn_from_results_alone(ci_run, tmp_path):
    """With data, runs and cache gone, an edited figure notebook still draws its figure."""
    folder = tmp_path / "clone"
    shutil.copytree(ci_run, folder, ignore=shutil.ignore_patterns("data", "runs", "denoised", "cache", "tmp", "executed"))
    path = folder / "notebooks" / "09_draw_figure3a.ipynb"
    edited = nbformat.read(path, as_version=4)
    edited.cells[-1].source += "\nprint('edited')"
    nbformat.write(edited, path)
    done = repro(folder, "--allow-missing", "figure3a@ci")
    assert done.returncode == 0 and "edited" in done.stdout, done.stdout + done.stderr
    assert "Running stage 'train" not in done.stdout and (folder / "figures/ci/figure3a.png").is_file()


def test_a_missing_run_stops_the_evaluation(ci_run, tmp_path):
    folder = tmp_path / "gap"
    shutil.copytree(ci_run, folder, ignore=shutil.ignore_patterns("cache", "tmp"))
    lost = next((folder / "runs/ci/table1").rglob("generator.safetensors"))
    lost.unlink()
    command = ["run", "notebooks/04_evaluate_methods.ipynb", "out.ipynb", "-p", "scale", "ci"]
    done = subprocess.run(
        [sys.executable, "-m", "cryo_lib.notebooks", *command], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert done.returncode == 1 and "1 of 8 runs are missing, the first runs/ci/table1" in done.stderr


def test_exported_stacks_hold_the_test_set_with_its_poses(ci_run):
    clean, denoised = (particles.ParticleStack.open(ci_run / f"denoised/ci/{name}.star") for name in ("clean", "denoised"))
    np.testing.assert_array_equal(clean.images[:], np.load(ci_run / "data/ci/rnap/x_test.npy"))
    poses = np.load(ci_run / "data/ci/rnap/poses.npz")["test_rotations"]
    np.testing.assert_allclose(denoised.poses.rotations, poses, atol=1e-5)
    assert denoised.pixel_size == 6.4 and sorted(set(denoised.table["rlnRandomSubset"].astype(int))) == [1, 2]


@pytest.mark.skipif(shutil.which("relion_reconstruct") is None, reason="RELION is not installed (Debian package `relion`)")
def test_relion_reconstructs_the_volume_from_the_exported_clean_stack(ci_run):
    """RELION, from our star file, finds the molecule that was projected: conventions agree from end to end."""
    import mrcfile

    from cryo_lib import imaging, structures

    folder = ci_run / "denoised/ci"
    command = ["relion_reconstruct", "--i", "clean.star", "--o", "clean.mrc", "--maxres", "20"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted((ci_run / "data/ci/structures").glob("*.cif"))
    for name in ("noisy", "denoised"):
        assert subprocess.run([command[0], "--i", f"{name}.star", "--o", f"{name}.mrc"], cwd=folder).returncode == 0
        assert mrcfile.read(folder / f"{name}.mrc").std() > 0
    volume = np.mean([imaging.density(structures.read(f), 32, 6.4, 20.0) for f in files], axis=0)
    assert np.corrcoef(mrcfile.read(folder / "clean.mrc").ravel(), volume.ravel())[0, 1] > 0.8
