"""Every number on a page that looks measured is written by ``scripts/tables.py`` from a file, or stands in ``ALLOWED``.

And every file that a page names below results/ is one that git takes. How a mark is read: ``test_values.py``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
import tables  # noqa: E402
import values  # noqa: E402

PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in tables.PAGES}

FORMULA = "arithmetic, not measured"
SETTING = "a setting, or how a thing is defined"
SOURCE = "of the code or paper named there"
VERSION = "a version"
ALLOWED = {
    "README.md": {"Python 3.10 or newer": VERSION, "Licence: Apache-2.0": VERSION},
    "results/README.md": {
        "a 192 × 192 covariance": SETTING,
        "the ensemble costs two passes per test image": SETTING,
        "has a standard error of 0.7 points": FORMULA,
        "an adapter a task and 11 passes a new image": FORMULA,
        "stream.validation=0.2": SETTING,
    },
    "docs/backbones.md": {"standard error of up to 1.5 points": FORMULA},
    "docs/feature_store.md": {"A ViT-B/16 takes 3 kB an image": FORMULA},
    "docs/index.md": {"Python 3.10 or newer": VERSION},
    "docs/learners/aper.md": {"after it two passes an image": FORMULA},
    "docs/learners/coda_prompt.md": {"Two passes an image": FORMULA},
    "docs/learners/dualprompt.md": {
        "Two passes an image": FORMULA,
        "LAMDA-PILOT has λ = 0.1, a rate of 0.001": SOURCE,
    },
    "docs/learners/fecam.md": {"4.7 MB for F = 768": FORMULA},
    "docs/learners/finetune.md": {"deviation 0.02 (timm's head)": SOURCE},
    "docs/learners/joint.md": {"T (T + 1) / 2 times": FORMULA},
    "docs/learners/l2p.md": {"Two passes an image": FORMULA},
    "docs/learners/lae.md": {"at test two passes an image": FORMULA},
    "docs/learners/loranpac.md": {"160 MB for 2000 × 10,000": FORMULA, "U alone has 4 GB then": FORMULA},
    "docs/learners/merge.md": {"share of the newest, 0.5": SETTING},
    "docs/learners/merge_lca.md": {"4.7 MB for F = 768": FORMULA},
    "docs/learners/mos.md": {
        "t + 1 times after task t, T + 1 times over": FORMULA,
        "4.7 MB for F = 768": FORMULA,
        "with α = 0.1": SETTING,
    },
    "docs/learners/ranpac.md": {"800 MB for M = 10,000": FORMULA},
    "docs/learners/rsiat.md": {"the authors': 0.025 and 0.03 of it": SOURCE, "the first task at 0.01 whatever": SOURCE},
    "docs/learners/slca.md": {"4.7 MB for F = 768": FORMULA},
    "docs/learners/ssiat.md": {
        "(arXiv 2603.09888; 0.1 there)": SOURCE,
        "4.7 MB a class for F = 768 and so 0.47 GB for 100 classes: far more than the tuner's 4.8 MB": FORMULA,
        "farther than 4.8 σ": FORMULA,
        "m = 0.1 and decay": SETTING,
    },
    "docs/learners/tuna.md": {
        "t + 1 times after task t": FORMULA,
        "4.7 MB for F = 768": FORMULA,
        "three times in thirty": SOURCE,
    },
    "docs/merging.md": {"2.7 M weights": FORMULA},
    "docs/published.md": {"## The data": SOURCE},
    "docs/speed.md": {
        "A share of 1.00 is": SETTING,
        "goals are 0.95 for evaluation and 0.90 for training": SETTING,
    },
    "docs/tried.md": {"Python 3.11, torch 2.14": VERSION, "shrinkage of 0.1": SETTING},
}
"""Page → words around a number that no file holds → why. A heading stands for its section, up to the next heading."""

NUMBER = r"[−-]?\d[\d,]*(?:\.\d+)?"
WORDS = (
    r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|half\san?|an?\s(?:half|third|quarter|tenth|few)"
)
UNITS = (
    r"%|per\scent\b|(?:percentage\s|full\s)?points?\b|m?s\b|(?:milli)?seconds?\b|minutes?\b|hours?\b|[kMGT]i?B\b"
    r"|(?:times|x)\b|×|of\sbare\b|passes\b|images/s\b"
)
LOOKS_MEASURED = re.compile(
    rf"""
      ±\s*{NUMBER}                                                                 # a spread
    | (?<![\w.]){NUMBER}(?:\s*(?:to|and|or|against|–)\s*{NUMBER})*\s?(?:{UNITS})   # with a unit, or several before one
    | \b(?i:{WORDS})(?:\sand\sa\shalf|\sor\smore)?\s(?:of\sa\s)?(?:{UNITS})      # the same in words
    | (?<![\w.])[−-]?\d+(?:\.\d+)?e[+−-]?\d+\b                                     # 1e-05
    | (?<![\w.])[−-]?\d+\.\d+(?![\w.]*\d)                                          # any other with decimals
    | (?<=\|)\s*{NUMBER}\s*(?=\|)                                                  # alone in a cell
    """,
    re.VERBOSE,
)
"""What a measured number looks like: a wide net, since what is none can be allowed."""
NOT_PROSE = (
    r"^(```|~~~).*?^\1",  # code
    tables.MARK.pattern,
    values.MARK.pattern,  # the number behind it included
    r"<!--.*?-->",
    r"`[^`\n]+`",
    r"\]\([^)]*\)",  # where a link leads
    r"\b\d{4}\.\d{4,5}\b",  # arXiv
)


def looks_measured(text: str) -> Iterator[re.Match[str]]:
    """The numbers of a page that look measured and that nothing writes."""
    for pattern in NOT_PROSE:  # blanked out, so that places stay
        text = re.sub(pattern, lambda m: re.sub(r"[^\n]", "\0", m[0]), text, flags=re.DOTALL | re.MULTILINE)
    return LOOKS_MEASURED.finditer(text)


def spans(phrase: str, text: str) -> list[tuple[int, int]]:
    """Where a phrase stands, however its lines are broken; a heading with all of its section."""
    if phrase.startswith("#"):
        pattern = rf"^{re.escape(phrase)}$.*?(?=^#|\Z)"
    else:
        pattern = r"\s+".join(map(re.escape, phrase.split()))
    return [m.span() for m in re.finditer(pattern, text, re.DOTALL | re.MULTILINE)]


def unexplained(text: str, phrases: Iterable[str]) -> list[str]:
    """What looks measured in a page and stands in none of the phrases; and phrases that no such number stands in."""
    found = list(looks_measured(text))
    places = {phrase: spans(phrase, text) for phrase in phrases}

    def explains(phrase: str, number: re.Match[str]) -> bool:
        return any(start <= number.start() and number.end() <= end for start, end in places[phrase])

    problems = [
        f"line {text.count(chr(10), 0, number.start()) + 1}: {number[0].strip()!r} comes from no file in results/"
        for number in found
        if not any(explains(phrase, number) for phrase in places)
    ]
    unused = [phrase for phrase in places if not any(explains(phrase, number) for number in found)]
    return problems + [f"allowed, but not there any more: {phrase!r}" for phrase in unused]


@pytest.mark.parametrize("page", PAGES)
def test_measured_numbers_come_from_files(page):
    problems = unexplained(PAGES[page], ALLOWED.get(page, {}))
    assert not problems, f"{page}: mark them (scripts/values.py), or allow them here\n" + "\n".join(problems)


def test_pages_with_allowances_exist():
    assert set(ALLOWED) <= set(PAGES)


@pytest.mark.parametrize(
    "text",
    [
        "It reaches 67.9 % there.",
        "It gains 4 points.",
        "It takes 11.4 against 10.6 ms an image.",
        "about two and a half minutes",
        "half an hour",
        "a tenth of a second",
        "is three times faster",
        "is 3x faster",
        "it needs 219 MB",
        "12.3 ± 4",
        "differs by 1e-05",
        "a share of 0.98",
        "| ours | 104 |",
        "− 0.4 to −0.1 points",
        "97\n% of all",
        "<!-- = ease accuracy_last --> 67.9 %",  # a blank too many: the mark writes another number before it
        "<!-- table: results/reference/quickstart -->\n| 1.0 |\n",  # without an end
    ],
)
def test_numbers_that_look_measured_are_found(text):
    assert unexplained(f"# Title\n\nBefore. {text} After.\n", [])


@pytest.mark.parametrize(
    "text",
    [
        "<!-- = ease accuracy_last -->67.9 % and <!-- = min lae_* accuracy_last -->−1.0 points",
        "\n```\nlr: 0.1  # 67.9 %\n```\n",
        "with `lr: 0.1` (arXiv 2303.07338)",
        "[two](https://example.org/1.5%20s)",
        "500 images of 10 classes in 5 tasks",
        "\n<!-- table: results/reference/quickstart -->\n| 81.6 ± 0.1 |\n<!-- /table -->\n",
    ],
)
def test_other_numbers_are_not_found(text):
    assert not unexplained(f"# Title\n\nBefore {text} after.\n", [])


def test_allowances_explain_their_place_and_nothing_else():
    text = (
        "# Title\n\nF² numbers, 4.7 MB for\nF = 768. It has 67.9 %.\n\n## Published\n\n| 92.3 |\n\n## More\n\n| 1.5 |\n"
    )
    assert unexplained(text, ["4.7 MB for F = 768", "## Published"]) == [
        "line 4: '67.9 %' comes from no file in results/",
        "line 12: '1.5' comes from no file in results/",
    ]
    assert unexplained("# Title\n", ["4.7 MB"]) == ["allowed, but not there any more: '4.7 MB'"]
    assert len(unexplained("4.7 MB for F = 512", ["4.7 MB for F = 768"])) == 2


@pytest.mark.parametrize("page", PAGES)
def test_every_comment_is_a_mark(page):
    known = rf"{values.MARK.pattern}|<!-- (\w+: \S+|/table|--8<-- \[\w+:[\w-]+\]) -->"
    assert re.sub(known, "", PAGES[page], flags=re.DOTALL).count("<!--") == 0


# --- what is named is published ---------------------------------------------------------------------------------------


def named(text: str, root: Path) -> set[Path]:
    """The files below results/ that a page's marks read and its words name."""
    marked = {file for mark in values.marks(text) for file in values.files(mark, root)}
    written = {root / name for name in re.findall(r"\bresults/[\w./-]+\.(?:json|png|html)\b", text)}
    made = set()
    for mark in tables.MARK.finditer(text):
        place = root / mark[3].partition(":")[0]  # behind it: the baselines of a table of differences
        if place.parent.is_file():  # a part of that file
            place = place.parent
        inside = place.rglob("*.json") if place.is_dir() else place.parent.glob(f"{place.name}*")
        files = set(inside)
        assert files, f"{mark[3]}: nothing there"
        made |= files
    return marked | made | {file for file in written if file.exists()}


