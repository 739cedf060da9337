"""Files of the Hugging Face Hub: cached or downloaded, and an answer within seconds where there is no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import timm
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from cil.backbone.weights import one_line
from cil.config import BackboneConfig
from cil.errors import BackboneError

WAIT = 3.0
"""Seconds to wait for the Hub before its files count as out of reach."""


def fetched(repository: str, names: Sequence[str], what: str, advice: str) -> Path:
    """The first of several files of a repository of the Hub that exists: as it is cached, or downloaded.

    The Hub's client waits and tries again for half a minute where there is no network; here one short question is asked
    first.

    Args:
        repository: Repository, ``<organisation>/<name>``.
        names: Names of the file, in order of preference.
        what: What the file is, for messages.
        advice: What to do without a network connection.

    Raises:
        BackboneError: The file is neither cached nor in reach; the message names it and its address.
    """
    for name in names:
        if isinstance(cached := try_to_load_from_cache(repository, name), str):
            return Path(cached)
    reason: Exception
    for name in names:
        try:
            get_hf_file_metadata(hf_hub_url(repository, name), timeout=WAIT)
            return Path(hf_hub_download(repository, name))
        except EntryNotFoundError as error:
            if name != names[-1] and not isinstance(error, LocalEntryNotFoundError):
                continue
            reason = error
        except Exception as error:  # the client's errors of connections share no base class
            reason = error
        raise BackboneError(
            f"backbone.name: {what}, {names[0]} of https://huggingface.co/{repository}, could not be downloaded "
            f"({type(reason).__name__}: {one_line(reason)}); without a network connection, {advice}"
        ) from None
    raise AssertionError("there is at least one name")


def not_fetched(config: BackboneConfig, error: Exception) -> BackboneError | None:
    """The error for a failed download; None for any other failure."""
    source, _, hub = config.name.rpartition(":")
    if source == "local-dir" or not isinstance(error, OSError | EntryNotFoundError):
        return None
    said = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(error, GatedRepoError):
        hub = hub if source else getattr(timm.get_pretrained_cfg(hub), "hf_hub_id", None) or hub
        return BackboneError(
            f"backbone.name: the weights of {config.name} are under a licence: accept the licence at "
            f"https://huggingface.co/{hub.split('@')[0]}, then log in with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        return BackboneError(f"backbone.name: the Hub has no {hub}, or it is private ({said}); correct the name")
    if isinstance(error, FileNotFoundError | EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return None  # a file that is not there, here or on the Hub
    local = "backbone.name=local-dir:FOLDER" if source else "backbone.weights=FILE"
    return BackboneError(
        f"backbone.name: {config.name} could not be downloaded ({said}); without a network connection, set {local}"
    )
