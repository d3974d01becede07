"""Several files in data.train: which examples a step has, by weights or without, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hark.data.clip import Clip
from hark.data.errors import AudioError, DataError
from hark.data.examples import Example, joined
from hark.data.loader import Loader
from hark.data.order import BLOCK, block_counts, order_of, shuffled
from hark.grpo.config import ConfigError, to_yaml
from hark.launch import train
from hark.launch.common.config_file import load_config
from hark.launch.common.questions import weighted
from tests.clips import write_questions
from tests.ranks import on_ranks
from tests.runs import ROUNDING, largest_difference
from tests.runs import train as train_on_ranks

COUNTS, WEIGHTS = (7, 50, 3), (0.7, 0.25, 0.05)


def drawn(count, first=0, seed=0):
    """(part, index in the part) of prompts of a run."""
    every = examples_of(COUNTS)
    order = order_of(every, seed=seed, weights=WEIGHTS)
    names = [every[order(position)].id for position in range(first, first + count)]
    return [("abc".index(name[0]), int(name[1:])) for name in names]


def test_every_block_of_prompts_has_exactly_the_shares():
    for first in (0, BLOCK):
        parts = Counter(part for part, _ in drawn(2 * BLOCK)[first : first + BLOCK])
        assert parts == {0: 700, 1: 250, 2: 50}
    blocks = [[part for part, _ in drawn(2 * BLOCK)[first : first + BLOCK]] for first in (0, BLOCK)]
    assert blocks[0] != blocks[1] and len(set(blocks[0][:20])) > 1, "in an order of each block's own"
    assert block_counts([1, 1, 1]) == [334, 333, 333] and block_counts([2, 1]) == [667, 333]
    assert block_counts([14, 5, 1]) == block_counts(WEIGHTS), "weights need not add up to 1"
    with pytest.raises(DataError, match="the weights 1, 1e-05 give a file less than one prompt of 1000"):
        block_counts([1, 0.00001])


def test_each_part_is_drawn_without_repetition_until_its_end():
    for part, count in enumerate(COUNTS):
        own = [index for which, index in drawn(2400) if which == part]
        epochs = [own[first : first + count] for first in range(0, len(own) - count + 1, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs) and len(epochs) > 10
        assert len({tuple(epoch) for epoch in epochs}) > 1, "in another order in each epoch"


def test_the_draws_are_a_function_of_seed_and_position_alone():
    assert drawn(4, first=1196) == drawn(1200)[-4:], "a resumed run needs no earlier step"
    assert drawn(40) != drawn(40, seed=1)


def examples_of(sizes):
    parts = [[example(f"{'abc'[part]}{n}", n) for n in range(size)] for part, size in enumerate(sizes)]
    return joined(parts)


def example(name, number):
    return Example(
        name, (Clip(Path(f"{name}.wav")),), "Which?", ("a", "b"), number % 2, line=f"{name[0]}.jsonl:{number}"
    )


def make(sizes=COUNTS, weights=WEIGHTS, rank=0, world=1, bad=(), **more):
    def waveform(clip):
        if str(clip) in bad:
            raise AudioError(f"{clip}: is silent")
        return np.zeros(4, np.float32)

    return Loader(
        examples_of(sizes), lambda text, waveform: [text], seed=0, prompts_per_step=4, rank=rank, world=world,
        template="plain", shuffle_choices=False, waveform=waveform, skip_bad=True, workers=2, weights=weights, **more,
    )  # fmt: skip


def names(loader, step):
    return [example.id for example, _, _ in loader.step(step)]


def test_the_number_of_ranks_does_not_change_the_mixture():
    with make() as alone, make(rank=0, world=2) as first, make(rank=1, world=2) as second:
        for step in (5, 0, 1):
            assert sorted(names(alone, step)) == sorted(names(first, step) + names(second, step))
        assert len({key for step in range(20) for _, _, key in alone.step(step)}) == 80


def test_a_bad_example_is_replaced_by_one_of_the_same_file():
    bad = [f"a{n}.wav" for n in range(1, 7)]
    with make() as good, make(bad=bad) as mended:
        for step in range(10):
            expected = ["a0" if name[0] == "a" else name for name in names(good, step)]
            assert names(mended, step) == expected
    with make(bad=["c0.wav", "c1.wav", "c2.wav"]) as loader, pytest.raises(DataError, match="all 3 examples are bad"):
        for step in range(100):
            loader.step(step)


def test_several_files_without_weights_are_one_file():
    with make(weights=()) as loader:
        expected = [examples_of(COUNTS)[shuffled(range(60), 0)(position)].id for position in range(12, 16)]
        assert names(loader, 3) == expected


def test_a_file_of_which_nothing_is_left_is_an_error_with_its_number():
    with pytest.raises(DataError, match="file 2 of 3 has no example to train on"):
        make(sizes=(7, 0, 3))


def test_an_id_that_an_earlier_file_uses_gets_a_number():
    parts = [[example("a", n) for n in range(1)] for _ in range(3)]
    assert [(one.id, one.part) for one in joined(parts)] == [("a", 0), ("a#2", 1), ("a#3", 2)]
    assert joined(parts[:1]) == parts[0], "a single file keeps its ids"


# The configuration ----------------------------------------------------------------------------------------------------


def test_weights_are_read_from_the_end_of_a_name(tmp_path, monkeypatch):
    assert weighted(["a.jsonl:0.7", "hf:me/set:train:2"]) == (["a.jsonl", "hf:me/set:train"], [0.7, 2.0])
    assert weighted(["a.jsonl", "hf:me/set:train"]) == (["a.jsonl", "hf:me/set:train"], [])
    assert weighted("a.jsonl") == (["a.jsonl"], [])
    monkeypatch.chdir(tmp_path)
    Path("odd:1").write_text("")
    assert weighted("odd:1") == (["odd:1"], []), "a file of that name"
    for files in (["a:0.5", "b"], ["a:0.5", "b:0"]):
        with pytest.raises(
            ConfigError, match="'b.*' has no weight above 0, and other files have one.* b:0.5, or for none"
        ):
            weighted(files)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("a.jsonl", "a.jsonl"), ("2026", "2026"), ("null", None),
        ("[a.jsonl:0.7, 'hf:x/y:train:0.3']", ["a.jsonl:0.7", "hf:x/y:train:0.3"]),
        ("[a.jsonl]", ["a.jsonl"]),
    ],
)  # fmt: skip
def test_the_configuration_takes_one_file_or_a_list_and_is_written_and_read_back(tmp_path, written, read):
    (tmp_path / "c.yaml").write_text("model: {path: m}\nrun: {directory: r}")
    config = load_config([str(tmp_path / "c.yaml"), f"data.train={written}"])
    assert config.data.train == read
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config([str(tmp_path / "again.yaml")]) == config


@pytest.mark.parametrize("written", ["[]", "[1]", "{a: 1}"])
def test_what_is_no_list_of_files_is_an_error(tmp_path, written):
    (tmp_path / "c.yaml").write_text(f"model: {{path: m}}\nrun: {{directory: r}}\ndata: {{train: {written}}}")
    with pytest.raises(ConfigError, match="c.yaml:3: data.train must be a string"):
        load_config([str(tmp_path / "c.yaml")])


def settings_of(tmp_path, model, name, *more):
    (tmp_path / "c.yaml").write_text("{}")
    return [
        str(tmp_path / "c.yaml"), f"run.directory={tmp_path}/{name}", f"model.path={model}", "rollout.group_size=2",
        "rollout.max_new_tokens=9", "optim.prompts_per_step=4", "optim.steps=4", "optim.lr=1e-3", "loss.beta=0",
        "checkpoint.every=2", "reward.weights={format: 1.0}", *more,
    ]  # fmt: skip


def test_a_mixture_is_trained_and_resumed_exactly(tmp_path, qwen2_audio_dir):
    files = [write_questions(tmp_path / name, 3) for name in ("a", "b")]
    data = f"data.train=[{files[0]}:3, {files[1]}:1]"
    train.main(settings_of(tmp_path, qwen2_audio_dir, "halves", data, "optim.steps=2", "optim.schedule=constant"))
    longer = ["optim.schedule=constant", "run.allow_changed=[optim.steps]"]
    train.main(settings_of(tmp_path, qwen2_audio_dir, "halves", data, "run.resume=true", *longer))
    train.main(settings_of(tmp_path, qwen2_audio_dir, "whole", data, "optim.schedule=constant"))
    assert largest_difference(tmp_path / "halves", tmp_path / "whole") == 0.0


def test_weights_of_validation_files_are_refused(tmp_path, qwen2_audio_dir):
    data = write_questions(tmp_path, 2)
    settings = settings_of(tmp_path, qwen2_audio_dir, "run", f"data.train={data}", f"data.validation=[{data}:1]")
    with pytest.raises(ConfigError, match="data.validation has weights"):
        train.main(settings)


@pytest.mark.parametrize("part", ["no-tower", "projector"])
def test_a_rank_without_a_clip_takes_part_in_the_gradients_of_the_projector(part, tmp_path, qwen2_audio_dir):
    file = write_questions(tmp_path, 2)
    heard, text = file.read_text().splitlines()
    file.write_text(f"{heard}\n{json.dumps({k: v for k, v in json.loads(text).items() if k != 'audio_path'})}\n")
    more = [f"data.train={file}", "data.require_audio=false", "data.order=file", f"model.train={part}"]
    more.append("reward.weights={accuracy: 1.0, format: 1.0}")
    for ranks in (1, 2):
        settings = settings_of(tmp_path, qwen2_audio_dir, ranks, *more, "optim.prompts_per_step=2", "optim.steps=1")
        on_ranks(ranks, train_on_ranks, settings)
    assert largest_difference(tmp_path / "1", tmp_path / "2") < ROUNDING
