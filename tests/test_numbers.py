"""Measured numbers on a page are written by ``scripts.publish.tables`` from a file.

In a table of README, docs or results/README every number is; in prose every percentage, every difference in points and
every spread. Other numbers in prose (sizes, settings, times a reader waits) are the author's, so that rewording a
sentence breaks nothing here. And every file that a page names below results/ is one that git takes. How a mark is read:
``test_values.py``.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from scripts.publish import tables, values

ROOT = Path(__file__).parent.parent

PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in tables.PAGES}

ALLOWED = {"docs/published.md": "## The data"}
"""Page → heading of a section whose tables hold no measurement: there, the sizes of published datasets."""

NUMBER = r"[−-]?\d[\d,]*(?:\.\d+)?"
WORDS = (
    r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|half\san?|an?\s(?:half|third|quarter|tenth|few)"
)
ACCURACY = r"%|per\scent\b|(?:percentage\s|full\s)?points?\b"
UNITS = (
    rf"{ACCURACY}|m?s\b|(?:milli)?seconds?\b|minutes?\b|hours?\b|[kMGT]i?B\b|(?:times|x)\b|×|of\sbare\b|passes\b"
    r"|images/s\b"
)


def measured(units: str) -> str:
    """A spread, or a number before one of ``units``, in digits or in words."""
    return rf"""
      ±\s*{NUMBER}
    | (?<![\w.]){NUMBER}(?:\s*(?:to|and|or|against|–)\s*{NUMBER})*\s?(?:{units})
    | \b(?i:{WORDS})(?:\sand\sa\shalf|\sor\smore)?\s(?:of\sa\s)?(?:{units})
    """


IN_PROSE = re.compile(measured(ACCURACY), re.VERBOSE)
IN_A_TABLE = re.compile(
    rf"""{measured(UNITS)}
    | (?<![\w.])[−-]?\d+(?:\.\d+)?e[+−-]?\d+\b                                     # 1e-05
    | (?<![\w.])[−-]?\d+\.\d+(?![\w.]*\d)                                          # any other with decimals
    | (?<=\|)\s*{NUMBER}\s*(?=\|)                                                  # alone in a cell
    """,
    re.VERBOSE,
)
ROW = re.compile(r"^\s*\|.*\|\s*$", re.MULTILINE)
NOT_PROSE = (
    r"^(```|~~~).*?^\1",  # code
    tables.MARK.pattern,
    values.MARK.pattern,  # the number behind it included
    r"<!--.*?-->",
    r"`[^`\n]+`",
    r"\]\([^)]*\)",  # where a link leads
    r"\b\d{4}\.\d{4,5}\b",  # arXiv
    r"standard\serror\sof\s[^.;]*?\d[\d.]*\spoints?",  # arithmetic on the number of images
)


def unexplained(text: str, allowed: str | None = None) -> list[str]:
    """What looks measured in a page and comes from no file; ``allowed`` is the heading of a section left out."""
    kept = text
    for pattern in NOT_PROSE:  # blanked out, so that places stay
        kept = re.sub(pattern, blank, kept, flags=re.DOTALL | re.MULTILINE)
    if allowed is not None:
        section = re.compile(rf"^{re.escape(allowed)}$.*?(?=^#|\Z)", re.DOTALL | re.MULTILINE)
        if not section.search(kept):
            return [f"allowed, but not there any more: {allowed!r}"]
        kept = section.sub(blank, kept)
    numbers = [number for row in ROW.finditer(kept) for number in IN_A_TABLE.finditer(kept, row.start(), row.end())]
    numbers += IN_PROSE.finditer(ROW.sub(blank, kept))
    return [
        f"line {text.count(chr(10), 0, number.start()) + 1}: {number[0].strip()!r} comes from no file in results/"
        for number in sorted(numbers, key=lambda number: number.start())
    ]


def blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", "\0", match[0])


@pytest.mark.parametrize("page", PAGES)
def test_measured_numbers_come_from_files(page):
    problems = unexplained(PAGES[page], ALLOWED.get(page))
    assert not problems, f"{page}: mark them (scripts/publish/values.py)\n" + "\n".join(problems)


@pytest.mark.parametrize(
    "text",
    [
        "It reaches 67.9 % there.",
        "It gains 4 points.",
        "It loses half a point.",
        "12.3 ± 4",
        "− 0.4 to −0.1 points",
        "97\n% of all",
        "<!-- = ease accuracy_last --> 67.9 %",  # a blank too many: the mark writes another number before it
        "\n| ours | 104 |\n",
        "\n| ours | takes 11.4 against 10.6 ms per image |\n",
        "\n| ours | 3x faster |\n",
        "\n| ours | about two and a half minutes |\n",
        "\n| ours | 219 MB |\n",
        "\n| ours | differs by 1e-05 |\n",
        "\n| ours | a share of 0.98 |\n",
        "<!-- table: results/reference/quickstart -->\n| 1.0 |\n",  # without an end
    ],
)
def test_numbers_that_look_measured_are_found(text):
    assert unexplained(f"# Title\n\nBefore. {text} After.\n")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- = ease accuracy_last -->67.9 % and <!-- = min lae_* accuracy_last -->−1.0 points",
        "\n```\nlr: 0.1  # 67.9 %\n```\n",
        "with `lr: 0.1` (arXiv 2303.07338)",
        "[two](https://example.org/1.5%20s)",
        "500 images of 10 classes in 5 tasks",
        "4.7 MB per class for F = 768, two passes per image, λ = 0.1, about 3 minutes",
        "its standard error is large: a standard error of up to 1.5 points",
        "\n| 224 pixels, four blocks | B0 Inc10 |\n",
        "\n| ours | <!-- = ease accuracy_last -->67.9 % |\n",
        "\n<!-- table: results/reference/quickstart -->\n| 81.6 ± 0.1 |\n<!-- /table -->\n",
    ],
)
def test_other_numbers_are_not_found(text):
    assert not unexplained(f"# Title\n\nBefore {text} after.\n")


def test_a_section_is_allowed_and_nothing_else():
    text = "# Title\n\nIt has 67.9 %.\n\n## Published\n\n| 92.3 |\n\n## More\n\n| 1.5 |\n"
    assert unexplained(text, "## Published") == [
        "line 3: '67.9 %' comes from no file in results/",
        "line 11: '1.5' comes from no file in results/",
    ]
    assert unexplained("# Title\n", "## Published") == ["allowed, but not there any more: '## Published'"]


@pytest.mark.parametrize("page", PAGES)
def test_every_comment_is_a_mark(page):
    known = (
        rf"{values.MARK.pattern}|<!-- (\w+: \S+|/table|/?(?:methods|tuners|rules|finalisers)|--8<-- \[\w+:[\w-]+\]) -->"
    )
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
    command = ["git", "check-ignore", "--stdin"]
    found = subprocess.run(command, cwd=root, input=names, capture_output=True, text=True, timeout=60)
    assert found.returncode in (0, 1), found.stderr
    return found.stdout.split()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_files_behind_the_pages_are_published():
    files = {file for text in PAGES.values() for file in named(text, ROOT)}
    assert len(files) > 50 and ROOT / "results" / "tutorial" / "steps.json" in files
    assert not ignored(files, ROOT)


def test_a_file_that_git_ignores_is_found(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True, timeout=60)
    (tmp_path / ".gitignore").write_text("/results/*\n!/results/bench/\n")
    for name in ("bench/a.json", "mine/ncm/order1993-seed0/metrics.json", "mine/b.png"):
        (tmp_path / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / name).write_text("{}")
    text = "Of <!-- = bench/a.json x --> and <!-- = mine/ncm seconds -->.\n![picture](results/mine/b.png)\n"
    files = named(text + "\n<!-- table: results/mine -->\n<!-- /table -->\n", tmp_path)
    assert len(files) == 3
    assert ignored(files, tmp_path) == ["results/mine/b.png", "results/mine/ncm/order1993-seed0/metrics.json"]
