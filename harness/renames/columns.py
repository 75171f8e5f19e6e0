"""Headers of columns by their old names, where somebody types one."""

from collections.abc import Collection

from harness.renames.notice import renames_of, warn_once


def current_column(header: str, tasks: Collection[str], *, typed_in: str) -> str:
    """Return a column that was typed by the header that it has now.

    Its sign stays, and so does the name of a task, where the column is one of several tasks.
    """
    sign = "-" if header.startswith("-") else ""
    typed = header.removeprefix("-")
    for old, rename in renames_of("column").items():
        for task in ("", *tasks):
            forms = {
                f"{task} {old}".strip(): f"{task} {rename.new}",
                f"{old} {task}".strip(): f"{rename.new} {task}",
            }
            if typed in forms:
                warn_once(rename, where=f"{typed_in} {header}")
                return sign + forms[typed].strip()
    return header
