"""A mkdocs hook that makes the pages which repeat the code: learners, configuration, commands, results.

Nothing it makes is committed. What cannot be read off the code stands in ``docs/learners/<name>.md`` (equation, cost,
departures from other implementations) and becomes part of that learner's page.
"""

from __future__ import annotations

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
from cil.avalanche.table import StrategySection
from cil.config import Config, LearnerEntry
from cil.configfile import read, shipped
from cil.learner import Learner
from cil.learners import registry
from cil.merging.table import FinaliserSection, RuleSection
from cil.training import Recipe
from cil.tuning.table import TunerSection

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))
import tables  # noqa: E402

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):(<code>|`)~?(.*?)(</code>|`)")
"""A reStructuredText role, in a docstring or in what mkdocstrings made of one."""
RESULT_LINK = re.compile(r"\]\(((?:reference|bench)/[^)#]+)\)")
"""A file below results/ that its README leads to."""


# --- what mkdocs calls ------------------------------------------------------------------------------------------------


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every learner's page below "Learners"."""
    for entry in config.nav or []:
        if "Learners" in entry:
            entry["Learners"] += [{name: f"learners/{name}.md"} for name in registry.BUILTIN]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The generated pages, in place of the texts they include; and the pictures that lie beside the results."""
    made = {
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


def on_page_content(html: str, **more: Any) -> str:
    """mkdocstrings takes docstrings for Markdown; the roles in them are reStructuredText."""
    return ROLE.sub(lambda found: found[1] + found[2].rsplit("cil.", 1)[-1] + found[3], html)


# --- learners ---------------------------------------------------------------------------------------------------------


def builtin() -> dict[str, type[Learner]]:
    return {name: registry.resolve(name) for name in registry.BUILTIN}


def learners_page() -> str:
    rows = [[f"[`{name}`]({name}.md)", summary(cls), *facts(cls)] for name, cls in builtin().items()]
    return (
        "# Learners\n\nEach page gives the method as its docstring has it, its equation, its cost, where it departs "
        "from other implementations, its hyper-parameters, and its results.\n\n"
        + table(["learner", "what", "old images", "backbone's weights", "streams"], rows)
        + "\n[Your own learner](../your_own_learner.md) stands beside these in every table and figure.\n"
    )


def facts(cls: type[Learner]) -> list[str]:
    return [
        "keeps them" if cls.stores_images else "never kept",
        "trained" if cls.trains_backbone else "frozen",
        "new classes in every task" if cls.needs_new_classes else "any",
    ]


def learner_page(name: str, cls: type[Learner], text: str) -> str:
    """Docstring, facts, the written part, hyper-parameters, shipped configurations, results."""
    images, weights, streams = facts(cls)
    about = [
        ["class", f"`{registry.BUILTIN[name].replace(':', '.')}`"],
        ["old images", images],
        ["backbone's weights", weights],
        ["streams", streams],
    ]
    parts = [f"# {name}", prose(cls), table(["source", cls.paper], about), text.strip()]
    parts += ["## Hyper-parameters", section_table(cls.Config) or "None."]
    configs = [config for config, learners in shipped_learners().items() if name in learners]
    if configs:
        parts += [
            "## Shipped configurations",
            "Run with `cil run`, changed with `key=value`.",
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
    """The rows of the reference results that a learner made, a table a benchmark, and the settings they belong to."""
    parts = []
    for folder in sorted({file.parents[2] for file in (ROOT / "results" / "reference").glob("*/*/*/metrics.json")}):
        runs = [run for run in results.find([folder]) if entry_of(run).name == name]
        for group in report.by_protocol(runs):
            parts += [f"{report.describe(group[0])}:", tables.ranked(group)]
            for run in {run["learner"]: run for run in group}.values():
                values = changed(cls.Config.model_validate(entry_of(run).parameters))
                settings = flow(values) if values else "the defaults"
                parts += [f"- `{run['learner']}`: {settings}"]
    if parts:
        parts.append("What they mean beside the other learners': [results](../results.md).")
    return "\n\n".join(parts)


def entry_of(run: dict[str, Any]) -> LearnerEntry:
    return LearnerEntry.model_validate(run["config"]["learners"][0])


def changed(section: BaseModel) -> dict[str, Any]:
    """What differs from the section's own defaults; of a tuner or rule also its name."""
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
        "Keys of every learner that trains; its page has its own defaults.",
        prose(Recipe),
        section_table(Recipe),
    ]
    for title, sections in KINDS.items():
        parts += [f"## {title}", INTRODUCTIONS[title]]
        for model in get_args(sections):
            own = section_table(model, skip=("name", "finalisers"))
            parts += [f"### `{model.model_fields['name'].default}`", prose(model), own or "No hyper-parameters."]
    return "\n\n".join(parts) + "\n"


