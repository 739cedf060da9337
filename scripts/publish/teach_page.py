"""Draw docs/teach.webp: the page of `cil teach`, in a browser, with a model that has learned three lessons of CIFAR-10.

    python -m scripts.publish.teach_page ../shared/data/cifar10_train.tar

Needs playwright and the system's Chromium, and some seconds.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

from cil.app import server
from cil.app.teaching import Teacher
from cil.growing import GrowingModel
from scripts import ROOT

LESSONS = (("cat", "dog"), ("frog", "horse"))
TAUGHT = range(40)
SHOWN = ("ship", range(60, 66))
WIDTH = 800


def files(tar: tarfile.TarFile, place: Path, name: str, which: range) -> list[Path]:
    """Images of a class, below its folder in ``place``."""
    for i in which:
        member = tar.extractfile(f"{name}/{i:04d}.jpg")
        assert member is not None
        (place / name).mkdir(parents=True, exist_ok=True)
        (place / name / f"{name}{i}.jpg").write_bytes(member.read())
    return [place / name / f"{name}{i}.jpg" for i in which]


def draw(images: Path, work: Path) -> bytes:
    """The page as a PNG file."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    model = GrowingModel(work / "animals", device="cpu")
    with tarfile.open(images) as tar:
        for number, names in enumerate(LESSONS):
            for name in names:
                files(tar, work / str(number), name, TAUGHT)
            model.learn(work / str(number))
        shown = files(tar, work / "photos", *SHOWN)
    with server.serving(Teacher(model.path, device="cpu")) as port, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 600}, color_scheme="light")
        page.goto(f"http://{server.ADDRESS}:{port}/")
        page.locator("#lessons tr").nth(len(LESSONS) - 1).wait_for()
        page.set_input_files("#files", shown)
        page.locator("#cards .guess").nth(3 * len(shown) - 1).wait_for()
        page.fill("#name", SHOWN[0])
        page.click("#learn")
        page.locator("#said", has_text="Learned").wait_for()
        page.locator("#cards .guess", has_text=SHOWN[0]).first.wait_for()
        drawn = page.screenshot(full_page=True)
        browser.close()
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", type=Path, help="cifar10_train.tar")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "teach.webp")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        drawn = draw(given.images, Path(work))
    with Image.open(io.BytesIO(drawn)) as image:
        image.convert("RGB").save(given.out, quality=80, method=6)
    print(f"{given.out}: {given.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
