"""What commands print: on streams of any encoding, to readers that go away, and of names that are no plain text."""

from __future__ import annotations

import csv
import io
import os
import sys
from pathlib import Path

import pytest
from comparisons import falling, write
from rich.console import Console
from test_cli import cil  # noqa: F401 - a fixture

from cil import report
from cil.cli.output import Output, expanded, prepare_streams, say
from cil.errors import ConfigError
from cil.prediction.output import open_writer
from cil.runner.display import Display

ODD = {
    "\x1b[31mred\x1b[0m": r"\x1b[31mred\x1b[0m",
    "two\nlines\t.": r"two\nlines\t.",
    "\u202egnp.exe": r"\u202egnp.exe",
    "caf\udce9": r"caf\udce9",
    "猫 – é": "猫 – é",
}


@pytest.mark.parametrize("name", ODD)
def test_names_are_escaped_on_terminals_and_in_csv(name, tmp_path, capsys):
    wanted = ODD[name]
    for err in (False, True):
        say(f"a {name}".replace("\n", "\\n"), err=err)
    assert [text.strip() for text in capsys.readouterr()] == [f"a {wanted}"] * 2
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with Display(console) as display:
        display.say(name)
    assert wanted in console.file.getvalue() and (name == wanted or name not in console.file.getvalue())
    with open_writer(tmp_path / "f.csv", 1) as add:
        add(Path("x.png"), [(name, 0.5)])
    with (tmp_path / "f.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file))[1] == ["x.png", wanted, "0.5"]


@pytest.mark.parametrize("name", ODD)
def test_names_in_comparisons_are_escaped(name, tmp_path):
    """A run's files may come from elsewhere, and from before labels were checked."""
    write(tmp_path, name, falling(80))
    [compared] = report.compare_runs([tmp_path])
    for width in (None, 80, 1):
        console = Console(file=io.StringIO(), width=width or 500)
        console.print(report.table(compared, width=width))
        if width != 1:
            assert ODD[name] in console.file.getvalue()
        assert "\x1b" not in console.file.getvalue()
    for text in (report.as_csv(compared), report.markdown(compared), report.latex(compared), report.page([compared])):
        assert name == ODD[name] or name not in text
    assert ODD[name] in report.as_csv(compared) and ODD[name] in report.markdown(compared)
    assert len(list(csv.reader(io.StringIO(report.as_csv(compared))))) == 2
    report.write_overview([compared], tmp_path)


@pytest.mark.parametrize(("encoding", "wanted"), [("latin-1", "\\u732b é -"), ("cp1252", "\\u732b é –"), ("ascii", "")])
def test_streams_show_what_they_can(encoding, wanted, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Output(raw, encoding=encoding, errors="replace"))
    say("猫 é –")
    print("猫 é –")
    Console(width=40).print("猫 é ─ …")
    sys.stdout.flush()
    first, second, _ = raw.getvalue().decode(encoding).splitlines()
    assert second == "猫 é –".encode(encoding, "replace").decode(encoding)
    assert first.startswith("\\u732b") and (not wanted or first[:8] == wanted[:8])


@pytest.mark.parametrize("count", [1, 3000])
def test_a_reader_that_goes_away_ends_nothing(count, monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", Output(os.fdopen(writer, "wb"), encoding="utf-8"))
    os.close(reader)
    for _ in range(count):
        say("x" * 100)
    sys.stdout.flush()
    assert sys.stdout.gone
    say("and on")
    Console().print("and on")
    sys.stdout.close()


def test_closed_streams_and_those_of_tests_are_left_or_replaced(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stderr", stream)
    prepare_streams()
    print("x")
    sys.stdout.close()
    assert isinstance(sys.stderr, Output) and (sys.stderr.encoding, sys.stderr.errors) == ("latin-1", "replace")
    own = io.StringIO()
    monkeypatch.setattr(sys, "stdout", own)
    prepare_streams()
    assert sys.stdout is own


@pytest.mark.parametrize(("how", "seen"), [("write_through", b"a\nb"), ("line_buffering", b"a\n"), (None, b"")])
def test_a_stream_that_is_replaced_waits_no_longer_than_before(monkeypatch, how, seen):
    """``python -u`` writes through, a terminal by lines; who reads a pipe line by line would else wait for ever."""
    there = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(there, **({how: True} if how else {})))
    prepare_streams()
    assert isinstance(sys.stdout, Output)
    sys.stdout.write("a\n")
    assert there.getvalue() == seen[:2]
    sys.stdout.write("b")
    assert there.getvalue() == seen


@pytest.mark.parametrize("columns", ["0", "1", "-5", "x", ""])
def test_a_terminal_of_any_width(columns, tmp_path, monkeypatch, capsys):
    from cil.cli.benchmark import compare

    write(tmp_path, "ncm", falling(80))
    monkeypatch.setenv("COLUMNS", columns)
    compare([tmp_path])
    assert "A_last" in "".join(capsys.readouterr().out.split()) or columns == "1"


def test_paths_of_commands_are_expanded(tmp_path, monkeypatch, cil):  # noqa: F811
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UNSET", raising=False)
    monkeypatch.chdir(tmp_path)
    assert expanded([Path("~/a"), Path("b")]) == [tmp_path / "a", Path("b")] and expanded(None) is None
    Path("~lock.png").touch()
    assert expanded(Path("~lock.png")) == Path("~lock.png")
    with pytest.raises(ConfigError, match="UNSET is not set"):
        expanded(Path("$UNSET/x"))
    failed = cil("run", "quickstart", "--results", "$UNSET/r")
    assert failed.returncode == 2 and failed.stderr.startswith("cil: $UNSET/r: the environment variable UNSET")
    failed = cil("compare", "~/none")
    assert failed.returncode == 2 and failed.stderr == f"cil: {tmp_path}/none: no such folder\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail at alloc] DefaultCPUAllocator: can't allocate memory: 4 TB")]
)
def test_a_machine_without_enough_memory_is_one_line(error, cil, monkeypatch):  # noqa: F811
    def fail(*arguments):
        raise error

    monkeypatch.setattr("cil.config.reading.load_config", fail)
    failed = cil("run", "quickstart")
    assert failed.returncode == 2 and failed.stderr.startswith("cil: there is not enough memory (")
    assert len(failed.stderr.splitlines()) == 1
