"""What is wrong with a configuration, in the user's words: the key, what was given, what is allowed.

Decides: how errors of YAML and pydantic are told, and how our own commands are. Never what is legal: the models do
(`config.py`).
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterator
from typing import Any, get_args

import yaml
from pydantic import BaseModel


def command(*words: str) -> str:
    """What a person types for one of our commands; where this is an image, as its helper outside was called."""
    return " ".join([os.environ.get("LEMONADE_AS", "lemonade-hpc"), shlex.join(words)])


DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
"""Whole numbers that YAML 1.1 reads as a person does."""


def mistakes(node: yaml.Node | None) -> Iterator[str]:
    """Find what YAML takes in silence: a key given twice, of which it keeps the last; numbers read otherwise.

    YAML 1.1 reads 4:00:00 as 14400, 010 as 8, 0x10 as 16 and 0b10 as 2.
    """
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and ":" in node.value:
        yield f"got {node.value} in line {node.start_mark.line + 1}; give a number, without colons"
    elif isinstance(node, yaml.ScalarNode) and node.tag.endswith(":int") and not DECIMAL.fullmatch(node.value):
        yield (
            f"got {node.value} in line {node.start_mark.line + 1}, "
            f"which YAML 1.1 takes for octal, hexadecimal or binary; give a decimal number "
            f"without leading zeros, or text in quotes"
        )
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from mistakes(item)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                yield f"the key '{name}' is given twice, in lines {lines[name]} and {line}; remove one"
            lines[name] = line
            yield from mistakes(value)


_ALLOWED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text; write it in quotes",
    "dict_type": "options and their values, as in {{name: value}}",
    "tuple_type": "a list, in brackets or with a dash before each entry",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "above {gt}",
    "less_than": "below {lt}",
}
"""What pydantic's errors ask for, in words."""


def explain(item: Any, root: type[BaseModel]) -> str:
    """Say one pydantic error about a `root` in the user's words: the key, what was given, what is allowed."""
    where, kind, key = list(item["loc"]), item["type"], ".".join(map(str, item["loc"]))
    got = f"{key}: got {'no value' if item['input'] is None else repr(item['input'])}"
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(where, root)
    if kind == "missing":
        return f"the key '{key}' is required"
    if kind == "value_error":
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    if kind == "model_type":
        first, *more = _section(where, root).model_fields
        return f"{got}; it must hold keys, as in {{{first}: ...}}; allowed are {', '.join([first, *more])}"
    allowed = _ALLOWED[kind].format(**item.get("ctx", {})) if kind in _ALLOWED else item["msg"]
    hint = nearest(item["input"], allowed.split("'")[1::2]) if kind == "literal_error" else ""
    return f"{got}; it must be {allowed}{hint}"


def _unknown(where: list[Any], root: type[BaseModel]) -> str:
    """Answer an unknown key with the valid ones and the nearest match, or the section that it belongs to."""
    word, valid = str(where[-1]), sorted(_section(where[:-1], root).model_fields)
    homes = [k for k, field in root.model_fields.items() if word in getattr(field.annotation, "model_fields", ())]
    hint = f". Did you mean '{homes[0]}.{word}'?" if homes else nearest(word, valid)
    return f"unknown key '{'.'.join(map(str, where))}'{hint} Valid keys here: {', '.join(valid)}"


def nearest(given: Any, known: list[str]) -> str:
    """End a sentence, with the known word that is most like the one given, if there is one."""
    near = difflib.get_close_matches(str(given), known, 1)
    return f". Did you mean '{near[0]}'?" if near else "."


def _section(where: list[Any], root: type[BaseModel]) -> type[BaseModel]:
    """Find the model whose keys stand at a place: a section, or one of a list of them."""
    if not where:
        return root
    found: Any = root.model_fields[where[0]].annotation
    return found if isinstance(found, type) else get_args(found)[0]
