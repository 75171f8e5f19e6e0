"""The form of a benchmark's result (`results/benchmarks/NAME.json`), and the table of all."""

import json
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median

from harness.machine.processor import machine_label

RESULTS = Path(__file__).parents[2] / "results" / "benchmarks"


def figure(
    name: str,
    values: Sequence[float],
    *,
    unit: str,
    better: str,
    target: float | None,
    peer: str = "",
    details: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return a figure: the median of its runs, their range, and whether the target is met.

    `met` is None where there is no target: the figure explains another one.
    """
    value = median(values)
    met = None if target is None else value >= target if better == "higher" else value <= target
    return {
        "name": name,
        "value": round(value, 4),
        "low": round(min(values), 4),
        "high": round(max(values), 4),
        "unit": unit,
        "better": better,
        "target": target,
        "met": met,
        "peer": peer,
        "command": f"python tests/benchmarks/{Path(sys.argv[0]).name}",
        "machine": machine_label(),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "details": dict(details or {}),
    }


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "lm-eval", "pandas")},
    }


def time_command(
    command: Sequence[str], **options: object
) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """Run a command; return wall seconds, CPU seconds (with children) and the ended process."""
    import time

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def write_figures(name: str, figures: Sequence[Mapping[str, object]]) -> None:
    """Write a program's figures, then the table of all programs, and print them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    body = figures[0] if len(figures) == 1 else list(figures)
    (RESULTS / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "README.md").write_text(
        f"# Benchmarks\n\nGenerated from the JSON files beside it.\n\n{table()}\n", encoding="utf-8"
    )
    for entry in figures:
        verdict = {True: "met", False: "NOT met", None: "none"}[entry["met"]]
        value = f"{entry['value']} {entry['unit']} [{entry['low']}, {entry['high']}]"
        print(f"{entry['name']}: {value}, target {entry['target']}: {verdict}")


def table() -> str:
    """Return the Markdown table of all committed figures."""
    lines = [
        "| figure | value | range | target | met | machine | date |",
        "|:--|--:|--:|--:|:--|:--|:--|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        body = json.loads(path.read_text(encoding="utf-8"))
        for entry in body if isinstance(body, list) else [body]:
            sign = ">=" if entry["better"] == "higher" else "<="
            target = "-" if entry["target"] is None else f"{sign} {entry['target']:g}"
            met = {True: "yes", False: "no", None: "-"}[entry["met"]]
            lines.append(
                f"| {entry['name']} | {entry['value']:g} {entry['unit']} | {entry['low']:g} to "
                f"{entry['high']:g} | {target} | "
                f"{met} | {entry['machine']} | {entry['date']} |"
            )
    return "\n".join(lines)
