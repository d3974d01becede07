"""The algorithms that have a name: each is a choice of advantage, ratio, bound, token weights and KL.

A setting gives only what differs from the defaults of `LossConfig`, which are those of GRPO as R1-AQA and TRL have it.
docs/algorithms.md has the equations, the sources and worked values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hark import UserError
from hark.from_file import from_file, is_in_file
from hark.grpo.advantage import ADVANTAGES, Advantage
from hark.grpo.loss import OwnLoss

ALGORITHMS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"advantage": "none", "token_weights": "constant", "beta": 0.0},
    "dapo": {"clip_high": 0.28, "token_weights": "token-mean", "beta": 0.0},
    "gspo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "beta": 0.0},
    # One name, three published forms of the range: TRL's (ScaleRL, at most 5), verl's and NeMo-RL's.
    "cispo": {"bound": "cispo", "clip_low": 1.0, "clip_high": 4.0, "token_weights": "token-mean", "beta": 0.0},
    "cispo_verl": {"bound": "cispo", "clip_low": 1.0, "token_weights": "token-mean", "beta": 0.0},
    "cispo_nemo": {"bound": "cispo", "token_weights": "token-mean", "beta": 0.0},
    "sapo": {"bound": "sapo", "beta": 0.0},
    "two_sided": {"ratio_cap": 4.0, "beta": 0.001},
    "reinforce": {"advantage": "none", "bound": "reinforce", "beta": 0.0},
    "rloo": {
        "advantage": "leave_one_out",
        "ratio": "sequence_product",
        "kl": "k1",
        "kl_in": "reward",
        "beta": 0.05,
    },
    "reinforce_pp": {"advantage": "reinforce_pp", "kl": "k1", "kl_in": "reward", "beta": 0.001},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline", "kl": "k2", "beta": 0.001},
    "gdpo": {"advantage": "gdpo"},
    "opo": {"advantage": "opo", "beta": 0.0},
    "lite_ppo": {"advantage": "batch", "token_weights": "token-mean", "beta": 0.0},
    "pass_at_k": {"advantage": "pass_at_k", "beta": 0.0},
}


class AlgorithmError(UserError, ValueError):
    """An unknown name, or a function of a user's own that cannot be called as it must be."""


def named_values(kind: str) -> dict[str, Any]:
    """The keys of `loss` that a named setting gives; none for a loss of the user's own. Raises AlgorithmError."""
    if is_in_file(kind):
        return {}
    return _known(ALGORITHMS, kind, "loss")


def find_advantage(name: str) -> Advantage:
    """The function of that name, or of `path/to/file.py:name`. Raises AlgorithmError."""
    return own_function(name, ("table",)) if is_in_file(name) else _known(ADVANTAGES, name, "advantage")


def find_own_loss(kind: str) -> OwnLoss | None:
    """The loss `path/to/file.py:name`; None for a named setting. Raises AlgorithmError."""
    return own_function(kind, ("logprobs", "old_logprobs", "advantages", "mask")) if is_in_file(kind) else None


def own_function(name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    """The function `path/to/file.py:name`, which takes these positional arguments. Raises AlgorithmError."""
    function = from_file(name)
    expected = f"expected a function {name.rpartition(':')[2]}({', '.join(parameters)})"
    if isinstance(function, type) or not callable(function):
        raise AlgorithmError(f"{name} is of type {type(function).__name__}; {expected}")
    try:
        inspect.signature(function).bind(*parameters)
    except TypeError as error:
        raise AlgorithmError(
            f"{name} takes {inspect.signature(function)}, which does not fit ({error}); {expected}"
        ) from None
    return function


def _known(table: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in table:
        raise AlgorithmError(f"one of {', '.join(table)}, or your own {kind}, path/to/file.py:name")
    return table[name]
