"""Read a configuration file and `section.key=value` overrides into a Config.

A mistake in a configuration is a `ConfigError` that names its file and line and says what was expected; nothing is
ignored.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import operator
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from hark.from_file import is_in_file
from hark.grpo.advantage import ADVANTAGES
from hark.grpo.algorithms import ALGORITHMS, AlgorithmError, named_values
from hark.grpo.config import Bound, Config, ConfigError, Files, LossConfig, default_of, flow
from hark.launch.common.nearest import nearest
from hark.launch.common.plain_yaml import BROKEN, PlainLoader, plain_loader, plain_yaml, said, text_of
from hark.shown import say_text, shown

LONGEST = 200  # characters of a value in a message
CONFIGS = Path(__file__).parents[1] / "configs"  # configurations of the package, found by their names
SECTIONS: dict[str, type] = get_type_hints(Config)
# A field of a section and its comment, which may be on a later line of the same field.
COMMENT = re.compile(r"^    (\w+): (?:(?!^    \w)[^#])*# (.+)$", re.MULTILINE)
HINTS: dict[str, Any] = {
    f"{section}.{key}": hint
    for section, kind in SECTIONS.items()
    for key, hint in get_type_hints(kind, include_extras=True).items()
}


class Entry(NamedTuple):
    """A value as it was written, and where: `FILE:LINE` or `override KEY=VALUE`."""

    value: Any
    where: str


def load_config(argv: list[str]) -> Config:
    """Read `CONFIG [section.key=value ...]`; later overrides win. Raises ConfigError.

    CONFIG is a YAML file, or the name of a configuration that comes with the package.
    """
    if not argv or "=" in argv[0] and not Path(argv[0]).is_file():
        raise ConfigError("the first argument must be the configuration: CONFIG [section.key=value ...]")
    path = find_config(argv[0])
    entries = _read_file(path)
    overrides = dict(map(_read_override, argv[1:]))
    if "loss.kind" in overrides:  # it takes the place of the file's, and of the keys that either of them gives
        kinds = (source["loss.kind"].value for source in (entries, overrides) if "loss.kind" in source)
        given = {key for kind in kinds for key in ALGORITHMS.get(kind, {})}
        entries = {name: entry for name, entry in entries.items() if name.removeprefix("loss.") not in given}
    return _build(entries | overrides, source=path)


def config_of(overrides: list[str]) -> Config:
    """The configuration of overrides alone, without a file; everything else has its default."""
    return _build(dict(map(_read_override, overrides)), source="the command line")


def find_config(word: str) -> str:
    """The path of a configuration: the word itself, or the package's file of that name.

    A word is a name if there is no such file and it has neither a directory nor a suffix. Raises ConfigError for a name
    that the package does not have.
    """
    if Path(word).is_file() or os.path.dirname(word) or Path(word).suffix:
        return word
    if word in config_names():
        return str(CONFIGS / f"{word}.yaml")
    if Path(word).is_dir():  # reading it says what it is
        return word
    raise ConfigError(
        f"{word}: no such file (working directory {os.getcwd()}), and no configuration of that name; "
        f"the package has {', '.join(config_names())}"
    )


def config_names() -> list[str]:
    """The names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def help_if_asked(argv: list[str], text: str | None) -> None:
    """With `--help`, print the help of a program whose arguments are a configuration, and end it."""
    if {"-h", "--help"} & set(argv):
        say_text(usage(text))
        raise SystemExit(0)


def usage(text: str | None) -> str:
    """A program's docstring, the configurations of the package, and all options."""
    lines = [inspect.cleandoc(text or ""), ""]
    if "CONFIG" in lines[0]:
        lines += [f"CONFIG is a YAML file or one of {', '.join(config_names())}.", ""]
    lines.append("Options, with their defaults:")
    for section, kind in SECTIONS.items():
        comments = dict(COMMENT.findall(inspect.getsource(kind)))
        lines.append("")
        for f in dataclasses.fields(kind):
            lines.append(_option(f"{section}.{f.name}", f, comments.get(f.name, "")))
    return "\n".join(lines)


def _option(name: str, f: dataclasses.Field, comment: str) -> str:
    """One line of the help: `section.key=default  comment`."""
    default = "REQUIRED" if _is_required(f) else flow(default_of(f))
    return f"  {name + '=' + default:40}  {comment}".rstrip()


