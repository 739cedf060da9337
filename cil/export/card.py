"""The model card of an artifact: ``README.md`` with front matter for the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from cil.backbone import EMBEDDED, Backbone, embedded_card
from cil.export.artifact import Facts
from cil.export.recipe import preparation, prose, usage

LIBRARY = {"safetensors": "cil", "torch.export": "pytorch", "onnx": "onnx"}
SHOWN = 200
"""Maximum number of classes that the card lists; ``model.json`` lists all."""
MEASURES = (
    ("accuracy_last", "accuracy after the last stage, over all classes seen, %"),
    ("accuracy_average", "mean of that accuracy over the stages, %"),
    ("forgetting", "forgetting (Chaudhry et al. 2018), points"),
    ("forgetting_within_task", "the same with the task given, points"),
    ("backward_transfer", "backward transfer (Lopez-Paz & Ranzato 2017), points"),
    ("learning_accuracy", "accuracy on each task when it was new, %"),
)


def licence(backbone: Backbone, weights: str | None) -> dict[str, str]:
    """The licence of the backbone's weights, as far as it is known: an identifier of the Hub, and a sentence.

    Args:
        backbone: The backbone.
        weights: ``backbone.weights`` of the configuration.
    """
    pretrained: Any = getattr(backbone.model, "pretrained_cfg", None) or {}
    if "open_clip" in backbone.facts:  # timm's facts are those of other weights of the architecture
        pretrained = {}
    name, known = "unknown", f"timm states none for the backbone's weights, {backbone.name}."
    if weights == "random":
        known = "the backbone is untrained."
    elif weights is not None:
        known = "the backbone's weights come from a local file whose terms are unknown."
    elif backbone.name == EMBEDDED:
        name = "other"
        known = f"the backbone's weights come with cil (Apache-2.0), trained on {embedded_card()['data']['dataset']}."
    elif pretrained.get("license"):
        name = pretrained["license"]
        known = f"{name} for the backbone's weights, {backbone.name}, as timm states it."
    return {"id": name, "text": known}


def licence_of_all(members: Sequence[Facts]) -> dict[str, str]:
    """The licences of several backbones as one entry: their identifier if they share it, and all sentences."""
    ids = {one["licence"]["id"] for one in members}
    text = " ".join(f"{one['name']}: {one['licence']['text']}" for one in members)
    return {"id": ids.pop() if len(ids) == 1 else "other", "text": text}


def card(facts: Facts) -> str:
    """The text of ``README.md``, from the content of ``model.json``."""
    learner, backbone, check, names = facts["learner"], facts["backbone"], facts["check"], facts["classes"]
    several = len(backbone.get("members", ()))
    title = f"{learner['title']} on {facts['protocol']['benchmark']}"
    parts = [
        front_matter(facts, title),
        f"# {title}",
        prose(
            f"An image classifier that learned its {len(names)} classes in a sequence of tasks (class-incremental "
            f"learning). Learner: `{learner['title']}` ({learner['paper']}), on the "
            f"{f'{several} backbones' if several else 'backbone'} `{backbone['name']}`. "
            "Features and classifier are one model: normalised images in, logits and features out."
        ),
        "## Use",
        *usage(facts),
        "## Input and output",
        prose(
            f"`images`: float32 {bracketed(facts['input']['shape'])}, RGB, any batch size ≥ 1. Images are upright and "
            f"have 8 bits per channel, with transparent pixels on white; cil converts all others. {preparation(facts)}"
        ),
        prose(
            f"`logits`: float32 {bracketed(facts['outputs']['logits'])}, the learner's own scores, which are not "
            "probabilities; column i is class i of the list below and of `model.json`. "
            f"`features`: float32 {bracketed(facts['outputs']['features'])}."
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
            f"The model is meant for images like those it learned from. It assigns one of the {len(names)} classes to "
            "every image, whatever the image shows. Its accuracy was measured only on the images named above; it "
            "differs between classes, and classes of early tasks may have been forgotten in part. Scores are not "
            "calibrated. The features inherit the biases of the pre-training data."
        ),
        prose(f"Licence: {backbone['licence']['text']} The terms of the training images apply as well."),
        "## Check",
        prose(check_report(check, facts["versions"]["exported"])),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: Facts, title: str) -> str:
    """The YAML block at the top of the card."""
    dataset = facts["protocol"]["dataset"]
    last = facts["summary"]["accuracy_last"]  # None if no image was held out
    result = {
        "task": {"type": "image-classification"},
        "dataset": {"name": dataset, "type": dataset},
        "metrics": [] if last is None else [{"type": "accuracy", "value": round(last, 4)}],
    }
    head = {
        "library_name": LIBRARY[facts["format"]],
        "pipeline_tag": "image-classification",
        "license": facts["backbone"]["licence"]["id"],
        "tags": ["image-classification", "class-incremental-learning", "continual-learning", facts["learner"]["title"]],
        "model-index": [{"name": title, "results": [result]}],
    }
    return "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---"


def training(facts: Facts) -> str:
    """A paragraph on data, stream and training."""
    learner, protocol, stages = facts["learner"], facts["protocol"], facts["stages"]
    if parents := facts.get("joined"):
        runs = ", ".join(
            f"`{one['learner']}` with {len(one['class_names'])} classes and {one['images']} training images"
            for one in parents
        )
        return f"Joined from {len(parents)} runs that were trained apart: {runs}. No image was used to join them."
    sizes = [len(task) for task in facts["tasks"]]
    what = "domains" if protocol["stream"]["type"] == "domain_incremental" else "tasks"
    text = (
        f"Dataset `{protocol['dataset']}`: {protocol['data']['train']['images']} training and "
        f"{protocol['data']['test']['images']} test images, their sha256 in `model.json`. Stream: {len(sizes)} {what} "
        f"with {', '.join(map(str, sizes))} classes; class order {protocol['order']}, seed {protocol['seed']}. "
        f"Hyper-parameters chosen by: {protocol['chosen_by']}."
    )
    if stages["finished"] < stages["planned"]:
        text += f" {stages['planned'] - stages['finished']} further {what} of the stream have not been learned yet."
    if protocol["precision"] != "fp32":
        text += f" The run and its results used {protocol['precision']}; this model is float32."
    if learner["stores_images"]:
        text += " The learner keeps images of old tasks, or a feature of each: compare it with learners that do."
    return text


def results(facts: Facts) -> list[str]:
    """The measures of the run and its curves, as Markdown tables."""
    summary, curves = facts["summary"], facts["curves"]
    if facts.get("joined") and summary["accuracy_last"] is None:
        return [prose("The joined model has not been tested as a whole.")]
    rows = [f"| {name} | {percent(summary[key])} |" for key, name in MEASURES]
    accuracy, forgetting = curves["accuracy/seen"], curves["forgetting/mean"]
    stages = [
        f"| {i} | {percent(a)} | {percent(f)} |" for i, (a, f) in enumerate(zip(accuracy, forgetting, strict=True), 1)
    ]
    return [
        prose(f"Measured on the {facts['protocol']['tested_on']} images of all tasks so far, without task ids."),
        "\n".join(["| measure | value |", "|---|---|", *rows]),
        "\n".join(["| after stage | accuracy % | forgetting |", "|---|---|---|", *stages]),
    ]


def check_report(check: Facts, versions: dict[str, str]) -> str:
    """A paragraph on the differences between the written model and the learner."""
    logits, batches = check["logits"], " and ".join(map(str, check["batch_sizes"]))
    return (
        f"The written model was loaded again. Its logits differ from the learner's by at most "
        f"{logits['max_difference']:.1e} in batches of {batches} images: {logits['of_largest']:.1e} of the largest and "
        f"{logits['of_spread']:.1e} of their spread (allowed: {check['tolerance']['of_largest']:.0e} and "
        f"{check['tolerance']['of_spread']:.0e}). Written by cil {versions['cil']} with torch {versions['torch']} and "
        f"timm {versions['timm']}."
    )


def percent(value: float | None) -> str:
    """A fraction in per cent, with one decimal."""
    return "–" if value is None else f"{100 * value:.1f}"


def bracketed(sizes: list[Any]) -> str:
    """A shape, e.g. ``[batch, 3, 64, 64]``."""
    return f"[{', '.join(map(str, sizes))}]"
