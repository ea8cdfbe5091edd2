"""Reading and writing the TOML files of a training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError


def read(path: Path) -> dict[str, Any]:
    """The tables of a TOML file; UserError when it is missing or malformed."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration {path} is not valid TOML: {error}") from error


def dumps(table: dict[str, Any], name: str = "") -> str:
    """The text of a table of str, bool, int, float, lists of them and tables, with bare keys."""
    scalars = {key: value for key, value in table.items() if not isinstance(value, dict)}
    lines = [f"[{name}]"] if name and scalars else []
    lines += [f"{key} = {_value(value)}" for key, value in scalars.items()]
    text = "".join(line + "\n" for line in lines)
    for key, value in table.items():
        if isinstance(value, dict):
            text += "\n" + dumps(value, f"{name}.{key}" if name else key)
    return text


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, str):
        # JSON's strings are TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise TypeError(f"TOML has no {type(value).__name__}")
