"""What is drawn is a function of the prompt and its key, follows the policy's distribution, and ends where it says."""

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hark.grpo.branches import Branches, DecodePlan
from hark.grpo.distribution import draw_tokens
from hark.grpo.runtime.cuda import DelayedFlags, round_up
from hark.grpo.sampler import sample, uniform_numbers
from hark.models.attention import DecodeAttention
from hark.models.cache import GroupCache
from tests.conftest import Case

LIMIT = 8


def draw(case: Case, which=(0, 1, 2), keys=((0, 0, 0), (0, 0, 1), (0, 0, 2)), group_size=3, **more):
    prompts = [case.prompts[n] for n in which]
    settings = dict(group_size=group_size, max_new_tokens=LIMIT, temperature=1.0, keys=[keys[n] for n in which])
    return sample(case.policy, prompts, **(settings | more))


def groups(rollout):
    """Completions of each prompt as lists of ids."""
    rows = [row[keep].tolist() for row, keep in zip(rollout.tokens, rollout.mask, strict=True)]
    return [rows[first : first + rollout.group_size] for first in range(0, len(rows), rollout.group_size)]


def test_a_prompt_draws_the_same_completions_whatever_stands_beside_it(case):
    together = groups(draw(case))
    alone = [groups(draw(case, which=(n,)))[0] for n in range(3)]
    reordered = groups(draw(case, which=(2, 0, 1)))
    assert together == alone == [reordered[1], reordered[2], reordered[0]]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_prompt_draws_the_same_completions_however_many_are_decoded_at_a_time(case, batch):
    """Under a mode in which torch fills memory that it was not asked to clear with nan: none of it is read."""
    expected = draw(case, max_new_tokens=24)
    assert len(expected.mask.sum(dim=1).unique()) > 3, "branches have to end at different times"
    torch.use_deterministic_algorithms(True)
    try:
        rollout = draw(case, max_new_tokens=24, batch=batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert groups(rollout) == groups(expected)
    torch.testing.assert_close(rollout.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)  # as in test_parity.py


def test_a_full_grid_in_another_order_draws_the_same(case, monkeypatch):
    """A prompt takes the row of one that has ended, before that of one that goes on; one completion each fills them."""
    cells, decode = [], case.policy.decode

    def watched(embeddings, masks, positions, attend):
        if isinstance(attend, DecodeAttention) and attend.cell is not None:
            cells.append(attend.cell.tolist())
        return decode(embeddings, masks, positions, attend)

    monkeypatch.setattr(case.policy, "decode", watched)
    for seed in range(8):
        settings = dict(group_size=1, max_new_tokens=24, keys=[(seed, 0, n) for n in range(3)])
        assert groups(draw(case, batch=2, **settings)) == groups(draw(case, **settings))
    assert [1, 0] in cells and [0, 1] not in cells


@pytest.mark.parametrize("batch", [None, 1, 2])
def test_what_is_decoded_is_what_is_kept_and_what_is_attended_to_is_a_prompt_and_one_branch(case, monkeypatch, batch):
    """A completion's last token is never fed, so its branch costs one step less than it has tokens, and none later."""
    fed, seen, rows = [], [], []
    decode = case.policy.decode

    def watched(embeddings, masks, positions, attend):
        if isinstance(attend, DecodeAttention):
            fed.append(len(embeddings))
            seen.append(next(iter(masks.values())).shape[-1])
            rows.append(attend.rows)
        return decode(embeddings, masks, positions, attend)

    monkeypatch.setattr(case.policy, "decode", watched)
    rollout = draw(case, max_new_tokens=24, batch=batch)
    lengths = rollout.mask.sum(dim=1)
    assert sum(fed) == int((lengths - 1).sum())
    assert max(seen) <= max(len(prompt.ids) for prompt in case.prompts) + int(lengths.max()) - 1
    groups_last = lengths.unflatten(0, (3, -1)).amax(dim=1) - 1
    steps = {None: int(groups_last.max()), 1: int(groups_last.sum())}
    if batch == 2:  # in order of length, a third prompt begins when the first group has ended
        order = sorted(range(3), key=lambda n: -len(case.prompts[n].ids))
        first, second, third = (int(groups_last[n]) for n in order)
        steps[2] = max(first, second, min(first, second) + third)
    assert len(fed) == steps[batch]
    if batch is None:
        assert rows == [int((groups_last > t).sum()) for t in range(len(fed))], "prompts of ended groups are not read"


def test_a_step_waits_for_nothing_that_the_device_computes(case, monkeypatch):
    """On fake tensors any number that a step wanted to know would be an error; so a GPU could run it by itself."""
    inside = []
    step = Branches.feed

    def fake(self, plan, sizes):
        step(self, plan, sizes)
        with FakeTensorMode(allow_non_fake_inputs=True):
            step(self, DecodePlan(*(torch.empty(field.shape, dtype=field.dtype) for field in plan)), sizes)
        inside.append(sizes)

    monkeypatch.setattr(Branches, "feed", fake)
    draw(case)
    assert inside


def test_a_step_done_twice_is_done_once(case, monkeypatch):
    """So the run that makes libraries ready for recording it on a GPU may be a step of the rollout."""
    expected, step = draw(case, group_size=8), Branches.feed
    monkeypatch.setattr(Branches, "feed", lambda self, *args, **how: [step(self, *args, **how) for _ in "12"])
    rollout = draw(case, group_size=8)
    assert groups(rollout) == groups(expected) and torch.equal(rollout.stopped, expected.stopped)


def test_sizes_rounded_up_as_for_a_gpu_draw_the_same(case, monkeypatch):
    expected = draw(case, max_new_tokens=24, batch=2)
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        "hark.grpo.branches.round_up", lambda count, most, _, **least: round_up(count, most, cuda, **least)
    )
    rollout = draw(case, max_new_tokens=24, batch=2)
    assert groups(rollout) == groups(expected)
    torch.testing.assert_close(rollout.logprobs, expected.logprobs, atol=1e-5, rtol=1e-5)  # as in test_parity.py


