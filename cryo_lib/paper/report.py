"""What a scale found, for readers: its page of results, and the README's table. `python -m cryo_lib.paper.report`"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import dropwhile, islice, takewhile
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import yaml

from cryo_lib.files import enter_root, write_text
from cryo_lib.paper import tables

FIRST = "20"  # notebooks from this number on show results
LARGER = ("paper", "workstation")  # scales with pages of their own; the one that says most comes first
COMMANDS = {  # notebooks that are no stages, for what they take, or how long, and what they make
    "41_evaluate_general": ("results/{}/general/unseen.md",),
    "43_compare_cryodrgn": ("figures/{}/cryodrgn.png", "results/{}/cryodrgn.md"),
    "44_compare_outside": ("figures/{}/outside.png", "results/{}/outside.md"),
    "45_add_adversary": ("figures/{}/added.png", "results/{}/added.md"),
}


@dataclass(frozen=True)
class Stage:
    """A stage that runs a notebook: its name, the notebook's stem, and its paths at one scale, relative to the root.

    Without a name it is none: a reader runs the notebook.
    """

    name: str
    notebook: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]

    @property
    def by(self) -> str:
        """What makes its outs, for readers."""
        return f"stage `{self.name}`" if self.name else f"`cryo run {self.notebook[:2]}`, no stage"

    def made(self, folder: str, suffix: str) -> list[str]:
        """Its outs of one kind: those below `folder` whose names end in `suffix`."""
        return [out for out in self.outs if out.startswith(f"{folder}/") and out.endswith(suffix)]


def stages(pipeline: dict[str, Any], scale: str) -> list[Stage]:
    """The stages of a parsed dvc.yaml that run a notebook, by the notebook's number: the paper's order from 20 on."""
    found = []
    for name, stage in json.loads(json.dumps(pipeline["stages"]).replace("${item.scale}", scale)).items():
        deps = tuple(stage.get("deps", []))
        outs = tuple(next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"])
        code = [Path(dep).stem for dep in deps if dep.startswith("build/nbsrc/")]
        found += [Stage(name, notebook, deps, outs) for notebook in code]
    return sorted(found, key=lambda stage: stage.notebook)


def placed(found: list[Stage]) -> dict[Stage, list[Stage]]:
    """Each stage that shows results, and the stages before it whose tables are shown with it: the first made of them.

    A stage of a lower number that draws a figure no other stage is made of shows itself, before the last.

    ValueError where a table belongs to no stage that shows results.
    """
    late, used = [stage for stage in found if stage.notebook >= FIRST], {dep for stage in found for dep in stage.deps}
    own = [s for s in found if s.notebook < FIRST and s.made("figures", ".png") and not used & set(s.outs)]
    shown = {stage: [] for stage in (*late[:-1], *own, *late[-1:])}
    for stage in found:
        if stage not in shown and (made := stage.made("results", ".md")):
            home = next((later for later in shown if set(later.deps) & set(stage.outs)), None)
            if home is None:
                raise ValueError(f"dvc.yaml: no notebook from {FIRST} on is made of what {stage.name} makes ({made})")
            shown[home].append(stage)
    return shown


def results(scale: str) -> str:
    """A section a notebook that shows results: its claim, figures and tables, or that they are missing."""
    found = stages(yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8")), scale)
    copies = [path.as_posix() for path in sorted(Path("paper", scale).glob("*.ipynb")) if path.name < FIRST]
    parts = [
        f"# Results at the scale `{scale}`",
        "Written by `make repro`, from `results/` and `figures/`; for scales see [docs/scales.md](docs/scales.md). "
        "Each part links its notebook, executed where there is a copy, and begins with what the paper says; *The "
        "claims, weighed* tells which of it holds. A part marked *no stage* was made by the command that it names.",
    ]
    parts += [_section(stage, before) for stage, before in placed(found).items()]
    for notebook, made in COMMANDS.items():
        command = Stage("", notebook, (), tuple(path.format(scale) for path in (*made, f"paper/{{}}/{notebook}.ipynb")))
        parts += [_section(command, [])] if all(Path(path).is_file() for path in command.made("results", ".md")) else []
    parts.append("## Executed notebooks behind these")
    parts.append("\n".join(f"- [{Path(path).stem}]({path})" for path in copies) or _missing(f"paper/{scale}/*.ipynb"))
    return "\n\n".join(parts) + "\n"


def _heading(stage: Stage) -> tuple[str, str, str]:
    """A notebook's title, a link to its executed copy or else its source, and what it says of the paper."""
    source = Path("notebooks", f"{stage.notebook}.ipynb")
    title, *paragraphs = nbformat.read(source, as_version=4).cells[0].source.split("\n\n")
    on_paper = dropwhile(lambda text: not text.startswith("**The paper"), paragraphs)
    claim = [*islice(on_paper, 1), *takewhile(lambda text: not text.startswith(("**", ">")), on_paper)]
    claim = "\n\n".join(" ".join(text.split()) for text in claim)
    executed = [path for path in stage.made("paper", ".ipynb") if Path(path).is_file()]
    return title.partition(" · ")[2], f"[Notebook {stage.notebook[:2]}]({(executed or [source.as_posix()])[0]})", claim


