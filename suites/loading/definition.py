"""Where tasks of lm-eval and of the user's YAML files are defined, and what their files say.

A name stands for one task, or for a group or tag with several member tasks.
"""

import difflib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import HarnessError, in_one_line, unknown
from suites.loading.hub_folder import with_local_splits
from suites.loading.lm_eval import read_yaml

LM_EVAL_PREFIX = "lm-eval:"
# Readers of local files; any other `dataset_path` that is no folder is a name on the Hub.
LOCAL_FORMATS = frozenset(
    {"json", "csv", "parquet", "text", "arrow", "pandas", "xml", "webdataset"}
)
DEFAULT_METRICS = {
    "choose": ["acc", "acc_norm"],
    "continue": ["perplexity", "acc"],
    "generate": ["exact_match"],
    "perplexity": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
}


def full_name(name: str) -> str:
    """Return a task's name as a user types it, `lm-eval:NAME`."""
    return f"{LM_EVAL_PREFIX}{name}"


class TaskAndMetric(NamedTuple):
    """A name as a user types it, in its two parts."""

    task: str  # lm-eval's name
    metric: str  # the metric of the figure; "" for the task's own choice


def split_metric(name: str) -> TaskAndMetric:
    """Split `lm-eval:NAME` or `lm-eval:NAME:METRIC`."""
    task, _, metric = name.removeprefix(LM_EVAL_PREFIX).partition(":")
    return TaskAndMetric(task, metric)


@dataclass(frozen=True, kw_only=True)
class TaskDefinition:
    """One task: the YAML file that defines it, and what the groups above it change."""

    name: str
    path: Path
    changes: Mapping[str, Any]
    local: bool  # from the user's folder, so that its files are part of its version
    data_folder: Path | None = None  # where data sets of the Hub may lie, below hub/

    @property
    def full_name(self) -> str:
        """The name as a user types it, `lm-eval:NAME`."""
        return full_name(self.name)

    def settings(self, *, functions: bool = False) -> dict[str, Any]:
        """Return the YAML with the groups' changes, and local data as absolute paths.

        `datasets` would look for relative paths in the working directory. A data set of the Hub
        that lies in the data folder is read there. `functions`: import the functions that the YAML
        names, else keep them as text. Raises `HarnessError` where that copy lacks what is scored.
        """
        config = (
            read_yaml(self.path, functions=functions) | dict(self.changes) | {"task": self.name}
        )
        data = dict(config.get("dataset_kwargs") or {})
        dataset = config.get("dataset_path")
        if isinstance(dataset, str) and dataset not in LOCAL_FORMATS:
            config["dataset_path"] = self._absolute_if_local(dataset)
        if reads_local_files(config):
            if "data_files" in data:
                folder = Path(self._data_root(config)) / str(data.get("data_dir") or "")
                data["data_files"] = self._absolute(data["data_files"], folder)
            if isinstance(data.get("data_dir"), str):
                data["data_dir"] = self._absolute_if_local(data["data_dir"])
        config |= {"dataset_kwargs": data} if data else {}
        if reads_local_files(config):
            return config
        return with_local_splits(self.full_name, config, self.data_folder)

    def _data_root(self, config: Mapping[str, Any]) -> Path:
        """Return the folder that data files are relative to: the data set's, else the YAML's."""
        dataset = Path(str(config.get("dataset_path") or ""))
        return dataset if dataset.is_absolute() and dataset.is_dir() else self.path.parent

    def _absolute_if_local(self, name: str) -> str:
        """Return the absolute path of a file or folder beside the YAML; any other name as it is."""
        path = self.path.parent / name
        return str(path.resolve()) if "://" not in name and name and path.exists() else name

    def _absolute(self, files: Any, folder: Path) -> Any:
        """Return file names, also nested in lists and by split, as paths in `folder`."""
        if isinstance(files, Mapping):
            return {split: self._absolute(names, folder) for split, names in files.items()}
        if isinstance(files, list):
            return [self._absolute(names, folder) for names in files]
        return files if "://" in str(files) else str(folder / files)

    def data_files(self) -> list[Path]:
        """Return the local data files that the task names, in name order; of folders every file.

        Raises `HarnessError` for a file that does not exist.
        """
        config = self.settings()
        data = config.get("dataset_kwargs") or {}
        if not reads_local_files(config):
            return []
        files: set[Path] = set()
        for name in strings_in(data.get("data_files")):
            if "://" in name:
                continue
            path = Path(name)
            matches = list(path.parent.glob(path.name))  # a pattern stands for several files
            if not matches:
                raise HarnessError(
                    f"{self.full_name}: {self.path} names the data file {path}, which does not "
                    "exist; correct data_files or add the file"
                )
            files.update(matches)
        for folder_name in (data.get("data_dir"), config.get("dataset_path")):
            folder = Path(str(folder_name or ""))
            if folder.is_absolute():
                files.update(files_below(folder))
        return sorted(files)


def reads_local_files(settings: Mapping[str, Any]) -> bool:
    """Tell whether a task's data set is read from files of this machine."""
    path = settings.get("dataset_path")
    return path in LOCAL_FORMATS or (isinstance(path, str) and Path(path).is_absolute())


def files_below(path: Path) -> list[Path]:
    """Return a file itself, or all files below a folder but hidden ones, in name order."""
    if path.is_file():
        return [path]
    return sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )


