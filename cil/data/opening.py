"""From what a configuration says of its data to a source of labelled pictures."""

from __future__ import annotations

from cil.config import DataConfig
from cil.data import sources
from cil.data.sources import ImageSource
from cil.errors import ConfigError, DataError, PluginError, nearest
from cil.plugins import arguments, load


def open_source(config: DataConfig, split: str) -> ImageSource:
    """The source a configuration names, for ``split`` train or test.

    Raises:
        DataError: Unknown dataset, nothing at the path, an empty class, a missing package or network.
    """
    name = config.dataset
    if ":" in name:
        return _own_source(config, split)
    given = config.train if split == "train" else config.test
    if name == "digits":
        return sources.digits(split)
    if name.lower().startswith("torch/"):
        return sources.torchvision_set(name, config.root, split, config.download)
    if name.lower().startswith("hfds/"):
        options = {"input_key": config.image_key or "image", "target_key": config.label_key or "label"}
        return sources.huggingface_set(name, config.root, given or split, options)
    if name == "folder":
        if config.root is None:
            raise DataError("data.root: a folder dataset needs the folder that holds its splits, e.g. data.root=images")
        root = config.root.expanduser()
        if not root.is_dir():
            raise DataError(f"data.root: {root} is not a folder")
        if config.domains:
            return sources.combine_domains(
                [sources.folder(sources.find_split(root / d, given, split)) for d in config.domains]
            )
        return sources.folder(sources.find_split(root, given, split))
    known = ["digits", "folder", "torch/cifar100", "hfds/uoft-cs/cifar100"]
    raise DataError(
        f"data.dataset: unknown dataset {name!r}{nearest(name, known)}; "
        "allowed: digits, folder, torch/<set>, hfds/<org>/<set>, file.py:function"
    )


def _own_source(config: DataConfig, split: str) -> ImageSource:
    """The source that a function of the user's own gives: ``function(split, **options)``, and ``root`` where it is set.

    Raises:
        PluginError: No such function, or what it gives is no source.
        ConfigError: ``data.options`` does not fit its arguments.
    """
    name = config.dataset
    function = load(name, "dataset")
    root = {} if config.root is None else {"root": config.root.expanduser()}
    try:
        source = function(split, **arguments(function, {**config.options, **root}, given=("split",)))
    except ConfigError as error:
        raise ConfigError("\n".join(f"data.options: {line}" for line in str(error).splitlines())) from None
    except PluginError as error:
        raise PluginError(f"dataset {name!r}: {error}") from None
    if not isinstance(source, ImageSource):
        raise PluginError(
            f"dataset {name!r} gave {type(source).__name__} for {split}; it must give an ImageSource "
            "(cil.data.sources.from_arrays and folder make one)"
        )
    return source
