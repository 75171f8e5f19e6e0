"""The hardware of an estimate: GPUs by data sheet, this machine by its records. No torch."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from harness.errors import HarnessError, unknown
from harness.machine.gpu import gpu_of
from harness.machine.memory import device_bytes
from harness.machine.processor import allowed_cpus, machine_label, thread_count
from harness.models.shape import DTYPE_BYTES
from harness.records.record import RunRecord

GIB = 2**30


class DataSheet(NamedTuple):
    """What a GPU's data sheet says."""

    memory: float  # GiB
    teraflops: float  # dense, bf16 (V100, T4: fp16)
    bandwidth: float  # GB/s
    bf16: bool = True  # it multiplies bf16 in hardware


GPUS: Mapping[str, DataSheet] = {
    "A100-80GB": DataSheet(80, 312, 2039),
    "A100-40GB": DataSheet(40, 312, 1555),
    "H100": DataSheet(80, 989, 3350),
    "H200": DataSheet(141, 989, 4800),
    "B200": DataSheet(180, 2250, 8000),
    "L40S": DataSheet(48, 362, 864),
    "L4": DataSheet(24, 121, 300),
    "A10G": DataSheet(24, 70, 600),
    "A6000": DataSheet(48, 155, 768),
    "RTX4090": DataSheet(24, 165, 1008),
    "RTX3090": DataSheet(24, 71, 936),
    "V100-32GB": DataSheet(32, 125, 900, bf16=False),
    "T4": DataSheet(16, 65, 320, bf16=False),
    "MI300X": DataSheet(192, 1307, 5300),
}
# shares of the data sheet that a plain PyTorch loop reaches
_TRAIN_SHARE, _FORWARD_SHARE, _BANDWIDTH_SHARE = 0.35, 0.45, 0.6
_CPU_FLOPS = 40e9  # FLOP/s of a core, fp32, in training of small models
_CPU_BANDWIDTH = 10e9  # bytes/s


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Equal devices, and the rates that each of them sustains."""

    name: str
    kind: str  # cpu or cuda
    count: int
    memory: float  # bytes of each
    train: float  # FLOP/s of each in training
    forward: float  # FLOP/s of each in forward passes
    bandwidth: float  # bytes/s of each when decoding
    source: str  # where the rates come from
    value_bytes: int = 4  # of a weight or state, in the type that this hardware computes in
    gpu: str = ""  # the name of this machine's own GPU, by which its records are known
    measured: bool = False  # rates come from records of this hardware


def parse_hardware(text: str, records: Sequence[RunRecord]) -> Hardware:
    """Parse `8xH100`, `8x80GB`, `cpu` (this machine) or `cpu:8x32GB` (cores, memory).

    Raises `HarnessError` with the known names for anything else.
    """
    cpu = re.fullmatch(r"cpu(?::(\d+)x(\d+(?:\.\d+)?)GB)?", text, re.IGNORECASE)
    if cpu is not None and cpu[1] is None:
        this_cpu = _cpu(len(allowed_cpus()), float(device_bytes("cpu")))
        return _with_measured_rates(this_cpu, records)
    if cpu is not None:
        if not (int(cpu[1]) and float(cpu[2])):
            raise HarnessError(
                f"--hardware {text!r}: a machine has at least one core, and memory; write for "
                "example cpu:8x32GB"
            )
        return _cpu(int(cpu[1]), float(cpu[2]) * GIB)
    match = re.fullmatch(r"(\d+)x([\w-]+)", text)
    if not match or int(match[1]) < 1:
        raise HarnessError(
            f"--hardware {text!r} is not COUNTxGPU; write for example 8xH100, 8x80GB, cpu or "
            "cpu:8x32GB"
        )
    count, typed = int(match[1]), match[2]
    by_size = re.fullmatch(r"(\d+)GB?", typed, re.IGNORECASE)
    if by_size:
        size = int(by_size[1])
        name = min(GPUS, key=lambda gpu: abs(GPUS[gpu].memory - size))
        return _gpus(count, f"{name}, taken for {typed}", GPUS[name]._replace(memory=float(size)))
    name = _gpu_named(typed, count, text)
    return _gpus(count, name, GPUS[name])


def _gpu_named(typed: str, count: int, text: str) -> str:
    """Return the name of a GPU in the table. Raises `HarnessError` for an unknown or short name."""
    for name in GPUS:
        if name.lower() == typed.lower():
            return name
    variants = [name for name in GPUS if name.lower().startswith(typed.lower())]
    if variants:
        raise HarnessError(
            f"--hardware {text!r}: there are several; write "
            f"{' or '.join(f'{count}x{name}' for name in variants)}"
        )
    raise unknown("GPU", typed, GPUS, hint="(or a size: 8x80GB)")


def _cpu(cores: int, memory: float) -> Hardware:
    """Return a CPU with the rates of a rule of thumb; memory in bytes."""
    return Hardware(
        name=f"CPU, {cores} cores",
        kind="cpu",
        count=1,
        memory=memory,
        train=cores * _CPU_FLOPS,
        forward=1.2 * cores * _CPU_FLOPS,
        bandwidth=_CPU_BANDWIDTH,
        source=f"a rule of thumb, {_CPU_FLOPS / 1e9:.0f} GFLOP/s a core: no record of this machine",
    )


def _gpus(count: int, name: str, sheet: DataSheet) -> Hardware:
    """Return GPUs with the rates that are reached in practice."""
    return Hardware(
        name=f"{count} x {name}",
        kind="cuda",
        count=count,
        memory=sheet.memory * GIB,
        train=_TRAIN_SHARE * sheet.teraflops * 1e12,
        forward=_FORWARD_SHARE * sheet.teraflops * 1e12,
        bandwidth=_BANDWIDTH_SHARE * sheet.bandwidth * 1e9,
        value_bytes=2 if sheet.bf16 else 4,
        source=f"its data sheet ({sheet.teraflops:g} TFLOP/s, {sheet.bandwidth:g} GB/s) times "
        f"{_TRAIN_SHARE:.0%} in training, {_FORWARD_SHARE:.0%} in forward passes, "
        f"{_BANDWIDTH_SHARE:.0%} of the bandwidth in decoding, not measured on this card",
    )


def this_machine(device: str, records: Sequence[RunRecord], *, dtype: str = "") -> Hardware:
    """Return this machine's CPU, or its GPU by its own name, computing in a dtype.

    A GPU's rates are those of its records, else of its data sheet, else of that of the GPU of
    nearest memory.
    """
    if device == "cpu":
        return parse_hardware("cpu", records)
    gpu, memory = gpu_of(device), float(device_bytes(device))
    assert gpu is not None
    name = listed_gpu(gpu.name, memory)
    if name:
        listed = replace(_gpus(1, name, GPUS[name]), name=gpu.name)
    else:
        nearest = parse_hardware(f"1x{memory / GIB:.0f}GB", records)
        listed = replace(nearest, name=f"{gpu.name} ({nearest.name.removeprefix('1 x ')})")
    this_gpu = replace(listed, memory=memory, gpu=gpu.name)
    if dtype:
        this_gpu = replace(this_gpu, value_bytes=DTYPE_BYTES[dtype])
    return _with_measured_rates(this_gpu, records)


def listed_gpu(name: str, memory: float) -> str:
    """Return the name in the table of a GPU as its driver names it, "" where it is not listed.

    Of several sizes of one GPU it is the one of nearest memory (in bytes). Part of a GPU (MIG) is
    no listed GPU.
    """
    words = re.findall(r"[A-Z0-9]+", name.upper())
    if "MIG" in words:
        return ""
    words += [first + second for first, second in pairwise(words)]
    named = [listed for listed in GPUS if listed.partition("-")[0].upper() in words]
    return min(named, key=lambda listed: abs(GPUS[listed].memory - memory / GIB), default="")


def smallest_gpu(needed: float, *, bf16: bool = False) -> str:
    """Name the listed GPU of least memory on which work of `needed` bytes fits, "" if none does.

    `bf16`: the work needs bf16 arithmetic.
    """
    sizes = {
        name: sheet.memory
        for name, sheet in GPUS.items()
        if sheet.memory * GIB >= needed and (sheet.bf16 or not bf16)
    }
    return min(sizes, key=lambda name: sizes[name], default="")


def records_of(hardware: Hardware, records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the records that were made on some hardware: on this CPU, or on a GPU of its name."""
    if hardware.kind == "cpu":
        return records_of_this_machine(records)
    return [
        record
        for record in records
        if record.status == "success"
        and record.environment is not None
        and record.environment.gpu is not None
        and record.environment.gpu.name == hardware.gpu
    ]


