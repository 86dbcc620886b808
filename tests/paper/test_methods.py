"""One entry makes a method known everywhere: in tables, in figures, in every scale."""

from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
import yaml

from cryo_lib.denoisers import classical
from cryo_lib.networks.losses import LOSSES, Method
from cryo_lib.paper import methods, tables

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "scales").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_method_of_a_scale_has_an_entry_of_its_kind(path):
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    networks = {method for study in params["study"].values() for method in study["methods"]}
    assert {entry.kind for entry in methods.among(networks).values()} == {"network", "self-supervised"}
    assert {entry.kind for entry in methods.among(params["baselines"]["baseline_methods"]).values()} == {"classical"}


def test_kinds_are_what_the_library_can_run():
    kinds = {name: entry.kind for name, entry in methods.METHODS.items()}
    assert {name for name, kind in kinds.items() if kind == "classical"} == set(classical.METHODS)
    others = {"ours", "self-supervised", "released", "posterior", "bound"}
    assert set(kinds.values()) == {"network", "classical", "reference", *others}
    for name in [name for name, kind in kinds.items() if kind in ("network", "self-supervised")]:
        assert Method.parse(name).loss in LOSSES
        assert (Method.parse(name).target == "reference") == (kinds[name] == "network")


def test_no_two_methods_share_a_label_or_a_colour_and_no_two_networks_a_marker():
    entries = list(methods.METHODS.values())
    for column in ("label", "colour"):
        assert len({getattr(entry, column) for entry in entries}) == len(entries)
    networks = [entry.marker for entry in entries if entry.kind == "network"]
    assert len(set(networks)) == len(networks)


def test_an_unknown_method_is_refused_and_not_left_out():
    assert list(methods.among(["l1_ae", "bm3d", "l1_ae"])) == ["bm3d", "l1_ae"]
    with pytest.raises(ValueError, match="expected some of clean, noisy, .* got mine, yours; add it to METHODS in"):
        methods.among(["yours", "l1_ae", "mine"])


@pytest.fixture
def new_method(monkeypatch):
    entry = methods.Entry("New + ℓ1", "network", "#123456", "*", methods.PAIRS)
    monkeypatch.setattr(methods, "METHODS", methods.METHODS | {"new_l1": entry})
    runs = [("l1_ae", "none", 0.01), ("l1_ae", "A_0.1", 0.02), ("new_l1", "none", 0.03), ("new_l1", "A_0.1", 0.06)]
    rows = [{"method": method, "experiment": f"awgn-0.1-{kind}", "mse": mse} for method, kind, mse in runs]
    return pd.DataFrame(rows).assign(seed=0, psnr=20.0, ssim=0.5, n_images=4)


def test_a_new_entry_is_a_row_of_table_1(new_method):
    clean = new_method[new_method["experiment"] == "awgn-0.1-none"]
    paper = pd.read_csv(ROOT / "results" / "preprint" / "table1.csv")
    best = pd.DataFrame(columns=["method", "experiment", "psnr", "psnr_sd"])
    table = tables.beside_paper(tables.mark_best(tables.over_seeds(clean)), paper, best, 0.1)
    assert table["Method"].tolist() == ["ℓ1-Autoencoder", "New + ℓ1"]


def test_a_new_entry_is_a_curve_of_figure_3eg(new_method, tmp_path, monkeypatch):
    """The code of the notebook, on results that hold the new method."""
    (tmp_path / "results" / "tiny").mkdir(parents=True)
    (tmp_path / "dvc.yaml").touch()
    new_method.to_csv(tmp_path / "results" / "tiny" / "metrics.csv", index=False)
    monkeypatch.chdir(tmp_path)
    names = {}
    with plt.rc_context():
        for cell in nbformat.read(ROOT / "notebooks" / "25_draw_figure3eg.ipynb", as_version=4).cells:
            if cell.cell_type == "code":
                parameters = "parameters" in cell.metadata.get("tags", [])
                exec('scale, protocol, snr = "tiny", "awgn", 0.1' if parameters else cell.source, names)
        (legend,) = names["figure"].legends
        assert [text.get_text() for text in legend.get_texts()] == ["ℓ1-Autoencoder", "New + ℓ1"]
        assert "#123456" in {line.get_color() for line in names["axes"][0].lines}
    plt.close("all")
