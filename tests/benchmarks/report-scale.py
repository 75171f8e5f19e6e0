"""Seconds and memory of whole `harness report` and `harness check` commands at scale.

Reported: 1,000 records. Checked: 50 rows of 14,042 items.

python tests/benchmarks/report-scale.py
"""

import random
import resource
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from _form import figure, time_command, write_figures
from _records import frozen_baseline, scored_record

from harness.records.baseline import write_baseline
from harness.records.record import write_record


def marks(share: float, n: int, draw: random.Random) -> str:
    """Return n made-up outcomes."""
    return "".join("1" if draw.random() < share else "0" for _ in range(n))


def flip_some(before: str, share: float, draw: random.Random) -> str:
    """Return outcomes of which a share is flipped."""
    return "".join(
        ("0" if mark == "1" else "1") if draw.random() < share else mark for mark in before
    )


def run(*arguments: str, ends: int = 0) -> tuple[float, float]:
    """Run the command; return its seconds and its peak in MiB."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    line = [
        sys.executable,
        "-c",
        f"import sys; sys.argv = ['harness', *{list(arguments)!r}]; from harness.cli.app import "
        "main; main()",
    ]
    seconds, _, done = time_command(line)
    if done.returncode != ends:
        raise SystemExit(
            f"{arguments}: {done.returncode}: {done.stderr[-500:]}{done.stdout[-500:]}"
        )
    return seconds, max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


class Sizes(NamedTuple):
    """How many records are reported, and the bytes of two baselines."""

    records: int
    baseline_bytes: int  # 50 rows of 14,042 items
    small_baseline_bytes: int  # 10 rows of 1,319 items


def write_files(folder: Path, draw: random.Random) -> Sizes:
    """Write the records to report, the records to check and their baselines."""
    teacher = marks(0.7, 1319, draw)
    records = [scored_record("teacher", teacher)]
    for at in range(333):
        label, share = f"response[temperature={at}]", 0.1 + at / 2000
        records += [
            scored_record(label, flip_some(teacher, share, draw), seed) for seed in (1, 2, 3)
        ]
    for at, record in enumerate(records):
        write_record(folder / "report" / f"{at}.json", record)

    base = marks(0.6, 14_042, draw)
    rows = [scored_record(f"method{at}", flip_some(base, 0.05, draw)) for at in range(50)]
    frozen = [scored_record("teacher", base), *rows]
    write_baseline(folder / "baseline.json", frozen_baseline(*frozen))
    for at, record in enumerate(frozen):
        before = record.scores[0].outcomes["strict-match"]
        changed = scored_record(record.label, flip_some(before, 0.02, draw))
        write_record(folder / "check" / f"{at}.json", changed)

    small = [scored_record(f"method{at}", flip_some(teacher, 0.05, draw)) for at in range(10)]
    small_baseline = frozen_baseline(scored_record("teacher", teacher), *small)
    write_baseline(folder / "small.json", small_baseline)
    sizes = ((folder / name).stat().st_size for name in ("baseline.json", "small.json"))
    return Sizes(len(records), *sizes)


def main() -> None:
    """Write records, run both commands three times each."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sizes = write_files(folder, random.Random(0))
        report = ("report", str(folder / "report"), "--out", str(folder / "tables"))
        check = ("check", str(folder / "check"), "--baseline", str(folder / "baseline.json"))
        reports = [run(*report) for _ in range(3)]
        checks = [run(*check) for _ in range(3)]
    peak = max(peak for _, peak in reports)
    more = {"rows": 50, "items": 14_042, "baseline bytes": sizes.baseline_bytes}
    figures = [
        figure(
            "report-scale:report",
            [seconds for seconds, _ in reports],
            unit="s",
            better="lower",
            target=5.0,
            details={"records": sizes.records, "items": 1319, "peak MiB": peak},
        ),
        figure(
            "report-scale:check",
            [seconds for seconds, _ in checks],
            unit="s",
            better="lower",
            target=5.0,
            details=more,
        ),
        figure(
            "report-scale:memory",
            [max(peak for _, peak in [*reports, *checks])],
            unit="MiB, peak",
            better="lower",
            target=500.0,
        ),
        figure(
            "report-scale:baseline",
            [sizes.small_baseline_bytes / 1000],
            unit="kB, 10 methods on 1,319 items",
            better="lower",
            target=200.0,
        ),
    ]
    write_figures(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
