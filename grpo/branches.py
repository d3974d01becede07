"""The completions that are being decoded, and the step that draws the next token of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from hark.grpo.distribution import draw_tokens, log_distribution
from hark.grpo.prefill import Prefill, Prefix, last_states
from hark.grpo.recorded import RecordedSteps
from hark.grpo.runtime.cuda import DelayedFlags, round_up, send
from hark.grpo.runtime.threads import paying_threads
from hark.grpo.tree import Layout, branches_layout, prompt_layout, tree_masks
from hark.grpo.types import Rollout
from hark.models.attention import DecodeAttention, PrefillAttention, PromptAttention
from hark.models.cache import GroupCache
from hark.models.policy import Policy, Prompt


@dataclass
class Branch:
    """A completion that is being decoded.

    completion: its index among the B completions. cell: its index in a grid of R cache rows with G cells each. tokens:
    how many are drawn so far.
    """

    completion: int
    cell: int
    tokens: int = 1


class Sizes(NamedTuple):
    """The sizes of a decode step's tensors: branches, cache rows, tokens of a prompt and tokens of a branch.

    whole: whether the branches fill the grid of cells, in order.
    """

    branches: int
    rows: int
    prompt: int
    steps: int
    whole: bool


class DecodePlan(NamedTuple):
    """What a decode step feeds, as tensors on the device.

    For each branch, in the order of the cache: its completion, the index of the token that is fed, its cell in the
    grid, and the length of its prompt. branch_of_cell: for each cell of the grid the branch in it; 0 if it is empty.
    """

    completion: torch.Tensor
    step: torch.Tensor
    cell: torch.Tensor
    prompt_length: torch.Tensor
    branch_of_cell: torch.Tensor


class Branches:
    """Decodes groups of up to R prompts at a time.

    `prefill` starts prompts, `decode_step` adds a token to each of their branches, `remove_finished` frees cache rows.

    The tensors of tokens, masks and logprobs have a row for each of the B completions. Row B is a dummy row, to which
    padding and finished branches write. Keys and values are kept for the current branches only. The host has the list
    of these; which of them have drawn a stop token is stored on the device, and `remove_finished` reads it.

    uniforms: (B, T) float64 in [0, 1), from which tokens are drawn; None takes the most likely token.
    recorded: does the decode steps as CUDA graphs, which saves the time of launching their kernels; None without.
    keep_prefill: keep the graph of the prompts' forward, if all are prefilled together.
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
        recorded: RecordedSteps | None,
        keep_prefill: bool,
    ):
        self.policy, self.prompts, self.group_size, self.limit = policy, tuple(prompts), group_size, limit
        self.temperature, self.rows = temperature or 1.0, rows
        device, self.count = policy.device, len(prompts) * group_size
        longest = max(len(prompt.ids) for prompt in prompts)
        policy.check_length(longest + limit - 1)
        sizes = rows, longest, rows * group_size, limit - 1
        self.cache = recorded.begin((group_size, temperature), *sizes) if recorded else GroupCache(*sizes)
        keep = recorded.keep if recorded else lambda name, values: values
        numbers = None if uniforms is None else torch.nn.functional.pad(uniforms, (0, 0, 0, 1))
        self.uniforms = None if numbers is None else keep("uniforms", numbers)
        self.stop_ids = keep("stop_ids", torch.tensor(policy.stop_ids if stop else (), device=device))
        self.tokens = keep("tokens", torch.full((self.count + 1, limit), policy.pad_id, device=device))
        self.mask = keep("mask", torch.zeros(self.tokens.shape, dtype=torch.bool, device=device))
        self.logprobs = keep("logprobs", torch.zeros(self.tokens.shape, device=device))
        self.running = keep("running", torch.arange(self.count + 1, device=device) < self.count)
        self.stopped = keep("stopped", torch.zeros_like(self.running))
        self._read_running = DelayedFlags(self.running)
        self._recorded = recorded
        dtype = policy.decoder.get_input_embeddings().weight.dtype
        self._adapts_threads = device.type == "cpu" and dtype == torch.float32  # see grpo/runtime/threads.py
        self._keep_prefill = keep_prefill
        self._prefill: Prefill | None = None
        self._branches: list[Branch] = []  # in the order of the cache
        self._prompt_of_row: list[int | None] = []  # None where the row is free

    @property
    def alive(self) -> bool:
        """Whether any current branch is not finished."""
        return any(branch.completion < self.count for branch in self._branches)

    @property
    def free(self) -> int:
        """How many prompts can be prefilled now."""
        return self.rows - sum(n is not None for n in self._prompt_of_row)

    def prefill(self, chosen: Sequence[int]) -> None:
        """Prefill prompts, given by index, and draw the first token of each of their completions."""
        prompts, kept = [self.prompts[n] for n in chosen], PromptAttention() if self._keep_prefill else None
        with torch.set_grad_enabled(self._keep_prefill):
            last = last_states(self.policy, prompts, PrefillAttention(self.cache, self._assign_rows(chosen), kept))
        if kept is not None:
            self._prefill = Prefill(Prefix(last, kept.layers), chosen, [len(prompt.ids) for prompt in prompts])
        first = torch.tensor(chosen, device=last.device)[:, None] * self.group_size
        completion = first + torch.arange(self.group_size, device=last.device)  # (N, G)
        self._draw(last.detach(), completion, torch.zeros_like(completion))

    def decode_step(self) -> None:
        """Feed every branch its last token, and draw its next one."""
        sizes = self._sizes()
        plan = self._plan(sizes)
        moved = self.cache.grow(sizes.steps)
        step = partial(self.feed, sizes=sizes)
        if self._recorded is not None:
            if moved:
                self._recorded.forget()
            self._recorded(step, plan, sizes)
        elif self._adapts_threads:
            paying_threads(torch.get_num_threads())(partial(step, plan), self.logprobs)
        else:
            step(plan)
        for branch in self._branches:
            branch.tokens += 1

    def remove_finished(self, *, keep_rows: bool) -> None:
        """Remove the branches that have ended.

        keep_rows: leave the prompts in their cache rows, because waiting prompts will take the rows that became free.
        """
        running, capacity, device = self._read_running(), self.rows * self.group_size, self.tokens.device
        kept = [running[branch.completion] and branch.tokens < self.limit for branch in self._branches]
        for branch, is_kept in zip(self._branches, kept, strict=True):
            if not is_kept:
                branch.completion, branch.tokens = self.count, 1  # until it is removed, it writes to the dummy row
        # On a GPU, moving keys and values costs more than feeding finished branches, unless the rounded size shrinks.
        shrinks = round_up(sum(kept), capacity, device) < round_up(len(kept), capacity, device)
        if shrinks or keep_rows and not all(kept):
            self._compact_branches(kept)
            if not keep_rows:
                self._compact_rows()

    def rollout(self) -> Rollout:
        """All completions, in the order of the prompts; ends the rollout."""
        used = slice(self.count), slice(int(self.mask.sum(dim=1).max()))
        every = self.tokens[used], self.mask[used], self.logprobs[used], self.stopped[: self.count]
        # Copies, because recorded steps write to the same tensors in the next rollout.
        tokens, mask, logprobs, stopped = (tensor.clone() for tensor in every)
        rollout = Rollout(self.prompts, self.group_size, tokens, mask, logprobs, stopped, prefill=self._prefill)
        if self._recorded is not None:
            self._recorded.end()
        return rollout

    def _sizes(self) -> Sizes:
        device, capacity = self.tokens.device, self.rows * self.group_size
        lengths = [len(self.prompts[n].ids) for n in self._prompt_of_row if n is not None]
        branches = round_up(len(self._branches), capacity, device)
        rows = round_up(len(self._prompt_of_row), self.rows, device)
        cells = [branch.cell for branch in self._branches]
        return Sizes(
            branches=branches,
            rows=rows,
            prompt=round_up(max(lengths), self.cache.prompt, device),
            steps=round_up(max(branch.tokens for branch in self._branches), self.limit - 1, device, least=32),
            whole=len(cells) == branches and cells == list(range(rows * self.group_size)),
        )

    def _plan(self, sizes: Sizes) -> DecodePlan:
        """The plan of the next step, padded to the sizes by token 0 of the dummy row after a prompt of 1 token."""
        branches, padding = self._branches, sizes.branches - len(self._branches)
        branch_of_cell = [0] * (sizes.rows * self.group_size)
        for index, branch in enumerate(branches):
            branch_of_cell[branch.cell] = index
        columns = (
            [branch.completion for branch in branches] + [self.count] * padding,
            [branch.tokens - 1 for branch in branches] + [0] * padding,
            [branch.cell for branch in branches] + [0] * padding,
            [len(self._prompt_of(branch).ids) for branch in branches] + [1] * padding,
            branch_of_cell,
        )
        return DecodePlan(*(send(column, self.tokens.device) for column in columns))

    def _prompt_of(self, branch: Branch) -> Prompt:
        n = self._prompt_of_row[branch.cell // self.group_size]
        assert n is not None  # a row is free only when none of its branches is left
        return self.prompts[n]

    def feed(self, plan: DecodePlan, sizes: Sizes) -> None:
        """Feed the last token of each branch, and draw the next one. Repeating the call changes nothing."""
        position = (plan.prompt_length + plan.step)[:, None]
        fed = Layout(torch.zeros_like(position), position, torch.ones_like(position, dtype=torch.bool))
        keys = prompt_layout(plan.prompt_length, sizes.prompt) + branches_layout(plan.prompt_length, 1, sizes.steps)
        embedded = self.policy.embed_tokens(self.tokens[plan.completion, plan.step])[:, None]  # (b, 1, D)
        cell = None if sizes.whole else plan.cell
        read = sizes.rows, sizes.prompt, sizes.steps
        attention = DecodeAttention(self.cache, plan.step, cell, plan.branch_of_cell, *read)
        hidden = self.policy.decode(embedded, tree_masks(self.policy.windows, fed, keys), position, attention)
        self._draw(hidden[:, 0], plan.completion[:, None], plan.step[:, None] + 1)

    def _draw(self, hidden: torch.Tensor, completion: torch.Tensor, at: torch.Tensor) -> None:
        """Draw token `at` (n, g) of completions (n, g); each hidden state (n, D) predicts g of them."""
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
        """Give prompts free rows of the cache, and their branches the cells of these rows."""
        self._prompt_of_row += [None] * max(0, len(chosen) - self._prompt_of_row.count(None))
        rows = [row for row, n in enumerate(self._prompt_of_row) if n is None][: len(chosen)]
        for row, n in zip(rows, chosen, strict=True):
            self._prompt_of_row[row] = n
            completion, cell = n * self.group_size, row * self.group_size
            self._branches += [Branch(completion + g, cell + g) for g in range(self.group_size)]
        return rows

    def _compact_branches(self, kept: Sequence[bool]) -> None:
        """Move the branches that are kept to the front of the cache, and free the rows without branches."""
        moves = _compacting_moves(kept)
        self.cache.move_branches(*self._move_indices(moves), max(branch.tokens for branch in self._branches) - 1)
        self._branches = _compacted(self._branches, moves, sum(kept))
        used = {branch.cell // self.group_size for branch in self._branches}
        self._prompt_of_row = [n if row in used else None for row, n in enumerate(self._prompt_of_row)]

    def _compact_rows(self) -> None:
        """Move the prompts that have branches to the first rows of the cache."""
        kept = [n is not None for n in self._prompt_of_row]
        moves = _compacting_moves(kept)
        self.cache.move_rows(*self._move_indices(moves))
        self._prompt_of_row = _compacted(self._prompt_of_row, moves, sum(kept))
        for branch in self._branches:
            row, g = divmod(branch.cell, self.group_size)
            branch.cell = dict(moves).get(row, row) * self.group_size + g

    def _move_indices(self, moves: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The sources and the targets of moves, on the device."""
        sources, targets = ([move[end] for move in moves] for end in range(2))
        return send(sources, self.tokens.device), send(targets, self.tokens.device)


def _compacting_moves(kept: Sequence[bool]) -> list[tuple[int, int]]:
    """Moves (from, to) after which the kept items come first: the last of them fill the gaps among the first."""
    count = sum(kept)
    sources = [i for i in range(count, len(kept)) if kept[i]]
    return list(zip(sources, [i for i in range(count) if not kept[i]], strict=True))


def _compacted(items: list, moves: Sequence[tuple[int, int]], count: int) -> list:
    """The first `count` items after the moves."""
    items = list(items)
    for source, target in moves:
        items[target] = items[source]
    return items[:count]
