"""Builds lm-eval's own task objects from the YAML that lm-eval ships, with our items or the Hub's.

Prompt, filters, metric and stop strings stay lm-eval's. Ours are the data set, the name, and what a
task states as a change. No file is written.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, in_one_line
from harness.files.untrusted import Limits, read_text_file
from harness.renames.modules import by_old_name

_YAML_LIMITS = Limits(bytes=8 * 2**20)  # it may hold the shots
_MAX_VALUES = 200_000  # of one file

Rows = Iterable[Mapping[str, Any]]


def read_yaml(path: Path, *, functions: bool = True) -> dict[str, Any]:
    """Read a task's YAML as lm-eval does, with `include` merged in.

    `functions`: import what `!function` names, else keep it as text. Raises `HarnessError` for a
    file that is no YAML or no task.
    """
    from lm_eval.tasks._yaml_loader import load_yaml
    from yaml import YAMLError

    read_text_file(path, _YAML_LIMITS)
    try:
        config = dict(load_yaml(path, resolve_func=functions))
    except (YAMLError, RecursionError) as problem:
        raise HarnessError(f"{path} is no YAML ({in_one_line(problem)}); correct it") from problem
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as problem:
        if functions:
            raise  # an error of a function's module: building the task explains it
        raise HarnessError(
            f"{path} is no task of lm-eval ({in_one_line(problem)}); correct it"
        ) from problem
    _refuse_large(config, path)
    return config


def _refuse_large(value: Any, path: Path) -> None:
    """Raise `HarnessError` for a YAML with too many values, or one that contains itself.

    A few aliases can make it so large that walking it would not end.
    """
    queue, count = [value], 0
    while queue:
        part = queue.pop()
        count += 1
        if count > _MAX_VALUES:
            raise HarnessError(
                f"{path} holds more than {_MAX_VALUES:,} values with aliases expanded; correct it"
            )
        if isinstance(part, dict):
            queue += part.values()
        elif isinstance(part, list):
            queue += part


def builtin_path(relative: str) -> Path:
    """Return where lm-eval installs one of its task files, for example `gsm8k/gsm8k.yaml`."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / relative


def read_builtin(relative: str) -> dict[str, Any]:
    """Read one of the YAML files that lm-eval installs, for example `gsm8k/gsm8k.yaml`."""
    return read_yaml(builtin_path(relative))


def build_task_over_rows(
    base: Mapping[str, Any], *, rows: Callable[[str], Rows], splits: Iterable[str], **changes: Any
) -> Any:
    """Return a `ConfigurableTask` like `base` with `changes`, over `rows(split)` of each split."""
    from datasets import Dataset

    data = {name: Dataset.from_list([dict(row) for row in rows(name)]) for name in splits}
    without_data = {
        key: value for key, value in base.items() if key not in {"dataset_path", "dataset_name"}
    }
    return build_task(without_data, custom_dataset=lambda **_: data, **changes)


def build_task(base: Mapping[str, Any], **changes: Any) -> Any:
    """Return a `ConfigurableTask` like `base` with `changes`; it loads the data set of `base`."""
    from lm_eval.api.task import ConfigurableTask

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every custom data set
    config = {
        key: copy.deepcopy(value)
        for key, value in base.items()
        if key not in {"tag", "group", "task_list"}
    }
    return ConfigurableTask(config=config | changes)


def hub_rows(path: str, name: str, split: str) -> Iterable[dict[str, Any]]:
    """Return one split of a data set of the Hub; use it inside `explaining_hub_errors`."""
    from datasets import load_dataset

    rows: Iterable[dict[str, Any]] = load_dataset(path, name, split=split)
    return rows


def data_dir_hint(files: Sequence[str]) -> str:
    """Return what to do where the Hub cannot be reached."""
    return f"give --data-dir a folder with {' and '.join(files)}"


@contextmanager
def explaining_hub_errors(task: str, remedy: str) -> Iterator[None]:
    """Turn whatever stops a download into one `HarnessError` that ends in `remedy`."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (OSError, ValueError, DatasetsError, *HfHubHTTPError.__bases__) as problem:
        # a half-filled cache raises a ValueError; the bases are the errors of the HTTP client that
        # huggingface_hub uses
        reason = next(iter(str(problem).splitlines()), "") or type(problem).__name__
        raise HarnessError(
            f"{task}: the Hugging Face Hub could not be reached ({reason[:120]}); {remedy}"
        ) from problem


__getattr__ = by_old_name(__name__)
