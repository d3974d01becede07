"""launch/plan.py as a user meets it: a table, whether it fits, and changes that do make it fit."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import soundfile
import torch
from transformers import AutoConfig

from hark.grpo.config import ConfigError
from hark.grpo.instruments.memory import Work
from hark.grpo.instruments.shape import shape_of
from hark.grpo.instruments.speed import DEVICES, OVERHEAD
from hark.grpo.tree import branches_layout, prompt_layout, tree_mask
from hark.launch import plan
from hark.launch.common.config_file import load_config
from hark.launch.common.planned import USABLE, Run, predict
from hark.launch.common.planned_speed import pairs_of_siblings, prepare, rates_of, seconds_of
from hark.launch.common.prompt_lengths import CHAT
from hark.models.families.qwen2_audio import QWEN2_AUDIO_7B
from hark.models.loading import build_from_config, load_policy
from hark.models.policy import PolicyError
from hark.models.whisper import audio_tokens
from tests.clips import waveform, write_questions


@pytest.fixture
def config(tmp_path) -> Path:
    """Full fine-tuning of the 7B, of which there is nothing but its config.json."""
    AutoConfig.for_model(**QWEN2_AUDIO_7B).save_pretrained(tmp_path / "model")
    path = tmp_path / "full.yaml"
    path.write_text(
        f"run: {{directory: {tmp_path}/run}}\n"
        f"model: {{path: {tmp_path}/model, dtype: bfloat16}}\n"
        "optim: {prompts_per_step: 16, micro_batch: 2}\n"
    )
    return path


def planned(capsys, *words: object) -> str:
    plan.main(list(map(str, words)))
    return capsys.readouterr().out


def test_a_directory_with_only_a_config_is_enough_and_the_known_shape_is_the_same(config, capsys):
    read = planned(capsys, config)
    known = planned(capsys, config, "model.path=nowhere/at-all", "--shape", "qwen2-audio-7b")
    assert read == known and "8.40 B parameters, 8 GPUs; GiB per GPU\nclips of 30 s and" in read


def test_each_change_that_is_offered_makes_it_fit_when_it_is_made(config, capsys, tmp_path):
    arguments = [config, "--memory", 40, "evaluation.every=10"]
    printed = planned(capsys, *arguments, "--json", tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text())
    assert "does not fit" in printed and not record["fits"] and len(record["changes"]) > 2
    shape = shape_of(build_from_config(AutoConfig.for_model(**QWEN2_AUDIO_7B)), targets=("q_proj",))
    for change in record["changes"]:
        words = " ".join(change["change"])
        gpus = int(next(iter(re.findall(r"--gpus (\d+)", words)), 8))
        overrides = [word for word in change["change"] if not word.startswith("--")]
        remade = load_config([str(config), "evaluation.every=10", *overrides])
        if remade.lora.rank == 0:  # the shape above has fewer adapters
            peak = predict(shape, Run(remade, gpus, 30.0, 60, 750)).peak
            assert peak == change["peak"] <= USABLE * 40 * 2**30, words


def test_a_kept_prefill_is_counted_and_the_first_to_be_left_out(config, capsys):
    words = config, "optim.micro_batch=1", "evaluation.every=10", "rollout.cuda_graphs=false", "--memory"
    plain, kept = (planned(capsys, *words, 50, f"rollout.keep_prefill={on}") for on in ("false", "true"))
    tables = [dict(line.split(maxsplit=1) for line in text.splitlines()[4:11]) for text in (plain, kept)]
    before, after = ([float(value) for value in table["activations"].split()] for table in tables)
    # Rollout, evaluation, reference, backward: two prompts of 810 tokens are kept, one was in a micro-batch.
    assert after[1] == before[1] and after[0] > before[0] + 10 and after[2] > before[2] + 10
    assert 5 < after[3] - before[3] < 10
    offered = planned(capsys, *words, 45, "rollout.keep_prefill=true").partition("cheapest first:")[2].splitlines()
    assert offered[1].split()[0] == "rollout.keep_prefill=false"
    assert not any("recompute=true" in line for line in offered if "keep_prefill=false" not in line)


def test_the_weights_of_recorded_steps_are_counted_and_the_first_to_be_left_out(config, capsys):
    words = config, "optim.micro_batch=1", "model.recompute=true", "--memory", 40
    assert "recorded           14.47       14.47       14.47       14.47\n" in planned(capsys, *words)
    offered = planned(capsys, *words).partition("cheapest first:")[2].splitlines()
    assert offered[1].split()[0] == "rollout.cuda_graphs=false"
    assert "recorded" not in planned(capsys, *words, "rollout.cuda_graphs=false")


def test_the_masks_of_long_completions_are_counted_where_sdpa_is_planned(config, capsys):
    """Of 2 rows with 2,040 tokens of branches and 2,850 in all: a byte and two of bfloat16 for each pair."""
    shape = shape_of(build_from_config(AutoConfig.for_model(**QWEN2_AUDIO_7B)))

    def peak_of(*overrides: str, sft: bool = False) -> int:
        run = Run(load_config([str(config), *overrides]), 8, 30.0, 60, 750, sft)
        return predict(shape, run).total("backward")

    auto, flex, sdpa = peak_of(), *(peak_of(f"model.attention={kind}") for kind in ("flex", "sdpa"))
    assert auto == flex and sdpa - flex == 2 * 2040 * (2850 + 2 * 2856)
    short = peak_of("rollout.max_new_tokens=147"), peak_of("rollout.max_new_tokens=147", "model.attention=sdpa")
    assert short[0] == short[1], "a token has 7 * 146 = 1,022 of siblings"
    parts = [peak_of("optim.micro_branches=5", f"model.attention={kind}") for kind in ("auto", "sdpa")]
    assert parts[0] == parts[1], "4 * 255 = 1,020"
    assert peak_of(sft=True) == peak_of("model.attention=sdpa", sft=True), "a completion stands alone"
    sentence = "model.attention=auto is flex if a check at the start of the run passes; with sdpa the peak is"
    assert sentence in planned(capsys, config) and sentence not in planned(capsys, config, "model.attention=flex")


def test_what_fits_comes_without_advice_and_offloading_with_host_memory(config, capsys):
    printed = planned(capsys, config, "model.recompute=true", "sharding.offload=true", "--memory", 80)
    assert "fits in 76.00 GiB (95 % of 80 GiB)" in printed and "->" not in printed
    assert re.search(r"host memory 12\d\.\d\d GiB per machine of 8 GPUs", printed)  # 16 bytes a parameter


def test_numbers_that_do_not_divide_and_models_that_cannot_be_read_are_errors(config):
    with pytest.raises(ConfigError, match="optim.prompts_per_step is 16; it must be a multiple of --gpus, 5"):
        plan.main([str(config), "--gpus", "5"])
    with pytest.raises(PolicyError, match="no such directory"):
        plan.main([str(config), f"model.path={config.parent}/nothing"])


def test_supervised_fine_tuning_is_planned_without_rollout_and_reference(config, capsys, tmp_path):
    printed = planned(capsys, config, "--sft", "--json", tmp_path / "sft.json")
    assert "rollout" not in printed and "reference" not in printed and "KV cache" not in printed
    sft = json.loads((tmp_path / "sft.json").read_text())
    planned(capsys, config, "--json", tmp_path / "grpo.json")
    grpo = json.loads((tmp_path / "grpo.json").read_text())
    assert sft["phases"].keys() == {"backward", "optimizer"} and sft["peak"] < grpo["peak"]


@pytest.fixture
def small(qwen2_audio_dir, tmp_path) -> list[object]:
    """A small model with two questions of its own, about clips of 0.3 and 2.5 s."""
    questions = write_questions(tmp_path / "data", 2)
    soundfile.write(tmp_path / "data" / "train-1.wav", waveform(2.5, 0), 16_000)
    path = tmp_path / "small.yaml"
    path.write_text(
        f"run: {{directory: {tmp_path}/run}}\nmodel: {{path: {qwen2_audio_dir}}}\ndata: {{train: {questions}}}\n"
        "optim: {prompts_per_step: 2}\n"
    )
    return [path, "--gpus", 1]


def test_the_lengths_are_those_of_the_data_unless_they_are_given(small, capsys, tmp_path, qwen2_audio_dir):
    policy = load_policy(qwen2_audio_dir)
    text = "What is making this sound, and how often? Please choose the answer from the following options: "
    longest = text + "['rain', 'a bell', 'a dog', 'wind']. Output the final answer in <answer> </answer>."
    tokens = len(policy.tokenizer(longest, add_special_tokens=False)["input_ids"]) + CHAT
    file = f"{tmp_path}/data/train.jsonl"
    second = [planned(capsys, *small, *words).splitlines()[1] for words in ([], ["--seconds", 4], ["--text", 9])]
    assert second == [
        f"clips of 2.5 s and texts of {tokens} tokens (the longest of {file})",
        f"clips of 4 s and texts of {tokens} tokens (clips: --seconds; texts: the longest of {file})",
        f"clips of 2.5 s and texts of 9 tokens (clips: the longest of {file}; texts: --text)",
    ]
    assert len(policy.prepare(longest, waveform(2.5, 0)).ids) <= tokens + audio_tokens(250), "no prompt is longer"
    assert "clips: data.max_seconds; texts: assumed" in planned(capsys, *small, "data.train=nowhere.jsonl")
    assert "clips of 1 s and" in planned(capsys, *small, "data.max_seconds=1")


def test_windows_count_instead_of_their_files_and_the_clips_of_a_question_together(small, capsys, tmp_path):
    clips = {"audio_path": None, "audio_paths": ["t-1.wav", "t-2.wav"], "start": [1, 0.1], "end": [2.2, None]}
    data = write_questions(tmp_path / "data", 3, name="t", line1=clips, line2={"end": 0.2}, line3={"end": 0.2})
    soundfile.write(tmp_path / "data" / "t-1.wav", waveform(2.5, 0), 16_000)
    soundfile.write(tmp_path / "data" / "t-2.wav", waveform(0.8, 0), 16_000)
    words = [*small, f"data.train=[{data}:1, {tmp_path}/data/train.jsonl:1]"]
    assert "clips of 2.5 s and texts of" in planned(capsys, *words)
    assert "clips of 1.9 s and" in planned(capsys, *small, f"data.train={data}")
    assert "clips of 1 s and" in planned(capsys, *small, f"data.train={data}", "data.max_seconds=0.5")


def test_a_small_model_and_little_memory_are_told_in_mebibytes(small, capsys):
    printed = planned(capsys, *small, "--memory", 0.001)
    assert re.search(r"\d\.\d+ M parameters|\d+ M parameters|0\.\d+ M parameters", printed) and "MiB per GPU" in printed
    assert "does not fit in 0.973 MiB (95 % of 0.001 GiB)" in printed
    assert "brings the peak to 0.973 MiB or less; choose a smaller model" in printed
    assert not re.search(r"\b0\.0+ GiB", printed)


def test_what_is_offered_fits_and_is_faster_when_it_is_made(config, capsys, tmp_path):
    settings = ["model.recompute=true", "optim.micro_batch=1"]
    words = "--speed", "h100", "--tokens", 20, "--seconds", 10, "--text", 60, "--memory", 60
    printed = planned(capsys, config, *settings, *words, "--json", tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text())
    total = sum(record["seconds"].values())
    assert f"total {total:.3g}, {128 / total:.3g} completions per second\nfaster, and fits:" in printed
    assert len(record["faster"]) == 3
    for one in record["faster"]:
        remade = load_config([str(config), *settings, *one["change"]])
        policy = build_from_config(AutoConfig.for_model(**QWEN2_AUDIO_7B))
        run = Run(remade, 8, 10.0, 60, 250)
        prepare(policy, run)
        shape = shape_of(policy, targets=remade.lora.targets)
        assert predict(shape, run).peak == one["peak"] <= USABLE * 60 * 2**30
        again = seconds_of(policy, shape, run, rates_of("h100", shape, run), 20)
        assert sum(again.values()) == pytest.approx(one["seconds"]) and one["seconds"] < total


def test_the_pairs_that_sdpa_computes_and_masks_are_those_outside_of_the_tree_mask():
    """Five prompts, each with three branches of four tokens that are fed, in parts of two and of one."""
    sizes = dict(prompts=5, micro_batch=1, prompt=6, frames=0, group_size=3, max_new_tokens=5)
    lengths, masked = torch.tensor([6]), []
    for branches in (2, 1, 3):
        own = branches_layout(lengths, branches, 4)
        masked.append(int((~tree_mask(own, prompt_layout(lengths, 6) + own)).sum()))
    assert pairs_of_siblings(Work(**sizes, micro_branches=2)) == 5 * (masked[0] + masked[1])
    assert pairs_of_siblings(Work(**sizes)) == 5 * masked[2]


def test_scoring_takes_longer_with_the_pairs_of_siblings(config):
    """In a group of 8 with 1,023 tokens each: the seconds of the pairs, in reference, forward and twice in backward."""
    policy, seconds = build_from_config(AutoConfig.for_model(**QWEN2_AUDIO_7B)), {}
    shape = shape_of(policy)
    for kind in ("auto", "sdpa"):
        words = "rollout.max_new_tokens=1024", f"model.attention={kind}"
        run = Run(load_config([str(config), *words]), 8, 10.0, 60, 250)
        rates = dataclasses.replace(DEVICES["h100"], link=math.inf)
        seconds[kind] = seconds_of(policy, shape, run, rates, 1024)
    pairs = 2 * ((8 * 1023) ** 2 - 8 * 1023 * 1024 // 2)
    more = OVERHEAD * 32 * 2 * 4096 * pairs / rates.attention
    differences = {phase: seconds["sdpa"][phase] - seconds["auto"][phase] for phase in seconds["sdpa"]}
    expected = {"rollout": 0, "reference": more, "backward": 3 * more, "optimizer": 0, "communication": 0}
    assert differences == pytest.approx(expected)
    on_cpu = dataclasses.replace(rates, overlaps=False)
    assert seconds_of(policy, shape, run, on_cpu, 1024)["reference"] < seconds["sdpa"]["reference"] - more / 2


def test_adapters_on_one_gpu_send_nothing(config, capsys):
    words = "--gpus", 1, "--speed", "a100", "lora.rank=8", "model.recompute=true", "--seconds", 10, "--text", 60
    line = next(line for line in planned(capsys, config, *words).splitlines() if line.startswith("rollout "))
    assert "communication" not in line
