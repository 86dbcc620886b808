"""Experiments read and write themselves; scales expand to the runs the paper needs."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cryo_lib.networks import models
from cryo_lib.networks.losses import Method
from cryo_lib.networks.runs import Run, expand
from cryo_lib.paper import experiments
from cryo_lib.paper.experiments import grid, read_scale, settings_of
from cryo_lib.stacks.dataset import SPLITS, Dataset, Experiment

ROOT = Path(__file__).resolve().parents[2]
PAPERS = {"l2_ae", "l1_ae", "js_l1", "wgan_gp_l1", "beta_1_1_l1", "beta_05_05_l1"}
SCALES = sorted((ROOT / "scales").glob("*.yaml"))


@pytest.mark.parametrize(
    "text", ["awgn-0.1-none", "awgn-0.05-A_0.3", "clipped-0.1-C_0.1", "awgn-0.1-A_0.1-half2", "measured-S_0.3"]
)
def test_an_experiment_reads_what_it_writes(text):
    assert str(Experiment.parse(text)) == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("awgn_0.1", "expected protocol-snr-contamination such as awgn-0.1-none"),
        ("poisson-0.1-none", "protocol: expected one of awgn, clipped, measured, got 'poisson'"),
        ("awgn-0-none", "snr: expected a finite number > 0, got 0.0"),
        ("awgn-0.1-D_0.3", "contamination: expected one of none, A, B, C, S, O, J, I, got 'D'"),
        ("awgn-0.10-none", "expected the form 'awgn-0.1-none', got 'awgn-0.10-none'"),
        ("awgn-0.1.2-none", "experiment 'awgn-0.1.2-none': could not convert string to float"),
        ("awgn-0.1-none-half3", "expected protocol-snr-contamination .* \\(-half1 or -half2 after it\\)"),
        ("clipped-0.1-I_0.3", "contamination: I adds ice to noisy images, after which clipped ones would leave"),
        ("measured-O_0.3", "contamination: O projects references anew, which measured images do not allow"),
        ("awgn-0.1-A_1.5", "eps: expected a finite number >= 0 and <= 1, got 1.5"),
    ],
)
def test_a_bad_experiment_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        Experiment.parse(text)


def write_data(folder, n):
    """The same `n` clean images for each split, of data of seed 0."""
    x = np.random.default_rng(0).random((n, 16, 16), dtype=np.float32)
    for split in SPLITS:
        np.save(folder / f"x_{split}.npy", x)
    (folder / "card.json").write_text(json.dumps({"seed": 0}))
    return Dataset(folder)


def test_noise_is_the_experiments_own_repeats_and_differs_between_splits_and_data_seeds(tmp_path):
    data, awgn = write_data(tmp_path, 6), Experiment.parse("awgn-0.1-none")
    noises = []
    for seed in (0, 1):
        (tmp_path / "card.json").write_text(json.dumps({"seed": seed}))
        noises += [data.pairs(split, awgn)[1] for split in SPLITS]
        np.testing.assert_array_equal(data.pairs("train", awgn)[1], noises[3 * seed])
    assert len({noise.tobytes() for noise in noises}) == 6
    clipped = data.pairs("train", Experiment.parse("clipped-0.1-none"))[1]
    np.testing.assert_array_equal(clipped, np.clip(noises[3], 0, 1))


def test_the_halves_of_the_training_pairs_are_disjoint_and_together_all_of_them(tmp_path):
    data = write_data(tmp_path, 7)
    halves = [data.pairs("train", Experiment.parse(f"awgn-0.1-none-half{half}")) for half in (1, 2)]
    for both, first, second in zip(data.pairs("train", Experiment.parse("awgn-0.1-none")), *halves):
        assert len(first) == 4 and len(second) == 3
        np.testing.assert_array_equal(both[0::2], first)
        np.testing.assert_array_equal(both[1::2], second)
    assert len(data.pairs("test", Experiment.parse("awgn-0.1-none-half2"))[0]) == 7


def test_missing_data_are_named_with_the_way_to_make_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected .*x_test.npy, found nothing; .* `dvc repro projections`"):
        Dataset(tmp_path).clean("test")
    with pytest.raises(ValueError, match="split: expected one of train, val, test, got 'all'"):
        Dataset(tmp_path).clean("all")


def test_training_pairs_are_contaminated_by_the_experiments_kind_and_fraction(tmp_path):
    dataset = write_data(tmp_path, 10)
    x, y = dataset.pairs("train", Experiment.parse("awgn-0.1-none"))
    cx, cy = dataset.training_pairs(Experiment.parse("awgn-0.1-A_0.3"), 5)
    assert (cx != x).any(axis=(1, 2)).sum() == 3 * len(x) // 10 and (cy == y).all()
    assert all((a == b).all() for a, b in zip(dataset.training_pairs(Experiment.parse("awgn-0.1-none"), 5), (x, y)))


def test_fresh_noise_has_the_experiments_level_and_is_independent(tmp_path):
    dataset = write_data(tmp_path, 10)
    none = Experiment.parse("awgn-0.1-none")
    (x, y), (same, z) = dataset.pairs("train", none), dataset.training_pairs(none, 0, fresh=[1, 2])
    first, other = (y - x).ravel(), (z - x).ravel()
    assert (same == x).all() and abs(other.var() / first.var() - 1) < 0.05
    assert abs(np.corrcoef(first, other)[0, 1]) < 5 / first.size**0.5


def test_a_study_expands_to_its_product_with_seeds_outermost():
    runs = expand({"methods": ["l1_ae", "l2_ae"], "experiments": ["awgn-0.1-none"], "seeds": [0, 1], "variants": {}})
    assert [(r.method, r.seed) for r in runs] == [("l1_ae", 0), ("l2_ae", 0), ("l1_ae", 1), ("l2_ae", 1)]
    assert len({r.folder for r in runs}) == 4


def test_a_variant_is_an_axis_and_a_folder_of_its_own():
    study = {"methods": ["l1_ae"], "experiments": ["awgn-0.1-none"], "seeds": [0]}
    study["variants"] = {"lam_0": {"lam": 0.0}, "lam_1": {}}
    assert [r.variant for r in expand(study)] == ["lam_0", "lam_1"]
    assert [r.folder.as_posix() for r in expand(study)] == [f"l1_ae/awgn-0.1-none/lam_{i}/seed0" for i in (0, 1)]
    assert Run("l1_ae", "awgn-0.1-none", 0).folder.as_posix() == "l1_ae/awgn-0.1-none/seed0"


@pytest.mark.parametrize("path", SCALES, ids=lambda p: p.stem)
def test_every_scale_parses_and_its_training_settings_are_valid(path):
    """Those of every study and variant too."""
    params = read_scale(path)
    assert params["scale"] == path.stem
    (run,) = [run for run in grid(params["study"]["progressive"]) if run.seed == 0]
    assert settings_of(params, "progressive", run).architecture == "pggan"


def test_a_variant_changes_its_study_and_a_study_its_scale():
    params = read_scale(ROOT / "scales" / "laptop.yaml")
    params["train"]["settings"] |= {"lam": 1.0, "mu": 1.0, "width": 4}
    params["study"]["table1"] |= {"changes": {"lam": 2.0, "mu": 2.0}, "variants": {"v": {"lam": 3.0}}}
    settings = settings_of(params, "table1", grid(params["study"]["table1"])[0])
    assert (settings.lam, settings.mu, settings.width) == (3.0, 2.0, 4)


def test_the_paper_scale_holds_the_whole_supplement():
    study = read_scale(ROOT / "scales" / "paper.yaml")["study"]
    new = [Method.parse(name) for name in study["scores"]["methods"]]
    assert {(m.alpha, m.beta) for m in new} == {(-0.5, -0.5), (-1, -1), (1, -1), (0.5, -0.5), (0.1, -0.1)}
    assert set(study["scores_contaminated"]["methods"]) == set(study["scores"]["methods"])
    weights = [0.1, 1, 5, 10, 50, 100, 500, 10000]
    for suffix, more in (("scripts", [0]), ("printed", [])):
        assert [v["lam"] for n, v in study["lambda"]["variants"].items() if n.endswith(suffix)] == more + weights
    ours = [v["lam"] for n, v in study["lambda"]["variants"].items() if n.count("_") == 1]
    assert ours == [weight for weight in weights if weight != 10]
    assert {v["lam"] for v in study["adversary_alone"]["variants"].values()} == {0}
    assert all(entry["seeds"] == [0, 1, 2] for name, entry in study.items() if not name.endswith("halves"))
    assert set(study["convolutional"]["methods"]) == PAPERS
    scripts = {"unit": "minibatch", "noise": "uniform", "redraw": True}
    assert study["units"]["variants"] == {"minibatch": {"unit": "minibatch"}, "scripts": scripts}
    authors = {"architecture": "pggan", "eta_d": 1e-4, "eta_g": 1e-4, "lam": 100, "beta1": 0, "beta2": 0.99}
    assert study["progressive"]["variants"]["pggan"] == authors
    assert {e.split("-")[2][0] for e in study["harder"]["experiments"]} == set("SOJI")


@pytest.mark.parametrize("path", SCALES, ids=lambda p: p.stem)
def test_scales_have_equal_keys(path):
    """Studies may differ in what they list, not in what they are."""
    assert list(experiments.differing_keys(read_scale(path), read_scale(ROOT / "scales" / "laptop.yaml"))) == []


@pytest.mark.parametrize(
    "variants, message",
    [
        ({}, "variant 'lam_0': expected its changes of settings in `variants`, which has none"),
        ({"lam_0": {"lambda": 0.0}}, "variants: settings: lambda: unknown"),
        ({"lam_0": {"lam": -1.0}}, "variants: settings: lam: expected a number greater than or equal to 0, got -1.0"),
    ],
)
def test_a_variant_that_is_none_is_refused(variants, message):
    params = read_scale(ROOT / "scales" / "ci.yaml")
    params["study"]["table1"]["variants"] = variants
    with pytest.raises(ValueError, match=message):
        settings_of(params, "table1", Run("l1_ae", "awgn-0.1-none", 0, "lam_0"))


def test_params_is_the_laptop_scale_byte_for_byte():
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "scales" / "laptop.yaml").read_bytes()


def test_the_paper_scale_holds_the_papers_numbers():
    params = read_scale(ROOT / "scales" / "paper.yaml")
    structure = {"source": "pdb", "closed_entry": "4XLN", "open_entry": "1L9U", "n_conformations": 5}
    assert structure.items() <= params["structure"].items()
    assert params["data"] | {"image_size": 128, "pixel_size": 1.6, "n_train": 25000, "n_test": 1500} == params["data"]
    paper = {"width": 64, "batch_size": 20, "k_d": 1, "k_g": 2, "eta_d": 1e-3, "eta_g": 1e-2}
    paper |= {"lam": 10, "mu": 10, "decay": 0}
    settings = settings_of(params, "table1", grid(params["study"]["table1"])[0])
    assert {name: getattr(settings, name) for name in paper} == paper
    runs = {name: grid(params["study"][name]) for name in params["studies"]}
    robust = {"trimmed_ae", "welsch_ae"}
    assert Counter(r.experiment for r in runs["table1"]) == {"awgn-0.1-none": 24, "awgn-0.05-none": 24}
    assert Counter(r.experiment for r in runs["clipped"]) == {"clipped-0.1-none": 18, "clipped-0.05-none": 18}
    robustness = {f"awgn-0.1-{kind}_{eps}": 24 for kind in "ABC" for eps in (0.1, 0.2, 0.3)}
    assert Counter(r.experiment for r in runs["contamination"]) == robustness
    for name, methods in {"table1": PAPERS | robust, "clipped": PAPERS, "contamination": PAPERS | robust}.items():
        assert {r.method for r in runs[name]} == methods and {r.seed for r in runs[name]} == {0, 1, 2}
    screened = settings_of(params, "screened", runs["screened"][0])
    assert screened.screen and {r.experiment[9] for r in runs["screened"]} == set("ABCSOJI")
    assert params["export"]["n_stack"] == 200_000 and params["relion"]["run_relion"]
    assert set(params["export"]["stack_runs"]) <= set(params["relion"]["relion_stacks"])


@pytest.mark.parametrize("path", SCALES, ids=lambda p: p.stem)
def test_the_network_to_be_shipped_fits_git_and_is_shown_its_own_pairs(path):
    params = read_scale(path)
    weights = params["weights"]
    run = Run(weights["weights_method"], weights["weights_experiment"], 0)
    settings, dataset = settings_of(params, weights["weights_study"], run), weights["weights_dataset"]
    assert dataset == params["study"][weights["weights_study"]]["dataset"]
    size = params["pairs" if dataset == "ribosome" else "data"]["image_size"]
    count = models.parameter_count(models.GENERATORS[settings.architecture](size, settings.width))
    assert 2 * count < 0.95e6 * weights["weights_limit"] < 10e6


def test_bad_parameter_files_are_named(tmp_path):
    path = tmp_path / "params.yaml"
    with pytest.raises(FileNotFoundError, match="expected the file .*params.yaml, found nothing; copy one of scales"):
        read_scale(path)
    path.write_text("a: [")
    with pytest.raises(ValueError, match="not valid YAML"):
        read_scale(path)
    laptop = (ROOT / "scales" / "laptop.yaml").read_text()
    for old, new, message in [
        ("js_l1", "unet", "params.yaml: method: expected .* got 'unet'"),
        ("{width: 8,", "{widht: 8,", "params.yaml: .*widht"),
        ("{lam: 100.0}", "{lam: many}", "params.yaml: .*lam.*many"),
        ("dataset: ribosome", "dataset: rnap", "study figure4: expected the dataset ribosome, got 'rnap'"),
        ("harder, screened, recipe]            #", "hard, screened, recipe]  #", "expected some of studies, got hard"),
        ("\ntrain:", "\ntrian:", "expected the sections .*; missing or unknown: train, trian"),
        ("studies: [table1,", "studies: [", "expected the entries of study"),
        ("harder, screened, recipe]", "harder, screened]", "expected the entries of study"),
        ("      conv: {", "      seed7: {", "variant: expected a folder.s name .*, not like seed0, got 'seed7'"),
        ("baseline_experiments: [awgn-0.1", "baseline_experiments: [awgn-0", "snr: expected a finite number > 0"),
        ("    seeds: [0]", "    seeds: [0, 0]", "seeds are listed twice"),
        ("[measured-none]", "[awgn-0.1-none]", "study figure4: expected the noise measured-..., got awgn-0.1-none"),
        (
            "[clipped-0.1-none]",
            "[measured-none]",
            "study clipped: expected the noise one of awgn, clipped, got measured",
        ),
        ("figure4/beta_05_05_l1/m", "figure4/beta/m", "use runs that no study makes: figure4/beta/measured-none/seed0"),
        ("references: [awgn-0.1", "references: [awgn-x", "experiment: expected protocol-snr-contamination .* got"),
        ("runs: [table1/beta_05_05_l1", "runs: [clipped/l2_ae", "no study makes: clipped/l2_ae/awgn-0.1-none/seed0"),
        ("junk_methods: [l2_ae", "junk_methods: [l2_gan", "no study makes: table1/l2_gan/awgn-0.1-none"),
        ("weights_study: figure4", "weights_study: figure5", "no study makes: figure5/.*_l1/measured-none/seed0"),
        ("weights_study: figure4", "weights_study: table1", "no study makes: table1/.*_l1/measured-none/seed0"),
        (
            "halves: [halves/beta_05_05_l1",
            "halves: [halves/l1_ae",
            "makes: halves/.*-half1/seed0, halves/.*-half2/seed0",
        ),
    ]:
        assert old in laptop
        path.write_text(laptop.replace(old, new))
        with pytest.raises(ValueError, match=message):
            read_scale(path)
    with pytest.raises(ValueError, match="expected the keys dataset, changes, methods, .*, got methods"):
        grid({"methods": []})


def test_the_documentation_counts_the_runs_of_each_scale():
    lines = (ROOT / "docs/scales.md").read_text(encoding="utf-8").splitlines()
    for path in SCALES:
        params = read_scale(path)
        runs = sum(len(grid(study)) for study in params["study"].values())
        (row,) = [line for line in lines if line.startswith(f"| `{path.stem}` |")]
        data = params["data"]
        assert f"{runs} runs" in row and f"{data['n_train']:,} pairs" in row and f"{data['image_size']} px" in row


def test_bad_runs_are_refused():
    for method, seed, error in (("l1_ae", -1, ValueError), ("l1_ae", 0.5, TypeError), ("x", 0, ValueError)):
        with pytest.raises(error):
            Run(method, "awgn-0.1-none", seed)


@pytest.mark.parametrize("name", ["measured-none", "measured-A_0.3", "measured-none-half1"])
def test_measured_noise_is_an_experiment_without_an_snr(name):
    experiment = Experiment.parse(name)
    assert str(experiment) == name and experiment.protocol == "measured" and experiment.snr is None
    with pytest.raises(ValueError, match="snr: expected None, since measured images have their own noise, got 0.1"):
        Experiment("measured", 0.1)


@pytest.mark.parametrize("name", ["measured", "measured-0.1-none", "awgn-none", "measured-none-half3"])
def test_names_that_mix_measured_and_simulated_noise_are_refused(name):
    with pytest.raises(ValueError, match="experiment: expected protocol-snr-contamination .* measured-none"):
        Experiment.parse(name)


def test_pairs_of_particles_are_the_images_as_they_were_taken(tmp_path):
    x, y = np.random.default_rng(0).random((2, 6, 16, 16), dtype=np.float32)
    for split in ("train", "test"):
        np.save(tmp_path / f"x_{split}.npy", x)
        np.save(tmp_path / f"y_{split}.npy", y)
    data = Dataset(tmp_path)
    for ours, expected in zip(data.pairs("train", Experiment.parse("measured-none-half2")), (x, y)):
        np.testing.assert_array_equal(ours, expected[1::2])
    (tmp_path / "y_test.npy").unlink()
    with pytest.raises(FileNotFoundError, match="y_test.npy, found nothing; .* for particles .*, with notebook 10"):
        data.pairs("test", Experiment.parse("measured-none"))


def test_missing_runs_are_counted_and_the_first_is_named(tmp_path):
    params = read_scale(ROOT / "scales" / "ci.yaml")
    with pytest.raises(FileNotFoundError, match="4 of 4 runs are missing, the first .*4/l1_ae/measured-none/seed0"):
        experiments.expected_runs(params, params["particle_studies"], tmp_path)
    for name in params["particle_studies"]:
        for run in grid(params["study"][name]):
            folder = tmp_path / name / run.folder
            folder.mkdir(parents=True)
            (folder / "generator.safetensors").touch()
    assert len(experiments.expected_runs(params, params["particle_studies"], tmp_path)) == 4
