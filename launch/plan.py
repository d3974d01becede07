"""Predict the peak memory of a training run, by part and by phase, and find changes with which it fits.

    python launch/plan.py CONFIG [section.key=value ...] [--gpus 8] [--memory 80] [--seconds 10] [--text 60]
                          [--sft] [--shape qwen2-audio-7b] [--json OUT]

Of the model only config.json and the tokenizer are read; no GPU and no weights are needed. The lengths of clips and
texts are those of data.train, or else of data.test, if there is such a file.
grpo/instruments/memory.py says what counts.
"""

import argparse
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hark.data.clip import Clip
from hark.data.clips import clips_in
from hark.data.decoding import read_header, seconds_of
from hark.data.errors import AudioError
from hark.data.examples import Example, joined, load_examples
from hark.data.json_files import write_json
from hark.data.loader import CANDIDATES
from hark.data.parallel import in_threads
from hark.data.prompts import render, text_of
from hark.grpo.config import Config, ConfigError
from hark.grpo.instruments.memory import PARTS, Plan, Setting, Work, plan
from hark.grpo.instruments.shape import Shape, shape_of
from hark.launch.common.config_file import load_config
from hark.launch.common.entry import run
from hark.launch.common.policies import lora_of
from hark.launch.common.questions import weighted
from hark.models.families.qwen2_audio import QWEN2_AUDIO_7B
from hark.models.loading import build_from_config, load_tokenizer, read_config
from hark.models.policy import PolicyError, text_ids
from hark.shown import say_text

GIB, MIB = 2**30, 2**20
USABLE = 0.95  # share of the device memory; the CUDA context, workspaces and fragmentation take the rest
MACHINE = 8  # GPUs that share the host memory of one machine
BYTES = {"float32": 4, "bfloat16": 2}
SHAPES = {"qwen2-audio-7b": QWEN2_AUDIO_7B}


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


def main(argv: list[str]) -> None:
    options, words = parse(argv)
    config = load_config(words)
    seconds, text, source = lengths(config, options)
    policy = build_from_config(_model_config(config, options.shape), config.model.policy)
    planned = Run(config, options.gpus, seconds, text, policy.audio_tokens(round(100 * seconds)), options.sft, source)
    lora = lora_of(config) or config.lora  # needed without adapters too, because adding them is one of the changes
    shape = shape_of(policy, targets=lora.targets)
    result, limit = predict(shape, planned), USABLE * options.memory * GIB
    say_text(describe(shape, planned, result, options.memory))
    changes = [] if result.peak <= limit else remedies(shape, planned, limit)
    if result.peak > limit:
        say_text(advice(changes, limit))
    if options.json:
        record = {"phases": result.phases, "peak": result.peak, "host": result.host, "fits": result.peak <= limit}
        write_json(Path(options.json), record | {"changes": changes})


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the configuration with its overrides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=int(os.environ.get("WORLD_SIZE", 8)), help="all GPUs of the run")
    parser.add_argument("--memory", type=float, default=80.0, help="memory of one GPU, GiB")
    parser.add_argument("--seconds", type=float, help="length of the clips; default: the data's longest")
    parser.add_argument("--text", type=int, help="tokens of a prompt, without its audio; default: the data's longest")
    parser.add_argument("--sft", action="store_true", help="plan launch/sft.py instead of launch/train.py")
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="a known model, instead of the config.json of model.path"
    )
    parser.add_argument("--json", metavar="OUT", help="write the figures, in bytes, to this file")
    return parser.parse_known_args(argv)


# How long the prompts are ---------------------------------------------------------------------------------------------

TEXT = 60  # tokens of a prompt without its audio, where there is no data
CHAT = 25  # tokens that a chat template adds to a text
LETTERS = 3  # per token, where the tokenizer cannot be loaded; English texts have more


def lengths(config: Config, options: argparse.Namespace) -> tuple[float, int, str]:
    """Seconds of the longest clip and tokens of the longest text, and where they come from; flags come first."""
    seconds, text = options.seconds, options.text
    path, examples = (None, []) if seconds and text else planned_examples(config)
    sources = ["--seconds" if seconds else "", "--text" if text else ""]
    if seconds is None:
        found = longest_clip(examples, config)
        seconds, sources[0] = (found, f"{path}") if found else (config.data.max_seconds, "data.max_seconds")
    if text is None:
        text, sources[1] = (longest_text(examples, config), f"{path}") if examples else (TEXT, "assumed")
    if sources[0] == sources[1]:
        return seconds, text, f"the longest of {path}"
    clip, words = (f"the longest of {source}" if source == path else source for source in sources)
    return seconds, text, f"clips: {clip}; texts: {words}"