def _build(entries: dict[str, Entry], *, source: str) -> Config:
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, entry in entries.items():
        section, key = name.split(".")
        try:
            values[section][key] = convert(entry.value, HINTS[name])
        except ConfigError as error:
            raise ConfigError(
                f"{entry.where}: {name} must be {error}, not {shown(repr(entry.value), LONGEST)}"
            ) from None
    for section, kind in SECTIONS.items():
        for f in dataclasses.fields(kind):
            if f.name not in values[section] and _is_required(f):
                name = f"{section}.{f.name}"
                raise ConfigError(f"{source}: {name} is missing; set it there or as {name}=VALUE")
    values["loss"] = _named_loss(values["loss"].get("kind", LossConfig.kind), entries) | values["loss"]
    config = Config(**{section: kind(**values[section]) for section, kind in SECTIONS.items()})
    check_together(config, source=source)
    return config


def _named_loss(kind: str, entries: dict[str, Entry]) -> dict[str, Any]:
    """The keys of `loss` that its kind gives."""
    try:
        return named_values(kind)
    except AlgorithmError as error:
        raise ConfigError(f"{entries['loss.kind'].where}: loss.kind must be {error}, not {kind!r}") from None


def _is_required(f: dataclasses.Field) -> bool:
    return default_of(f) is dataclasses.MISSING


def check_together(config: Config, *, source: str) -> None:
    """Raise ConfigError, which names the source, if options exclude one another."""
    if config.optim.warmup_steps > config.optim.steps:
        raise ConfigError(
            f"{source}: optim.warmup_steps must be at most optim.steps ({config.optim.steps}), "
            f"not {config.optim.warmup_steps}"
        )
    if not config.data.require_audio and config.model.train == "all":
        raise ConfigError(
            f"{source}: data.require_audio=false needs model.train=no-tower: a rank without a clip would not take part "
            "when the others reduce the tower's gradients"
        )
    if not config.data.require_audio and config.lora.rank and any("tower." in name for name in config.lora.targets):
        raise ConfigError(
            f"{source}: data.require_audio=false needs lora.targets without the tower's layers: a rank without a clip "
            "would not take part when the others reduce their gradients"
        )
    _check_refill(config, source)
    _check_prompts_apart(config, source)
    if config.lora.path is not None and config.lora.rank:
        raise ConfigError(f"{source}: lora.rank and lora.path are both set; saved adapters have a rank already")
    if not config.lora.targets:
        raise ConfigError(f"{source}: lora.targets is empty; it names the layers that get an adapter")
    if config.model.master_dtype == "bfloat16" and config.model.dtype != "bfloat16":
        raise ConfigError(f"{source}: model.master_dtype=bfloat16 needs model.dtype=bfloat16, in which to compute")
    if config.data.band is not None and not (len(config.data.band) == 2 and config.data.band[0] <= config.data.band[1]):
        raise ConfigError(f"{source}: data.band is {config.data.band}; expected [LOW, HIGH], as in [0.375, 0.75]")
    _check_loss(config, source)
    if config.data.held_out and config.data.validation is not None:
        raise ConfigError(
            f"{source}: data.held_out and data.validation are both set; validation questions come from one of them"
        )


def _check_refill(config: Config, source: str) -> None:
    if not config.rollout.refill:
        return
    if config.data.order == "staged":
        raise ConfigError(
            f"{source}: rollout.refill is set, and data.order is staged: the prompts that replace others count too, so "
            "the stages would end early; set rollout.refill=0 or another data.order"
        )
    if config.rollout.group_size == 1:
        raise ConfigError(
            f"{source}: rollout.refill is set, and rollout.group_size is 1: a group of one completion has no spread "
            "of rewards; set rollout.group_size to 2 or more, or rollout.refill=0"
        )


def _check_prompts_apart(config: Config, source: str) -> None:
    """What excludes a forward and a backward over prompts alone."""
    always = {"sharding.replicas": config.sharding.replicas > 1}
    of_rollout = {
        "rollout.refill": config.rollout.refill > 0,
        "rollout.batch": config.rollout.batch is not None,
        "model.recompute": config.model.recompute,
    }
    settings = {
        "rollout.keep_prefill": always | of_rollout if config.rollout.keep_prefill else {},
        "optim.micro_branches": always if config.optim.micro_branches else {},
    }
    for setting, others in settings.items():
        for other in (name for name, is_set in others.items() if is_set):
            raise ConfigError(
                f"{source}: {setting} and {other} are both set, which are not supported together (docs/memory.md); "
                "leave one of the two out"
            )


