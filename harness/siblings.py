"""Makes sure that `methods` and `suites` are ours: both are names that a user's folder may have."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from harness.errors import HarnessError

HOME = Path(__file__).parents[1]


def refuse_other_packages(*names: str) -> None:
    """Refuse a package of another project that Python finds before ours, without running its code.

    A folder of the name that is no package is passed over: Python takes it before a package of an
    editable installation, which it looks for last. Raises `HarnessError` with what was found, and
    how to start Python without it.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is None:
            spec = _load_ours(name)
        origin = Path(spec.origin) if spec and spec.origin else None
        if origin is None or origin.parent != HOME / name:
            problem = f"{origin} is found in its place" if origin else "it is not there"
            raise HarnessError(
                f"the package {name} of compression-harness is needed and {problem}; type "
                "`harness` (or python -P), leave that folder out of PYTHONPATH, or rename yours"
            )


def _load_ours(name: str) -> ModuleSpec | None:
    """Import the package that lies beside `harness`; None where there is none."""
    spec = PathFinder.find_spec(name, [str(HOME)])
    if spec is not None and spec.loader is not None and spec.origin is not None:
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return spec
