"""Data sets of the Hub that lie in the data folder: `hub/DATA SET/CONFIGURATION/SPLIT.jsonl`.

A task that names such a data set reads it there, without a network. A split is a file of JSON lines
(`.jsonl`, `.jsonl.gz`) or of Parquet. A split that a task only offers (to train on, for shots) may
be missing; one that it scores may not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.data.source import LocalOrHubData, manifest_rows
from harness.errors import HarnessError
from harness.files.digests import digest_of
from harness.files.untrusted import MODEL_LIMITS, read_object
from suites.loading.fetching import REVISION_FILE

ROOT = "hub"
DEFAULT_CONFIGURATION = "default"
_FORMS = (".jsonl", ".jsonl.gz", ".parquet")
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
_SHOTS_KEYS = ("training_split", "validation_split", "test_split")  # lm-eval's order


@dataclass(frozen=True)
class HubFolder:
    """The copy of one configuration of a data set of the Hub in a data folder."""

    data_folder: Path
    dataset: str  # as the Hub names it: allenai/ai2_arc
    configuration: str

    @property
    def relative(self) -> str:
        """The copy's folder, relative to the data folder."""
        return f"{ROOT}/{self.dataset}/{self.configuration}"

    @property
    def path(self) -> Path:
        """The copy's folder."""
        return self.data_folder / self.relative

    @cached_property
    def files(self) -> dict[str, str]:
        """The file of each split that is there, relative to the data folder, in name order."""
        names = sorted(path.name for path in self.path.iterdir())
        return {
            name.removesuffix(form): f"{self.relative}/{name}"
            for name in names
            for form in _FORMS
            if name.endswith(form)
        }

    def rows(self, split: str) -> Any:
        """Return a split as a `datasets.Dataset`.

        Raises `HarnessError` for a file that is cut short, malformed, or shorter than the data
        folder's MANIFEST.md says.
        """
        from datasets import Dataset

        if self.files[split].endswith(".parquet"):
            return self._parquet(split)
        return Dataset.from_list(self._json_rows(split))

    def count(self, split: str) -> int:
        """Return how many rows a split has. Raises the errors of `rows`."""
        if self.files[split].endswith(".parquet"):
            return len(self._parquet(split))
        return len(self._json_rows(split))

    def refuse_other_revision(self, name: str, revision: object) -> None:
        """Raise `HarnessError` where the copy is known to be of another revision than asked for.

        `name` is the task's.
        """
        file = self.path / REVISION_FILE
        if not isinstance(revision, str) or not file.is_file():
            return
        copied = read_object(file, MODEL_LIMITS).get("revision")
        if copied != revision:
            raise HarnessError(
                f"{self.path} holds revision {copied} of {self.dataset} and the task needs "
                f"{revision}; remove that folder, then type: harness data fetch {name} --to "
                f"{self.data_folder}"
            )

    def _json_rows(self, split: str) -> list[dict[str, Any]]:
        return LocalOrHubData(folder=self.data_folder).rows(self.files[split], fields=())

    def _parquet(self, split: str) -> Any:
        from datasets import Dataset
        from pyarrow import ArrowException

        file = self.data_folder / self.files[split]
        try:
            dataset = Dataset.from_parquet(str(file), keep_in_memory=True)
        except (ArrowException, OSError, ValueError) as problem:
            raise HarnessError(
                f"{file} is cut short or no Parquet file; copy the file again"
            ) from problem
        self._refuse_lost_rows(split, len(dataset))
        return dataset

    def _refuse_lost_rows(self, split: str, count: int) -> None:
        """Raise `HarnessError` for fewer rows than the data folder's MANIFEST.md lists."""
        file = self.files[split]
        listed = manifest_rows(self.data_folder).get(file, 0)
        if count < listed:
            raise HarnessError(
                f"{self.data_folder / file}: {count:,} rows found and {listed:,} expected by the "
                "data folder's MANIFEST.md; copy the file again, or correct the manifest"
            )


@dataclass(frozen=True)
class LocalSplits:
    """The splits of a task's data set in a data folder; lm-eval calls it to get the data set."""

    folder: HubFolder
    splits: tuple[str, ...]  # those that the task names and that are there
    scored_split: str

    def __call__(self, **options: Any) -> dict[str, Any]:
        """Return the splits by name, each a `datasets.Dataset`; lm-eval's options say no more."""
        return {split: self.folder.rows(split) for split in self.splits}

    @property
    def files(self) -> tuple[str, ...]:
        """The splits' files, relative to the data folder."""
        return tuple(self.folder.files[split] for split in self.splits)

    def count(self) -> int:
        """Return how many rows are scored."""
        return self.folder.count(self.scored_split)