def _check_loss(config: Config, source: str) -> None:
    loss = config.loss
    if not is_in_file(loss.advantage) and loss.advantage not in ADVANTAGES:
        raise ConfigError(
            f"{source}: loss.advantage must be one of {', '.join(ADVANTAGES)}, or your own, path/to/file.py:name, not "
            f"{loss.advantage!r}"
        )
    needing = {"loss.kl_target": loss.kl_target is not None, "loss.reference_every": loss.reference_every > 0}
    for name in (name for name, is_set in needing.items() if is_set and not loss.beta):
        raise ConfigError(f"{source}: {name} is set, and loss.beta is 0: there is no reference; set loss.beta")
    if loss.reference_every and (config.lora.rank or config.lora.path):
        raise ConfigError(
            f"{source}: loss.reference_every is set, and the reference of adapters is the model without them, which "
            "does not change; train the weights themselves, or set it to 0"
        )
    if loss.kl_in == "reward" and loss.kl_gradient != "own":
        raise ConfigError(f"{source}: loss.kl_gradient is of a KL in the loss; with loss.kl_in=reward leave it at own")


# Reading ------------------------------------------------------------------------------------------------------------


def _read_file(path: str) -> dict[str, Entry]:
    """Every `section.key` of a YAML file with its line; unknown and repeated names are errors."""
    try:
        loader = plain_loader(text_of(Path(path)))
        root = loader.get_single_node()
    except IsADirectoryError:
        raise ConfigError(f"{path}: a directory; {_of_directory(Path(path))}") from None
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file (working directory {os.getcwd()})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except BROKEN as error:
        raise ConfigError(f"{path}: not YAML: {said(error)}") from None
    entries = {}
    for section, section_node in _pairs(root, path, "the file"):
        where = f"{path}:{section.start_mark.line + 1}"
        if section.value not in SECTIONS:
            if not isinstance(section_node, yaml.MappingNode):
                _known(section.value, where)  # a key without its section
            raise ConfigError(
                f"{where}: unknown section {shown(section.value, LONGEST)}; {_nearest_section(section.value[:LONGEST])}"
            )
        for key, node in _pairs(section_node, path, section.value):
            where = f"{path}:{key.start_mark.line + 1}"
            name = _known(f"{section.value}.{key.value}", where)
            entries[name] = Entry(_found_beside(_construct(loader, node, path, name), Path(path).parent), where)
    return entries


def _found_beside(value: Any, directory: Path) -> Any:
    """The value with `file.py:name` in `directory`, that of the configuration, if it is there and not where we are."""
    if isinstance(value, dict):
        return {_found_beside(key, directory): _found_beside(inner, directory) for key, inner in value.items()}
    if isinstance(value, str) and is_in_file(value):
        file, _, name = value.rpartition(":")
        beside = directory / file
        return f"{beside}:{name}" if beside.is_file() and not Path(file).is_file() else value
    return value


def _of_directory(path: Path) -> str:
    """What to write instead of a directory, in which a run may be."""
    config = path / "config.yaml"
    if config.is_file():
        return f"it holds a run: CONFIG is {config}, with run.resume=true to continue the run"
    if (path / "config.json").is_file():
        return "it holds a model, which a configuration names as model.path"
    return "expected a YAML file"


def _pairs(node: yaml.Node | None, path: str, name: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """The (key, value) nodes of a mapping; YAML itself would let a repeated key silently replace the first one."""
    if node is None or node.tag == "tag:yaml.org,2002:null":  # an empty file, or a section whose keys are all comments
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {name} must be a mapping of keys to values")
    seen = set()
    for key, _ in node.value:
        where = f"{path}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where}: a key of {name} must be a plain name")
        if key.value in seen:
            raise ConfigError(f"{where}: {shown(key.value, LONGEST)} is given twice in {name}")
        seen.add(key.value)
    return node.value


