"""YAML files: read strictly, every mistake in one line."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ptq4sam.errors import ConfigError
from ptq4sam.nearest import nearest


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a key given twice is an error instead of overwriting silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: set[object] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in keys:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} is given twice",
                    problem_mark=key_node.start_mark,
                )
            keys.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> object:
    """Read a YAML file in which no key is given twice.

    Args:
        path: the file.
        what: what it is, for messages, as "scheme file".

    Raises:
        ConfigError: the file is not there or is not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except FileNotFoundError:
        siblings = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        close = nearest(path.name, siblings)
        hint = f"; did you mean {path.with_name(close)}?" if close else ""
        raise ConfigError(f"{path}: no such {what}{hint}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not YAML: {error.problem}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"{path}: cannot be read as YAML: {reason}") from None
