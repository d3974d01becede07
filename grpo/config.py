"""The configuration of a run: frozen dataclasses by section, read from YAML and `section.key=value` overrides.

A mistake in a configuration is a `ConfigError` that says where it stands and what was expected; nothing is ignored.
Relative paths are relative to the working directory.
"""

import dataclasses
import difflib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the place, the `section.key` and what was expected."""


class Bound(NamedTuple):
    """The range of a number, as the words of its error and as limits; `above` and `below` are exclusive."""

    words: str
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most and self.above < value < self.below


Count = Annotated[int, Bound("at least 1", at_least=1)]
CountOrZero = Annotated[int, Bound("at least 0", at_least=0)]
Positive = Annotated[float, Bound("greater than 0", above=0)]
PositiveOrZero = Annotated[float, Bound("at least 0", at_least=0)]
ClipLow = Annotated[float, Bound("greater than 0 and at most 1", above=0, at_most=1)]
Seed = Annotated[int, Bound("0 to 4294967295", at_least=0, at_most=2**32 - 1)]
Share = Annotated[float, Bound("at least 0 and less than 1", at_least=0, below=1)]


@dataclass(frozen=True)
class RunConfig:
    directory: str  # where metrics, checkpoints and the trained model are written
    seed: Seed = 0  # with (step, example) it fixes data order, choices and completions
    resume: bool = False  # continue from the newest checkpoint in `directory`
    threads: CountOrZero = 0  # torch's intra-op threads per rank; 0 leaves torch's own choice


@dataclass(frozen=True)
class ModelConfig:
    path: str  # Hugging Face directory of the policy to train
    reference: str | None = None  # Hugging Face directory of the reference policy; null is model.path
    train_tower: bool = True  # False freezes the audio tower, as adapters do anyway; it then stands whole on each rank
    tower_cache: CountOrZero = 1024  # MiB per rank for what a frozen tower has heard
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation, and of weights that are not trained
    master_dtype: Literal["float32", "bfloat16"] = "float32"  # of trained weights and the optimizer's state
    attention: Literal["sdpa", "flex"] = "sdpa"  # of scored rows; flex skips what the tree mask hides, on GPUs only
    recompute: bool = False  # recompute each layer's activations in backward: less memory, about a third more time


@dataclass(frozen=True)
class LoraConfig:
    rank: CountOrZero = 0  # of the adapters; 0 trains the weights themselves
    alpha: Positive = 32.0  # what the adapters add is scaled by alpha / rank
    targets: list[str] = field(  # names of the decoder's linear layers that get an adapter
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    path: str | None = None  # directory of adapters in PEFT's format to begin with; null begins at zero


@dataclass(frozen=True)
class ShardingConfig:
    replicas: Count = 1  # copies of the model, each sharded over its own ranks (hybrid sharding); 1 shards over all
    reshard: bool = True  # free each layer's gathered weights after its forward: less memory, one more all-gather
    offload: bool = False  # keep weights, gradients and optimizer in host memory; AdamW then runs on the CPU
    offload_reference: bool = False  # keep the reference's weights in host memory


@dataclass(frozen=True)
class DataConfig:
    train: str | None = None  # JSONL file of examples; training needs it
    validation: str | None = None  # JSONL file of examples to evaluate during training and to select checkpoints by
    held_out: CountOrZero = 0  # without a validation file: examples of `train` set aside for it, by whole clips
    test: str | None = None  # JSONL file of the benchmark; only launch/evaluate.py and launch/choose.py read it
    audio_root: str | None = None  # directory that relative audio paths start from; null is the JSONL file's own
    template: str = "answer"  # name of the prompt template
    shuffle_choices: bool = True  # a new order of the choices for each (seed, step, example)
    silent_share: Share = 0.0  # share of training prompts whose sound is replaced by zeros (modality dropout)
    skip_bad: bool = False  # count and skip examples that cannot be read, instead of stopping
    long_clips: Literal["error", "crop", "skip"] = "error"  # what to do with a clip over max_seconds
    max_seconds: Positive = 30.0  # longest clip, in seconds
    workers: Count = 1  # threads per rank that prepare prompts ahead of the step


@dataclass(frozen=True)
class RolloutConfig:
    group_size: Count = 8  # completions per prompt
    max_new_tokens: Count = 256  # longest completion, in tokens
    temperature: Positive = 1.0  # divides the logits, in sampling and in scoring
    batch: Count | None = None  # prompts decoded at a time on one rank; one that has ended makes room; null is all
    cuda_graphs: bool = False  # on a GPU, record decode steps in each rollout and replay them: for long completions


@dataclass(frozen=True)
class RewardConfig:
    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})  # per reward function


@dataclass(frozen=True)
class LossConfig:
    advantage: Literal["std", "none"] = "std"  # what the centred rewards of a group are divided by
    clip_low: ClipLow = 0.2  # the ratio is clipped below 1 - clip_low
    clip_high: Positive = 0.2  # the ratio is clipped above 1 + clip_high
    beta: PositiveOrZero = 0.04  # weight of the KL to the reference; 0 needs no reference
    token_weights: Literal["sequence-mean", "token-mean"] = "sequence-mean"  # equal weight per completion, or per token
    inner_epochs: Count = 1  # passes over each step's rollout (mu in the paper), one update each


@dataclass(frozen=True)
class OptimConfig:
    steps: Count = 500  # rollouts in the whole run
    prompts_per_step: Count = 8  # prompts over all ranks
    micro_batch: Count = 1  # prompts per forward and backward on one rank
    lr: PositiveOrZero = 1e-6  # peak learning rate
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # of the learning rate after warm-up
    warmup_steps: CountOrZero = 0  # steps over which the learning rate rises from 0
    weight_decay: PositiveOrZero = 0.0  # AdamW's, per unit of learning rate
    beta1: Share = 0.9  # AdamW's decay of the first moment
    beta2: Share = 0.999  # AdamW's decay of the second moment
    clip_norm: Positive = 1.0  # largest global L2 norm of the gradient


@dataclass(frozen=True)
class EvaluationConfig:
    every: CountOrZero = 0  # steps between evaluations; 0 is never
    batch: Count = 16  # prompts at a time on one rank
    limit: Count | None = None  # examples to evaluate; null is all
    before: bool = False  # also evaluate before the first step
    benchmark: Literal["strict", "mmau", "mmar", "mmsu"] = "strict"  # whose rule judges the test, and its answer file


@dataclass(frozen=True)
class CheckpointConfig:
    every: CountOrZero = 100  # steps between checkpoints, the last step included; 0 is never
    keep: Count = 2  # newest checkpoints that a run can resume from
    weights: bool = False  # keep the weights of all older ones, for launch/choose.py to choose among
    export: bool = True  # write a Hugging Face directory at the end


@dataclass(frozen=True)
class Config:
    run: RunConfig
    model: ModelConfig
    lora: LoraConfig
    sharding: ShardingConfig
    data: DataConfig
    rollout: RolloutConfig
    reward: RewardConfig
    loss: LossConfig
    optim: OptimConfig
    evaluation: EvaluationConfig
    checkpoint: CheckpointConfig


SECTIONS: dict[str, type] = get_type_hints(Config)
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
    """Read `CONFIG.yaml [section.key=value ...]`; later overrides win. Raises ConfigError."""
    if not argv or "=" in argv[0] and not Path(argv[0]).is_file():
        raise ConfigError("the first argument must be the configuration: CONFIG.yaml [section.key=value ...]")
    entries = _read_file(argv[0])
    for override in argv[1:]:
        name, entry = _read_override(override)
        entries[name] = entry
    return _build(entries, source=argv[0])


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _build(entries: dict[str, Entry], *, source: str) -> Config:
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for name, entry in entries.items():
        section, key = name.split(".")
        try:
            values[section][key] = _convert(entry.value, HINTS[name])
        except ConfigError as error:
            raise ConfigError(f"{entry.where}: {name} must be {error}, not {entry.value!r}") from None
    for section, kind in SECTIONS.items():
        for f in dataclasses.fields(kind):
            if f.name not in values[section] and _is_required(f):
                name = f"{section}.{f.name}"
                raise ConfigError(f"{source}: {name} is missing; set it there or as {name}=VALUE")
    config = Config(**{section: kind(**values[section]) for section, kind in SECTIONS.items()})
    _check_together(config, source=source)
    return config


def _is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _check_together(config: Config, *, source: str) -> None:
    if config.optim.warmup_steps > config.optim.steps:
        raise ConfigError(
            f"{source}: optim.warmup_steps must be at most optim.steps ({config.optim.steps}), "
            f"not {config.optim.warmup_steps}"
        )
    if config.lora.path is not None and config.lora.rank:
        raise ConfigError(f"{source}: lora.rank and lora.path are both set; saved adapters bring their own rank")
    if not config.lora.targets:
        raise ConfigError(f"{source}: lora.targets is empty; it names the layers that get an adapter")
    if config.model.master_dtype == "bfloat16" and config.model.dtype != "bfloat16":
        raise ConfigError(f"{source}: model.master_dtype=bfloat16 needs model.dtype=bfloat16: it is computed in that")
    if config.data.held_out and config.data.validation is not None:
        raise ConfigError(
            f"{source}: data.held_out and data.validation are both set; validation questions come from one of them"
        )


# Reading ------------------------------------------------------------------------------------------------------------


def _read_file(path: str) -> dict[str, Entry]:
    """Every `section.key` of a YAML file with its line; unknown and repeated names are errors."""
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file (working directory {os.getcwd()})")
    try:
        loader = yaml.SafeLoader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    entries = {}
    for section, section_node in _pairs(root, path, "the file"):
        where = f"{path}:{section.start_mark.line + 1}"
        if section.value not in SECTIONS:
            raise ConfigError(f"{where}: unknown section {section.value}; {_nearest_section(section.value)}")
        for key, node in _pairs(section_node, path, section.value):
            where = f"{path}:{key.start_mark.line + 1}"
            name = _known(f"{section.value}.{key.value}", where)
            entries[name] = Entry(_construct(loader, node, path, name), where)
    return entries


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
            raise ConfigError(f"{where}: {key.value} stands twice in {name}")
        seen.add(key.value)
    return node.value


def _construct(loader: yaml.SafeLoader, node: yaml.Node, path: str, name: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        _pairs(node, path, name)
    try:
        return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: {name} is not YAML: {error}") from None


def _read_override(text: str) -> tuple[str, Entry]:
    """Split `section.key=value`; the value is YAML, except that a string field takes it as it stands."""
    name, equals, written = text.partition("=")
    where = f"override {text}"
    if not equals:
        raise ConfigError(f"{where}: an override is written section.key=value")
    name = _known(name.strip(), where)
    try:
        value = yaml.safe_load(written)
    except (yaml.YAMLError, ValueError) as error:
        if not _is_text(HINTS[name]):
            raise ConfigError(f"{where}: the value is not YAML: {error}") from None
        value = written
    # run.directory=2026 means the directory "2026": a shell has no good way to quote a YAML string.
    if _is_text(HINTS[name]) and not isinstance(value, str) and not (value is None and _is_optional(HINTS[name])):
        value = written
    return name, Entry(value, where)


def _known(name: str, where: str) -> str:
    """The name itself if it is a `section.key` of the configuration."""
    if name in HINTS:
        return name
    section, _, key = name.partition(".")
    if section not in SECTIONS:
        raise ConfigError(f"{where}: unknown section {section}; {_nearest_section(section)}")
    elsewhere = [known for known in HINTS if known.endswith(f".{key}")]
    here = [known for known in HINTS if known.startswith(f"{section}.")]
    raise ConfigError(f"{where}: unknown key {name}; the nearest key is {_nearest(name, elsewhere or here)}")


def _nearest_section(name: str) -> str:
    return f"the nearest section is {_nearest(name, list(SECTIONS))}, of {', '.join(SECTIONS)}"


def _nearest(name: str, candidates: list[str]) -> str:
    return difflib.get_close_matches(name, candidates, n=1, cutoff=0.0)[0]


# Conversion ---------------------------------------------------------------------------------------------------------
# Each raises ConfigError with only what was expected; _build adds where, which key and what stood there.


def _convert(value: Any, hint: Any) -> Any:
    """`value` as YAML gave it, checked and converted to the type `hint`."""
    if _is_optional(hint):
        return None if value is None else _convert(value, _inner(hint))
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _within(_convert(value, args[0]), args[1])
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"one of {', '.join(args)}")
        return value
    if origin is list:
        return _list(value, args[0])
    if origin is dict:
        return _mapping(value, args[1])
    return {bool: _bool, int: _int, float: _float, str: _str}[hint](value)


def _is_optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _inner(hint: Any) -> Any:
    """T of `T | None`."""
    return next(arg for arg in get_args(hint) if arg is not type(None))


def _is_text(hint: Any) -> bool:
    return (_inner(hint) if _is_optional(hint) else hint) is str


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
        raise ConfigError("a string that is not empty (quote it if it looks like something else)")
    return os.path.expanduser(value)


def _list(value: Any, item: Any) -> list:
    if not isinstance(value, list):
        raise ConfigError("a list")
    return [_convert(element, item) for element in value]


def _mapping(value: Any, item: Any) -> dict:
    if not isinstance(value, dict) or not value or not all(isinstance(key, str) for key in value):
        raise ConfigError("a mapping of at least one name to a number")
    return {key: _convert(element, item) for key, element in value.items()}
