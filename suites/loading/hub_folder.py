"""Data sets of the Hub that lie in the data folder: `hub/DATA SET/CONFIGURATION/SPLIT.jsonl`.

A task that names such a data set reads it there, without a network. A split is a file of JSON lines
(`.jsonl`, `.jsonl.gz`) or of Parquet. A split that a task only offers (to train on, for shots) may
be missing; one that it scores may not.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.data.source import LocalOrHubData
from harness.errors import HarnessError
from harness.files.untrusted import MODEL_LIMITS, read_object

ROOT = "hub"
DEFAULT_CONFIGURATION = "default"
REVISION_FILE = "revision.json"  # which revision of the data set was copied
_FORMS = (".jsonl", ".jsonl.gz", ".parquet")
SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")


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

    def refuse_other_revision(self, revision: object) -> None:
        """Raise `HarnessError` where the copy is known to be of another revision than asked for."""
        file = self.path / REVISION_FILE
        if not isinstance(revision, str) or not file.is_file():
            return
        copied = read_object(file, MODEL_LIMITS).get("revision")
        if copied != revision:
            raise HarnessError(
                f"{self.path} holds revision {copied} of {self.dataset} and the task needs "
                f"{revision}; remove that folder, then type: harness data fetch"
            )

    def _json_rows(self, split: str) -> list[dict[str, Any]]:
        return LocalOrHubData(folder=self.data_folder).rows(self.files[split], fields=())

    def _parquet(self, split: str) -> Any:
        from datasets import Dataset
        from pyarrow import ArrowException  # type: ignore[import-untyped]

        file = self.data_folder / self.files[split]
        try:
            dataset = Dataset.from_parquet(str(file), keep_in_memory=True)
        except (ArrowException, OSError, ValueError) as problem:
            raise HarnessError(
                f"{file} is cut short or no Parquet file; copy the file again"
            ) from problem
        if len(dataset) == 0:
            raise HarnessError(f"{file} holds no row; copy the file again")
        return dataset


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
    data_folder: Path | None, dataset: object, configuration: object
) -> HubFolder | None:
    """Return the copy of a configuration of a data set; None where the data folder has none.

    A data set without named configurations lies in `default`. Raises `HarnessError` where the data
    set is there and this configuration is not.
    """
    if data_folder is None or not isinstance(dataset, str) or not dataset:
        return None
    parent = data_folder / ROOT / dataset
    folder = HubFolder(data_folder, dataset, str(configuration or DEFAULT_CONFIGURATION))
    root = (data_folder / ROOT).resolve()
    if not parent.is_dir() or not all(
        root in path.resolve().parents for path in (parent, folder.path)
    ):
        return None  # a name that leads out of the folder
    if not folder.path.is_dir():
        present = ", ".join(sorted(path.name for path in parent.iterdir() if path.is_dir()))
        raise HarnessError(
            f"{parent} has no folder {folder.configuration} (it has: {present or 'none'}); type: "
            f"harness data fetch, or add {folder.relative}/"
        )
    return folder


def with_local_splits(
    name: str, settings: Mapping[str, Any], data_folder: Path | None
) -> dict[str, Any]:
    """Return a task's settings with its data set read from the data folder, where it lies there.

    `name` is the task's, for errors. Raises `HarnessError` for a scored split that is missing, for
    shots that only the scored split could give, and for a copy of another revision.
    """
    if settings.get("custom_dataset") is not None:
        return dict(settings)
    folder = find_hub_folder(
        data_folder, settings.get("dataset_path"), settings.get("dataset_name")
    )
    if folder is None:
        return dict(settings)
    options = dict(settings.get("dataset_kwargs") or {})
    folder.refuse_other_revision(options.get("revision"))
    scored = settings.get("test_split") or settings.get("validation_split")
    if scored not in folder.files:
        raise HarnessError(
            f"{name} is scored on the split {scored}, and {folder.path} has "
            f"{', '.join(folder.files) or 'no split'}; type: harness data fetch {name} --to "
            f"{folder.data_folder}"
        )
    named = {key: settings[key] for key in SPLIT_KEYS if settings.get(key)}
    present = {key: split for key, split in named.items() if split in folder.files}
    _refuse_missing_shots(name, settings, present, folder)
    splits = LocalSplits(folder, tuple(dict.fromkeys(present.values())), str(scored))
    without_source = {
        key: value
        for key, value in settings.items()
        if key not in {"dataset_path", "dataset_name", "dataset_kwargs", *named}
    }
    return without_source | present | {"custom_dataset": splits}


def _refuse_missing_shots(
    name: str,
    settings: Mapping[str, Any],
    present: Mapping[str, str],
    folder: HubFolder,
) -> None:
    """Refuse shots where every split that may give them is missing, or is the scored one."""
    shots = settings.get("num_fewshot") or 0
    own_samples = (settings.get("fewshot_config") or {}).get("samples")
    if not shots or own_samples is not None:
        return
    scored_key = "test_split" if "test_split" in present else "validation_split"
    sources: Iterable[str] = [key for key in present if key != scored_key]
    if not any(present[key] != present[scored_key] for key in sources):
        raise HarnessError(
            f"{name} shows {shots} examples before each item, and {folder.path} has only the split "
            f"that is scored, {present[scored_key]}; add its other splits, or type: harness data "
            f"fetch {name} --to {folder.data_folder}"
        )
