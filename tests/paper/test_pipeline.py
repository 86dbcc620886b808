"""The pipeline is whole: dependencies, parameters one and the same, and a ci-scale run from nothing to figures."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import mrcfile
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cryo_lib.denoisers import apply, inspection, screening
from cryo_lib.denoisers.posterior import posterior_mean
from cryo_lib.denoisers.summing import noise_level
from cryo_lib.evaluate import reconstruction
from cryo_lib.networks import models
from cryo_lib.paper import cluster, notebooks, report
from cryo_lib.paper.experiments import of_dataset, read_scale
from cryo_lib.simulate import noise, projection
from cryo_lib.stacks import particles
from cryo_lib.stacks.dataset import SPLITS, Dataset, Experiment

ROOT = Path(__file__).resolve().parents[2]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
RUNS = {name: stage for name, stage in STAGES.items() if stage["cmd"].startswith("cryo run")}
CHECKPOINTS = ".ipynb_checkpoints"  # what JupyterLab keeps beside a notebook, which DVC passes over
MISSING = [sys.executable, "-m", "cryo_lib.paper.cluster", "missing"]
SHOWN = ("03", "06", "08", "11", "17", "18", "19")  # what they show on the way is published as well
IDENTITY = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
needs_relion = pytest.mark.skipif(not shutil.which("relion_refine_mpi"), reason="needs Debian's package relion")


def notebook_of(stage: dict) -> Path:
    return notebooks.find(stage["cmd"].split()[2], ROOT / "notebooks")


@pytest.mark.parametrize("name", RUNS)
def test_a_stage_has_one_dependency_on_code_and_the_name_of_its_notebook(name):
    """Code is its notebook's closure; the name is a word of the notebook's, or all of them."""
    code = [dep for dep in RUNS[name]["deps"] if dep.startswith(("build/", "cryo_lib/")) and not dep.endswith(".npz")]
    stem = notebook_of(RUNS[name]).stem
    assert code == [f"build/nbsrc/{stem}.py"]
    verb, _, thing = stem[3:].partition("_")
    assert name.removesuffix("_particles" if verb == "train" else "") in (verb, thing, stem[3:])


def test_every_notebook_has_one_stage_and_training_two_and_the_pipeline_is_short():
    """Training has one for each data set; notebooks from 40 on are commands, no stages."""
    wanted = [*(ROOT / "notebooks").glob("[0-3]*.ipynb"), ROOT / "notebooks" / "03_train_networks.ipynb"]
    assert sorted(notebook_of(stage) for stage in RUNS.values()) == sorted(wanted)
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 500


def md5(path: Path) -> str:
    """As dvc.lock has it, of a file or, by those of its files, of a folder."""
    if path.is_file():
        return hashlib.md5(path.read_bytes()).hexdigest()
    files = [file for file in path.rglob("*") if file.is_file() and not {*file.parts} & {"__pycache__", CHECKPOINTS}]
    listed = [{"md5": md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    listed = json.dumps(sorted(listed, key=lambda file: file["relpath"]), sort_keys=True)
    return f"{hashlib.md5(listed.encode()).hexdigest()}.dir"


def test_the_lock_is_of_this_code_and_of_the_results_in_git(tmp_path):
    """A fresh clone's run leaves dvc.lock and every file of its scale as they are; if not: `dvc repro`, and commit."""
    stages = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    entries = [entry for stage in stages.values() for entry in (*stage.get("deps", []), *stage["outs"])]
    locked = {(entry["path"], entry["md5"]) for entry in entries}
    held = {path: ROOT / path for path, _ in locked if (ROOT / path).is_file()}
    held |= {"cryo_lib": ROOT / "cryo_lib", "notebooks": ROOT / "notebooks"}
    held |= {f"build/nbsrc/{path.name}": path for path in notebooks.export(ROOT / "notebooks", tmp_path)}
    found = {path: md5(held[path]) for path, _ in locked if path in held}
    assert {path for path, value in locked if found.get(path, value) != value} == set() and len(found) > 150


