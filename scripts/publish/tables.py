"""Write the tables of README.md, results/README.md and docs/ from the results they name; --check only compares.

A table stands between ``<!-- table: FOLDER -->`` and ``<!-- /table -->``. In place of ``table`` there may be

    differences   FOLDER:BASELINE,…   difference to baselines on the same class orders, and costs
    settings      FOLDER              runs labelled <learner> (its default) and <learner>_chosen side by side
    settings      FOLDER:NAME,…       the same; the chosen settings are in the folders of these names next to it
    matrix        FOLDER              runs of combinations, labelled <tuner>_<consolidation>_<classifier>
    stages        FOLDER              costs of runs at an early and at the last stage
    costs         FOLDER              hours of all runs of the campaigns
    steps         FOLDER              seconds of each step of follow_tutorial.py
    ablation      FOLDER/LABEL        accuracies from ablate_merging.py
    throughput    FILE                measurements of bench/throughput.py
    growth        FILE                measurements of bench/growth.py
    heads         FILE                measurements of bench/heads.py
    one_step      FILE                measurements of bench/steps.py
    wide          FILE                measurements of bench/wide.py
    startup       FILE                measurements of bench/startup.py
    pilot         FILE                measurements of bench/pilot.py
    banks         FOLDER              rules, banks and routers, from studies/banks.py
    backbones     FILE                scores from study_backbones.py
    families      FILE                what works with each family, from studies/families.py
    reusing       FILE/STREAM         what anchors, teachers and bss gain, from studies/reusing.py
    leads         ROOT:LABEL:FOLDER,… one learner against the best other one of every stream
    published     FILE/DATASET        published numbers beside ours

For numbers in prose see values.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np

from cil import report, results
from cil.errors import CilError
from cil.report.row import pair_of
from scripts import ROOT
from scripts.publish import banks, benches, campaigns, families, leads, reusing, stage_costs, values
from scripts.publish.published import published

PAGES = (ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
COLUMNS = ("accuracy_last", "accuracy_average", "forgetting", "seconds")
TREATMENTS = ("lda stale", "lda translate", "lda linear", "lda oracle", "lda linear + anchor", "lda oracle + anchor")
MARK = re.compile(r"(<!-- (\w+): (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def markdown(folder: Path) -> str:
    """The ranked table of the runs below ``folder``."""
    return ranked(results.find([folder]))


def ranked(runs: Sequence[dict]) -> str:
    """The ranked table of runs of one protocol, with the columns that its kind of stream gives a meaning."""
    compared = report.Comparison(1, report.rank(report.rows(runs)))
    return report.markdown(compared, report.select_columns([*COLUMNS[:2], *compared.of_stream, *COLUMNS[2:]]))


def differences(argument: Path) -> str:
    """``FOLDER:BASELINE,…``: A_last minus each baseline's on the same class orders, mean ± standard deviation.

    The other columns are costs: passes per training image, passes per new image after the last stage, bytes kept.
    """
    folder, _, names = str(argument).rpartition(":")
    rows = report.rank(report.rows(results.find([Path(folder)])))
    baselines = [next(row for row in rows if row.learner == name) for name in names.split(",")]
    heads = "".join(f" less {row.learner} |" for row in baselines)
    lines = [f"| learner | A_last % |{heads} passes per training image | per new image | MiB kept |"]
    lines.append("|" + "---|" * (len(baselines) + 5))
    for row in rows:
        cells = [report.spread(100 * np.array(row.values("accuracy_last")))]
        for baseline in baselines:
            found = 100 * np.array(report.paired(row, baseline))
            cells.append("" if row is baseline else report.spread(found, "+.1f"))
        cells.append(f"{np.mean(row.values('passes_per_train_image')):.1f}")
        cells.append(f"{max(stage_costs.passes(run)[-1] for run in row.runs):.0f}")
        cells.append(f"{np.mean(row.values('kept_bytes')) / 2**20:.1f}")
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ablation(stem: Path) -> str:
    """A_last from ablate_merging.py's ``stem``-order*.json: mean ± standard deviation over class orders.

    ``gap`` is oracle minus linear, both without the anchor: the accuracy that drift still costs.
    """
    files = sorted(stem.parent.glob(f"{stem.name}-order*.json"))
    orders = [json.loads(file.read_text(encoding="utf-8"))["a_last"] for file in files]
    lines = [f"| rule | {' | '.join(t.removeprefix('lda ') for t in TREATMENTS)} | gap |"]
    lines.append("|" + "---|" * (len(TREATMENTS) + 2))
    for rule in orders[0]:
        found = np.array([[order[rule][treatment] for treatment in TREATMENTS] for order in orders])
        cells = [report.spread(column) for column in found.T]
        gap = (found[:, TREATMENTS.index("lda oracle")] - found[:, TREATMENTS.index("lda linear")]).mean()
        lines.append(f"| {rule} | {' | '.join(cells)} | {gap:.1f} |")
    return "\n".join(lines) + "\n"


def steps(folder: Path) -> str:
    """The commands of a tutorial and their seconds; those before the first ``cil`` are the installation."""
    timed = [(s["command"], s["seconds"]) for s in json.loads((folder / "steps.json").read_text("utf-8"))["steps"]]
    first = next(i for i, (command, _) in enumerate(timed) if command.startswith("cil "))
    parts = {"installation": timed[:first], "from there to the last comparison": timed[first:]}
    lines = ["| step | seconds |", "|---|---|"]
    for name, part in parts.items():
        # not in backticks: tests execute the commands in these, and these commands are in the tutorial
        lines += [f"| <code>{escape(command, quote=False)}</code> | {seconds:.0f} |" for command, seconds in part]
        lines.append(f"| **{name}** | **{sum(seconds for _, seconds in part):.0f}** |")
    return "\n".join(lines) + "\n"


def matrix(folder: Path) -> str:
    """A_last of runs labelled <tuner>_<consolidation>_<classifier>, the classifiers side by side, the best rows first.

    A cell without finished runs is empty.
    """
    accuracy = report.NAMED["accuracy_last"]
    lines: dict[tuple[str, str], dict[str, report.SettingRow]] = {}
    for row in report.rows(results.find([folder])):
        tuner, consolidation, classifier = row.learner.rsplit("_", 2)
        lines.setdefault((tuner, consolidation), {})[classifier] = row
    done = {line: {c: row for c, row in cells.items() if row.finished} for line, cells in lines.items()}
    best = {line: max((accuracy.mean(row) or 0 for row in cells.values()), default=0) for line, cells in done.items()}
    classifiers = sorted({classifier for cells in lines.values() for classifier in cells})
    table = [f"| tuner | consolidation | {' | '.join(classifiers)} |", "|" + "---|" * (len(classifiers) + 2)]
    for line in sorted(lines, key=lambda line: -best[line]):
        cells = (accuracy.cell(done[line][c]) if c in done[line] else "" for c in classifiers)
        table.append(f"| {' | '.join((*line, *cells))} |")
    return "\n".join(table) + "\n"


def settings(argument: Path) -> str:
    """A learner's default setting beside its chosen one, sorted by the better of the two.

    ``FOLDER`` holds runs labelled <learner> and <learner>_chosen; with ``FOLDER:NAME,…`` it holds only the defaults,
    and :func:`_chosen` finds the others in the folders of these names next to it. Differences are paired by class
    order. Cells of settings without finished runs are empty.
    """
    place, _, names = str(argument).partition(":")
    rows = _finished(Path(place))
    if names:
        rows |= {f"{label}_chosen": row for label, row in _chosen(rows, Path(place).parent, names.split(",")).items()}
    accuracy, forgetting, seconds = (report.NAMED[name] for name in ("accuracy_last", "forgetting", "seconds"))
    learners = list(dict.fromkeys(label.removesuffix("_chosen") for label in rows))
    pairs = {name: (rows.get(name), rows.get(f"{name}_chosen")) for name in learners}
    best = {name: max(accuracy.mean(row) or 0 for row in pair if row) for name, pair in pairs.items()}
    lines = [
        "| learner | A_last %: default | chosen | chosen less default | forgetting: default | chosen | "
        "seconds: default | chosen | keeps old images |"
    ]
    lines.append("|" + "---|" * 9)
    for name in sorted(learners, key=lambda name: (-best[name], name)):
        default, chosen = pairs[name]
        cells = [accuracy.cell(row) if row else "" for row in (default, chosen)]
        gain = report.paired(chosen, default) if default and chosen else None
        cells.append("" if gain is None else report.spread(100 * np.array(gain), "+.1f"))
        cells += [column.cell(row) if row else "" for column in (forgetting, seconds) for row in (default, chosen)]
        cells.append("yes" if any(row.runs[0]["stores_images"] for row in (default, chosen) if row) else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _finished(folder: Path) -> dict[str, report.SettingRow]:
    return {row.learner: row for row in report.rows(results.find([folder])) if row.finished}


def _chosen(defaults: dict[str, report.SettingRow], root: Path, names: Sequence[str]) -> dict[str, report.SettingRow]:
    """Label of a default → the runs of the chosen setting on the same class orders and seeds.

    They are labelled <learner>_adapter, if that tuner was chosen, or <learner>. Settings that equal the default, or
    that were not chosen (``chosen_by: default``), are left out.
    """
    there = {label: row for name in names for label, row in _finished(root / name).items()}
    found = {}
    for label, default in defaults.items():
        row = there.get(f"{label}_adapter") or there.get(label)
        if row is None or row.runs[0]["chosen_by"] == "default" or _entry(row) == _entry(default):
            continue
        partners = {pair_of(run) for run in default.runs}
        if runs := tuple(run for run in row.runs if pair_of(run) in partners):
            found[label] = replace(row, runs=runs)
    return found


def _entry(row: report.SettingRow) -> dict:
    """A row's learner section without its names; keys that are newer than the runs have their defaults."""
    from cil.runner.identity import identity_settings  # imports torch, which no other table needs

    flat = identity_settings(row.runs[0]["config"])
    names = ("learners.0.label", "learners.0.orders", "learners.0.chosen_by")
    return {key: value for key, value in flat.items() if key.startswith("learners.") and key not in names}


