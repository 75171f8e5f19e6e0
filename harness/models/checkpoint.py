"""A model on disk: its content digest, its weight files, and how damage to them is found."""

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
OWN_FORMAT = "compression-harness"  # of packed weights, see `packed`
_LONGEST_HEADER = 100_000_000  # bytes, by the safetensors format
# What decides how a model answers; logs, scores and cards beside it do not, nor a second copy of
# the weights that transformers never opens.
_MODEL_FILES = re.compile(
    r"(?!consolidated).*\.safetensors|.*\.(model|jinja|py)|(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab|chat_template"
    r"|model\.safetensors\.index)\.json|(merges|vocab)\.txt"
)


_SHA256 = re.compile(r"[0-9a-f]{64}")


def remembered_digest(path: Path, cache: Path) -> str:
    """Return a large file's sha256; the cache remembers it by path, size and time of change."""
    status = path.stat()
    digest_file = (
        cache / "digests" / digest_of(str(path.resolve()), status.st_size, status.st_mtime_ns)
    )
    with suppress(OSError, ValueError):
        if _SHA256.fullmatch(text := digest_file.read_text(encoding="ascii").strip()):
            return text
    digest = file_digest(path)
    with suppress(OSError):  # a cache that cannot be written to costs a second reading
        write_atomically(digest_file, digest)
    return digest


def read_model_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model folder; refuses a damaged file."""
    try:
        return untrusted.read_object(path, untrusted.MODEL_LIMITS)
    except untrusted.Unreadable as problem:
        raise HarnessError(
            f"{path} is damaged ({str(problem).removeprefix(f'{path}: ')}); download or save the "
            "model again"
        ) from problem


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers opens in a model folder, in name order."""
    paths, names = sorted(folder.glob("*.safetensors")), _indexed_names(folder)
    return [path for path in paths if path.name in names] if names else paths


def _indexed_names(folder: Path) -> set[str]:
    """Return the weight files that transformers looks for, none where it takes any name."""
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors"}
    if not (folder / INDEX).is_file():
        return set()
    weight_map = read_model_json(folder / INDEX).get("weight_map", {})
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise HarnessError(
            f"{folder / INDEX} is damaged (its weight_map names no files); download or save the "
            "model again"
        )
    return set(weight_map.values())


def header_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return a safetensors header's entry for each tensor: its dtype, shape and offsets.

    Refuses a file whose size is not what its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(min(length, _LONGEST_HEADER))
    try:
        limits = untrusted.DEFAULT_LIMITS
        text = untrusted.decode_text(header, str(path), limits)
        header_object = untrusted.parse_json(text, str(path), limits)
        entries = {name: entry for name, entry in header_object.items() if name != "__metadata__"}
        end = 8 + length + max((_end_of(entry) for entry in entries.values()), default=0)
    except (ValueError, AttributeError, LookupError, TypeError):
        raise HarnessError(
            f"{path} is damaged (it has no safetensors header); download or save the model again"
        ) from None
    if size != end:
        raise HarnessError(
            f"{path} is damaged ({size:,} bytes, its header says {end:,}); download or save the "
            "model again"
        )
    return entries


def _end_of(entry: Mapping[str, Any]) -> int:
    """Return where a tensor's bytes end behind the header.

    Raises a built-in error where the entry describes no tensor.
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
    """Refuse a model folder with a damaged or missing configuration or weights; reads no tensor."""
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


def same_weights(folder: Path, other_folder: Path) -> bool:
    """Tell whether two model folders hold the same numbers by the same names.

    Types and the split into files may differ. One tensor at a time is read.
    """
    import torch
    from safetensors import safe_open

    with ExitStack() as stack:

        def open_files(model_folder: Path) -> dict[str, Any]:
            """Return the opened file that holds each tensor, by the tensor's name."""
            paths = weight_files(model_folder)
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
            return {name: file for file in files for name in file.keys()}  # noqa: SIM118  no mapping

        files, other_files = open_files(folder), open_files(other_folder)

        def is_same(name: str) -> bool:
            tensor = files[name].get_tensor(name)
            other_tensor = other_files[name].get_tensor(name)
            if tensor.dtype != other_tensor.dtype:
                tensor, other_tensor = tensor.float(), other_tensor.float()
            return bool(torch.equal(tensor, other_tensor))

        return files.keys() == other_files.keys() and all(map(is_same, files))


def first_non_finite(tensors: "Iterable[tuple[str, torch.Tensor]]") -> str | None:
    """Return where the first NaN or infinity stands in named tensors, None without one.

    It reads as `name[row, column] is nan (n of its m numbers are not finite)`. One pass over the
    numbers, without a copy. Integers are always finite; packed tensors of a library are unpacked
    first.
    """
    for name, tensor in tensors:
        has_fractions = tensor.is_floating_point() or tensor.is_complex()
        if has_fractions and tensor.numel() and not _all_finite(tensor):
            return _describe_non_finite(name, tensor)
    return None


def _all_finite(tensor: "torch.Tensor") -> bool:
    """Tell whether a tensor's numbers are all finite: NaN and infinities show in its extremes."""
    import torch

    tensor = _comparable(tensor)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    lowest, highest = torch.aminmax(tensor)
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def _comparable(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return a tensor whose numbers torch can compare.

    A library's packed subclass is unpacked, floats of eight bits become fp32.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "dequantize") and type(tensor).__module__.partition(".")[0] != "torch":
        tensor = tensor.dequantize()
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 1 else tensor


def _describe_non_finite(name: str, tensor: "torch.Tensor") -> str:
    """Return where a tensor's first NaN or infinity stands and how many there are."""
    import torch

    plain = _comparable(tensor)
    is_bad = ~torch.isfinite(plain)
    position = [int(index) for index in is_bad.nonzero()[0]]
    value = plain[tuple(position)].item()
    count = f"{int(is_bad.sum()):,} of its {plain.numel():,} numbers are not finite"
    return f"{name}{position if position else ''} is {value} ({count})"


def is_model_file(path: Path) -> bool:
    """Tell whether a file of a model folder decides how the model answers."""
    return _MODEL_FILES.fullmatch(path.name) is not None


def folder_digest(folder: Path, *, cache: Path | None = None) -> str:
    """Return the content digest of a model folder: weights, configuration, tokenizer.

    Made of the files' names and bytes. Weights are read, or their digests remembered in `cache`.
    """
    files = (path for path in sorted(folder.iterdir()) if is_model_file(path))
    return digest_of([(path.name, _file_digest(path, cache)) for path in files])


def _file_digest(path: Path, cache: Path | None) -> str:
    if cache is None or path.suffix != ".safetensors":
        return file_digest(path)
    return remembered_digest(path, cache)


def describe(
    folder: Path,
    *,
    name: str,
    parents: Iterable[str] = (),
    note: str = "",
    cache: Path | None = None,
) -> Checkpoint:
    """Return the `Checkpoint` of a saved model folder.

    Its digest is read from the files, or remembered in `cache`.
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
    """Return the class that opens a folder's model.

    The one for causal language models, else the one for models that read images beside text.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config_class = type(AutoConfig.from_pretrained(folder))
    reads_images = (
        config_class not in AutoModelForCausalLM._model_mapping
        and config_class in AutoModelForImageTextToText._model_mapping
    )
    return AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
