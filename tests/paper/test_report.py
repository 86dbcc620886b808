"""What readers are shown is what was computed: RESULTS.md, the README and its map, and where their links lead."""

import importlib
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from cryo_lib.files import write_text
from cryo_lib.paper import methods, report

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    *(p.name for p in ROOT.glob("RESULTS*.md")),
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAP = [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\|(.*\| `.*)\|$", README, re.MULTILINE)]
SCALE = yaml.safe_load((ROOT / "params.yaml").read_text())["scale"]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    assert [link for link in links if not leads_somewhere((ROOT / page).parent, link)] == []


def leads_somewhere(folder, link):
    """Whether a file is there, and a heading that GitHub would call so."""
    name, _, anchor = link.partition("#")
    if not (there := (folder / name).exists()) or not anchor:
        return there
    headings = re.findall(r"^#+ (.*)$", (folder / name).read_text(encoding="utf-8"), re.MULTILINE)
    return anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short_and_its_map_has_a_row_for_every_stage_that_shows_results():
    assert len(README.encode()) <= 9000
    placed = report.placed(report.stages({"stages": STAGES}, SCALE))
    shown = [
        each for stage, before in placed.items() for each in (*(b for b in before if b.made("figures", ".png")), stage)
    ]
    links = {f"[{stage.notebook[:2]}](notebooks/{stage.notebook}.ipynb)": f"`{stage.name}`" for stage in shown}
    assert [(row[1], row[2]) for row in MAP] == list(links.items()) and len(shown) >= 18


@pytest.mark.parametrize("row", MAP, ids=lambda row: row[0])
def test_every_row_of_the_map_names_what_exists(row):
    _, notebook, stage, function = row
    assert (ROOT / re.search(r"\((.+)\)", notebook)[1]).is_file() and stage.strip("`") in STAGES
    module, _, name = function.strip("`").rpartition(".")
    assert callable(getattr(importlib.import_module(f"cryo_lib.{module}"), name))


def test_what_is_committed_is_what_would_be_written(monkeypatch):
    monkeypatch.chdir(ROOT)
    for scale in (SCALE, *(name for name in report.LARGER if (ROOT / report.page(name)).is_file())):
        assert report.results(scale) == (ROOT / report.page(scale)).read_text(encoding="utf-8")
    assert f"<!-- table1 -->\n{report.short_table(report.shown(SCALE))}<!-- /table1 -->" in README


def test_what_a_notebook_says_of_the_paper_is_shown_to_its_end():
    """All paragraphs, those after a formula too, down to what the notebook costs."""
    page = (ROOT / report.page(SCALE)).read_text(encoding="utf-8")
    for path in sorted(ROOT.glob("notebooks/[23]*.ipynb")):
        text = nbformat.read(path, as_version=4).cells[0].source
        paragraphs = re.search(r"\*\*The paper.*(?=\n\n\*\*Costs)", text, re.DOTALL)[0].split("\n\n")
        assert "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs) in page, path
    assert "**Costs" not in page


def test_the_readmes_numbers_are_the_results(monkeypatch):
    monkeypatch.chdir(ROOT)
    values = pd.read_csv(ROOT / "results" / report.shown(SCALE) / "table1.csv").set_index(["experiment", "method"])
    paper = pd.read_csv(ROOT / "results" / "preprint" / "table1.csv").set_index(["snr", "method"])
    names = {label: name for name, label in methods.labels().items()}
    table = README.partition("<!-- table1 -->")[2].partition("<!-- /table1 -->")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert len(rows) - 2 == sum(experiment == "awgn-0.1-none" for experiment, _ in values.index)
    for label, *cells in rows[2:]:
        sources = [(paper, 0.1), (values, "awgn-0.1-none"), (values, "clipped-0.1-none")]
        for cell, (table, key) in zip(cells, sources, strict=True):
            at = key, names[label.strip("*")]
            assert cell.strip("*").split(" ")[0] == (f"{table.loc[at, 'psnr']:.2f}" if at in table.index else "—")


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository of two notebooks: 06 makes a table, 24 shows it with a figure; nothing of it has run."""
    stage = {"deps": ["build/nbsrc/06_make_maps.py"], "outs": [{"results/${item.scale}/maps.md": {"cache": False}}]}
    shows = ["figures/${item.scale}/a.png", "figures/${item.scale}/a.pdf", "paper/${item.scale}/24_draw_a.ipynb"]
    figure = {"deps": ["build/nbsrc/24_draw_a.py", "results/${item.scale}/maps.md"], "outs": shows}
    pipeline = {"stages": {"nbsrc": {"outs": ["build/nbsrc"]}, "a": figure, "maps": stage}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    (tmp_path / "params.yaml").write_text("scale: small\n")
    (tmp_path / "README.md").write_text("Hello\n<!-- table1 -->\n<!-- /table1 -->\nbye\n")
    (tmp_path / "notebooks").mkdir()
    claim = "# 24 · A\n\n**Makes** a.\n\n**The paper**: 3 Å."
    for name, text in (("06_make_maps", "# 06 · Maps"), ("24_draw_a", claim)):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text(nbformat.writes(notebook))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fill(folder):
    for name in ("figures/small/a.png", "paper/small/24_draw_a.ipynb", "paper/small/06_make_maps.ipynb"):
        write_text(folder / name, "")
    write_text(folder / "results" / "small" / "maps.md", "| Å |\n| --- |\n| 8.5 |\n")


def test_what_has_not_run_is_said(house):
    report.main()
    text = (house / "RESULTS.md").read_text(encoding="utf-8")
    for path in ("figures/small/a.png", "results/small/maps.md", "paper/small/*.ipynb"):
        assert f"**Not made yet at this scale:** `{path}`" in text
    assert "`dvc repro maps`" in text and "`results/small/table1.csv`" in (house / "README.md").read_text()


def test_a_notebook_that_is_no_stage_is_shown_where_it_has_been_run(house):
    fill(house)
    claim = nbformat.v4.new_markdown_cell("# 44 · B\n\n**Makes** b.\n\n**The paper** has none.")
    (house / "notebooks" / "44_compare_outside.ipynb").write_text(
        nbformat.writes(nbformat.v4.new_notebook(cells=[claim]))
    )
    assert "outside" not in report.results("small")
    write_text(house / "results" / "small" / "outside.md", "| dB |\n| --- |\n| 22.9 |\n")
    text = report.results("small")
    assert (
        "## B\n\n[Notebook 44](notebooks/44_compare_outside.ipynb), `cryo run 44`, no stage. **The paper** has" in text
    )
    assert "| 22.9 |" in text and "`figures/small/outside.png`" in text


def test_results_hold_the_claim_the_figure_and_the_tables_and_are_written_once(house):
    fill(house)
    report.main()
    text, readme = ((house / name).read_text(encoding="utf-8") for name in ("RESULTS.md", "README.md"))
    assert "Not made yet" not in text
    section = "## A\n\n[Notebook 24](paper/small/24_draw_a.ipynb), stage `a`. **The paper**: 3 Å."
    maps = "[Notebook 06](notebooks/06_make_maps.ipynb), stage `maps`: Maps."
    last = "- [06_make_maps](paper/small/06_make_maps.ipynb)"
    found = [text.index(part) for part in (section, "![a](figures/small/a.png)", maps, "| 8.5 |", last)]
    assert found == sorted(found)
    report.main()
    assert (text, readme) == tuple((house / name).read_text(encoding="utf-8") for name in ("RESULTS.md", "README.md"))


def test_a_larger_scale_has_a_page_of_its_own_and_the_readmes_table(house):
    report.main()
    before = (house / "RESULTS.md").read_text(encoding="utf-8")
    write_text(
        house / "results" / "preprint" / "table1.csv",
        "method,snr,mse,mse_sd,psnr,psnr_sd,ssim,ssim_sd\nbm3d,0.1,0.04,0,14.54,0.15,0.2,0\n",
    )
    write_text(house / "results" / "workstation" / "table1.md", "Test images: 4.\n")
    header = "method,experiment,mse,psnr,ssim,mse_sd,psnr_sd,ssim_sd,n_seeds,mse_best,psnr_best,ssim_best\n"
    row = "bm3d,awgn-0.1-none,0.01,20.0,0.5,,,,1,True,True,True\n"
    write_text(house / "results" / "workstation" / "table1.csv", header + row)
    report.main()
    readme = (house / "README.md").read_text(encoding="utf-8")
    assert "scale `workstation`. Test images: 4." in readme and "| BM3D | 14.54 ± 0.15 | **20.00** | — |" in readme
    assert (house / "RESULTS.md").read_text(encoding="utf-8") == before
    write_text(house / "params.yaml", "scale: workstation\n")
    report.main()
    assert "# Results at the scale `workstation`" in (house / "RESULTS-workstation.md").read_text(encoding="utf-8")


def test_a_table_that_nothing_shows_is_refused(house):
    pipeline = yaml.safe_load((house / "dvc.yaml").read_text())
    pipeline["stages"]["a"]["deps"].pop()
    (house / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    with pytest.raises(ValueError, match="made of what maps makes"):
        report.results("small")


def test_a_notebook_before_the_others_that_draws_a_figure_shows_itself_before_the_last(house):
    pipeline = yaml.safe_load((house / "dvc.yaml").read_text())
    pipeline["stages"]["maps"]["outs"] += ["figures/${item.scale}/maps.png"]
    pipeline["stages"]["a"]["deps"].pop()
    (house / "dvc.yaml").write_text(yaml.safe_dump(pipeline))
    fill(house)
    text = report.results("small")
    found = [text.index(part) for part in ("## Maps", "figures/small/maps.png", "| 8.5 |", "## A")]
    assert found == sorted(found) and text.count("| 8.5 |") == 1


def test_insert_replaces_only_what_is_between_its_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- t -->\nold\n<!-- /t -->\nb\n")
    assert report.insert(path, "t", "new\n") and not report.insert(path, "t", "new\n")
    assert path.read_text() == "a\n<!-- t -->\nnew\n<!-- /t -->\nb\n"
    with pytest.raises(ValueError, match="expected the markers <!-- x --> and <!-- /x -->"):
        report.insert(path, "x", "")