def strings_in(value: Any) -> Iterator[str]:
    """Yield every string of nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from strings_in(part)


def metrics_of(settings: Mapping[str, Any], kind: str) -> list[str]:
    """Return the names of a task's metrics in its own order; of a function, the function's name."""
    metrics = settings.get("metric_list")
    if not metrics:
        names = DEFAULT_METRICS[kind]
    else:
        names = [str(getattr(entry["metric"], "__name__", entry["metric"])) for entry in metrics]
    # lm-eval names a metric that is a path by the last part
    return [name.rpartition(".")[2] if "/" in name or "\\" in name else name for name in names]


@dataclass(frozen=True)
class GroupAverage:
    """How a group's own file averages a metric over its tasks."""

    metric: str
    by_size: bool  # every item counts alike, else every task


@lru_cache(maxsize=8)
def _task_index(include_path: str | None, defaults: bool) -> dict[str, Any]:
    """Return lm-eval's index of names; `defaults` adds lm-eval's own tasks.

    That takes about 20 s, so it is done once per process.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        return dict(TaskManager(include_path=include_path, include_defaults=defaults).task_index)
    except Exception as problem:
        if include_path is None:
            raise
        raise HarnessError(
            f"--include-path {include_path}: a YAML in it is no task of lm-eval "
            f"({in_one_line(problem)}); correct it"
        ) from problem


def _definitions_of(
    index: Mapping[str, Any], name: str, changes: Mapping[str, Any], users_folder: Path | None
) -> Iterator[TaskDefinition]:
    """Yield the tasks that a name stands for, in lm-eval's order.

    Raises `KeyError` for an unknown member, `HarnessError` for a task that is a Python class.
    """
    entry = index[name]
    kind = entry.kind.name
    if kind == "TAG":
        for member in sorted(entry.tags):
            yield from _definitions_of(index, member, changes, users_folder)
    elif kind == "GROUP":
        yield from _definitions_of_group(index, read_yaml(entry.yaml_path), changes, users_folder)
    elif kind == "TASK":
        local = users_folder is not None and users_folder in entry.yaml_path.resolve().parents
        yield TaskDefinition(name=name, path=entry.yaml_path, changes=changes, local=local)
    else:
        raise HarnessError(
            f"{full_name(name)} is a Python class, and only tasks written in YAML can be scored; "
            "choose another task"
        )


def _definitions_of_group(
    index: Mapping[str, Any],
    group: Mapping[str, Any],
    changes: Mapping[str, Any],
    users_folder: Path | None,
) -> Iterator[TaskDefinition]:
    """Yield the tasks of a group, each with what this group and the groups above it change.

    Changes from above win over the group's own. Tasks in `users_folder` are marked as local.
    """
    from dataclasses import fields

    from lm_eval.config.group import GroupConfig

    group_keys = {field.name for field in fields(GroupConfig)}
    inherited = {key: value for key, value in group.items() if key not in group_keys}
    inherited |= dict(changes)
    members = group["task"] if isinstance(group["task"], list) else [group["task"]]
    for member in members:
        if isinstance(member, str):
            yield from _definitions_of(index, member, inherited, users_folder)
        elif "group" in member and member["group"] not in index:
            yield from _definitions_of_group(index, member, inherited, users_folder)
        else:
            name = member.get("group") or member["task"]
            overrides = {
                key: value for key, value in member.items() if key not in {"group", "task"}
            }
            yield from _definitions_of(index, name, inherited | overrides, users_folder)


def _group_averages(entry: Any) -> list[GroupAverage]:
    """Return what a group's file states under `aggregate_metric_list`; [] for tasks and tags."""
    if entry.kind.name != "GROUP":
        return []
    aggregates = read_yaml(entry.yaml_path, functions=False).get("aggregate_metric_list") or []
    averages = aggregates if isinstance(aggregates, list) else [aggregates]
    return [
        GroupAverage(str(average["metric"]), bool(average.get("weight_by_size", True)))
        for average in averages
    ]


class FoundTasks(NamedTuple):
    """The tasks that a name stands for, and how a group of that name averages them."""

    definitions: list[TaskDefinition]
    averages: list[GroupAverage]


def find_tasks(name: str, include_path: Path | None) -> FoundTasks:
    """Find the tasks that a name stands for, in the user's folder first, then in lm-eval's own.

    Raises `HarnessError` for an unknown name, and for a group with an unknown member.
    """
    folder = str(include_path) if include_path else None
    # the user's folder alone is read in a moment, lm-eval's own tasks in 20 s
    for defaults in (False, True) if folder else (True,):
        index = _task_index(folder, defaults)
        if name in index:
            try:
                definitions = list(_definitions_of(index, name, {}, include_path))
                return FoundTasks(definitions, _group_averages(index[name]))
            except KeyError as missing:  # a group of the user's may name tasks of lm-eval
                if defaults:
                    raise HarnessError(
                        f"{full_name(name)} names {missing}, which lm-eval does not know; "
                        "correct the group"
                    ) from missing
    names = _task_index(folder, False) if folder else index
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if similar or folder:
        raise unknown(
            "lm-eval task",
            name,
            names,
            hint=f"(in {folder})" if folder else "(type: lm-eval ls tasks)",
        )
    raise HarnessError(
        f"unknown lm-eval task {name!r}; type: lm-eval ls tasks, or give --include-path the folder "
        "of your own YAML files"
    )
