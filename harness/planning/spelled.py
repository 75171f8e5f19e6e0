"""Writes a configuration as the command that gives it again. No torch."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from harness.files.untrusted import parse_word
from harness.planning.config import RunConfig
from harness.planning.fields import Setting, settings_by_name


def typed_command(values: Mapping[str, Any]) -> str:
    """Return `harness run ...` with every setting that is not the default, for a shell.

    `values` are those of a `RunConfig` as JSON has them, as a run's file keeps them; what this
    version does not know is left out. A run that scored models without a teacher is `harness
    score`: it has no methods, and no noise floor, which it does not take.
    """
    settings = settings_by_name(RunConfig)
    known = {name: values[name] for name in settings if name in values}
    command = ["harness", "run"]
    if known.get("methods") in ([], ()) and known.get("noise") == 0:
        models = [spec.partition("=")[2] for spec in known.pop("checkpoint", [])]
        command = ["harness", "score", *known.pop("teacher", []), *models]
        known = {name: value for name, value in known.items() if name not in ("methods", "noise")}
    elif known.get("checkpoint") and known.get("methods") in ([], ()):
        known.pop("methods")  # left out beside checkpoints: they are the only rows
    for name, value in known.items():
        default = settings[name].field.get_default(call_default_factory=True)
        if _as_json(value) != _as_json(default):
            command += _typed(settings[name], value)
    return shlex.join(command)


def _as_json(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return list(value)
    return value if isinstance(value, (int, float, bool, dict)) or value is None else str(value)


def _typed(setting: Setting, value: Any) -> list[str]:
    """Return the words of one option."""
    flag = setting.flag
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if setting.name == "set":
        return [
            word
            for method, settings in value.items()
            for name, of_method in settings.items()
            for word in (flag, f"{method}.{name}={_word(of_method)}")
        ]
    if setting.name == "checkpoint":  # repeated: a path may hold commas
        return [word for spec in value for word in (flag, str(spec))]
    if isinstance(value, Mapping):
        return [flag, ",".join(f"{name}={part}" for name, part in value.items())]
    if isinstance(value, (list, tuple)):
        return [flag, ",".join(map(str, value))]
    return [flag, str(value)]


def _word(value: Any) -> str:
    """Write a method's setting as `--set` reads it: JSON, but for texts without quotes."""
    if isinstance(value, str) and parse_word(value) == value:
        return value
    return json.dumps(value)