@pytest.mark.parametrize("batch", [1, 3])
def test_to_learn_one_step_late_who_has_ended_as_on_a_gpu_draws_the_same(case, monkeypatch, batch):
    expected = draw(case, max_new_tokens=24)

    class Late(DelayedFlags):
        def __init__(self, flags):
            super().__init__(flags)
            self.before = [True] * len(flags)

        def __call__(self):
            seen, self.before = self.before, super().__call__()
            return seen

    monkeypatch.setattr("hark.grpo.branches.DelayedFlags", Late)
    rollout = draw(case, max_new_tokens=24, batch=batch)
    assert groups(rollout) == groups(expected) and torch.equal(rollout.stopped, expected.stopped)


def test_keys_and_values_are_freed_with_the_rollout(case, monkeypatch):
    """At once, not when Python next looks for cycles: on a GPU they are gigabytes that scoring needs."""
    caches = []

    def watched(*sizes):
        cache = GroupCache(*sizes)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr("hark.grpo.branches.GroupCache", watched)
    gc.disable()
    try:
        draw(case)
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


def test_a_decoder_without_rotary_embedding_has_no_frequencies_that_change(case):
    del case.policy.decoder.rotary_emb
    assert case.policy.dynamic_rope_type is None


def test_another_step_or_example_draws_other_completions_and_siblings_differ(case):
    first = groups(draw(case))
    other = groups(draw(case, keys=((0, 1, 0), (0, 1, 1), (0, 1, 2))))
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert all(len({tuple(row) for row in group}) > 1 for group in first)


def test_a_completion_ends_with_its_first_stop_token_or_at_the_limit(case):
    rollout = draw(case, group_size=8)
    stops = set(case.policy.stop_ids)
    assert 0 < rollout.stopped.sum() < len(rollout.stopped), "both ways to end are needed here"
    for tokens, mask, stopped in zip(rollout.tokens, rollout.mask, rollout.stopped, strict=True):
        length = int(mask.sum())
        assert mask[:length].all(), "the mask is one run from the start"
        ids = tokens[:length].tolist()
        assert (ids[-1] in stops) == bool(stopped)
        assert not stops & set(ids[:-1])
        assert stopped or length == LIMIT
        assert (tokens[length:] == case.policy.pad_id).all()


