"""What the verbs share: how a command ends, and what a configuration describes, loaded: policies, data, evaluations."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from hark.data.audio import load_waveform
from hark.data.benchmarks.report import accuracies, row_of
from hark.data.choices import is_correct
from hark.data.errors import DataError
from hark.data.examples import BadExample, Example, load_examples
from hark.data.loader import BadLog, Loader, check_audio, evaluation_batches
from hark.data.order import hold_out
from hark.data.prompts import find_template
from hark.data.rewards import RewardError, find_reward, reward_matrix
from hark.grpo import loop
from hark.grpo.config import Config, ConfigError, to_yaml
from hark.grpo.evaluate import evaluate
from hark.grpo.instruments.metrics import peak_gib
from hark.grpo.instruments.trace import NonFiniteError
from hark.grpo.learner import Learner
from hark.grpo.loop import MemoryProbeError
from hark.grpo.runtime.checkpoint import CheckpointError
from hark.grpo.runtime.collectives import World, gather_rows, joined_world
from hark.grpo.runtime.sharding import device_mesh, shard
from hark.launch.run_directory import check_run_directory
from hark.models.loading import load_policy
from hark.models.lora import WithoutAdapters, read_lora
from hark.models.policy import Lora, Policy, PolicyError, Prompt

# Batches of an evaluation that the sampler gets at once, so that a finished answer makes room for the next question.
ROUNDS = 4
USER_ERRORS = (ConfigError, DataError, PolicyError, CheckpointError, RewardError, MemoryProbeError, NonFiniteError)


def run(main: Callable[[list[str]], None]) -> None:
    """Call `main` with the command line, then end the process; an error of the user is one line, not a traceback."""
    status = 0
    try:
        main(sys.argv[1:])
    except USER_ERRORS as error:
        rank = os.environ.get("RANK")
        print(f"error{f' (rank {rank})' if rank else ''}: {error}", file=sys.stderr)
        status = 1
    # Not by sys.exit: FSDP holds references to the process group until the interpreter is finalised. A gloo thread may
    # then abort the process (seen in 3 of 25 starts), and NCCL may wait for ranks that have failed.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def train(config: Config, make_trainer: Callable[..., Learner]) -> None:
    """Train what `make_trainer(config, world, policy, data=, validate=)` makes, on the processes of torchrun."""
    with joined_world(threads=config.run.threads) as world:
        announce(config, world)
        check_training(config, world)
        policy = make_policy(config, world)
        examples, held_out = training_examples(config, world, policy)
        validate = partial(validation_figures, config, world, policy, held_out) if held_out else None
        with training_loader(config, world, policy, examples) as loader:
            loop.train(make_trainer(config, world, policy, data=loader, validate=validate))
            if loader.bad:
                print(f"{len(loader.bad)} more turned out bad, listed in {bad_log(config).path}", flush=True)


def announce(config: Config, world: World) -> None:
    """Print the resolved configuration, after a check of the names of its template and rewards."""
    find_template(config.data.template)
    for name in config.reward.weights:
        find_reward(name)
    if world.is_main:
        print(to_yaml(config), end="", flush=True)


def check_training(config: Config, world: World) -> None:
    """Refuse, before anything is loaded, a configuration that cannot be trained or would overwrite another run."""
    check_run_directory(config)
    if config.data.train is None:
        raise ConfigError("data.train is missing; training needs a JSONL file of examples")
    if config.optim.prompts_per_step % world.size:
        raise ConfigError(
            f"optim.prompts_per_step is {config.optim.prompts_per_step}; "
            f"it must be a multiple of the number of processes, {world.size}"
        )
    if config.model.attention == "flex" and world.device.type != "cuda":
        raise ConfigError(
            "model.attention=flex needs a GPU: FlexAttention has no backward on the CPU; leave it at sdpa"
        )
    evaluates = config.evaluation.every or config.evaluation.before
    if evaluates and config.data.validation is None and not config.data.held_out:
        raise ConfigError("evaluation is asked for, but neither data.validation nor data.held_out gives questions")


def make_policy(config: Config, world: World, *, train: bool = True) -> Policy:
    """The policy of model.path with its adapters, sharded over the world."""
    lora = lora_of(config) if train or config.lora.path else None  # new adapters are of use only in training
    mesh = device_mesh(world, config.sharding.replicas)
    return _load(config, world, config.model.path, mesh, lora=lora, offload=config.sharding.offload, train=train)


def make_reference(config: Config, world: World, policy: Policy) -> Policy | WithoutAdapters | None:
    """The frozen policy of the KL term, or None where beta is 0.

    Where the policy without its adapters is the same, it is that; else a copy, in host memory if so configured.
    """
    path = config.model.reference or config.model.path
    if config.loss.beta == 0:
        return None
    if policy.lora is not None and path == config.model.path:
        return WithoutAdapters(policy)
    # The policy's mesh, because a second mesh of replicas would create further communicators.
    offload = config.sharding.offload_reference
    reference = _load(config, world, path, policy.mesh, lora=None, offload=offload, train=False)
    if policy.tower_cache is not None and path == config.model.path:
        reference.share_tower(policy)
    return reference


def lora_of(config: Config) -> Lora | None:
    """The adapters of the policy: those saved in lora.path, or new ones, or none."""
    lora = config.lora
    if lora.path is not None:
        return read_lora(lora.path)
    return Lora(lora.rank, lora.alpha, tuple(lora.targets)) if lora.rank else None


def _load(
    config: Config, world: World, path: str, mesh: DeviceMesh, *, lora: Lora | None, offload: bool, train: bool
) -> Policy:
    model, dtype = config.model, getattr(torch, config.model.dtype)
    before = peak_gib(torch.device("cpu"))
    policy = load_policy(
        path,
        device=world.device,
        dtype=dtype,
        master_dtype=getattr(torch, model.master_dtype),
        train=train,
        train_tower=model.train_tower,
        tower_cache=model.tower_cache * 2**20,
        lora=lora,
        recompute=model.recompute,
        attention=model.attention,
        shard=partial(
            shard, mesh=mesh, dtype=dtype, reshard=config.sharding.reshard, offload=offload, meter=world.meter
        ),
    )
    _report_loading(policy, path, "policy" if train else "frozen policy", peak_gib(torch.device("cpu")) - before, world)
    return policy


def _report_loading(policy: Policy, path: str, kind: str, grown: float, world: World) -> None:
    peaks = gather_rows([grown], world)
    if peaks is not None:
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in policy.parameters()]
        count, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
        print(
            f"{kind} {path}: {count / 1e6:.4g} M parameters, {trained / 1e6:.3g} M to train; the peak of host memory "
            f"grew by {', '.join(f'{peak:.2f}' for peak in peaks)} GiB while loading on {world.size} ranks",
            flush=True,
        )


def training_examples(config: Config, world: World, policy: Policy) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those to validate on: data.validation, or held out of data.train."""
    examples = checked_examples(config, world, policy, config.data.train)
    if config.data.validation is not None:
        return examples, checked_examples(config, world, policy, config.data.validation)
    return hold_out(examples, config.data.held_out, config.run.seed) if config.data.held_out else (examples, [])


