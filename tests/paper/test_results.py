"""What the committed laptop results must be whatever was found: whole, consistent, and as theory has it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from cryo_lib.evaluate.metrics import SCORES
from cryo_lib.networks import models
from cryo_lib.paper import methods
from cryo_lib.paper.experiments import grid, read_scale

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "laptop"
SHIPPED = ROOT / "weights" / "laptop" / "beta_05_05_l1.safetensors"


@pytest.fixture(scope="module")
def per_image():
    return {metric: pd.read_csv(RESULTS / f"per_image_{metric}.csv").set_index("image") for metric in SCORES}


def test_every_run_of_the_scale_is_there_and_no_other(per_image):
    params = read_scale(ROOT / "scales" / "laptop.yaml")
    papers = set(params["studies"]) - set(params["supplement_studies"])
    expected = {
        run.folder.as_posix().replace(run.method, methods.shown_as(name, run.method))
        for name in papers
        for run in grid(params["study"][name])
    }
    found = {name for name in per_image["mse"] if "/seed" in name}
    assert found == expected and len(per_image["mse"]) == params["data"]["n_test"]


def test_the_noisy_images_have_the_noise_that_their_snr_says(per_image):
    """Eq. (1), binned: MSE = Var(x) / SNR (48 / 128)^2, up to five sd of a mean of squares; twice is 3.01 dB."""
    noisy = {snr: per_image["mse"][f"noisy/awgn-{snr}-none"] for snr in (0.1, 0.05)}
    assert (noisy[0.05] / noisy[0.1]).to_numpy() == pytest.approx(2, rel=1e-3)
    samples = np.load(RESULTS / "samples.npz")
    x, shown = samples["x"], int(samples["shown"])
    binned = len(x) / read_scale(ROOT / "scales" / "laptop.yaml")["data"]["binned_from"]
    assert noisy[0.1][shown] == pytest.approx(x.var() / 0.1 * binned**2, rel=5 * np.sqrt(2 / x.size))


def test_nothing_passes_the_bayes_bound_and_it_grows(per_image):
    """No estimator has a lesser mean squared error than the posterior mean, to which more templates bring it nearer."""
    bounds = pd.read_csv(RESULTS / "posterior.csv").query("method == 'bayes_bound'").groupby("experiment")
    assert len(bounds) > 0
    for name, grown in bounds:
        assert (np.diff(grown["mse"]) < 0).all()
        errors = per_image["mse"].filter(like=f"/{name}").mean()
        assert errors.idxmin() == f"bayes_bound/{name}" and len(errors) > 10


def test_a_screen_leaves_good_pairs_in(per_image):
    """Without contamination a pair is left out by mistake, and only as often as the false-discovery rate says."""
    table = pd.read_csv(RESULTS / "screening.csv")
    assert (table.loc[table["kind"] == "none", "left_out"] < 0.01).all()
    noise = table[table["kind"].isin(list("ABC"))]
    assert (noise["auc"] > 0.999).all() and (noise["recall"] > 0.99).all()


def test_no_average_violates_jensens_inequality():
    runs = pd.read_csv(RESULTS / "metrics.csv")
    assert (runs["psnr"] >= -10 * np.log10(runs["mse"]) - 1e-4).all()


def test_tables_follow_from_the_values_of_single_images(per_image):
    runs = pd.read_csv(RESULTS / "metrics.csv")
    for row in runs.itertuples():
        name = f"{row.method}/{row.experiment}" + (f"/seed{row.seed}" if row.seed >= 0 else "")
        for metric, values in per_image.items():
            assert values[name].mean() == pytest.approx(getattr(row, metric), rel=1e-3)


def test_both_evaluations_of_a_network_agree(supplement):
    keys = ["method", "experiment", "seed"]
    runs = pd.read_csv(RESULTS / "metrics.csv").set_index(keys)
    again = supplement[supplement["study"].isin(["table1", "contamination"])].set_index(keys)
    pd.testing.assert_frame_equal(again[list(SCORES)], runs.loc[again.index, list(SCORES)], rtol=1e-4)


@pytest.fixture(scope="module")
def resolution():
    return pd.read_csv(RESULTS / "resolution.csv").set_index("stack")


def test_every_stack_of_the_scale_is_reconstructed(resolution):
    export = read_scale(ROOT / "scales" / "laptop.yaml")["export"]
    sets = {f"posterior/posterior/{name}" for name in export["stack_references"]}
    sets |= {f"posterior_halves/posterior/{name}" for name in export["stack_reference_halves"]}
    assert set(resolution.index) == {"clean", "noisy", *export["stack_runs"], *export["stack_halves"], *sets}


def test_clean_images_give_the_volume_and_independent_noise_lets_half_maps_tell_the_truth(resolution):
    """Unmasked, 0.143 between half-maps of independent noise is 0.5 against the truth (Rosenthal & Henderson 2003)."""
    nyquist = 2 * read_scale(ROOT / "scales" / "laptop.yaml")["data"]["pixel_size"]
    assert resolution.loc["clean"].to_numpy() == pytest.approx(nyquist, rel=1e-3)
    noisy = resolution.loc["noisy"]
    assert noisy["halves 0.143"] == pytest.approx(noisy["truth 0.5"], rel=0.2)


def test_clean_images_show_their_conformation_and_no_denoiser_beats_the_noisy_image_at_known_poses():
    """Nearest-projection assignment of a noisy image is the maximum-likelihood answer; two sd of a share."""
    table = pd.read_csv(RESULTS / "assignment.csv").groupby("method").mean()
    n_test = read_scale(ROOT / "scales" / "laptop.yaml")["data"]["n_test"]
    assert table.loc["clean", "known_pose"] == 1
    ceiling = table.loc["noisy", "known_pose"]
    others = table["known_pose"].drop(["clean", "noisy"])
    assert (others < ceiling + 2 * np.sqrt(ceiling * (1 - ceiling) / n_test)).all()


@pytest.fixture(scope="module")
def particles():
    return pd.read_csv(RESULTS / "particles" / "per_image_mse.csv").set_index("image")


def test_every_run_on_particles_is_there_and_no_other(particles):
    params = read_scale(ROOT / "scales" / "laptop.yaml")
    expected = {run.folder.as_posix() for name in params["particle_studies"] for run in grid(params["study"][name])}
    assert {name for name in particles if "/seed" in name} == expected and len(particles) == params["pairs"]["n_test"]


def test_clean_particles_at_their_poses_give_the_map_back():
    resolution = pd.read_csv(RESULTS / "particles" / "resolution.csv").set_index("stack")
    nyquist = 2 * read_scale(ROOT / "scales" / "laptop.yaml")["pairs"]["pixel_size"]
    assert resolution.loc["clean"].to_numpy() == pytest.approx(nyquist, rel=1e-3)


@pytest.fixture(scope="module")
def supplement():
    return pd.read_csv(RESULTS / "supplement" / "metrics.csv").fillna({"variant": ""})


def test_every_run_of_the_supplement_is_there_and_no_other(supplement):
    params = read_scale(ROOT / "scales" / "laptop.yaml")
    names = ["table1", "ours", "contamination", *params["supplement_studies"]]
    expected = {
        (name, r.variant, r.method, r.experiment, r.seed) for name in names for r in grid(params["study"][name])
    }
    networks = supplement[~supplement["study"].isin(["reference", "posterior"])]
    found = list(networks[["study", "variant", "method", "experiment", "seed"]].itertuples(index=False, name=None))
    assert set(found) == expected and len(found) == len(expected)


def test_the_example_of_metrics_against_looks_follows_its_rule():
    """Recomputed image by image: best in all three metrics, wrong conformation; best FRC, right conformation."""
    rows, stored = pd.read_csv(RESULTS / "criteria.csv"), np.load(RESULTS / "criteria.npz")
    rows = rows[(rows["seed"] <= 0) & (rows["method"] != "noisy")]
    gaps = {}
    for image, group in rows.groupby("image"):
        group = group.set_index("method")
        best, rival = group["psnr"].idxmax(), group["frc"].idxmax()
        if (
            {group["mse"].idxmin(), group["ssim"].idxmax()} == {best}
            and not group.loc[best, "right"]
            and group.loc[rival, "right"]
        ):
            gaps[image] = (group.loc[rival, "frc"] - group.loc[best, "frc"], best, rival)
    assert len(gaps) == stored["fitting"]
    if gaps:
        shown = max(gaps, key=lambda image: gaps[image][0])
        assert (shown, *gaps[shown][1:]) == (int(stored["example"]), str(stored["best"]), str(stored["rival"]))


def test_a_low_pass_gains_decibels_and_no_correlation():
    """A factor on a ring changes no FRC; a low-pass's differs little within one."""
    means = pd.read_csv(RESULTS / "criteria.csv").groupby("method")[["psnr", "frc"]].mean()
    assert means.loc["gaussian", "psnr"] > means.loc["noisy", "psnr"]
    assert means.loc["gaussian", "frc"] == pytest.approx(means.loc["noisy", "frc"], abs=0.01)