def test_logprobs_are_exactly_zero_at_padding_and_negative_elsewhere(case):
    rollout = draw(case)
    assert (rollout.logprobs[~rollout.mask] == 0).all()
    assert (rollout.logprobs[rollout.mask] < 0).all()


def test_a_suppressed_id_is_never_drawn_however_likely_it_is(case):
    likely = int(draw(case, temperature=0).tokens[0, 0])
    case.policy.suppressed_ids += (likely,)
    for temperature in (0, 1.0, 3.0):
        assert not (draw(case, temperature=temperature).tokens == likely).any()


def test_the_first_token_follows_the_policy_distribution(case):
    """2000 draws of one token against its probabilities; 4.5 standard deviations of the largest ones."""
    count = 2000
    rollout = draw(case, which=(0,), group_size=count, max_new_tokens=1, temperature=0.7)
    tokens = rollout.tokens[:, 0]
    probability = torch.zeros(tokens.max() + 1).scatter_(0, tokens, rollout.logprobs[:, 0].exp())
    share = torch.bincount(tokens) / count
    likely = probability.topk(5).indices
    deviation = (probability[likely] * (1 - probability[likely]) / count).sqrt()
    assert ((share - probability)[likely].abs() < 4.5 * deviation).all()


def test_drawing_inverts_the_cumulative_distribution():
    distribution = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log()
    uniform = torch.tensor([[0.0, 0.49, 0.51, 0.76, 1 - 2**-53]], dtype=torch.float64)
    assert draw_tokens(distribution, uniform).tolist() == [[0, 0, 2, 3, 3]]


def test_a_token_without_probability_is_never_drawn_and_a_rare_one_is():
    """The first uniform number, 0, is the first token's that has a share; a share of 1e-9 is not rounded away."""
    distribution = torch.tensor([[0.0, 0.5, 0.5]]).log()
    assert draw_tokens(distribution, torch.zeros(1, 1, dtype=torch.float64)).tolist() == [[1]]
    rare = torch.tensor([[0.5, 1e-9, 0.5]]).log()
    edges = rare.double().exp().cumsum(dim=-1)[0] / rare.double().exp().sum()
    assert draw_tokens(rare, edges[:2].mean().reshape(1, 1)).tolist() == [[1]]


def test_uniforms_are_the_same_on_every_machine():
    # Philox is a published algorithm: these digits are its, not this computer's.
    assert uniform_numbers((1, 2, 3), 1, 2).tolist() == [[0.7198955456932165, 0.012702050455707714]]


def test_sampling_without_keys_is_refused(case):
    with pytest.raises(ValueError, match="one key per prompt"):
        sample(case.policy, case.prompts, group_size=2, max_new_tokens=4, temperature=1.0)


@pytest.mark.parametrize("room", [1, 2, 5])
def test_a_cache_that_grows_with_the_completions_draws_the_same(case, monkeypatch, room):
    """To the bit, as the numbers that are read are the same; with prompts that start later in free rows."""
    settings = dict(max_new_tokens=24, batch=2, group_size=4)
    expected = draw(case, **settings)
    grown = []
    grow = GroupCache.grow

    def noted(cache: GroupCache, steps: int) -> bool:
        before, moved = cache.steps, grow(cache, steps)
        grown.append((before, cache.steps)) if moved else None
        assert all(tensor.shape[2] == cache.steps for tensor in cache.branches(0))
        return moved

    monkeypatch.setattr("hark.models.cache.STEPS", room)
    monkeypatch.setattr(GroupCache, "grow", noted)
    rollout = draw(case, **settings)
    assert torch.equal(rollout.tokens, expected.tokens) and torch.equal(rollout.logprobs, expected.logprobs)
    longest = int(expected.mask.sum(dim=1).max()) - 1  # the last token is not fed
    sizes = [room, *(after for _, after in grown)]
    assert longest <= sizes[-1] <= 23 and len(grown) > 1, "as far as the longest completion, doubling"
    assert all(after == min(23, 2 * before) for before, after in grown)
