"""A mkdocs hook that generates the pages which repeat the code: learners, configuration, commands, results.

What it generates is not committed. The stored pages are written so that they also read in the repository: learners'
pages hold what the code does not say (equation, cost, departures from other implementations), and links to results lead
to files outside ``docs/``, which :func:`on_page_markdown` replaces by their places on the site.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

from cil import report, results
from cil.avalanche.configs import StrategySection
from cil.config import Config, LearnerEntry
from cil.config.reading import read, shipped
from cil.learner import Learner
from cil.learners import registry
from cil.learners.bases.anchor import Anchor
from cil.learners.bases.distilling import Distill
from cil.learners.bases.on_features import Layers
from cil.merging.configs import FinaliserSection, RuleSection
from cil.training import Recipe
from cil.tuning.configs import TunerSection
from scripts.publish import tables

ROOT = Path(__file__).parent.parent

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):(<code>|`)~?(.*?)(</code>|`)")
"""A reStructuredText role, in a docstring or in what mkdocstrings made of one."""
RESULT_LINK = re.compile(r"\]\(((?:reference|bench)/[^)#]+)\)")
"""A link in results/README.md to a file below results/."""
OUTSIDE = re.compile(r"\]\(((?:\.\./)+)results/([^)]*)\)")
"""A link from a page below docs/ to a file in results/."""
TO_README = "To install it and to run a first benchmark, see the [README](../README.md).\n"
"""In the stored start page; on the site the quickstart stands in its place."""
QUICKSTART = """In a checkout, with Python 3.10 or newer:

--8<-- "README.md:one-line"

It installs the package and runs four learners on real handwritten digits, with a small ViT that ships with it.
At the end it prints this table (%, mean ± standard deviation over class orders) and writes `compare.html`:

--8<-- "README.md:quickstart"

![accuracy and forgetting over stages](quickstart.png)

`finetune` forgets: all weights are overwritten. `linear_probe` forgets too: its features are frozen, but its head is
not. `ncm`, class means of frozen features, keeps most of its accuracy. `joint`, retrained on all images so far, is the
upper bound.
"""


# --- what mkdocs calls ------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add every learner's page below "Learners"."""
    for entry in config.nav or []:
        if "Learners" in entry:
            entry["Learners"] += [{name: f"learners/{name}.md"} for name in registry.BUILTIN]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages, in place of the stored ones, and the figures and files that belong to the results."""
    made = {
        "index.md": start_page(),
        "learners/index.md": learners_page(),
        "configuration.md": configuration_page(),
        "cli.md": commands_page(),
        "results.md": results_page(),
    }
    for name, cls in builtin().items():
        source = ROOT / "docs" / "learners" / f"{name}.md"
        made[f"learners/{name}.md"] = learner_page(name, cls, source.read_text(encoding="utf-8"))
    for place, text in made.items():
        old = files.get_file_from_path(place)
        if old is not None:
            files.remove(old)
        files.append(File.generated(config, place, content=text))
    picture = ROOT / "results" / "reference" / "quickstart" / "compare.png"
    files.append(File.generated(config, "quickstart.png", abs_src_path=str(picture)))
    linked = {f"bench/{file.name}" for file in (ROOT / "results" / "bench").glob("*.json")}
    for place in sorted(linked | set(RESULT_LINK.findall(made["results.md"]))):
        files.append(File.generated(config, place, abs_src_path=str(ROOT / "results" / place)))
    return files


def on_page_markdown(markdown: str, **more: Any) -> str:
    """Turn links to results/ into links to the places on the site that hold the same."""
    return OUTSIDE.sub(lambda link: f"]({link[1][3:]}{link[2].replace('README.md', 'results.md')})", markdown)


def on_page_content(html: str, **more: Any) -> str:
    """Replace reStructuredText roles in docstrings, which mkdocstrings reads as Markdown."""
    return ROLE.sub(lambda found: found[1] + found[2].rsplit("cil.", 1)[-1] + found[3], html)


def start_page() -> str:
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    if TO_README not in text:
        raise ValueError("docs/index.md: no sentence that the quickstart can replace")
    return text.replace(TO_README, QUICKSTART)


# --- learners ---------------------------------------------------------------------------------------------------------


def builtin() -> dict[str, type[Learner]]:
    return {name: registry.resolve(name) for name in registry.BUILTIN}


def learners_page() -> str:
    rows = [[f"[`{name}`]({name}.md)", cls.summary, *facts(cls)] for name, cls in builtin().items()]
    return (
        "# Learners\n\nEach page gives a method's description, equation and cost, where it departs from other "
        "implementations, its hyper-parameters, and its results.\n\n"
        + table(["learner", "what it does", "trains", "old images", "streams"], rows)
        + "\n[Your own learner](../your_own_learner.md) appears beside these in every table and figure.\n"
    )


def facts(cls: type[Learner]) -> list[str]:
    return [
        cls.trains,
        "kept" if cls.stores_images else "not kept",
        "class-incremental" if cls.needs_new_classes else "any",
    ]


def learner_page(name: str, cls: type[Learner], text: str) -> str:
    """Docstring, facts, the written part, hyper-parameters, shipped configurations, results."""
    trains, images, streams = facts(cls)
    about = [
        ["class", f"`{registry.BUILTIN[name].replace(':', '.')}`"],
        ["what it does", cls.summary],
        ["trains", trains],
        ["old images", images],
        ["streams", streams],
    ]
    written = text[text.index("## ") :].strip()  # without the head for readers in the repository
    parts = [f"# {name}", prose(cls), table(["source", cls.paper], about), written]
    parts += ["## Hyper-parameters", section_table(cls.Config) or "None."]
    configs = [config for config, learners in shipped_learners().items() if name in learners]
    if configs:
        parts += [
            "## Shipped configurations",
            "Run one with `cil run`, and change it with `key=value`.",
            "\n".join(f"- `{config}`" for config in configs),
        ]
    found = reference_results(name, cls)
    if found:
        parts += ["## Results", found]
    return "\n\n".join(parts) + "\n"


def shipped_learners() -> dict[str, set[str]]:
    """Names of the learners in each configuration that comes with the package."""
    found = {}
    for config, path in shipped().items():
        entries = [entry if isinstance(entry, dict) else {"name": entry} for entry in read(path)["learners"]]
        found[config] = {str(entry.get("name")) for entry in entries}
    return found


def reference_results(name: str, cls: type[Learner]) -> str:
    """A learner's rows of the reference results, one table per benchmark, and the settings they belong to."""
    parts = []
    for every in reference_runs():
        for group in report.by_protocol([run for run in every if entry_of(run).name == name]):
            parts += [f"{report.describe_protocol(group[0])}:", tables.ranked(group)]
            for run in {run["learner"]: run for run in group}.values():
                values = changed(cls.Config.model_validate(entry_of(run).parameters))
                settings = flow(values) if values else "the defaults"
                parts += [f"- `{run['learner']}`: {settings}"]
    if parts:
        parts.append("Results of all learners: [results](../results.md).")
    return "\n\n".join(parts)


