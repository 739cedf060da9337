"""The page of a comparison: what is in it without a browser, and what a browser draws and does with it."""

from __future__ import annotations

import html
import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import chromium
from comparisons import falling, write

from cil import report
from cil.report import figures, webpage

ASSETS = Path(webpage.__file__).parent / "assets"
EVIL = "</script><script>document.title='broken'</script>&amp;"


class Reader(HTMLParser):
    """Texts of the ranked tables' cells, every script's content, and addresses of anything a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.scripts, self.addresses, self._inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag in ("td", "th"):
            self.cells.append("")
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self._inside in ("td", "th"):
            self.cells[-1] += data
        if self._inside == "script":
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self._inside = None


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Fourteen learners, one of them with three runs, bounds, an unfinished one and one with a hostile name."""
    root = tmp_path_factory.mktemp("bench")
    for i in range(9):
        write(
            root, f"learner{i}", falling(80 - 2 * i), costs={"seconds": 10.0 ** (i % 4), "parameters": 10**i * (i > 3)}
        )
    for order, count in ((1, 60), (2, 64), (3, 59)):
        write(root, "thrice", falling(count), order)
    for name, count in (("finetune", 5), ("joint", 88)):
        write(root, name, falling(count), stores_images=name == "joint")
    write(root, "begun", falling(60, stages=2))
    write(root, EVIL.replace("/", "_"), falling(55), parameters={"note": EVIL})
    write(root / "other", EVIL.replace("/", "_"), falling(50), parameters={"note": "plain"})
    return root


@pytest.fixture(scope="module")
def text(bench):
    return report.page(report.compare_runs([bench]))


def data_of(text):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_data_are_the_runs(bench, text):
    [section] = data_of(text)
    [compared] = report.compare_runs([bench])
    assert [row["title"] for row in section["rows"]] == [row.title for row in compared.rows]
    thrice = next(row for row in section["rows"] if row["title"] == "thrice")
    runs = next(row for row in compared.rows if row.title == "thrice").runs
    seen = 100 * np.array([run["curves"]["accuracy/seen"] for run in runs])
    np.testing.assert_allclose(thrice["curves"]["accuracy/seen"]["mean"], seen.mean(0), atol=1e-3)
    np.testing.assert_allclose(thrice["curves"]["accuracy/seen"]["std"], seen.std(0, ddof=1), atol=1e-3)
    assert thrice["curves"]["forgetting/mean"]["mean"][0] is None
    assert thrice["accuracy"] == pytest.approx(seen[:, -1].mean(), abs=1e-3)
    assert thrice["spread"] == pytest.approx(seen[:, -1].std(ddof=1), abs=1e-3)
    assert thrice["costs"]["seconds"] == 3.0 and thrice["costs"]["kept_bytes"] == 1.0  # minutes and MiB
    assert [(run["order"], run["seed"]) for run in thrice["runs"]] == [("1", 0), ("2", 0), ("3", 0)]
    assert thrice["runs"][1]["seen"] == [[90.0], [64.0, 90.0], [64.0, 64.0, 90.0]]
    assert thrice["runs"][1]["within"] == [[95.0], [69.0, 95.0], [69.0, 69.0, 95.0]]
    assert {row["title"] for row in section["rows"] if not row["finished"]} == {"begun"}


def test_the_table_needs_no_script(bench, text):
    [compared] = report.compare_runs([bench])
    found = Reader(text).cells
    expected = report.cells(compared, compared.shown(report.COLUMNS))
    assert found[: sum(map(len, expected))] == [cell for row in expected for cell in row]
    assert "<noscript>" in text


def test_nothing_is_fetched_and_no_name_breaks_out(text):
    read = Reader(text)
    assert read.addresses == [] and len(read.scripts) == 2
    assert not re.search(r"url\(|@import|import\s*\(|fetch\(|XMLHttpRequest|WebSocket", text)
    assert [a for a in re.findall(r"https?://[\w./]+", text) if a != "http://www.w3.org/2000/svg"] == []
    assert "default-src 'none'" in text
    assert EVIL not in text and any(EVIL in row["title"] for row in data_of(text)[0]["rows"])


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_lines_and_text_stand_out_in_light_and_dark(text):
    """WCAG 2: 3 : 1 for what is drawn, 4.5 : 1 for text."""
    style = text[text.index("<style>") : text.index("</style>")]
    blocks = re.findall(r"(@media \(prefers-color-scheme: dark\) ?\{\s*)?:root ?\{(.*?)\}", style, re.DOTALL)
    light, dark = ({k: v for found, block in blocks if bool(found) is is_dark
                    for k, v in re.findall(r"--([\w-]+): ?(#\w{6})", block)} for is_dark in (False, True))  # fmt: skip
    lines = {f"line-{i}" for i in range(len(figures.CYCLE))} | {f"line-{name}" for name in figures.BOUNDS}
    for scheme in (light, dark):
        assert lines <= scheme.keys()
        assert all(contrast(scheme[name], scheme["paper"]) >= 3 for name in lines)
        assert all(
            contrast(scheme[k], scheme[on]) >= 4.5 for k in ("ink", "soft", "accent") for on in ("paper", "raised")
        )
    assert all(contrast(dark[name], dark["paper"]) >= 4.5 for name in lines)


