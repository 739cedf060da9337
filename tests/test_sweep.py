"""Sweeps: every point a run of its own, on a real local Ray, through killed workers, killed drivers and failures."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from fresh import Started
from fresh import command as code_of
from safetensors.torch import load_file
from test_cli import cil, write  # noqa: F401 (a fixture)
from test_runner import settings as configured
from test_runner import stable
from waiting import until

from cil import results
from cil.config.reading import load_config
from cil.runner import run
from cil.runner.checkpoint import RunFolder
from cil.runner.plan import dump, plans
from cil.sweep.grid import expand_grid, trials
from cil.sweep.pool import LOOK

PROBE = {"name": "linear_probe", "epochs": 1}
RUN = "order1993-seed0"

STRANGE = """
import os, signal, time
from pathlib import Path
from cil.learners.ncm import NCMLearner

def note(text):
    with open("trace", "a") as file:
        file.write(text + "\\n")

class Dies(NCMLearner):
    "The first time it comes to stage 1 its process is killed."
    def learn(self, task, ctx):
        note(f"dies {task.index}")
        if task.index == 1 and not Path("died").exists():
            Path("died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().learn(task, ctx)

class Breaks(NCMLearner):
    "A fault of its own, every time."
    def learn(self, task, ctx):
        note("breaks")
        raise RuntimeError("broken\\nfor good")

class Waits(NCMLearner):
    "Stops in stage 1 while a file called wait is there, at most five minutes."
    def learn(self, task, ctx):
        note(f"waits {task.index}")
        if task.index == 1 and Path("wait").exists():
            Path("waiting").write_text(str(os.getpid()))
            end = time.monotonic() + 300
            while Path("wait").exists() and time.monotonic() < end:
                time.sleep(0.05)
        super().learn(task, ctx)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with learners that fail in their own ways; one thread, here as in the workers."""
    (tmp_path / "strange.py").write_text(STRANGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def workers():
    """A local Ray that sweeps of this process use, so that its workers import torch once for all tests."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", num_cpus=2, object_store_memory=10**8, **quiet)
    yield
    ray.shutdown()


@pytest.fixture
def no_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)


def same_run(one: Path, two: Path) -> None:
    assert stable(results.read_run(one)) == stable(results.read_run(two))
    for stage in range(3):
        a, b = (load_file(folder / f"stage-{stage:02d}" / "learner.safetensors") for folder in (one, two))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_every_point_is_a_learner_with_a_label(place):
    file = write(place / "c.yaml", learners=[PROBE, "ncm"])
    found = expand_grid(str(file), [], ["learners.linear_probe.lr=0.1,1e-3", "inference_batch_size=64,32"])
    assert [s.config.learners[0].title for s in found] == [
        "linear_probe_lr=0.1_inference_batch_size=64",
        "linear_probe_lr=0.1_inference_batch_size=32",
        "linear_probe_lr=0.001_inference_batch_size=64",
        "linear_probe_lr=0.001_inference_batch_size=32",
        "ncm_inference_batch_size=64",
        "ncm_inference_batch_size=32",
    ]
    assert [s.config.inference_batch_size for s in found] == [64, 32] * 3
    assert found[0].values == {"learners.linear_probe.lr": 0.1, "inference_batch_size": 64}
    assert found[4].values == {"inference_batch_size": 64}  # an axis of another learner is none of its business


@pytest.mark.parametrize(
    ("grid", "label"),
    [
        ("learner.tuner=adapter,{name: lora, rank: 4},null", "ranpac_tuner=name-lora-rank-4"),
        ("learner.tuner.bottleneck=8,16", "ranpac_bottleneck=16"),
        ("learner.strength=holdout,1.5", "ranpac_strength=1.5"),
        ("backbone.weights=random,a/b.safetensors", "ranpac_weights=a-b.safetensors"),
    ],
)
def test_labels_are_folder_names(place, grid, label):
    file = write(place / "c.yaml", learners=[{"name": "ranpac", "tuner": {"name": "adapter"}}])
    assert [s.config.learners[0].label for s in expand_grid(str(file), [], [grid])][1] == label


def test_long_labels_stay_apart(place):
    file = write(place / "c.yaml", learners=["ranpac"])
    values = [f"{'a' * 200}{end}" for end in "xy"]
    one, two = (
        s.config.learners[0].title for s in expand_grid(str(file), [], [f"backbone.weights={','.join(values)}"])
    )
    assert one != two and max(len(one), len(two)) < 140


