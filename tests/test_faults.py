"""Faults: killed at any moment, two processes in one folder, a full disk, Ctrl-C. Processes that end so are real."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fresh import Started, command
from test_cli import cil, write  # noqa: F401 - a fixture
from test_runner import stable
from waiting import until

from cil import results
from cil.config.reading import load_config
from cil.runner import run
from cil.runner.checkpoint import RunFolder

LEARNERS = [{"name": "finetune", "epochs": 4, "train_batch_size": 128}]
RUN = "order1993-seed0"
LINK = "import os, signal\nimport cil.runner.checkpoint as c\n"
DIE = "os.kill(os.getpid(), signal.SIGKILL)"

# Another process that holds a folder until its input ends.
HOLD = """
import sys
from pathlib import Path
from filelock import FileLock
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
with FileLock(folder / "run.lock"):
    print("held", flush=True)
    sys.stdin.read()
"""

# Where the process dies: patches that kill their own process, for real, in the second stage.
MOMENTS = {
    "before anything of the stage is written": f"""
original, calls = c.split_state, []
def patched(state, **more):
    calls.append(1)
    if len(calls) == 2: {DIE}
    return original(state, **more)
c.split_state = patched
""",
    "between two files of a checkpoint": f"""
original = c.write_json
def patched(path, value):
    if ".stage-01" in str(path): {DIE}
    return original(path, value)
c.write_json = patched
""",
    "in the middle of a file": f"""
original = c.save_file
def patched(tensors, path):
    if ".stage-01" in str(path):
        open(path, "wb").write(b"half")
        {DIE}
    return original(tensors, path)
c.save_file = patched
""",
    "written but not yet renamed": f"""
from pathlib import Path
original = Path.rename
def patched(self, target):
    if ".stage-01" in str(self): {DIE}
    return original(self, target)
Path.rename = patched
""",
    "renamed, metrics.json not yet rebuilt": f"""
original = c.RunFolder.save_stage
def patched(self, index, *rest, **more):
    original(self, index, *rest, **more)
    if index == 1: {DIE}
c.RunFolder.save_stage = patched
""",
    "while training": f"""
import threading
from cil.learners.finetune import Finetune
original = Finetune.train_on
def patched(self, data, first, ctx):
    if ctx.stage == 1: threading.Timer(0.15, lambda: {DIE}).start()
    return original(self, data, first, ctx)
Finetune.train_on = patched
""",
}


def start(config, cwd, patch=""):
    return Started(LINK + patch + command("run", str(config)), cwd)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    run(load_config(str(write(place / "c.yaml", learners=LEARNERS))), place / "results")
    return place


def compare(place: Path, whole: Path):
    one, two = (p / "results" / "t" / "finetune" / RUN for p in (place, whole))
    assert stable(results.read_run(one)) == stable(results.read_run(two))
    for i in range(3):
        for name in ("learner.safetensors", "predictions.safetensors"):
            assert (one / f"stage-{i:02d}" / name).read_bytes() == (two / f"stage-{i:02d}" / name).read_bytes()
    assert not list(one.glob(".stage-*"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again_ends_the_same_to_the_bit(cil, tmp_path, uninterrupted, moment):  # noqa: F811
    config = write(tmp_path / "c.yaml", learners=LEARNERS)
    code, _, err = start(config, tmp_path, MOMENTS[moment]).finish()
    assert code == -signal.SIGKILL, f"the process was to be killed {moment}, but ended with {code}: {err}"
    assert not results.read_run(tmp_path / "results" / "t" / "finetune" / RUN)["complete"]
    ended = cil("run", config, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    compare(tmp_path, uninterrupted)


@pytest.mark.slow
def test_killed_from_outside_again_and_again(cil, tmp_path, uninterrupted):  # noqa: F811
    """kill -9 at moments that nothing in the program knows of, a little after a stage appears; then once to the end."""
    config = write(tmp_path / "c.yaml", learners=LEARNERS)
    folder = tmp_path / "results" / "t" / "finetune" / RUN
    for stage, delay in ((0, 0.0), (1, 0.05)):
        process = start(config, tmp_path)
        there = folder / f"stage-{stage:02d}"
        until(lambda there=there, process=process: there.exists() or process.poll() is not None, 200, f"no {there}")
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        assert process.finish()[0] == -signal.SIGKILL, "the run ended before it could be killed"
    ended = cil("run", config, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    compare(tmp_path, uninterrupted)


def test_a_folder_in_use_is_refused(cil, tmp_path):  # noqa: F811
    config = write(tmp_path / "c.yaml")
    folder = tmp_path / "results" / "t" / "ncm" / RUN
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
    try:
        holder.stdout.read(1)
        ended = cil("run", config, cwd=tmp_path)
    finally:
        holder.communicate(b"enough", timeout=60)
    assert ended.returncode == 2 and "another process is running in this folder" in ended.stderr
    assert cil("run", config).returncode == 0


SMALL_FILES = """
import resource
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
"""
"""No file of the process may grow beyond 300 kB: what a full disk does, without filling one."""


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
def test_a_full_disk_leaves_earlier_stages_loadable(cil, tmp_path, monkeypatch):  # noqa: F811
    """The first stages fit; a learner that grows past the limit does not."""
    (tmp_path / "grows.py").write_text(
        "import torch\nfrom cil.learners.ncm import NCMLearner\nclass Grows(NCMLearner):\n"
        "    def learn(self, task, ctx):\n        super().learn(task, ctx)\n"
        "        if task.index == 2: self.register_buffer('big', torch.zeros(200_000))\n"
    )
    config = write(tmp_path / "c.yaml", learners=[{"class": "grows.py:Grows"}])
    code, out, err = start(config, tmp_path, SMALL_FILES).finish()
    folder = tmp_path / "results" / "t" / "Grows" / RUN
    assert code == 2 and "the disk is full. Finished stages are kept" in err, (code, out, err)
    assert len(err.strip().splitlines()) == 1
    assert RunFolder(folder).finished() == 2 and not list(folder.glob(".stage-*"))
    found = results.read_run(folder)
    assert not found["complete"] and len(found["stages"]) == 2
    from cil.prediction import restore
    from cil.testing.setting import accelerator

    monkeypatch.chdir(tmp_path)
    assert restore(folder, accelerator())[0].seen == 8
    assert cil("run", config).returncode == 0


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path):
    config = write(tmp_path / "c.yaml", learners=[{**LEARNERS[0], "epochs": 10}])
    process = start(config, tmp_path)
    folder = tmp_path / "results" / "t" / "finetune" / RUN
    until(lambda: (folder / "stage-00").exists() or process.poll() is not None, 200, "no stage is finished")
    process.send_signal(signal.SIGINT)
    code, out, err = process.finish()
    assert code == 130, (code, err)
    assert "same command to resume" in out and "Traceback" not in err
    assert RunFolder(folder).finished() >= 1 and not results.read_run(folder)["complete"]
