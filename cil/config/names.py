"""Names that become folders: of a benchmark, and of a learner in the results."""

from __future__ import annotations

import re
import unicodedata

from cil.errors import shortened

MOST_BYTES = 200
PLAIN = re.compile(r"[\w.\-]+")
RESERVED = re.compile(r"compare(-\d+)?\.(html|png)|tuned(\.partial)?\.json|tuned\.yaml|backbones\.json", re.IGNORECASE)
"""What commands write beside the folders that have these names."""


def check_name(name: str) -> str:
    """The name itself, if every file system takes it as the name of one folder.

    Raises:
        ValueError: It is empty or too long, would lead elsewhere or hide the folder, or is the name of another file.
    """
    problem = None
    if not name:
        problem = "is empty"
    elif "/" in name or "\\" in name:
        problem = "has a slash or backslash"
    elif name != name.strip(" ."):
        problem = "begins or ends with a space or a dot"
    elif not name.isprintable():
        problem = "has a control character or an invisible one"
    elif len(name.encode()) > MOST_BYTES:
        problem = f"has {len(name.encode())} bytes, more than {MOST_BYTES}"
    elif RESERVED.fullmatch(name):
        problem = "is the name of a file that cil writes to the results folder"
    if problem:
        raise ValueError(f"{shortened(name)} {problem}; it becomes the name of a folder, so choose another")
    return name


def check_plain(name: str) -> str:
    """The name itself, if it is also a word for commands and tables.

    Raises:
        ValueError: It has other characters than letters, digits, ``_``, ``.`` and ``-``.
    """
    if not PLAIN.fullmatch(check_name(name)):
        raise ValueError(f"{shortened(name)} may have letters, digits, _, . and - only, e.g. {fitting(name)}")
    return name


def fitting(text: str) -> str:
    """A benchmark's name made of any text, such as the name of a file.

    >>> [fitting(text) for text in ("ncm", "my exp (1)", "..", "compare.html")]
    ['ncm', 'my-exp-1', 'benchmark', 'compare-html']
    """
    name = re.sub(r"[^\w.\-]+", "-", text)
    name = name if name == text else name.strip("-")
    name = name.encode()[:MOST_BYTES].decode(errors="ignore").strip(".")
    return name.replace(".", "-") if RESERVED.fullmatch(name) else name or "benchmark"


def alike(name: str) -> str:
    r"""The same text for names that some file systems take for one: they differ in case or normalisation only.

    >>> alike("Été") == alike("e\u0301te\u0301")
    True
    """
    return unicodedata.normalize("NFC", name).casefold()
