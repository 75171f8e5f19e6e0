"""Visits models by turns: warm-up, captured steps on a GPU, and rounds until their rule ends them.

A round visits base, student, student, base, so that a drift of the machine meets both alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any, Protocol

from harness.errors import CellFailed
from harness.machine.monitor import InterferenceMonitor
from harness.measuring.ratios import speed_ratios
from harness.measuring.rounds import RoundsRule
from harness.measuring.scenario import Scenario

_NOT_CAPTURED = "NotCaptured: "  # stands before the reason that a process gives


class Timed(Protocol):
    """The parent's side of one model's timing process."""

    process: Any

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send the process one command and return its answer; raises `CellFailed` if it fails."""

    def restart(self) -> None:
        """End the process and start another one, which has not opened the model yet."""


def time_alternately(
    stopwatches: Mapping[str, Timed],
    scenario: Scenario,
    rule: RoundsRule,
    report_rounds: Callable[[int], None],
    *,
    visit_seconds: float,
    not_captured: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Warm up every model and visit them in turns; return the raw times and what disturbed them.

    `not_captured` is given on a GPU: decoding steps are captured there, and it is told of each
    model whose steps could not be, and why. Steps are captured for all models or for none.
    """
    fields, on_gpu = asdict(scenario), not_captured is not None
    warm = {
        role: stopwatch.ask("warm", scenario=fields, visit_seconds=visit_seconds)
        for role, stopwatch in stopwatches.items()
    }
    counts = {
        role: {name: answer[name] for name in ("runs", "prefills")} for role, answer in warm.items()
    }
    timing: dict[str, Any] = {"warm": warm}
    if not_captured is not None:
        captured = _capture(stopwatches, fields, visit_seconds, not_captured)
        timing["not_captured"] = dict(not_captured)
        for role, runs in captured.items():  # as many prefills as without
            prefills = counts[role]["prefills"] + counts[role]["runs"] - 1
            counts[role] = {"runs": 1, "prefills": prefills, "captured": runs}
    pids = [stopwatch.process.pid for stopwatch in stopwatches.values()]
    monitor = InterferenceMonitor(pids, gpu=on_gpu)
    report_rounds(0)
    monitor.begin()
    timing |= _visit_in_rounds(stopwatches, fields, counts, rule, report_rounds)
    remarks = list(monitor.end())
    if _any_clock_stood_still(timing):
        remarks.append("the clock stood still or ran backwards")
    return timing | {"dirty": remarks}


def _capture(
    stopwatches: Mapping[str, Timed],
    fields: Mapping[str, int],
    visit_seconds: float,
    not_captured: dict[str, str],
) -> dict[str, int]:
    """Capture the decoding steps of all models; return how many runs of each fill a visit.

    Where one model's cannot be captured nothing is returned: a captured and an eager model do not
    compare. A process whose capture failed may hold a broken stream, so another takes its place.
    """
    runs: dict[str, int] = {}
    for role, stopwatch in stopwatches.items():
        if role in not_captured:
            continue
        try:
            answer = stopwatch.ask("capture", scenario=fields, visit_seconds=visit_seconds)
        except CellFailed as problem:
            not_captured[role] = str(problem).rpartition(_NOT_CAPTURED)[2]
            stopwatch.restart()
            stopwatch.ask("open")
            stopwatch.ask("warm", scenario=fields, visit_seconds=visit_seconds)
        else:
            runs[role] = answer["runs"]
    if len(runs) == len(stopwatches):
        return runs
    for role in runs:
        stopwatches[role].ask("release")
    return {}


def _visit_in_rounds(
    stopwatches: Mapping[str, Timed],
    fields: Mapping[str, int],
    counts: Mapping[str, Mapping[str, int]],
    rule: RoundsRule,
    report_rounds: Callable[[int], None],
) -> dict[str, Any]:
    """Visit the models in rounds until the rule ends them; return the times of all runs."""
    # of each model: its visits, the runs of each visit, the times of each run's tokens
    visits: dict[str, list[list[list[float]]]] = {role: [] for role in stopwatches}
    captured: dict[str, list[list[list[float]]]] = {role: [] for role in stopwatches}
    with_base = "base" in stopwatches
    order = ("base", "student", "student", "base") if with_base else ("student", "student")
    for number in range(1, rule.most + 1):
        for role in order:
            answer = stopwatches[role].ask("visit", scenario=fields, **counts[role])
            visits[role].append(answer["stamps"])
            captured[role].append(answer.get("captured", []))
        report_rounds(number)
        is_captured = bool(captured["student"][0])
        ratios = speed_ratios(visits, captured if is_captured else None)
        if rule.is_enough(number, [ratios[name] for name in ("prefill", "decode") if ratios]):
            break
    return {"visits": visits} | ({"captured": captured} if is_captured else {})


def _any_clock_stood_still(timing: Mapping[str, Any]) -> bool:
    runs = (
        times
        for kind in ("visits", "captured")
        for model_visits in timing.get(kind, {}).values()
        for visit in model_visits
        for times in visit
    )
    return any(later <= earlier for times in runs for earlier, later in pairwise(times))
