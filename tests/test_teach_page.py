"""The page of `cil teach`: what its server answers and refuses, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from test_cli import cil  # noqa: F401 - a fixture
from test_teach import _no_figure, first, folder, images, stored, uploads  # noqa: F401 - fixtures
from waiting import until

from cil.app import server
from cil.app.teaching import Teacher, Upload

PAGE = Path(server.__file__).parent / "page"
OURS = {"X-Cil": "1"}


@pytest.fixture
def port(folder) -> Iterator[int]:  # noqa: F811
    with server.serving(Teacher(folder, device="cpu", holdout=0.25)) as number:
        yield number


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder of temporary files."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def form(given: Sequence[Upload] = (), **fields: str) -> tuple[bytes, dict[str, str]]:
    """The body of a form, and its headers."""
    parts = [(f'name="{key}"', value.encode()) for key, value in fields.items()]
    parts += [(f'name="files"; filename="{one.name}"', one.content) for one in given]
    body = b"".join(
        f"--edge\r\nContent-Disposition: form-data; {what}\r\n\r\n".encode() + content + b"\r\n"
        for what, content in parts
    )
    return body + b"--edge--\r\n", {**OURS, "Content-Type": "multipart/form-data; boundary=edge"}


def fetch(
    port: int, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection(server.ADDRESS, port, timeout=60)
    try:
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


def post(port: int, path: str, given: Sequence[Upload] = (), **fields: str) -> dict:
    return json.loads(fetch(port, path, *form(given, **fields))[2])


def test_the_page_is_all_that_a_browser_loads(port):
    for name in server.TYPES:
        status, headers, content = fetch(port, "/" if name == "page.html" else f"/{name}")
        assert status == 200 and content == (PAGE / name).read_bytes()
        assert headers["Content-Type"] == f"{server.TYPES[name]}; charset=utf-8"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'")
        outside = r"https?://|url\(|@import|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\("
        assert not re.search(outside, content.decode())
    assert {file.name for file in PAGE.iterdir()} == server.TYPES.keys()
    assert fetch(port, "/page.html/../../server.py")[0] == 404


def test_it_listens_on_this_machine_alone():
    with server.listening(0) as here:
        assert here.getsockname()[0] == "127.0.0.1" and here.family is socket.AF_INET


def test_other_sites_can_neither_read_nor_teach(port, folder, images):  # noqa: F811
    """A name of another site that leads here, and a form that another page sends."""
    before = stored(folder)
    assert fetch(port, "/state", headers={"Host": "evil.example"})[0] == 400
    assert fetch(port, "/state", headers={"Host": f"localhost:{port}"})[0] == 200
    body, headers = form(uploads(images, "cat"), name="cat")
    plain = {key: value for key, value in headers.items() if key not in OURS}
    status, _, answer = fetch(port, "/teach", body, plain)
    assert status == 400 and json.loads(answer) == {"error": "this request does not come from the page of cil teach"}
    assert fetch(port, "/undo", b"", plain)[0] == 400
    assert fetch(port, "/teach", headers=OURS)[0] == 405
    assert stored(folder) == before


def test_too_much_is_refused_in_one_line(port, folder, images, temporary, monkeypatch):  # noqa: F811
    before = stored(folder)
    monkeypatch.setitem(server.LIMITS, "files", 3)
    monkeypatch.setitem(server.LIMITS, "file_mb", 2)
    monkeypatch.setitem(server.LIMITS, "all_mb", 5)
    some = uploads(images, "cat")
    for count in (4, 5, 8):
        assert post(port, "/teach", some[:count], name="cat")["error"].startswith("more than 3 files; choose fewer")
    large = Upload("photo.png", bytes(2_500_000))
    for path in ("/predict", "/teach"):
        assert post(port, path, [some[0], large], name="cat")["error"].startswith(
            "photo.png: 2 MB; allowed: 2 MB per file"
        )
    with socket.create_connection((server.ADDRESS, port), 20) as raw:  # the answer comes although no body does
        head = b"POST /teach HTTP/1.1\r\nHost: localhost\r\nX-Cil: 1\r\nConnection: close\r\n"
        raw.sendall(head + b"Content-Length: 999000000\r\n\r\n")
        assert b"999 MB together; allowed: 5 MB at a time" in b"".join(iter(lambda: raw.recv(10_000), b""))
    assert (
        "of unknown size"
        in json.loads(fetch(port, "/predict", b"", {**OURS, "Transfer-Encoding": "chunked"})[2])["error"]
    )
    assert post(port, "/predict", some[:3])["images"][0]["classes"]
    assert "no form" in json.loads(fetch(port, "/predict", b"words", OURS)[2])["error"]
    assert stored(folder) == before and not list(temporary.iterdir())


def test_clients_at_once_are_served_one_after_the_other(port, images, temporary):  # noqa: F811
    """Two teach while others predict: both lessons are learned, and nobody sees half of one."""
    large = [Upload("large.bin", bytes(1_500_000))]  # above what stays in memory
    with ThreadPoolExecutor(8) as pool:
        taught = [pool.submit(post, port, "/teach", uploads(images, name), name=name) for name in ("cat", "dog")]
        seen = [pool.submit(post, port, "/predict", [*uploads(images, "ant", 0, 1), *large]) for _ in range(6)]
        assert {one.result()["message"][:11] for one in taught} == {"Learned cat", "Learned dog"}
        for one in seen:
            *known, broken = one.result()["images"]
            assert all(len(image["classes"]) in (2, 3) for image in known) and "error" in broken
    state = json.loads(fetch(port, "/state")[2])
    assert sorted(state["classes"]) == ["ant", "bee", "cat", "dog"] and len(state["lessons"]) == 3
    assert not list(temporary.iterdir())


@pytest.fixture
def _terminated():
    """The command sets what SIGTERM does."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("_terminated")
