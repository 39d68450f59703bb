"""The commented YAML file that `init` writes.

Decides: how the configuration is shown to someone who writes the first one. Says nothing of its own: keys, defaults,
choices and descriptions are those of `config.py`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from lemonade_hpc.config import BY_SIZE, SMALL, Config

OBJECTIVES = """\
# Minimised: val_error, and at least one of params and macs (multiply-adds per image).
# Those two take hard limits, as in {name: params, min: 1.0e4, max: 2.0e6}. Where params has no min, networks have
# at least 10,000 parameters on images of 32 x 32 pixels, 312 on 8 x 8.
objectives:
  - {name: val_error}
  - {name: params}
"""


def template() -> str:
    """Write every key with its default, its choices and what it means. `config.load` reads it as the defaults."""
    parts: list[str] = [
        "# One search. Only `data` is required; every other line shows its default.\n"
        f"# So do lines that are commented out, where it is fixed. Images below {SMALL} pixels a side are small.\n"
    ]
    for name, field in Config.model_fields.items():
        if name == "objectives":
            parts.append(OBJECTIVES)
        elif isinstance(section := field.annotation, type) and issubclass(section, BaseModel):
            lines = [_line(key, item) for key, item in section.model_fields.items()]
            parts.append("\n".join([f"# {section.__doc__}", f"{name}:", *lines, ""]))
        else:
            parts.append(f"{name}: {field.default}\n")
    return "\n".join(parts)


def _line(key: str, field: Any) -> str:
    """Write one key of a section."""
    value = "digits" if field.is_required() else field.default
    small, default = BY_SIZE.get(key, (None, value))
    shown = f"[{', '.join(value)}]" if isinstance(value, tuple) else "" if default is None else str(default).lower()
    text = f"# {key}: {shown}".rstrip() if value is None else f"{key}: {shown}"
    choices = " | ".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else ""
    by_size = "" if small is None else f"small images: {str(small).lower()}"
    note = "; ".join(part for part in (choices, field.description, by_size) if part)
    return f"  {text:<26} # {note}" if note else f"  {text}"
