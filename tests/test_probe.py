"""Before the first step the longest one is tried, and leaves no trace."""

from __future__ import annotations

import json

import pytest
import torch

from hark.data.examples import load_examples
from hark.data.loader import Loader
from hark.grpo import learner, loop
from hark.grpo import reference as reference_module
from hark.grpo import trainer as trainer_module
from hark.grpo.loop import MemoryProbeError, probe
from hark.grpo.runtime.collectives import World
from hark.grpo.sft import SupervisedTrainer
from hark.grpo.trainer import Trainer
from hark.launch.common.config_file import load_config
from hark.models.lora import whole
from hark.models.policy import Prompt
from tests.clips import write_questions
from tests.ranks import on_ranks
from tests.runs import build


def loader_of(path, prepare) -> Loader:
    examples, _ = load_examples(path)
    return Loader(
        examples, prepare, seed=0, prompts_per_step=2, rank=0, world=1, template="answer", shuffle_choices=True,
        waveform=lambda clip: None, skip_bad=False, workers=1,
    )  # fmt: skip


def test_the_longest_prompt_is_found_by_clip_and_by_text(tmp_path):
    """The clip of line 2 is the longest, the question of line 5 is longer still."""
    path = write_questions(tmp_path, 6, line5={"question_text": "word " * 500})
    with loader_of(path, lambda text, waveform: Prompt(torch.zeros(len(text)))) as loader:
        assert loader.longest()[0].id == "train-4"


@pytest.mark.parametrize("kind", [Trainer, SupervisedTrainer])
def test_the_probe_uses_the_longest_prompt_and_changes_nothing(kind, settings, tmp_path, monkeypatch, capsys):
    config = load_config([*settings, f"run.directory={tmp_path}/run", "optim.weight_decay=0.1"])
    tried = []
    score = reference_module.score

    def recorded(policy, prompts, tokens, mask, **kwargs):
        tried.append((len(prompts[0].ids), tokens.shape))
        return score(policy, prompts, tokens, mask, **kwargs)

    def run(world: World) -> None:
        more = {} if kind is Trainer else {"target": lambda example: "<answer>rain</answer>"}
        trainer = build(world, config, kind, **more)
        before = [whole(parameter).clone() for parameter in trainer.policy.parameters()]
        for module in (learner, reference_module):
            monkeypatch.setattr(module, "score", recorded)
        probe(trainer)
        after = [whole(parameter) for parameter in trainer.policy.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert not trainer.optimizer.state and all(p.grad is None for p in trainer.policy.parameters())
        lengths = [len(prompt.ids) for step in range(3) for _, prompt, _ in trainer.data.step(step)]
        assert all(length == max(lengths) for length, _ in tried)
        if kind is Trainer:  # two micro-batches each of the reference and of the policy
            assert [tuple(shape) for _, shape in tried] == [(2 * 4, 6)] * 4

    on_ranks(1, run)
    assert "the longest step fits: 4 prompts of" in capsys.readouterr().out


def test_the_probe_scores_all_that_a_step_without_a_reference_could(settings, tmp_path, monkeypatch):
    """A step leaves out groups of equal rewards; the longest step has none."""
    config = load_config([*settings, f"run.directory={tmp_path}/run", "loss.beta=0"])
    tried = []
    score = reference_module.score

    def recorded(policy, prompts, *args, **kwargs):
        tried.append(len(prompts))
        return score(policy, prompts, *args, **kwargs)

    def run(world: World) -> None:
        trainer = build(world, config)
        for module in (learner, reference_module):
            monkeypatch.setattr(module, "score", recorded)
        probe(trainer)

    on_ranks(1, run)
    assert tried == [2, 2]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: 2.00 GiB"),
        MemoryError("Unable to allocate 2.00 GiB for an array"),
    ],
)
def test_what_does_not_fit_fails_before_the_first_step_and_names_the_example(error, settings, tmp_path, monkeypatch):
    config = load_config([*settings, f"run.directory={tmp_path}/run"])

    def too_much(*args, **kwargs):
        raise error

    def run(world: World) -> None:
        trainer = build(world, config)
        monkeypatch.setattr(reference_module, "score", too_much)
        loop.train(trainer)

    with pytest.raises(
        MemoryProbeError, match=r"rank 0 with .*train.jsonl:\d+, a prompt of \d+ tokens.*2.00 GiB.*`hark plan`"
    ):
        on_ranks(1, run)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_another_error_of_the_probe_is_not_called_one_of_memory(settings, tmp_path, monkeypatch):
    config = load_config([*settings, f"run.directory={tmp_path}/run"])

    def wrong(*args, **kwargs):
        raise RuntimeError("shapes differ")

    def run(world: World) -> None:
        trainer = build(world, config)
        monkeypatch.setattr(reference_module, "score", wrong)
        probe(trainer)

    with pytest.raises(RuntimeError, match="^shapes differ$"):
        on_ranks(1, run)