def test_assets_are_in_the_package():
    assert {f.name for f in ASSETS.iterdir()} == {"page.html", "page.css", "charts.js", "scatter.js", "page.js"}
    assert "</script" not in "".join((ASSETS / f).read_text() for f in ("charts.js", "scatter.js", "page.js"))


def test_several_protocols_are_sections_with_data_of_their_own(tmp_path):
    write(tmp_path / "a", "first", falling(60))
    write(tmp_path / "b", "second", falling(70), tested_on="validation")
    text = report.page(report.compare_runs([tmp_path]))
    assert [[row["title"] for row in one["rows"]] for one in data_of(text)] == [["first"], ["second"]]
    assert text.count("<section") == 2 and text.count("Not to be ranked with the others: tested on") == 2


PROBE = (Path(__file__).parent / "compare_probe.js").read_text(encoding="utf-8")


# a window is never narrower than 500 pixels, a frame is as narrow as one says; messages pass where documents do not
FRAME = """<!doctype html><iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe><script>
addEventListener("message", (e) => document.body.replaceChildren(Object.assign(document.createElement("pre"),
  {{ id: "probe", textContent: e.data }})));</script>"""


def in_chromium(text, place, width=1280, dark=False):
    """Open the page from disk in a frame of that width and bring back what the probe found."""
    program = chromium("what a browser draws")
    errors = "<script>const errors = []; addEventListener('error', (e) => errors.push(e.message));</script>"
    (place / "page.html").write_text(
        text.replace("<title>", errors + "<title>", 1).replace("</body>", f"<script>{PROBE}</script></body>")
    )
    file = place / "frame.html"
    file.write_text(FRAME.format(width=width))
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={place / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=5000"]
    command += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=90)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def test_a_browser_draws_and_answers(bench, text, tmp_path):
    found = in_chromium(text, tmp_path)
    [compared] = report.compare_runs([bench])
    titles = [row.title for row in compared.rows]
    assert found["errors"] == [] and found["title"] != "broken"
    assert found["width"][0] <= found["width"][1]  # nothing sticks out to the right
    # of fifteen: the eight best, joint among them, and finetune
    assert found["drawn"] == [9, 9, 9]
    assert len(found["points"].split()) == 3 and found["bounds"] == ["6 4", "6 4"]
    assert found["labels"] > 3
    assert found["matrix"] == ["90", "88", "90", "88", "88", "90"]  # joint, the first of the table
    assert found["toggled"] == [9, 9, 9]  # one more, one less
    assert "learner8" in found["pressed"] and "learner0" not in found["pressed"]
    assert found["everything"] == [15, 15, 14]  # the unfinished one has curves, and no A_last
    readout, active, focused = found["hover"]
    assert active == "finetune" and focused and readout.startswith("stage 3") and "33.3finetune" in readout
    assert found["left"] == ["", None]
    assert found["keys"] == [2, titles[2]]
    assert found["metric"] == "forgetting/within_task"
    assert found["scales"] == [[key, 14, True] for key in webpage.COSTS]
    assert "%" in found["dot"]
    ascending = [row.title for row in report.rank(compared.rows, report.NAMED["forgetting"])]
    assert found["sorted"] == [ascending, "ascending"]
    assert found["reversed"][1] == "descending" and found["reversed"][0][0] == "finetune"
    assert found["reversed"][0][-1] == "begun"  # unfinished: last whichever way
    assert found["within"] == ["95", "69", "95", "69", "69", "95"]
    assert found["none"] == [[0, 0, 0], 3]


def test_a_narrow_dark_screen_holds_the_page(text, tmp_path):
    found = in_chromium(text, tmp_path, width=360, dark=True)
    assert found["errors"] == [] and found["drawn"] == [9, 9, 9]
    assert found["width"][0] <= found["width"][1] <= 360
    assert found["paper"] == "rgb(22, 24, 28)" and found["joint"] == "rgb(242, 242, 242)"
