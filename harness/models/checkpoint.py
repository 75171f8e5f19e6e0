"""Identity of a model on disk: content digest and weight bytes; what is torn or not finite is found
here.
"""

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contract import Checkpoint
from harness.errors import HarnessError
from harness.files import untrusted
from harness.files.digests import digest_of, file_digest
from harness.files.writing import write_atomically
from harness.models.foreign import refuse_malformed

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes, by the safetensors format
# What decides how a model answers; logs, scores and cards beside it do not, nor a second copy of
# the weights that transformers never opens.
_MODEL_FILES = re.compile(
    r"(?!consolidated).*\.safetensors|.*\.(model|jinja|py)|(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab|chat_template"
    r"|model\.safetensors\.index)\.json|(merges|vocab)\.txt"
)


_SHA256 = re.compile(r"[0-9a-f]{64}")


def remembered_digest(path: Path, cache: Path) -> str:
    """Return the sha256 of a large file, remembered in the cache by its path, size and time of
    change.
    """
    status = path.stat()
    note = cache / "digests" / digest_of(str(path.resolve()), status.st_size, status.st_mtime_ns)
    with suppress(OSError, ValueError):
        if _SHA256.fullmatch(remembered := note.read_text(encoding="ascii").strip()):
            return remembered
    digest = file_digest(path)
    with suppress(OSError):  # a cache that cannot be written to costs a second reading
        write_atomically(note, digest)
    return digest


