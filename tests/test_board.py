"""``cil tensorboard``: the runs asked for and no others, their layout, a URL that answers, and an end."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from urllib.request import ProxyHandler, build_opener

import pytest
from comparisons import falling, header, rows
from test_cli import cil  # noqa: F401 - a fixture
from waiting import until

from cil.errors import RunError
from cil.report.tensorboard import log_folder
from cil.runner.tensorboard import Tracker


def track(folder):
    """A run's event file, written as a run writes it."""
    folder.mkdir(parents=True)
    tracker = Tracker(folder, header("ncm"))
    tracker.replay(rows(falling(60)))
    tracker.close()
    return folder


def touch(folder):
    """What is looked for before anything is read."""
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.1.host").touch()
    return folder


def test_one_folder_is_itself_and_several_are_linked_below_one(tmp_path):
    one, two, three = (touch(tmp_path / "r" / name) for name in ("a/ncm/order1-seed0", "b,c:d/ncm/order1-seed0", "e/x"))
    place = tmp_path / "links"
    place.mkdir()
    assert log_folder([one], place) == one and not list(place.iterdir())
    assert log_folder([one, one.parent.parent], place) == one.parent.parent  # which holds the other
    assert log_folder([one.parent, two], place) == place
    assert sorted(str(f.relative_to(place)) for f in place.rglob("*") if f.is_symlink()) == [
        "a/ncm", "b,c:d/ncm/order1-seed0"
    ]  # fmt: skip
    assert (place / "a/ncm/order1-seed0").resolve() == one
    assert not any(three.samefile(f) for f in place.rglob("*") if f.exists())


def test_overlapping_folders_are_linked_once(tmp_path):
    one, two = touch(tmp_path / "a/ncm/o1"), touch(tmp_path / "b/ncm/o1")
    place = tmp_path / "links"
    place.mkdir()
    for i, given in enumerate(([one.parent, one, two], [one, two, one.parent])):
        (place / str(i)).mkdir()
        folder = log_folder(given, place / str(i))
        assert sorted(f.name for f in folder.rglob("*") if f.is_symlink()) == ["ncm", "o1"]


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_nothing_there_is_one_line(cil, tmp_path, name):  # noqa: F811
    touch(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    found = cil("tensorboard", tmp_path / "full", tmp_path / name)
    assert found.returncode == 2 and found.stdout == "" and len(found.stderr.strip().splitlines()) == 1
    assert {"nowhere": "no such folder", "empty": "no event file there"}[name] in found.stderr
    with pytest.raises(RunError, match=name):
        log_folder([tmp_path / name], tmp_path)


@pytest.mark.slow
def test_it_serves_and_stops(tmp_path):
    given = [track(tmp_path / name / "ncm" / "order1-seed0").parents[1] for name in ("one", "two")]
    touch(tmp_path / "three")
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-u", "-m", "cil", "tensorboard", *map(str, given), "--port", "0", "--host", "127.0.0.1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
    try:
        until(lambda: "\n" in out.read_text() or process.poll() is not None, 100, "TensorBoard has printed no address")
        url = re.match(r"(http://127\.0\.0\.1:\d+/)#custom_scalars", out.read_text())
        assert url, out.read_text() + err.read_text()
        get = build_opener(ProxyHandler({})).open

        def read(path):
            with get(url[1] + path, timeout=10) as answer:
                return json.load(answer)

        wanted = ["one/ncm/order1-seed0", "two/ncm/order1-seed0"]
        until(
            lambda: read("data/runs") == wanted and read("data/plugin/custom_scalars/layout"),
            30,
            lambda: f"TensorBoard shows {read('data/runs')}",
        )
        [category] = read("data/plugin/custom_scalars/layout")["category"]
        assert category["chart"][0] == {
            "title": "accuracy over all classes seen", "multiline": {"tag": ["accuracy/seen$"]}
        }  # fmt: skip
        drawn = read("data/plugin/scalars/scalars?run=two%2Fncm%2Forder1-seed0&tag=accuracy%2Fseen")
        assert [step for _, step, _ in drawn] == [1, 2, 3]
        process.terminate()  # as Ctrl-C, which Python handles by itself
        assert process.wait(20) == 0
        assert out.read_text().splitlines()[1:] == ["stopped"] and "Traceback" not in err.read_text()
        assert not list((tmp_path / "tmp").glob("cil-tensorboard-*"))
    finally:
        process.kill()
        process.wait(20)


def test_a_port_in_use_is_one_line(tmp_path):
    touch(tmp_path / "run")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "cil", "tensorboard", str(tmp_path / "run"), "--port", str(port)]
        found = subprocess.run([*command, "--host", "127.0.0.1"], capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and found.stdout == ""
    assert f"cil: tensorboard: cannot serve at 127.0.0.1:{port}: " in found.stderr and "--port 0" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1, found.stderr