def planned_examples(config: Config) -> tuple[str | None, list[Example]]:
    """The first of data.train and data.test that is there, and its examples."""
    named = [weighted(files)[0] for files in (config.data.train, config.data.test) if files]
    files = next((files for files in named if all(Path(file).exists() for file in files)), None)
    if files is None:
        return None, []
    data = config.data
    read = partial(load_examples, audio_root=data.audio_root, columns=data.columns, allow_outside=data.allow_outside)
    found = [read(file, require_audio=False, skip_bad=True, benchmark=True)[0] for file in files]
    return ", ".join(files), joined(found)


def longest_clip(examples: Sequence[Example], config: Config) -> float | None:
    """The length that the headers of the clips of an example give; None if no header can be read.

    A clip counts at most data.max_seconds, and the clips of an example are added up.
    """

    def seconds(clip: Clip) -> float:
        try:
            return seconds_of(clip, read_header(clip)) or 0.0
        except AudioError:  # training says what is wrong with it
            return 0.0

    clips = clips_in(examples)
    found = dict(zip(clips, in_threads(seconds, clips, workers=os.cpu_count() or 1), strict=True))
    own = [[min(found[clip], config.data.max_seconds) for clip in example.clips] for example in examples]
    return max(map(sum, own), default=0.0) or None


