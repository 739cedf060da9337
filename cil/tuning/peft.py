"""LoRA and related methods from Hugging Face's PEFT, as tuners.

PEFT modifies the model it receives. It therefore receives a copy of the *module tree* whose parameters and buffers are
the frozen model's own tensors, and the forward pass runs that tree. Only the adapters need additional memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cil.backbone import Backbone
from cil.backbone.vit import Tuner
from cil.errors import BackboneError, nearest
from cil.tuning.frozen import Frozen, shared_tree, tie_buffers
from cil.tuning.peft_config import Factors, Kind, make_config, require_targets
from cil.tuning.peft_tree import adapter_modules, inject, layers_of, uncalled

KEYS = "base_model.model."
"""Prefix of every layer's name in PEFT's files."""


class PeftTuner(Tuner):
    """One or several named PEFT adapters on a frozen backbone; the first one starts active and trainable.

    ============ ================================================================================== ===================
    kind         y for a layer y = Wx + b                                                           source
    ============ ================================================================================== ===================
    ``lora``     Wx + b + (α/r) B A x, A [r, in] drawn, B [out, r] zero                             arXiv 2106.09685
    ``dora``     as LoRA, every row of the sum rescaled to a learned length                         arXiv 2402.09353
    ``ia3``      ℓ ⊙ (Wx + b); on ``fc2`` W(ℓ ⊙ x) + b; ℓ one                                       arXiv 2205.05638
    ``oft``      W R x + b, R block-diagonal orthogonal (by a truncated series), the identity       arXiv 2306.07280
    ``osf``      W's top singular directions fixed, the others trained orthogonally to them         arXiv 2504.07097
    ============ ================================================================================== ===================

    Before training, none of them changes the features (OSF and DoRA up to rounding). They fit every timm model that has
    the target layers and calls them. Some attentions (BEiT, EVA, DINOv3 with biases, Swin V2) only read the weight of
    such a layer, so that PEFT's layer would never run: there LoRA without dropout adds its ΔW to the weights instead,
    and the other kinds are refused. One blank image is sent through the backbone to find such layers.

    Which adapters are *active* (part of the forward pass; LoRA's updates add up) and which are *trainable* are two
    settings, checked after every change. The state dict contains only the adapters' tensors; before loading one,
    ``add`` the adapters it names.

    Args:
        backbone: The frozen backbone; it is never modified.
        kind: The method, see the table.
        rank: ``lora``, ``dora``: rank r (default 8). ``oft``: number of blocks of R (default: blocks of 16). ``osf``:
            singular directions that do not change, a number or a fraction of the smaller width (default 0.5).
        alpha: ``lora``, ``dora``: α (default r, so the update is not scaled).
        dropout: Dropout probability in [0, 1) on the update's input; ``lora`` and ``dora`` only. Dropout is active only
            in training mode and draws from the global random state: isolate the training step.
        factors: ``lora``, ``dora``: what is trained, see :data:`cil.tuning.peft_config.Factors`. B A x is linear in B,
            so with A fixed LoRA is its own linearisation, L-LoRA (Tang et al., arXiv 2310.04742), and with one A for
            all tasks the mean of their B is the mean of their updates. A fixed A is a buffer. ``shared`` draws it from
            seed 0 and keeps it when the tuner is reset. It usually needs a higher learning rate.
        targets: Layers, by the ends of their names (``["qkv", "mlp.fc1"]``) or by one regular expression for whole
            names. The default is ``["qkv"]``, for ``ia3`` ``["qkv", "fc2"]``.
        options: Further arguments of PEFT's configuration of this kind, e.g. ``{"use_rslora": True}``.
        name: Name of the first adapter.

    Raises:
        BackboneError: A target matches no layer, an option is unknown, an argument belongs to another kind, the name is
            bad, an option would modify the frozen weights, or the backbone never calls a target layer and the kind is
            not LoRA without dropout.
    """

    rides_blocks = False
    factors: Factors = "both"

    def __init__(
        self,
        backbone: Backbone,
        kind: Kind = "lora",
        *,
        rank: float | None = None,
        alpha: float | None = None,
        dropout: float = 0.0,
        targets: list[str] | str | None = None,
        options: Mapping[str, Any] | None = None,
        name: str = "default",
        factors: Factors = "both",
    ) -> None:
        super().__init__()
        self.kind = kind
        if factors not in get_args(Factors) or (factors != "both" and kind not in ("lora", "dora")):
            raise BackboneError(
                f"{kind}: factors is {factors!r}; give one of {', '.join(get_args(Factors))}, and for kinds other than "
                "lora and dora both"
            )
        if factors != "both":  # as an attribute the default would change the digests of stored features
            self.factors = factors
        targets = targets or (["qkv", "fc2"] if kind == "ia3" else ["qkv"])
        require_targets(backbone.model, targets)
        self._config = make_config(kind, rank, alpha, dropout, targets, dict(options or {}))
        self._frozen = Frozen(backbone.model)
        self._input_size = backbone.input_size
        self._reads_weights = False  # whether the backbone reads the weights of some layers without calling them
        self._tree = [shared_tree(backbone.model)]  # in a list, or the frozen weights would become part of this module
        self.layers = nn.ModuleDict()
        self._active: tuple[str, ...] = ()
        self._trainable: tuple[str, ...] = ()
        self.add(name, torch.Generator().manual_seed(0))
        self.activate(name)
        self.train_only(name)

    def model(self, model: nn.Module) -> nn.Module:
        if model is not self._frozen.model:
            raise BackboneError(f"this {self.kind} tuner was built on another backbone; build one on this backbone")
        return model if self._reads_weights else self._tree[0]

    def weights(self) -> Mapping[str, Tensor]:
        if not self._reads_weights:
            return {}
        return {
            f"{key}.weight": layer.get_base_layer().weight
            + sum(layer.get_delta_weight(name) for name in self._active if name in layer.lora_A)
            for key, layer in layers_of(self._tree[0])
        }

    @property
    def names(self) -> tuple[str, ...]:
        """All adapters, in the order they were added."""
        return tuple(self._tree[0].peft_config)  # type: ignore[arg-type]

    @property
    def active(self) -> tuple[str, ...]:
        """Adapters that are part of the forward pass."""
        return self._active

    @property
    def trainable(self) -> tuple[str, ...]:
        """Adapters whose parameters require a gradient."""
        return self._trainable

    def add(self, name: str, generator: torch.Generator) -> None:
        """Add an adapter with initial values from ``generator``; it is neither active nor trainable yet.

        Raises:
            BackboneError: The name is taken, empty or contains a dot.
        """
        self._add(name, self._config, generator)

    def activate(self, names: str | Iterable[str]) -> None:
        """Make exactly these adapters part of the forward pass; without any the features are the frozen ones.

        Raises:
            BackboneError: An adapter does not exist, or several are of kind ``osf``, of which PEFT would use the first.
        """
        chosen = self._known(names)
        if self.kind == "osf" and len(chosen) > 1:
            raise BackboneError(f"osf: one adapter can be active at a time, got {', '.join(chosen)}")
        self._active = chosen
        self._apply_settings()

    def train_only(self, names: str | Iterable[str]) -> None:
        """Make exactly these adapters' parameters require a gradient, whether they are active or not.

        Raises:
            BackboneError: An adapter does not exist.
        """
        self._trainable = self._known(names)
        self._apply_settings()

    def reset(self, generator: torch.Generator) -> None:
        """Draw initial values again for the trainable adapters; the others do not change."""
        for name in self._trainable:
            tree = shared_tree(self._frozen.model)  # a second tree with one adapter, to copy its initial values
            inject(tree, self._tree[0].peft_config[name], name, generator)  # type: ignore[index]
            values = dict(adapter_modules(tree).named_parameters())
            with torch.no_grad():
                for key, value in self._of(name):
                    if self.factors != "shared" or not _is_down(key):
                        value.copy_(values[key.removeprefix("layers.")])

    @torch.no_grad()
    def delta(self, name: str = "default") -> dict[str, Tensor]:
        """Return the exact update ΔW [out, in] of each weight, by its name in the timm model; merging uses it.

        Raises:
            BackboneError: The adapter does not exist, or its kind (all but ``lora``, ``osf``) adds nothing to weights.
        """
        (name,) = self._known(name)
        if self.kind not in ("lora", "osf") or getattr(self._config, "use_dora", False):
            raise BackboneError(f"{self.kind}: only lora and osf add a ΔW to the weights")
        layers = dict(layers_of(self._tree[0]))
        return {f"{key}.weight": layer.get_delta_weight(name).detach().clone() for key, layer in layers.items()}

    def save(self, folder: str | Path, name: str = "default") -> None:
        """Write one adapter as PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

        ``peft.PeftModel.from_pretrained(timm_model, folder)`` opens it.

        Raises:
            BackboneError: The adapter does not exist.
        """
        from peft import get_peft_model_state_dict

        (name,) = self._known(name)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tree: Any = self._tree[0]
        config = {**tree.peft_config[name].to_dict(), "inference_mode": True}
        text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets have no fixed order
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        state = get_peft_model_state_dict(tree, adapter_name=name)
        state = {KEYS + key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def load(self, folder: str | Path, name: str = "default") -> None:
        """Read an adapter that PEFT or :meth:`save` wrote into the adapter ``name``, which is added if it is missing.

        Raises:
            BackboneError: Files are missing or damaged, are of another kind, or do not fit the layers.
        """
        from peft import PeftConfig, set_peft_model_state_dict

        folder = Path(folder)
        try:
            config = PeftConfig.from_pretrained(str(folder.resolve(strict=True)))
            state = load_file(folder / "adapter_model.safetensors")
        except Exception as error:  # missing folders, JSON, PEFT and safetensors share no base class
            raise BackboneError(
                f"{folder}: no adapter_config.json with adapter_model.safetensors that can be read "
                f"({type(error).__name__})"
            ) from None
        if type(config) is not type(self._config):
            raise BackboneError(f"{folder} holds an adapter of kind {config.peft_type.lower()}, not {self.kind}")
        if name not in self.names:
            require_targets(self._frozen.model, config.target_modules)
            config.inference_mode = False
            self._add(name, config, torch.Generator().manual_seed(0))
        expected = {key.removeprefix("layers.").replace("/", "."): value for key, value in self._of(name)}
        try:
            result: Any = set_peft_model_state_dict(self._tree[0], state, adapter_name=name)
        except (RuntimeError, KeyError) as error:
            raise BackboneError(f"{folder} does not fit: {' '.join(str(error).split())}") from None
        missing, unknown = [key for key in result.missing_keys if key in expected], result.unexpected_keys
        if missing or unknown:
            raise BackboneError(
                f"{folder} does not fit adapter {name!r}: {len(missing)} tensors missing, {len(unknown)} unknown; "
                f"first: {[*missing, *unknown][0]}"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> PeftTuner:
        for tensor in chain(self._frozen.model.parameters(), self._frozen.model.buffers()):
            memo.setdefault(id(tensor), tensor)  # the copy owns its adapters and shares the frozen weights
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        tie_buffers(copied._tree[0], copied._frozen.model)
        if self.kind == "osf":  # deepcopy does not copy the tensors' gradient hooks
            for _, layer in layers_of(copied._tree[0]):
                layer.hook_handles.clear()
                for name in copied.names:
                    layer._attach_hooks(name)
        return copied

    def _add(self, name: str, config: Any, generator: torch.Generator) -> None:
        known = self.names if hasattr(self._tree[0], "peft_config") else ()
        if name in known or not name or "." in name:
            raise BackboneError(f"adapter name {name!r} is taken, empty or has a dot; there are {', '.join(known)}")
        inject(self._tree[0], copy.deepcopy(config), name, generator)
        if self.factors != "both":
            _fix_down(self._tree[0], name)
        self.layers = adapter_modules(self._tree[0])
        self.train(self.training)  # a new dropout starts in training mode
        for _, layer in layers_of(self._tree[0]):
            layer.set_adapter([name], inference_mode=True)  # the image that finds what is called passes through it
        self._reads_weights = self._uses_weights_only(config)
        self._apply_settings()

    def _uses_weights_only(self, config: Any) -> bool:
        """Whether the backbone reads the weights of some target layers instead of calling the layers.

        Raises:
            BackboneError: It does, and an adapter of this configuration would train nothing.
        """
        layers = dict(layers_of(self._tree[0]))
        unused = uncalled(self._tree[0], layers, self._input_size)
        if not unused:
            return False
        plain = self.kind == "lora" and not config.use_dora
        if plain and not config.lora_dropout and not config.lora_bias:
            return True
        reader = type(self._frozen.model.get_submodule(unused[0].rpartition(".")[0])).__name__
        called = sorted({key.rsplit(".", 1)[-1] for key in layers if key not in unused})
        others = f", give other targets ({', '.join(called)})" if called else ", give other targets"
        raise BackboneError(
            f"{self.kind}{' with dropout or a bias' if plain else ''}: {len(unused)} target layers, {unused[0]} … "
            f"{unused[-1]}, are read, not called, by {reader}, so the tuner would train nothing; use lora without "
            f"dropout{others}, or a tuner of weights such as bitfit"
        )

    def _known(self, names: str | Iterable[str]) -> tuple[str, ...]:
        chosen = (names,) if isinstance(names, str) else tuple(names)
        for name in chosen:
            if name not in self.names:
                raise BackboneError(
                    f"no adapter {name!r}{nearest(name, self.names)}; there are {', '.join(self.names)}"
                )
        return chosen

    def _of(self, name: str) -> list[tuple[str, Tensor]]:
        """Parameters of one adapter, and A if it is fixed: layers.<layer>.<part>.<adapter>[…]."""
        fixed = ((key, value) for key, value in self.named_buffers() if self.factors != "both" and _is_down(key))
        return [(key, value) for key, value in chain(self.named_parameters(), fixed) if key.split(".")[3] == name]

    def _apply_settings(self) -> None:
        from peft.functional import set_requires_grad

        tree = self._tree[0]
        for _, layer in layers_of(tree):
            layer.set_adapter(list(self._active), inference_mode=True)
        set_requires_grad(tree, list(self._trainable), requires_grad=True)
        # PEFT leaves older adapters trainable after adding one, and its versions differ in this: check the result
        wrong = [k for k, p in self.named_parameters() if p.requires_grad != (k.split(".")[3] in self._trainable)]
        wrong += [key for key, p in self._frozen.model.named_parameters() if p.requires_grad]
        wrong += [key for key, layer in layers_of(tree) if tuple(layer.active_adapters) != self._active]
        if wrong:
            raise RuntimeError(
                f"PEFT did not set active {self._active} and trainable {self._trainable} at {wrong[:3]}: "
                "please report this with the version of peft"
            )


def _is_down(key: str) -> bool:
    """Whether a name, layers.<layer>.<part>.<adapter>[…], is that of a factor A."""
    return key.split(".")[2] == "lora_A"


def _fix_down(tree: nn.Module, name: str) -> None:
    """Make the factors A of an adapter buffers, which no optimiser trains."""
    for _, layer in layers_of(tree):
        if name in layer.lora_A:
            down = layer.lora_A[name]
            value = down.weight.detach()
            del down.weight
            down.register_buffer("weight", value)
