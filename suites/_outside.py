"""`lm-eval:NAME`: any task or group that lm-eval knows, built in or a YAML file of the user's, as its definition says.

Kind, version and primary figure are read from the YAML alone, so that planning a run downloads nothing.
"""

import difflib
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from harness.contract import Example, Grade, Split
from harness.data import DataSource, NoSplit, interleaved
from harness.errors import HarnessError, unknown
from suites._lm_eval import built, from_hub, read_yaml

PREFIX = "lm-eval:"
_KINDS: dict[str, Literal["generate", "choose", "perplexity"]] = {
    "multiple_choice": "choose",
    "generate_until": "generate",
    "loglikelihood_rolling": "perplexity",
}
_LOCAL_FORMATS = {"json", "csv", "parquet", "text", "arrow"}  # readers of files, not names on the Hub
_HELD_OUT = 500


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """One task without children: where it is defined and what the groups above it change."""

    name: str
    path: Path
    changes: Mapping[str, Any]
    local: bool  # from the user's folder, so its text is part of its version

    def settings(self, *, functions: bool = False) -> dict[str, Any]:
        """Return the YAML with the groups' changes and with data files as absolute paths."""
        config = read_yaml(self.path, functions=functions) | dict(self.changes) | {"task": self.name}
        if config.get("dataset_path") in _LOCAL_FORMATS and "data_files" in (config.get("dataset_kwargs") or {}):
            config["dataset_kwargs"] = config["dataset_kwargs"] | {"data_files": self._absolute(config["dataset_kwargs"]["data_files"])}
        return config

    def _absolute(self, files: Any) -> Any:
        """Resolve relative data files against the YAML's folder; `datasets` would use the working directory."""
        if isinstance(files, Mapping):
            return {split: self._absolute(given) for split, given in files.items()}
        if isinstance(files, list):
            return [self._absolute(given) for given in files]
        return files if "://" in str(files) else str(self.path.parent / files)

    def data_files(self) -> list[Path]:
        """Return the local data files that the task names, in name order."""
        config = self.settings()
        given = (config.get("dataset_kwargs") or {}).get("data_files") if config.get("dataset_path") in _LOCAL_FORMATS else None
        found: set[Path] = set()
        for file in (Path(one) for one in _strings(given) if "://" not in one):
            matches = list(file.parent.glob(file.name))  # a pattern stands for several files
            if not matches:
                raise HarnessError(f"{PREFIX}{self.name}: no data file {file}, which {self.path} names; correct data_files or add the file")
            found.update(matches)
        return sorted(found)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(part)


def _definition_files(path: Path) -> set[Path]:
    """Return a YAML file, those it includes and the Python files whose functions it names."""
    text = path.read_text(encoding="utf-8")
    found = {path}
    for module in re.findall(r"!function\s+([\w.]+)\.\w+", text):
        code = path.parent / f"{module.replace('.', '/')}.py"
        found |= {code} if code.is_file() else set()
    included = read_yaml_alone(text).get("include")
    for name in _strings(included):
        found |= _definition_files(path.parent / name)
    return found


def read_yaml_alone(text: str) -> dict[str, Any]:
    """Parse YAML text with tags such as `!function` ignored and nothing included."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, tag, node: None)
    return dict(yaml.load(text, Loader=Loader))  # a SafeLoader


def _leaf_digest(leaf: _Leaf) -> str:
    """Return the digest of all that defines a task of the user's: YAML, code and data, wherever the folder stands."""
    files = sorted(_definition_files(leaf.path)) + leaf.data_files()
    changes = {key: value for key, value in leaf.changes.items() if not callable(value)}
    parts = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    return hashlib.sha256(repr((parts, sorted(changes.items(), key=lambda pair: pair[0]))).encode()).hexdigest()