def records_of_this_machine(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the records of this CPU that used at most as many threads as a run uses now."""
    this, threads = machine_label(), thread_count()

    def is_comparable(record: RunRecord) -> bool:
        environment = record.environment
        return (
            record.status == "success"
            and record.conditions.device == "cpu"
            and environment is not None
            and environment.machine == this
            and environment.threads <= threads
        )

    return [record for record in records if is_comparable(record)]


def _with_measured_rates(hardware: Hardware, records: Sequence[RunRecord]) -> Hardware:
    """Replace rates of a rule or a data sheet by the median rates of the hardware's records."""
    costs = [record.cost for record in records_of(hardware, records)]
    train_rates = [
        cost.flops / (cost.seconds - cost.teacher_seconds)
        for cost in costs
        if cost.flops and cost.seconds > 1
    ]
    forward_rates = [
        cost.teacher_flops / cost.teacher_seconds for cost in costs if cost.teacher_seconds > 1
    ]
    if not train_rates:
        return hardware
    rate = median(train_rates)
    return replace(
        hardware,
        train=rate,
        forward=median(forward_rates) if forward_rates else 1.2 * rate,
        measured=True,
        source=f"{len(train_rates)} trained rows measured on this "
        f"{'machine' if hardware.kind == 'cpu' else 'card'} "
        f"({rate / 1e9:,.0f} GFLOP/s in training)",
    )
