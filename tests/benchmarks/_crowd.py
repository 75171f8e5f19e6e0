"""Many starts at once on one store: each cell is computed once, the other starts wait."""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from _faults import log_of
from _kills import ROWS, Reference, begin, difference, end, events, litter, records

from harness.records.store import read_records

OTHER_ROWS = "response,cot,int8"  # shares the teacher, two rows and the stage of a chain with ROWS


@dataclass(frozen=True)
class CrowdResult:
    """What many simultaneous starts did: their number, their cells, and what went wrong."""

    starts: int
    cells: int
    wrong: tuple[str, ...]


def start_crowd(root: Path, rows: Sequence[str], undisturbed: Reference) -> CrowdResult:
    """Start the command once for each of `rows` at the same moment; return what went wrong."""
    shutil.rmtree(root, ignore_errors=True)
    log_of(root).unlink(missing_ok=True)
    numbers = [begin(root, chosen, name=f"-{at}") for at, chosen in enumerate(rows)]
    wrong = []
    for at, number in enumerate(numbers):
        ended = end(root, number, name=f"-{at}")
        last = ended.said.strip().splitlines()[-1:] or [""]
        if ended.code or ended.orphans or "Traceback" in ended.said:
            wrong.append(f"start {at} ended with {ended.code}: {last[0][:200]}")
    ours = records(root)
    wrong += _computed_once(root, ours) + _lists_of_runs(root, len(rows))
    for name in (
        {*ours, *undisturbed.records} if len(set(rows)) == 1 else {*ours} & {*undisturbed.records}
    ):
        if text := difference(ours.get(name), undisturbed.records.get(name)):
            wrong.append(f"cell {name}: {text}")
    return CrowdResult(
        len(rows), len(ours), tuple(wrong + [f"{name} stays" for name in litter(root)])
    )


def _computed_once(root: Path, ours: Mapping[str, object]) -> list[str]:
    """Name the cells and students that were not computed exactly once."""
    writes = Counter((event[2], event[3]) for event in events(root) if event[1] == "renamed")
    wrong = [
        f"{path} was written {times} times"
        for (kind, path), times in writes.items()
        if kind in ("record", "done", "job", "samples", "traces", "teacher cache")
        and times != 1
        and ".part" not in path
    ]
    jobs = {Path(path).parent.name for kind, path in writes if kind == "job"}
    return wrong + [f"cell {name} was never started" for name in ours if name not in jobs]


def _lists_of_runs(root: Path, starts: int) -> list[str]:
    """Name what is wrong with the lists of runs."""
    lists = sorted((root / "store" / "runs").glob("*.json"))
    wrong = [] if len(lists) == starts else [f"{len(lists)} lists of {starts} runs"]
    for path in lists:
        records, problems = read_records(path)
        wrong += problems or ([] if records else [f"{path.name} lists nothing"])
    return wrong


def identical_runs(count: int) -> list[str]:
    """Return the rows of `count` identical runs."""
    return [ROWS] * count


def two_runs_in_turn(count: int) -> list[str]:
    """Return the rows of two different runs in turn; the two share cells."""
    return [(ROWS, OTHER_ROWS)[at % 2] for at in range(count)]
