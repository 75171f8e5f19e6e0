"""Memory of a GPU: all of it without a CUDA context, and what is free of it after a training."""

import sys
from types import SimpleNamespace

import pytest
import torch

from harness.machine.memory import cards_memory, device_bytes, free_bytes, release_memory

GIB = 2**30


class Refused(Exception):
    pass


def nvml(*, total, parted=None):
    """Return a stand-in for NVML's package with a GPU; `parted`: None of one without MIG."""

    def mig_mode(handle):
        if parted is None:
            raise Refused
        return [parted, parted]

    return SimpleNamespace(
        NVMLError=Refused,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda name: name,
        nvmlDeviceGetMigMode=mig_mode,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=total),
    )


@pytest.fixture
def by_torch(monkeypatch):
    """Let torch know a GPU of 39 GiB."""
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(total_memory=39 * GIB),
    )


@pytest.mark.parametrize("parted", [None, 0])
def test_a_gpus_memory_is_asked_of_nvml_before_a_context_is_made(by_torch, monkeypatch, parted):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(total=80 * GIB, parted=parted))
    assert device_bytes("cuda") == 80 * GIB
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert device_bytes("cuda") == 39 * GIB


def test_a_part_of_a_gpu_is_not_taken_for_all_of_it(by_torch, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(total=80 * GIB, parted=1))
    assert device_bytes("cuda") == 39 * GIB
    monkeypatch.setitem(sys.modules, "pynvml", None)  # its package is missing
    assert device_bytes("cuda") == 39 * GIB


def test_what_the_allocator_keeps_and_nobody_uses_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 60 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 15 * GIB)
    assert free_bytes("cuda") == (10 + 60 - 15) * GIB


def test_another_process_may_take_of_each_card_what_its_driver_has_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert cards_memory("cuda") == ((2 * GIB, 8 * GIB),) * 2 and cards_memory("cpu") == ()


def test_a_card_that_is_lost_fails_what_computes_on_it_and_not_the_release(monkeypatch):
    def refuse():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    release_memory("cuda")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        torch.cuda.empty_cache()
