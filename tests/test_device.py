"""What a process sets up before it computes, and what it says where torch cannot use the GPU that is there."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from hark.grpo.config import ConfigError
from hark.grpo.runtime import device as device_module
from hark.grpo.runtime.device import ENVIRONMENT, emulates, set_up

ALLOCATOR = "PYTORCH_ALLOC_CONF"


@pytest.fixture
def environment(monkeypatch):
    """The environment, without what `set_up` writes; all of it is put back at the end."""
    for name in (*ENVIRONMENT, "PYTORCH_CUDA_ALLOC_CONF", "CUDA_VISIBLE_DEVICES", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture
def unused_gpu(environment, tmp_path):
    """A machine whose driver lists a GPU that torch, built for CUDA 13.0, cannot use."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    (tmp_path / "nvidia0").touch()
    environment.setattr(device_module, "DEVICES", tmp_path)
    environment.setattr(torch.cuda, "is_available", lambda: False)
    environment.setattr(torch.cuda, "init", init)
    environment.setattr(torch.version, "cuda", "13.0")
    return tmp_path


def test_cudnns_attention_is_off_and_segments_of_memory_may_grow(environment):
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert set_up() == torch.device("cpu")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert {name: device_module.os.environ[name] for name in ENVIRONMENT} == ENVIRONMENT


@pytest.mark.parametrize("name", [ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_a_user_says_about_the_allocator_is_left_alone(name, environment):
    environment.setenv(name, "max_split_size_mb:64")
    set_up()
    found = {key: device_module.os.environ.get(key) for key in (ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF")}
    assert found == {ALLOCATOR: None, "PYTORCH_CUDA_ALLOC_CONF": None} | {name: "max_split_size_mb:64"}


def test_a_gpu_that_torch_cannot_use_ends_the_run_with_the_reason(unused_gpu):
    with pytest.raises(ConfigError, match=r"driver on your system is too old \(found version 11040\); .*13\.0"):
        set_up()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_or_that_torch_was_not_built_for_is_not_asked_for(hidden, unused_gpu, environment):
    environment.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert set_up() == torch.device("cpu")
    environment.delenv("CUDA_VISIBLE_DEVICES")
    environment.setattr(torch.version, "cuda", None)
    assert set_up() == torch.device("cpu")


def test_a_build_for_gpus_computes_on_the_cpu_of_a_machine_without_one(unused_gpu):
    (unused_gpu / "nvidia0").rename(unused_gpu / "nvidiactl")
    assert set_up() == torch.device("cpu")


def test_each_process_needs_a_gpu_of_its_own(environment):
    environment.setenv("LOCAL_RANK", "2")
    environment.setattr(torch.cuda, "is_available", lambda: True)
    environment.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 2 of this machine has no GPU; there are 2"):
        set_up()


def test_a_dtype_without_instructions_is_said_to_be_emulated(environment):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    known = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert emulates(cpu, torch.bfloat16) is not known
    assert not emulates(cpu, torch.float32) and not emulates(gpu, torch.bfloat16)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
@pytest.mark.parametrize("own", [False, True])
def test_freed_memory_is_kept_unless_the_user_has_settings_of_their_own(own):
    """Faults of the pages of twenty blocks of 16 MB, one after the other: 4096 in each that is mapped anew."""
    code = (
        "import resource, torch; from hark.grpo.runtime.device import set_up; set_up()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for n in range(21): torch.ones(2**22); before = before if n else faults()\n"
        "print(faults() - before)"
    )
    setting = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"} if own else {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | setting
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    faults = int(output.stdout)
    assert faults > 60_000 if own else faults < 10_000, faults
