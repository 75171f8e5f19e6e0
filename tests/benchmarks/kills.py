"""A small run that is killed or refused at each write boundary and at random moments.

The command is repeated until it succeeds.

python tests/benchmarks/kills.py [--seed N] [--stores N] [--only N,M] [--first N] [--crowds 24]
[--progress FILE] [--lock FILE]

`kills:lost` counts cells that never finish and finished work that is computed again,
`kills:different` records that are not the undisturbed run's, `kills:left` files, locks and
processes that stay, `crowd:wrong` what many starts at once got wrong.
"""

import argparse
import fcntl
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import _forked
from _crowd import CrowdResult, identical_runs, start_crowd, two_runs_in_turn
from _faults import Fault
from _form import figure, write_figures
from _kills import STATES, Case, Outcome, Reference, cases, reference, try_case

LONGEST_TURN = 90.0  # seconds
STORES = 25
UNITS = {
    "lost": "cells or finished work lost or computed again",
    "different": "records that differ from the undisturbed run's",
    "left": "files, locks, processes or tracebacks left behind",
}


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", help="numbers of cases, by commas; nothing is written then"
    )
    parser.add_argument(
        "--first", type=int, default=0, help="the first N cases; nothing is written then"
    )
    parser.add_argument(
        "--stores", type=int, default=STORES, help="how many stores are struck, each several times"
    )
    parser.add_argument("--crowds", type=int, default=24, help="starts at once; 0 for none")
    parser.add_argument(
        "--progress", type=Path, help="a file of stores that were tried: they are not tried again"
    )
    parser.add_argument(
        "--lock", type=Path, help="a file to lock for each case, where a machine is shared"
    )
    return parser.parse_args(arguments)


class Turn:
    """A lock shared with others: held for `LONGEST_TURN` seconds, then given to who waits."""

    def __init__(self, lock: Path | None) -> None:
        self.stream = lock.open("a") if lock else None
        self.since: float | None = None

    def take(self) -> None:
        """Hold the lock, newly where it was held for long."""
        if self.stream is None:
            return
        if self.since is not None and time.monotonic() - self.since > LONGEST_TURN:
            fcntl.flock(self.stream, fcntl.LOCK_UN)
            self.since = None
            time.sleep(1)
        if self.since is None:
            fcntl.flock(self.stream, fcntl.LOCK_EX)
            self.since = time.monotonic()


def chosen_cases(cases: Sequence[Case], options: argparse.Namespace) -> list[Case]:
    """Return the cases that the options select."""
    numbers = {int(text) for text in options.only.split(",") if text}
    some = [case for case in cases if not numbers or case.number in numbers]
    return some[: options.first] if options.first else some


def run_case(case: Case, root: Path, undisturbed: Reference, progress: Path | None) -> Outcome:
    """Try a case unless it was tried earlier; print a line for each fault and each problem."""
    earlier = _earlier_outcomes(progress)
    outcome = earlier[case.number] if case.number in earlier else try_case(case, root, undisturbed)
    if progress is not None and case.number not in earlier:
        with progress.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"case": case.number, **asdict(outcome)}) + "\n")
    wrong = [f"{name}: {line}" for name in UNITS for line in getattr(outcome, name)]
    for line in (*outcome.lines, *(f"  {case.number}: {line}" for line in wrong)):
        print(line, flush=True)
    return outcome


def _earlier_outcomes(progress: Path | None) -> dict[int, Outcome]:
    """Return the outcomes of the cases that were tried earlier, by number."""
    lines = (
        progress.read_text(encoding="utf-8").splitlines() if progress and progress.exists() else []
    )
    outcomes = {}
    for fields in map(json.loads, lines):
        faults = [Fault(**fault) for fault in fields.pop("struck")]
        number = fields.pop("case")
        outcomes[number] = Outcome(struck=faults, **fields)
    return outcomes


def run_crowds(folder: Path, count: int, undisturbed: Reference, turn: Turn) -> list[CrowdResult]:
    """Start many at once: the same run, then two different ones."""
    results = []
    for name, rows in (
        (("same", identical_runs(count)), ("two", two_runs_in_turn(count))) if count else ()
    ):
        turn.take()
        results.append(start_crowd(folder / name, rows, undisturbed))
        last = results[-1]
        print(f"{last.starts} starts at once ({name}): {last.cells} cells, {len(last.wrong)} wrong")
        for line in last.wrong:
            print(f"  {line}", flush=True)
    return results


def main() -> int:
    """Try every case, print what is wrong, and write the figures where all were tried."""
    options = _options(sys.argv[1:])
    os.environ[STATES] = "0"
    turn = Turn(options.lock)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        turn.take()
        _forked.load()
        began = time.monotonic()
        undisturbed = reference(folder / "whole")
        all_cases = cases(undisturbed, options.seed)[: options.stores]
        total = sum(len(case.faults) for case in all_cases)
        print(
            f"undisturbed: {time.monotonic() - began:.1f} s; "
            f"{total} faults, {len(all_cases)} stores",
            flush=True,
        )
        outcomes = []
        for case in chosen_cases(all_cases, options):
            turn.take()
            outcomes.append(
                run_case(case, folder / f"case-{case.number}", undisturbed, options.progress)
            )
        crowd_results = run_crowds(folder, options.crowds, undisturbed, turn)
    print(json.dumps(_details(outcomes, options.seed)["kinds"]))
    if not options.only and not options.first:
        write_figures(Path(__file__).stem, _figures(outcomes, crowd_results, options.seed))
    wrong = sum(len(getattr(outcome, name)) for outcome in outcomes for name in UNITS)
    return int(bool(wrong + sum(len(result.wrong) for result in crowd_results)))


def _details(outcomes: Sequence[Outcome], seed: int) -> dict[str, object]:
    faults = [fault for outcome in outcomes for fault in outcome.struck]
    kinds = {f"{fault.deed} at {fault.operation}" for fault in faults}
    return {
        "seed": seed,
        "faults": len(faults),
        "stores": len(outcomes),
        "kinds": {
            name: sum(f"{fault.deed} at {fault.operation}" == name for fault in faults)
            for name in sorted(kinds)
        },
        "files": dict(sorted(Counter(fault.kind for fault in faults).items())),
    }


def _figures(
    outcomes: Sequence[Outcome], crowd_results: Sequence[CrowdResult], seed: int
) -> list[dict[str, object]]:
    details = _details(outcomes, seed)
    lines = {
        name: [line for outcome in outcomes for line in getattr(outcome, name)] for name in UNITS
    }
    figures = [
        figure(
            f"kills:{name}",
            [len(lines[name])],
            unit=unit,
            better="lower",
            target=0,
            details={**details, "first": lines[name][:5]},
        )
        for name, unit in UNITS.items()
    ]
    wrong = [line for result in crowd_results for line in result.wrong]
    starts = [{"starts": result.starts, "cells": result.cells} for result in crowd_results]
    unit = "of cells made twice, exits, lists or records, many starts at once"
    figures.append(
        figure(
            "kills:crowd",
            [len(wrong)],
            unit=unit,
            better="lower",
            target=0,
            details={"crowds": starts, "first": wrong[:5]},
        )
    )
    return figures


if __name__ == "__main__":
    sys.exit(main())
