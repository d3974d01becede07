"""Do the tests notice faults? Each mutant is one deliberate fault, and some named test must fail because of it.

    python -m tests.mutants [--only NAME ...] [--list]

The faults are made in a copy of the tree, never in the checkout. First the named tests must pass on an unchanged copy.
A mutant that survives makes the run fail, unless `equivalent` says why no test can notice it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("data", "grpo", "launch", "models")
JOBS = 2  # copies in which tests run at the same time
LIMIT = 180  # seconds for the tests of a mutant: a fault may make a loop endless
# Imported once, before the processes that run tests are forked. Of Hark only the first, which makes torchaudio
# importable: each fork imports Hark anew, from its copy.
PRELOAD = (
    "hark.data.torchaudio_compat",
    "torch.distributed.fsdp",
    "transformers.models.qwen2_audio.modeling_qwen2_audio",
    "pytest",
)


@dataclass(frozen=True)
class Mutant:
    """A fault: `old`, which occurs exactly once in `file`, becomes `new`. tests: those that should notice."""

    file: str
    name: str
    old: str
    new: str
    tests: str
    equivalent: str = ""


# file: (name, old text, new text, the tests that should notice, why none can if that is so)
FAULTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "grpo/advantage.py": (
        ("rewards unweighted", "nan_to_num(nan=0.0) * weight", "nan_to_num(nan=0.0)", "test_advantage"),
        ("rewards added up in float32", "dtype=torch.float64", "dtype=torch.float32", "test_advantage"),
        ("population deviation", 'freedom=int(scale == "std")', "freedom=0", "test_advantage"),
        (
            "mean of all groups",
            "centred = groups - groups.nanmean(dim=1, keepdim=True)",
            "centred = groups - groups.nanmean()",
            "test_advantage",
        ),
        ("another epsilon", "EPSILON = 1e-4", "EPSILON = 1e-3", "test_advantage"),
        ("ends of a group compared", ".amin(dim=1)\n", "[:, -1]\n", "test_advantage"),
        (
            "others without their factor",
            "centred * given / (given - 1)",
            "centred * (given / given)",
            "test_algorithms",
        ),
        ("whitened without its deviation", "total / (_deviation", "total * (_deviation", "test_algorithms"),
        ("returns from the start", ".flip(1).cumsum(dim=1).flip(1)", ".cumsum(dim=1)", "test_algorithms"),
        ("whitened over completions", "(counts * returns).sum() / total", "returns.mean()", "test_algorithms"),
        ("lengths left out of the baseline", "(lengths * groups.nan", "(groups.nan", "test_algorithms"),
        (
            "the lead over the worst",
            "best.values[:, :1] - best.values[:, 1:]",
            "best.values[:, :1] - groups.amin(1, True)",
            "test_algorithms",
        ),
        ("missing rewards count as 0", ".masked_fill(columns.isnan().all(dim=1), torch.nan)", "", "test_algorithms"),
    ),
    "grpo/loss.py": (
        ("completions not counted", ".clamp(min=1) * completions", ".clamp(min=1)", "test_loss"),
        ("tokens of this rank", "mask / max(tokens, 1)", "mask / mask.sum()", "test_loss"),
        ("k2 for k3", "log_ratio.exp() - log_ratio - 1", "log_ratio.square() / 2", "test_loss"),
        ("kl backwards", "ref_logprobs - logprobs", "logprobs - ref_logprobs", "test_loss"),
        (
            "clip bounds exchanged",
            "clipped = ratio.clamp(1 - limits.low, 1 + limits.high)",
            "clipped = ratio.clamp(1 - limits.high, 1 + limits.low)",
            "test_loss",
        ),
        ("optimistic surrogate", "torch.minimum(", "torch.maximum(", "test_loss"),
        ("beta ignored", "loss + beta * kl_term", "loss + kl_term", "test_loss"),
        (
            "clipped where it does not bind",
            "stopped = clipped < ratio * advantage",
            "stopped = clipped != ratio * advantage",
            "test_loss test_logged_metrics",
        ),
        (
            "lengths left out of the sequence's ratio",
            ".sum(dim=1, keepdim=True) / lengths)",
            ".sum(dim=1, keepdim=True))",
            "test_algorithms",
        ),
        ("cap for gains too", "(advantage < 0) & (surrogate", "(surrogate", "test_algorithms"),
        ("the weight has a gradient", "weight = ratio.detach().clamp", "weight = ratio.clamp", "test_algorithms"),
        (
            "gates exchanged",
            "advantage > 0, limits.gate_up, limits.gate_down",
            "advantage > 0, limits.gate_down, limits.gate_up",
            "test_algorithms",
        ),
        ("the gradient of k1", "estimate.detach() + other - other.detach()", "estimate", "test_loss_options"),
        (
            "importance of the sampler's own",
            "(old_logprobs - sampled_logprobs)",
            "(sampled_logprobs - old_logprobs)",
            "test_loss_options",
        ),
        ("importance without a cap", ".exp().clamp(max=cap)", ".exp()", "test_loss_options"),
        ("entropy punished", "loss - entropy_weight", "loss + entropy_weight", "test_loss_options"),
        (
            "beta falls where it should rise",
            "max(kl / target - 1, -0.2)",
            "max(1 - kl / target, -0.2)",
            "test_loss_options",
        ),
    ),
    "grpo/objective.py": (
        (
            "truncated completions trained on",
            'return mask & stopped[:, None] if self._loss.truncated == "mask" else mask',
            "return mask",
            "test_loss_options",
        ),
        ("the KL in both", 'beta if loss.kl_in == "loss" else 0.0', "beta", "test_algorithms"),
    ),
    "grpo/instruments/by_module.py": (
        (
            "digest by the place in the shard",
            "2 * (start + first) + 1, 2 * (start + first + len(part)), 2",
            "1, 2 * len(part), 2",
            "test_record",
        ),
        ("parameters interchangeable", "* _factor(name) * _counts", "* _counts", "test_record"),
        ("replicas counted twice", "mesh.get_local_rank(0) == 0)", "True)", "test_record"),
    ),
    "grpo/instruments/draft.py": (
        ("terms of other rows", "result[rows, :", "result[: len(rows), :", "test_record test_replay"),
    ),
    "grpo/instruments/record.py": (
        ("any tensors", "check_digest(path, file)", "pass", "test_record"),
        (
            "joined in the order of ranks",
            "return sorted(range(len(numbers)), key=lambda index: numbers[index])",
            "return list(range(len(numbers)))",
            "test_record.py::test_joined_parts_are_in_the_order_of_the_step",
        ),
    ),
    "launch/common/rerun.py": (
        (
            "rows of other prompts",
            "[positions.index(position) for position in share]",
            "range(len(share))",
            "test_replay.py::test_a_run_on_two_ranks_is_replayed_on_one_and_on_two",
        ),
    ),
    "grpo/instruments/recorder.py": (
        (
            "digest before the step",
            "draft.weights_after = weight_digests(self._policy, self._world)",
            "draft.weights_after = draft.weights_before",
            "test_replay",
        ),
    ),
    "grpo/instruments/replay.py": (
        ("the stop token masked", "stops.cumsum(dim=1) - stops == 0", "stops.cumsum(dim=1) == 0", "test_replay"),
        ("any difference is rounding", "limit = 0.0 if", "limit = 9.0 if", "test_replay"),
    ),
    "grpo/tree.py": (
        (
            "siblings visible",
            "((key_branch == branch) | (key_branch == PROMPT))",
            "(key_branch >= PROMPT)",
            "test_tree",
        ),
        ("window too wide by one", "position - (window - 1)", "position - window", "test_tree"),
        ("a token blind to itself", "key_position <= position", "key_position < position", "test_tree"),
        (
            "positions count on over branches",
            "step.repeat(group_size)",
            "torch.arange(steps * group_size)",
            "test_tree test_parity",
        ),
        (
            "one place of padding visible",
            "position < lengths[:, None]",
            "position <= lengths[:, None]",
            "test_tree test_parity",
        ),
    ),
    "grpo/blocks.py": (
        ("a sibling's block", "== _queries(query.branch[..., 0])", "<= _queries(query.branch[..., 0])", "test_blocks"),
        ("a block of all pairs with padding", "_keys(key.real.all(dim=-1)) & earlier", "earlier", "test_blocks"),
        ("all pairs beyond a row's end", "& earlier & complete", "& earlier", "test_blocks"),
        ("padding is a branch", "& _keys(key.branch[..., -1] != PROMPT)", "", "test_blocks"),
        ("windows count from the first query", "start.amax(dim=-1)", "start.amin(dim=-1)", "test_blocks"),
        ("branches without their prompt", "return of_branches | of_prompt", "return of_branches", "test_blocks"),
    ),
    "grpo/attention_check.py": (
        ("nothing is a fault", "if not gap <= BOUNDS", "if gap > 10 + BOUNDS", "test_attention_check"),
        ("NaN is no fault", "if not gap <= BOUNDS", "if gap > BOUNDS", "test_attention_check"),
        ("gradients unchecked", "map(_gap, found, expected)", "map(_gap, found[:1], expected)", "test_attention_check"),
        (
            "each rank by itself",
            "if fault), None)",
            "if fault and fault == found[world.rank]), None)",
            "test_attention_check",
        ),
    ),
    "grpo/distribution.py": (
        ("temperature ignored", "(hidden) / temperature", "(hidden)", "test_logged_metrics"),
        (
            "placeholders can be drawn",
            "logits[..., neighbours] = -torch.inf",
            "logits[..., neighbours] += 0.0",
            "test_sampler",
        ),
        ("impossible tokens drawn", "right=True", "right=False", "test_sampler"),
        ("draws in float32", ".double().exp()", ".exp()", "test_sampler"),
        (
            "entropy halved",
            "-(distribution.exp() * finite)",
            "-0.5 * (distribution.exp() * finite)",
            "test_logged_metrics",
        ),
    ),
    "grpo/scorer.py": (
        ("first token from one too early", "lengths - 1]", "lengths - 2]", "test_parity"),
        ("the next token is fed", "tokens[:, :-1]", "tokens[:, 1:]", "test_parity"),
        (
            "padding visible to branches",
            "real = row.real[:, None, None, :prompt]",
            "real = row.real[:, None, None, :prompt] | True",
            "test_parity test_split_attention",
        ),
        ("last chunk lost", "for h, c in chunks[:-1]", "for h, c in chunks[1:]", "test_sampler test_parity"),
    ),
    "grpo/prefill.py": (
        ("first token from padding", "lengths - 1]", "-1]", "test_sampler"),
        ("a prompt's own part of the gradient alone", "_of(gradient, row,", "_of(gradient, 0,", "test_prefill"),
        ("prompts in the order of the rollout", "self._rows[group] for", "group for", "test_prefill"),
        (
            "kept for the second update",
            "self._outputs, self._leaves = [], []\n        return taken",
            "return taken",
            "test_prefill",
        ),
        ("keys in the place of values", "others[first::2]", "others[::2]", "test_prefill"),
    ),
    "grpo/sampler.py": (
        ("draws without the example", "list(key)", "list(key)[:-1]", "test_sampler"),
        ("shortest prompt first", "-len(prompts[n].ids)", "len(prompts[n].ids)", "test_sampler"),
    ),
    "grpo/branches.py": (
        ("recordings of tensors that moved", "self._recorded.forget()", "pass", "test_recorded"),
        ("half precision on any threads", " and dtype == torch.float32", "", "test_threads"),
        (
            "recorded steps write to an earlier rollout",
            "(tensor.clone() for tensor in every)",
            "every",
            "test_recorded",
        ),
        (
            "all stopped",
            "self.stopped[completion] |= stopped",
            "self.stopped[completion] |= running",
            "test_sampler test_evaluate",
        ),
        (
            "branches behind the longest prompt",
            "(plan.prompt_length + plan.step)",
            "(sizes.prompt + plan.step)",
            "test_sampler test_parity",
        ),
        ("cells not moved", "dict(moves).get(row, row)", "row", "test_sampler"),
        (
            "a full grid in any order",
            "cells == list(range(rows * self.group_size))",
            "len(cells) == rows * self.group_size",
            "test_sampler",
        ),
        ("newest key not moved", "in self._branches) - 1)", "in self._branches) - 2)", "test_sampler"),
        ("no end at the limit", "and branch.tokens < self.limit", "", "test_sampler"),
    ),
    "grpo/recorded.py": (
        ("recorded steps with the first weights", "self._weights.copy()", "pass", "test_recorded"),
        ("recorded steps with weights that are freed", "self._put(self._copies)", "pass", "test_recorded"),
        ("one recording for all settings", "(*self._kind, sizes)", "sizes", "test_recorded"),
        (
            "recordings of a cache that moved",
            "            self._graphs.forget()\n        return",
            "            pass\n        return",
            "test_recorded",
        ),
        (
            "recordings of a cache that was freed",
            "self._cache = None\n            self._graphs.forget()",
            "self._cache = None",
            "test_recorded",
        ),
    ),
    "grpo/types.py": (
        ("last part of a group lost", "range(0, self.group_size, size)", "range(0, size, size)", "test_prefill"),
        ("cut to the shortest completion", "[rows].sum(dim=1).max()", "[rows].sum(dim=1).min()", "test_types"),
        ("shortest rows first", "-lengths[group]", "lengths[group]", "test_types"),
        ("one completion fed", "self.group_size * (steps - 1)", "(steps - 1)", "test_types"),
        ("only praise has a gradient", "advantages.ne(0)", "advantages.gt(0)", "test_skipping test_types"),
    ),
    "grpo/evaluate.py": (
        ("stopped inverted", "rollout.stopped.tolist()", "(~rollout.stopped).tolist()", "test_evaluate"),
    ),
    "grpo/optimizer.py": (
        ("biases decay", '"weight_decay": 0.0', '"weight_decay": weight_decay', "test_optimizer"),
        ("warm-up from nothing", "peak * (step + 1) / warmup", "peak * step / warmup", "test_optimizer"),
        ("quarter of a cosine", "math.pi * progress", "math.pi / 2 * progress", "test_optimizer"),
        (
            "norm of this rank",
            "norm.full_tensor()",
            "norm.to_local()",
            "test_training.py::test_the_update_is_the_same_for_any_micro_batch_and_on_one_or_two_ranks",
            "clip_grad_norm_ (seen in torch 2.13) adds up its norm over the ranks itself: nothing is left to gather",
        ),
    ),
    "grpo/learner.py": (
        ("prompts of parts without a backward", "if own:", "if False:", "test_prefill"),
        (
            "each micro-batch reduced between replicas",
            "now=last and number == count",
            "now=True",
            "test_communication",
        ),
        (
            "schedule never applied",
            'group["lr"] = self.learning_rate(step)',
            'group["lr"] = self.config.optim.lr',
            "test_logged_metrics",
        ),
        (
            "gradients kept",
            "        self.optimizer.zero_grad()\n        self.clock",
            "        self.clock",
            "test_logged_metrics",
        ),
        (
            "gradients of the failed sum kept",
            "            self.optimizer.zero_grad()\n            self._router",
            "            self._router",
            "test_processes",
        ),
        ("no end after a micro-batch", "check_interrupted(self.world)", "pass", "test_processes"),
        ("a broken update is done", "if finite:", "if True:", "test_processes"),
        (
            "norm once per rank",
            "norm / self.world.size",
            "norm",
            "test_training.py::test_the_update_is_the_same_for_any_micro_batch_and_on_one_or_two_ranks",
        ),
        ("no update without a gradient", "max(1, reduce_max", "max(0, reduce_max", "test_skipping"),
        ("repeated group counts", "torch.zeros_like(micro.weights)", "micro.weights", "test_skipping"),
        (
            "completions of this rank",
            "len(mask) * self.world.size",
            "len(mask)",
            "test_training.py::test_the_update_is_the_same_for_any_micro_batch_and_on_one_or_two_ranks",
        ),
    ),
    "grpo/trainer.py": (
        ("answers not reduced", "last=last and batch.given is None", "last=last", "test_sharding"),
        ("the cursor is not saved", '"cursor": self.cursor', '"cursor": None', "test_refill"),
        (
            "the sum of deviations reported",
            'group_size=self.group_size).sum() / groups,\n            "equal',
            'group_size=self.group_size).sum(),\n            "equal',
            "test_logged_metrics",
        ),
        ("stopped share inverted", "rollout.stopped.sum()", "(~rollout.stopped).sum()", "test_logged_metrics"),
        (
            "completion tokens doubled",
            "rollout.mask.sum() / completions",
            "2 * rollout.mask.sum() / completions",
            "test_logged_metrics",
        ),
        ("gap after the last update", 'updates[0]["sampler_gap"]', 'updates[-1]["sampler_gap"]', "test_logged_metrics"),
        ("means over skipped groups", "{name: value / scored", "{name: value", "test_skipping"),
        (
            "rewards of other completions",
            "[example for example in examples for _ in range(self.group_size)]",
            "[*examples] * self.group_size",
            "test_training.py::test_each_completion_is_rewarded_with_the_example_it_answers",
        ),
    ),
    "grpo/rewards.py": (
        ("failed calls uncounted", '{"reward_failures": len(judged.failures)} |', "", "test_rewards_failing"),
        ("failed calls counted again", "self._figures.clear()", "pass", "test_rewards_table"),
        ("failures never forgotten", "if one[0] > step - WINDOW", "if True", "test_rewards_failing"),
        (
            "schedule in steps",
            "(last - first) * (step - start) / (end - start)",
            "(last - first) * (step > start)",
            "test_rewards_table",
        ),
    ),
    "data/rewards/judging.py": (
        ("rewards of another group", "replies[n * len(self.names) :]", "replies[0:]", "test_rewards"),
        ("a condition that always holds", "0.0 if (needed or 0) <= 0 else value", "value", "test_rewards_table"),
        ("a reward that is not finite", "and not math.isfinite(value)", "and False", "test_rewards"),
        ("all rewards in a process", "workers or is_foreign", "True or is_foreign", "test_rewards_failing"),
        ("a warning where it should stop", 'self._on_error == "stop"', "False", "test_rewards"),
        ("rewards without a bound of memory", ", memory=MEMORY)", ")", "test_rewards_failing"),
        ("groups of one", "slice(n * size, (n + 1) * size)", "slice(n * size, n * size + 1)", "test_rewards"),
    ),
    "data/worker.py": (
        (
            "a dead process is kept",
            "            self.close()\n            raise failure",
            "            raise failure",
            "test_rewards_table",
        ),
        (
            "a hanging process is kept",
            "self._process = self._pipe = None",
            "self._process = None",
            "test_rewards_table",
        ),
        ("what a process started lives on", "os.killpg(process.pid, 9)", "process.kill()", "test_rewards_failing"),
        ("one that hangs lives on alone", "prctl(PR_SET_PDEATHSIG, signal.SIGKILL)", "prctl(0)", "test_worker"),
        ("it ends with a thread", "_starter(os.getpid()).submit(start).result()", "start()", "test_worker"),
    ),
    "data/rewards/table.py": (
        (
            "mathematics in the run",
            'name in FOREIGN or (options or {}).get("by") in FOREIGN',
            "False",
            "test_rewards_failing",
        ),
        ("options unchecked", "_check_signature(name, reward, options or {})", "pass", "test_rewards_table"),
    ),
    "data/rewards/length.py": (
        (
            "the cosine goes on",
            "min(len(ids) / longest, 1.0) if form",
            "len(ids) / longest if form",
            "test_rewards_table",
        ),
        ("wrong answers the other way", "(long_wrong, short_wrong)", "(short_wrong, long_wrong)", "test_rewards_table"),
        ("overlong from the start", "start = longest - cache", "start = 0", "test_rewards_table"),
    ),
    "data/rewards/maths.py": (
        (
            "the thought is the answer",
            'return _read(extract_answer(completion) or "")',
            "return _library().parse(completion, parsing_timeout=None)",
            "test_rewards_table",
        ),
        ("bare LaTeX is a number", '[f"${answer}$", answer]', "[answer]", "test_rewards_table"),
    ),
    "data/rewards/transcript.py": (
        ("loops of the transcript", "and not repeated(reference.split(), repeats, longest)", "", "test_rewards_table"),
        ("precision left out", "(right / sum(there) + recall) / 2", "recall", "test_rewards_table"),
    ),
    "data/rewards/thinking.py": (
        ("the first choice named", "max(found)[2]", "min(found)[2]", "test_rewards_table"),
        (
            "the shorter name",
            "match.end() - match.start(), index",
            "match.start() - match.end(), index",
            "test_rewards_table",
        ),
    ),
    "data/rewards/variety.py": (
        (
            "repeats of the others",
            "len(set(grams)) / len(grams) if grams",
            "len(set(grams)) / len(items) if grams",
            "test_rewards_table",
        ),
    ),
    "hark/__init__.py": (
        (
            "waiting threads stay awake",
            '"GOMP_SPINCOUNT", "10000"',
            '"GOMP_SPINCOUNT", "300000"',
            "test_library.py::test_threads_that_wait_for_a_product_sleep_soon_unless_the_user_says_otherwise",
        ),
        (
            "the user's waiting ignored",
            'if "OMP_WAIT_POLICY" not in os.environ:',
            "if True:",
            "test_library.py::test_threads_that_wait_for_a_product_sleep_soon_unless_the_user_says_otherwise",
        ),
    ),
    "hark/from_file.py": (
        ("a lock for one", "threading.RLock", "threading.Lock", "test_from_file"),
        (
            "a failed file is kept",
            "del sys.modules[name], _MODULES[absolute]",
            "del sys.modules[name]",
            "test_from_file",
        ),
    ),
    "grpo/reference.py": (
        (
            "reference out of order",
            "logprobs[rollout.rows(groups, branches),",
            "logprobs[rollout.rows(sorted(groups), branches),",
            "test_training.py::test_the_reference_scores_each_completion_where_it_stands",
        ),
        ("beta of the configuration after a resume", 'state.get("beta", self.beta)', "self.beta", "test_loss_options"),
        ("the reference moves a step late", "(step + 1) % self", "step % self", "test_loss_options"),
    ),
    "grpo/loop.py": (
        (
            "logged rate from the configuration",
            'optimizer.param_groups[0]["lr"]',
            "config.optim.lr",
            "test_logged_metrics",
        ),
        (
            "a line of the log kept",
            "start + 1 if start else 0",
            "start + 2 if start else 0",
            "test_training.py::test_a_step_that_was_logged_before_a_crash_and_done_again_is_logged_once",
        ),
        (
            "last step not saved",
            "(done % every == 0 or done == last)",
            "done % every == 0",
            "test_training.py::test_the_last_step_is_saved_and_evaluated_whatever_the_rhythm",
        ),
        ("moments of the probe kept", "learner.optimizer.state.clear()", "pass", "test_probe"),
    ),
    "data/benchmarks/paired.py": (
        (
            "models exchanged",
            "self.second_only - self.first_only",
            "self.first_only - self.second_only",
            "test_compare",
        ),
        ("no correlation of the pairs", "- 2 * correlation * first * second", "", "test_compare"),
        ("no continuity correction", "product - sum(self) / 2", "product", "test_compare"),
        ("one-sided p", "2 * tail / 2**unequal", "tail / 2**unequal", "test_compare"),
        ("pairs by place", 'others[row["id"]]) for', "second[0]) for", "test_compare"),
    ),
    "data/choices.py": (
        ("one of two equal choices", "matches[0] if len(matches) == 1", "matches[0] if matches", "test_choices"),
    ),
    "data/decoding.py": (
        ("windows begin between samples", "0) // step * step", "0)", "test_windows"),
        ("windows are the beginning", "        file.seek(frames)\n", "        pass\n", "test_windows"),
        ("seeking in ogg files", 'if file.format != "OGG":', "if file:", "test_windows"),
        ("no filter before a window", "_frames(CROP_MARGIN, file.samplerate), 0)", "0, 0)", "test_windows"),
    ),
    "data/examples.py": (
        (
            "open answers are choices",
            "return is_accepted(completion, example.accepted)",
            "return completion in example.accepted",
            "test_open_questions",
        ),
        ("every part is the first", "id=name, part=part", "id=name, part=0", "test_mixture"),
    ),
    "data/order.py": (
        (
            "a part restarts in each block",
            "block * in_block[part] + int(",
            "int(",
            "test_mixture.py::test_each_part_is_drawn_without_repetition_until_its_end",
        ),
        ("weights are the order of files", "seed, block, MIXING)]", "seed, 0, MIXING)]", "test_mixture"),
        ("replaced by another file", "if one == part]", "if one >= 0]", "test_mixture"),
        ("stages begin inside an epoch", "position - -(-stage * total // stages)", "position", "test_curriculum"),
        ("clips in common are not followed", "return [find(own[0])", "return [own[0]", "test_open_questions"),
        (
            "the longest of each round to rank 0",
            "free = sorted(range(world), key=lambda rank: sums[rank])",
            "free = range(world)",
            "test_order",
        ),
    ),
    "data/loader.py": (
        ("dealt without the sound", "tokens(self.examples[index].seconds or 0.0", "tokens(0.0", "test_loader"),
        ("dealt without the text", "self._text_length(index)) for", "0) for", "test_loader"),
    ),
    "data/difficulty.py": (("a high pass rate is hard", "sign = -1 if", "sign = 1 if", "test_curriculum"),),
    "grpo/shared_data.py": (
        (
            "a failure stays on its rank",
            "if reduce_max(failure is not None, world):",
            "if failure is not None:",
            "test_rewards_failing",
        ),
    ),
    "grpo/refill.py": (
        (
            "candidates that are not needed are lost",
            "return found, found[-1] + 1",
            "return found, len(spread)",
            "test_refill",
        ),
        ("spread in the order of ranks", "for _, has in sorted(found)]", "for _, has in found]", "test_refill"),
        ("the last groups fill up", "others[: wanted - len(found)]", "others[len(found) - wanted :]", "test_refill"),
    ),
    "launch/common/graded_samples.py": (
        ("answers without an end are kept", "and drawn.stopped[n] ", "", "test_pass_rate"),
    ),
    "data/arrow.py": (
        ("cells of the first row group", "table.read_row_group(group,", "table.read_row_group(0,", "test_tables"),
        (
            "places go on in the next group",
            "            place = 0\n",
            "            place = 0 if not group else place\n",
            "test_tables",
        ),
        ("bytes that are there are not told", 'there = b""', "there = None", "test_tables"),
        ("sizes of lists alone", "own + (_size(array.flatten()) if", "own + (0 if", "test_tables"),
    ),
    "data/tables.py": (("a file beats the bytes", 'if content.get("bytes") is None and', "if", "test_tables"),),
    "data/benchmarks/report.py": (
        ("open answers are no choice", 'if not row.get("open"))', "if row)", "test_open_questions"),
    ),
    "data/clips.py": (
        (
            "cut clips are forgotten",
            "Finding.from_json(text) if same else",
            "Finding.from_json(text) if before else",
            "test_clips",
        ),
        (
            "a process that failed is remembered",
            "finding.fault != FAULTS[DecoderError]",
            "True",
            "test_worker",
        ),
    ),
    "launch/ask.py": (
        (
            "product of probabilities as a mean",
            "logprobs.double().sum(dim=1)",
            "logprobs.double().mean(dim=1)",
            "test_ask",
        ),
        ("silence is not silent", "np.zeros_like(waveform)", "waveform", "test_ask"),
    ),
    "launch/common/answering.py": (
        (
            "figures of another model",
            "subject.run and directory.samefile",
            "not subject.run or directory.samefile",
            "test_choose",
        ),
        ("controls of the first row", "answered[n][key]", "answered[0][key]", "test_answering"),
    ),
    "launch/common/trained.py": (
        ("the best is the last", "accuracy[step], -step", "accuracy[step], step", "test_choose"),
        ("the last is the first", "max(found) if step is None", "min(found) if step is None", "test_choose"),
        (
            "trained weights not loaded",
            "            load_weights(self.checkpoint, policy, world)",
            "            pass",
            "test_choose",
        ),
    ),
    "launch/common/intervals.py": (
        ("normal and not Student's", "t_quantile(len(values) - 1)", "1.96", "test_sweep"),
        ("spread of runs and not of their mean", "/ math.sqrt(len(values))", "", "test_sweep"),
    ),
    "launch/sweep.py": (
        ("commas in lists", "depth += 0 if quote else", "depth += 0 if True else", "test_sweep"),
        (
            "other settings continued",
            "for name, old, new in changed(before, one.config, keys):",
            "for name, old, new in ():",
            "test_sweep",
        ),
    ),
    "grpo/runtime/interrupt.py": (
        ("an interrupted run without a word", "say()", "", "test_processes"),
        ("an interrupt that torch hides", "if received or isinstance", "if isinstance", "test_processes"),
        ("a second signal is ignored", "elif time.monotonic() - self._since > ONE:", "elif False:", "test_processes"),
        (
            "no end of grace",
            'timer = leave_within(grace, f"{name}: {late}ended at once; {GO_ON}", 128 + number)',
            "timer = None",
            "test_processes",
        ),
        ("SIGTERM before the steps", "if number not in signals:", "if number not in SIGNALS:", "test_processes"),
    ),
    "grpo/runtime/out_of_memory.py": (
        (
            "numpy's memory is no memory",
            "return isinstance(error, MemoryError)",
            "return False",
            "test_entry test_probe",
        ),
    ),
    "launch/common/entry.py": (
        (
            "an interrupted program succeeds",
            'status = 128 + getattr(interrupt, "signal", signal.SIGINT)',
            "status = 0",
            "test_entry",
        ),
        ("a full disk has a traceback", "error.errno in DISK", "False", "test_processes"),
    ),
    "grpo/runtime/leaving.py": (
        ("one error for each process", "touch(exist_ok=False)", "touch(exist_ok=True)", "test_entry"),
    ),
    "launch/common/torchrun.py": (
        ("status of a killed process", "return 128 - failure.exitcode", "return 1", "test_entry"),
        ("torchrun's own report", "logging.disable()", "pass", "test_entry"),
    ),
    "launch/common/nearest.py": (
        ("no other names", 'OTHER_NAMES.get(option, "")', '""', "test_config"),
        (
            "other names of any section",
            "(spelt, _of(section, other), _of(section, within), other)",
            "(spelt, other)",
            "test_config",
        ),
    ),
    "grpo/runtime/threads.py": (
        ("bits not compared", "if torch.equal(result, expected):", "if True:", "test_threads"),
        ("fewer threads stay", "            torch.set_num_threads(self._most)", "            pass", "test_threads"),
    ),
    "grpo/runtime/sharding.py": (
        ("groups with the library's timeout", ", timeout=TIMEOUT)[0]", ")[0]", "test_sharding"),
        ("the reference stays", "local.lerp_(", "local.lerp(", "test_loss_options"),
        (
            "gradients averaged",
            "set_gradient_divide_factor(1.0)",
            "set_gradient_divide_factor(2.0)",
            "test_training.py::test_the_update_is_the_same_for_any_micro_batch_and_on_one_or_two_ranks",
        ),
        (
            "weights left gathered",
            "            unit.reshard()\n",
            "",
            "test_communication test_sharding",
        ),
        ("alone without the compute dtype", "== 1 and dtype == torch.float32 and", "== 1 and", "test_sharding"),
        ("gradients reduced in half", "reduce_dtype=torch.float32", "reduce_dtype=half", "test_communication"),
        ("all-reduce counted once", "2 * result.nbytes", "result.nbytes", "test_communication"),
    ),
    "grpo/runtime/checkpoint.py": (
        (
            "one checkpoint too many",
            "[:-keep]",
            "[: -keep - 1]",
            "test_training.py::test_an_interrupted_save_is_not_taken_for_a_checkpoint",
        ),
        ("the best is deleted", "if old == best:", "if False:", "test_checkpoints"),
        ("moments where there is no checkpoint", "if found and not optimizer.state", "if True", "test_checkpoints"),
        ("the oldest first", "reversed(found)", "found", "test_checkpoints"),
        ("training waits for the disk", "if at_once or not self._background", "if True", "test_checkpoints"),
        (
            "shapes not compared",
            "if saved.get(name) != own.get(name)",
            "if (name in saved) != (name in own)",
            "test_training.py::test_a_checkpoint_of_other_shapes_under_the_same_names_is_refused",
        ),
    ),
    "hark/limits.py": (
        ("memory without a bound", "resource.setrlimit(resource.RLIMIT_DATA, (most, most))", "pass", "test_worker"),
    ),
    "hark/parent.py": (("a launcher that died is waited for", "os.getppid() == parent", "True", "test_ranks"),),
    "hark/shown.py": (("control characters printed", "c if c.isprintable() else", "c if c else", "test_console"),),
    "grpo/runtime/export.py": (
        ("export of what was loaded", "whole(tensor) if tensor.requires_grad else None", "None", "test_training"),
        ("the old export deleted first", "target.rename(old)", "shutil.rmtree(target)", "test_processes"),
    ),
    "grpo/runtime/manifest.py": (
        ("any contents", "if sha256_of(path) != file.sha256:", "if False:", "test_checkpoints"),
        ("bytes that change no value", "raw != _encoded(values) or", "", "test_checkpoints"),
        ("any values", 'or values.get("sha256") != _digest(body)', "", "test_checkpoints"),
        ("a manifest of any step", "if checkpoint.name != name_of(manifest.step):", "if False:", "test_checkpoints"),
    ),
    "grpo/runtime/shards.py": (
        (
            "written while it changes",
            "torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())",
            "tensor.detach()",
            "test_checkpoints",
        ),
        (
            "pieces at the wrong place",
            "slice(a - o, b - o) for a, b, o in zip(begin, end, piece.offset, strict=True)",
            "slice(0, b - a) for a, b, o in zip(begin, end, piece.offset, strict=True)",
            "test_checkpoints",
        ),
    ),
    "grpo/runtime/watchdog.py": (
        (
            "one that waits is the cause",
            "if progress != self._moved[0] or waits:",
            "if progress != self._moved[0]:",
            "test_processes",
        ),
        ("one that is stopped is waited for", "if silent > self._patience:", "if False:", "test_processes"),
    ),
    "grpo/runtime/lock.py": (
        ("two runs in a directory", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB", "test_processes"),
    ),
    "grpo/runtime/collectives.py": (
        ("overlapping time twice", "max(ended - max(began, latest), 0.0)", "ended - began", "test_communication"),
        ("an endless loop is progress", " if self._long else 0", "", "test_processes"),
        ("a hang is progress by the watchdog", " - time.thread_time()", "", "test_processes"),
        ("sums in float32", "dtype=torch.float64", "dtype=torch.float32", "test_metrics"),
        ("a sum for the largest", "ReduceOp.MAX", "ReduceOp.SUM", "test_metrics"),
    ),
    "grpo/instruments/metrics.py": (
        ("a step logged twice", "_step_of(line) < step", "_step_of(line) <= step", "test_metrics"),
        ("memory in other units", "else peak / 2**20", "else peak / 2**30", "test_logged_metrics"),
    ),
    "grpo/instruments/console.py": (
        ("line that wraps", "columns - 1 if", "columns + 1 if", "test_console"),
        ("a field too many", "len(line) + 1 + len(field)", "len(line)", "test_console"),
    ),
    "grpo/instruments/diagnosis.py": (
        ("warned at each step", "-math.inf) > WINDOW", "-math.inf) > 0", "test_diagnosis"),
        ("never over", "{symptom.name: now for", "{symptom.name: math.inf for", "test_diagnosis"),
    ),
    "grpo/instruments/history.py": (
        ("a rise without its error", "difference / error if error", "difference if error", "test_diagnosis"),
    ),
    "grpo/instruments/symptoms.py": (
        ("control of few questions", "DOUBT * error < SOUND_GAIN and ", "", "test_diagnosis"),
        ("one evaluation is enough", "len(lines.evaluations) < 2 or", "not lines.evaluations or", "test_diagnosis"),
        ("one slow step counts", "return median(part / whole", "return fmean(part / whole", "test_diagnosis"),
        ("gap of float32 for all", "GAP_BOUND.get(lines.dtype, ", "GAP_BOUND.get(None, ", "test_diagnosis"),
    ),
    "grpo/instruments/groups.py": (
        ("share without the weight", "deviations(weight * column", "deviations(column", "test_logged_metrics"),
        ("copies counted", "len(set(group))", "len(group)", "test_logged_metrics test_diagnosis"),
    ),
    "grpo/instruments/trackers.py": (
        ("markup of the model", r'r"[^\w ]|_"', r'r"[|\n]"', "test_trackers"),
        ("a new run at each resume", "if not start or not file.exists()", "if True", "test_trackers"),
        ("one table for all steps", 'f"completions/step-{step:06}"', '"completions"', "test_trackers"),
        ("clips as loud as can be", "_pcm(waveform)", "waveform", "test_trackers"),
    ),
    "grpo/instruments/flops.py": (
        ("attention of a tower linear", "+ rest**2", "+ rest", "test_flops"),
        ("last token fed", "start + length - 1)", "start + length)", "test_flops"),
    ),
    "grpo/instruments/memory.py": (
        ("one moment", '"optimizer": 2 * sharded', '"optimizer": sharded', "test_memory"),
        ("draws in four bytes", "20 * n * work", "12 * n * work", "test_memory"),
    ),
    "grpo/instruments/communication.py": (
        ("gathered once", "own.root + own.layers * times)", "own.root + own.layers)", "test_communication"),
    ),
    "models/norms.py": (
        ("any norm is one operator", "return torch.allclose(", "return True or torch.allclose(", "test_norms"),
        ("another epsilon of norms", "self.weight, _epsilon(self))", "self.weight, 1e-5)", "test_norms"),
    ),
    "models/attention.py": (
        (
            "the rule nowhere applied",
            "_listed(some & ~every), _listed(every)",
            "_listed(some & False), _listed(some)",
            "test_blocks",
        ),
        ("scores unscaled", "alpha=scaling", "alpha=1.0", "test_parity"),
        ("branches without prompts", "parts = from_prompt,", "parts = 0 * from_prompt,", "test_parity"),
        (
            "scores in half",
            "queries.float() @ keys.float().mT",
            "(queries @ keys.mT).float()",
            "test_cache",
        ),
    ),
    "models/split_attention.py": (
        (
            "the larger sum for both",
            "torch.logaddexp(prompt_sum, own_sum)",
            "torch.maximum(prompt_sum, own_sum)",
            "test_split_attention",
        ),
        ("half a gradient", "of_query + of_own_query", "of_query", "test_split_attention"),
    ),
    "models/cache.py": (
        ("moves backwards", "tensor[targets] = tensor[sources]", "tensor[sources] = tensor[targets]", "test_sampler"),
        ("newest clip forgotten", "popitem(last=False)", "popitem(last=True)", "test_cache"),
    ),
    "models/linear.py": (
        ("mean for the bias", "gradient.sum(dim=0)", "gradient.mean(dim=0)", "test_linear"),
        ("half of the weight's gradient", "_matmul(gradient.T, x)", "_matmul(gradient.T, x) / 2", "test_linear"),
        ("no bias beside a packed weight", "x, packed, weight, bias,", "x, packed, weight, None,", "test_linear"),
        ("packed weights outlive the rollout", "layer.packed = None", "pass", "test_linear"),
    ),
    "models/lora.py": (
        ("alpha unscaled", "lora.alpha / lora.rank", "lora.alpha", "test_lora"),
        ("adapters stay off", "layer.enabled = True", "layer.enabled = False", "test_lora"),
    ),
    "models/policy.py": (
        ("masks that are copied", "(*rows, mask_row(keys))", "(*rows, keys)", "test_attention"),
        ("padding judged", "return [ids[:length]", "return [ids[:]", "test_rewards_table"),
        ("a completion without its end", "< lengths[:, None]", "< lengths[:, None] - 1", "test_ask"),
        ("stop token in the text", "row[:-1] if row and", "row if row and", "test_models test_rewards"),
        ("scale of logits inverted", "logits * scale", "logits / scale", "test_models"),
        (
            "any stop token for an answer's",
            "(ends or self.stop_ids)[0]",
            "self.stop_ids[0]",
            "test_models test_training",
        ),
        ("windows everywhere", 'window if kind == "sliding_attention" else None', "window", "test_models"),
    ),
    "models/loading.py": (
        (
            "masters in half",
            "master_dtype if target.requires_grad else dtype",
            "dtype",
            "test_training.py::test_bfloat16_computes_in_half_and_keeps_float32_weights",
        ),
        (
            "weights are the file",
            "dtype, copy=True), requires_grad=target.requires_grad)",
            "dtype), requires_grad=target.requires_grad)",
            "test_models.py::test_weights_are_not_the_file_they_were_read_from",
        ),
        ("surplus tensors ignored", "for name in stored.surplus]", "for name in ()]", "test_models"),
    ),
    "models/compose.py": (
        ("bias of a Llama", "weights[name].new_zeros(", "weights[name].new_ones(", "test_compose"),
        ("projector of unit scale", "generator=generator) * scale", "generator=generator)", "test_compose"),
        (
            "end of the position table",
            '["embed_positions.weight"][:positions]',
            '["embed_positions.weight"][-positions:]',
            "test_compose",
        ),
        (
            "a token of the template is spare",
            "token not in used and token not in tokenizer.chat_template",
            "token not in used",
            "test_compose",
        ),
        ("reserved tokens last", 'not ("reserved" in token or', '("reserved" in token or', "test_compose"),
        ("any head is taken", "if not difference <= TOLERANCE", "if difference < 0 * TOLERANCE", "test_compose"),
    ),
    "models/ctranslate2.py": (
        ("keys for queries", '("q_proj", "k_proj", "v_proj")', '("k_proj", "q_proj", "v_proj")', "test_import_model"),
        ("norms swapped", r"\1/encoder_attn_layer_norm", r"\1/final_layer_norm", "test_import_model"),
    ),
    "models/whisper.py": (
        ("an odd frame lost", "(frames - 1) // 2 + 1", "frames // 2", "test_parity"),
        ("clips cut where they end", "CONV_REACH = 2", "CONV_REACH = 0", "test_parity"),
        (
            "shorter clip sees padding",
            "len(set(frames)) > 1",
            "len(set(frames)) > 3",
            "test_parity",
        ),
    ),
    "models/audio_policy.py": (
        ("padding is a placeholder", "(ids == self.audio_id) & is_real", "ids == self.audio_id", "test_contract"),
    ),
    "models/stored.py": (
        ("experts of another rank", "self._convert(conversion, experts)", "self._convert(conversion)", "test_experts"),
        ("surplus hidden", "surplus.append(name)", "pass", "test_models"),
    ),
    "models/families/audioflamingo3.py": (
        ("every window the first", "seconds + index * most", "seconds + 0 * most", "test_contract"),
    ),
    "models/families/granite_speech.py": (
        ("padded by a window more", "-len(rows) % window", "window", "test_contract"),
    ),
    "launch/page/document.py": (
        ("markup in the data", "return text.translate(ESCAPES)", "return text", "test_page"),
        ("any script runs", "script-src {digest(script())}", "script-src 'unsafe-inline'", "test_page"),
    ),
    "launch/page/collect.py": (
        ("oldest steps alone", "for n in range(count)][::-1]", "for n in range(1, count + 1)][::-1]", "test_page"),
        ("clips of one part first", "for name in turn if name", "for name in sorted(filter(None, turn))", "test_page"),
        ("bounds of clips unsaid", "if clips > bounds.clips:", "if clips > 2 * bounds.clips:", "test_page"),
        ("clips sought here", "return Path(*full.parts[: -len(named.parts)])", "return Path()", "test_page"),
    ),
    "launch/page/recorded.py": (
        ("updates mixed", "values.transpose(0, 1).tolist()", "values.tolist()", "test_page"),
        (
            "padding is a token",
            "[row, :length].tolist()\n    for name, key",
            "[row].tolist()\n    for name, key",
            "test_page",
        ),
    ),
    "launch/page/sounds.py": (
        ("windows are one clip", "sha256(clip.key.encode())", "sha256(str(clip.source).encode())", "test_page"),
    ),
    "launch/watch.py": (
        ("any host is served", "not in HOSTS", "in ()", "test_page"),
        ("open to the network", '("127.0.0.1", port)', '("0.0.0.0", port)', "test_page"),
        ("sent again and again", "HTTPStatus.NOT_MODIFIED if known", "HTTPStatus.OK if known", "test_page"),
    ),
}
MUTANTS = [Mutant(file, *fault) for file, faults in FAULTS.items() for fault in faults]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants alone")
    parser.add_argument("--list", action="store_true", help="print the names and files, and run nothing")
    options = parser.parse_args(argv)
    chosen = [mutant for mutant in MUTANTS if not options.only or mutant.name in options.only]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:48} {mutant.file}")
        return 0
    for module in PRELOAD:
        __import__(module)
    with tempfile.TemporaryDirectory() as directory:
        copies = [_copy(Path(directory) / str(n)) for n in range(JOBS)]
        unchanged = Mutant("setup.cfg", "nothing", "", "", " ".join(sorted({m.tests for m in chosen})))
        failed = [result for result in _run_all([unchanged], copies[:1]) if not result.survived]
        if failed:
            print(f"the unchanged tree fails {failed[0].noticed}: mend that first", file=sys.stderr)
            return 1
        results = _run_all(chosen, copies)
    return _report(results)


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    status: int  # pytest's: 0 where all tests passed, 1 where one failed; -signal where the process was ended
    noticed: str  # the first test that failed
    seconds: float

    @property
    def survived(self) -> bool:
        return self.status == 0


def _report(results: Sequence[Result]) -> int:
    bad = [r for r in results if r.status > 1 or r.survived != bool(r.mutant.equivalent)]
    unexplained = [r.mutant.name for r in bad]
    survivors = [r for r in results if r.survived]
    print(f"{len(results) - len(survivors)} of {len(results)} noticed", end="")
    for result in survivors:
        print(f"\nsurvived: {result.mutant.name}: {result.mutant.equivalent or 'unexplained'}", end="")
    print(f"\nto be looked into: {', '.join(unexplained)}" if bad else "")
    return 1 if bad else 0


def _copy(target: Path) -> Path:
    """The tree without history, environment and compiled files. Its `hark` leads to its packages, not the installed."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "*.egg-info", "docs")
    shutil.copytree(ROOT, target, ignore=ignored)
    for package in PACKAGES:
        (target / "hark" / package).symlink_to(target / package)
    return target


