"""A run that is planned: a configuration on a number of GPUs, what it needs, and other runs like it."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from hark.grpo.attention_check import has_many_siblings
from hark.grpo.config import Config, ConfigError
from hark.grpo.instruments.memory import Plan, Setting, Work, plan
from hark.grpo.instruments.shape import Shape
from hark.launch.common.config_file import check_together
from hark.launch.common.policies import lora_of, scored_at_a_time

USABLE = 0.95  # share of the device memory; the CUDA context, workspaces and fragmentation take the rest
BYTES = {"float32": 4, "bfloat16": 2}
Change = tuple[str, str, Any]  # section, key, value; the number of GPUs has section ""


@dataclasses.dataclass(frozen=True)
class Run:
    """A configuration on a number of GPUs, with clips of `seconds` and prompts of `text` tokens beside `audio` others.

    source: where these two lengths come from, in words.
    """

    config: Config
    gpus: int
    seconds: float
    text: int
    audio: int = 0
    sft: bool = False
    source: str = ""


def predict(shape: Shape, planned: Run) -> Plan:
    """The memory of a run. Raises ConfigError if the configuration cannot be divided over the number of GPUs."""
    return plan(shape, work_of(shape, planned), setting_of(planned))


def work_of(shape: Shape, planned: Run) -> Work:
    """The work of one rank in a step. Raises ConfigError if it cannot be divided over the number of GPUs."""
    config, gpus = planned.config, planned.gpus
    if gpus < 1 or config.optim.prompts_per_step % gpus:
        raise ConfigError(
            f"optim.prompts_per_step is {config.optim.prompts_per_step}; it must be a multiple of --gpus, {gpus}"
        )
    if gpus % config.sharding.replicas:
        raise ConfigError(f"--gpus is {gpus}; it must be a multiple of sharding.replicas, {config.sharding.replicas}")
    frames = round(100 * planned.seconds) if shape.tower else 0
    prompts = config.optim.prompts_per_step // gpus
    return Work(
        prompts=prompts,
        micro_batch=min(config.optim.micro_batch, prompts),
        prompt=planned.text + planned.audio,
        frames=frames,
        group_size=1 if planned.sft else config.rollout.group_size,
        max_new_tokens=config.rollout.max_new_tokens,
        evaluated=config.evaluation.batch if config.evaluation.every else 0,
        decoded=min(config.rollout.batch or prompts, prompts),
        samples=not planned.sft,
        micro_branches=config.optim.micro_branches or 0,
    )


def setting_of(planned: Run) -> Setting:
    """How the model of a run is stored and sharded."""
    config = planned.config
    lora = lora_of(config)
    copy = lora is None or config.model.reference not in (None, config.model.path)
    reference = "moving" if config.loss.reference_every else "copy" if copy else "adapters"
    return Setting(
        shards=planned.gpus // config.sharding.replicas,
        dtype=BYTES[config.model.dtype],
        master=BYTES[config.model.master_dtype],
        train=config.model.train,
        tower_cache=config.model.tower_cache * 2**20,
        recompute=config.model.recompute,
        reshard=config.sharding.reshard,
        lora_rank=lora.rank if lora else 0,
        reference="none" if config.loss.beta == 0 or planned.sft else reference,
        replicas=config.sharding.replicas,
        offload=config.sharding.offload,
        offload_reference=config.sharding.offload_reference,
        keep_prefill=config.rollout.keep_prefill and not planned.sft,
        recorded=config.rollout.cuda_graphs and not planned.sft,
        attention=attention_of(planned),
    )


def attention_of(planned: Run) -> str:
    """What model.attention=auto is on a GPU that passes the check at the start of a run; or else what it says."""
    config = planned.config
    if config.model.attention != "auto":
        return config.model.attention
    many = has_many_siblings(scored_at_a_time(config), config.rollout.max_new_tokens)
    return "flex" if many and not planned.sft else "sdpa"


def changed(planned: Run, chosen: Iterable[Change]) -> Run | None:
    """The run with these changes, or None if they exclude one another."""
    config, gpus = planned.config, planned.gpus
    for section, key, value in chosen:
        if section:
            part = dataclasses.replace(getattr(config, section), **{key: value})
            config = dataclasses.replace(config, **{section: part})
        else:
            gpus = value
    try:
        check_together(config, source="a changed run")
    except ConfigError:
        return None
    return None if config.optim.prompts_per_step % gpus else dataclasses.replace(planned, config=config, gpus=gpus)


def in_words(change: Change) -> str:
    section, key, value = change
    return f"{section}.{key}={str(value).lower()}" if section else f"--{key} {value}"
