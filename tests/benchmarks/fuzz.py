"""Every reader beside harmed files: tracebacks, numbers believed that were not written, readers
that do not come back.

python tests/benchmarks/fuzz.py [seed]
"""

import sys
import tempfile
from pathlib import Path

from _form import figure, write
from _fuzz import TARGETS, Found, fuzz

EACH = 75  # mutations of every kind of file


def main() -> None:
    """Harm every kind of file, print what is not as it should be, and write the three counts."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            found[target.name] = one = fuzz(
                target, Path(folder) / target.name.replace(" ", "-"), count=EACH, seed=seed
            )
            print(
                f"{target.name}: {one.tried} tried, {one.refused} refused or made again", flush=True
            )
            for line in (*one.tracebacks, *one.silent, *one.hangs):
                print(f"  {line}", flush=True)
    details = {
        "mutations": sum(one.tried for one in found.values()),
        "seed": seed,
        "kinds": {
            name: {"tried": one.tried, "refused or made again": one.refused}
            for name, one in found.items()
        },
    }
    units = {
        "tracebacks": "mutated files that end in a traceback",
        "silent": "mutated files of which something is believed or shown that was not written",
        "hangs": "mutated files whose reader does not come back",
    }
    counts = {
        name: [line for one in found.values() for line in getattr(one, name)] for name in units
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
    write(Path(__file__).stem, figures)


if __name__ == "__main__":
    main()
