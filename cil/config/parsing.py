"""Text in YAML as plain values, and back: the one reader of files, overrides and grids.

It reads what PyYAML's safe loader reads, with these differences. Numbers such as ``1e-5`` are numbers, as in YAML 1.2;
dates are texts. A key that is given twice is an error. So is everything that only serves to choke a reader: values
nested too deeply, aliases that contain themselves or expand to too many values, and integers of thousands of digits.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from yaml.reader import ReaderError

from cil.errors import ConfigError, clipped, shortened

MOST_BYTES = 2**19
DEEPEST = 50
MOST_VALUES = 100_000
MOST_DIGITS = 100
FLOAT = "tag:yaml.org,2002:float"
KINDS = {
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:int": "integer",
    FLOAT: "number",
    "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:null": "null",
    "tag:yaml.org,2002:seq": "list",
    "tag:yaml.org,2002:map": "mapping",
}
MERGE = "tag:yaml.org,2002:merge"
# YAML 1.1 wants a dot and a signed exponent; YAML 1.2 and every programming language do not
EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


def parse(text: str, where: str) -> Any:
    """The plain value that a text in YAML holds; None if it is empty.

    Args:
        text: At most half a MiB.
        where: What the text is, for messages.

    Raises:
        ConfigError: The text is no YAML, or holds what no configuration needs; the message names the line.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{where}: longer than {MOST_BYTES} characters; a configuration is shorter")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{where}: not valid YAML: line {line}: the character {shortened(text[error.position])} is not allowed"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = clipped(error.problem or error.context or "", 200)
        advice = "; indent with spaces" if "'\\t'" in problem else ""
        raise ConfigError(f"{where}: not valid YAML: {place}{problem}{advice}") from None


def to_yaml(value: Any, **options: Any) -> str:
    """A plain value as YAML that :func:`parse` reads as the same value.

    Args:
        value: The value; keys keep their order.
        options: Further arguments of ``yaml.dump``.
    """
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **options))


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = self._count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        self._level, self._count = self._level + 1, self._count + 1
        node: Any = super().compose_node(parent, index) if self._level <= DEEPEST else None
        self._level -= 1
        if node is not None and not hasattr(node, "height"):
            if isinstance(event, yaml.AliasEvent):  # of a node that is still being read
                raise _problem(f"the alias {shortened(event.anchor)} contains itself", event)
            _measure(node)
        if node is None or self._level + node.height > DEEPEST:
            raise _problem(f"nested more than {DEEPEST} levels deep", event)
        if max(node.size, self._count) > MOST_VALUES:
            raise _problem(f"more than {MOST_VALUES} values, with all aliases expanded", event)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag not in KINDS:
            known = ", ".join(tag.rsplit(":", 1)[1] for tag in KINDS)
            raise _problem(f"the tag {clipped(node.tag)} is unknown; known: {known}", node)
        if node.tag.endswith(":int") and len(node.value) > MOST_DIGITS:
            raise _problem(f"an integer of {len(node.value)} digits; at most {MOST_DIGITS}", node)
        if not isinstance(node, yaml.ScalarNode):
            return super().construct_object(node, deep)
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError):  # PyYAML trusts a tag that was written out
            raise _problem(f"{shortened(node.value)} is no {KINDS[node.tag]}", node) from None


class _Dumper(yaml.SafeDumper):
    pass


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag in KINDS or tag == MERGE]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _either in (_Loader, _Dumper):
    _either.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))


def _measure(node: Any) -> None:
    """Note at a node, whose children are measured, its height and how many values it expands to."""
    children = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
        _refuse_doubles(node)
    node.height = 1 + max((child.height for child in children), default=0)
    node.size = 1 + sum(child.size for child in children)


def _refuse_doubles(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _problem("a key is a single value, not a list or a mapping", key)
        line = key.start_mark.line + 1
        if (key.tag, key.value) in lines:
            earlier = lines[key.tag, key.value]
            places = f"lines {earlier} and {line}" if earlier != line else f"line {line}"
            raise _problem(f"the key {shortened(key.value)} is given twice, in {places}", key)
        lines[key.tag, key.value] = line


def _problem(text: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=place.start_mark)