def backbones(file: Path) -> str:
    """Scores and A_last of backbones, best first; below, Kendall's τ of each score with A_last of each learner."""
    found = json.loads(file.read_text(encoding="utf-8"))
    learners = list(found["candidates"][0]["stream"])
    head = ["backbone", "NCM %", "ridge %", "LogME", "effective rank", *(f"A_last {name} %" for name in learners)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in sorted(found["candidates"], key=lambda row: -row["stream"][learners[0]]["accuracy_last"]):
        ends = " | ".join(f"{100 * row['stream'][name]['accuracy_last']:.1f}" for name in learners)
        scores = f"{100 * row['ncm']:.1f} | {100 * row['ridge']:.1f} | {row['logme']:.4f} | {row['effective_rank']:.1f}"
        lines.append(f"| {row['candidate']} | {scores} | {ends} |")
    for name in learners:
        taus = [found["agreement"][f"{name} stream"][score] for score in ("ncm", "ridge", "logme", "effective_rank")]
        told = " | ".join("–" if tau is None else f"{tau:.2f}" for tau in taus)
        lines.append(f"| **τ with A_last of {name}** | {told} |{'  |' * len(learners)}")
    return "\n".join(lines) + "\n"


def render(page: Path) -> str:
    """The page with its tables and marked numbers rewritten from the results."""
    kinds = {
        "table": markdown,
        "differences": differences,
        "ablation": ablation,
        "settings": settings,
        "matrix": matrix,
        "throughput": benches.throughput,
        "growth": benches.growth,
        "heads": benches.heads,
        "one_step": benches.one_step,
        "wide": benches.wide,
        "startup": benches.startup,
        "pilot": benches.pilot,
        "banks": banks.table,
        "stages": stage_costs.table,
        "backbones": backbones,
        "families": families.table,
        "reusing": reusing.table,
        "leads": leads.table,
        "costs": campaigns.costs,
        "steps": steps,
        "published": published,
    }
    try:
        tables = MARK.sub(lambda m: m[1] + kinds[m[2]](ROOT / m[3]) + m[4], page.read_text(encoding="utf-8"))
        return values.render(tables, ROOT)
    except CilError as error:
        raise CilError(f"{page.relative_to(ROOT)}: {error}") from None


def stale() -> dict[Path, str]:
    """The pages whose numbers differ from the results, and what they should be.

    Raises:
        CilError: A table or number cannot be made; names the page and the place.
    """
    return {page: new for page in PAGES if (new := render(page)) != page.read_text(encoding="utf-8")}


def main() -> int:
    try:
        changed = stale()
    except CilError as error:
        print(error)
        return 2
    if "--check" in sys.argv:
        for page in changed:
            print(f"{page.relative_to(ROOT)}: its numbers differ from results/; run python -m scripts.publish.tables")
        return 1 if changed else 0
    for page, new in changed.items():
        page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
