"""Claims are decided by their tests: made-up runs of known answers, and results in which most runs are missing."""

from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cryo_lib.paper import claims
from cryo_lib.paper.experiments import grid, read_scale

ROOT = Path(__file__).resolve().parents[2]


def runs(*means, n=40, sd=0.1, seed=0):
    """Runs of as many seeds as there are means, `n` values each."""
    rng = np.random.default_rng(seed)
    return {i: mean + sd * rng.standard_normal(n) for i, mean in enumerate(means)}


def test_one_seed_is_tested_over_images_in_pairs():
    """Images differ more than methods do: only the pairing sees that one method is always a little better."""
    hard = np.random.default_rng(1).normal(0, 10, 40)
    a, b = {0: hard + 0.1 + 0.01 * np.arange(40)}, {0: hard}
    found = claims.compare(a, b)
    assert (found.n, found.over) == (40, "images") and found.p_for < 1e-6 < found.p_against
    assert claims.compare(b, a)[:3] == pytest.approx((-found.difference, found.p_against, found.p_for))
    assert stats.mannwhitneyu(a[0], b[0], alternative="greater").pvalue > 0.05


def test_several_seeds_are_tested_over_seeds_however_many_images_there_are():
    """Thousands of images of two seeds that contradict each other decide nothing."""
    found = claims.compare(runs(1.0, -0.5, n=5000), runs(0.0, 0.0, n=5000, seed=1))
    assert (found.n, found.over) == (2, "seeds") and claims.decide([found]) is None
    a, b = runs(1.0, 1.1, 1.05, seed=2), runs(0.0, 0.05, 0.0, seed=3)
    differences = [a[i].mean() - b[i].mean() for i in range(3)]
    found = claims.compare(a, b)
    assert found.p_for == pytest.approx(stats.ttest_1samp(differences, 0, alternative="greater").pvalue)
    assert found.p_against == pytest.approx(stats.ttest_1samp(differences, 0, alternative="less").pvalue)
    assert claims.decide([found]) is True and claims.decide([claims.compare(b, a)]) is False


def test_only_common_seeds_count_and_a_method_without_randomness_meets_each():
    a, fixed = runs(1.0, 1.1, 0.9), {-1: np.zeros(40)}
    assert claims.compare(a, fixed).n == 3 and claims.compare(fixed, a).difference == pytest.approx(-1.0, abs=0.1)
    assert (claims.compare(a, {2: np.zeros(40), 7: np.zeros(40)}).over) == "images"
    assert claims.compare(fixed, fixed).p_for == claims.compare(fixed, fixed).p_against == 1


def test_what_was_not_run_or_is_no_number_is_no_comparison_and_one_value_each_decides_nothing():
    ones = np.ones(9)
    for a, b in (({}, {0: ones}), ({0: ones}, {1: ones}), ({0: np.array([np.nan])}, {0: np.zeros(1)})):
        found = claims.compare(a, b)
        assert found.n == 0 and claims.decide([found]) is None and claims.decide([]) is None
    assert claims.decide([claims.compare({0: np.array([9.0])}, {0: np.array([1.0])})]) is None


def test_a_claim_needs_all_of_its_comparisons_and_falls_with_one():
    sure, unsure = claims.Comparison(1, 0.001, 0.999, 9, "images"), claims.Comparison(1, 0.2, 0.8, 9, "images")
    against, missing = claims.Comparison(-1, 0.99, 0.01, 9, "images"), claims.Comparison(np.nan, np.nan, np.nan, 0, "")
    assert claims.decide([sure, sure]) is True
    assert claims.decide([sure, unsure]) is None and claims.decide([sure, missing]) is None
    assert claims.decide([sure, missing, against]) is False
    assert claims.decide([against] + [sure] * 5) is None  # 0.01 of six comparisons is no evidence


def test_a_true_null_is_decided_in_one_case_of_ten():
    """At 5 % to either side."""
    decided = [claims.decide([claims.compare(runs(0, seed=i), runs(0, seed=i + 10_000))]) for i in range(300)]
    assert 0.05 < np.mean([verdict is not None for verdict in decided]) < 0.16


