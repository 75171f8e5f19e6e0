"""The splits of a data set of the Hub as files of a data folder, for tasks of lm-eval."""

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Any

from suites.loading.definition import reads_local_files
from suites.loading.fetching import HubFile, json_lines
from suites.loading.hub_folder import ROOT, configuration_folder, named_splits
from suites.loading.lm_eval import explaining_hub_errors

_REMEDY = "type it where there is a network, or set HF_HUB_OFFLINE=0"


def hub_files(name: str, settings: Mapping[str, Any]) -> Iterator[HubFile]:
    """Yield the splits that a task's `settings` name, one file each; nothing for local data.

    `name` is the task's, for errors. A split that a task names and the Hub lacks is left out, but
    for the one that is scored.
    """
    if reads_local_files(settings) or settings.get("custom_dataset") is not None:
        return
    dataset, configuration = str(settings["dataset_path"]), configuration_folder(settings)
    folder = f"{ROOT}/{dataset}/{configuration}"
    scored = settings.get("test_split") or settings.get("validation_split")
    with explaining_hub_errors(name, _REMEDY):
        present = _splits_of_hub(settings)
    for split in named_splits(settings):
        if split in present or split == scored:
            yield HubFile(
                f"{folder}/{split}.jsonl.gz",
                f"{dataset} {configuration} {split}",
                partial(_lines, name, settings, split),
                partial(_revision, name, settings),
            )


def _splits_of_hub(settings: Mapping[str, Any]) -> list[str]:
    from datasets import get_dataset_split_names

    return list(
        get_dataset_split_names(
            settings["dataset_path"], settings.get("dataset_name"), **_load_options(settings)
        )
    )


def _load_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a task states of loading, without code of a data set: `datasets` runs none."""
    options = dict(settings.get("dataset_kwargs") or {})
    options.pop("trust_remote_code", None)
    return options


def _lines(name: str, settings: Mapping[str, Any], split: str) -> Iterator[str]:
    from datasets import load_dataset

    # what is read is of the revision that is written beside it, whatever comes in between
    revision = {"revision": commit} if (commit := _revision(name, settings)) else {}
    with explaining_hub_errors(name, _REMEDY):
        rows = load_dataset(
            settings["dataset_path"],
            settings.get("dataset_name"),
            split=split,
            **(_load_options(settings) | revision),
        )
    return json_lines(rows)


def _revision(name: str, settings: Mapping[str, Any]) -> str:
    """Return the commit of the data set on the Hub; "" where the Hub does not say."""
    if isinstance(stated := _load_options(settings).get("revision"), str):
        return stated
    with explaining_hub_errors(name, _REMEDY):
        return _newest_commit(str(settings["dataset_path"]))


@lru_cache(maxsize=64)  # all splits of one command are of one commit
def _newest_commit(dataset: str) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(dataset).sha or "")
