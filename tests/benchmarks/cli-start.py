"""CPU seconds of the commands that compute nothing: `--help`, `list`, and `report` on ten records.

python tests/benchmarks/cli-start.py
"""

import json
import sys
import tempfile
from pathlib import Path

from _form import figure, time_command, write_figures

STUDY = Path(__file__).parents[2] / "results" / "embedded" / "records"


def cpu_seconds(*arguments: str, runs: int = 7) -> list[float]:
    """Return the CPU seconds of several runs of a command."""
    values = []
    for _ in range(runs):
        _, seconds, done = time_command([sys.executable, "-P", "-m", "harness.cli", *arguments])
        if done.returncode:
            sys.exit(done.stderr)
        values.append(seconds)
    return values


def main() -> None:
    """Time the three commands."""
    with tempfile.TemporaryDirectory() as folder:
        for index, path in enumerate(sorted(STUDY.glob("*.json"))[:10]):
            (Path(folder) / f"{index}.json").write_text(json.dumps(json.loads(path.read_text())))
        write_figures(
            Path(__file__).stem,
            [
                figure(
                    "cli-start", cpu_seconds("--help"), unit="CPU s", better="lower", target=0.6
                ),
                figure(
                    "cli-start:list",
                    cpu_seconds("list", "methods"),
                    unit="CPU s",
                    better="lower",
                    target=0.6,
                ),
                figure(
                    "cli-start:report",
                    cpu_seconds("report", folder),
                    unit="CPU s",
                    better="lower",
                    target=2.5,
                    details={"records": 10},
                ),
            ],
        )


if __name__ == "__main__":
    main()