def longest_text(examples: Sequence[Example], config: Config) -> int:
    """Tokens of the longest text with its chat template, estimated from its letters if there is no tokenizer."""
    texts = sorted({text_of(render(example, config.data.template)) for example in examples}, key=len)
    try:
        tokenizer = load_tokenizer(config.model.path)
    except PolicyError:
        return CHAT + -(-len(texts[-1]) // LETTERS)
    return CHAT + max(len(text_ids(tokenizer, text)) for text in texts[-CANDIDATES:])


# What it needs --------------------------------------------------------------------------------------------------------


def _model_config(config: Config, shape: str | None) -> Any:
    from transformers import AutoConfig

    if shape is None:
        return read_config(config.model.path)
    return AutoConfig.for_model(**SHAPES[shape])


def predict(shape: Shape, planned: Run) -> Plan:
    """The plan of a run. Raises ConfigError if the configuration cannot be divided over the number of GPUs."""
    config, gpus = planned.config, planned.gpus
    if gpus < 1 or config.optim.prompts_per_step % gpus:
        raise ConfigError(
            f"optim.prompts_per_step is {config.optim.prompts_per_step}; it must be a multiple of --gpus, {gpus}"
        )
    if gpus % config.sharding.replicas:
        raise ConfigError(f"--gpus is {gpus}; it must be a multiple of sharding.replicas, {config.sharding.replicas}")
    frames = round(100 * planned.seconds) if shape.tower else 0
    prompts = config.optim.prompts_per_step // gpus
    work = Work(
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
    lora = lora_of(config)
    copy = lora is None or config.model.reference not in (None, config.model.path)
    reference = "moving" if config.loss.reference_every else "copy" if copy else "adapters"
    setting = Setting(
        shards=gpus // config.sharding.replicas,
        dtype=BYTES[config.model.dtype],
        master=BYTES[config.model.master_dtype],
        train=config.model.train,
        tower_cache=config.model.tower_cache * 2**20,
        recompute=config.model.recompute,
        reshard=config.sharding.reshard,
        lora_rank=lora.rank if lora else 0,
        reference="none" if config.loss.beta == 0 or planned.sft else reference,
        offload=config.sharding.offload,
        offload_reference=config.sharding.offload_reference,
        keep_prefill=config.rollout.keep_prefill and not planned.sft,
    )
    return plan(shape, work, setting)


def describe(shape: Shape, planned: Run, result: Plan, memory: float) -> str:
    """A table of memory, one line per part and one column per phase."""
    phases = list(result.phases)
    unit, name = (GIB, "GiB") if result.peak >= GIB else (MIB, "MiB")
    clips = f"clips of {planned.seconds:.3g} s and " if shape.tower else ""
    lines = [
        f"{_count(shape.parameters)} parameters, {planned.gpus} GPU{'s' * (planned.gpus > 1)}; {name} per GPU",
        f"{clips}texts of {planned.text} tokens ({planned.source})",
        "",
        f"{'':12}" + "".join(f"{phase:>12}" for phase in phases),
    ]
    for part in PARTS:
        cells = [result.phases[phase][part] / unit for phase in phases]
        if any(cells):
            lines.append(f"{part:12}" + "".join(f"{cell:12.2f}" for cell in cells))
    lines.append(f"{'total':12}" + "".join(f"{result.total(phase) / unit:12.2f}" for phase in phases))
    fits = "fits" if result.peak <= USABLE * memory * GIB else "does not fit"
    limit = f"{size(USABLE * memory * GIB)} ({100 * USABLE:g} % of {memory:g} GiB)"
    lines += ["", f"peak {size(result.peak)} in {result.worst}: {fits} in {limit}"]
    if result.host:
        ranks = min(planned.gpus, MACHINE)
        lines.append(f"host memory {size(result.host * ranks)} per machine of {ranks} GPU{'s' * (ranks > 1)}")
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes in words: "38.74 GiB", "9.5 MiB"."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.3g} MiB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


# What to change -------------------------------------------------------------------------------------------------------

Change = tuple[str, str, Any]  # section, key, value; the number of GPUs has section ""
SHOWN, TOGETHER = 6, 4  # sets of changes to print, and the largest size of a set


def remedies(shape: Shape, planned: Run, limit: float) -> list[dict]:
    """Sets of changes that make the run fit, each with the new peak, cheapest first.

    A set is left out if a smaller one within it is enough.
    """
    candidates = list(enumerate(_candidates(planned)))
    enough: list[tuple[dict[int, Change], int]] = []
    for count in range(1, TOGETHER + 1):
        for chosen in map(dict, itertools.combinations(candidates, count)):
            redundant = any(fewer.keys() <= chosen.keys() for fewer, _ in enough)
            changed = None if redundant else _changed(planned, chosen.values())
            if changed and (peak := predict(shape, changed).peak) <= limit:
                enough.append((chosen, peak))
    enough.sort(key=lambda found: (max(found[0]), sum(found[0])))
    return [{"change": list(map(_words, chosen.values())), "peak": peak} for chosen, peak in enough[:SHOWN]]


def _candidates(planned: Run) -> Iterator[Change]:
    """All changes that are tried, cheapest first; the first ones cost time or precision, the last is more GPUs."""
    config, gpus = planned.config, planned.gpus
    for section, key, value in (
        ("rollout", "keep_prefill", False),
        ("sharding", "reshard", True),
        ("sharding", "replicas", 1),
        ("model", "recompute", True),
        ("sharding", "offload_reference", True),
        ("model", "dtype", "bfloat16"),
        ("sharding", "offload", True),
        ("lora", "rank", 8),
        ("model", "train", "no-tower"),
        ("model", "master_dtype", "bfloat16"),
    ):
        now = getattr(getattr(config, section), key)
        if now != value and not (section == "lora" and lora_of(config)):
            yield section, key, value
        if (section, key) == ("sharding", "reshard"):
            yield from _smaller_batches(config, config.optim.prompts_per_step // gpus)
        if (section, key) == ("sharding", "offload"):
            yield "rollout", "max_new_tokens", max(config.rollout.max_new_tokens // 2, 1)
            if config.optim.prompts_per_step > gpus:
                yield "optim", "prompts_per_step", gpus
    yield "", "gpus", 2 * gpus


def _smaller_batches(config: Config, prompts: int) -> Iterator[Change]:
    if config.optim.micro_batch > 1:
        yield "optim", "micro_batch", 1
    if (branches := config.optim.micro_branches or config.rollout.group_size) > 1:
        yield "optim", "micro_branches", max(branches // 4, 1)
    if (config.rollout.batch or prompts) > 1:
        yield "rollout", "batch", max((config.rollout.batch or prompts) // 4, 1)
    if config.evaluation.every and config.evaluation.batch > 1:
        yield "evaluation", "batch", max(config.evaluation.batch // 4, 1)


def _changed(planned: Run, chosen: Iterable[Change]) -> Run | None:
    """The run with these changes, or None if they exclude one another."""
    config, gpus = planned.config, planned.gpus
    for section, key, value in chosen:
        if section:
            part = dataclasses.replace(getattr(config, section), **{key: value})
            config = dataclasses.replace(config, **{section: part})
        else:
            gpus = value
    dtypes_conflict = config.model.master_dtype == "bfloat16" and config.model.dtype != "bfloat16"
    prefill_conflicts = config.rollout.keep_prefill and (config.model.recompute or config.rollout.batch is not None)
    compatible = not dtypes_conflict and not prefill_conflicts and config.optim.prompts_per_step % gpus == 0
    return dataclasses.replace(planned, config=config, gpus=gpus) if compatible else None


def _words(change: Change) -> str:
    section, key, value = change
    return f"{section}.{key}={str(value).lower()}" if section else f"--{key} {value}"


def advice(changes: list[dict], limit: float) -> str:
    if not changes:
        return (
            f"no set of the changes that were tried brings the peak to {size(limit)} or less; choose a smaller model, "
            "shorter clips, or GPUs with more memory"
        )
    lines = [f"each of these lines brings the peak to {size(limit)} or less, cheapest first:"]
    return "\n".join(lines + [f"  {' '.join(c['change']):72} -> {size(c['peak']):>10}" for c in changes])


if __name__ == "__main__":
    run(main)
