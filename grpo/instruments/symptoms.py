"""Symptoms of a run that goes wrong: the rules that find them in its figures, and what to try.

Each rule is a function of the lines until now, and returns what it found, in words; "" if it found nothing. Rules
compare means over windows of steps with their standard errors, because the figures of one step are noisy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, median
from typing import NamedTuple

from hark.grpo.instruments.history import LONG, WINDOW, Line, Lines, rise

SURE = 3.0  # standard errors by which a mean has risen: 1 in 700 by chance, as a rule is applied at each step
DOUBT = 2.0  # standard errors below which a mean has not risen: 1 in 40 of those that did not rise exceed it
NEARLY_ALL, NEARLY_NONE = 0.95, 0.05  # shares of the groups or completions of a window
GAP_BOUND = {"float32": 1e-5, "bfloat16": 0.05}  # rounding of logprobs of size 5 is some 1e-7 and some 1e-2
KL_LARGE = 0.1  # nats per token; below, the policy is near the reference
KL_GROWTH = 1.5  # times the KL of the steps before; a drift without aim grows as the root of the steps, here by 1.8
ENTROPY_LEFT = 0.2  # of the entropy at the start; a run that learns keeps about half while groups still differ
FORMAT_RISE, FORMAT_LEARNT = 0.1, 0.9  # of the format reward, 0 to 1
SOUND_GAIN = 0.15  # accuracy that sound must be able to add: fewer questions than show this decide nothing
VARIES = 0.2  # share of groups in which a reward differs, from which on it has something to teach
NO_SHARE = 0.02  # of the variance; the advantage then depends on this reward by a seventh (the root) at most
FEW_DISTINCT = 1.5  # completions; with fewer, most groups consist of copies of one
CLIPPED = 0.3  # share of tokens without gradient from the advantage; common are 0 to 0.2
GRADIENT_GROWTH = 5.0  # times the median gradient norm of the first steps; noise changes it by less than 2
LOADING, WAITING = 0.2, 0.25  # shares of the step's time, from which on more speed is to be gained there


def reward_flat(lines: Lines) -> str:
    first, last = lines.first("reward", LONG), lines.last("reward", LONG)
    if not rise(first, last) < DOUBT:
        return ""
    return f"the mean reward is {fmean(last):.3g} in the last {LONG} steps, and was {fmean(first):.3g} in the first"


def groups_equal(lines: Lines) -> str:
    share = lines.last("equal_reward_share")
    if not share or fmean(share) < NEARLY_ALL:
        return ""
    return f"in {fmean(share):.0%} of the groups of the last {WINDOW} steps all rewards are equal"


def sampler_gap(lines: Lines) -> str:
    gap, bound = lines.last("sampler_gap", 1), GAP_BOUND.get(lines.dtype, GAP_BOUND["float32"])
    if not gap or gap[0] <= bound:
        return ""
    return f"the sampler gap is {gap[0]:.2g}, and rounding explains {bound:g}"


def kl_without_reward(lines: Lines) -> str:
    kl, reward = ((lines.last(name, LONG, before=LONG), lines.last(name, LONG)) for name in ("kl", "reward"))
    if not all(kl) or not rise(*reward) < DOUBT:
        return ""
    before, now = map(median, kl)  # the k3 estimate of a step may be many times its mean
    if now < max(KL_LARGE, KL_GROWTH * before):
        return ""
    return f"the KL to the reference has risen from {before:.2g} to {now:.2g} in {LONG} steps, and the reward has not"


def entropy_collapse(lines: Lines) -> str:
    first, last = lines.first("entropy"), lines.last("entropy")
    if not lines.last("reward") or not first or not last or fmean(last) >= ENTROPY_LEFT * fmean(first):
        return ""
    return f"the entropy has fallen from {fmean(first):.2g} to {fmean(last):.2g} nats per token"


def all_truncated(lines: Lines) -> str:
    stopped = lines.last("stopped_share")
    if not stopped or fmean(stopped) > NEARLY_NONE:
        return ""
    return f"{1 - fmean(stopped):.0%} of the completions of the last {WINDOW} steps were cut off"


def format_only(lines: Lines) -> str:
    form, right = (
        (lines.first(f"reward/{name}", LONG), lines.last(f"reward/{name}", LONG)) for name in ("format", "accuracy")
    )
    if not rise(*form) > SURE or not rise(*right) < DOUBT:
        return ""
    before, now = map(fmean, form)
    if now < FORMAT_LEARNT or now - before < FORMAT_RISE:
        return ""
    still = f"the accuracy reward is still {fmean(right[1]):.2f}"
    return f"the format reward has risen from {before:.2f} to {now:.2f}, and {still}"


def deaf(lines: Lines) -> str:
    if len(lines.evaluations) < 2 or not all(map(_adds_nothing, lines.evaluations)):
        return ""
    accuracy, silent = (lines.evaluations[-1][name] for name in ("accuracy", "silent_accuracy"))
    return f"the accuracy is {accuracy:.1%} with sound and {silent:.1%} without"


def _adds_nothing(evaluation: Line) -> bool:
    """Whether sound adds less than two standard errors, on enough questions to show SOUND_GAIN.

    Each share has a right and a wrong answer more (Agresti and Caffo, The American Statistician 54, 2000), so that the
    error is not 0 where all answers are right or all are wrong.
    """
    if any(evaluation.get(name) is None for name in ("accuracy", "silent_accuracy", "questions")):
        return False
    total = evaluation["questions"] + 2
    shares = [(evaluation[name] * (total - 2) + 1) / total for name in ("accuracy", "silent_accuracy")]
    error = math.sqrt(sum(share * (1 - share) / total for share in shares))
    return DOUBT * error < SOUND_GAIN and shares[0] - shares[1] < DOUBT * error


def one_reward(lines: Lines) -> str:
    for name in lines.names("variance_share/"):
        equal, share = lines.last(f"equal_share/{name}"), lines.last(f"variance_share/{name}")
        if equal and share and 1 - fmean(equal) > VARIES and fmean(share) < NO_SHARE:
            return (
                f"the reward {name} differs in {1 - fmean(equal):.0%} of the groups, and makes {fmean(share):.1%} of "
                "the variance of the weighted sum"
            )
    return ""


def duplicates(lines: Lines) -> str:
    distinct = lines.last("distinct_completions")
    if not distinct or fmean(distinct) > FEW_DISTINCT:
        return ""
    return f"a group of the last {WINDOW} steps has {fmean(distinct):.2f} distinct completions on average"


def rate_too_high(lines: Lines) -> str:
    clipped = lines.last("clip_share")
    if clipped and fmean(clipped) > CLIPPED:
        return f"{fmean(clipped):.0%} of the tokens of the last {WINDOW} steps were clipped"
    first, last = lines.first("grad_norm"), lines.last("grad_norm")
    if not first or not last or median(last) <= GRADIENT_GROWTH * median(first) * _more_groups(lines):
        return ""
    return f"the median gradient norm has grown from {median(first):.2g} to {median(last):.2g}"


def _more_groups(lines: Lines) -> float:
    """How many times as many groups teach as in the first steps: the gradient is a mean over all groups."""
    first, last = lines.first("equal_reward_share"), lines.last("equal_reward_share")
    return max((1 - fmean(last)) / max(1 - fmean(first), 1e-9), 1) if first and last else 1


def loader_starves(lines: Lines) -> str:
    share = _share_of_time(lines, "seconds/load")
    return f"{share:.0%} of the time is spent waiting for prompts" if share > LOADING else ""


def ranks_wait(lines: Lines) -> str:
    share = _share_of_time(lines, "seconds/waiting")
    return f"after sampling, the ranks wait for the slowest for {share:.0%} of the time" if share > WAITING else ""


def _share_of_time(lines: Lines, name: str) -> float:
    """The median share of a step's time; a mean would be that of one slow step."""
    seconds, step = lines.last(name), lines.last("seconds/step")
    return median(part / whole for part, whole in zip(seconds, step, strict=True)) if seconds and step else 0.0


