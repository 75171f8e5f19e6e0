"""Each reader with harmed files: tracebacks, false numbers that are believed, and hangs.

python tests/benchmarks/fuzz.py [seed]
"""

import sys
import tempfile
from pathlib import Path

from _form import figure, write_figures
from _fuzz import TARGETS, FuzzResult, fuzz

EACH = 75  # mutations of every kind of file


def main() -> None:
    """Harm every kind of file, print what is not as it should be, and write the three counts."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    results: dict[str, FuzzResult] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            results[target.name] = result = fuzz(
                target, Path(folder) / target.name.replace(" ", "-"), count=EACH, seed=seed
            )
            print(
                f"{target.name}: {result.tried} tried, {result.refused} refused or computed again",
                flush=True,
            )
            for line in (*result.tracebacks, *result.silent, *result.hangs):
                print(f"  {line}", flush=True)
    details = {
        "mutations": sum(result.tried for result in results.values()),
        "seed": seed,
        "kinds": {
            name: {"tried": result.tried, "refused or made again": result.refused}
            for name, result in results.items()
        },
    }
    units = {
        "tracebacks": "mutated files that end in a traceback",
        "silent": "mutated files of which something is believed or shown that was not written",
        "hangs": "mutated files whose reader does not come back",
    }
    counts = {
        name: [line for result in results.values() for line in getattr(result, name)]
        for name in units
    }
    figures = [
        figure(
            f"fuzz:{name}",
            [len(lines)],
            unit=units[name],
            better="lower",
            target=0,
            details={**details, "first": lines[:5]},
        )
        for name, lines in counts.items()
    ]
    write_figures(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
