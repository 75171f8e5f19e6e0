"""The hardware of an estimate: a GPU by its own name, its data sheet, its records."""

import pytest
from made_records import ENVIRONMENT, make

from harness.estimating import hardware as hardware_module
from harness.estimating.hardware import (
    GIB,
    GPUS,
    listed_gpu,
    parse_hardware,
    records_of,
    smallest_gpu,
    this_machine,
)
from harness.machine.gpu import Gpu
from harness.records.record import Cost


@pytest.mark.parametrize(
    ("name", "gibibytes", "listed"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100"),
        ("NVIDIA H100 PCIe", 79.6, "H100"),
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", 79.3, "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("NVIDIA L4", 22.0, "L4"),
        ("NVIDIA L40S", 44.4, "L40S"),
        ("NVIDIA A10G", 22.1, "A10G"),
        ("NVIDIA RTX A6000", 47.4, "A6000"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX4090"),
        ("NVIDIA GeForce RTX 3090", 23.7, "RTX3090"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100-32GB"),
        ("Tesla T4", 14.6, "T4"),
        ("AMD Instinct MI300X", 191.0, "MI300X"),
        ("NVIDIA B200", 178.0, "B200"),
        ("NVIDIA GeForce RTX 4090 D", 23.6, "RTX4090"),
        ("NVIDIA L40", 44.4, ""),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, ""),
        ("NVIDIA GeForce GTX 1080", 8.0, ""),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4.9, ""),
    ],
)
def test_a_gpu_is_known_by_the_name_that_its_driver_gives(name, gibibytes, listed):
    assert listed_gpu(name, gibibytes * GIB) == listed


@pytest.fixture
def card(monkeypatch):
    """Let this machine have a GPU of a name and a memory."""

    def have(name, gibibytes, capability="9.0"):
        gpu = Gpu(name=name, driver="1", cuda="13.0", capability=capability)
        monkeypatch.setattr(hardware_module, "gpu_of", lambda device: gpu)
        monkeypatch.setattr(hardware_module, "device_bytes", lambda device: gibibytes * GIB)
        return gpu

    return have


def test_an_h100_is_no_a100_though_both_have_80_gib(card):
    card("NVIDIA H100 80GB HBM3", 79.2)
    h100 = this_machine("cuda", [], dtype="bfloat16")
    card("NVIDIA A100-SXM4-80GB", 79.3)
    a100 = this_machine("cuda", [])
    assert (h100.name, h100.memory) == ("NVIDIA H100 80GB HBM3", 79.2 * GIB)
    assert h100.train / a100.train == pytest.approx(989 / 312)
    assert h100.bandwidth / a100.bandwidth == pytest.approx(3350 / 2039)
    assert "data sheet" in h100.source and h100.source.endswith("not measured on this card")


def test_an_unlisted_gpu_has_the_rates_of_the_nearest_in_memory_and_says_so(card):
    card("Some Card", 23.0)
    hardware = this_machine("cuda", [])
    assert hardware.name.startswith("Some Card (") and "taken for 23GB" in hardware.name
    assert hardware.memory == 23.0 * GIB


def test_values_have_the_size_of_the_type_that_is_computed_in(card):
    assert parse_hardware("1xH100", []).value_bytes == 2
    # no bf16: everything is float32
    assert {name for name, sheet in GPUS.items() if not sheet.bf16} == {"V100-32GB", "T4"}
    assert parse_hardware("1xT4", []).value_bytes == 4
    assert parse_hardware("cpu", []).value_bytes == 4
    card("NVIDIA H100 80GB HBM3", 79.2)
    assert this_machine("cuda", [], dtype="float32").value_bytes == 4


def test_a_card_that_was_measured_has_the_rates_of_its_records(card):
    gpu = card("NVIDIA H100 80GB HBM3", 79.2)
    cost = Cost(seconds=12.0, flops=3e15, teacher_seconds=2.0, teacher_flops=8e14)

    def made_on(gpu):
        environment = ENVIRONMENT.model_copy(update={"gpu": gpu})
        return make("sft", seed=1, environment=environment, cost=cost)

    own, other = made_on(gpu), made_on(gpu.model_copy(update={"name": "NVIDIA A100-SXM4-80GB"}))
    hardware = this_machine("cuda", [own, other])
    assert records_of(hardware, [own, other]) == [own]
    assert hardware.train == pytest.approx(3e14) and hardware.forward == pytest.approx(4e14)
    assert hardware.measured and "measured on this card" in hardware.source
    assert not this_machine("cuda", [other]).measured


def test_the_smallest_card_for_some_work():
    assert smallest_gpu(10 * GIB) == "T4"
    assert smallest_gpu(10 * GIB, bf16=True) == "L4"
    assert GPUS[smallest_gpu(60 * GIB)].memory == 80
    assert smallest_gpu(500 * GIB) == ""
