"""What README and results/ say is what the files say. Commands, and the learner in the README: ``test_docs.py``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_come_from_results():
    found = subprocess.run([sys.executable, "scripts/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_yaml_in_the_readme_is_valid(tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    from cil.configfile import load
    from cil.plan import plans

    runs = []
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        (tmp_path / "my.yaml").write_text(block, encoding="utf-8")
        runs.append(len(list(plans(load(str(tmp_path / "my.yaml"))))))
    assert runs == [10, 2]


def test_files_the_readme_links_to_exist():
    for page in (ROOT / "README.md", ROOT / "results" / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tuner_in_the_readme_runs(tmp_path, monkeypatch):
    import timm
    import torch
    from peft import PeftModel

    from cil.backbone import embedded_card, load_backbone

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "build_tuner" in block)
    monkeypatch.chdir(tmp_path)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scope = {"images": images}
    exec(compile(code, "README.md", "exec"), scope)  # noqa: S102
    assert scope["features"].shape == (2, 192) and scope["features"].requires_grad
    plain = timm.create_model(**embedded_card()["timm_create_model"])
    plain.load_state_dict(load_backbone().model.state_dict())
    opened = PeftModel.from_pretrained(plain.eval(), str(tmp_path / "my-lora")).eval()
    with torch.inference_mode():
        torch.testing.assert_close(opened(images), scope["features"].detach(), atol=1e-5, rtol=1e-4)


def test_the_merge_in_the_readme_runs():
    import torch
    from torch import nn

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "cil.merging" in block)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    pretrained = {name: value.clone() for name, value in model.state_dict().items()}
    scope = {"model": model, "pretrained": pretrained, "tasks": [{k: v + 1 for k, v in pretrained.items()}]}
    exec(compile(code, "README.md", "exec"), scope)  # noqa: S102
    torch.testing.assert_close(model.blocks[0].weight.data, pretrained["blocks.0.weight"] + 0.5)
    torch.testing.assert_close(model.blocks[1].weight.data, pretrained["blocks.1.weight"] + 1)
