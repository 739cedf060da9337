"""Several processes of one command: whichever meets a fault, it is said once, and all end with exit code 2."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from fresh import command as code
from fresh import together as started
from test_processes import command, launch
from torch.distributed import TCPStore

from cil import cli
from cil.cli import launched
from cil.errors import DataError

PEER = "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4242"


def fails(text, kind=DataError):
    def command(**options):
        raise kind(text)

    return command


def waits(**options):
    time.sleep(300)  # in a collective operation that will never end


def process(rank, port, there, world, command, out):
    """What a launched process does with the command once the store is there, its standard error in a file."""
    there.wait(60)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port.value),
    }
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    sys.stderr, launched.PATIENCE = out.open("w", buffering=1), 1.0
    cli.app = command
    cli.main()


@pytest.fixture
def together(tmp_path):
    """Run one command per process; returns exit codes and what each printed. The store is this process's, as that of a
    launcher is; it begins when all are forked, since a fork would copy the locks that its thread holds just then."""
    context = multiprocessing.get_context("fork")

    def run(*commands):
        port, there = context.Value("i", 0), context.Event()
        outs = [tmp_path / f"{rank}.txt" for rank in range(len(commands))]
        parts = [
            context.Process(target=process, args=(rank, port, there, len(commands), command, outs[rank]))
            for rank, command in enumerate(commands)
        ]
        for part in parts:
            part.start()
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
        port.value = store.port
        there.set()
        for part in parts:
            part.join(60)
            if part.is_alive():
                part.kill()
        return [part.exitcode for part in parts], [out.read_text() for out in outs]

    return run


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_the_process_that_meets_the_fault_says_so_and_all_end(together, rank):
    commands = [waits] * 3
    commands[rank] = fails("set/b/1.png: not a readable image\nand a second line")
    codes, texts = together(*commands)
    assert codes == [2, 2, 2]
    assert texts[rank] == "cil: set/b/1.png: not a readable image\ncil: and a second line\n"
    assert "".join(texts) == texts[rank]


def test_a_fault_that_all_meet_is_said_once(together):
    codes, texts = together(*[fails("c.yaml: no such file")] * 3)
    assert codes == [2, 2, 2] and "".join(texts) == "cil: c.yaml: no such file\n"


def test_the_others_do_not_say_that_they_lost_it(together):
    """A process whose connection breaks because another one has met a fault shows no traceback of its own."""

    def loses(**options):
        time.sleep(0.5)
        raise RuntimeError(PEER)

    codes, texts = together(fails("1.png: broken"), loses)
    assert codes == [2, 2] and "".join(texts) == "cil: 1.png: broken\n"


def test_a_process_that_was_killed_is_reported_by_another(together):
    def killed(**options):
        os.kill(os.getpid(), signal.SIGKILL)

    codes, texts = together(killed, fails(PEER, RuntimeError))
    assert codes == [-signal.SIGKILL, 2]
    assert texts[1].startswith("cil: another process of this command has ended without a message")
    assert len(texts[1].splitlines()) == 1


def test_a_fault_of_the_library_keeps_its_traceback(together):
    codes, texts = together(waits, fails("a bug", ZeroDivisionError))
    assert codes == [2, 1] and "ZeroDivisionError: a bug" in texts[1] and not texts[0]


def test_commands_that_end_well_say_nothing(together):
    assert together(*[lambda **options: None] * 2) == ([0, 0], ["", ""])


def test_one_process_needs_no_store(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(launched, "_store", lambda: pytest.fail("asked for a store"))
    with launched.watched():
        assert launched.announce()
    launched.leave()


def break_image(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


WHEN = {
    "the first process, loading": ("train", "a", 0, ["data.on_error=raise"]),
    "the second process, features of a task": ("train", "c", 1, ["hardware.memory_gib=0"]),
    "the second process, testing": ("val", "c", 1, ["hardware.memory_gib=0"]),
    "the second process, training": ("train", "c", 1, ["hardware.memory_gib=0", "transform.augment={flip: 0.5}"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("when", WHEN)
def test_a_broken_image_is_named_by_whoever_reads_it(tmp_path, picture_folder, when):
    """By processes of a launcher while they train, where it has something to say, too; else by processes like those."""
    split, name, number, more = WHEN[when]
    root = picture_folder(("a", "b", "c", "d"), train=4, test=4, root=tmp_path / "set")
    break_image(root / split / name / f"{number}.png")
    training = "training" in when
    learner = "{name: aper, epochs: 1, train_batch_size: 2}" if training else "ncm"
    changes = ["data.dataset=folder", f"data.root={root}", "data.per_class=null", "stream.sizes=null"]
    changes += ["stream.increment=2", "stream.validation=0", "stream.test_on=test", "orders=[natural]"]
    changes += [f"learners=[{learner}]", "hardware.feature_store=off", *more, "inference_batch_size=2"]
    if training:
        done = launch(tmp_path, 2, *changes)
        assert done.returncode != 0 and done.stderr.count("exitcode  : 2") == 2
        assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]
        said = done.stderr
    else:
        ended = started(code(*command(tmp_path, ()), *changes), 2, tmp_path)
        said = "".join(err for _, _, err in ended)
        assert [status for status, _, _ in ended] == [2, 2] and "Traceback" not in said, said
    assert said.count(f"{number}.png: not a readable image") == 1, said
    assert "closed by peer" not in said
