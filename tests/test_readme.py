"""What README and results/ say is what the files say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_come_from_results():
    found = subprocess.run([sys.executable, "scripts/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_learner_in_the_readme_passes_every_check(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if block.startswith("# mine.py"))
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    from cil.learners import registry
    from cil.testing import check_learner

    results = list(check_learner(registry.resolve(f"{tmp_path / 'mine.py'}:Mine")))
    assert [(r.name, r.message) for r in results if not r.passed] == []


def test_the_yaml_in_the_readme_is_valid(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "my.yaml").write_text(block, encoding="utf-8")
    from cil.configfile import load
    from cil.plan import plans

    assert len(list(plans(load(str(tmp_path / "my.yaml"))))) == 10


def test_files_the_readme_links_to_exist():
    for page in (ROOT / "README.md", ROOT / "results" / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
