"""Where lm-eval's tasks and the user's YAML files are defined: names, members, and how a group
averages them.
"""

import difflib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, in_one_line, unknown
from suites.loading.lm_eval import read_yaml

LM_EVAL_PREFIX = "lm-eval:"
# Readers of files, no names on the Hub.
LOCAL_FORMATS = frozenset(
    {"json", "csv", "parquet", "text", "arrow", "pandas", "xml", "webdataset"}
)
DEFAULT_METRICS = {
    "choose": ["acc", "acc_norm"],
    "generate": ["exact_match"],
    "perplexity": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
}


def full_name(name: str) -> str:
    """Return a task's name as a user types it, `lm-eval:NAME`."""
    return f"{LM_EVAL_PREFIX}{name}"


@dataclass(frozen=True, kw_only=True)
class TaskDefinition:
    """One task without children: where it is defined and what the groups above it change."""

    name: str
    path: Path
    changes: Mapping[str, Any]
    local: bool  # from the user's folder, so its text is part of its version

    @property
    def full_name(self) -> str:
        """The name as a user types it, `lm-eval:NAME`."""
        return full_name(self.name)

    def settings(self, *, functions: bool = False) -> dict[str, Any]:
        """Return the YAML with the groups' changes and with local data as absolute paths;
        `datasets` would use the working directory.
        """
        config = (
            read_yaml(self.path, functions=functions) | dict(self.changes) | {"task": self.name}
        )
        given = dict(config.get("dataset_kwargs") or {})
        if (
            isinstance(config.get("dataset_path"), str)
            and config["dataset_path"] not in LOCAL_FORMATS
        ):
            config["dataset_path"] = self._existing(config["dataset_path"])
        if reads_local_files(config):
            if "data_files" in given:
                given["data_files"] = self._absolute(
                    given["data_files"], Path(self._root(config)) / str(given.get("data_dir") or "")
                )
            if isinstance(given.get("data_dir"), str):
                given["data_dir"] = self._existing(given["data_dir"])
        return config | ({"dataset_kwargs": given} if given else {})

    def _root(self, config: Mapping[str, Any]) -> Path:
        """Return what data files are named from: a data set's own folder, else the YAML's."""
        stated = Path(str(config.get("dataset_path") or ""))
        return stated if stated.is_absolute() and stated.is_dir() else self.path.parent

    def _existing(self, stated: str) -> str:
        """Return an absolute path where a name stands for a file or folder beside the YAML, else
        the name.
        """
        beside = self.path.parent / stated
        return (
            str(beside.resolve()) if "://" not in stated and stated and beside.exists() else stated
        )

    def _absolute(self, files: Any, root: Path) -> Any:
        if isinstance(files, Mapping):
            return {split: self._absolute(given, root) for split, given in files.items()}
        if isinstance(files, list):
            return [self._absolute(given, root) for given in files]
        return files if "://" in str(files) else str(root / files)

    def data_files(self) -> list[Path]:
        """Return the local data files that the task names, in name order: every file of a
        folder.
        """
        config = self.settings()
        given = config.get("dataset_kwargs") or {}
        if not reads_local_files(config):
            return []
        found: set[Path] = set()
        for file in (Path(one) for one in strings_in(given.get("data_files")) if "://" not in one):
            matches = list(file.parent.glob(file.name))  # a pattern stands for several files
            if not matches:
                raise HarnessError(
                    f"{self.full_name}: no data file {file}, which {self.path} names; correct "
                    "data_files or add the file"
                )
            found.update(matches)
        for folder in (
            Path(str(given.get("data_dir") or "")),
            Path(str(config.get("dataset_path") or "")),
        ):
            if folder.is_absolute():
                found.update(files_below(folder))
        return sorted(found)


def reads_local_files(settings: Mapping[str, Any]) -> bool:
    """Tell whether a task's data set is read from this machine's files."""
    path = settings.get("dataset_path")
    return path in LOCAL_FORMATS or (isinstance(path, str) and Path(path).is_absolute())


def files_below(place: Path) -> list[Path]:
    """Return a file, or every file of a folder at any depth, hidden ones left out, in name
    order.
    """
    if place.is_file():
        return [place]
    return sorted(
        one
        for one in place.rglob("*")
        if one.is_file() and not any(part.startswith(".") for part in one.relative_to(place).parts)
    )