def training_loader(config: Config, world: World, policy: Policy, examples: Sequence[Example]) -> Loader:
    """Prepares the prompts of each step."""
    return Loader(
        examples,
        policy.prepare,
        seed=config.run.seed,
        prompts_per_step=config.optim.prompts_per_step,
        rank=world.rank,
        world=world.size,
        template=config.data.template,
        shuffle_choices=config.data.shuffle_choices,
        waveform=waveform_of(config, policy),
        skip_bad=config.data.skip_bad,
        workers=config.data.workers,
        silent_share=config.data.silent_share,
        on_bad=bad_log(config).add,
    )


def validation_figures(config: Config, world: World, policy: Policy, examples: Sequence[Example]) -> dict[str, float]:
    """Greedy accuracy on the examples, in all and by task; empty on all ranks but 0."""
    rows = validation_rows(config, world, policy, examples)
    return {} if rows is None else accuracies(rows, "task")


def validation_rows(config: Config, world: World, policy: Policy, examples: Sequence[Example]) -> list[dict] | None:
    """Greedy answers to the first evaluation.limit examples, judged: one row each on rank 0, None on the others."""
    batches = evaluation_share(
        config, world, policy, examples[: config.evaluation.limit],
        waveform=waveform_of(config, policy), on_bad=bad_log(config).add,
    )  # fmt: skip

    def to_row(example: Example, completion: str, stopped: bool) -> dict:
        correct = is_correct(completion, example.choices, example.answer)
        return row_of(example, prediction=completion, correct=correct, stopped=stopped)

    return evaluate(policy, batches, to_row, world, **evaluation_settings(config))