@lru_cache(maxsize=8)
def _index(include_path: str | None, defaults: bool) -> dict[str, Any]:
    """Return lm-eval's index of names; with its own tasks it takes about 20 s, so once per process."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return dict(TaskManager(include_path=include_path, include_defaults=defaults).task_index)


def _leaves(index: Mapping[str, Any], name: str, changes: Mapping[str, Any], folder: Path | None) -> Iterator[_Leaf]:
    """Yield the tasks behind a name: itself, or a group's or tag's, in lm-eval's order. Raises `KeyError` for an unknown member."""
    entry = index[name]
    kind = entry.kind.name
    if kind == "TAG":
        for child in sorted(entry.tags):
            yield from _leaves(index, child, changes, folder)
    elif kind == "GROUP":
        yield from _members(index, read_yaml(entry.yaml_path), changes, folder)
    elif kind == "TASK":
        local = folder is not None and folder in entry.yaml_path.resolve().parents
        yield _Leaf(name=name, path=entry.yaml_path, changes=changes, local=local)
    else:
        raise HarnessError(f"{PREFIX}{name} is a Python class, and only tasks written in YAML can be scored here; pick another task")


def _members(index: Mapping[str, Any], group: Mapping[str, Any], changes: Mapping[str, Any], folder: Path | None) -> Iterator[_Leaf]:
    from dataclasses import fields

    from lm_eval.config.group import GroupConfig

    structural = {field.name for field in fields(GroupConfig)}
    passed = {key: value for key, value in group.items() if key not in structural} | dict(changes)
    members = group["task"] if isinstance(group["task"], list) else [group["task"]]
    for member in members:
        if isinstance(member, str):
            yield from _leaves(index, member, passed, folder)
        elif "group" in member and member["group"] not in index:
            yield from _members(index, member, passed, folder)
        else:
            name = member.get("group") or member["task"]
            own = {key: value for key, value in member.items() if key not in {"group", "task"}}
            yield from _leaves(index, name, passed | own, folder)


def _find(name: str, include_path: Path | None) -> list[_Leaf]:
    """Return the tasks behind a name, from the user's folder if it is known there, else from lm-eval's own."""
    given = str(include_path) if include_path else None
    for defaults in (False, True) if given else (True,):  # the user's folder alone takes a moment, lm-eval's own 20 s
        index = _index(given, defaults)
        if name in index:
            try:
                return list(_leaves(index, name, {}, include_path))
            except KeyError as missing:  # a group of the user's may name tasks of lm-eval
                if defaults:
                    raise HarnessError(f"{PREFIX}{name} names {missing}, which lm-eval does not know; correct the group") from missing
    names = _index(given, False) if given else index
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near or given:
        raise unknown("lm-eval task", name, names, hint=f"(in {given})" if given else "(type: lm-eval ls tasks)")
    raise HarnessError(f"unknown lm-eval task {name!r}; type: lm-eval ls tasks, or give --include-path the folder of your own YAML files")


