"""What the timing benchmarks share: the teacher beside itself, and a disturbing process."""

import os
from pathlib import Path

from harness.measuring.measure import TimedModel, TimingSettings, measure
from harness.measuring.scenario import parse_grid
from harness.models.resolve import resolve
from harness.records.record import Measurement

# Burns one core in bursts of 50 to 600 ms, with pauses as long: what a browser, a build or a
# neighbour does.
BURN = """
import random, sys, time
draw = random.Random(sys.argv[1])
while True:
    until = time.perf_counter() + draw.uniform(0.05, 0.6)
    while time.perf_counter() < until:
        pass
    time.sleep(draw.uniform(0.05, 0.6))
"""


def measure_beside_itself(
    folder: Path, *, wrap: str = "", grid: str = "128x1x32", rounds: int = 10
) -> tuple[Measurement, ...]:
    """Measure the embedded teacher against itself; `wrap` names what is put around one of them."""
    tiny = resolve("tiny", cache=folder)
    settings = TimingSettings(
        grid=parse_grid(grid), rounds=rounds, threads=min(2, os.cpu_count() or 1)
    )
    return measure(TimedModel(tiny, wrap), TimedModel(tiny), settings, folder=folder).measurements