def evaluation_share(
    config: Config,
    world: World,
    policy: Policy,
    examples: Sequence[Example],
    *,
    waveform: Callable[[Example], np.ndarray],
    on_bad: Callable[[BadExample], object],
) -> Iterator[Sequence[tuple[Example, Prompt]]]:
    """This rank's share of the examples, in batches; on_bad gets each one that cannot be used and is left out."""
    return evaluation_batches(
        examples[world.rank :: world.size],
        policy.prepare,
        template=config.data.template,
        waveform=waveform,
        batch=ROUNDS * config.evaluation.batch,
        workers=config.data.workers,
        skip_bad=config.data.skip_bad,
        on_bad=on_bad,
    )


def evaluation_settings(config: Config) -> dict[str, Any]:
    """The settings of `evaluate`."""
    rollout = config.rollout
    return dict(max_new_tokens=rollout.max_new_tokens, batch=config.evaluation.batch, graphs=rollout.cuda_graphs)


def checked_examples(config: Config, world: World, policy: Policy, path: str) -> list[Example]:
    """The examples of a JSONL file whose clips can be opened; the others are listed in the run directory."""
    examples, bad = read_examples(config, policy, path)
    examples, unusable = check_clips(config, examples)
    list_bad(config, world, path, bad + unusable, "bad examples skipped")
    return examples


def checked_questions(config: Config, world: World, policy: Policy) -> tuple[list[Example | BadExample], list[Example]]:
    """The first evaluation.limit questions of data.test in file order, and those of them that can be asked."""
    examples, bad = read_examples(config, policy, config.data.test, benchmark=True)
    questions = sorted([*examples, *bad], key=lambda question: int(question.line.rpartition(":")[2]))
    questions = questions[: config.evaluation.limit]
    usable, unusable = check_clips(config, [question for question in questions if isinstance(question, Example)])
    bad = [question for question in questions if isinstance(question, BadExample)]
    list_bad(config, world, config.data.test, bad + unusable, "questions cannot be asked and count as wrong")
    return questions, usable


def read_examples(
    config: Config, policy: Policy, path: str, *, benchmark: bool = False
) -> tuple[list[Example], list[BadExample]]:
    """The examples of a JSONL file, and the lines that are skipped by data.skip_bad."""
    return load_examples(
        path,
        audio_root=config.data.audio_root,
        require_audio=policy.sample_rate is not None,
        skip_bad=config.data.skip_bad,
        benchmark=benchmark,
    )


def check_clips(config: Config, examples: Sequence[Example]) -> tuple[list[Example], list[BadExample]]:
    """The examples whose clips can be opened, and the others."""
    data = config.data
    return check_audio(
        examples, max_seconds=data.max_seconds, long_clips=data.long_clips, skip_bad=data.skip_bad, workers=data.workers
    )


def list_bad(config: Config, world: World, path: str, bad: Sequence[BadExample], what: str) -> None:
    """Add examples to the list of bad ones, on rank 0, and print how many."""
    if world.is_main and bad:
        log = bad_log(config)
        for example in bad:
            log.add(example)
        print(f"{path}: {len(bad)} {what}, listed in {log.path}", flush=True)


def bad_log(config: Config) -> BadLog:
    """The list of skipped examples."""
    return BadLog(Path(config.run.directory) / "bad.jsonl")


def waveform_of(config: Config, policy: Policy) -> Callable[[Example], np.ndarray]:
    """A function from an example to its waveform at the policy's sample rate."""
    return lambda example: load_waveform(
        example.audio_path,
        sample_rate=policy.sample_rate,
        max_seconds=config.data.max_seconds,
        long_clips=config.data.long_clips,
    )


def rewards_of(config: Config) -> Callable[[Sequence[Example], Sequence[str]], torch.Tensor]:
    """A function from examples and completions to their reward columns (B, K)."""
    return partial(reward_matrix, names=tuple(config.reward.weights), template=config.data.template)