def test_printed_commands_plan_the_same_runs(place):
    """Each line, as a shell takes it apart, is a configuration of one run: the very run the sweep would do."""
    file = write(place / "c.yaml", learners=[{**PROBE, "orders": [5]}, {"class": "strange.py:Breaks"}])
    given = ["learners.linear_probe.label=it's a probe", "orders=[1993, natural]", "seeds=[0, 1]"]
    found = trials(str(file), given, ["learners.it's a probe.lr=1.0e-5,0.1", "inference_batch_size=64"])
    assert len(found) == 2 * 2 + 2 * 2  # the probe has an order of its own, as in cil run
    for trial in found:
        program, verb, name, *rest, flag, place_of_results = shlex.split(trial.line(Path("my results")))
        assert (program, verb, flag, place_of_results) == ("cil", "run", "--results", "my results")
        [plan] = plans(load_config(name, rest))
        assert dump(plan.config) == dump(trial.plan.config) and plan.place == trial.plan.place


MISTAKES = {
    "unknown learner key": (["--grid", "learners.linear_probe.lrr=1,2"], "unknown key lrr (did you mean 'lr'?)"),
    "wrong value, late in the grid": (["--grid", "learners.linear_probe.lr=0.1,0"], "lr: should be greater than 0"),
    "unknown key": (["--grid", "stream.incremnt=2,5"], "unknown key stream.incremnt (did you mean 'increment'?)"),
    "which learner": (["--grid", "learner.lr=1,2"], "the configuration has 2 learners; write learners.<name>.lr"),
    "no such learner": (["--grid", "learners.nmc.metric=cosine"], "no learner 'nmc' (did you mean 'ncm'?)"),
    "twice a value": (["--grid", "inference_batch_size=64,64"], "64 is given twice"),
    "twice a key": (
        ["--grid", "inference_batch_size=64", "--grid", "inference_batch_size=32"],
        "inference_batch_size is given twice",
    ),
    "no value": (["--grid", "inference_batch_size"], "write KEY=VALUE,VALUE"),
    "no YAML": (["--grid", "inference_batch_size=[1"], "not valid YAML"),
    "orders": (["--grid", "orders=1,2"], "orders cannot be an axis of a grid; give --orders"),
    "hardware": (["--grid", "hardware.workers=1,2"], "hardware cannot be an axis of a grid"),
    "a learner's name": (["--grid", "learners.ncm.name=ncm,slda"], "name cannot be an axis of a grid"),
    "wrong order": (["--orders", "1993,[0.5]"], "orders"),
    "wrong override": (["stream.increment=two"], "stream.increment: should be a valid integer"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_said_before_anything_starts(cil, place, no_ray, mistake):  # noqa: F811
    arguments, message = MISTAKES[mistake]
    found = cil("sweep", write(place / "c.yaml", learners=[PROBE, "ncm"]), *arguments)
    assert found.returncode == 2 and message in found.stderr, found.stderr
    assert "Ray" not in found.stderr and "Traceback" not in found.stderr and not (place / "results").exists()


def test_without_ray_it_says_what_to_install_and_still_prints(cil, place, no_ray):  # noqa: F811
    file = write(place / "c.yaml", learners=[PROBE])
    found = cil("sweep", file, "--grid", "learner.lr=0.1,0.01")
    assert found.returncode == 2 and "pip install 'cil[ray]'" in found.stderr and len(found.stderr.splitlines()) == 1
    printed = cil("sweep", file, "--grid", "learner.lr=0.1,0.01", "--print")
    assert printed.returncode == 0 and printed.stdout.count("cil run ") == len(printed.stdout.splitlines()) == 2


def test_it_is_refused_under_a_launcher(cil, place, no_ray, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = cil("sweep", write(place / "c.yaml"))
    assert found.returncode == 2 and "without accelerate launch" in found.stderr


def test_help_imports_neither_ray_nor_torch():
    code = """
import sys
from typer.testing import CliRunner
from cil.cli import app
for command in ("sweep", "tune"):
    assert "--grid" in CliRunner().invoke(app, [command, "--help"]).output
print([name for name in ("ray", "torch", "timm", "numpy") if name in sys.modules])
"""
    environment = {**os.environ, "COLUMNS": "120"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, timeout=100
    )
    assert found.stdout.strip() == "[]"


# --- a worker, without Ray --------------------------------------------------------------------------------------------


def test_a_worker_loads_data_and_backbone_once(place, monkeypatch):
    import cil.runner as runner
    from cil.sweep import worker

    loaded, original = [], runner.Inputs
    monkeypatch.setattr(runner, "Inputs", lambda *given: loaded.append(1) or original(*given))
    monkeypatch.setattr(worker, "last", None)
    file = write(place / "c.yaml", learners=[PROBE])
    for trial in trials(str(file), [], ["learner.lr=0.1,0.01"]):
        assert worker.attempt(dump(trial.plan.config), "results", str(place), 1).state == "ran"
    assert len(loaded) == 1
    for lr in (0.1, 0.01):  # what was loaded for the first run changes nothing of the second
        [alone] = run(configured(learners=[{**PROBE, "lr": lr, "label": f"linear_probe_lr={lr}"}]), "alone")
        same_run(place / "results/t" / f"linear_probe_lr={lr}" / RUN, alone)
    [other] = trials(str(file), ["backbone.options.depth=2"], [])
    assert worker.attempt(dump(other.plan.config), "results", str(place), 1).state == "ran" and len(loaded) == 2


def test_a_worker_waits_for_a_folder_that_is_about_to_be_free(place, monkeypatch):
    import threading

    from cil.sweep import worker

    [trial] = trials(str(write(place / "c.yaml")), [], [])
    config, folder = dump(trial.plan.config), RunFolder(Path("results") / trial.plan.place)
    held, release = threading.Event(), threading.Event()

    def hold():
        with folder.locked():
            held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(60)
    monkeypatch.setattr(worker, "PATIENCE", 0.2)
    refused = worker.attempt(config, "results", str(place), 1)
    assert refused.state == "failed" and "another process is running" in refused.reason and not refused.retry
    monkeypatch.setattr(worker, "PATIENCE", 60)
    threading.Timer(0.3, release.set).start()
    assert worker.attempt(config, "results", str(place), 1).state == "ran"
    holder.join(60)


def test_a_node_without_the_folder_says_so(place):
    from cil.sweep import worker

    [trial] = trials(str(write(place / "c.yaml")), [], [])
    found = worker.attempt(dump(trial.plan.config), "results", str(place / "nowhere"), 1)
    assert found.state == "failed" and "nowhere: No such file or directory on" in found.reason


# --- on Ray -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_runs_retries_reports_and_goes_on(cil, place, workers):  # noqa: F811
    """A killed worker, a loss that is not finite, a fault, and runs that are what ``cil run`` makes of them."""
    strange = [{"class": f"strange.py:{name}"} for name in ("Dies", "Breaks")]
    file = write(place / "c.yaml", learners=[*strange, PROBE, "ncm"])
    command = ("sweep", file, "--grid", "learners.linear_probe.lr=0.1,1.0e+38", "--orders", "1993,7", "--retries", "1")
    first = cil(*command, "--jobs", "2")
    assert first.returncode == 1, first.stderr
    assert "10 runs: 6 ran, 0 finished, 4 failed" in first.stdout
    told = {line.split("  ")[0]: line for line in first.stdout.split("outcome")[1].splitlines()}
    assert "WorkerCrashedError" in first.stdout and "attempt 1" in first.stdout
    assert told[f"linear_probe_lr=1e+38 {RUN}"].split()[2:4] == ["failed", "1"]  # would fail again
    assert "the training loss is" in told[f"linear_probe_lr=1e+38 {RUN}"]
    assert told[f"Breaks {RUN}"].split()[2:4] == ["failed", "2"]
    log = place / "results/t/Breaks" / RUN / "failed.log"
    assert f"RuntimeError: broken for good; {log.relative_to(place)}" in told[f"Breaks {RUN}"]
    assert "strange.py" in log.read_text() and "Traceback" in log.read_text()
    trace = (place / "trace").read_text().split("\n")
    assert trace.count("breaks") == 4
    assert trace.count("dies 0") == 2 and trace.count("dies 1") == 3 and trace.count("dies 2") == 2  # not from 0 again
    assert "linear_probe_lr=0.1" in first.stdout.split("A_last %")[1]  # the table of cil compare

    again = cil(*command)
    assert again.returncode == 1 and "10 runs: 0 ran, 6 finished, 4 failed" in again.stdout
    alone = run(load_config("c.yaml", ["orders=[1993, 7]", "learners.linear_probe.label=linear_probe_lr=0.1",
                                "learners=[{class: strange.py:Dies}, ncm, {name: linear_probe, epochs: 1, "
                                "lr: 0.1, label: linear_probe_lr=0.1}]"]), "alone")  # fmt: skip
    assert len(alone) == 6
    for folder in alone:
        same_run(Path("results") / folder.relative_to("alone"), folder)
    machine = results.read_run(place / "results/t/ncm" / RUN)["machine"]
    assert machine["threads"] == 1


def test_no_cluster_at_the_address_is_one_line(cil, place, monkeypatch):  # noqa: F811
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # by other tests, whose cluster would be kept
    found = cil("sweep", write(place / "c.yaml"), "--address", "127.0.0.1:1")
    assert found.returncode == 2 and found.stderr.startswith("cil: Ray 127.0.0.1:1: ConnectionRefusedError")


def test_a_failed_run_that_can_go_on_loses_its_log(cil, place, workers):  # noqa: F811
    file = write(place / "c.yaml", learners=[{"class": "strange.py:Dies"}])
    first = cil("sweep", file, "--retries", "0")
    log = place / "results/t/Dies" / RUN / "failed.log"
    assert first.returncode == 1 and "WorkerCrashedError" in log.read_text()
    assert not results.read_run(log.parent)["complete"] and RunFolder(log.parent).finished() == 1
    assert cil("sweep", file, "--retries", "0").returncode == 0 and not log.exists()
    assert results.read_run(log.parent)["complete"]


@pytest.mark.slow
def test_printed_commands_give_the_same_folders_in_a_shell(cil, place, workers):  # noqa: F811
    file = write(place / "c.yaml", learners=[PROBE])
    command = ("sweep", file, "--grid", "learner.lr=0.1,0.01")
    assert cil(*command).returncode == 0
    (place / "runs.txt").write_text(cil(*command, "--results", "by hand", "--print").stdout)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    page = (Path(__file__).parents[1] / "docs/sweeps.md").read_text()
    (place / "array.sh").write_text(page.split('title="array.sh"\n')[1].split("```")[0])
    for way in ("head -n 1 runs.txt | xargs -L 1 env", "SLURM_ARRAY_TASK_ID=2 bash array.sh"):
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(way, shell=True, capture_output=True, text=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr
    for lr in ("0.1", "0.01"):
        swept = place / "results/t" / f"linear_probe_lr={lr}" / RUN
        same_run(swept, place / "by hand" / swept.relative_to(place / "results"))


def started_sweep(place: Path, *arguments: str) -> Started:
    """A driver in a session of its own, as that of a terminal."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return Started("import os\nos.setsid()\n" + code_of("sweep", "c.yaml", *arguments), place, environment)


@contextlib.contextmanager
def stage_1_and_no_further(place, driver):
    """Until a run of the driver waits in stage 1; yields the processes that the driver has started. All end with it."""
    waiting, started = place / "waiting", []
    try:
        until(
            lambda: (waiting.exists() and waiting.read_text()) or driver.poll() is not None,
            200,
            lambda: f"no run has come to stage 1: {driver.printed()}",
        )
        assert driver.poll() is None, driver.printed()
        started += psutil.Process(driver.process.pid).children(recursive=True)
        yield started
    finally:
        (place / "wait").unlink(missing_ok=True)
        if driver.poll() is None:
            driver.send_signal(signal.SIGKILL)
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.slow
def test_a_driver_that_is_stopped_or_killed_loses_nothing(cil, place, workers):  # noqa: F811
    """Ctrl-C, then kill -9 of the driver, each in the middle of a run: all its processes end. Then once more."""
    write(place / "c.yaml", learners=[{"class": "strange.py:Waits"}])
    folder = place / "results/t/Waits" / RUN

    def stop_in_stage_1(stop) -> tuple[int, str]:
        (place / "wait").touch()
        waiting = place / "waiting"
        waiting.unlink(missing_ok=True)
        driver = started_sweep(place)
        with stage_1_and_no_further(place, driver) as started:
            assert int(waiting.read_text()) in {process.pid for process in started}
            stop(driver.process.pid)
            code, *said = driver.finish(60)
            _, left = psutil.wait_procs(started, timeout=60)
            assert not left, "processes outlive their driver"
        return code, "".join(said)

    code, out = stop_in_stage_1(lambda pid: os.killpg(pid, signal.SIGINT))
    assert code == 130 and "stopped. Finished stages are kept" in out
    assert RunFolder(folder).finished() == 1
    assert stop_in_stage_1(lambda pid: os.kill(pid, signal.SIGKILL))[0] == -signal.SIGKILL
    assert RunFolder(folder).finished() == 1
    out = cil("sweep", "c.yaml")  # here, on the Ray of the other tests
    assert out.returncode == 0 and "1 runs: 1 ran" in out.stdout, out.stderr
    assert (place / "trace").read_text().replace("waits ", "").split() == ["0", "1", "1", "1", "2"]
    [alone] = run(load_config("c.yaml"), "alone")
    same_run(folder, alone)


@pytest.mark.slow
@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_a_dead_daemon_is_started_again(place, daemon):
    """Ray's daemon dies in the middle of a run: no run fails, none counts an attempt, and the numbers are the same."""
    pytest.importorskip("ray")
    write(place / "c.yaml", learners=[{"class": "strange.py:Waits"}])
    (place / "wait").touch()
    driver = started_sweep(place, "--seeds", "0,1", "--jobs", "1")
    with stage_1_and_no_further(place, driver) as started:
        [victim] = [process for process in started if process.name() == daemon]
        victim.kill()
        time.sleep(LOOK + 1)
        (place / "wait").unlink()
        code, *printed = driver.finish(200)
        assert code == 0
    said = "".join(printed)
    assert said.count(f"Ray's {daemon} on this machine has died; Ray is started again") == 1
    assert "2 runs: " in said and " 0 failed" in said and "attempt 1" not in said
    [alone] = run(load_config("c.yaml"), "alone")
    same_run(place / "results/t/Waits" / RUN, alone)
