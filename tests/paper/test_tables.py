"""Tables say what was measured: means over images, sd over seeds, best marked by the paper's rule."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cryo_lib.evaluate import metrics
from cryo_lib.paper import methods, tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    x = rng.random((5, 16, 16))
    return pd.concat(
        tables.score(x, x + rng.normal(0, sd, x.shape), method, "awgn-0.1-none", seed)
        for method, sd, seed in [
            ("bm3d", 0.3, None),
            ("l1_ae", 0.1, 0),
            ("l1_ae", 0.12, 1),
            ("l2_ae", 0.11, 0),
            ("l2_ae", 0.11, 1),
        ]
    )


def test_scores_are_the_metrics_image_by_image():
    x = np.random.default_rng(0).random((3, 16, 16))
    table = tables.score(x, x**2, "l1_ae", "awgn-0.1-none", 2)
    np.testing.assert_array_equal(table["psnr"], metrics.psnr(x, x**2))
    assert list(table.columns) == ["method", "experiment", "seed", "image", "mse", "psnr", "ssim"]


def test_sd_is_over_seeds_not_over_images(rows):
    summary = tables.over_seeds(tables.over_images(rows)).set_index("method")
    by_hand = [rows[(rows["method"] == "l1_ae") & (rows["seed"] == s)]["psnr"].mean() for s in (0, 1)]
    assert summary.loc["l1_ae", "psnr"] == pytest.approx(np.mean(by_hand))
    assert summary.loc["l1_ae", "psnr_sd"] == pytest.approx(np.std(by_hand, ddof=1))
    assert summary.loc["l1_ae", "n_seeds"] == 2 and np.isnan(summary.loc["bm3d", "psnr_sd"])


def test_best_is_the_best_and_what_lies_within_its_sd():
    summary = pd.DataFrame(
        {
            "method": list("abc") + ["d"],
            "experiment": ["e"] * 3 + ["other"],
            "mse": [1.0, 1.05, 1.3, 9.0],
            "mse_sd": [0.1, 5.0, 5.0, 0.0],
            "psnr": [20.0, 19.9, 18.0, 1.0],
            "psnr_sd": [0.05, 9.0, 9.0, np.nan],
            "ssim": [0.5, 0.5, 0.4, 0.1],
            "ssim_sd": [np.nan] * 4,
        }
    )
    marked = tables.mark_best(summary)
    assert marked["mse_best"].tolist() == [True, True, False, True]
    assert marked["psnr_best"].tolist() == [True, False, False, True]
    assert marked["ssim_best"].tolist() == [True, True, False, True]


def test_per_image_files_allow_a_paired_test(rows, tmp_path):
    paths = tables.write_per_image(tmp_path, rows)
    table = pd.read_csv(paths[1])
    expected = rows[(rows["method"] == "l1_ae") & (rows["seed"] == 1)]["psnr"]
    np.testing.assert_allclose(table["l1_ae/awgn-0.1-none/seed1"], expected, rtol=1e-4)
    assert "bm3d/awgn-0.1-none" in table and len(table) == 5


def test_the_papers_table_is_whole_and_as_printed():
    paper = pd.read_csv(ROOT / "results/preprint/table1.csv")
    assert len(paper) == 20 and set(paper["method"]) <= set(methods.METHODS)
    assert paper.set_index(["method", "snr"]).loc[("wgan_gp_l1", 0.1), "psnr"] == 25.42


def test_table_beside_the_paper_has_both_and_invents_nothing(rows):
    ours = tables.mark_best(tables.over_seeds(tables.over_images(rows)))
    paper = pd.read_csv(ROOT / "results/preprint/table1.csv")
    best = pd.DataFrame({"method": ["l1_ae"], "experiment": ["awgn-0.1-none"], "psnr": [21.0], "psnr_sd": [0.1]})
    table = tables.beside_paper(ours, paper, best, 0.1).set_index("Method")
    assert (
        table.loc["BM3D", "PSNR, paper"] == "14.54 ± 0.15" and table.loc["BM3D", "MSE, paper"] == "3.52e-02 ± 7.81e-03"
    )
    assert table.loc["BM3D", "PSNR, ours"] == f"{rows[rows['method'] == 'bm3d']['psnr'].mean():.2f}"
    assert set(table["PSNR, ours, clipped"]) == {"—"}
    assert table.loc["ℓ1-Autoencoder", "PSNR, ours, five checkpoints of one run"] == "21.00 ± 0.10"


def test_a_table_whose_words_hold_bars_keeps_its_columns():
    text = tables.markdown(pd.DataFrame({"|a - b|": ["x|y", "z"], "n": [1, 2]}))
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines()]
    assert [len(row) for row in rows] == [2, 2, 2, 2] and rows[2][0].strip() == "x\\|y"


def test_the_steadiness_of_a_training_is_read_off_its_curve():
    curves = pd.DataFrame(
        {"run": list("aaaabbc"), "psnr": [10, 19, 12, 20, 5, 6, 7.0], "spread": [3, 2, 1.5, 1, 0.5, 0.0, 1]}
    )
    found = tables.stability(curves, ["run"])
    assert found["fall"].tolist() == [7, 0, 0] and found["spread"].tolist() == [1, 0, 1]


def test_a_table_of_resolutions_says_what_each_half_map_was_denoised_by():
    stacks = ["noisy", "table1/l2_ae/awgn-0.1-none", "screened/l2_ae/awgn-0.1-A_0.1", "halves/l2_ae/awgn-0.1-A_0.1"]
    stacks += ["posterior/posterior/awgn-0.1-A_0.1", "posterior_halves/posterior/awgn-0.1-none"]
    described = tables.resolutions(pd.DataFrame(np.full((6, 5), 9.0), index=stacks))
    said = [
        ("Noisy images", "—", "—"),
        ("ℓ2-Autoencoder", "one network", "none"),
        ("ℓ2-Autoencoder", "one network, screened pairs", "A_0.1"),
        ("ℓ2-Autoencoder", "two networks, disjoint pairs", "A_0.1"),
        ("Posterior", "all references", "A_0.1"),
        ("Posterior", "disjoint halves of the references", "none"),
    ]
    assert list(described.iloc[:, :3].itertuples(index=False, name=None)) == said


def test_what_is_told_references_comes_last_and_the_best_without_them_is_bold():
    psnr = {"bayes_bound": 38.0, "cwf": 26.0, "l2_ae": 25.0, "classes": 27.0, "noisy": 12.0}
    runs = [{"method": name, "experiment": f"awgn-{snr}-none", "psnr": value - 10 * (0.1 - snr)} for name, value in
            psnr.items() for snr in (0.05, 0.1)]  # fmt: skip
    runs.append({"method": "cwf", "experiment": "clipped-0.1-none", "psnr": 99.0})
    table = tables.with_references(pd.DataFrame(runs))
    assert list(table["method"]) == ["noisy", "cwf", "classes", "l2_ae", "bayes_bound"]
    assert list(table["references"]) == [False, False, False, True, True]
    assert list(table.columns[3:]) == ["psnr_0.1", "psnr_0.05"] and table["psnr_0.1"].max() == 38
    words = tables.in_words(table).set_index("Method")
    assert list(words["PSNR, SNR 0.1"]) == ["12.00", "26.00", "**27.00**", "25.00", "38.00"]
    assert words["PSNR, SNR 0.05"].str.startswith("**").sum() == 1
