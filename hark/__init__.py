"""Hark: GRPO for audio language models in plain PyTorch.

With these functions you can write a GRPO step without a configuration file, as docs/library.md shows. They are imported
when they are first used, so that `import hark` and the modules of `hark.data` that need no torch do not import it.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hark.grpo.advantage import group_advantages
    from hark.grpo.loss import policy_loss, token_weights
    from hark.grpo.sampler import sample
    from hark.grpo.scorer import score
    from hark.models.loading import load_policy

__all__ = ["UserError", "group_advantages", "load_policy", "policy_loss", "sample", "score", "token_weights"]


# This process and the one that started it. Noted now, because that may end while torch is imported, for seconds.
STARTED = os.getpid(), os.getppid()

# How often a thread of GNU's OpenMP looks for the next product before it sleeps: for some tenths of a millisecond,
# longer than between two products of a decode step. The default, 300000, is longer than the scheduler's time slice:
# beside a busy process a thread spends its slice on looking and has no core when the product comes, and a step on two
# threads took more than twice as long as on one. No sum depends on it. libgomp reads it when torch is imported: by
# the command `hark` and by the programs that train, after this module.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class UserError(Exception):
    """An error that the user can correct. A command prints its message as one line, without a traceback."""


_MODULES = {
    "group_advantages": "hark.grpo.advantage",
    "load_policy": "hark.models.loading",
    "policy_loss": "hark.grpo.loss",
    "sample": "hark.grpo.sampler",
    "score": "hark.grpo.scorer",
    "token_weights": "hark.grpo.loss",
}


if not TYPE_CHECKING:  # with __getattr__, a type checker would accept any name

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'hark' has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