def test_a_row_says_what_was_found_and_how():
    pairs = [claims.compare(runs(2.0, 2.1), {-1: np.zeros(40)}), claims.compare({}, {})]
    row = claims.row("a beats b", "9 dB", pairs, unit="dB")
    assert row["Ours"] == f"difference {pairs[0].difference:.3g} dB, 1 of 2 comparisons not run"
    assert row["Holds"] == "undecided" and row["Test"].startswith("t-test over 2 seeds; p = ")
    assert claims.row("a", "b", [claims.compare({}, {})])["Ours"] == "no runs, 1 of 1 comparisons not run"
    for holds, said in ((True, "yes"), (False, "no"), (None, "undecided")):
        assert claims.counted("a", "b", holds, "", "")["Holds"] == said


def test_per_image_tables_are_read_by_run(tmp_path):
    table = pd.DataFrame({"image": [0, 1], "bm3d/e": [1.0, 2.0], "l1_ae/e/seed3": [3.0, 4.0]})
    table.to_csv(tmp_path / "per_image_mse.csv", index=False)
    found = claims.per_image(tmp_path, "mse")
    assert found["bm3d", "e"][-1].tolist() == [1, 2] and found["l1_ae", "e"][3].tolist() == [3, 4]
    assert found["l2_ae", "e"] == {}
    harm = claims.harm({3: np.array([3.0, 8.0]), 4: np.ones(2)}, found["l1_ae", "e"])
    assert list(harm) == [3] and np.exp(harm[3]).tolist() == pytest.approx([1, 2])


def test_a_half_map_fsc_of_a_seventh_promises_a_half():
    assert claims.full_map(np.array([1 / 7, 1.0, -0.2])) == pytest.approx([0.5, 1, 0])


def few(table: pd.DataFrame, scale: dict) -> pd.DataFrame:
    """The rows of the runs that a scale's studies make."""
    studies = [*scale["studies"], *scale["particle_studies"], *scale["supplement_studies"]]
    runs_ = [run for name in studies for run in grid(scale["study"][name])]
    made = {(run.method, run.experiment, run.seed) for run in runs_}
    return table[[key[2] < 0 or key in made for key in zip(table["method"], table["experiment"], table["seed"])]]


def test_every_claim_is_weighed_where_most_runs_are_missing(tmp_path, monkeypatch):
    """The code of the notebook on the laptop scale's results, less the runs that the ci scale has not."""
    scale, laptop = read_scale(ROOT / "scales" / "ci.yaml"), ROOT / "results" / "laptop"
    folder = tmp_path / "results" / "tiny"
    for name in ("supplement", "particles"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    (tmp_path / "results" / "preprint").symlink_to(ROOT / "results" / "preprint")
    tables = ["fsc.csv", "resolution.csv", "assignment.csv", "criteria.csv", "criteria.npz"]
    for name in [*tables, "particles/fsc.csv", "particles/resolution.csv"]:
        (folder / name).symlink_to(laptop / name)
    for name in ("best_checkpoints.csv", "supplement/metrics.csv"):
        few(pd.read_csv(laptop / name), scale).to_csv(folder / name, index=False)
    for name in [f"{part}per_image_{metric}.csv" for part in ("", "particles/") for metric in ("mse", "psnr", "ssim")]:
        table = pd.read_csv(laptop / name, index_col="image")
        words = [(*column.split("/"), "seed-1")[:3] for column in table]
        keys = pd.DataFrame(words, columns=["method", "experiment", "seed"], index=table.columns)
        kept = few(keys.assign(seed=keys["seed"].str[4:].astype(int)), scale)
        table[kept.index].to_csv(folder / name)
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in nbformat.read(ROOT / "notebooks" / "37_weigh_claims.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            exec('scale = "tiny"' if "parameters" in cell.metadata.get("tags", []) else cell.source, names)
    table = pd.read_csv(folder / "claims.csv")
    assert len(table) == len(names["rows"]) and set(table["Holds"]) <= {"yes", "no", "undecided"}
    assert (table.loc[table["Ours"].str.contains("not run|no runs"), "Holds"] != "yes").all()
    assert len((folder / "claims.md").read_text(encoding="utf-8").splitlines()) == len(table) + 2
