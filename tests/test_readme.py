"""What README, docs and results/ say is what the files say. Commands and Python blocks: ``test_docs.py``."""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from cil import results
from scripts.publish import tables

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_tables_come_from_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    monkeypatch.setattr(results, "read_run", cache(results.read_run))  # several tables show the same runs
    assert tables.main() == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "runs"), [("README.md", [10]), ("docs/benchmark.md", [10]), ("docs/avalanche.md", [2])]
)
def test_the_yaml_on_a_page_is_valid(page, runs, tmp_path):
    from cil.config.reading import load_config
    from cil.runner.plan import plans

    found = []
    for block in re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
        (tmp_path / "my.yaml").write_text(block, encoding="utf-8")
        found.append(len(list(plans(load_config(str(tmp_path / "my.yaml"))))))
    assert found == runs


def test_the_readme_fits_on_a_first_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


LINKING = [ROOT / "README.md", ROOT / "results" / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_links_to_exist(page):
    """In the repository; on the site ``test_docs.py`` follows the links."""
    text = re.sub(r"`[^`\n]+`", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tuner_on_its_page_runs(tmp_path, monkeypatch):
    import timm
    from peft import PeftModel

    from cil.backbone import embedded_card, load_backbone

    text = (ROOT / "docs" / "tuners.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(code, "tuners.md", "exec"), scope)  # noqa: S102
    assert scope["features"].shape == (2, 192) and scope["features"].requires_grad
    plain = timm.create_model(**embedded_card()["timm_create_model"])
    plain.load_state_dict(load_backbone().model.state_dict())
    opened = PeftModel.from_pretrained(plain.eval(), str(tmp_path / "my-lora")).eval()
    with torch.inference_mode():
        torch.testing.assert_close(opened(scope["images"]), scope["features"].detach(), atol=1e-5, rtol=1e-4)


def test_the_merge_on_its_page_runs():
    text = (ROOT / "docs" / "merging.md").read_text(encoding="utf-8")
    code, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)  # the second one is run by tests/test_docs.py
    scope: dict = {}
    exec(compile(code, "merging.md", "exec"), scope)  # noqa: S102
    model, pretrained = scope["model"], scope["pretrained"]
    torch.testing.assert_close(model.blocks[0].weight.data, pretrained["blocks.0.weight"] + 0.5)
    torch.testing.assert_close(model.blocks[1].weight.data, pretrained["blocks.1.weight"] + 1)