def _run_all(mutants: Sequence[Mutant], copies: Sequence[Path]) -> list[Result]:
    """Run each mutant's tests, in as many copies at a time as there are."""
    waiting, free, running, results = list(mutants), list(copies), {}, []
    while waiting or running:
        while waiting and free:
            mutant, copy = waiting.pop(0), free.pop()
            running[_start(mutant, copy)] = mutant, copy, time.monotonic()
        process, status = os.wait()
        mutant, copy, began = running.pop(process)
        file = copy / mutant.file
        file.write_text((ROOT / mutant.file).read_text())
        free.append(copy)
        output = (copy / "output").read_text()
        first = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
        code = os.waitstatus_to_exitcode(status)
        noticed = first.group(1).removeprefix("tests/") if first else f"ended by {code}"
        result = Result(mutant, code, "SURVIVED" if code == 0 else noticed, time.monotonic() - began)
        if mutant.old:
            print(f"{mutant.name:40} | {mutant.file:33} | {result.noticed:110} | {result.seconds:5.1f} s", flush=True)
        results.append(result)
    return results


def mutated(mutant: Mutant) -> str:
    """The text of the file with the fault. Raises ValueError where the old text does not occur in it exactly once."""
    text = (ROOT / mutant.file).read_text()
    if mutant.old and text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}, not once"
        )
    return text.replace(mutant.old, mutant.new) if mutant.old else text


def _start(mutant: Mutant, copy: Path) -> int:
    """Fork a process that runs the tests of a mutant in a copy of the tree; its id."""
    (copy / mutant.file).write_text(mutated(mutant))
    process = os.fork()
    if process:
        return process
    signal.alarm(LIMIT if mutant.old else 10 * LIMIT)
    output = os.open(copy / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("hark", "tests")]:
        del sys.modules[name]
    status = 4
    try:
        status = _test(mutant, copy)
    finally:
        sys.stdout.flush()
        os._exit(status)


def _test(mutant: Mutant, copy: Path) -> int:
    import pytest

    import hark.grpo.loss

    if not Path(hark.grpo.loss.__file__).resolve().is_relative_to(copy.resolve()):
        raise RuntimeError(f"hark is {hark.grpo.loss.__file__}, not the copy")
    words = [word if ".py" in word else f"{word}.py" for word in mutant.tests.split()]
    files = list(dict.fromkeys(f"tests/{word}" for word in words))
    how = ["-x"] if mutant.old else ["-n", str(JOBS), "--dist", "worksteal"]
    return int(pytest.main([*files, *how, "-q", "-rfE", "--tb=line", "--show-capture=no", "-p", "no:cacheprovider"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