KINDS = {"Tuners": TunerSection, "Rules": RuleSection, "Finalisers": FinaliserSection, "Strategies": StrategySection}
INTRODUCTIONS = {
    "Tuners": "What a learner's `tuner` may be: a name, `{name: …}` with hyper-parameters, or "
    "[one of your own](your_own_tuner.md), `{class: file.py:Class}`.",
    "Rules": "What the learner `merge` takes as its `rule`, and `cil merge` as `--rule`: a name, `{name: …}` with "
    "hyper-parameters and `finalisers`, or [one of your own](your_own_rule.md), `{class: file.py:Class}`.",
    "Finalisers": "What a rule's `finalisers` may hold, applied in order to the merged update when it is read out.",
    "Strategies": "What the learners `avalanche` and `avalanche_replay` take as their `strategy`: Avalanche's own, by "
    "name or as `{name: …}` with hyper-parameters.",
}


def nested(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Sections inside a section, with their dotted keys."""
    for key, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            yield f"{prefix}{key}", inner
            yield from nested(inner, f"{prefix}{key}.")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in get_args(annotation) for model in models_in(inner)]


def section_table(model: type[BaseModel], prefix: str = "", skip: Iterable[str] = ()) -> str:
    """Key, type with its range, default and meaning of every field; empty for a model without fields.

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
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def kind(schema: dict[str, Any], defs: dict[str, Any]) -> str:
    """A JSON schema in words: ``integer ≥ 1``, ``one of a, b``, ``list of number > 0``."""
    if "$ref" in schema:
        inner = defs[schema["$ref"].rsplit("/", 1)[1]]
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
    """The commands as typer describes them."""
    command = [sys.executable, "-m", "typer", "cil.cli", "utils", "docs", "--name", "cil"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return found.stdout.replace("# `cil`", "# Commands", 1).replace("```console\n$ ", "```text\n")


def results_page() -> str:
    """``results/README.md``; what its links lead to stands or is copied beside it."""
    return (ROOT / "results" / "README.md").read_text(encoding="utf-8").replace("](../docs/", "](")


# --- words ------------------------------------------------------------------------------------------------------------


def prose(cls: type) -> str:
    """A docstring as Markdown."""
    text = ROLE.sub(lambda found: f"`{found[2].rsplit('cil.', 1)[-1]}`", inspect.getdoc(cls) or "")
    parts = re.split(r"(`+[^`]*`+)", text)  # every second one is code
    return "".join(part.replace("``", "`") if i % 2 else plain(part) for i, part in enumerate(parts))


def plain(text: str) -> str:
    """Text in which Markdown finds nothing to do."""
    return text.replace("<", "&lt;").replace("*", "\\*")


def summary(cls: type) -> str:
    return prose(cls).split("\n")[0]


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """A value as it would stand in a configuration, on one line."""
    if isinstance(value, BaseModel):
        value = changed(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(flow(inner) for inner in value) + "]"
    return value if isinstance(value, str) else json.dumps(value)


def code(text: str) -> str:
    return f"`{text}`"
