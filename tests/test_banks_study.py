"""The study of rules, banks and routers measures learners on updates that are trained once."""

from __future__ import annotations

import json
import sys

import pytest

from scripts.publish.banks import table
from scripts.studies import banks

SMALL = [
    "backbone={name: vit_tiny_patch8_64.tinyimagenet100, weights: random, options: {depth: 2}}",
    "learners=[{name: merge, epochs: 1, train_batch_size: 8, tuner: {name: lora, rank: 2, targets: [qkv]}}]",
    "data.per_class=3",
    "stream.increment=5",
]


@pytest.mark.slow
def test_every_rule_and_router_is_measured_on_updates_trained_once(tmp_path, monkeypatch):
    where = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    orders = ["--config", "quickstart", "--orders", "1993", "--images", "2"]
    monkeypatch.setattr(sys, "argv", ["banks", *SMALL, *orders, *where])
    banks.main()
    file = tmp_path / "out" / "merge-order1993.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    found = result["found"]
    routed = {f"routed {router} {scores}" for router in banks.ROUTERS for scores in banks.SCORES}
    assert found.keys() == {"frozen lda", "smile", *banks.RULES, *routed} and result["test_images"] == 20
    assert all(0 <= row["a_last"] <= 100 and row["passes"] >= 1 for row in found.values())
    for router in banks.ROUTERS:  # which task is chosen does not depend on how the classes are compared
        assert len({found[f"routed {router} {scores}"]["router"] for scores in banks.SCORES}) == 1
    layers = 2 * 192 * 3 * 192 * 4  # bytes of qkv of two blocks, as one merged update keeps them
    assert found["sum"]["mb"] == pytest.approx(layers / 1e6)
    low_rank = 2 * 2 * 2 * (192 + 3 * 192) * 4  # two factors of rank two, two blocks, two tasks
    assert found["smile"]["mb"] == pytest.approx(low_rank / 1e6, rel=0.01)

    shown = [line.split(" | ") for line in table(tmp_path / "out").splitlines()[2:]]
    assert len(shown) == len(found)
    ranked = sorted((row["a_last"] for row in found.values()), reverse=True)
    assert [cells[1] for cells in shown] == [f"{accuracy:.1f}" for accuracy in ranked]
    named = {cells[0].removeprefix("| "): cells for cells in shown}
    assert named["smile"][2:4] == ["", ""]
    assert named["routed gates all"][2] == f"{found['routed gates all']['router']:.1f}"

    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert len(trained) == 2
    del found["opcm"], found["smile"]
    file.write_text(json.dumps(result), encoding="utf-8")
    banks.main()  # what is missing is measured again on the stored updates
    again = json.loads(file.read_text(encoding="utf-8"))["found"]
    assert again.keys() == {"frozen lda", "smile", *banks.RULES, *routed}
    assert trained == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