def local_files(settings: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the files that tasks read from a data folder, relative to it."""
    splits = (values.get("custom_dataset") for values in settings)
    return tuple(file for part in splits if isinstance(part, LocalSplits) for file in part.files)


def find_hub_folder(
    name: str, data_folder: Path | None, settings: Mapping[str, Any]
) -> HubFolder | None:
    """Return the copy of what a task's `settings` read of the Hub; None where there is none.

    `name` is the task's, for errors. Raises `HarnessError` where the data set is there and
    this configuration is not.
    """
    dataset = settings.get("dataset_path")
    if data_folder is None or not isinstance(dataset, str) or not dataset:
        return None
    folder = HubFolder(data_folder, dataset, configuration_folder(settings))
    parent = data_folder / ROOT / dataset
    if _leads_out(dataset) or _leads_out(folder.configuration) or not parent.is_dir():
        return None
    if not folder.path.is_dir():
        present = ", ".join(sorted(path.name for path in parent.iterdir() if path.is_dir()))
        raise HarnessError(
            f"{parent} has no folder {folder.configuration} (it has: {present or 'none'}); type: "
            f"harness data fetch {name} --to {data_folder}, or add {folder.relative}/"
        )
    return folder


def configuration_folder(settings: Mapping[str, Any]) -> str:
    """Return the name of the folder that holds a task's configuration of a data set.

    A data set without named configurations lies in `default`. What a task reads of certain files of
    a data set lies beside its other configurations, under a digest of their names.
    """
    name = str(settings.get("dataset_name") or DEFAULT_CONFIGURATION)
    options = settings.get("dataset_kwargs") or {}
    files = {key: options[key] for key in ("data_dir", "data_files") if options.get(key)}
    return f"{name}-{digest_of(files)[:8]}" if files else name


def _leads_out(name: str) -> bool:
    """Tell whether a name is a path that leaves its folder."""
    parts = name.replace("\\", "/").split("/")
    return any(part in ("", ".", "..") for part in parts) or ":" in parts[0]


def with_local_splits(
    name: str, settings: Mapping[str, Any], data_folder: Path | None
) -> dict[str, Any]:
    """Return a task's settings with its data set read from the data folder, where it lies there.

    `name` is the task's, for errors. Raises `HarnessError` for a missing split that is scored or
    gives the shots, and for a copy of another revision.
    """
    if settings.get("custom_dataset") is not None:
        return dict(settings)
    folder = find_hub_folder(name, data_folder, settings)
    if folder is None:
        return dict(settings)
    options = dict(settings.get("dataset_kwargs") or {})
    folder.refuse_other_revision(name, options.get("revision"))
    scored = settings.get("test_split") or settings.get("validation_split")
    if scored not in folder.files:
        raise HarnessError(
            f"{name} is scored on the split {scored}, and {folder.path} has "
            f"{', '.join(folder.files) or 'no split'}; type: harness data fetch {name} --to "
            f"{folder.data_folder}"
        )
    _refuse_missing_shots(name, settings, folder)
    present = tuple(split for split in named_splits(settings) if split in folder.files)
    left_out = {key for key in SPLIT_KEYS if settings.get(key) and settings[key] not in present}
    local = {
        key: value
        for key, value in settings.items()
        if key not in {"dataset_path", "dataset_name", "dataset_kwargs", *left_out}
    }
    shots = _shots_options(settings)
    if shots.get("split") and shots["split"] not in present:  # no example is shown
        local["fewshot_config"] = {key: shots[key] for key in shots if key != "split"}
    return local | {"custom_dataset": LocalSplits(folder, present, str(scored))}


def named_splits(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the splits that a task names, each once."""
    named = (*(settings.get(key) for key in SPLIT_KEYS), _shots_options(settings).get("split"))
    return tuple(dict.fromkeys(str(split) for split in named if split))


def _shots_options(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a task states under `fewshot_config`."""
    options = settings.get("fewshot_config")
    return options if isinstance(options, Mapping) else {}


def _refuse_missing_shots(name: str, settings: Mapping[str, Any], folder: HubFolder) -> None:
    """Raise `HarnessError` where the split that a task's shots come from is missing.

    lm-eval would take them from another split, and prompts would not be those of other machines.
    """
    shots, source = settings.get("num_fewshot") or 0, shots_split(settings)
    if shots and source is not None and source not in folder.files:
        raise HarnessError(
            f"{name} takes its {shots} examples from the split {source}, and {folder.path} has "
            f"{', '.join(folder.files)}; type: harness data fetch {name} --to {folder.data_folder}"
        )


def shots_split(settings: Mapping[str, Any]) -> str | None:
    """Return the split that lm-eval takes a task's shots from; None where it states its own.

    It is the one stated for shots, which wins over stated examples; else the first of train,
    validation and test that the task has.
    """
    options = _shots_options(settings)
    if split := options.get("split", settings.get("fewshot_split")):
        return str(split)
    if options.get("samples") is not None:
        return None
    return next((str(settings[key]) for key in _SHOTS_KEYS if settings.get(key)), None)