class OutsideTask:
    """A task or group of lm-eval by its name there; a group counts as one task of many parts."""

    domain = "other"

    def __init__(self, name: str, include_path: str | Path | None = None) -> None:
        folder = Path(include_path).resolve() if include_path is not None else None
        if folder is not None and not folder.is_dir():
            raise HarnessError(f"no folder at {include_path}; give --include-path a folder with lm-eval task files (.yaml)")
        self.name = name
        self._leaves = _find(name.removeprefix(PREFIX), folder)
        if not self._leaves:
            raise HarnessError(f"{name} is an empty group; pick another task")
        self._settings = [leaf.settings() for leaf in self._leaves]
        self.kind = self._one_kind()
        self.metric = self._metrics()[0]  # the figure that an answer is judged by
        self.primary = self._primary()
        self.version = self._version()
        self._chance: float | None = None
        self._docs: dict[str, tuple[Any, Any]] = {}  # gold -> task and doc, for `grade`

    def _one_kind(self) -> Literal["generate", "choose", "perplexity"]:
        types = sorted({str(settings.get("output_type", "generate_until")) for settings in self._settings})
        if len(types) > 1:
            raise HarnessError(f"{self.name} mixes {' and '.join(types)} tasks; name its tasks one by one, each as lm-eval:NAME")
        if types[0] not in _KINDS:
            raise HarnessError(f"{self.name} has output_type {types[0]}; tasks of {', '.join(_KINDS)} can be scored, pick one of those")
        return _KINDS[types[0]]

    def _metrics(self) -> list[str]:
        defaults = {"choose": ["acc"], "generate": ["exact_match"], "perplexity": ["word_perplexity"]}[self.kind]
        listed = self._settings[0].get("metric_list")
        names = [str(one["metric"]) for one in listed] if listed else defaults
        return ["acc", *names] if self.kind == "choose" and "acc" in names else names

    def _primary(self) -> str:
        """Return the name of the first filter of a generating task, else of the metric."""
        filters = self._settings[0].get("filter_list")
        if self.kind == "generate":
            return str(filters[0]["name"]) if filters else "none"
        return self.metric

    def _version(self) -> str:
        stated = [settings["metadata"] if isinstance(settings.get("metadata"), dict) else {} for settings in self._settings]
        upstream = "/".join(sorted({str(one.get("version", "Yaml")) for one in stated}))  # "Yaml" is lm-eval's word for none
        digests = [_leaf_digest(leaf) for leaf in self._leaves if leaf.local]
        own = f"+{hashlib.sha256(''.join(digests).encode()).hexdigest()[:8]}" if digests else ""
        return f"{upstream}+lm-eval{own}"

    @property
    def chance(self) -> float:
        """Accuracy of guessing: one over the mean number of choices; builds the task if nobody has yet."""
        if self.kind != "choose":
            return 0.0
        if self._chance is None:
            self._chance = _chance(self._built)
        return self._chance

    @cached_property
    def _built(self) -> dict[str, Any]:
        """The tasks for our own questions to them; the scorer gets fresh ones, since it changes what it gets."""
        return self._build()

    def _build(self) -> dict[str, Any]:
        return {leaf.name: _build(leaf) for leaf in self._leaves}

    def lm_eval_tasks(self, source: DataSource) -> dict[str, Any]:
        """Return lm-eval's tasks by name, a group's every member, each over its own data set; `source` is not used."""
        made = self._build()
        if self.kind == "choose" and self._chance is None:
            self._chance = _chance(made)
        return made

    def examples(self, split: Split, source: DataSource) -> Iterator[Example]:
        """Yield items without shots, a group's members in turn.

        `test` is what is scored. `validation` is a split of that name that is not scored, else the last tenth of the
        training rows, 500 at most. Raises `NoSplit` where there are no training rows, and for `dev`.
        """
        if self.kind == "perplexity" or split == "dev":
            raise NoSplit(f"{self.name} has no {split} items to train on; train on another suite, for example --suite math")
        parts = [[self._example(task, doc) for doc in _docs(self.name, task, split)] for task in self._built.values()]
        return iter(list(interleaved(parts)))

    def _example(self, task: Any, doc: Mapping[str, Any]) -> Example:
        gold, text = self._gold(task, doc)
        self._docs.setdefault(gold.strip(), (task, doc))
        prompt = task.doc_to_text(doc)
        if not isinstance(prompt, str):
            raise NoSplit(
                f"{self.name} has a prompt for each choice, and none to train on; train on another suite, for example --suite math"
            )
        completion = f"{task.config.target_delimiter}{text}"
        return Example(task=self.name, prompt=prompt, completion=completion, answer=completion, gold=gold)

    def _gold(self, task: Any, doc: Mapping[str, Any]) -> tuple[str, str]:
        """Return what a grader compares with, and the text of the right answer."""
        target = task.doc_to_target(doc)
        first = target[0] if isinstance(target, list) and target else target
        text = str(task.doc_to_choice(doc)[first]) if task.config.doc_to_choice is not None and isinstance(first, int) else str(first)
        return (text if self.kind == "choose" else str(target)), text

    def grade(self, gold: str, text: str) -> tuple[Grade, ...]:
        """Grade one answer: a generated one by every filter of the task and its metric, as lm-eval does; a choice by its text.

        A metric that looks at more than the gold sees the first item with this gold.
        """
        if self.kind == "perplexity":
            return ()
        if self.kind == "choose":
            found = text.strip() or None
            return (Grade(extractor=self.primary, extracted=found, correct=found == gold.strip()),)
        return tuple(self._grade(ensemble, *self._doc_of(gold), text) for ensemble in self._doc_of(gold)[0]._filters)

    def _doc_of(self, gold: str) -> tuple[Any, Any]:
        """Return a task and an item of it whose gold this is."""
        if gold.strip() not in self._docs:
            for task in self._built.values():
                for doc in task.eval_docs:
                    self._docs.setdefault(self._gold(task, doc)[0].strip(), (task, doc))
        if gold.strip() not in self._docs:
            raise HarnessError(f"{self.name} has no item with the gold answer {gold[:40]!r}; grade answers to its own items")
        return self._docs[gold.strip()]

    def _grade(self, ensemble: Any, task: Any, doc: Any, text: str) -> Grade:
        from lm_eval.api.instance import Instance

        instance = Instance(
            request_type="generate_until", doc=doc, arguments=("", {}), idx=0, metadata=(task.task_name, 0, 1), resps=[text]
        )
        ensemble.apply([instance])
        filtered = instance.filtered_resps[ensemble.name]
        value = task.process_results(doc, [filtered]).get(self.metric, 0)
        extracted = next((str(one) for one in ([filtered] if isinstance(filtered, str) else filtered or [])), "")
        return Grade(
            extractor=ensemble.name,
            extracted=None if extracted.strip() in {"", "[invalid]"} else extracted,  # "[invalid]": lm-eval's word for no match
            correct=_is_right(value),
        )