def test_moments_made_beforehand_are_those_of_a_first_step():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.5)
    loop.allocate_moments(optimizer)
    assert torch.equal(weight, torch.ones(3)) and weight.grad is None
    assert {name: value.shape for name, value in optimizer.state[weight].items() if value.dim()} == {
        "exp_avg": (3,), "exp_avg_sq": (3,)
    }  # fmt: skip


def test_questions_held_out_of_the_training_data_are_validated_on(settings, tmp_path):
    from hark.launch.common.questions import training_examples

    config = load_config([*settings, f"run.directory={tmp_path}/run", "data.held_out=3"])

    def run(world: World) -> None:
        policy = build(world, config).policy
        training, held_out, _ = training_examples(config, world, policy)
        assert len(training) == 9 and len(held_out) == 3
        assert not {example.clips for example in training} & {example.clips for example in held_out}

    on_ranks(1, run)
    lines = [json.loads(line) for line in open(config.data.train)]
    assert len(lines) == 12


def test_the_probe_draws_to_the_limit_and_tries_an_evaluation(settings, tmp_path, monkeypatch):
    """The small model stops at a fifth of its tokens; the probe's completions may not."""
    config = load_config([*settings, f"run.directory={tmp_path}/run", "evaluation.batch=3", "rollout.max_new_tokens=9"])
    drawn = []
    sample = trainer_module.sample

    def recorded(policy, prompts, **kwargs):
        rollout = sample(policy, prompts, **kwargs)
        drawn.append((len(prompts), rollout.mask.shape, bool(rollout.mask.all())))
        return rollout

    def run(world: World) -> None:
        trainer = build(world, config)
        trainer.validate = dict
        for module in (loop, trainer_module):
            monkeypatch.setattr(module, "sample", recorded)
        probe(trainer)

    on_ranks(1, run)
    assert drawn == [(3, (3, 9), True), (4, (16, 9), True)]


def test_the_probe_of_supervised_training_takes_the_longest_answer(settings, tmp_path):
    questions = write_questions(tmp_path, 4, line2={"multi_choice": ["rain", "a very long story about a dog"]})
    config = load_config([*settings, f"run.directory={tmp_path}/run", f"data.train={questions}"])

    def run(world: World) -> None:
        trainer = build(world, config, SupervisedTrainer, target=lambda example: example.answer_text)
        _, prompt = trainer.data.longest()
        batch = trainer.longest_batch((prompt, prompt))
        longest = trainer.policy.completion_ids("a very long story about a dog")
        assert batch.tokens.shape == (2, len(longest)) and batch.mask.all()

    on_ranks(1, run)


def test_the_longest_answer_has_the_most_tokens_and_not_the_most_characters(settings, tmp_path):
    snow, story = "\u2603" * 8, "rain and a long story"  # 8 characters of 3 bytes each; 21 characters
    questions = write_questions(tmp_path, 4, line2={"multi_choice": [snow, story], "answer": 0})
    config = load_config([*settings, f"run.directory={tmp_path}/run", f"data.train={questions}"])

    def run(world: World) -> None:
        trainer = build(world, config, SupervisedTrainer, target=lambda e: snow if e.id == "train-1" else story)
        lengths = {text: len(trainer.policy.completion_ids(text)) for text in (snow, story)}
        assert lengths[snow] > lengths[story]
        _, prompt = trainer.data.longest()
        assert trainer.longest_batch((prompt,)).tokens.shape == (1, lengths[snow])

    on_ranks(1, run)


def test_moments_that_do_not_fit_are_said_like_all_else(settings, tmp_path, monkeypatch):
    config = load_config([*settings, f"run.directory={tmp_path}/run"])

    def too_much(optimizer):
        raise torch.OutOfMemoryError("no room for moments")

    def run(world: World) -> None:
        monkeypatch.setattr(loop, "allocate_moments", too_much)
        probe(build(world, config))

    with pytest.raises(MemoryProbeError, match="no room for moments"):
        on_ranks(1, run)
