"""Recognises the errors of all allocators that say that memory is exhausted."""

import errno
import re

# torch raises OutOfMemoryError on a GPU, but a plain RuntimeError from its CPU allocator and from cuBLAS.
MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated: by torch on any device, numpy, Python or the system."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):  # by its name, because importing torch takes seconds
        return type(error).__name__ == "OutOfMemoryError" or any(message in str(error) for message in MESSAGES)
    return isinstance(error, MemoryError)


def reason(error: BaseException) -> str:
    """The first line of an error's message, without the place in torch's source; its name if it has no message."""
    first = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[enforce fail at .*?\] .*?\. ", "", first) or type(error).__name__
