"""Where a plan shall run: a GPU's data sheet, or this machine's CPU with the rates that its own
records show. No torch.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from harness.errors import HarnessError, unknown
from harness.machine.memory import device_bytes
from harness.machine.processor import allowed_cpus, machine_label, thread_count
from harness.records.record import RunRecord

GIB = 2**30

# Data sheets: GiB, dense bf16 (V100, T4: fp16) TFLOP/s, GB/s.
GPUS: Mapping[str, tuple[float, float, float]] = {
    "A100-80GB": (80, 312, 2039),
    "A100-40GB": (40, 312, 1555),
    "H100": (80, 989, 3350),
    "H200": (141, 989, 4800),
    "B200": (180, 2250, 8000),
    "L40S": (48, 362, 864),
    "L4": (24, 121, 300),
    "A10G": (24, 70, 600),
    "A6000": (48, 155, 768),
    "RTX4090": (24, 165, 1008),
    "RTX3090": (24, 71, 936),
    "V100-32GB": (32, 125, 900),
    "T4": (16, 65, 320),
    "MI300X": (192, 1307, 5300),
}
# of the data sheet, in a plain PyTorch loop
_TRAIN_SHARE, _FORWARD_SHARE, _BANDWIDTH_SHARE = 0.35, 0.45, 0.6
_CPU_FLOPS = 40e9  # a core, fp32, in training of small models
_CPU_BANDWIDTH = 10e9  # bytes/s


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where it shall run: equal devices, and what each sustains."""

    name: str
    kind: str  # cpu, cuda
    count: int
    memory: float  # bytes of each
    train: float  # FLOP/s of each in training
    forward: float  # FLOP/s of each in forward passes
    bandwidth: float  # bytes/s of each when decoding
    source: str  # where the rates come from


def parse_hardware(text: str, records: Sequence[RunRecord]) -> Hardware:
    """Read `8x80GB`, `8xH100`, `cpu` (this machine), `cpu:8x32GB` (cores, memory). Raises
    `HarnessError` with what is known.
    """
    cpu = re.fullmatch(r"cpu(?::(\d+)x(\d+(?:\.\d+)?)GB)?", text, re.IGNORECASE)
    if cpu and cpu[1] and not (int(cpu[1]) and float(cpu[2])):
        raise HarnessError(
            f"--hardware {text!r}: a machine has cores and memory; write for example cpu:8x32GB"
        )
    if cpu:
        cores = int(cpu[1]) if cpu[1] else len(allowed_cpus())
        memory = float(cpu[2]) * GIB if cpu[2] else float(device_bytes("cpu"))
        plain = Hardware(
            name=f"CPU, {cores} cores",
            kind="cpu",
            count=1,
            memory=memory,
            train=cores * _CPU_FLOPS,
            forward=1.2 * cores * _CPU_FLOPS,
            bandwidth=_CPU_BANDWIDTH,
            source=f"a rule of thumb, {_CPU_FLOPS / 1e9:.0f} GFLOP/s a core: no record of this "
            "machine",
        )
        return plain if cpu[1] else _with_measured_rates(plain, records)
    match = re.fullmatch(r"(\d+)x([\w-]+)", text)
    if not match or int(match[1]) < 1:
        raise HarnessError(
            f"--hardware {text!r} is not COUNTxGPU; write for example 8xH100, 8x80GB, cpu or "
            "cpu:8x32GB"
        )
    count, asked = int(match[1]), match[2]
    by_size = re.fullmatch(r"(\d+)GB?", asked, re.IGNORECASE)
    fitting = [one for one, (size, _, _) in GPUS.items() if by_size and size == int(by_size[1])]
    name = (
        fitting[0] if fitting else next((one for one in GPUS if one.lower() == asked.lower()), None)
    )
    if name is None and by_size:
        name = min(GPUS, key=lambda one: abs(GPUS[one][0] - int(by_size[1])))
    kinds = [one for one in GPUS if one.lower().startswith(asked.lower())]
    if name is None and kinds:
        raise HarnessError(
            f"--hardware {text!r}: there are several; write "
            f"{' or '.join(f'{count}x{one}' for one in kinds)}"
        )
    if name is None:
        raise unknown("GPU", asked, GPUS, hint="(or a size: 8x80GB)")
    size, teraflops, bandwidth = GPUS[name]
    size = float(by_size[1]) if by_size else size
    return Hardware(
        name=f"{count} x {name}" + (f", taken for {asked}" if by_size else ""),
        kind="cuda",
        count=count,
        memory=size * GIB,
        train=_TRAIN_SHARE * teraflops * 1e12,
        forward=_FORWARD_SHARE * teraflops * 1e12,
        bandwidth=_BANDWIDTH_SHARE * bandwidth * 1e9,
        source=f"its data sheet ({teraflops:g} TFLOP/s, {bandwidth:g} GB/s) times "
        f"{_TRAIN_SHARE:.0%} in training, {_FORWARD_SHARE:.0%} in "
        f"forward passes, {_BANDWIDTH_SHARE:.0%} of the bandwidth in decoding",
    )


def this_machine(device: str, records: Sequence[RunRecord]) -> Hardware:
    """Return this machine's CPU, or its GPU with the rates of the listed one that is nearest in
    memory.
    """
    if device == "cpu":
        return parse_hardware("cpu", records)
    memory = float(device_bytes(device))
    return replace(parse_hardware(f"1x{memory / GIB:.0f}GB", records), memory=memory)


def records_of_this_machine(records: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the records that were made on a machine like this one, on its CPU, at no more threads
    than are asked for.
    """
    here = machine_label()
    threads = thread_count()

    def fits(one: RunRecord) -> bool:
        made = one.environment
        return (
            one.status == "success"
            and one.conditions.device == "cpu"
            and made is not None
            and made.machine == here
            and made.threads <= threads
        )

    return [one for one in records if fits(one)]


def _with_measured_rates(plain: Hardware, records: Sequence[RunRecord]) -> Hardware:
    """Put this machine's measured rates in the place of the rules of thumb."""
    here = records_of_this_machine(records)
    train = [
        one.cost.flops / (one.cost.seconds - one.cost.teacher_seconds)
        for one in here
        if one.cost.flops and one.cost.seconds > 1
    ]
    forward = [
        one.cost.teacher_flops / one.cost.teacher_seconds
        for one in here
        if one.cost.teacher_seconds > 1
    ]
    if not train:
        return plain
    rate = median(train)
    return replace(
        plain,
        train=rate,
        forward=median(forward) if forward else 1.2 * rate,
        source=f"{len(train)} trained rows measured on this machine ({rate / 1e9:.0f} GFLOP/s in "
        "training)",
    )
