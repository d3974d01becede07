"""Predict the peak memory of a training run, by part and by phase, and find changes with which it fits.

    python launch/plan.py CONFIG [section.key=value ...] [--gpus 8] [--memory 80] [--seconds 10] [--text 60]
                          [--sft] [--shape qwen2-audio-7b] [--speed h100] [--tokens 20] [--json OUT]

Of the model only config.json and the tokenizer are read; no GPU and no weights are needed. The lengths of clips and
texts are those of data.train, or else of data.test, if there is such a file.
grpo/instruments/memory.py says what counts. With --speed the seconds of each phase are predicted too, by
grpo/instruments/speed.py, and settings that fit and are faster are named.
"""

import argparse
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hark.data.json_files import write_json
from hark.grpo.config import Config
from hark.grpo.instruments.memory import PARTS, Plan
from hark.grpo.instruments.shape import Shape, shape_of
from hark.launch.common.config_file import load_config
from hark.launch.common.entry import run
from hark.launch.common.planned import USABLE, Change, Run, attention_of, changed, in_words, predict
from hark.launch.common.planned_speed import NAMES, completions_of, faster, prepare, rates_of, seconds_of, told
from hark.launch.common.policies import lora_of
from hark.launch.common.prompt_lengths import lengths
from hark.models.families.qwen2_audio import QWEN2_AUDIO_7B
from hark.models.loading import build_from_config, read_config
from hark.shown import say_text

GIB, MIB = 2**30, 2**20
MACHINE = 8  # GPUs that share the host memory of one machine
SHAPES = {"qwen2-audio-7b": QWEN2_AUDIO_7B}


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
    speed: dict[str, Any] = {}
    if options.speed:
        prepare(policy, planned)
        tokens, rates = options.tokens or config.rollout.max_new_tokens, rates_of(options.speed, shape, planned)
        phases = seconds_of(policy, shape, planned, rates, tokens)
        better = faster(policy, shape, planned, rates, tokens, limit)
        say_text(told(phases, better, completions_of(planned), options.speed, tokens))
        speed = {"seconds": phases, "faster": better}
    if options.json:
        record = {"phases": result.phases, "peak": result.peak, "host": result.host, "fits": result.peak <= limit}
        write_json(Path(options.json), record | {"changes": changes} | speed)


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
    parser.add_argument("--speed", choices=NAMES, help="predict the time of a step too, on this device or a known GPU")
    parser.add_argument("--tokens", type=int, help="tokens of a completion for --speed; default: the longest")
    parser.add_argument("--json", metavar="OUT", help="write the figures, in bytes, to this file")
    return parser.parse_known_args(argv)


# What it needs --------------------------------------------------------------------------------------------------------


def _model_config(config: Config, shape: str | None) -> Any:
    from transformers import AutoConfig

    if shape is None:
        return read_config(config.model.path)
    return AutoConfig.for_model(**SHAPES[shape])


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
    lines += ["", f"peak {size(result.peak)} in {result.worst}: {fits} in {limit}", *_of_attention(shape, planned)]
    if result.host:
        ranks = min(planned.gpus, MACHINE)
        lines.append(f"host memory {size(result.host * ranks)} per machine of {ranks} GPU{'s' * (ranks > 1)}")
    return "\n".join(lines)


def _of_attention(shape: Shape, planned: Run) -> Iterator[str]:
    """What is planned for model.attention=auto, and what the run needs if the GPU does not pass the check."""
    other = changed(planned, [("model", "attention", "sdpa")])
    if planned.config.model.attention == "auto" and attention_of(planned) == "flex" and other:
        peak = size(predict(shape, other).peak)
        yield f"model.attention=auto is flex if a check at the start of the run passes; with sdpa the peak is {peak}"


def size(count: float) -> str:
    """Bytes in words: "38.74 GiB", "9.5 MiB"."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.3g} MiB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


# What to change -------------------------------------------------------------------------------------------------------

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
            other = None if redundant else changed(planned, chosen.values())
            if other and (peak := predict(shape, other).peak) <= limit:
                enough.append((chosen, peak))
    enough.sort(key=lambda found: (max(found[0]), sum(found[0])))
    return [{"change": list(map(in_words, chosen.values())), "peak": peak} for chosen, peak in enough[:SHOWN]]


def _candidates(planned: Run) -> Iterator[Change]:
    """All changes that are tried, cheapest first; the first ones cost time or precision, the last is more GPUs."""
    config, gpus = planned.config, planned.gpus
    for section, key, value in (
        ("rollout", "keep_prefill", False),
        ("rollout", "cuda_graphs", False),
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
