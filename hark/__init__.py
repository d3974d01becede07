"""Hark: GRPO for audio language models in plain PyTorch.

These functions make a GRPO step without a configuration file; docs/library.md shows one. They are imported at first
use, so that `import hark` and the parts of `hark.data` that need no torch stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hark.grpo.advantage import group_advantages
    from hark.grpo.loss import policy_loss, token_weights
    from hark.grpo.sampler import sample
    from hark.grpo.scorer import score
    from hark.models.loading import load_policy

__all__ = ["group_advantages", "load_policy", "policy_loss", "sample", "score", "token_weights"]

_MODULES = {
    "group_advantages": "hark.grpo.advantage",
    "load_policy": "hark.models.loading",
    "policy_loss": "hark.grpo.loss",
    "sample": "hark.grpo.sampler",
    "score": "hark.grpo.scorer",
    "token_weights": "hark.grpo.loss",
}


if not TYPE_CHECKING:  # a type checker would accept any name of a module that has __getattr__

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'hark' has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
