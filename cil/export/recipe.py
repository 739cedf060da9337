"""How to use an artifact: code for its model card, which prepares images as the run did, with and without cil."""

from __future__ import annotations

import textwrap

from cil.export.artifact import Facts

RESIZE = {
    "squash": """\
    image = image.resize((scale, scale), filter)
""",
    "center": """\
    short, (width, height) = min(image.size), image.size
    image = image.resize((scale * width // short, scale * height // short), filter)
""",
}
PIXELS = """\
import json

import numpy as np
{imports}
from PIL import Image, ImageOps

facts = json.load(open("model.json"))


def pixels({arguments}):
    size, scale = steps["input_size"], int(steps["input_size"] / steps["crop_pct"])
    filter = Image.Resampling[steps["interpolation"].upper()]
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
{resize}\
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    x = (np.asarray(image, np.float32) / 255 - np.float32(steps["mean"])) / np.float32(steps["std"])
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])


"""
PIXELS_BY_TIMM = """\
import json
{numpy}
{imports}
from PIL import Image, ImageOps
from timm.data import create_transform

facts = json.load(open("model.json"))


def pixels({arguments}):
    transform = create_transform(**steps)
    return transform(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))[None].numpy()


"""
PACKED = """\
def packed(path):
    parts = [pixels(path, steps).reshape(1, 3, -1) for steps in facts["preprocessing"]["members"]]
    return np.concatenate(parts, axis=2)


"""
RUN = {
    "torch.export": (
        "import torch",
        """\
program = torch.export.load("model.pt2").module()
logits, features = program(torch.from_numpy({input}("photo.png")))
print(facts["classes"][int(logits[0].argmax())])
""",
    ),
    "onnx": (
        "import onnxruntime",
        """\
session = onnxruntime.InferenceSession("model.onnx")
logits, features = session.run(["logits", "features"], {"images": {input}("photo.png")})
print(facts["classes"][int(logits[0].argmax())])
""",
    ),
}
WITH_CIL = """\
from pathlib import Path

from cil.export import load
from cil.prediction import predict

model = load(".")  # this folder
for path, ranked in predict(model, [Path("photo.png")], top=3):
    print(path, ranked)
"""


def usage(facts: Facts) -> list[str]:
    """Paragraphs on how to use the model, with code that runs in the artifact's folder."""
    kind = facts["format"]
    if kind == "safetensors":
        own = facts["learner"]["entry"].get("class")
        needs = f" The learner's own code must be at `{own}`." if own else ""
        return [
            prose(f"Use it with cil; the original run is not needed.{needs} In a shell: `cil predict . photo.png`"),
            f"```python\n{WITH_CIL}```",
        ]
    imports, run = RUN[kind]
    packages = {"torch.export": "torch, numpy and pillow", "onnx": "onnxruntime, numpy and pillow"}[kind]
    steps, several = each_preprocessing(facts), "members" in facts["preprocessing"]
    modes = {one["crop_mode"] for one in steps}
    resize = RESIZE.get(modes.pop()) if len(modes) == 1 else None
    if resize is None:
        needs, code = f"It needs {packages}, and timm for the resizing.", PIXELS_BY_TIMM
    else:
        needs, code = f"It needs {packages}, but neither cil nor timm.", PIXELS.replace("{resize}", resize)
    code += (PACKED if several else "") + run
    fill = {
        "numpy": "\nimport numpy as np" if several else "",
        "imports": imports,
        "arguments": "path, steps" if several else 'path, steps=facts["preprocessing"]',
        "input": "packed" if several else "pixels",
    }
    for name, text in fill.items():
        code = code.replace(f"{{{name}}}", text)
    return [prose(needs), f"```python\n{code}```"]


def each_preprocessing(facts: Facts) -> list[Facts]:
    """The preprocessing for each backbone."""
    steps: Facts = facts["preprocessing"]
    return steps.get("members", [steps])


def preparation(facts: Facts) -> str:
    """Sentences on how an image becomes the model's input."""
    told = [
        f"resized with PIL's {one['interpolation']} filter (crop mode {one['crop_mode']}, crop_pct "
        f"{one['crop_pct']:g}) and cropped to {one['input_size']} × {one['input_size']} pixels; then (pixel / 255 − "
        f"mean) / std with mean {one['mean']} and std {one['std']}"
        for one in each_preprocessing(facts)
    ]
    if "members" not in facts["preprocessing"]:
        return f"They are {told[0]}."
    parts = "; ".join(f"({k}) {one}" for k, one in enumerate(told, 1))
    return (
        "Every image is prepared once for each backbone, the results are flattened to [3, S²], and they stand side by "
        f"side in this order: {parts}."
    )


def prose(text: str) -> str:
    """A paragraph, wrapped at 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
