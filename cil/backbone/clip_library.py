"""What comes from open_clip: architectures, facts about published weights, text towers and tokenizers.

Only this file imports open_clip, and only in functions: the import takes a second, and predictions do not need it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cil.backbone.hub import fetched
from cil.backbone.weights import misfit, one_line
from cil.errors import BackboneError, nearest
from cil.utils.randomness import isolated

PREFIX = "open_clip/"
"""Prefix of the names of backbones that open_clip describes."""
CONFIG, TOKENIZER = "open_clip_config.json", ("tokenizer.json", "tokenizer_config.json")
"""Files of a folder that open_clip saved, beside the weights."""
ARGUMENTS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias")
"""Arguments of open_clip's models."""
TEXT_PARTS = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
"""Parts of a text tower, which open_clip's older models do not name ``text``."""
log = logging.getLogger(__name__)


def library() -> Any:
    """open_clip.

    Raises:
        BackboneError: It is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise BackboneError(
            f"backbone.name: names with {PREFIX} need open_clip ({one_line(error)}); pip install 'cil[clip]'"
        ) from None
    return open_clip


def architecture(name: str) -> dict[str, Any]:
    """open_clip's configuration of an architecture."""
    found = library().get_model_config(name)
    if found is None:
        known = library().list_models()
        raise BackboneError(
            f"backbone.name: open_clip knows no architecture {name!r}{nearest(name, known)}; known: "
            f"{', '.join(known[:3])}, … ({len(known)})"
        )
    return dict(found)


def tagged(name: str, tag: str) -> dict[str, Any]:
    """open_clip's facts about published weights."""
    facts = library().get_pretrained_cfg(name, tag)
    if not facts:
        known = library().list_pretrained_tags_by_model(name)
        raise BackboneError(
            f"backbone.name: open_clip knows no weights {tag!r} of {name}{nearest(tag, known)}; known: "
            f"{', '.join(known) or 'none, so set backbone.weights'}"
        )
    return dict(facts)


def imagenet_templates() -> tuple[str, ...]:
    """The 80 sentences of CLIP's ImageNet evaluation, with ``{}`` for the class, from open_clip.

    Raises:
        BackboneError: open_clip is not installed.
    """
    return tuple(template("{}") for template in library().OPENAI_IMAGENET_TEMPLATES)


def random_state(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of an untrained model, as open_clip draws them from seed 0."""
    kind = library().CustomTextCLIP if config.get("custom_text") else library().CLIP
    with isolated(0):
        return kind(**{key: value for key, value in config.items() if key in ARGUMENTS}).state_dict()


class Tower:
    """A text tower and its tokenizer.

    Args:
        config: open_clip's model configuration.
        state: Tensors of the whole model by name.
        folder: Folder with the tokenizer's files; None: open_clip's own vocabulary, or files of the Hub.

    Attributes:
        fingerprint: sha256 over the weights, the configuration of the tower, and the vocabulary.
        version: Version of open_clip.
    """

    def __init__(self, config: Mapping[str, Any], state: Mapping[str, Tensor], folder: Path | None) -> None:
        self._config, self._folder = config, folder
        texts = {k if k.startswith("text.") else f"text.{k}": v for k, v in state.items() if _of_text(k)}
        self._state = {key.removeprefix("text."): value for key, value in texts.items()}
        self.context = int(config["text_cfg"].get("context_length", 77))
        self.version = library().__version__
        self.fingerprint = self._digest()

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps([self._config["text_cfg"], self._gelu], sort_keys=True).encode())
        digest.update(self._vocabulary.read_bytes())
        for key, value in sorted(self._state.items()):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{key} {plain.dtype} {tuple(plain.shape)}\n".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def __call__(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Vectors of texts, [n, d] on ``device``; texts longer than the context are cut, with a warning."""
        tokens = self._tokens(texts, self.context)
        pad = getattr(getattr(self.tokenizer, "tokenizer", None), "pad_token_id", 0)
        longer = self._tokens(texts, self.context + 1)[:, -1] != pad
        if bool(longer.any()):
            first = texts[int(longer.nonzero()[0])]
            log.warning(
                "%d texts are longer than the %d tokens that the text tower reads, and are cut; the first is %r",
                int(longer.sum()),
                self.context,
                first,
            )
        return self._encoder.to(device)(tokens.to(device))

    def _tokens(self, texts: Sequence[str], length: int) -> Tensor:
        return self.tokenizer(list(texts), context_length=length)

    @property
    def _gelu(self) -> bool:
        return bool(self._config.get("quick_gelu", False))

    @cached_property
    def _encoder(self) -> nn.Module:
        """open_clip's text tower, built beside an image tower of one small block that is thrown away."""
        blank = {"image_size": 8, "layers": 1, "width": 64, "head_width": 64, "patch_size": 8}
        with isolated(0):
            whole = library().CustomTextCLIP(
                self._config["embed_dim"], blank, dict(self._config["text_cfg"]), quick_gelu=self._gelu
            )
        try:
            whole.text.load_state_dict(self._state)
        except RuntimeError as error:
            raise misfit("text tower", error) from None
        self._state = {}
        return whole.text.requires_grad_(False).eval()

    @cached_property
    def tokenizer(self) -> Callable[..., Tensor]:
        """Texts → token numbers, int64 [n, context]."""
        text = self._config["text_cfg"]
        arguments = dict(text.get("tokenizer_kwargs") or {})
        if not text.get("hf_tokenizer_name"):
            return library().SimpleTokenizer(context_length=self.context, **arguments)
        place = str(self._vocabulary.parent)
        if text.get("tokenizer_mode"):
            arguments["tokenizer_mode"] = text["tokenizer_mode"]
        return library().tokenizer.HFTokenizer(place, context_length=self.context, **arguments)

    @cached_property
    def _vocabulary(self) -> Path:
        """The file with the tokens."""
        name = self._config["text_cfg"].get("hf_tokenizer_name")
        if not name:
            return Path(library().tokenizer.default_bpe())
        if self._folder is not None:
            file = self._folder / TOKENIZER[0]
            if not file.is_file():
                raise BackboneError(
                    f"backbone.weights: {self._folder} holds no {TOKENIZER[0]}; copy {' and '.join(TOKENIZER)} of "
                    f"https://huggingface.co/{name} there"
                )
            return file
        advice = f"set backbone.weights to a folder with {CONFIG}, the weights, {' and '.join(TOKENIZER)}"
        places = [fetched(name, [file], "the tokenizer", advice) for file in TOKENIZER]  # both into one folder
        return places[0]


def _of_text(key: str) -> bool:
    """Whether a tensor of a whole model belongs to the text tower; CLIP and CustomTextCLIP name them differently."""
    return key.startswith("text.") or key.split(".")[0] in TEXT_PARTS
