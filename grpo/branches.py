"""The completions that grow at the moment, and the step that gives each of them its next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hark.grpo.distribution import draw_tokens, log_distribution
from hark.grpo.runtime.cuda import CudaGraphs, DelayedFlags, round_up, send
from hark.grpo.tree import Layout, branches_layout, prompt_layout, tree_masks
from hark.grpo.types import Rollout
from hark.models.attention import DecodeAttention, PrefillAttention
from hark.models.cache import GroupCache
from hark.models.policy import Policy, Prompt


@dataclass
class Branch:
    """A growing completion: which of the B it is, where it stands in the grid of R rows by G, and its tokens so far."""

    completion: int
    place: int
    tokens: int = 1


class Sizes(NamedTuple):
    """How much of everything a step is about: branches, rows of the cache, tokens of a prompt and of a branch."""

    branches: int
    rows: int
    prompt: int
    steps: int


class Branches:
    """Groups of up to R prompts at a time: `begin` prefills prompts, `grow` adds a token to each of their branches.

    The device holds what was drawn, of all B completions and of one more that takes what belongs to none, and the keys
    and values of those alive; the host holds who is alive. What has drawn a stop token is known on the device only,
    until `remove_finished` asks.
    uniforms: (B, T) float64 in [0, 1), from which tokens are drawn; None takes the likeliest.
    graphs: record the step on a GPU, so that no time goes into launching its kernels one by one.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        limit: int,
        temperature: float,
        uniforms: torch.Tensor | None,
        rows: int,
        stop: bool,
        graphs: bool,
    ):
        self.policy, self.prompts, self.group_size, self.limit = policy, tuple(prompts), group_size, limit
        self.temperature, self.rows = temperature or 1.0, rows
        self.uniforms = None if uniforms is None else torch.nn.functional.pad(uniforms, (0, 0, 0, 1))
        device, self.count = policy.device, len(prompts) * group_size
        self.stop_ids = torch.tensor(policy.stop_ids if stop else (), device=device)
        self.tokens = torch.full((self.count + 1, limit), policy.pad_id, device=device)
        self.mask = torch.zeros(self.tokens.shape, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(self.tokens.shape, device=device)
        self.running = torch.arange(self.count + 1, device=device) < self.count
        self.stopped = torch.zeros_like(self.running)
        longest = max(len(prompt.ids) for prompt in prompts)
        self.cache = GroupCache(rows, longest, rows * group_size, limit - 1)
        self._look = DelayedFlags(self.running)
        self._recorded = CudaGraphs() if graphs and device.type == "cuda" else None
        self._alive: list[Branch] = []  # in the order in which they stand in the cache
        self._prompt_of: list[int | None] = []  # by row of the cache

    @property
    def alive(self) -> bool:
        """Whether any branch still grows."""
        return any(branch.completion < self.count for branch in self._alive)

    @property
    def free(self) -> int:
        """How many prompts can be begun now."""
        return self.rows - sum(n is not None for n in self._prompt_of)

    def prefill(self, chosen: Sequence[int]) -> None:
        """PrefillAttention prompts, given by number, and draw the first token of each of their completions."""
        prompts = [self.prompts[n] for n in chosen]
        embeddings, lengths = self.policy.embed(prompts)  # (N, P, D), (N,)
        prompt = prompt_layout(lengths, embeddings.shape[1])
        masks = tree_masks(self.policy.windows, prompt, prompt, prompt=embeddings.shape[1])
        hidden = self.policy.decode(
            embeddings, masks, prompt.position, PrefillAttention(self.cache, self._assign_rows(chosen))
        )
        last = hidden[torch.arange(len(chosen), device=hidden.device), lengths - 1]  # (N, D)
        first = torch.tensor(chosen, device=hidden.device)[:, None] * self.group_size
        completion = first + torch.arange(self.group_size, device=hidden.device)  # (N, G)
        self._draw(last, completion, torch.zeros_like(completion))

    def decode_step(self) -> None:
        """Feed every branch the token it drew last, and draw its next one."""
        sizes = self._sizes()
        plan = send(self._plan(sizes), self.tokens.device)
        if self._recorded is None:
            self._step(plan, sizes)
        else:
            self._recorded(self._step, plan, sizes)
        for branch in self._alive:
            branch.tokens += 1

    def remove_finished(self, *, keep_rows: bool) -> None:
        """Let go of the branches that have ended, and close the gaps they leave.

        keep_rows: leave a prompt's row where it is although prompts before it have ended, because others will follow.
        """
        running, capacity, device = self._look(), self.rows * self.group_size, self.tokens.device
        kept = [running[branch.completion] and branch.tokens < self.limit for branch in self._alive]
        for branch in (branch for branch, is_kept in zip(self._alive, kept, strict=True) if not is_kept):
            branch.completion, branch.tokens = self.count, 1  # idle: it is fed, if at all, as what belongs to none
        # To move keys and values costs a GPU more than to feed idle branches, until a smaller size will do.
        closes = round_up(sum(kept), capacity, device) < round_up(len(kept), capacity, device)
        if closes or keep_rows and not all(kept):
            self._close_branches(kept)
            if not keep_rows:
                self._close_rows()

    def rollout(self) -> Rollout:
        """All completions, in the order of the prompts."""
        cells = slice(self.count), slice(int(self.mask.sum(dim=1).max()))
        tokens, mask, logprobs = (tensor[cells] for tensor in (self.tokens, self.mask, self.logprobs))
        return Rollout(self.prompts, self.group_size, tokens, mask, logprobs, self.stopped[: self.count])

    def _sizes(self) -> Sizes:
        device, capacity = self.tokens.device, self.rows * self.group_size
        lengths = [len(self.prompts[n].ids) for n in self._prompt_of if n is not None]
        return Sizes(
            branches=round_up(len(self._alive), capacity, device),
            rows=round_up(len(self._prompt_of), self.rows, device),
            prompt=round_up(max(lengths), self.cache.prompt, device),
            steps=round_up(max(branch.tokens for branch in self._alive), self.limit - 1, device, least=32),
        )

    def _plan(self, sizes: Sizes) -> list[int]:
        """For each branch its completion, step, place and prompt's length; then for each place the branch there.

        What fills up to the sizes belongs to the completion that is none.
        """
        grid, idle = [0] * (sizes.rows * self.group_size), sizes.branches - len(self._alive)
        columns: list[list[int]] = [[], [], [], []]
        for slot, branch in enumerate(self._alive):
            grid[branch.place] = slot
            length = len(self.prompts[self._prompt_of[branch.place // self.group_size]].ids)
            for column, value in zip(
                columns, (branch.completion, branch.tokens - 1, branch.place, length), strict=True
            ):
                column.append(value)
        fill = (self.count, 0, 0, 1)
        return [value for column, own in zip(columns, fill, strict=True) for value in column + [own] * idle] + grid

    def _step(self, plan: torch.Tensor, sizes: Sizes) -> None:
        """Feed the branches of a plan their last tokens, and draw the next; done twice, it is done once."""
        b = sizes.branches
        completion, step, place, length, grid = plan.split([b, b, b, b, len(plan) - 4 * b])
        position = (length + step)[:, None]
        fed = Layout(torch.zeros_like(position), position, torch.ones_like(position, dtype=torch.bool))
        keys = prompt_layout(length, sizes.prompt) + branches_layout(length, 1, sizes.steps)
        embedded = self.policy.embed_tokens(self.tokens[completion, step])[:, None]  # (b, 1, D)
        growth = DecodeAttention(self.cache, step, place, grid, sizes.rows, sizes.prompt, sizes.steps)
        hidden = self.policy.decode(embedded, tree_masks(self.policy.windows, fed, keys), position, growth)
        self._draw(hidden[:, 0], completion[:, None], step[:, None] + 1)

    def _draw(self, hidden: torch.Tensor, completion: torch.Tensor, at: torch.Tensor) -> None:
        """Draw token `at` (n, g) of completions (n, g), g of them from each hidden state (n, D)."""
        distribution = log_distribution(self.policy, hidden, self.temperature)  # (n, V)
        if self.uniforms is None:
            drawn = distribution.argmax(dim=-1, keepdim=True).expand_as(completion)
        else:
            drawn = draw_tokens(distribution, self.uniforms[completion, at])
        running = self.running[completion]
        for kept, new in ((self.tokens, drawn), (self.mask, running), (self.logprobs, distribution.gather(-1, drawn))):
            kept[completion, at] = torch.where(running, new, kept[completion, at])
        stopped = running & (drawn[..., None] == self.stop_ids).any(dim=-1)
        self.stopped[completion] |= stopped
        self.running[completion] = running & ~stopped

    def _assign_rows(self, chosen: Sequence[int]) -> list[int]:
        """Give prompts rows of the cache, and their branches places in it."""
        self._prompt_of += [None] * max(0, len(chosen) - self._prompt_of.count(None))
        rows = [row for row, n in enumerate(self._prompt_of) if n is None][: len(chosen)]
        for row, n in zip(rows, chosen, strict=True):
            self._prompt_of[row] = n
            first, place = n * self.group_size, row * self.group_size
            self._alive += [Branch(first + g, place + g) for g in range(self.group_size)]
        return rows

    def _close_branches(self, kept: Sequence[bool]) -> None:
        """Bring the branches that are kept to the front of the cache."""
        moves = _closing(kept)
        self.cache.move_branches(*self._sent(moves), max(branch.tokens for branch in self._alive) - 1)
        self._alive = _closed(self._alive, moves, sum(kept))
        seated = {branch.place // self.group_size for branch in self._alive}
        self._prompt_of = [n if row in seated else None for row, n in enumerate(self._prompt_of)]

    def _close_rows(self) -> None:
        """Bring the prompts that have branches to the front of the cache."""
        kept = [n is not None for n in self._prompt_of]
        moves = _closing(kept)
        self.cache.move_rows(*self._sent(moves))
        self._prompt_of = _closed(self._prompt_of, moves, sum(kept))
        for branch in self._alive:
            row, g = divmod(branch.place, self.group_size)
            branch.place = dict(moves).get(row, row) * self.group_size + g

    def _sent(self, moves: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        return [send([move[end] for move in moves], self.tokens.device) for end in range(2)]


def _closing(kept: Sequence[bool]) -> list[tuple[int, int]]:
    """Moves (from, to) that bring what is kept to the front: the last ones into the gaps."""
    count = sum(kept)
    sources = [i for i in range(count, len(kept)) if kept[i]]
    return list(zip(sources, [i for i in range(count) if not kept[i]], strict=True))


def _closed(items: list, moves: Sequence[tuple[int, int]], count: int) -> list:
    """The items that are left after moves."""
    items = list(items)
    for source, target in moves:
        items[target] = items[source]
    return items[:count]
