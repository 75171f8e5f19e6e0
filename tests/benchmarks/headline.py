"""Wall seconds and peak memory of the headline command: from nothing, then cached.

python tests/benchmarks/headline.py [RUNS]
"""

import resource
import sys
import tempfile
from pathlib import Path

from _form import figure, time_command, write_figures


def main() -> None:
    """Run the command cold and cached, RUNS times each."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    cold, cached, cells = [], [], {}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-P",
                "-m",
                "harness.cli",
                "run",
                "--methods",
                "cot,response",
                "--suite",
                "math",
                "--out",
                f"{folder}/runs",
                "--cache",
                f"{folder}/cache",
            ]
            wall, _, done = time_command(command, cwd=folder)
            if done.returncode:
                sys.exit(done.stderr)
            cold.append(wall)
            for _ in range(3):
                wall, _, again = time_command(command, cwd=folder)
                cached.append(wall)
                assert again.stdout.split("tables:")[0] == done.stdout.split("tables:")[0], (
                    "the cached table differs"
                )
            cells = {
                line.partition(":")[0]: line.rpartition("(")[2].rstrip(")")
                for line in done.stderr.splitlines()
                if line.endswith(" s)")
            }
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    write_figures(
        Path(__file__).stem,
        [
            figure(
                "headline:cold",
                cold,
                unit="s",
                better="lower",
                target=360,
                details={"seconds by cell": cells},
            ),
            figure("headline:cached", cached, unit="s", better="lower", target=10),
            figure(
                "headline:memory",
                [memory],
                unit="GiB",
                better="lower",
                target=4,
                details={"of": "the largest process"},
            ),
        ],
    )


if __name__ == "__main__":
    main()