def ignored(files: Iterable[Path], root: Path) -> list[str]:
    """Those that git ignores, and that a fresh checkout would therefore not have."""
    names = "\n".join(str(file.relative_to(root)) for file in sorted(files))
    found = subprocess.run(["git", "check-ignore", "--stdin"], cwd=root, input=names, capture_output=True, text=True)
    assert found.returncode in (0, 1), found.stderr
    return found.stdout.split()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_files_behind_the_pages_are_published():
    files = {file for text in PAGES.values() for file in named(text, ROOT)}
    assert len(files) > 50 and ROOT / "results" / "tutorial" / "steps.json" in files
    assert not ignored(files, ROOT)


def test_a_file_that_git_ignores_is_found(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("/results/*\n!/results/bench/\n")
    for name in ("bench/a.json", "mine/ncm/order1993-seed0/metrics.json", "mine/b.png"):
        (tmp_path / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / name).write_text("{}")
    text = "Of <!-- = bench/a.json x --> and <!-- = mine/ncm seconds -->.\n![picture](results/mine/b.png)\n"
    files = named(text + "\n<!-- table: results/mine -->\n<!-- /table -->\n", tmp_path)
    assert len(files) == 3
    assert ignored(files, tmp_path) == ["results/mine/b.png", "results/mine/ncm/order1993-seed0/metrics.json"]