@functools.cache
def reference_runs() -> list[list[dict[str, Any]]]:
    """The runs of each folder of the reference results, read once for the pages of all learners."""
    folders = {file.parents[2] for file in (ROOT / "results" / "reference").glob("*/*/*/metrics.json")}
    return [results.find([folder]) for folder in sorted(folders)]


def entry_of(run: dict[str, Any]) -> LearnerEntry:
    return LearnerEntry.model_validate(run["config"]["learners"][0])


def changed(section: BaseModel) -> dict[str, Any]:
    """The values that differ from the section's defaults, and the name of a tuner or rule."""
    found = {}
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if key == "name" or value != field.get_default(call_default_factory=True):
            found[key] = changed(value) if isinstance(value, BaseModel) else value
    return found


# --- configuration and commands ---------------------------------------------------------------------------------------


def configuration_page() -> str:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    parts = [text.strip(), "## The file", section_table(Config)]
    for key, model in nested(Config):
        parts += [f"## {key}", prose(model), section_table(model, f"{key}.")]
    parts += [
        "## Training",
        "Keys of every learner that trains. Its page has its own defaults.",
        prose(Recipe),
        section_table(Recipe),
    ]
    parts += [
        "## Layers",
        "Value of a learner's `layers`, see [Features of several blocks](layers.md). Bare blocks stand for the "
        "section: `half` for `{blocks: half}`.",
        section_table(Layers),
    ]
    for model, key in ((Anchor, "anchor"), (Distill, "distill")):
        parts += [
            f"## {model.__name__}",
            f"Value of `{key}` of `finetune`, `slca`, `cofima` and `ssiat`, see [Ways of reusing a model]"
            "(reuse_ways.md). A bare name stands for the section with its first key.",
            section_table(model),
        ]
    for title, sections in KINDS.items():
        parts += [f"## {title}", INTRODUCTIONS[title]]
        for model in get_args(sections):
            own = section_table(model, skip=("name", "finalisers"))
            parts += [f"### `{model.model_fields['name'].default}`", prose(model), own or "No hyper-parameters."]
    return "\n\n".join(parts) + "\n"