def test_text_of_a_section_reaches_a_command_to_the_letter():
    """A shell gives what the parameter file says, the empty text too: no quotes of a command's own go with it."""
    command = " ".join(stage["cmd"] for stage in RUNS.values())
    taken = re.findall(r"-p (\w+) (\S*)\$\{((?!item)\w+\.\w+)\}(\S*)", command)
    texts = [(before, after) for name, before, _, after in taken if name in ("core_chain", "clamp_chain", "contrast")]
    assert len(texts) == 3
    for before, after in texts:
        for text in ("C", "", "A:1-29,60-121+B"):
            assert shlex.split(f"{before}{text}{after}") == [text]


@pytest.mark.parametrize("name", RUNS)
def test_notebooks_that_show_results_are_published(name):
    published = [out for out in RUNS[name]["outs"] if isinstance(out, dict) and next(iter(out)).startswith("paper/")]
    stem = notebook_of(RUNS[name]).stem
    assert len(published) == ("--publish" in RUNS[name]["cmd"]) == (stem[:2] in SHOWN or stem[:2] >= report.FIRST)
    assert all(Path(next(iter(out))).name.startswith(stem) for out in published)


def test_stages_make_every_study_and_an_evaluation_depends_on_those_it_evaluates():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage, studies in {"train": params["studies"], "train_particles": params["particle_studies"]}.items():
        outs = {next(iter(out)) for out in STAGES[stage]["outs"]}
        assert {out for out in outs if out.startswith("runs/")} == {f"runs/${{item.scale}}/{name}" for name in studies}
    papers = [name for name in params["studies"] if name not in params["supplement_studies"]]
    wanted = {"evaluate": papers, "evaluate_supplement": params["supplement_studies"]}
    for name, studies in (wanted | {"evaluate_particles": params["particle_studies"]}).items():
        assert {f"runs/${{item.scale}}/{study}" for study in studies} <= set(STAGES[name]["deps"])
        assert "study" in STAGES[name]["params"] or {f"study.{study}" for study in studies} <= {*STAGES[name]["params"]}


@pytest.mark.parametrize("name", RUNS)
def test_parameters_are_the_same_in_notebook_command_and_file(name):
    """What the command passes is what the notebook declares, all of it; laptop values are the notebook's defaults."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    words, given = RUNS[name]["cmd"].split(), {}
    for word, value in zip(words, words[1:]):
        if word == "-s":
            found = notebooks.section(params, value.replace("${item.network}", "figure4"))
            given |= {"study": None} if value == "study" else found
        elif word == "-p":
            given[value] = None
    known = notebooks.declared(nbformat.read(notebook_of(RUNS[name]), as_version=4), name)
    assert set(given) <= set(known)
    if int(notebook_of(RUNS[name]).name[:2]) >= 20:  # tables and figures: what they show is a default of the notebook's
        return
    assert set(given) == set(known)
    git = {"checkpoint"} if name == "denoise" else set()  # a reader's lies in git; the pipeline takes it as trained
    assert not {k for k, v in given.items() if v is not None and v != known[k]} - git


def test_a_stage_tracks_the_sections_it_reads():
    for name, stage in RUNS.items():
        words = stage["cmd"].split()
        sections = {value for word, value in zip(words, words[1:]) if word == "-s"}
        tracked = {*stage.get("params", [])}
        if "study" in sections - tracked:  # or each of those on its data set
            studies = read_scale(ROOT / "params.yaml")["study"]
            sections |= {f"study.{each}" for each in of_dataset(studies, words[words.index("dataset") + 1])}
            sections.remove("study")
        assert sections <= tracked, name


def makers(name: str) -> set[str]:
    """The stages that make what a stage reads, or a part of it."""
    reads = {Path(dep) for dep in STAGES[name].get("deps", [])}
    made = {
        other: [Path(out if isinstance(out, str) else next(iter(out))) for out in stage["outs"]]
        for other, stage in STAGES.items()
    }
    return {
        other
        for other, outs in made.items()
        if any(dep.is_relative_to(out) or out.is_relative_to(dep) for dep in reads for out in outs)
    }


def test_what_make_runs_side_by_side_shares_nothing():
    """Stages of the pipeline, each after those that make what it reads, none of them beside it; `dvc repro` ends it."""
    makefile, done = (ROOT / "Makefile").read_text().replace("\\\n", " "), {"nbsrc"}
    for phase in ("FIRST", "SECOND", "THIRD"):
        words = re.search(rf"^{phase} := (.*)$", makefile, re.MULTILINE)[1]
        lines = [line.split() for line in shlex.split(words)]
        for line in lines:
            for i, name in enumerate(line):
                assert makers(name) <= {*done, *line[:i]}, name
        done |= {name for line in lines for name in line}
    assert done < {*STAGES} and makefile.index("$(THIRD) |") < makefile.index("\n\tdvc repro\n")


@pytest.fixture(scope="session")
def ci_run(tmp_path_factory):
    """A copy of the sources at the ci scale, after one `dvc repro` from nothing."""
    folder = tmp_path_factory.mktemp("ci")
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("cryo_lib", "notebooks", "scales", "results/preprint"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    shutil.copy(ROOT / "scales" / "ci.yaml", folder / "params.yaml")
    git(folder, "init", "--quiet")
    commit(folder)
    whole(repro(folder))
    return folder


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", *IDENTITY, *words], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder: Path) -> None:
    """Everything that git does not ignore, or nothing."""
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "As it is")


def whole(done: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def copied(ci_run: Path, folder: Path, *left_out: str) -> Path:
    """A copy of what a run made, but for its caches."""
    return Path(shutil.copytree(ci_run, folder, ignore=shutil.ignore_patterns("cache", "tmp", *left_out)))


def run_notebook(folder: Path, number: str, *arguments: str, scale: bool = True) -> subprocess.CompletedProcess:
    """Run a notebook of a copy of the repository, at the ci scale where it has one."""
    command = ["run", number, "out.ipynb", *(["-p", "scale", "ci"] if scale else []), *arguments]
    return in_folder(folder, sys.executable, "-m", "cryo_lib.paper.notebooks", *command)


def in_folder(folder: Path, *command: str, timeout: float | None = None) -> subprocess.CompletedProcess:
    """Run a command in a copy of the repository, by its sources and this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)


