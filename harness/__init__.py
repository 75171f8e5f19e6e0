"""Evaluation-first benchmarking of LLM compression: `run` makes students and scores them, `load_records` reads them.

Both doors are loaded lazily, so that importing this package imports neither torch nor pandas.
"""

from typing import TYPE_CHECKING, Any

from harness.renames.modules import read_old_modules

if TYPE_CHECKING:
    from harness.api import Run, load_records, run
    from harness.errors import HarnessError

__all__ = ["HarnessError", "Run", "load_records", "run"]
__version__ = "0.1.0"
read_old_modules()


def __getattr__(name: str) -> Any:
    if name == "HarnessError":
        from harness.errors import HarnessError

        return HarnessError
    if name in __all__:
        from harness import api

        return getattr(api, name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
