"""The model card of an artifact: ``README.md`` with front matter as the Hugging Face Hub reads it."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from cil.backbone import EMBEDDED, Backbone, embedded_card
from cil.export.artifact import Facts

LIBRARY = {"safetensors": "cil", "torch.export": "pytorch", "onnx": "onnx"}
SHOWN = 200
"""Classes the card names; ``model.json`` names all."""
MEASURES = (
    ("accuracy_last", "accuracy after the last stage, over all classes seen, %"),
    ("accuracy_average", "mean of that accuracy over the stages, %"),
    ("forgetting", "forgetting (Chaudhry et al. 2018), points"),
    ("forgetting_within_task", "the same with the task given, points"),
    ("backward_transfer", "backward transfer (Lopez-Paz & Ranzato 2017), points"),
    ("learning_accuracy", "accuracy on each task when it was new, %"),
)

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
from PIL import Image

facts = json.load(open("model.json"))
steps = facts["preprocessing"]
size, scale = steps["input_size"], int(steps["input_size"] / steps["crop_pct"])
filter = Image.Resampling[steps["interpolation"].upper()]


def pixels(path):
    image = Image.open(path).convert("RGB")
{resize}\
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    x = (np.asarray(image, np.float32) / 255 - np.float32(steps["mean"])) / np.float32(steps["std"])
    return np.ascontiguousarray(x.transpose(2, 0, 1)[None])


"""
PIXELS_BY_TIMM = """\
import json

{imports}
from PIL import Image
from timm.data import create_transform

facts = json.load(open("model.json"))
transform = create_transform(**facts["preprocessing"])


def pixels(path):
    return transform(Image.open(path).convert("RGB"))[None].numpy()


"""
RUN = {
    "torch.export": (
        "import torch",
        """\
program = torch.export.load("model.pt2").module()
logits, features = program(torch.from_numpy(pixels("photo.png")))
print(facts["classes"][int(logits[0].argmax())])
""",
    ),
    "onnx": (
        "import onnxruntime",
        """\
session = onnxruntime.InferenceSession("model.onnx")
logits, features = session.run(["logits", "features"], {"images": pixels("photo.png")})
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


def licence(backbone: Backbone, weights: str | None) -> dict[str, str]:
    """What is known of the terms of the backbone's weights: an identifier of the Hub, and a sentence.

    Args:
        backbone: The backbone.
        weights: As ``backbone.weights`` of the configuration.
    """
    pretrained: Any = getattr(backbone.model, "pretrained_cfg", None) or {}
    name, known = "unknown", f"timm states none for the backbone's weights, {backbone.name}."
    if weights == "random":
        known = "the backbone is untrained."
    elif weights is not None:
        known = "the backbone's weights came from a local file, whose terms are not known here."
    elif backbone.name == EMBEDDED:
        name = "other"
        known = f"the backbone's weights come with cil (Apache-2.0), trained on {embedded_card()['data']['dataset']}."
    elif pretrained.get("license"):
        name = pretrained["license"]
        known = f"{name} for the backbone's weights, {backbone.name}, as timm states it."
    return {"id": name, "text": known}


def card(facts: Facts) -> str:
    """``README.md`` of an artifact, from its ``model.json``."""
    learner, backbone, check = facts["learner"], facts["backbone"], facts["check"]
    names, steps, size = facts["classes"], facts["preprocessing"], facts["preprocessing"]["input_size"]
    title = f"{learner['title']} on {facts['protocol']['benchmark']}"
    parts = [
        front_matter(facts, title),
        f"# {title}",
        prose(
            f"An image classifier that learned its {len(names)} classes task after task (class-incremental learning). "
            f"Learner: `{learner['title']}` ({learner['paper']}), on the backbone `{backbone['name']}`. Features and "
            "classifier are one model: normalised images in, logits and features out."
        ),
        "## Use",
        *usage(facts),
        "## Input and output",
        prose(
            f"`images`: float32 {shape(facts['input']['shape'])}, RGB, any batch from 1 on. Pictures are resized with "
            f"PIL's {steps['interpolation']} filter (crop mode {steps['crop_mode']}, crop_pct {steps['crop_pct']:g}) "
            f"and cropped to {size} × {size} pixels; then (pixel / 255 − mean) / std with mean {steps['mean']} and std "
            f"{steps['std']}."
        ),
        prose(
            f"`logits`: float32 {shape(facts['outputs']['logits'])}, the learner's own scores, which are no "
            "probabilities; column i is class i of the list below and of `model.json`. "
            f"`features`: float32 {shape(facts['outputs']['features'])}."
        ),
        "## Classes",
        prose(", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more in `model.json`" if names[SHOWN:] else "")),
        "## Training",
        prose(training(facts)),
        "```yaml\n" + yaml.safe_dump(learner["parameters"], sort_keys=False, allow_unicode=True) + "```",
        "## Results of this run",
        *results(facts),
        "## Intended use and limits",
        prose(
            f"For pictures like those it learned from. Every picture gets one of the {len(names)} classes, whatever it "
            "shows. Accuracy was measured on the images named above and nowhere else; it differs between classes, and "
            "classes of early tasks may have been forgotten in part. Scores are not calibrated. What biases the "
            "pre-training data have, the features have."
        ),
        prose(f"Licence: {backbone['licence']['text']} The terms of the training images apply besides."),
        "## Check",
        prose(checked(check, facts["versions"]["exported"])),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: Facts, title: str) -> str:
    dataset = facts["protocol"]["dataset"]
    accuracy = {"type": "accuracy", "value": round(facts["summary"]["accuracy_last"], 4)}
    found = {
        "task": {"type": "image-classification"},
        "dataset": {"name": dataset, "type": dataset},
        "metrics": [accuracy],
    }
    head = {
        "library_name": LIBRARY[facts["format"]],
        "pipeline_tag": "image-classification",
        "license": facts["backbone"]["licence"]["id"],
        "tags": ["image-classification", "class-incremental-learning", "continual-learning", facts["learner"]["title"]],
        "model-index": [{"name": title, "results": [found]}],
    }
    return "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---"


def usage(facts: Facts) -> list[str]:
    """How to run it, in code that runs in the artifact's folder."""
    kind = facts["format"]
    if kind == "safetensors":
        own = facts["learner"]["entry"].get("class")
        needs = f" The learner's own code must be at `{own}`." if own else ""
        return [
            prose(f"With cil; the run it came from is not needed.{needs} Or, in a shell: `cil predict . photo.png`"),
            f"```python\n{WITH_CIL}```",
        ]
    imports, run = RUN[kind]
    packages = {"torch.export": "torch, numpy and pillow", "onnx": "onnxruntime, numpy and pillow"}[kind]
    resize = RESIZE.get(facts["preprocessing"]["crop_mode"])
    if resize is None:
        needs, code = f"With {packages}, and timm for the resizing.", PIXELS_BY_TIMM
    else:
        needs, code = f"With {packages}; neither cil nor timm is needed.", PIXELS.replace("{resize}", resize)
    return [prose(needs), f"```python\n{code.replace('{imports}', imports)}{run}```"]


def training(facts: Facts) -> str:
    learner, protocol, stages = facts["learner"], facts["protocol"], facts["stages"]
    sizes = [len(task) for task in facts["tasks"]]
    what = "domains" if protocol["stream"]["type"] == "domain_incremental" else "tasks"
    text = (
        f"Dataset `{protocol['dataset']}`: {protocol['data']['train']['images']} training and "
        f"{protocol['data']['test']['images']} test images, their sha256 in `model.json`. Stream: {len(sizes)} {what} "
        f"with {', '.join(map(str, sizes))} classes; class order {protocol['order']}, seed {protocol['seed']}. "
        f"Hyper-parameters chosen by: {protocol['chosen_by']}."
    )
    if stages["finished"] < stages["planned"]:
        text += f" {stages['planned'] - stages['finished']} further {what} of the stream were not learned yet."
    if protocol["precision"] != "fp32":
        text += f" The run computed in {protocol['precision']}, which its results are of; this model is float32."
    if learner["stores_images"]:
        text += " The learner keeps the images of old tasks, so this is an upper bound, not continual learning."
    return text


def results(facts: Facts) -> list[str]:
    summary, curves = facts["summary"], facts["curves"]
    rows = [f"| {name} | {percent(summary[key])} |" for key, name in MEASURES]
    seen, forgotten = curves["accuracy/seen"], curves["forgetting/mean"]
    stages = [f"| {i} | {percent(a)} | {percent(f)} |" for i, (a, f) in enumerate(zip(seen, forgotten, strict=True), 1)]
    return [
        prose(f"Measured on the {facts['protocol']['tested_on']} images of all tasks so far, without task ids."),
        "\n".join(["| measure | value |", "|---|---|", *rows]),
        "\n".join(["| after stage | accuracy % | forgetting |", "|---|---|---|", *stages]),
    ]


def checked(check: Facts, versions: dict[str, str]) -> str:
    found, batches = check["logits"], " and ".join(map(str, check["batch_sizes"]))
    return (
        f"Opened again after it was written, the model gave logits that differ from the learner's by at most "
        f"{found['max_difference']:.1e} in batches of {batches} images: {found['of_largest']:.1e} of the largest and "
        f"{found['of_spread']:.1e} of their spread (allowed: {check['tolerance']['of_largest']:.0e} and "
        f"{check['tolerance']['of_spread']:.0e}). Written by cil {versions['cil']} with torch {versions['torch']} and "
        f"timm {versions['timm']}."
    )


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def shape(sizes: list[Any]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def prose(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