def read_model_json(path: Path) -> dict[str, Any]:
    """Return what a JSON file of a model folder says; refuses one that is torn."""
    try:
        return untrusted.read_object(path, untrusted.MODEL_LIMITS)
    except untrusted.Unreadable as problem:
        raise HarnessError(
            f"{path} is damaged ({str(problem).removeprefix(f'{path}: ')}); download or save the "
            "model again"
        ) from problem


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers opens in a model folder, in name order."""
    found, named = sorted(folder.glob("*.safetensors")), _indexed_names(folder)
    return [path for path in found if path.name in named] if named else found


def _indexed_names(folder: Path) -> set[str]:
    """Return the names by which a folder's weights are looked for, as transformers does; none where
    any name will do.
    """
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors"}
    if not (folder / INDEX).is_file():
        return set()
    named = read_model_json(folder / INDEX).get("weight_map", {})
    if not isinstance(named, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in named.values()
    ):
        raise HarnessError(
            f"{folder / INDEX} is damaged (its weight_map names no files); download or save the "
            "model again"
        )
    return set(named.values())


def header_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return what a safetensors file's header says of each tensor; refuses a file that does not end
    where its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(length, _LONGEST_HEADER))
    try:
        told = untrusted.parse_json(
            untrusted.decode_text(header, str(path), untrusted.DEFAULT_LIMITS),
            str(path),
            untrusted.DEFAULT_LIMITS,
        )
        found = {name: entry for name, entry in told.items() if name != "__metadata__"}
        end = 8 + length + max((_end_of(entry) for entry in found.values()), default=0)
    except (ValueError, AttributeError, LookupError, TypeError):
        raise HarnessError(
            f"{path} is damaged (it has no safetensors header); download or save the model again"
        ) from None
    if size != end:
        raise HarnessError(
            f"{path} is damaged ({size:,} bytes, its header says {end:,}); download or save the "
            "model again"
        )
    return found


def _end_of(entry: Mapping[str, Any]) -> int:
    """Return where a tensor's bytes end behind the header; raises one of Python's own errors where
    its line is none.
    """
    begin, end = entry["data_offsets"]
    count = math.prod(entry["shape"])
    if (
        not all(type(number) is int and number >= 0 for number in (begin, end, *entry["shape"]))
        or begin > end
        or (count == 0) != (begin == end)
    ):
        raise ValueError("no tensor")
    if not isinstance(entry["dtype"], str):
        raise TypeError("no type")
    return int(end)


def refuse_damaged(folder: Path) -> None:
    """Refuse a model folder whose configuration or weights are torn or missing; no tensor
    is read.
    """
    refuse_malformed(folder, read_model_json(folder / "config.json"))
    files = weight_files(folder)
    missing = sorted(_indexed_names(folder) - {path.name for path in files})
    if missing:
        raise HarnessError(
            f"{folder / missing[0]} is missing, which {INDEX} lists; download or save the model "
            "again"
        )
    for path in files:
        header_entries(path)


def same_weights(left: Path, right: Path) -> bool:
    """Tell whether two model folders hold the same numbers under the same names, in whatever types
    and files; one tensor at a time.
    """
    import torch
    from safetensors import safe_open

    with ExitStack() as opened:
        ours, theirs = (
            {
                name: tensors
                for tensors in [
                    opened.enter_context(safe_open(path, framework="pt"))
                    for path in weight_files(folder)
                ]
                for name in tensors.keys()  # noqa: SIM118  no mapping
            }
            for folder in (left, right)
        )

        def same(name: str) -> bool:
            one, other = ours[name].get_tensor(name), theirs[name].get_tensor(name)
            return bool(
                torch.equal(one, other)
                if one.dtype == other.dtype
                else torch.equal(one.float(), other.float())
            )

        return ours.keys() == theirs.keys() and all(map(same, ours))


def first_non_finite(tensors: "Iterable[tuple[str, torch.Tensor]]") -> str | None:
    """Return where the first NaN or infinity stands among named tensors, as `name[row, column] is
    nan (n of m numbers)`; None without one.

    One pass over the numbers, no copy of them. Integers are always finite; what a library packed is
    looked at unpacked.
    """
    for name, tensor in tensors:
        if (
            (tensor.is_floating_point() or tensor.is_complex())
            and tensor.numel()
            and not _all_finite(tensor)
        ):
            return _non_finite_in(name, tensor)
    return None


def _all_finite(tensor: "torch.Tensor") -> bool:
    """Tell whether a tensor's numbers are all finite: NaN and infinities both show in the
    extremes.
    """
    import torch

    tensor = _comparable(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _comparable(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return a tensor whose numbers torch can compare: a library's packed subclass unpacked,
    eight-bit floats widened.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "dequantize") and type(tensor).__module__.partition(".")[0] != "torch":
        tensor = tensor.dequantize()
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _non_finite_in(name: str, tensor: "torch.Tensor") -> str:
    import torch

    plain = _comparable(tensor)
    bad = ~torch.isfinite(plain)
    place = [int(index) for index in bad.nonzero()[0]]
    value = plain[tuple(place)].item()
    return (
        f"{name}{place if place else ''} is {value} ({int(bad.sum()):,} of its {plain.numel():,} "
        "numbers are not finite)"
    )


def folder_digest(folder: Path, *, cache: Path | None = None) -> str:
    """Return the content digest of a model folder: weights, configuration and tokenizer, by name
    and bytes.

    Weights are read now, or remembered where a `cache` is given.
    """
    files = (path for path in sorted(folder.iterdir()) if _MODEL_FILES.fullmatch(path.name))
    return digest_of([(path.name, _file_digest(path, cache)) for path in files])


def _file_digest(path: Path, cache: Path | None) -> str:
    return (
        file_digest(path)
        if cache is None or path.suffix != ".safetensors"
        else remembered_digest(path, cache)
    )


def describe(
    folder: Path,
    *,
    name: str,
    parents: Iterable[str] = (),
    note: str = "",
    cache: Path | None = None,
) -> Checkpoint:
    """Return the `Checkpoint` of a saved model folder; the digest is computed from its bytes now,
    or remembered in `cache`.
    """
    return Checkpoint(
        path=folder,
        name=name,
        digest=folder_digest(folder, cache=cache),
        parents=tuple(parents),
        bytes_on_disk=sum(path.stat().st_size for path in weight_files(folder)),
        note=note,
    )


def model_class(folder: Path) -> Any:
    """Return the class that opens a folder's model: for causal language models, else for models
    that read images beside text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    kind = type(AutoConfig.from_pretrained(folder))
    image = (
        kind not in AutoModelForCausalLM._model_mapping
        and kind in AutoModelForImageTextToText._model_mapping
    )
    return AutoModelForImageTextToText if image else AutoModelForCausalLM