def _construct(loader: PlainLoader, node: yaml.Node, path: str, name: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        _pairs(node, path, name)
    try:
        return loader.construct_object(node, deep=True)
    except BROKEN as error:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {name} is not YAML: {said(error)}") from None


def _read_override(text: str) -> tuple[str, Entry]:
    """Split `section.key=value`; the value is YAML, except that a string field takes the text unchanged."""
    name, equals, written = text.partition("=")
    where = f"override {shown(text, LONGEST)}"
    if not equals:
        hint = f", here {nearest(text, HINTS)}=VALUE" if text.startswith("--") else ""
        raise ConfigError(f"{where}: an override is written section.key=value{hint}")
    name = _known(name.strip(), where)
    try:
        value = plain_yaml(written)
    except BROKEN as error:
        if not _is_text(HINTS[name]):
            raise ConfigError(f"{where}: the value is not YAML: {said(error)}") from None
        value = written
    # run.directory=2026 means the directory "2026": a shell has no good way to quote a YAML string.
    is_other = not isinstance(value, str) and not (value is None and _is_optional(HINTS[name]))
    if _is_text(HINTS[name]) and is_other and not (isinstance(value, list) and HINTS[name] == Files | None):
        value = written
    return name, Entry(value, where)


def _known(name: str, where: str) -> str:
    """The name itself if it is a `section.key` of the configuration."""
    if name in SECTIONS:
        keys = ", ".join(known for known in HINTS if known.startswith(f"{name}."))
        raise ConfigError(f"{where}: {name} is a section; its keys are {keys}")
    if name not in HINTS:
        raise ConfigError(
            f"{where}: unknown key {shown(name, LONGEST)}; the nearest key is {nearest(name[:LONGEST], HINTS)}"
        )
    return name


def _nearest_section(name: str) -> str:
    near = difflib.get_close_matches(name[:LONGEST], list(SECTIONS), n=1, cutoff=0.0)[0]
    return f"the nearest section is {near}, of {', '.join(SECTIONS)}"


# Conversion ---------------------------------------------------------------------------------------------------------
# Each raises ConfigError with only what was expected; _build adds the place, the key and the value that was found.


def convert(value: Any, hint: Any) -> Any:
    """`value` as YAML gave it, checked and converted to the type `hint`."""
    if _is_optional(hint):
        return None if value is None else convert(value, _inner(hint))
    if hint == Files:
        return _list(value, str) if isinstance(value, list) and value else _str(value)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _within(convert(value, args[0]), args[1])
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"one of {', '.join(args)}")
        return value
    if origin is list:
        return _list(value, args[0])
    if origin is dict:
        return _nested(value, args[1]) if get_origin(args[1]) is dict else _mapping(value, args[1])
    return {bool: _bool, int: _int, float: _float, str: _str}[hint](value)


def _is_optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _inner(hint: Any) -> Any:
    """T of `T | None`."""
    return functools.reduce(operator.or_, (arg for arg in get_args(hint) if arg is not type(None)))


def _is_text(hint: Any) -> bool:
    return (_inner(hint) if _is_optional(hint) else hint) in (str, Files)


def _within(value: float, bound: Bound) -> float:
    if not bound.holds(value):
        raise ConfigError(bound.words)
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError("true or false")
    return value


def _int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError("an integer")
    return value


def _float(value: Any) -> float:
    """A finite number; YAML 1.1 reads 1e-6 (no dot) as a string, so strings are tried too."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError("a finite number")
    return number


def _str(value: Any) -> str:
    """A string; a leading ~ is the home directory, which no shell expands after `key=`."""
    if not isinstance(value, str) or not value:
        raise ConfigError("a string that is not empty (quote it if YAML reads it as another type)")
    return os.path.expanduser(value)


def _list(value: Any, item: Any) -> list:
    if not isinstance(value, list):
        raise ConfigError("a list")
    return [convert(element, item) for element in value]


def _mapping(value: Any, item: Any) -> dict:
    if item is str:
        if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
            raise ConfigError("a mapping of names to names")
    elif not isinstance(value, dict) or not value or not all(isinstance(key, str) for key in value):
        raise ConfigError("a mapping of at least one name to a number")
    return {key: convert(element, item) for key, element in value.items()}


def _nested(value: Any, item: Any) -> dict:
    """A mapping of names to mappings: of steps to numbers, or of names to anything."""
    of_steps = get_args(item)[0] is int
    words = "a mapping of names to " + ("mappings of steps to weights" if of_steps else "mappings of keys to values")
    kind = int if of_steps else str
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, dict) for k, v in value.items()):
        raise ConfigError(words)
    keys = [key for inner in value.values() for key in inner]
    if not all(type(key) is kind for key in keys) or of_steps and min(keys, default=0) < 0:
        raise ConfigError(words)
    if of_steps:
        if not all(value.values()):
            raise ConfigError(words)
        return {name: {step: _float(inner[step]) for step in sorted(inner)} for name, inner in value.items()}
    return {name: dict(inner) for name, inner in value.items()}
