"""Training speed beside four processes that burn the CPU, and on the idle machine.

The first is compared with a fair share of the idle speed.

python tests/benchmarks/busy-machine.py            (ten minutes on two cores; the machine must be
idle otherwise)

A fair share is what one thread does on the idle machine, times the cores, over the cores' worth of
runnable processes: four that burn and one that trains. `busy-machine:idle` is the idle speed over
that of the settings before threads followed model and load (a thread for each CPU, waiting as
OpenMP does by itself). Every number is a whole `harness run`: tokens and seconds are those of its
record.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from _form import figure, write_figures

from harness.machine.load import PASSIVE_WAITING, measure_load
from harness.machine.processor import allowed_cpus
from harness.records.store import read_records

BURNERS = 4
ROUNDS = 3
BUDGET = 150_000  # seen tokens: ten seconds and more of training on an idle machine
BURN = "while True: sum(range(100_000))"
SETTLED = 3.0  # seconds that burners burn before a run begins


@contextmanager
def burning_processes(count: int) -> Iterator[None]:
    """Keep some processes busy at our own priority."""
    burners = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(count)]
    try:
        if count:
            measure_load(SETTLED)
        yield
    finally:
        for process in burners:
            process.kill()
            process.wait()


def train_once(folder: Path, settings: Mapping[str, str]) -> dict[str, object]:
    """Train the embedded student once; return tokens per second, threads and their waiting."""
    place = Path(tempfile.mkdtemp(dir=folder))
    line = [
        sys.executable,
        "-P",
        "-m",
        "harness.cli",
        "run",
        "--methods",
        "sft",
        "--no-controls",
        "--suite",
        "mini",
        "--budget",
        str(BUDGET),
        "--grid",
        "none",
        "--noise",
        "0",
        "--limit",
        "2",
        "--cache",
        str(folder / "cache"),
        "--out",
        str(place),
    ]
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_NUM_THREADS", *PASSIVE_WAITING)
    }
    done = subprocess.run(
        line, env={**inherited, **settings}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    [record] = [record for record in read_records(place)[0] if record.label == "sft"]
    assert record.environment is not None
    return {
        "tokens_per_second": round(record.cost.seen_tokens / record.cost.seconds, 1),
        "threads": record.environment.threads,
        "waiting": record.environment.waiting,
        "cores_in_use": record.environment.cores_in_use,
    }


def refuse_a_busy_machine() -> None:
    """Stop where others use the machine: nothing that is measured then says anything."""
    before = measure_load(5.0)
    if before.busy:
        sys.exit(f"this machine is not idle ({before}): stop what runs beside and try again")


def main() -> None:
    """Measure by turns: before, one thread, ours, and ours beside burners."""
    cores = len(allowed_cpus())
    runs: dict[str, list[dict[str, object]]] = {
        "before": [],
        "one thread": [],
        "idle": [],
        "busy": [],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        refuse_a_busy_machine()
        for _ in range(ROUNDS):
            runs["before"].append(train_once(folder, {"OMP_NUM_THREADS": str(cores)}))
            runs["one thread"].append(train_once(folder, {"OMP_NUM_THREADS": "1"}))
            runs["idle"].append(train_once(folder, {}))
            with burning_processes(BURNERS):
                runs["busy"].append(train_once(folder, {}))
    speeds = {
        who: [float(str(run["tokens_per_second"])) for run in all_] for who, all_ in runs.items()
    }
    fair = [speed * min(cores / (BURNERS + 1), 1.0) for speed in speeds["one thread"]]
    details = {"burners": BURNERS, "cores": cores, "budget": BUDGET, "runs": runs}
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "busy-machine",
                [busy / share for busy, share in zip(speeds["busy"], fair, strict=True)],
                unit="of a fair share",
                better="higher",
                target=0.8,
                details=details,
            ),
            figure(
                "busy-machine:idle",
                [
                    idle_speed / earlier_speed
                    for idle_speed, earlier_speed in zip(
                        speeds["idle"], speeds["before"], strict=True
                    )
                ],
                unit="of the speed before",
                better="higher",
                target=0.95,
            ),
        ],
    )


if __name__ == "__main__":
    main()