def test_a_port_in_use_and_a_missing_package_are_one_line(cil, folder, monkeypatch):  # noqa: F811
    with server.listening(0) as here:
        ended = cil("teach", folder, "--no-browser", "--device", "cpu", "--port", here.getsockname()[1])
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "--port 0" in ended.stderr, ended.stderr
    monkeypatch.delitem(sys.modules, "cil.app.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    ended = cil("teach", folder)
    assert ended.returncode == 2 and ended.stderr == "cil: cil teach needs uvicorn: pip install 'cil[app]'\n"


SLOWLY = """
import sys, time
from cil.app.teaching import Teacher
Teacher.teach = lambda *given: time.sleep(float({seconds!r})) or {{"message": "learned", "notes": []}}
from cil.cli import main
main()
"""


@contextmanager
def command(folder: Path, seconds: float) -> Iterator[tuple[subprocess.Popen, int, Path]]:  # noqa: F811
    """The command in a process whose lessons take so long; also its port, and the file of what it prints."""
    temporary, out = folder.parent / "tmp", folder.parent / "out"
    temporary.mkdir(exist_ok=True)
    line = [
        sys.executable,
        "-c",
        SLOWLY.format(seconds=seconds),
        "teach",
        str(folder),
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "TMPDIR": str(temporary), "DISPLAY": "", "WAYLAND_DISPLAY": ""}
    with out.open("w") as stream:
        process = subprocess.Popen(line, stdout=stream, stderr=stream, env=environment)
    try:
        until(lambda: "Ctrl-C" in out.read_text() or process.poll() is not None, 100, "no address is printed")
        found = re.match(r"http://127\.0\.0\.1:(\d+)/ ", out.read_text())
        assert found, out.read_text()
        yield process, int(found[1]), out
        assert not [place for place in temporary.rglob("*") if place.is_file()]  # wandb makes folders there
    finally:
        process.kill()
        process.wait(20)


@pytest.mark.slow
def test_a_signal_ends_it_after_the_lesson(folder, images):  # noqa: F811
    with command(folder, 2) as (process, port, out), ThreadPoolExecutor() as pool:
        listening = [one.laddr for one in psutil.Process(process.pid).net_connections() if one.status == "LISTEN"]
        assert listening == [("127.0.0.1", port)]
        assert post(port, "/predict", [Upload("a", bytes(1_500_000))])["images"][0].keys() >= {"error"}
        answer = pool.submit(post, port, "/teach", uploads(images, "cat"), name="cat")
        until(lambda: len(psutil.Process(process.pid).net_connections("tcp4")) > 1, 20, "no connection")
        until(lambda: not answer.done(), 1, "the lesson has ended")
        process.terminate()
        assert answer.result(30)["message"] == "learned" and process.wait(30) == 0
        assert out.read_text().splitlines()[-1] == "stopped" and "Traceback" not in out.read_text()


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(folder, images):  # noqa: F811
    with command(folder, 100) as (process, port, out), ThreadPoolExecutor() as pool:
        answer = pool.submit(post, port, "/teach", uploads(images, "cat"), name="cat")
        until(lambda: len(psutil.Process(process.pid).net_connections("tcp4")) > 1, 20, "no connection")
        process.send_signal(signal.SIGINT)
        until(lambda: "stopping" in out.read_text(), 20, "the first signal does nothing")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == -signal.SIGINT
        with pytest.raises(OSError):
            answer.result(20)
