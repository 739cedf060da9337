"""Exports a run as one artifact: features, classifier and model card, verified to give the same logits.

The artifact is a folder. ``model.json`` has the facts for programs, ``README.md`` those for people, and the model is
``model.safetensors`` (a learner's whole state, for :func:`load`; works for every learner), ``model.pt2`` (a program for
``torch.export.load``, without this package) or ``model.onnx``. Programs map normalised images float32 [B, 3, S, S], any
B ≥ 1, to (logits [B, C], features [B, F]). The preprocessing of image files is not part of them; ``model.json``
specifies it exactly.
"""

from cil.export.artifact import FORMATS, is_artifact, load
from cil.export.writing import export

__all__ = ["FORMATS", "export", "is_artifact", "load"]