def test_the_shipped_network_is_a_16_bit_file_of_at_most_10_mb_that_loads():
    assert SHIPPED.stat().st_size <= 10e6
    stored = load_file(SHIPPED)
    assert {value.dtype for value in stored.values()} == {torch.float16, torch.int64}
    assert all(name.endswith("num_batches_tracked") for name, value in stored.items() if value.dtype == torch.int64)
    model, card = models.load(SHIPPED)
    params = read_scale(ROOT / "scales" / "laptop.yaml")
    assert card["dtype"] == "float16" and card["image_size"] == params["pairs"]["image_size"] and "failed" not in card
    weights, run = params["weights"], card["run"]
    assert (run["method"], run["experiment"]) == (weights["weights_method"], weights["weights_experiment"])
    assert card["from"] == f"{weights['weights_study']}/{run['method']}/{run['experiment']}/seed{run['seed']}"
    assert run["seed"] in params["study"][weights["weights_study"]]["seeds"]
    assert all(value.dtype in (torch.float32, torch.int64) for value in model.state_dict().values())


def test_the_shipped_network_is_the_one_of_the_best_validation_psnr():
    weights = read_scale(ROOT / "scales" / "laptop.yaml")["weights"]
    folder = (
        ROOT / "runs" / "laptop" / weights["weights_study"] / weights["weights_method"] / weights["weights_experiment"]
    )
    cards = {path.parent: json.loads(path.read_text()) for path in folder.glob("seed*/generator.json")}
    if not cards:
        pytest.skip(f"no runs in {folder}, which git does not hold: `dvc repro train_particles`")
    best = max(cards, key=lambda path: cards[path]["validation"]["psnr"])
    card = json.loads(SHIPPED.with_suffix(".json").read_text())
    assert card == cards[best] | {"dtype": "float16", "from": best.relative_to(ROOT / "runs" / "laptop").as_posix()}
    stored = load_file(SHIPPED)
    for name, value in load_file(best / "generator.safetensors").items():
        assert torch.equal(stored[name], value.to(stored[name].dtype)), name
