"""Tries a model's chat template and tokenizer in a child process, ended if it takes too long or too much memory.

Templates are programs and tokenizers hold regular expressions: of a model that somebody made to do harm, they may never
end. The child is a fork, so nothing is loaded again, and only it is ended.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

from hark.limits import limit_memory
from hark.models.policy import PolicyError

SECONDS = 10  # of the processor; a usual template and tokenizer take milliseconds
MOST_SECONDS = 120.0  # of the clock, on a machine that is busy
MEMORY = 2 << 30  # bytes beyond what this process has
TOO_LARGE, BROKEN = 3, 4  # exit statuses of a child: its memory did not suffice; compiled code gave up
# Runs of one character, of words and of signs, at which patterns that backtrack take longest.
TEXT = " ".join(sign * 500 for sign in ("a", "ab", "1", " ", "\n", "!", "'s", "é", "中", "_-")) + "!"


def check_text(where: str | Path, use: Callable[[str], object]) -> None:
    """Raise PolicyError if `use(TEXT)`, which renders and tokenises it, does not end within the bounds.

    Its own errors are not raised: the caller meets them itself. Only where processes can be forked.
    """
    if not hasattr(os, "fork"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child starts none
        child = os.fork()
    if child == 0:
        _run(use)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise PolicyError(
            f"{where}: its chat template or tokenizer does not end within {SECONDS} s on a text of {len(TEXT)} "
            f"characters; copy both from the checkpoint that the model was made from"
        )
    if os.waitstatus_to_exitcode(status) == BROKEN:
        raise PolicyError(f"{where}: its tokenizer gave up on a text of {len(TEXT)} characters; copy it again")
    if os.waitstatus_to_exitcode(status) == TOO_LARGE:
        raise PolicyError(
            f"{where}: its chat template or tokenizer takes more than {MEMORY >> 30} GB for a text of {len(TEXT)} "
            "characters; copy both from the checkpoint that the model was made from"
        )


def _run(use: Callable[[str], object]) -> None:
    """What the child does: set its bounds, use the text, and end without the exit handlers of its parent."""
    status = 0
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a panic prints lines of its own
        _set_bounds()
        use(TEXT)
    except MemoryError:
        status = TOO_LARGE
    except Exception:  # the caller meets the error itself
        pass
    except BaseException:  # a panic of the tokenizers package: its patterns may try ten million ways
        status = BROKEN
    finally:
        os._exit(status)


def _set_bounds() -> None:
    """The kernel ends the process when its time is up, even inside of compiled code."""
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    limit_memory(MEMORY)
