"""Headers of columns by their old names, where somebody types one."""

from collections.abc import Collection

from harness.renames.notice import renames_of, warn_once


def current_column(header: str, tasks: Collection[str], *, typed_in: str) -> str:
    """Return the current header of a column that was typed.

    Its sign stays, and so does the name of a task, where the column is one of several tasks.
    """
    sign = "-" if header.startswith("-") else ""
    typed = header.removeprefix("-")
    for old, rename in renames_of("column").items():
        for task in ("", *tasks):
            headers = {
                f"{task} {old}".strip(): f"{task} {rename.new}",
                f"{old} {task}".strip(): f"{rename.new} {task}",
            }
            if typed in headers:
                warn_once(rename, where=f"{typed_in} {header}")
                return sign + headers[typed].strip()
    return header
