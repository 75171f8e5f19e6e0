"""Which revision of a data set of the Hub a run reads: the one that `datasets` would load now."""

from functools import lru_cache
from pathlib import Path

_SECONDS = 10.0  # that the Hub may take to answer


@lru_cache(maxsize=64)
def dataset_revision(name: str) -> str:
    """Return the commit of a data set: the Hub's, else that of the local copy, else "".

    Of `NAME@REVISION` it is the revision, and nobody is asked.

    `datasets` asks the Hub for the newest commit wherever it can, and takes its copy of that
    commit where it has one; without a network it takes the copy it loaded last.
    """
    from huggingface_hub import HfApi, constants

    name, _, pinned = name.partition("@")
    if pinned:
        return pinned
    if not constants.HF_HUB_OFFLINE:
        try:
            return str(HfApi().dataset_info(name, timeout=_SECONDS).sha or "")
        except Exception:  # noqa: BLE001  whatever stops it, `datasets` takes its copy
            pass
    reference = Path(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}", "refs", "main")
    try:
        return reference.read_text(encoding="ascii").strip()[:64]
    except (OSError, UnicodeDecodeError):
        return ""
