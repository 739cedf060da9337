"""Every command in README, docs and results/README is executed; the site builds strictly, from local files alone.

A block without a language or with ``sh`` holds commands, one a line, and so does inline code that starts with a
program's name and says more than a command's name. All commands of a page run in order in one folder, which holds what
a reader would have by then (:func:`place`). The digits are few here. What would still take long or needs a network is
shortened by :data:`SHORTENED` and :data:`REPLACED`, and what another part of CI executes is named in :data:`ELSEWHERE`;
anything not listed there runs as it is written.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from marks import slow_beyond
from PIL import Image
from safetensors.torch import save_file
from typer.main import get_command

from cil.cli import app, main
from cil.config import Config
from cil.data import sources
from cil.data.images import subset
from cil.learners import registry

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "results" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = ("cil", "python", "accelerate", "tensorboard", ".venv/bin/cil", ".venv/bin/tensorboard")

REPLACED = {
    r"^\.venv/bin/": "",
    r"^git clone ADDRESS ": f"git clone --quiet --depth 1 file://{ROOT} ",
    r"results/reference/(<name>|split_\S+)": "results/reference/quickstart",
    r"--reject 0\.05": "--reject 0.1",  # the digits are few here, and so are the held-out ones
    r"^tensorboard ": "tensorboard --inspect ",  # a server that ends by itself
}
"""Pattern → what stands in its place."""

FEW_DIGITS = "data.dataset=digits data.root=null data.train=null data.test=null stream.increment=5 'orders=[1993]'"
SMALL = "precision=fp32 backbone.weights=random 'backbone.options={depth: 2}'"
EMBEDDED = "backbone.name=vit_tiny_patch8_64.tinyimagenet100 transform.resize=null"
SHORTENED = {
    r"^cil run quickstart$": "'orders=[1993]' learners.finetune.epochs=1 learners.joint.epochs=1",
    r"^cil run quickstart .*\bmy_rule\b": "learners.average.epochs=1 learners.mean_direction.epochs=1",
    r"^cil run quickstart .*\bmy_tuner\b": "learners.aper_shift.epochs=1",
    r"^cil run quickstart .*\branpac\b": "learners.ranpac.projection=64",
    r"^cil run quickstart .*\blayers\b": "data.per_class=9",
    r"^cil run quickstart .* confidence=true": "stream.validation=0.3",
    r"^cil run my_benchmark.yaml": "learners.ranpac.projection=64 'orders=[1993]'",
    r"^cil run my\.yaml": f"{FEW_DIGITS} {EMBEDDED} 'orders=[1993]' 'seeds=[0]' "
    "learners.finetune.epochs=1 learners.joint.epochs=1",
    r"^cil run cifar100/ranpac_b0_inc10": f"{FEW_DIGITS} {EMBEDDED} 'learners=[{{name: ranpac, projection: 64}}]'",
    r"^cil run split_tiny_imagenet100/": FEW_DIGITS,
    r"^cil run split_tiny_imagenet100/frozen": "learners.ranpac.projection=64 learners.loranpac.projection=64 "
    "learners.layer_lda.layers=last",
    r"^cil run split_tiny_imagenet100/bounds": "learners.finetune.epochs=1 learners.joint_probe.epochs=1 "
    f"learners.joint.epochs=1 {SMALL}",
    r"^cil run split_tiny_imagenet100/layers": SMALL,
    r"^cil run split_tiny_imagenet100/confidence": f"learners.ranpac_2000.projection=64 {SMALL}",
    r"^cil run split_tiny_imagenet100/one_default": "learners.layer_lda.layers=last 'orders=[1993]'",
    r"^cil run split_tiny_imagenet100/orders": "'learners=[fecam]'",
    r"^cil run split_tiny_imagenet100/defaults": "'learners=[ncm, fecam]'",
    r"^cil run split_tiny_imagenet100/long ": "'learners=[ncm, fecam]'",
    r"^cil run split_tiny_imagenet100/long_chosen": "'learners=[{name: slda, label: slda_chosen, shrinkage: 0.01}]'",
    r"^cil run split_tiny_imagenet100/records": "'learners=[ncm, {name: loranpac, projection: 64}]'",
    r"^cil run split_tiny_imagenet100/matrix": f"'learners=[{{name: merge, label: lora_opcm_ncm, epochs: 1}}]' {SMALL}",
    r"^cil run split_tiny_imagenet100/min": "'learners=[ncm]'",
    r"^cil run split_tiny_imagenet100/few_shots": "stream.initial_classes=0 stream.shots=2 'learners=[ncm]'",
    r"^cil run split_tiny_imagenet100/long_tail": "'learners=[ncm]'",
    r"^cil run split_tiny_imagenet100/(blurry|online)": "stream.increment=null stream.tasks=2 'learners=[ncm]'",
    r"^cil run split_tiny_imagenet100/noisy": "'learners=[{name: ncm, noise_filter: {by: knn}}]'",
    r"^cil run (cifar10|digits)/": FEW_DIGITS,
    r"^cil run digits/reuse": "'learners=[{name: finetune, anchor: l2, epochs: 1}]' data.per_class=4 "
    "backbone.weights=random 'backbone.options={img_size: 32, depth: 2}'",
    r"^cil run (cifar10|digits)/(defaults|frozen)": "'learners=[ncm, fecam]'",
    r"^cil run (cifar10|digits)/chosen": "'learners=[{name: slda, label: slda_chosen, shrinkage: 0.01}]'",
    r"^cil run .*my_dataset.py:load": "'data.options={per_class: 4}'",
    r"^cil sweep ": "data.per_class=3 backbone.weights=random 'backbone.options={depth: 1}' --orders 1993 --jobs 1",
    r"^cil sweep .*\branpac\b": "learners.ranpac.projection=64",
    r"^python -m \S+bench\.l2p": "--rounds 1 --per-class 2",
    r"^python -m \S+bench\.throughput": "--quick --sizes tiny --images 4 --tuners adapter --out bench",
    r"^python -m \S+bench\.growth": "--quick --heads ncm --out bench",
    r"^python -m \S+bench\.long": "--train pictures/train --test pictures/val --classes 1 --projection 16 --out bench",
    r"^python -m \S+bench\.steps": "--learners linear_probe --model vit_tiny_patch16_224 --out steps.json",
    r"^python -m \S+bench\.step_variants": "--tuners adapter --variants same --images 2 --pairs 1 --out steps.json",
    r"^python -m \S+bench\.startup": "--cases 'list of learners' --pairs 1 --out startup.json",
    r"^python -m \S+bench\.pilot": "--small --per-class 2 --learners simplecil --out pilot.json",
    r"^python -m \S+bench\.wide": "--widths 16 --heads ncm --out wide.json",
    r"^python -m \S+bench\.factor": "--projection 64 --rows 8 --out factor.json",
    r"^python -m \S+bench\.records": "--tasks 8 --out records.json",
    r"^python -m \S+bench\.merge": "--small --tasks 2 --repeats 1 --out bench",
    r"^python -m \S+\.reproduce": "--streams quickstart --render",
    r"^python -m \S+\.study_backbones": f"{FEW_DIGITS} --variants --per-class 3 --projection 9 --work w --out b.json",
    r"^python -m \S+\.departures": f"{FEW_DIGITS} --methods coda_prompt --orders 1993 --variants ours --out d.json",
    r"^python -m \S+\.covariance_rank": f"{FEW_DIGITS} --ranks 2 --out c.json",
    r"^python -m \S+studies\.banks": f"{FEW_DIGITS} {SMALL} data.per_class=2 learners.merge.epochs=1 --orders 1993 "
    "--images 1 --out banks",
    r"^python -m \S+studies\.families": "--only 'deit_tiny_patch*'",
    r"^python -m \S+studies\.reusing": "--streams digits --learners finetune --seconds 0 --images 2 1 2 --out r.json",
    r"^python -m \S+\.ablate_merging": f"{FEW_DIGITS} {SMALL} learners.merge.epochs=1 --orders 1993 "
    "--rules average opcm",
}
"""Pattern → arguments that are added; every pattern that matches counts."""

ELSEWHERE = {
    r"^python3 -m venv \.venv$": (".ci/run", "python3 -m venv"),
    r"^(\.venv/bin/)?pip install": (".ci/run", ".venv/bin/pip install"),
    r"^(\.venv/bin/)?python -m pytest -q -n 2 --dist loadfile -m 'not slow'$": (
        ".ci/run",
        "README.md holds no test line",
    ),
    r"^\. \.venv/bin/activate$": (".ci/run", ".venv/bin/cil"),
    r"^(\.venv/bin/)?cil tensorboard ": ("tests/test_board.py", "def test_it_serves_and_stops"),
    r"^cil teach ": ("tests/test_teach_page.py", "def test_a_signal_ends_it_after_the_lesson"),
    r"^cil prepare-data ": ("tests/test_prepare.py", 'app, ["prepare-data"'),
    r"^python -m scripts\.bench\.heads$": ("tests/test_bench.py", "def test_heads"),
    r"^accelerate launch ": ("tests/test_processes.py", "accelerate.commands.launch"),
    r"^python -m scripts\.publish\.slim --check$": ("tests/test_slim.py", 'slim.main(["--check"])'),
}
"""Pattern → the file that executes such a command, and a text in it."""


class Command(NamedTuple):
    page: Path
    text: str


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, title, content) of a page's fenced blocks; a text between two of them is ("inline", "", text)."""
    found, text, fence = [], [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("```"):
            text.append(line)
            continue
        language, title = fence or ("inline", "")
        found.append((language, title, "\n".join(text)))
        info = re.match(r'```(\w*)(?: title="(.*)")?$', line)
        assert info, f"{page}: {line}"
        text, fence = [], None if fence else (info[1], info[2] or "")
    assert fence is None, f"{page}: a block does not end"
    return [*found, ("inline", "", "\n".join(text))]


def commands_in(language: str, content: str) -> list[str]:
    if language == "inline":
        spans = [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", content)]
        return [span for span in spans if span.split(" ")[0] in PROGRAMS and not is_name(span)]
    if language not in ("", "sh"):
        return []
    lines = [shlex.join(shlex.split(line, comments=True)) for line in content.splitlines()]
    return [part for line in lines if line for part in line.split(" '&&' ")]


def is_name(span: str) -> bool:
    """``cil run`` is the name of a command, not one to give; and so is a program's."""
    words = span.split(" ")
    return len(words) == 1 or words == ["accelerate", "launch"] or (words[0] == "cil" and len(words) == 2)


EVERY = [
    Command(page, text)
    for page in PAGES
    for language, _, content in blocks(page)
    for text in commands_in(language, content)
]


def changed(text: str) -> tuple[str | None, list[str]]:
    """The command as it is run here, None if it is run elsewhere; and the patterns that made it so."""
    used = [pattern for pattern in ELSEWHERE if re.search(pattern, text)]
    if used:
        return None, used
    for pattern, new in REPLACED.items():
        if re.search(pattern, text):
            used.append(pattern)
            text = re.sub(pattern, new, text)
    longer = [pattern for pattern in SHORTENED if re.search(pattern, text)]
    return " ".join([text, *(SHORTENED[pattern] for pattern in longer)]), used + longer


def executed(text: str) -> str | None:
    return changed(text)[0]


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    """Three training images and two test images of each digit."""
    whole = sources.digits

    def few(split):
        source = whole(split)
        first = sources.rank_in_class(source.labels) < (3 if split == "train" else 2)
        return subset(source, np.flatnonzero(first), "few")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "digits", few)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory, few_digits):
    """What a reader of all pages has at hand: their files, a photo, pictures in class folders and lists, checkpoints,
    and what the one line at the top of the README has left in ``results/``."""
    place = tmp_path_factory.mktemp("reader")
    rng = np.random.RandomState(0)

    def picture(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.randint(0, 256, (40, 50, 3)).astype(np.uint8)).save(path)

    picture(place / "photo.png")
    for split, listed in (("train", "train"), ("val", "test")):
        rows = [(f"{split}/{name}/{i}.png", name) for name in ("ant", "bee", "cat", "dog") for i in range(4)]
        for file, _ in rows:
            picture(place / "pictures" / file)
        (place / "pictures" / f"{listed}.csv").write_text("".join(f"{file},{name}\n" for file, name in rows))
    names = [f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("attn.proj", "mlp.fc1")]
    base = {name: torch.randn(4, 4) for name in names}
    models = {"base": base, **{f"task{t}": {k: v + torch.randn(4, 4) for k, v in base.items()} for t in (1, 2)}}
    for name, weights in models.items():
        save_file(weights, place / f"{name}.safetensors")
        shelf = place / ("vit" if name == "base" else name)
        shelf.mkdir()
        save_file(weights, shelf / "model.safetensors")
    photographs(place / "cifar10_train.tar", picture)
    shutil.copytree(ROOT / "results" / "reference" / "quickstart", place / "results" / "reference" / "quickstart")
    (place / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "renditions.py", place / "examples")
    yaml, *_ = [content for language, _, content in blocks(ROOT / "README.md") if language == "yaml"]
    (place / "my.yaml").write_text(yaml, encoding="utf-8")
    for title, content in ((title, content) for page in PAGES for _, title, content in blocks(page) if title):
        (place / title).write_text(content + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        run(executed("cil run quickstart") or "", patch)
    return place


REAL = Path(os.environ.get("CIL_DATA", ROOT.parent / "shared" / "data")) / "cifar10_train.tar"


def photographs(file: Path, picture) -> None:
    """The first 62 images of the five classes of CIFAR-10 that docs/growing.md uses; noise where there are none."""
    names = [f"{name}/{i:04d}.jpg" for name in ("cat", "dog", "frog", "horse", "ship") for i in range(62)]
    with tarfile.open(file, "w") as out:
        if REAL.exists():
            with tarfile.open(REAL) as tar:
                for name in names:
                    out.addfile(tar.getmember(name), tar.extractfile(name))
            return
        for name in names:
            picture(file.parent / name)
            out.add(file.parent / name, name)
        for name in {Path(name).parts[0] for name in names}:
            shutil.rmtree(file.parent / name)


@pytest.fixture
def place(folder, tmp_path, monkeypatch):
    """A copy of the reader's folder to work in."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    examples = str(ROOT / "examples")  # importable once a test has loaded one; not there for a reader
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != examples])
    monkeypatch.syspath_prepend(str(tmp_path))
    for file in tmp_path.glob("*.py"):  # a test's helper of the same name would be run in its place
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    known, path = set(sys.modules), list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def run(command: str, monkeypatch) -> None:
    program, *arguments = shlex.split(command)
    if program == "cil":
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, command
    elif program == "python":
        assert arguments[0] == "-m", command
        monkeypatch.setattr(sys, "argv", arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        start = [sys.executable, "-m", "tensorboard.main"] if program == "tensorboard" else [program]
        subprocess.run([*start, *arguments], check=True, timeout=300)


def with_commands() -> list[Path]:
    return [page for page in PAGES if any(command.page == page and executed(command.text) for command in EVERY)]


@pytest.mark.parametrize(
    "page", slow_beyond([ROOT / "README.md"], with_commands()), ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_command_runs(page, place, monkeypatch, capsys):
    """A block ``text`` behind commands is what they print, where the images are there that it was printed for."""
    printed = ""
    for _, title, _ in blocks(page):
        if title:  # what this page makes is not there before it does
            (place / title).unlink()
    for language, title, content in blocks(page):
        if title:
            (place / title).write_text(content + "\n", encoding="utf-8")
        if page.name == "README.md" and content.startswith("# mine.py"):
            (place / "mine.py").write_text(content, encoding="utf-8")
        if language == "text" and printed and REAL.exists():
            assert masked(printed) == masked(content)
        if content.strip():
            printed = ""
        for text in commands_in(language, content):
            command = executed(text)
            if command is not None:
                print(f"$ {command}")
                capsys.readouterr()
                run(command, monkeypatch)
                printed += capsys.readouterr().out


VARIES = {
    r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(:\d\d[+-]\d\d:\d\d)?": "TIME",
    r"\d+\.\d+ [kMG]B": "SIZE",
    r"\d\.\de-\d\d": "SMALL",
    r"\(-?\d+\.\d{3}\)": "(SCORE)",
    r"[ \n]+": " ",
}
"""What a command prints differently each time, or on another machine → what stands in its place."""


def masked(text: str) -> str:
    for pattern, new in VARIES.items():
        text = re.sub(pattern, new, text)
    return text.strip()


def test_the_lists_of_exceptions_are_not_stale():
    used = {pattern for command in EVERY for pattern in changed(command.text)[1]}
    assert used == {*REPLACED, *SHORTENED, *ELSEWHERE}
    for place, needle in ELSEWHERE.values():
        assert needle in (ROOT / place).read_text(encoding="utf-8"), (place, needle)


def test_commands_are_found_where_they_stand():
    """The collector itself: blocks, chains, comments, inline code over two lines, and names that are no commands."""
    pages = {page: [command.text for command in EVERY if command.page == page] for page in PAGES}
    readme, benchmark = pages[ROOT / "README.md"], pages[ROOT / "docs" / "benchmark.md"]
    assert ".venv/bin/cil run quickstart" in readme and "cil run cifar100/ranpac_b0_inc10" in benchmark
    assert "cil predict results/quickstart/ncm/order1993-seed0 photo.png" in benchmark
    assert "cil run" not in benchmark and "cil sweep" not in benchmark
    assert any("orders=[1993, natural]" in text for text in pages[ROOT / "results" / "README.md"])
    assert len(EVERY) > 40


def test_names_of_commands_exist():
    known = set(get_command(app).commands)
    for page in PAGES:
        for _, _, content in blocks(page):
            for name in re.findall(r"(?<![\w./-])cil ([a-z][a-z-]+)", content):
                if re.search(rf"`cil {name}\b", content):
                    assert name in known, f"{page.name}: cil {name}"


PYTHON = [
    page
    for page in PAGES
    if page.parent in (ROOT, ROOT / "docs") and any(b[:2] == ("python", "") for b in blocks(page))
]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_python_on_a_page_runs(page, place):
    """Blocks without a title, one after the other in one namespace; with a title they are files."""
    scope = {"__name__": page.stem}
    for language, title, content in blocks(page):
        if language == "python" and not title:
            exec(compile(content, page.name, "exec"), scope)  # noqa: S102
    if page.name == "your_own_rule.md":
        torch.testing.assert_close(scope["merged"], torch.tensor([[0.8, 0.8], [0, 0]]) / 2**0.5)
    if page.name == "layers.md":
        assert [part.shape[1] for part in scope["parts"]] == [192] * 7
    if page.name == "your_own_tuner.md":
        assert scope["features"].requires_grad
    if page.name == "your_own_classifier.md":
        assert (scope["predicted"].numpy() == scope["labels"]).mean() > 0.8


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return out


@pytest.mark.slow
def test_every_learner_has_a_whole_page(site):
    for name, cls in ((name, registry.resolve(name)) for name in registry.BUILTIN):
        html = (site / "learners" / f"{name}.html").read_text(encoding="utf-8")
        for part in ("equation", "cost", "departures-from-other-implementations", "hyper-parameters"):
            assert f'id="{part}"' in html, (name, part)
        missing = [key for key in cls.Config.model_fields if f"<code>{key}</code>" not in html]
        assert not missing, (name, missing)


@pytest.mark.slow
def test_every_reference_run_is_on_its_learners_page(site):
    from cil import results

    for run in results.find([ROOT / "results" / "reference"]):
        html = (site / "learners" / f"{run['config']['learners'][0]['name']}.html").read_text(encoding="utf-8")
        assert f"<td>{run['learner']}</td>" in html, run["learner"]


@pytest.mark.slow
def test_reference_pages_name_every_command_and_key(site):
    commands, keys = ((site / page).read_text(encoding="utf-8") for page in ("cli.html", "configuration.html"))
    assert all(f"<code>cil {name}</code>" in commands for name in get_command(app).commands)
    assert all(f"<code>{key}</code>" in keys for key in Config.model_fields)


@pytest.mark.slow
def test_the_site_fetches_nothing(site):
    """No script, style, font or picture from another host; links for people are another matter."""
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:script|img|link|iframe)[^>]*?(?:src|href)="((?:https?:)?//[^"]*)"', html)
        assert not fetched, (page.name, fetched)


@pytest.mark.slow
def test_every_picture_and_file_the_site_leads_to_is_there(site):
    seen = set()
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        for place in re.findall(r'<(?:img|a|link|script)[^>]*?(?:src|href)="([^"#?:]+)["#?]', html):
            below = site if place.startswith("/") else page.parent  # 404.html is shown at any address
            assert (below / place.lstrip("/")).exists(), (page.name, place)
            seen.add(place)
    assert any(place.endswith("split_tiny_imagenet100_long/compare.png") for place in seen)
    assert any(place.endswith(".json") for place in seen)
