"""A finished run as one artifact: features and classifier together, a model card, checked to give the same logits.

The artifact is a folder. ``model.json`` holds what a machine must know, ``README.md`` what a person must, and the model
is ``model.safetensors`` (all a learner keeps, for :func:`load`; works for every learner), ``model.pt2`` (a program for
``torch.export.load``, without this package) or ``model.onnx``. Programs map normalised images float32 [B, 3, S, S], any
B ≥ 1, to (logits [B, C], features [B, F]); turning a picture into such an image is not part of them, and is stated
exactly in ``model.json``.
"""

from cil.export.artifact import FORMATS, is_artifact, load
from cil.export.writing import export

__all__ = ["FORMATS", "export", "is_artifact", "load"]
