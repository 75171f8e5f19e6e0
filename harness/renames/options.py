"""Options by their old names: typed, in run files and as arguments of `harness.run`."""

from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import HarnessError
from harness.renames.notice import find_rename, renames_of, warn_once


def current_options(options: Mapping[str, Any], *, where: str = "") -> dict[str, Any]:
    """Return values by the current names of options.

    Raises `HarnessError` where one is given by both names, with two values.
    """
    current: dict[str, Any] = {}
    for name, value in options.items():
        rename = find_rename("option", name)
        if rename is None:
            current[name] = value
            continue
        if options.get(rename.new, value) != value:
            raise HarnessError(
                f"{where + ': ' if where else ''}{name}={value} and "
                f"{rename.new}={options[rename.new]} are two names for one option, "
                f"and differ; which is meant? Keep {rename.new}, its name now"
            )
        warn_once(rename, where=where or name)
        current[rename.new] = value
    return current


def current_flags(typed: Sequence[str]) -> list[str]:
    """Return what was typed with current flags in place of `--old 3`, `--old=3` and `--no-old`.

    What stands after `--` is no flag. Raises `HarnessError` where both names are typed.
    """
    flags = {
        prefix + _dashed(old): rename
        for old, rename in renames_of("option").items()
        for prefix in ("--", "--no-")
    }
    end = typed.index("--") if "--" in typed else len(typed)
    present = {word.partition("=")[0] for word in typed[:end]}
    current = []
    for word in typed[:end]:
        flag, equals, value = word.partition("=")
        rename = flags.get(flag)
        if rename is not None:
            new = flag.removesuffix(_dashed(rename.old)) + _dashed(rename.new)
            if present & {f"--{_dashed(rename.new)}", f"--no-{_dashed(rename.new)}"}:
                raise HarnessError(
                    f"{flag} and {new} are two names for one option; which is meant? Keep {new}, "
                    "its name now"
                )
            warn_once(rename, where=flag)
            flag = new
        current.append(flag + equals + value)
    return current + list(typed[end:])


def _dashed(name: str) -> str:
    return name.replace("_", "-")
