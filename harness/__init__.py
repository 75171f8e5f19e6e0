"""Evaluation-first benchmarking of LLM compression.

`run` makes students and scores them; `load_records` reads the records, `recommend` names the row to
take, `export_student` writes its student for servers. All are loaded lazily, so that importing this
package imports neither torch nor pandas.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    from harness.api import Run, export_student, load_records, recommend, run
    from harness.errors import HarnessError

__all__ = ["HarnessError", "Run", "export_student", "load_records", "recommend", "run"]
__version__ = "0.1.0"


class _OldModules:
    """Finds modules of ours that are imported by their old names.

    Python asks it last, so nothing that has its name today waits for it, and the table of old names
    is loaded only when something is missing.
    """

    @classmethod
    def find_spec(
        cls, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname.partition(".")[0] not in ("harness", "methods"):
            return None
        from harness.renames.modules import spec_of

        return spec_of(fullname)


sys.meta_path.append(_OldModules)


def __getattr__(name: str) -> Any:
    if name == "HarnessError":
        from harness.errors import HarnessError

        return HarnessError
    if name in __all__:
        from harness import api

        return getattr(api, name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
