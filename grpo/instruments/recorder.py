"""Collects what a step computes, and writes it: every `record.every` steps, and the last few steps before an error.

Until a step is written only references to its values are kept. So a step that is not recorded costs nothing.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch

from hark.grpo.instruments.by_module import weight_digests
from hark.grpo.instruments.draft import Describe, Draft, record_of
from hark.grpo.instruments.record import StepRecord, delete_steps, place_of, recorded_steps, write_part
from hark.grpo.runtime.collectives import World
from hark.models.policy import Policy

MIB = 2**20


class Recorder:
    """Records the steps of a run in its directory, each rank its own part.

    every: a step is due if its number is a multiple of it, or the last, `total`; 0 is never. keep: how many due steps
    to keep. last: how many steps before an error are written. about: further values of every record, such as the
    configuration. describe: what is written about an example.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        policy: Policy,
        *,
        every: int,
        total: int,
        keep: int,
        last: int,
        about: dict[str, Any],
        describe: Describe,
    ):
        self._directory, self._world, self._policy = directory, world, policy
        self._every, self._total, self._keep = every, total, keep
        self._about, self._describe = about, describe
        self._latest: deque[Draft] = deque(maxlen=max(last, 1))
        self._last = last
        self._draft: Draft | None = None

    @property
    def is_due(self) -> bool:
        """Whether the current step will be written if it succeeds."""
        return self._draft is not None and self._is_due(self._draft.step)

    @property
    def place(self) -> Path:
        """The directory of the current step."""
        return place_of(self._directory, self._draft.step if self._draft else 0)

    def begin(self, step: int) -> None:
        """Begin a step, counted from 1; a collective if the step is due."""
        before = self._latest[-1] if self._latest else None
        self._draft = Draft(step)
        self._latest.append(self._draft)
        if self.is_due:
            known = before.weights_after if before and before.step == step - 1 else None
            self._draft.weights_before = known or weight_digests(self._policy, self._world)

    def note(self, **values: Any) -> None:
        """Add values to the current step, by the names of `Draft`; outside of a step nothing is kept."""
        for name, value in values.items() if self._draft else ():
            setattr(self._draft, name, value)

    def note_terms(self, rows: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        """Add terms (b, T) of the completions `rows` (b,) to the current update."""
        if self._draft:
            if len(self._draft.terms) == len(self._draft.updates):
                self._draft.terms.append([])
            self._draft.terms[-1].append((rows, terms))

    def note_update(self, figures: dict[str, Any]) -> None:
        """End the current update, with its figures."""
        if self._draft:
            self._draft.updates.append(figures)

    def end(self) -> dict[str, float]:
        """End the current step and write it if it is due; returns the size of this rank's part as a metric."""
        if not self.is_due:
            self._draft = None
            return {}
        size = write_part(self._directory, self.take())
        if self._world.is_main:
            self._delete_old()
        return {"record/mib": size / MIB}

    def take(self) -> StepRecord:
        """End the current step; returns this rank's part of it. A collective."""
        assert self._draft is not None
        draft, self._draft = self._draft, None
        draft.weights_after = weight_digests(self._policy, self._world)
        draft.is_written = True
        return self._record(draft, "every")

    def write_last(self, error: BaseException) -> list[int]:
        """Write the steps before an error that are not written yet, and the current one; returns their numbers."""
        drafts = [draft for draft in self._latest if not draft.is_written and draft.examples] if self._last else []
        for draft in drafts:
            draft.is_written = True
            reason = f"error: {error}" if draft is self._draft else "last steps before an error"
            write_part(self._directory, self._record(draft, reason))
        return [draft.step for draft in drafts]

    def truncate(self, step: int) -> None:
        """Delete the steps after `step`, the finished steps of a resumed run."""
        if self._world.is_main:
            delete_steps(self._directory, [later for later in recorded_steps(self._directory) if later > step])

    def _is_due(self, step: int) -> bool:
        return self._every > 0 and (step % self._every == 0 or step == self._total)

    def _record(self, draft: Draft, reason: str) -> StepRecord:
        record = record_of(draft, self._policy, self._describe)
        own = {"reason": reason, "ranks": self._world.size, "parts": [self._world.rank]}
        return StepRecord(record.values | own | self._about, record.tensors)

    def _delete_old(self) -> None:
        due = [step for step in recorded_steps(self._directory) if self._is_due(step)]
        delete_steps(self._directory, due[: -self._keep])
