"""Makes sure that `methods` and `suites` are ours: both are names that a user's folder may have."""

import importlib.util
from pathlib import Path

from harness.errors import HarnessError

HOME = Path(__file__).parents[1]


def refuse_other_packages(*names: str) -> None:
    """Refuse a package of another project that Python finds before ours, without running its code.

    Raises `HarnessError` with what was found, and how to start Python without it.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec and spec.origin else None
        if origin is None or origin.parent != HOME / name:
            problem = f"{origin} is found in its place" if origin else "it is not there"
            raise HarnessError(
                f"the package {name} of compression-harness is needed and {problem}; type "
                "`harness` (or python -P), leave that folder out of PYTHONPATH, or rename yours"
            )
