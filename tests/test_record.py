"""Recorded steps: what they hold, that they change nothing, and when they are written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hark.data.described import described, example_of
from hark.data.examples import load_examples, parse_example
from hark.data.rewards import RewardError
from hark.grpo import loop
from hark.grpo.instruments.by_module import module_of, weight_digests
from hark.grpo.instruments.record import (
    RecordError,
    StepRecord,
    joined,
    place_of,
    read_step,
    recorded_steps,
    write_part,
)
from hark.grpo.runtime.collectives import World
from hark.launch.common.config_file import load_config
from hark.launch.common.questions import controls_of
from tests.ranks import on_ranks
from tests.runs import ROUNDING, build, largest_difference, length_reward, weights

STEPS = 4


def train(world: World, settings: list[str], **more) -> None:
    config = load_config(settings)
    trainer = build(world, config, describe=described, **more)
    trainer.controls = controls_of(config, trainer.policy)
    loop.train(trainer)


@pytest.fixture
def recorded(settings, tmp_path) -> Path:
    run = [*settings, f"run.directory={tmp_path}/run", "record.every=2", "record.answers=1", f"optim.steps={STEPS}"]
    on_ranks(1, train, run)
    return tmp_path / "run"


def test_a_recorded_step_holds_what_the_step_computed(recorded, questions):
    assert recorded_steps(recorded) == [2, 4]
    record = read_step(recorded, 4)
    values, tensors = record.values, record.tensors
    assert values["reason"] == "every" and record.is_whole and values["group_size"] == 4
    assert len(values["prompts"]) == 4 and len(values["completions"]) == len(tensors["tokens"]) == 16
    assert values["config"]["rollout"]["group_size"] == 4 and values["versions"]["torch"] == torch.__version__
    loss = tensors["weights"] * (
        0.04 * tensors["kl"][..., 0] - tensors["ratio"][..., 0] * tensors["advantages"][:, None] * tensors["mask"]
    )
    torch.testing.assert_close(tensors["loss"][..., 0], loss, rtol=1e-5, atol=1e-9)
    (line,) = [json.loads(line) for line in (recorded / "metrics.jsonl").read_text().splitlines()][3:4]
    for name in ("loss", "kl", "grad_norm"):
        assert values["updates"][0][name] == pytest.approx(line[name], rel=1e-6)
    assert sum(norm**2 for norm in values["updates"][0]["grad_norms"].values()) ** 0.5 == pytest.approx(
        line["grad_norm"], rel=1e-5
    )
    assert line["record/mib"] > 0 and "record/mib" not in json.loads(
        (recorded / "metrics.jsonl").read_text().split("\n")[0]
    )


def test_the_likeliest_tokens_are_sorted_and_hold_the_drawn_one_where_its_logprob_is_among_them(recorded):
    tensors = read_step(recorded, 4).tensors
    best, drawn, mask = tensors["likeliest_logprobs"], tensors["logprobs"][..., 0], tensors["mask"]
    assert best.shape[-1] == 5 and (best.diff(dim=-1) <= 0).all()
    among = (tensors["likeliest_ids"] == tensors["tokens"][..., None]) & mask[..., None]
    assert (among.any(dim=-1) == ((drawn >= best[..., -1]) & mask)).all()
    torch.testing.assert_close(best[among], drawn[among.any(dim=-1)])


def test_the_controls_are_answered_for_the_first_question(recorded):
    first, *others = read_step(recorded, 4).values["prompts"]
    assert set(first["answers"]) == {"greedy", "silent", "shuffled_audio"}
    assert all(len(answer["rewards"]) == 2 for answer in first["answers"].values())
    assert not any("answers" in prompt for prompt in others)


def test_recording_changes_no_weight(settings, tmp_path, recorded):
    on_ranks(1, train, [*settings, f"run.directory={tmp_path}/plain", f"optim.steps={STEPS}"])
    one, other = weights(recorded), weights(tmp_path / "plain")
    assert all((one[name] == other[name]).all() for name in one)
    assert not (tmp_path / "plain" / "record").exists()


@pytest.mark.parametrize("replicas", [1, 2])
def test_two_ranks_record_their_parts_and_the_joined_step_is_that_of_one(settings, tmp_path, recorded, replicas):
    more = [f"sharding.replicas={replicas}", "record.every=2", f"optim.steps={STEPS}"]
    run = [*settings, f"run.directory={tmp_path}/two", *more]
    on_ranks(2, train, run)
    one, two = read_step(recorded, 2), read_step(tmp_path / "two", 2)
    assert two.values["parts"] == [0, 1] and two.is_whole
    own = [json.loads((place_of(tmp_path / "two", 2) / f"rank-{n}" / "step.json").read_text()) for n in range(2)]
    positions = [[prompt["position"] for prompt in part["prompts"]] for part in own]
    assert sorted(sum(positions, [])) == [4, 5, 6, 7] and sum(positions, []) != [4, 5, 6, 7], "dealt by length"
    assert largest_difference(recorded, tmp_path / "two") < ROUNDING, "the weights after the last step"
    assert [p["row"]["id"] for p in two.values["prompts"]] == [p["row"]["id"] for p in one.values["prompts"]]
    assert two.values["completions"] == one.values["completions"]
    for name, tensor in one.tensors.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(two.tensors[name], tensor, rtol=1e-4, atol=1e-4)
        elif name != "likeliest_ids":
            assert torch.equal(two.tensors[name], tensor), name
    for name in ("loss", "kl", "entropy"):
        assert two.values["updates"][0][name] == pytest.approx(one.values["updates"][0][name], rel=1e-4, abs=1e-6)
    norms = [record.values["updates"][0]["grad_norms"] for record in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3, abs=1e-6)


def test_a_step_with_a_missing_part_says_so(settings, tmp_path, recorded):
    record = read_step(recorded, 2)
    write_part(tmp_path / "half", dataclasses.replace(record, values=record.values | {"ranks": 2}))
    assert not read_step(tmp_path / "half", 2).is_whole


def digests(world: World, settings: list[str], out: Path) -> None:
    found = weight_digests(build(world, load_config(settings)).policy, world)
    if world.is_main:
        out.write_text(json.dumps(found))


def test_digests_do_not_depend_on_the_number_of_ranks(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run"]
    for ranks, more in ((1, []), (2, []), (2, ["sharding.replicas=2"])):
        on_ranks(ranks, digests, [*run, *more], tmp_path / f"{ranks}{len(more)}.json")
    one, two, replicas = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("10", "20", "21"))
    assert one == two == replicas


def test_a_digest_notices_one_bit_and_an_exchange_of_two_values(case):
    world = World(0, 1, torch.device("cpu"))
    before = weight_digests(case.policy, world)
    name, weight = next((n, p) for n, p in case.policy.model.named_parameters() if p.dim() == 2 and p.requires_grad)
    with torch.no_grad():
        weight.view(torch.int32)[5, 0] ^= 1
        flipped = weight_digests(case.policy, world)
        weight.view(torch.int32)[5, 0] ^= 1
        weight[5, [0, 1]] = weight[5, [1, 0]]
    exchanged = weight_digests(case.policy, world)
    for after in (flipped, exchanged):
        assert [module for module in before if before[module] != after[module]] == [module_of(name)]


def test_a_digest_notices_an_exchange_of_two_weights_of_one_layer(case):
    world = World(0, 1, torch.device("cpu"))
    before = weight_digests(case.policy, world)
    attention = case.policy.decoder.layers[0].self_attn
    with torch.no_grad():
        keys = attention.k_proj.weight.clone()
        attention.k_proj.weight.copy_(attention.v_proj.weight)
        attention.v_proj.weight.copy_(keys)
    after = weight_digests(case.policy, world)
    (changed,) = (module for module in before if before[module] != after[module])
    assert changed.endswith("layers.0")


def test_modules_are_layers_or_what_holds_a_parameter():
    assert module_of("model.language_model.layers.3.self_attn.q_proj.weight") == "model.language_model.layers.3"
    assert module_of("model.multi_modal_projector.linear.bias") == "model.multi_modal_projector.linear"


def test_a_reward_that_fails_leaves_the_step_and_those_before_it(settings, tmp_path, capsys):
    calls = []

    def rewards(examples, completions):
        calls.append(1)
        if len(calls) == 4:
            raise RewardError("reward 'length' failed")
        return length_reward(examples, completions)

    run = [*settings, f"run.directory={tmp_path}/run", "optim.steps=9", "record.last=2"]
    with pytest.raises(RewardError):
        on_ranks(1, lambda world: train(world, run, rewards=rewards))
    assert recorded_steps(tmp_path / "run") == [3, 4], "the last two"
    assert "steps 3 to 4 are in" in capsys.readouterr().out
    before, failed = (read_step(tmp_path / "run", step) for step in (3, 4))
    assert before.values["reason"] == "last steps before an error" and "loss" in before.tensors
    assert failed.values["reason"] == "error: reward 'length' failed"
    assert {"tokens", "old_logprobs"} <= failed.tensors.keys() and "rewards" not in failed.tensors
    assert len(failed.values["completions"]) == 16 and all(c["text"] is not None for c in failed.values["completions"])


def test_a_reward_that_fails_for_the_answers_to_the_controls_leaves_the_completions(settings, tmp_path):
    def rewards(examples, completions):
        if len(examples) < 16:
            raise RewardError("reward 'length' failed")
        return length_reward(examples, completions)

    run = [*settings, f"run.directory={tmp_path}/run", "record.every=1", "record.answers=1"]
    with pytest.raises(RewardError):
        on_ranks(1, lambda world: train(world, run, rewards=rewards))
    assert {"tokens", "old_logprobs"} <= read_step(tmp_path / "run", 1).tensors.keys()


def test_an_error_leaves_nothing_where_record_last_is_0(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "record.last=0"]
    with pytest.raises(ZeroDivisionError):
        on_ranks(1, lambda world: train(world, run, rewards=lambda examples, completions: 1 / 0))
    assert not (tmp_path / "run" / "record").exists()


def test_only_the_newest_steps_are_kept(settings, tmp_path):
    on_ranks(1, train, [*settings, f"run.directory={tmp_path}/run", "record.every=1", "record.keep=2", "optim.steps=5"])
    assert recorded_steps(tmp_path / "run") == [4, 5]


def test_a_resumed_run_does_its_steps_again_and_records_them_once(settings, tmp_path):
    run = [*settings, f"run.directory={tmp_path}/run", "record.every=1", "checkpoint.every=2"]
    on_ranks(1, train, [*run, "optim.steps=4"])
    (tmp_path / "run" / "checkpoints" / "step-000004" / "hark.json").unlink()
    before = read_step(tmp_path / "run", 4)
    on_ranks(1, train, [*run, "optim.steps=3", "run.resume=true"])
    assert recorded_steps(tmp_path / "run") == [1, 2, 3]
    on_ranks(1, train, [*run, "optim.steps=4", "run.resume=true"])
    assert torch.equal(read_step(tmp_path / "run", 4).tensors["tokens"], before.tensors["tokens"])


def test_fine_tuning_is_recorded_too(settings, tmp_path):
    from hark.data.prompts import target
    from hark.grpo.sft import SupervisedTrainer

    config = load_config([*settings, f"run.directory={tmp_path}/run", "record.every=1", "optim.steps=1"])

    def run(world: World) -> None:
        more = {"target": lambda example: target(example, "answer"), "describe": described}
        loop.train(build(world, config, SupervisedTrainer, **more))

    on_ranks(1, run)
    record = read_step(tmp_path / "run", 1)
    assert {"logprobs", "loss", "weights"} <= record.tensors.keys() and "advantages" not in record.tensors
    assert record.values["completions"][0]["text"].startswith("<answer>")


def test_a_part_is_whole_or_absent(recorded, monkeypatch):
    """A crash while a part is written leaves a directory that no reader takes for one."""
    record = read_step(recorded, 2)
    monkeypatch.setattr("hark.grpo.instruments.record.os.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_part(recorded, dataclasses.replace(record, values=record.values | {"step": 3}))
    assert recorded_steps(recorded) == [2, 4]


def test_errors_say_what_is_recorded_and_what_is_broken(recorded):
    with pytest.raises(RecordError, match="step 3 is not recorded; it has 2, 4"):
        read_step(recorded, 3)
    with pytest.raises(RecordError, match="it has none; train with record.every above 0"):
        read_step(recorded / "nowhere", 3)
    path = place_of(recorded, 2) / "rank-0" / "step.json"
    text = path.read_text()
    path.write_text(text[:100])
    with pytest.raises(RecordError, match="rank-0 cannot be read"):
        read_step(recorded, 2)
    path.write_text(json.dumps(json.loads(text) | {"format": 99}))
    with pytest.raises(RecordError, match="has format 99; expected 5"):
        read_step(recorded, 2)


def test_a_bit_that_flips_is_named_with_the_file(recorded):
    values, path = (place_of(recorded, 2) / "rank-0" / name for name in ("step.json", "tensors.safetensors"))
    good = values.read_bytes()
    for key in (b'"text":"', b'"line":"', b'"reason":"'):  # a letter of a text: it stays JSON
        at = good.index(key) + len(key)
        values.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(RecordError, match=r"rank-0: step.json does not agree with its own digest; .* copy"):
            read_step(recorded, 2)
    values.write_bytes(good)
    good = path.read_bytes()
    for place in (9, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(RecordError, match=r"rank-0: tensors.safetensors does not agree with its digest; .* copy"):
            read_step(recorded, 2)
    path.write_bytes(good[:-1])
    with pytest.raises(RecordError, match=f"tensors.safetensors has {len(good) - 1} bytes instead of {len(good)}"):
        read_step(recorded, 2)


def test_the_files_can_be_read_without_hark(recorded):
    part = place_of(recorded, 2) / "rank-0"
    values, tensors = json.loads((part / "step.json").read_text()), load_file(part / "tensors.safetensors")
    assert {file.name for file in part.iterdir()} == {"step.json", "tensors.safetensors"}
    drawn = [row[mask].tolist() for row, mask in zip(tensors["tokens"], tensors["mask"], strict=True)]
    texts = ["".join(values["tokens"][str(token)] for token in tokens) for tokens in drawn]
    pairs = zip(values["completions"], texts, strict=True)
    assert any(completion["text"] and completion["text"] in text for completion, text in pairs)


def test_parts_of_other_lengths_are_padded_when_they_are_joined():
    def part(rank: int, tokens: list[list[int]]) -> StepRecord:
        prompts = [{"position": rank}]
        values = {"parts": [rank], "ranks": 2, "step": 1, "prompts": prompts, "completions": [rank], "group_size": 1}
        own = {"tokens": {str(rank): "x"}, "updates": [{"loss": 0.5, "grad_norm": 2.0}]}
        return StepRecord(values | own, {"tokens": torch.tensor(tokens), "reward": torch.tensor([float(rank)])})

    record = joined([part(0, [[1, 2, 3]]), part(1, [[4]])])
    assert record.tensors["tokens"].tolist() == [[1, 2, 3], [4, 0, 0]] and record.tensors["reward"].tolist() == [0, 1]
    assert record.values["updates"] == [{"loss": 1.0, "grad_norm": 2.0}] and record.values["tokens"] == {
        "0": "x",
        "1": "x",
    }


def test_joined_parts_are_in_the_order_of_the_step():
    def part(rank: int, positions: list[int], answered: bool = True) -> StepRecord:
        own = [(position, branch) for position in positions for branch in range(2)] if answered else []
        values = {
            "parts": [rank], "ranks": 2, "step": 1, "group_size": 2, "tokens": {}, "updates": [], "completions": own,
            "prompts": [{"position": position} for position in positions],
        }  # fmt: skip
        lengths = torch.tensor([position - 7 for position in positions])
        tensors = {"prompt_ids": torch.tensor(positions).repeat_interleave(lengths), "prompt_lengths": lengths}
        rows = {"tokens": torch.tensor(own), "reward": torch.tensor([2.0 * n + branch for n, branch in own])}
        return StepRecord(values, tensors | (rows if answered else {}))

    record = joined([part(0, [9, 10]), part(1, [8, 11])])
    assert [prompt["position"] for prompt in record.values["prompts"]] == [8, 9, 10, 11]
    rows = [(position, branch) for position in (8, 9, 10, 11) for branch in (0, 1)]
    assert record.values["completions"] == rows == [tuple(row) for row in record.tensors["tokens"].tolist()]
    assert record.tensors["reward"].tolist() == list(range(16, 24))
    assert record.tensors["prompt_ids"].tolist() == [8, 9, 9, 10, 10, 10, 11, 11, 11, 11]
    assert record.tensors["prompt_lengths"].tolist() == [1, 2, 3, 4]
    early = joined([part(0, [9, 10]), part(1, [8, 11], answered=False)])
    assert early.values["completions"] == [(9, 0), (9, 1), (10, 0), (10, 1)] and "reward" not in early.tensors


def test_a_described_example_is_the_example_but_for_its_clips(questions):
    examples, _ = load_examples(questions)
    for example in examples:
        again = example_of(json.loads(json.dumps(described(example))))
        assert again == dataclasses.replace(example, clips=())


def test_all_fields_of_an_example_are_described():
    row = {
        "id": "q", "audio_path": "a.wav", "question_text": "Which?", "answer": ["a", "b"], "system": "Be brief.",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "task": "sound",
        "category": "c", "sub_category": "s", "difficulty": "hard", "dataset_name": "d", "mine": 7,
    }  # fmt: skip
    example = parse_example(row, root=Path(), line="x.jsonl:1")
    again = example_of(json.loads(json.dumps(described(example))))
    assert again == dataclasses.replace(example, clips=()) and again.extra == example.extra
