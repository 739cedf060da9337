"""Opens the dataset that a configuration names as a source of labelled images."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from pathlib import Path

from cil.config import DataConfig
from cil.config.parsing import parse
from cil.config.plugins import arguments, load_object
from cil.data import libraries, sources
from cil.data.classes import find_split
from cil.data.folder import as_text
from cil.data.source import checked_names
from cil.data.sources import ImageSource
from cil.errors import CilError, ConfigError, DataError, PluginError, nearest, shortened


def open_source(config: DataConfig, split: str) -> ImageSource:
    """The source that a configuration names, for the split ``train`` or ``test``, with the limit on its images and the
    words for its classes.

    Raises:
        NoSplitError: A folder dataset does not have the split.
        DataError: The dataset is unknown, its path does not exist, a class is empty, or a package or the network is
            missing.
        PluginError: A custom dataset cannot be loaded, fails, or returns something else than a source.
        ConfigError: ``data.options`` does not fit the arguments of a custom dataset, or ``data.class_names`` is no file
            of names.
    """
    source = _named_source(config, split)
    source.max_pixels = config.max_pixels
    if config.class_names is not None:
        source.class_names = checked_names(_words(config.class_names, source.class_names))
    return source


def _words(file: Path, names: Sequence[str]) -> list[str]:
    """The words that a file has for each of several class names.

    Raises:
        ConfigError: The file cannot be read, is no mapping from names to words, or lacks a class.
    """
    try:
        content = parse(file.read_text(encoding="utf-8"), f"data.class_names: {file}")
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"data.class_names: {file} cannot be read as text in UTF-8 ({reason})") from None
    known = {str(name): words for name, words in content.items()} if isinstance(content, dict) else {}
    missing = [name for name in names if name not in known]
    if missing:
        raise ConfigError(
            f"data.class_names: {file} has no words for {len(missing)} of {len(names)} classes, the first is "
            f"{missing[0]!r}; add a line {missing[0]}: WORDS for each"
        )
    wrong = [name for name in names if not isinstance(known[name], str) or not known[name].strip()]
    if wrong:
        raise ConfigError(
            f"data.class_names: {file}: the words for {wrong[0]!r} are {shortened(known[wrong[0]])}; expected a text"
        )
    return [known[name].strip() for name in names]


def _named_source(config: DataConfig, split: str) -> ImageSource:
    name = config.dataset
    if ":" in name:
        return _custom_source(config, split)
    folder_or_split = config.train if split == "train" else config.test
    if name == "digits":
        return sources.digits(split)
    if name.lower().startswith("torch/"):
        return libraries.torchvision_set(name, config.root, split, config.download)
    if name.lower().startswith("hfds/"):
        options = {"input_key": config.image_key or "image", "target_key": config.label_key or "label"}
        return libraries.huggingface_set(name, config.root, folder_or_split or split, options)
    if name == "folder":
        if config.root is None:
            raise DataError("data.root: a folder dataset needs the folder that holds its splits, e.g. data.root=images")
        root = config.root
        if not root.is_dir():
            raise DataError(f"data.root: {root} is not a folder")
        if config.domains:
            return sources.combine_domains([_split(root, d, folder_or_split, split) for d in config.domains])
        return _split(root, "", folder_or_split, split)
    known = ["digits", "folder", "torch/cifar100", "hfds/uoft-cs/cifar100"]
    raise DataError(
        f"data.dataset: unknown dataset {name!r}{nearest(name, known)}; "
        "allowed: digits, folder, torch/<set>, hfds/<org>/<set>, file.py:function"
    )


def _split(root: Path, domain: str, name: str | None, split: str) -> ImageSource:
    """The split of a folder dataset, or of one of its domains."""
    path, not_taken = find_split(root / domain, name, split)
    place = path.relative_to(root) if path.is_relative_to(root) else path
    return sources.folder(path, as_text(place.as_posix()), not_taken)


def _custom_source(config: DataConfig, split: str) -> ImageSource:
    """The source that a user's function returns for ``function(split, **options)``; ``root`` is passed if it is set."""
    name = config.dataset
    function = load_object(name, "dataset")
    root = {} if config.root is None else {"root": config.root}
    try:
        options = arguments(function, {**config.options, **root}, given=("split",))
    except ConfigError as error:
        raise ConfigError("\n".join(f"data.options: {line}" for line in str(error).splitlines())) from None
    except PluginError as error:
        raise PluginError(f"dataset {name!r}: {error}") from None
    try:
        source = function(split, **options)
    except CilError as error:
        raise type(error)(f"dataset {name!r}, {split}: {error}") from None
    except Exception as error:  # the user's own code may fail in any way
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise PluginError(
            f"dataset {name!r}, {split}: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
        ) from error
    if not isinstance(source, ImageSource):
        raise PluginError(
            f"dataset {name!r} returned {type(source).__name__} for {split}; it must return an ImageSource "
            "(cil.data.sources.from_arrays and folder make one)"
        )
    return source