def strings_in(value: Any) -> Iterator[str]:
    """Yield every text in a value of nested mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from strings_in(part)


def metrics_of(settings: Mapping[str, Any], kind: str) -> list[str]:
    """Return the names of a task's metrics in its own order; of a function its own name, as lm-eval
    calls it.
    """
    listed = settings.get("metric_list")
    names = (
        [str(getattr(one["metric"], "__name__", one["metric"])) for one in listed]
        if listed
        else DEFAULT_METRICS[kind]
    )
    return [name.rpartition(".")[2] if "/" in name or "\\" in name else name for name in names]


@dataclass(frozen=True)
class GroupAverage:
    """How a group's own file averages a metric over its tasks."""

    metric: str
    by_size: bool


@lru_cache(maxsize=8)
def _task_index(include_path: str | None, defaults: bool) -> dict[str, Any]:
    """Return lm-eval's index of names; with its own tasks it takes about 20 s, so once per
    process.
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
    index: Mapping[str, Any], name: str, changes: Mapping[str, Any], folder: Path | None
) -> Iterator[TaskDefinition]:
    """Yield the tasks behind a name: itself, or a group's or tag's, in lm-eval's order. Raises
    `KeyError` for an unknown member.
    """
    entry = index[name]
    kind = entry.kind.name
    if kind == "TAG":
        for child in sorted(entry.tags):
            yield from _definitions_of(index, child, changes, folder)
    elif kind == "GROUP":
        yield from _definitions_of_group(index, read_yaml(entry.yaml_path), changes, folder)
    elif kind == "TASK":
        local = folder is not None and folder in entry.yaml_path.resolve().parents
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
    folder: Path | None,
) -> Iterator[TaskDefinition]:
    from dataclasses import fields

    from lm_eval.config.group import GroupConfig

    structural = {field.name for field in fields(GroupConfig)}
    passed = {key: value for key, value in group.items() if key not in structural} | dict(changes)
    members = group["task"] if isinstance(group["task"], list) else [group["task"]]
    for member in members:
        if isinstance(member, str):
            yield from _definitions_of(index, member, passed, folder)
        elif "group" in member and member["group"] not in index:
            yield from _definitions_of_group(index, member, passed, folder)
        else:
            name = member.get("group") or member["task"]
            own = {key: value for key, value in member.items() if key not in {"group", "task"}}
            yield from _definitions_of(index, name, passed | own, folder)


def _group_averages(entry: Any) -> list[GroupAverage]:
    """Return what a group's file states under `aggregate_metric_list`; nothing for tasks
    and tags.
    """
    if entry.kind.name != "GROUP":
        return []
    stated = read_yaml(entry.yaml_path, functions=False).get("aggregate_metric_list") or []
    listed = stated if isinstance(stated, list) else [stated]
    return [
        GroupAverage(str(one["metric"]), bool(one.get("weight_by_size", True))) for one in listed
    ]


def find_definitions(
    name: str, include_path: Path | None
) -> tuple[list[TaskDefinition], list[GroupAverage]]:
    """Return the tasks behind a name, from the user's folder if it is known there, else from
    lm-eval's own, and a group's averages.
    """
    given = str(include_path) if include_path else None
    # the user's folder alone takes a moment, lm-eval's own 20 s
    for defaults in (False, True) if given else (True,):
        index = _task_index(given, defaults)
        if name in index:
            try:
                return list(_definitions_of(index, name, {}, include_path)), _group_averages(
                    index[name]
                )
            except KeyError as missing:  # a group of the user's may name tasks of lm-eval
                if defaults:
                    raise HarnessError(
                        f"{full_name(name)} names {missing}, which lm-eval does not know; "
                        "correct the group"
                    ) from missing
    names = _task_index(given, False) if given else index
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near or given:
        raise unknown(
            "lm-eval task",
            name,
            names,
            hint=f"(in {given})" if given else "(type: lm-eval ls tasks)",
        )
    raise HarnessError(
        f"unknown lm-eval task {name!r}; type: lm-eval ls tasks, or give --include-path the folder "
        "of your own YAML files"
    )