def _build(leaf: _Leaf) -> Any:
    """Build one task over its own data set; a `HarnessError` tells an unreachable Hub from a mistake in local files."""
    from datasets.exceptions import DatasetsError
    from jinja2 import TemplateError

    settings = leaf.settings(functions=True)
    if settings.get("dataset_path") not in _LOCAL_FORMATS:
        with from_hub(
            f"{PREFIX}{leaf.name}", "run it once with a network, or give --include-path a folder whose YAML names local data_files"
        ):
            return built(settings)
    leaf.data_files()  # raises for one that is not there
    try:
        return built(settings)
    except (OSError, ValueError, KeyError, TypeError, DatasetsError, TemplateError) as problem:
        told = next(iter(str(problem).splitlines()), "") or type(problem).__name__
        raise HarnessError(
            f"{PREFIX}{leaf.name} cannot be built: {told[:200]}; correct {leaf.path} or the data files it names"
        ) from problem


def _is_right(value: Any) -> bool:
    """Take a metric's full marks as right; a metric over several items at once says nothing about one."""
    try:
        return float(value) >= 1.0
    except (TypeError, ValueError):
        return False


def _chance(tasks: Mapping[str, Any]) -> float:
    counts = [len(task.doc_to_choice(doc)) for task in tasks.values() for doc in task.eval_docs]
    return len(counts) / sum(counts)


def _docs(name: str, task: Any, split: Split) -> Iterable[Mapping[str, Any]]:
    """Return the items of a split of one task; see `OutsideTask.examples`."""
    if split == "test":
        return list(task.eval_docs)
    if split == "validation" and task.has_test_docs() and task.has_validation_docs():
        return list(task.validation_docs())
    if not task.has_training_docs():
        raise NoSplit(f"{name} has no training split to train on; train on another suite, for example --suite math")
    every = list(task.training_docs())
    if task.has_test_docs() and task.has_validation_docs():
        return every
    held_out = min(_HELD_OUT, max(1, len(every) // 10))
    return every[-held_out:] if split == "validation" else list(islice(every, len(every) - held_out))
