"""The device of this process, and the settings of torch for a run on it."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from hark.grpo.config import ConfigError

ALLOCATOR, OLDER = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # settings of the GPU's memory; a user may use both
ENVIRONMENT = {
    # On the CPU, oneDNN and torch's layer above it each keep the code of an operation for each shape that it meets,
    # 1024 of them unless they are told otherwise. Lengths of audio differ from step to step: a rank of the demo grew by
    # 0.6 GiB in 47 steps, and further. With these limits on both it stays, and is as fast; a limit on one alone does
    # not help.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
    # On a GPU, freed pieces of a block of memory cannot be joined with those of another block, and tensors of ever new
    # lengths leave pieces that are too small. Such segments grow instead, and have no borders between blocks.
    ALLOCATOR: "expandable_segments:True",
}
# Options of glibc's mallopt: M_MMAP_THRESHOLD at its largest, M_TRIM_THRESHOLD, and M_TOP_PAD.
KEPT = ((-3, 32 << 20), (-1, 2**31 - 1), (-2, 64 << 20))
DEVICES = Path("/dev")  # where the driver lists the GPUs that this process may use


def set_up(threads: int = 0) -> torch.device:
    """This process's GPU, or the CPU on a machine without GPUs; sets what torch has to know before it computes.

    threads: of computations on the CPU; 0 leaves their number to torch. Raises ConfigError where there is a GPU that
    torch cannot use, or fewer GPUs than processes.
    """
    for name, value in ENVIRONMENT.items():
        if name != ALLOCATOR or OLDER not in os.environ:
            os.environ.setdefault(name, value)
    if threads:
        torch.set_num_threads(threads)
    # torch prefers cuDNN's attention on Hopper. Since 2.11 its backward returns NaN for queries under an explicit mask
    # if the length is 64 modulo 128 and the logsumexp of a row is very small, and it plans each new shape anew, in half
    # a second. Without it, causal attention takes the flash kernel and masked attention the efficient one.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not torch.cuda.is_available():
        _check_no_gpu()
        _keep_freed_memory()
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local} of this machine has no GPU; there are {torch.cuda.device_count()}; "
            "start one process per GPU, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed, on the CPU, where each layer allocates its tensors anew.

    It would give blocks of megabytes back at once, and the next ones would be mapped page by page: 76,000 page faults
    in a step of the benchmark, which takes some 3 % less time without them. The memory stays at the step's peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, value in KEPT:
            mallopt(option, value)


def emulates(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device has no instructions for products of this dtype, which then take many times as long."""
    known = hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")  # builds of torch without oneDNN do not have it
    return (
        device.type == "cpu" and dtype == torch.bfloat16 and known and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _check_no_gpu() -> None:
    """Raise ConfigError if torch was built for GPUs and does not find those that the driver lists."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles")
    if torch.version.cuda is None or hidden or not any(DEVICES.glob("nvidia[0-9]*")):
        return
    try:
        torch.cuda.init()
        reason = "torch does not say why"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().rstrip(".")
    raise ConfigError(
        f"there is an NVIDIA GPU, and torch {torch.__version__} cannot use it: {reason}; a driver must be at least as "
        f"new as the CUDA of torch's build, {torch.version.cuda}: update it, or install a build for an older CUDA; "
        "CUDA_VISIBLE_DEVICES= trains on the CPU"
    )
