"""Follow docs/your_own_learner.md literally in an empty folder, and record the seconds of every step.

Clones this checkout, makes a virtual environment, installs, and runs every command of the page with the files that it
shows. Commands that need the reader's own images or run until stopped (TensorBoard) are left out. Writes ``steps.json``
and every run's ``metrics.json``, in the published form, to results/tutorial; ``scripts.publish.tables`` puts them into
docs/tried.md and the page itself. Needs a network for pip, and some minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from scripts import ROOT
from scripts.publish import slim

PAGE = ROOT / "docs" / "your_own_learner.md"
LEFT_OUT = r"tensorboard |cil run my_benchmark\.yaml"
FENCE = re.compile(r'^```(\w+)(?: title="(.*?)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def steps(page: Path) -> Iterator[tuple[str, str]]:
    """("file NAME", content) and ("$", command) in the order of the page."""
    for language, title, content in FENCE.findall(page.read_text(encoding="utf-8")):
        if title:
            yield f"file {title}", content
        elif language == "sh":
            yield from (("$", line) for line in content.splitlines() if not re.match(LEFT_OUT, line))


def follow(place: Path) -> list[dict[str, str | float]]:
    """The commands and the seconds each took.

    Raises:
        subprocess.CalledProcessError: A command of the page failed.
    """
    found = []
    with subprocess.Popen(["bash"], cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdin and shell.stdout
        for kind, text in steps(PAGE):
            if kind != "$":
                (place / kind.removeprefix("file ")).write_text(text, encoding="utf-8")
                continue
            print("$", text, flush=True)
            started = time.perf_counter()
            shell.stdin.write(f"{{ {text.replace('ADDRESS', ROOT.as_uri())}; }} >&2; echo $?\n")
            shell.stdin.flush()
            code = int(shell.stdout.readline())
            seconds = time.perf_counter() - started
            if code:
                raise subprocess.CalledProcessError(code, text)
            found.append({"command": text, "seconds": round(seconds, 1)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=slim.TUTORIAL, help="folder for the record")
    parser.add_argument("--note", default="", help="remark on the machine, e.g. that it was busy")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        timed = follow(place)
        for run in sorted((place / "results").rglob("metrics.json")):
            kept = args.out / run.parent.relative_to(place / "results")
            kept.mkdir(parents=True, exist_ok=True)
            shutil.copy(run, kept)
        slim.publish(args.out)
    facts = {"platform": platform.platform(), "python": platform.python_version(), "note": args.note}
    record = json.dumps({"date": time.strftime("%Y-%m-%d"), **facts, "steps": timed}, indent=1)
    (args.out / "steps.json").write_text(record + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
