"""Builds lm-eval's own task objects from the YAML that lm-eval ships, fed with our items.

Prompt, filters, metric and stop strings stay upstream's; only the data set, the name and what a task states
beside it are ours. Nothing is downloaded and no file is written.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Rows = Iterable[Mapping[str, Any]]


def builtin(relative: str) -> dict[str, Any]:
    """Read one of the YAML files that lm-eval installs, for example `gsm8k/gsm8k.yaml`."""
    import lm_eval.tasks
    import yaml

    path = Path(lm_eval.tasks.__file__).parent / relative
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def configurable_task(base: Mapping[str, Any], *, rows: Callable[[str], Rows], splits: Iterable[str], **changes: Any) -> Any:
    """Return a `ConfigurableTask` with `base`'s definition, `changes` applied, over `rows(split)` for each split."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    data = {name: Dataset.from_list([dict(row) for row in rows(name)]) for name in splits}
    config = {key: copy.deepcopy(value) for key, value in base.items() if key not in {"tag", "dataset_path", "dataset_name"}}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every custom data set
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: data} | changes)