KINDS = {"Tuners": TunerSection, "Rules": RuleSection, "Finalisers": FinaliserSection, "Strategies": StrategySection}
INTRODUCTIONS = {
    "Tuners": "Values of a learner's `tuner`: a name, `{name: …}` with hyper-parameters, or "
    "[your own](your_own_tuner.md), `{class: file.py:Class}`.",
    "Rules": "Values of `rule` of the learner `merge`, and of `--rule` of `cil merge`: a name, `{name: …}` with "
    "hyper-parameters and `finalisers`, or [your own](your_own_rule.md), `{class: file.py:Class}`.",
    "Finalisers": "Entries of a rule's `finalisers`. They are applied in order to the merged update when it is read.",
    "Strategies": "Values of `strategy` of the learners `avalanche` and `avalanche_replay`: one of Avalanche's "
    "strategies, by name or as `{name: …}` with hyper-parameters.",
}


def nested(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """The sections inside a section, with their dotted keys."""
    for key, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            yield f"{prefix}{key}", inner
            yield from nested(inner, f"{prefix}{key}.")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in get_args(annotation) for model in models_in(inner)]


def section_table(model: type[BaseModel], prefix: str = "", skip: Iterable[str] = ()) -> str:
    """A table of key, type with range, default and meaning of every field; empty for a model without fields.

    ``prefix`` is the dotted key of the section on the configuration page, where sections inside it have headings.
    """
    schema = model.model_json_schema()
    rows = []
    for key, field in schema.get("properties", {}).items():
        if key not in skip:
            required = key in schema.get("required", ())
            default = "required" if required else code(flow(field["default"])) if "default" in field else "–"
            linked = f"[section](#{f'{prefix}{key}'.replace('.', '')})"
            what = kind(field, schema.get("$defs", {})).replace("section", linked)
            default = "as there" if what == linked else default
            rows.append([code(key), what, default, plain(field.get("description", ""))])
    return table(["key", "type", "default", "meaning"], rows) if rows else ""


TITLES = {
    "adapter": "[tuner](../configuration.md#tuners)",
    "opcm": "[rule](../configuration.md#rules)",
    "lines": "[finaliser](../configuration.md#finalisers)",
    "EWC": "[strategy](../configuration.md#strategies)",
    "Replay": "[strategy](../configuration.md#strategies)",
}
SECTIONS = {
    "Layers": "[layers](../configuration.md#layers)",
    "Anchor": "[anchor](../configuration.md#anchor)",
    "Distill": "[distill](../configuration.md#distill)",
}
"""Sections that several learners have, with their place on the configuration page."""
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def kind(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    """A JSON schema in words: ``integer ≥ 1``, ``one of a, b``, ``list of number > 0``."""
    if "$ref" in schema:
        inner = defs[schema["$ref"].rsplit("/", 1)[1]]
        if inner.get("title") in SECTIONS:
            return SECTIONS[inner["title"]]
        return "section" if inner.get("type") == "object" else kind(inner, defs)
    if "discriminator" in schema:
        return next(title for name, title in TITLES.items() if name in schema["discriminator"]["mapping"])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind(inner, defs) for inner in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(code(flow(value)) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return "[" + ", ".join(kind(inner, defs) for inner in schema["prefixItems"]) + "]"
        return f"list of {kind(schema.get('items', {}), defs)}"
    name = {"object": "keys and values", "null": "`null`"}.get(schema.get("type", ""), schema.get("type", "anything"))
    limits = [f"{sign} {schema[key]}" for key, sign in LIMITS.items() if key in schema]
    return " ".join([name, ", ".join(limits)]) if limits else name


def commands_page() -> str:
    """The help texts of all commands, from typer."""
    command = [sys.executable, "-m", "typer", "cil.cli", "utils", "docs", "--name", "cil"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return found.stdout.replace("# `cil`", "# Commands", 1).replace("```console\n$ ", "```text\n")


def results_page() -> str:
    """``results/README.md``, with links to pages of the site; the files it links to are copied beside it."""
    return (ROOT / "results" / "README.md").read_text(encoding="utf-8").replace("](../docs/", "](")


# --- words ------------------------------------------------------------------------------------------------------------


def prose(cls: type) -> str:
    """A docstring as Markdown."""
    text = ROLE.sub(lambda found: f"`{found[2].rsplit('cil.', 1)[-1]}`", inspect.getdoc(cls) or "")
    parts = re.split(r"(`+[^`]*`+)", text)  # every second one is code
    return "".join(part.replace("``", "`") if i % 2 else plain(part) for i, part in enumerate(parts))


def plain(text: str) -> str:
    """The text with characters escaped that have a meaning in Markdown."""
    return text.replace("<", "&lt;").replace("*", "\\*")


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """A value as it is written in a configuration, on one line."""
    if isinstance(value, BaseModel):
        value = changed(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(flow(inner) for inner in value) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def code(text: str) -> str:
    return f"`{text}`"