def repro(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return in_folder(folder, "dvc", "repro", *arguments, timeout=3600)


def test_the_ci_scale_makes_every_output(ci_run):
    for stage in STAGES.values():
        for out in stage["outs"]:
            path = (next(iter(out)) if isinstance(out, dict) else out).replace("${item.scale}", "ci")
            for network in ("figure4", "halves"):
                made = path.replace("${item.network}", network).replace("${weights.weights_method}", "beta_05_05_l1")
                assert (ci_run / made).exists(), made
    assert len(pd.read_csv(ci_run / "results/ci/metrics.csv")) == 6 + 7 + 2 + 2 + 2 + 8 + 2 + 2 + 2 + 8


def test_a_second_run_is_up_to_date(ci_run):
    done = repro(ci_run)
    assert done.returncode == 0 and "Running stage" not in done.stdout, done.stdout
    assert "Data and pipelines are up to date" in done.stdout


def stages_run(done: subprocess.CompletedProcess) -> set[str]:
    return set(re.findall(r"Running stage '([^']+)'", done.stdout))


def test_what_changes_no_code_reruns_only_the_export(ci_run):
    """Prose, saved outputs, docstrings and comments; the trainings stay finished."""
    path, module = ci_run / "notebooks" / "03_train_networks.ipynb", ci_run / "cryo_lib" / "networks" / "losses.py"
    before, code = path.read_text(), module.read_text()
    saved = nbformat.read(path, as_version=4)
    executed = next((ci_run / "executed/ci").glob("03_*.ipynb"))
    saved.cells[0].source += "\n\nMore prose."
    saved.cells[-1].outputs = nbformat.read(executed, as_version=4).cells[-1].outputs
    nbformat.write(saved, path)
    module.write_text(code.replace('"""', '"""A word more. ', 1) + "\n# A comment\n")
    done = repro(ci_run)
    unfinished = in_folder(ci_run, *MISSING)
    path.write_text(before), module.write_text(code)
    assert stages_run(whole(done)) == {"nbsrc"} and whole(unfinished).stdout.strip() == ""
    whole(repro(ci_run))


def test_a_change_of_code_below_a_stage_reruns_it_and_disowns_its_runs(ci_run, tmp_path):
    """What trainings are made of is changed: all trainings would run again, and what comes before them would not."""
    folder = tmp_path / "changed"
    shutil.copytree(ci_run, folder, symlinks=True, ignore=shutil.ignore_patterns("executed", "denoised*", "maps"))
    module = folder / "cryo_lib" / "networks" / "losses.py"
    module.write_text(module.read_text() + "\nMORE = 1\n")
    whole(repro(folder, "nbsrc"))
    changed = set(json.loads(in_folder(folder, "dvc", "status", "--json").stdout))
    assert {"train@ci", "train_particles@ci"} <= changed
    assert not {"structures@ci", "projections@ci", "baselines@ci", "pairs@ci", "figure5@ci"} & changed
    last = len(cluster.tasks(read_scale(folder / "params.yaml"))) - 1
    assert whole(in_folder(folder, *MISSING)).stdout.strip() == f"0-{last}"


def test_a_rerun_with_the_same_result_leaves_a_clean_tree(ci_run, tmp_path):
    """Where a stage of every kind is made again there is nothing to commit: neither dvc.lock nor any file."""
    folder = copied(ci_run, tmp_path / "again")
    commit(folder)
    for kept in ("data/ci/particles", "runs/ci/table1", "runs/ci/figure4"):  # by DVC, and by the stage if finished
        shutil.rmtree(folder / kept)
    names = "structures projections posterior classes baselines train export reconstruct relion".split()
    names += "particles pairs train_particles denoise@ci-figure4 assign weights".split()
    targets = [name if "@" in name else f"{name}@ci" for name in names]
    assert stages_run(whole(repro(folder, "--force", "--single-item", *targets))) == {*targets}
    assert git(folder, "status", "--porcelain") == ""


def test_a_figure_is_redrawn_from_results_alone(ci_run, tmp_path):
    """With data, runs and cache gone, an edited figure notebook still draws its figure."""
    gone = ("data", "runs", "denoised", "denoised_particles", "maps", "relion", "executed")
    folder = copied(ci_run, tmp_path / "clone", *gone)
    path = folder / "notebooks" / "23_draw_figure3a.ipynb"
    edited = nbformat.read(path, as_version=4)
    edited.cells[-1].source += "\nprint('edited')"
    nbformat.write(edited, path)
    done = whole(repro(folder, "--allow-missing", "figure3a@ci"))
    assert "edited" in done.stdout, done.stdout
    assert "Running stage 'train" not in done.stdout and (folder / "figures/ci/figure3a.png").is_file()


def test_a_missing_run_stops_the_evaluation(ci_run, tmp_path):
    folder = copied(ci_run, tmp_path / "gap")
    next((folder / "runs/ci/table1").rglob("generator.safetensors")).unlink()
    done = run_notebook(folder, "04")
    assert done.returncode == 1 and "1 of 24 runs are missing, the first runs/ci/table1" in done.stderr


def test_exported_stacks_are_new_images_with_their_poses(ci_run):
    """Clean images are the projections at their poses; denoised ones keep every row; halves have two denoisers."""
    dataset = Dataset(ci_run / "data/ci/rnap")
    folder, volumes = ci_run / "denoised/ci", dataset.volumes
    names = ["clean", "noisy", "table1/beta_05_05_l1/awgn-0.1-none", "halves/beta_05_05_l1/awgn-0.1-none"]
    names += ["posterior_halves/posterior/awgn-0.1-none"]
    clean, noisy, denoised, halves, posterior = (
        particles.ParticleStack.open(folder / f"{name}.star") for name in names
    )
    shown = clean.table["rlnClassNumber"].to_numpy() - 1
    np.testing.assert_allclose(clean.images[:], projection.views(volumes, clean.poses.rotations, shown), atol=2e-4)
    seen = {image.tobytes() for split in SPLITS for image in dataset.clean(split)}
    assert not seen & {image.tobytes() for image in clean.images[:]}
    signal = clean.images[:].var(axis=(1, 2))
    snr = signal.mean() / (noisy.images[:] - clean.images[:]).var(axis=(1, 2)).mean()
    assert snr * (32 / dataset.card["binned_from"]) ** 2 == pytest.approx(0.1, rel=0.02)
    for stack in (noisy, denoised, halves, posterior):
        np.testing.assert_array_equal(stack.poses.rotations, clean.poses.rotations)
        assert stack.pixel_size == 6.4 and (stack.half_sets == clean.half_sets).all()
    for half in (1, 2):
        run = ci_run / f"runs/ci/halves/beta_05_05_l1/awgn-0.1-none-half{half}/seed0/generator.safetensors"
        rows = halves.half_sets == half
        expected = models.denoise_images(models.load(run)[0], noisy.images[rows])
        np.testing.assert_allclose(halves.images[rows], expected, atol=1e-5)
        references, _ = dataset.pairs("train", Experiment.parse(f"awgn-0.1-none-half{half}"))
        y = noisy.images[rows]
        expected = posterior_mean(y, references, noise_level(y), mirrors=True)
        np.testing.assert_allclose(posterior.images[rows], expected, atol=1e-4)


def test_resolutions_follow_from_the_curves_and_clean_images_give_the_volume_back(ci_run):
    """60 clean images, 30 of the conformation: enough at 13 A for the map to be the volume at low resolution."""
    curves = pd.read_csv(ci_run / "results/ci/fsc.csv")
    table = pd.read_csv(ci_run / "results/ci/resolution.csv").set_index("stack")
    for stack, rows in curves.groupby("stack"):
        found = reconstruction.resolution(rows["truth"], 0.5, pixel_size=6.4)
        assert found == pytest.approx(table.loc[stack, "truth 0.5"], rel=1e-3)
    assert table.loc["clean", "truth_masked 0.5"] < 20 < table.loc["noisy", "truth_masked 0.5"]
    clean = mrcfile.read(ci_run / "maps/ci/clean.mrc")
    again = reconstruction.fsc(clean, mrcfile.read(ci_run / "maps/ci/truth.mrc"))
    np.testing.assert_allclose(again, curves.loc[curves["stack"] == "clean", "truth"], atol=1e-4)


def test_without_relion_the_figures_say_so(ci_run):
    report = json.loads((ci_run / "results/ci/relion.json").read_text())
    assert report == {"ran": False, "reason": "RELION left out (run_relion: false)", "stacks": {}, "version": None}
    assert (ci_run / "results/ci/relion.md").read_text() == f"{report['reason']}\n"


def test_particles_are_denoised_by_the_network_of_their_half_set_in_their_own_box(ci_run):
    """76 px stacks: the middle 64 px go through the network, rows stay, and around lies its background."""
    stack = particles.ParticleStack.open(ci_run / "data/ci/particles/particles.star")
    for name, study, suffixes in (("figure4", "figure4", ("", "")), ("halves", "figure4_halves", ("-half1", "-half2"))):
        denoised = particles.ParticleStack.open(ci_run / f"denoised_particles/ci/{name}/beta_05_05_l1.star")
        kept = denoised.table.drop(columns=["rlnImageName", screening.LABEL, inspection.LABEL])
        assert kept.equals(stack.table.drop(columns="rlnImageName"))
        for half, suffix in zip((1, 2), suffixes):
            rows = np.flatnonzero(stack.half_sets == half)[:5]
            folder = ci_run / f"runs/ci/{study}/beta_05_05_l1/measured-none{suffix}/seed0"
            model, card = models.load(folder / "generator.safetensors")
            level, y = card["background"], noise.standardise(stack.images[rows], 6.4, 64, 6.4)
            expected = models.denoise_images(model, (y * level["sd"] + level["mean"]).astype(np.float32))
            np.testing.assert_allclose(denoised.images[rows][:, 6:70, 6:70], expected, atol=1e-4)
            assert np.ptp(denoised.images[rows][:, :6], axis=(1, 2)).max() < 1e-5


def test_the_shipped_network_is_the_best_by_validation_rounded_to_16_bit(ci_run, tmp_path):
    """A second seed of a better card is taken; what 16 bits do not hold, or git should not, is refused."""
    folder = copied(ci_run, tmp_path / "shipped", "executed", "denoised*", "maps")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["study"]["figure4"]["seeds"] = [0, 1]
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for method in params["study"]["figure4"]["methods"]:
        shutil.copytree(*(folder / f"runs/ci/figure4/{method}/measured-none/seed{seed}" for seed in (0, 1)))
    path = folder / "runs/ci/figure4/beta_05_05_l1/measured-none/seed1/generator.safetensors"
    model, card = models.load(path)
    first = next(iter(dict(model.named_parameters())))
    model.get_parameter(first).data.mul_(1.5)
    card["validation"]["psnr"] += 1
    models.save(path, model, card)
    whole(run_notebook(folder, "15", "-s", "weights"))
    shipped = folder / "weights/ci/beta_05_05_l1.safetensors"
    stored, made = load_file(shipped), json.loads(shipped.with_suffix(".json").read_text())
    assert made == card | {"dtype": "float16", "from": "figure4/beta_05_05_l1/measured-none/seed1"}
    for name, value in model.state_dict().items():
        assert stored[name].dtype == (value.half().dtype if value.is_floating_point() else value.dtype)
        assert torch.equal(stored[name], value.to(stored[name].dtype)), name
    before = shipped.read_bytes()
    refused = run_notebook(folder, "15", "-s", "weights", "-p", "weights_limit", "0.01")
    assert f"expected a file of at most 0.01 MB, since it lies in git, got {len(before) / 1e6:.3g} MB" in refused.stderr
    values = load_file(path)
    values[first].view(-1)[0] = 1e5
    save_file(values, path)
    said = run_notebook(folder, "15", "-s", "weights").stderr
    assert "expected values that 16 bits hold to one part in 2048, got 1 of" in said and first in said
    refused = run_notebook(folder, "15", "-s", "weights", "-p", "weights_dataset", "rnap")
    assert "weights_dataset: expected the pairs that" in refused.stderr
    assert shipped.read_bytes() == before


def test_the_shipped_network_denoises_a_stack_as_its_own_run_with_rounded_weights(ci_run):
    stack = particles.ParticleStack.open(ci_run / "data/ci/particles/particles.star")
    model, card = models.load(ci_run / "runs/ci/figure4/beta_05_05_l1/measured-none/seed0/generator.safetensors")
    shipped = models.load(ci_run / "weights/ci/beta_05_05_l1.safetensors")
    rounded = (model.half().float(), card)
    np.testing.assert_array_equal(*(apply.fit(*n, stack, resize="crop")(stack.images[:9]) for n in (shipped, rounded)))


def test_no_particle_that_trained_a_network_is_tested_or_reconstructed(ci_run):
    poses = Dataset(ci_run / "data/ci/ribosome").poses
    rows = {name: set(values) for name, values in poses.items() if name.endswith("_rows")}
    assert sum(map(len, rows.values())) == len(set.union(*rows.values())) == 120
    assert len(rows["train_rows"]) == 40 and len(rows["test_rows"]) == 12


def test_the_reference_map_comes_back_from_its_own_projections(ci_run):
    """72 clean particles at their poses and shifts: the whole chain of frames, crops and shifts is right."""
    table = pd.read_csv(ci_run / "results/ci/particles/resolution.csv").set_index("stack")
    assert set(table.index) == {"clean", "noisy", "figure4/beta_05_05_l1", "halves/beta_05_05_l1"}
    assert table.loc["clean", "truth_masked 0.5"] < 20
    assert table.loc["noisy", "truth_masked 0.5"] < 40


def test_another_stack_is_paired_trained_on_and_denoised_by_the_readmes_commands(ci_run, tmp_path):
    """Stack, map and poses of one's own: notebook 10, 03 and 11 with nothing of the pipeline but the code."""
    folder = copied(ci_run, tmp_path / "own", "data", "runs", "denoised*", "executed")
    source = ci_run / "data/ci/particles"
    for name in ("particles.star", "particles.mrcs", "map.mrc"):
        shutil.copy(source / name, folder / f"my{Path(name).suffix}")
    star = folder / "my.star"
    star.write_text(star.read_text().replace("particles.mrcs", "my.mrcs"))
    numbers = [("image_size", 32), ("pixel_size", 12.8), ("n_train", 60), ("n_val", 4), ("n_test", 4)]
    options = [word for name, value in numbers for word in ("-p", name, str(value))]
    pairs = ("-p", "dataset", "mine", "-p", "particles", "my.star", "-p", "map_file", "my.mrc", *options)
    study = "{mine: {methods: [l1_ae], experiments: [measured-none], changes: {width: 2}}}"
    train = ["-p", "dataset", "mine", "-p", "study", study, "-p", "settings", "{epochs: 1}"]
    checkpoint = "runs/ci/mine/l1_ae/measured-none/seed0/generator.safetensors"
    denoise = ["-p", "particles", "my.star", "-p", "checkpoint", checkpoint, "-p", "out", "out/my.star"]
    for name, arguments in (("10", pairs), ("03", train)):
        whole(run_notebook(folder, name, *arguments))
    refused = run_notebook(folder, "11", *denoise, scale=False)
    assert "expected 32 x 32 px of 12.8 A, which this network was trained on, got 76 x 76 px" in refused.stderr
    whole(run_notebook(folder, "11", *denoise, "-p", "resize", "rescale", scale=False))
    denoised = particles.ParticleStack.open(folder / "out/my.star", project=folder / "out")
    assert denoised.images.shape == (120, 76, 76) and denoised.table["rlnDefocusU"].nunique() == 2
    outputs = [o for c in nbformat.read(folder / "out.ipynb", as_version=4).cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 6


@needs_relion
def test_relion_reconstructs_the_volume_from_the_exported_clean_stack(ci_run):
    """RELION, from our star file, finds the molecule that was projected: conventions agree from end to end."""
    folder = ci_run / "denoised/ci"
    whole(in_folder(folder, *"relion_reconstruct --i clean.star --o clean.mrc --maxres 20".split()))
    volume = Dataset(ci_run / "data/ci/rnap").volumes.mean(axis=0)
    assert np.corrcoef(mrcfile.read(folder / "clean.mrc").ravel(), volume.ravel())[0, 1] > 0.8


@needs_relion
def test_relions_whole_procedure_runs_from_our_star_file(ci_run, tmp_path):
    """Initial model, 3D classification, auto-refinement, post-processing by notebook 07; the figures have them."""
    folder = copied(ci_run, tmp_path / "relion", "runs")
    given = read_scale(ROOT / "scales/ci.yaml")["relion"] | {"run_relion": True, "relion_stacks": ["clean"]}
    (folder / "given.yaml").write_text(yaml.safe_dump({"relion": given}))
    whole(run_notebook(folder, "07", "-s", "relion", "--params", "given.yaml"))
    report = json.loads((folder / "results/ci/relion.json").read_text())
    found = report["stacks"]["clean"]
    assert report["ran"] and report["version"][0].isdigit()
    assert sum(found["occupancies"]) == pytest.approx(1, abs=1e-3)
    assert sum(found["states_in_class"]) == found["in_class"]
    assert len(found["frequency"]) == len(found["corrected"]) == len(found["truth"]) == 17
    assert 2 * 6.4 <= found["resolution"] < 204.8 and 0 <= found["pose_error"] <= 180
    steps = ["prepare", "initial_model", "classify", "auto_refine", "mask_create", "post_process"]
    assert [step for step in found["commands"] if step != "auto_refine_join"] == steps
    for step in steps:
        log = (folder / f"relion/ci/clean/{step}.log").read_text()
        assert log.startswith(found["commands"][step]) and log.rstrip().endswith("[finished]")
    for figure in ("24", "26"):
        whole(run_notebook(folder, figure))
    (row,) = [line for line in (folder / "results/ci/relion.md").read_text().splitlines() if "Clean images" in line]
    told = found["images"], found["in_class"], max(found["states_in_class"]), f"{found['pose_error']:.1f}"
    assert row.startswith("| Clean images | " + " | ".join(map(str, told)) + f" | {found['resolution']:.1f} | ")
