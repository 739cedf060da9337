"""The page of `cil teach` in a browser: what it shows and does."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import chromium
from test_teach import EVIL, _no_figure, files, first, folder, images, uploads  # noqa: F401 - fixtures
from test_teach_page import port  # noqa: F401 - a fixture

from cil.app import server
from cil.app.teaching import Teacher


@pytest.fixture
def browser():
    """A browser whose pages note errors and all addresses they ask for; it can reach nothing but this machine."""
    program = chromium("the page of cil teach")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = [
            "--no-sandbox",
            "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ]
        started = playwright.chromium.launch(executable_path=program, args=options, timeout=60_000)
        yield started
        started.close()


@contextmanager
def opened(browser, port: int, **options):  # noqa: F811
    """The page in a window of its own; afterwards, it must have had no error and asked nobody else."""
    context = browser.new_context(**options)
    context.set_default_timeout(60_000)
    page, problems, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://{server.ADDRESS}:{port}/")
    page.locator("#folder", has_text="model").wait_for()
    yield page
    assert not problems and page.title() == "model"
    assert {re.sub(r"^blob:", "", url).split("/")[2] for url in asked} == {f"{server.ADDRESS}:{port}"}
    context.close()


def payload(file: Path, name: str | None = None) -> dict:
    return {"name": name or file.name, "mimeType": "image/png", "buffer": file.read_bytes()}


def shown(page) -> list[list[str]]:
    """What each image's card says: its file, the classes, and a message."""
    page.wait_for_selector("#cards li")
    page.locator("#cards .soft", has_text="…").first.wait_for(state="detached")
    return [card.inner_text().replace("×\n", "").split("\n") for card in page.locator("#cards li").all()]


def lessons(page) -> list[list[str]]:
    return [row.locator("td").all_inner_texts() for row in page.locator("#lessons tr").all()]


def test_a_browser_shows_teaches_and_undoes(browser, port, folder, images):  # noqa: F811
    """With names that would be tags, of a file and of a class."""
    teacher = Teacher(folder, device="cpu")
    expected = teacher.predict(uploads(images, "cat", 0, 1, 2))["images"]
    with opened(browser, port) as page:
        before = lessons(page)
        assert [row[:4] for row in before] == [["1", "ant, bee", "12", "4"]]
        names = ["cat0.png", "cat1.png", f"{EVIL}.png"]
        page.set_input_files(
            "#files", [payload(file, name) for file, name in zip(files(images, "cat"), names, strict=False)]
        )
        for card, name, one in zip(shown(page), names, expected, strict=True):
            assert card == [
                name,
                *(text for label, score in one["classes"] for text in (label, f"{100 * score:.1f} %")),
            ]
        page.fill("#name", EVIL)
        page.click("#learn")
        page.locator("#said", has_text=f"Learned {EVIL} from 2 images; 1 held out.").wait_for()
        page.locator("#classes", has_text=f"3 classes: ant, bee, {EVIL}").wait_for()
        page.locator("#cards li", has_text=EVIL).nth(2).wait_for()  # predicted again, with the new class
        assert EVIL in {label for card in shown(page) for label in card[1::2]}
        now = [one["accuracy_now"] for one in teacher.state()["lessons"]]
        assert [row[5] for row in lessons(page)] == [f"{100 * share:.1f} %" for share in now]
        page.click("#undo")
        page.locator("#said", has_text="Undone: lesson 2").wait_for()
        page.locator("#classes", has_text=re.compile("^2 classes: ant, bee$")).wait_for()
        assert lessons(page) == before and teacher.state()["classes"] == ["ant", "bee"]


@pytest.mark.slow
def test_two_clients_and_broken_files(browser, port, folder, images, monkeypatch):  # noqa: F811
    monkeypatch.setitem(server.LIMITS, "file_mb", 1)
    monkeypatch.setitem(server.LIMITS, "files", 5)
    narrow = {"viewport": {"width": 360, "height": 800}, "color_scheme": "dark"}
    with opened(browser, port) as one, opened(browser, port, **narrow) as other:
        broken = {"name": "words.png", "mimeType": "image/png", "buffer": b"no image"}
        one.set_input_files("#files", [broken, *map(payload, files(images, "cat", 0, 1, 2))])
        cards = shown(one)
        assert cards[0][:1] == ["words.png"] and cards[0][1].startswith("not a readable image")
        assert one.locator("#ask").inner_text() == "What do these 3 images show?"
        other.set_input_files("#files", [payload(file) for file in files(images, "dog", 0, 1)])
        assert [len(card) for card in shown(other)] == [5, 5]

        large = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(1_200_000)}
        for given, line in (
            ([large], "large.png: 2 MB"),
            ([payload(file) for file in files(images, "bee")], "10 images are too many"),
        ):
            other.set_input_files("#files", given)
            other.locator("#refused", has_text=line).wait_for()
            assert len(shown(other)) == 2

        one.fill("#name", "a/b")
        one.click("#learn")
        one.locator("#said.error", has_text="has no / or").wait_for()
        one.fill("#name", "cat")
        other.fill("#name", "dog")
        one.click("#learn")
        other.click("#learn")
        one.locator("#said", has_text="Learned cat").wait_for()
        other.locator("#said", has_text="Learned dog").wait_for()
        for page, cards in (
            (one, 3),
            (other, 2),
        ):  # each hears of the other's lesson, and predicts again: two classes before
            page.locator("#classes", has_text=re.compile("^4 classes: .*(cat, dog|dog, cat)$")).wait_for()
            page.locator("#cards .guess").nth(3 * cards - 1).wait_for()
        assert sorted(Teacher(folder, device="cpu").state()["classes"]) == ["ant", "bee", "cat", "dog"]
        assert other.locator("html").evaluate("page => page.scrollWidth") <= 360
        other.click("[aria-label='Remove dog0.png']")
        assert len(shown(other)) == 1
        other.click("#clear")
        assert other.locator("#cards li").count() == 0 and other.locator("#teaching").is_hidden()