class Symptom(NamedTuple):
    """A symptom: when it is there, the function that says so, and what to try. docs/diagnosis.md explains each."""

    name: str
    rule: str
    find: Callable[[Lines], str]
    advice: str


SYMPTOMS = (
    Symptom(
        "reward flat",
        f"the mean reward of the last {LONG} steps is not {DOUBT:g} standard errors above that of the first {LONG}",
        reward_flat,
        "read some completions (log.completions); fine-tune on right answers first (`hark sft`), raise optim.lr, or "
        "add a reward that is easier to get",
    ),
    Symptom(
        "groups all equal",
        f"{NEARLY_ALL:.0%} or more of the groups of the last {WINDOW} steps have equal rewards",
        groups_equal,
        "such groups teach nothing; if the rewards are low, fine-tune on right answers first (`hark sft`), raise "
        "rollout.group_size or rollout.temperature, or add a reward that is easier to get; if they are high, the "
        "questions are too easy; rollout.refill, or `hark pass-rate` and data.band, replace such questions",
    ),
    Symptom(
        "sampler gap",
        f"`sampler_gap` of a step is above {GAP_BOUND['float32']:g} in float32, above {GAP_BOUND['bfloat16']:g} in "
        "bfloat16",
        sampler_gap,
        "the policy is trained on probabilities that it did not sample with; if the policy is your own, run `hark "
        "check-policy`; in bfloat16, try model.dtype=float32 for a few steps",
    ),
    Symptom(
        "KL rises without reward",
        f"from the {LONG} steps before to the last {LONG}, the median of `kl` has risen to {KL_GROWTH:g} times its "
        f"value or more, to {KL_LARGE:g} or more, and `reward` has not risen by {DOUBT:g} standard errors",
        kl_without_reward,
        "lower optim.lr or raise loss.beta; read some completions for a reward that is obtained by a trick",
    ),
    Symptom(
        "entropy collapse",
        f"`entropy` of the last {WINDOW} steps is below {ENTROPY_LEFT:g} of that of the first {WINDOW}, in GRPO",
        entropy_collapse,
        "lower optim.lr, raise loss.beta, loss.clip_high or rollout.temperature; if the accuracy is near 1, the "
        "questions are too easy, and the run may end",
    ),
    Symptom(
        "all truncated",
        f"{NEARLY_NONE:.0%} or fewer of the completions of the last {WINDOW} steps have ended",
        all_truncated,
        "raise rollout.max_new_tokens, or fine-tune on right answers first (`hark sft`), so that the model ends its "
        "answers",
    ),
    Symptom(
        "format learnt, content not",
        f"from the first {LONG} steps to the last {LONG}, `reward/format` has risen by {FORMAT_RISE:g} or more, to "
        f"{FORMAT_LEARNT:g} or more, and `reward/accuracy` not by {DOUBT:g} standard errors",
        format_only,
        "lower the weight of format in reward.weights now that it is learnt, or teach it before (`hark sft`); check "
        "that the accuracy can rise: `hark ask RUN CLIP QUESTION --samples 8`",
    ),
    Symptom(
        "does not listen",
        f"in the last two evaluations, `accuracy` is less than {DOUBT:g} standard errors above `silent_accuracy`, and "
        f"{DOUBT:g} standard errors are less than {SOUND_GAIN:g}; needs evaluation.silent=true",
        deaf,
        "listen to some clips and run `hark check-data` on the questions; remove questions that text alone answers, "
        "train the tower or projector (model.train), or raise data.silent_share",
    ),
    Symptom(
        "one reward dominates",
        f"over the last {WINDOW} steps a reward differs in more than {VARIES:.0%} of the groups, and its share of the "
        f"variance within groups is below {NO_SHARE:.0%}",
        one_reward,
        "raise its weight in reward.weights, or scale the other rewards down to its size",
    ),
    Symptom(
        "completions duplicated",
        f"a group of the last {WINDOW} steps has {FEW_DISTINCT:g} distinct completions or fewer on average",
        duplicates,
        "raise rollout.temperature, or start from a model that is less sure of its answers (fewer steps of `hark sft`)",
    ),
    Symptom(
        "learning rate too high",
        f"more than {CLIPPED:.0%} of the tokens of the last {WINDOW} steps were clipped, or the median of `grad_norm` "
        f"is above {GRADIENT_GROWTH:g} times that of the first {WINDOW} (more, if more groups differ in their rewards)",
        rate_too_high,
        "lower optim.lr or loss.inner_epochs, or add optim.warmup_steps",
    ),
    Symptom(
        "loader starves the step",
        f"the median of `seconds/load` / `seconds/step` over the last {WINDOW} steps is above {LOADING:g}",
        loader_starves,
        "raise data.workers, put the clips on a faster disk, or store them at the model's sample rate",
    ),
    Symptom(
        "ranks wait for one",
        f"the median of `seconds/waiting` / `seconds/step` over the last {WINDOW} steps is above {WAITING:g}",
        ranks_wait,
        "see whether another program uses one rank's device; else lower rollout.max_new_tokens, or give each rank more "
        "prompts (optim.prompts_per_step), whose lengths then even out",
    ),
)