def _section(stage: Stage, before: list[Stage]) -> str:
    title, link, claim = _heading(stage)
    parts = [f"## {title}", f"{link}, {stage.by}. {claim}".rstrip()]
    for maker in (stage, *before):
        if maker is not stage:
            title, link, _ = _heading(maker)
            parts.append(f"{link}, {maker.by}: {title}.")
        for path in maker.made("figures", ".png"):
            parts.append(f"![{Path(path).stem}]({path})" if Path(path).is_file() else _missing(path, maker))
        for path in maker.made("results", ".md"):
            found = Path(path).is_file()
            parts.append(Path(path).read_text(encoding="utf-8").strip() if found else _missing(path, maker))
    return "\n\n".join(parts)


def _missing(path: str, stage: Stage | None = None) -> str:
    return f"**Not made yet at this scale:** `{path}` (`dvc repro{f' {stage.name}' if stage else ''}`)."


def short_table(scale: str, snr: float = 0.1) -> str:
    """The README's Table 1, PSNR in dB at one SNR: the paper's, ours, ours on clipped noise; or that it is missing."""
    folder = Path("results", scale)
    if not (folder / "table1.csv").is_file():
        return _missing(f"{folder}/table1.csv") + "\n"
    ours, paper = pd.read_csv(folder / "table1.csv"), pd.read_csv("results/preprint/table1.csv")
    said = (folder / "table1.md").read_text(encoding="utf-8").partition("\n")[0]
    full = tables.beside_paper(ours, paper, pd.DataFrame(columns=["method", "experiment", "psnr"]), snr)
    kept = full[["Method", *(f"PSNR, {words}" for words in ("paper", "ours", "ours, clipped"))]]
    return f"SNR {snr:g}, scale `{scale}`. {said}\n\n{tables.markdown(kept)}"


def insert(path: str | Path, marker: str, text: str) -> bool:
    """Replace what stands between `<!-- marker -->` and `<!-- /marker -->` in a text file; True where that changed it.

    ValueError where the markers are missing.
    """
    path, opening, closing = Path(path), f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before = path.read_text(encoding="utf-8")
    head, found, rest = before.partition(opening)
    _, ended, tail = rest.partition(closing)
    if not (found and ended):
        raise ValueError(f"{path}: expected the markers {opening} and {closing}, each once")
    after = f"{head}{opening}\n{text}{closing}{tail}"
    if after != before:
        write_text(path, after)
    return after != before


def page(scale: str) -> str:
    """The file that holds the results of a scale."""
    return f"RESULTS-{scale}.md" if scale in LARGER else "RESULTS.md"


def shown(scale: str) -> str:
    """The scale whose Table 1 the README shows: the first of `LARGER` that has one, else `scale`."""
    return next((name for name in LARGER if Path("results", name, "table1.csv").is_file()), scale)


def main() -> None:
    """Write the results of the scale in params.yaml, and the README's table."""
    enter_root()
    scale = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))["scale"]
    write_text(page(scale), results(scale))
    insert("README.md", "table1", short_table(shown(scale)))


if __name__ == "__main__":
    main()
