"""``precision: auto``: the faster precision is recorded, and kept whatever a later timing would say."""

from __future__ import annotations

import pytest
import torch
from test_runner import settings, stable

from cil.backbone import Backbones
from cil.errors import ConfigError
from cil.results import read_run
from cil.runner import precision, run
from cil.testing.setting import backbone
from cil.utils import hardware


@pytest.fixture
def timed(monkeypatch):
    """Give the two times that the next benchmark measures; None: it must not measure."""
    calls = []

    def give(bf16: float | None) -> list[None]:
        def seconds(vit):
            assert bf16 is not None, "there is a recorded choice"
            calls.append(None)
            return {"fp32": 1.0, "bf16": bf16}

        monkeypatch.setattr(precision, "seconds", seconds)
        return calls

    return give


def test_the_faster_one_is_recorded_and_kept(timed, tmp_path):
    calls = timed(0.5)
    [folder] = run(settings(precision="auto"), tmp_path)
    first = read_run(folder)
    assert first["config"]["precision"] == "bf16" and len(calls) == 1

    timed(None)
    [folder] = run(settings(precision="auto"), tmp_path)  # finished already
    assert read_run(folder) == first
    both = run(settings(precision="auto", learners=["ncm", "slda"]), tmp_path)  # a new run of the same benchmark
    assert [read_run(one)["config"]["precision"] for one in both] == ["bf16", "bf16"]
    [explicit] = run(settings(precision="bf16"), tmp_path / "explicit")
    assert stable(read_run(explicit)["stages"]) == stable(first["stages"])


@pytest.mark.slow
def test_a_tie_goes_to_float32_and_a_mixed_benchmark_stays_mixed(timed, tmp_path):
    run(settings(precision="bf16"), tmp_path)
    timed(0.95)
    [folder] = run(settings(precision="auto", learners=["slda"]), tmp_path)
    assert read_run(folder)["config"]["precision"] == "fp32"

    timed(None)
    folders = run(settings(precision="auto", learners=["ncm", "slda"]), tmp_path)
    assert [read_run(one)["config"]["precision"] for one in folders] == ["bf16", "fp32"]


def test_both_are_timed_on_one_or_several_backbones_without_a_random_number(monkeypatch):
    monkeypatch.setattr(precision, "SECONDS", 0.02)
    before = torch.get_rng_state()
    for vit in (backbone(), Backbones([backbone(), backbone()])):
        took = precision.seconds(vit)
        assert list(took) == ["fp32", "bf16"] and min(took.values()) > 0
        assert all(p.grad is None for p in vit.parameters())
    assert torch.equal(before, torch.get_rng_state())


def test_commands_other_than_run_ask_for_one_of_them():
    with pytest.raises(ConfigError, match="give precision=fp32 or bf16"):
        hardware.accelerator("cpu", "auto")


def test_the_processor_and_its_instructions_are_known(tmp_path):
    intel = "processor\t: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu avx2 amx_tile avx512_bf16 sse\n"
    (tmp_path / "intel").write_text(f"{intel}\n{intel}")
    (tmp_path / "arm").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\nCPU part\t: 0xd40\n")
    facts = hardware.processor(tmp_path / "intel")
    assert facts == {"processor": "Some Xeon", "features": ["avx2", "avx512_bf16", "amx_tile"]}
    assert hardware.processor(tmp_path / "arm")["features"] == ["asimd", "bf16"]
    assert (
        "features" not in hardware.processor(tmp_path / "none") and hardware.processor(tmp_path / "none")["processor"]
    )
    assert hardware.facts(hardware.accelerator())["processor"] == hardware.processor()["processor"]
