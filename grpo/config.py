"""The options of a run, with their units and defaults: frozen dataclasses, one per section.

`hark.launch.common.config_file` reads them from YAML. Relative paths are relative to the working directory.
"""

import dataclasses
import math
import shlex
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import yaml

from hark import UserError


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message names file and line, the `section.key` and what was expected."""


class Bound(NamedTuple):
    """The range of a number: its limits, and `words` for the error message; `above` and `below` are exclusive."""

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
AboveOne = Annotated[float, Bound("greater than 1", above=1)]
WholeShare = Annotated[float, Bound("greater than 0 and at most 1", above=0, at_most=1)]
Share = Annotated[float, Bound("at least 0 and less than 1", at_least=0, below=1)]
Files = str | list[str]  # one name or several; of JSON lines, JSON or parquet files, or hf:NAME:SPLIT


@dataclass(frozen=True)
class RunConfig:
    directory: str  # where metrics, checkpoints and the trained model are written
    seed: Seed = 0  # with (step, example) it determines data order, order of choices and completions
    resume: bool = False  # continue from the newest intact checkpoint in `directory`; without one, begin
    allow_changed: list[str] = field(default_factory=list)  # what may differ on resume: optim.lr, data, ranks, ...
    threads: CountOrZero = 0  # torch's intra-op threads per rank; 0 leaves torch's own choice
    grace: Positive = 25.0  # seconds in which a run saves and leaves after SIGTERM or SIGINT; torchrun waits 30
    patience: PositiveOrZero = 600.0  # seconds without progress after which a rank counts as hung; 0 waits forever


@dataclass(frozen=True)
class ModelConfig:
    path: str  # Hugging Face directory of the policy to train
    reference: str | None = None  # Hugging Face directory of the reference policy; null is model.path
    policy: str | None = None  # your own policy class, path/to/file.py:Class; null is that of the model's type
    train: Literal["all", "no-tower", "projector"] = (
        "all"  # the weights to train; each rank holds all of a frozen tower
    )
    tower_cache: CountOrZero = 1024  # MiB per rank to cache a frozen tower's outputs, clip by clip
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation, and of weights that are not trained
    master_dtype: Literal["float32", "bfloat16"] = "float32"  # of trained weights and the optimizer's state
    attention: Literal["auto", "sdpa", "flex"] = (
        "auto"  # in scoring; flex skips pairs of different completions, and auto takes it on GPUs where it is checked
    )
    recompute: bool = False  # recompute each layer's activations in backward: less memory, about a third more time
    compile: bool = False  # compile the decoder's layers by torch.compile: fewer kernels, and a minute at the start


@dataclass(frozen=True)
class LoraConfig:
    rank: CountOrZero = 0  # of the adapters; 0 trains the weights themselves
    alpha: Positive = 32.0  # the adapters' output is scaled by alpha / rank
    targets: list[str] = field(  # layers that get an adapter: q_proj (decoder), tower.q_proj, projector.linear, ...
        default_factory=lambda: ["all-linear"]
    )
    path: str | None = None  # directory of saved adapters in PEFT's format to start from; null starts new ones


@dataclass(frozen=True)
class ShardingConfig:
    replicas: Count = 1  # copies of the model, each sharded over its own ranks (hybrid sharding); 1 shards over all
    reshard: bool = True  # free each layer's gathered weights after its forward: less memory, one more all-gather
    offload: bool = False  # keep weights, gradients and optimizer in host memory; AdamW then runs on the CPU
    offload_reference: bool = False  # keep the reference's weights in host memory


@dataclass(frozen=True)
class DataConfig:
    train: Files | None = None  # file of examples; training needs it. Several are mixed by weights: [a.jsonl:0.7, ...]
    validation: Files | None = None  # file of examples to evaluate during training and to select checkpoints by
    held_out: CountOrZero = 0  # without a validation file: how many examples of `train` to hold out, by whole clips
    test: str | None = None  # file of the benchmark; only launch/evaluate.py and launch/choose.py read it
    order: Literal["shuffled", "file", "sorted", "staged"] = (
        "shuffled"  # of the examples: shuffled in each epoch, as in the files, easy to hard, or that in stages
    )
    order_by: Literal["difficulty", "pass_rate"] = "difficulty"  # the key of a row that says how hard it is
    stages: Count = 3  # of data.order=staged: equal parts of the run, each with its part of the examples
    band: list[float] | None = None  # train only on examples whose difficulty or pass rate is in [LOW, HIGH]
    columns: dict[str, str] = field(default_factory=dict)  # keys that have another name in the files: {KEY: NAME, ...}
    audio_root: str | None = None  # directory that relative audio paths start from; null is the file's own
    allow_outside: bool = False  # whether clips may lie outside of that directory, by "..", absolute paths or links
    template: str = "answer"  # name of the prompt template
    shuffle_choices: bool = True  # a new order of the choices for each (seed, step, example)
    silent_share: Share = 0.0  # share of training prompts whose waveform is replaced by zeros (modality dropout)
    require_audio: bool = True  # for a model that takes audio: whether a question without a clip is an error
    skip_bad: bool = False  # count and skip examples that cannot be read, instead of stopping
    max_lost: Share = 0.1  # with skip_bad: share of the examples that may break after the check at the start of a run
    long_clips: Literal["error", "crop", "skip"] = "error"  # what to do with a clip over max_seconds
    max_seconds: Positive = 30.0  # longest clip, in seconds
    workers: Count = 1  # threads per rank that prepare prompts ahead of the step


@dataclass(frozen=True)
class RolloutConfig:
    group_size: Count = 8  # completions per prompt
    max_new_tokens: Count = 256  # longest completion, in tokens
    temperature: Positive = 1.0  # divides the logits, in sampling and in scoring
    refill: CountOrZero = (
        0  # groups of equal rewards are replaced by at most this many times prompts_per_step further prompts
    )
    batch: Count | None = None  # prompts decoded at a time on one rank; the next starts when one finishes; null is all
    keep_prefill: bool = (
        False  # keep the rollout's forward over the prompts, with its activations, for the first update
    )
    cuda_graphs: bool = True  # on a GPU, record decode steps as CUDA graphs; keeps a copy of gathered weights


@dataclass(frozen=True)
class RewardConfig:
    weights: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0})  # of each reward
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # keyword arguments: {REWARD: {KEY: VALUE}}
    only_if: dict[str, str] = field(default_factory=dict)  # a reward is 0 where another is not above 0: {REWARD: OTHER}
    schedule: dict[str, dict[int, float]] = (
        field(  # weights that change: {REWARD: {STEP from 0: WEIGHT}}, linear between
            default_factory=dict
        )
    )
    on_error: Literal["stop", "none"] = (
        "stop"  # when a reward fails: end the run, or leave out what it would have given
    )
    max_failed: Share = 0.1  # with on_error=none: share of the questions of 100 steps of which a reward may fail
    timeout: Positive = 60.0  # seconds of one call of one reward on one group, in the processes of rewards
    workers: CountOrZero = (
        0  # processes per rank that run rewards; 0: one, for your own rewards, math, judge and artefact
    )


@dataclass(frozen=True)
class LossConfig:
    kind: str = "grpo"  # a named setting of the keys below (docs/algorithms.md), or your own loss, path/to/file.py:name
    advantage: str = "std"  # what rewards become: a name of docs/algorithms.md, or your own, path/to/file.py:name
    ratio: Literal["token", "sequence", "sequence_product"] = (
        "token"  # new to old probability: of each token, the geometric mean over the completion, or the product
    )
    bound: Literal["clip", "cispo", "sapo", "none", "reinforce"] = "clip"  # what bounds the ratio
    clip_low: ClipLow = 0.2  # the ratio is clipped to at least 1 - clip_low
    clip_high: Positive = 0.2  # the ratio is clipped to at most 1 + clip_high
    ratio_cap: AboveOne | None = None  # largest ratio where the advantage is negative (dual or two-sided clip)
    gate_up: Positive = 1.0  # sharpness of SAPO's gate where the advantage is positive
    gate_down: Positive = 1.05  # sharpness of SAPO's gate where it is not
    token_weights: Literal["sequence-mean", "token-mean", "constant"] = (
        "sequence-mean"  # equal weight per completion, per token, or 1 / (completions * length)
    )
    length: Count | None = None  # of token_weights=constant, in tokens; null is rollout.max_new_tokens
    truncated: Literal["keep", "mask"] = "keep"  # whether completions that reached the token limit are trained on
    beta: PositiveOrZero = 0.04  # weight of the KL to the reference; with 0 no reference is loaded
    kl: Literal["k1", "k2", "k3"] = "k3"  # the estimate of the KL
    kl_in: Literal["loss", "reward"] = "loss"  # add beta * KL to the loss, or subtract it from the reward
    kl_gradient: Literal["own", "k2", "ratio"] = "own"  # gradient of the KL in the loss: the estimate's, or corrected
    kl_target: Positive | None = None  # beta is adapted until the metric kl is this; null leaves beta as it is
    kl_horizon: Count = 10000  # completions over which beta adapts
    reference_every: CountOrZero = 0  # steps between moving the reference towards the policy; 0 is never
    reference_mix: WholeShare = 1.0  # how far it moves: 1 copies the policy; 0.01 at every step averages exponentially
    entropy: PositiveOrZero = 0.0  # weight of the entropy bonus
    importance_cap: PositiveOrZero = (
        0.0  # weigh tokens by pi / pi_sampler, at most this, scored before the update; 0 is off
    )
    sft: PositiveOrZero = (
        0.0  # weight of the supervised loss of right answers, or of targets of the rows, beside the policy loss
    )
    inner_epochs: Count = 1  # passes over each step's rollout (mu in the paper), one update each


@dataclass(frozen=True)
class OptimConfig:
    steps: Count = 500  # training steps in the whole run
    prompts_per_step: Count = 8  # prompts over all ranks
    micro_batch: Count = 1  # prompts per forward and backward on one rank
    micro_branches: Count | None = None  # completions of each of these prompts per forward and backward; null is all
    lr: PositiveOrZero = 1e-6  # peak learning rate
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # of the learning rate after warm-up
    lr_floor: Share = 0.0  # share of the peak learning rate to which the schedule falls
    warmup_steps: CountOrZero = 0  # steps over which the learning rate rises from 0
    weight_decay: PositiveOrZero = 0.0  # AdamW's, per unit of learning rate
    beta1: Share = 0.9  # AdamW's decay of the first moment
    beta2: Share = 0.999  # AdamW's decay of the second moment
    clip_norm: Positive = 1.0  # largest global L2 norm of the gradient
    skip_nonfinite: CountOrZero = 0  # updates of a run that may be left out because loss or gradient is not finite


@dataclass(frozen=True)
class EvaluationConfig:
    every: CountOrZero = 0  # steps between evaluations; 0 is never
    batch: Count = 16  # prompts at a time on one rank
    limit: Count | None = None  # examples to evaluate; null is all
    before: bool = False  # also evaluate before the first step
    silent: bool = False  # in training, also ask the validation questions without sound: silent_accuracy
    benchmark: Literal["strict", "mmau", "mmar", "mmsu"] = "strict"  # the grading rule and the answer file of data.test


@dataclass(frozen=True)
class CheckpointConfig:
    every: CountOrZero = 100  # steps between checkpoints, the last step included; 0 is never
    keep: Count = 2  # how many of the newest checkpoints to keep for resuming, beside the best by validation accuracy
    weights: bool = False  # keep the weights of older checkpoints too, for launch/choose.py
    export: bool = True  # write a Hugging Face directory at the end
    background: bool = True  # train on while a copy in host memory is written
    required: bool = (
        True  # whether a checkpoint or a line of the log that cannot be written, as on a full disk, ends the run
    )


@dataclass(frozen=True)
class LogConfig:
    completions: CountOrZero = 50  # steps between printing a few completions, the last step included; 0 is never
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(  # also write metrics and completions for these
        default_factory=list
    )


@dataclass(frozen=True)
class RecordConfig:
    every: CountOrZero = 0  # steps between recorded steps, the last step included; 0 records none
    keep: Count = 50  # how many of the newest recorded steps to keep
    last: CountOrZero = 3  # steps before an error to record
    likeliest: CountOrZero = 5  # likeliest tokens to record at each place of a recorded step
    answers: CountOrZero = 0  # questions per rank to answer again: greedily, silent, and with another clip


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
    log: LogConfig
    record: RecordConfig


def to_yaml(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def differences(config: Config) -> list[str]:
    """What differs from the defaults: for each section that does, `section.key=value ...` as on a command line."""
    lines = []
    for section in dataclasses.fields(config):
        options = getattr(config, section.name)
        words = [
            quoted(f"{section.name}.{option.name}={flow(getattr(options, option.name))}")
            for option in dataclasses.fields(options)
            if getattr(options, option.name) != default_of(option)
        ]
        lines += [" ".join(words)] if words else []
    return lines


def quoted(word: str) -> str:
    """A word as a shell reads it, in double quotes if single ones would have to be escaped."""
    return f'"{word}"' if "'" in word and not set('"$`\\!') & set(word) else shlex.quote(word)


def default_of(option: dataclasses.Field) -> Any:
    """The default of an option; dataclasses.MISSING for one that must be given."""
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def flow(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True).split("\n")[0]
