"""Seconds and memory of whole `harness report` and `harness check` commands at scale.

Reported: 1,000 records. Checked: 50 rows of 14,042 items.

python tests/benchmarks/report-scale.py
"""

import random
import resource
import sys
import tempfile
from pathlib import Path

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


def main() -> None:
    """Write records, run both commands three times each."""
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        teacher = marks(0.7, 1319, draw)
        many = [scored_record("teacher", teacher)]
        for at in range(333):
            many += [
                scored_record(
                    f"response[temperature={at}]", flip_some(teacher, 0.1 + at / 2000, draw), seed
                )
                for seed in (1, 2, 3)
            ]
        for at, record in enumerate(many):
            write_record(folder / "report" / f"{at}.json", record)
        base = marks(0.6, 14_042, draw)
        rows = [scored_record(f"method{at}", flip_some(base, 0.05, draw)) for at in range(50)]
        write_baseline(
            folder / "baseline.json", frozen_baseline(scored_record("teacher", base), *rows)
        )
        for at, record in enumerate([scored_record("teacher", base), *rows]):
            changed = scored_record(
                record.label, flip_some(record.scores[0].outcomes["strict-match"], 0.02, draw)
            )
            write_record(folder / "check" / f"{at}.json", changed)
        size = (folder / "baseline.json").stat().st_size
        small = [scored_record(f"method{at}", flip_some(teacher, 0.05, draw)) for at in range(10)]
        write_baseline(
            folder / "small.json", frozen_baseline(scored_record("teacher", teacher), *small)
        )
        small_size = (folder / "small.json").stat().st_size
        reports = [
            run("report", str(folder / "report"), "--out", str(folder / "tables")) for _ in range(3)
        ]
        checks = [
            run("check", str(folder / "check"), "--baseline", str(folder / "baseline.json"))
            for _ in range(3)
        ]
    details = {
        "records": len(many),
        "items": 1319,
        "peak MiB": max(sample[1] for sample in reports),
    }
    more = {"rows": 50, "items": 14_042, "baseline bytes": size}
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "report-scale:report",
                [sample[0] for sample in reports],
                unit="s",
                better="lower",
                target=5.0,
                details=details,
            ),
            figure(
                "report-scale:check",
                [sample[0] for sample in checks],
                unit="s",
                better="lower",
                target=5.0,
                details=more,
            ),
            figure(
                "report-scale:memory",
                [max(sample[1] for sample in [*reports, *checks])],
                unit="MiB, peak",
                better="lower",
                target=500.0,
            ),
            figure(
                "report-scale:baseline",
                [small_size / 1000],
                unit="kB, 10 methods on 1,319 items",
                better="lower",
                target=200.0,
            ),
        ],
    )


if __name__ == "__main__":
    main()
