"""YAML as configurations use it: no aliases, no repeated keys, no deep nesting. Every reader of YAML comes here.

A few hundred bytes with aliases can stand for a value of any size. A repeated key would silently replace the first one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hark.grpo.config import ConfigError
from hark.limits import is_plain
from hark.shown import shown

MOST_BYTES = 1 << 18  # of a file; the longest configuration of the package has 4 KB
DEEPEST = 20  # mappings and lists within each other; an option has at most 4
LONGEST_NUMBER = 400  # characters; longer ones take time, and no option is one
LONGEST_REASON = 300  # characters of what is wrong, in a message
# What reading YAML raises: ValueError for a date that is none or no UTF-8, OverflowError for a number in base 60.
BROKEN = (yaml.YAMLError, ValueError, OverflowError)


class PlainLoader(yaml.SafeLoader):
    """A SafeLoader that refuses what no configuration needs. Its errors are YAMLErrors."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _error("anchors and aliases (&, *) are not allowed; write the value out, or quote the text", event)
        if self._depth >= DEEPEST:
            raise _error(f"nested more than {DEEPEST} deep", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise _error(f"{shown(key.value, 60)} is given twice", key)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        """An integer or a number with a point, of a sensible length."""
        if len(node.value) > LONGEST_NUMBER:
            raise _error(f"a number of {len(node.value)} characters", node)
        whole = node.tag.endswith(":int")
        return self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)


for kind in ("int", "float"):
    PlainLoader.add_constructor(f"tag:yaml.org,2002:{kind}", PlainLoader.construct_number)


def _error(what: str, where: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, where.start_mark)


def text_of(path: Path) -> str:
    """The text of a configuration; a pipe, a device or a huge file is a ConfigError before it is read."""
    if path.exists() and not path.is_dir() and not is_plain(path, MOST_BYTES):
        raise ConfigError(f"{path}: not a file of at most {MOST_BYTES} bytes; expected a configuration")
    return path.read_text(encoding="utf-8")


def plain_loader(text: str) -> PlainLoader:
    """A loader of a text. Raises a YAMLError if the text is too long."""
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"has {len(text)} characters; expected at most {MOST_BYTES}")
    return PlainLoader(text)


def plain_yaml(text: str) -> Any:
    """The value of a YAML text. Raises one of BROKEN."""
    return plain_loader(text).get_single_data()


def said(error: Exception) -> str:
    """What an error of YAML says, on one line."""
    return shown(" ".join(str(error).split()), LONGEST_REASON)


def read_options(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a run's config.yaml, none if there is no file or if a full disk left an empty one.

    Raises ConfigError for a file that is none.
    """
    try:
        if not path.exists():
            return {}
        text = text_of(path)
        sections = plain_yaml(text) if text.strip() else {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except ConfigError:
        raise
    except BROKEN as error:
        raise ConfigError(f"{path}: not YAML: {said(error)}") from None
    if not isinstance(sections, dict) or not all(isinstance(options, dict) for options in sections.values()):
        raise ConfigError(f"{path}: not a mapping of sections to options; expected the config.yaml of a run")
    return sections
