"""Finds a model by name: one of the embedded pair, a folder, a GGUF file, a Hub id."""

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contract import Checkpoint
from harness.errors import HarnessError, unknown
from harness.files.writing import save_atomically
from harness.models.checkpoint import (
    OWN_FORMAT,
    describe,
    read_model_json,
    refuse_damaged,
    remembered_digest,
    weight_files,
)
from harness.models.foreign import refuse_malformed, refuse_malformed_gguf
from harness.models.formats import packing_library as packing_library
from harness.models.formats import quantization_of, unreadable_kinds
from harness.models.language_model import one_line_open_errors, stored_dtype, tokenizer_of

if TYPE_CHECKING:
    import torch


EMBEDDED = Path(__file__).parents[1] / "embedded"
EMBEDDED_MODELS = ("tiny", "tiny-math")
# GGUF types whose values are kept exactly; the others were rounded far more than bf16 rounds.
EXACT_GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0")


def is_embedded(name: str) -> bool:
    """Tell whether a model name is one of the models that the package ships."""
    return name in EMBEDDED_MODELS


def resolve(name: str, *, cache: Path) -> Checkpoint:
    """Return the checkpoint of the model that the user named.

    A GGUF file is unpacked into `cache` once.
    """
    if is_embedded(name):
        folder = EMBEDDED / name
        if not (folder / "config.json").exists():
            raise HarnessError(
                f"the embedded model {name!r} is missing from {folder}; type: harness train-tiny"
            )
        return describe(folder, name=name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise HarnessError(f"no GGUF file at {name}")
        return unpack_gguf(path, cache)
    if path.is_dir():
        if not (path / "config.json").is_file():
            gguf_names = sorted(gguf_path.name for gguf_path in path.glob("*.gguf"))
            hint = f"; it holds {gguf_names[0]}: name that file" if gguf_names else ""
            raise HarnessError(f"folder {name} holds no model (config.json is missing){hint}")
        if not any(path.glob("*.safetensors")):
            raise _no_safetensors_error(name, path)
        refuse_damaged(path)
        return describe(path, name=path.resolve().name, note=_packed_note(path), cache=cache)
    if not is_hub_id(name):
        raise _unknown_model_error(name)
    return _from_hub(name)


# Opening a pickle runs the program in it.
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.pickle")


def _no_safetensors_error(name: str, folder: Path) -> HarnessError:
    """Return the error for a folder without safetensors; it names pickles, which stay closed."""
    pickles = [path.name for pattern in _PICKLE_PATTERNS for path in sorted(folder.glob(pattern))]
    note = f": {pickles[0]} is a pickle, which is a program, and is not opened" if pickles else ""
    return HarnessError(
        f"folder {name} holds no *.safetensors weights{note}; save it with save_pretrained()"
    )


_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


def is_hub_id(name: str) -> bool:
    """Tell whether a name may be a Hub id: org/name or one word, with or without @revision.

    A single word that is close to an embedded model's name is taken for a slip.
    """
    if _HUB_ID.fullmatch(name) is None:
        return False
    has_owner = "/" in name.partition("@")[0]
    return has_owner or not difflib.get_close_matches(name, EMBEDDED_MODELS, n=1, cutoff=0.5)


def _unknown_model_error(name: str) -> HarnessError:
    hint = (
        "(a model is an embedded name, a folder, a .gguf file or a Hub id like org/name, gpt2 or "
        "org/name@revision)"
    )
    return unknown("model", name, EMBEDDED_MODELS, hint=hint)


def _split_revision(name: str) -> tuple[str, dict[str, str]]:
    """Split a Hub id into its repository and its revision, an argument of the Hub's functions."""
    match = _HUB_ID.fullmatch(name)
    assert match is not None
    return match["id"], {"revision": match["revision"]} if match["revision"] else {}


def configuration_folder(name: str, *, cache: Path) -> Path:
    """Return a folder with a model's configuration, without reading any weights where possible."""
    path = Path(name).expanduser()
    if is_embedded(name):
        return EMBEDDED / name
    if path.is_dir() and (path / "config.json").is_file():
        return path
    if is_hub_id(name) and path.suffix != ".gguf" and not path.exists():
        from huggingface_hub import hf_hub_download

        repository, revision = _split_revision(name)
        try:
            return Path(hf_hub_download(repository, "config.json", **revision)).parent
        except Exception as problem:
            message = (
                "the Hub does not give the configuration of {name!r} ({reason}); give a folder or "
                "a size: 7B"
            )
            raise _hub_error(name, problem, message) from problem
    # A GGUF file is unpacked, as any run would do once; names without a model are refused.
    return resolve(name, cache=cache).path


def _from_hub(name: str) -> Checkpoint:
    """Download a model from the Hub, or find it in the Hub's cache; return its checkpoint."""
    folder, digest = hub_snapshot(name)
    refuse_malformed(folder, read_model_json(folder / "config.json"))
    return Checkpoint(
        path=folder,
        name=name,
        digest=digest,
        bytes_on_disk=sum(path.stat().st_size for path in weight_files(folder)),
        note=_packed_note(folder),
    )


def hub_snapshot(name: str) -> tuple[Path, str]:
    """Download a repository of the Hub, or find it in the Hub's cache.

    Returns the folder of its files, and its digest: the Hub's own content address.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.jinja"]
        repository, revision = _split_revision(name)
        snapshot = snapshot_download(
            repository, allow_patterns=patterns, ignore_patterns=["consolidated*"], **revision
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
        if "/" not in name:
            raise _unknown_model_error(name) from problem
        message = (
            "model {name!r} is no folder here, and the Hub does not give it ({reason}); give a "
            "folder or a .gguf file"
        )
        raise _hub_error(name, problem, message) from problem
    folder = Path(snapshot)
    if not any(folder.glob("*.safetensors")):
        raise HarnessError(
            f"model {name!r} has no *.safetensors weights on the Hub; pickles are programs and are "
            "not opened"
        )
    # the snapshot folder is named by the commit
    return folder, f"hub:{repository}@{folder.name}"


def _hub_error(name: str, problem: Exception, message: str) -> HarnessError:
    """Return the error for a model that the Hub does not give.

    A name without a slash is more likely a slip than one of the Hub's few such models.
    """
    from huggingface_hub.errors import GatedRepoError

    if isinstance(problem, GatedRepoError):
        return HarnessError(
            f"model {name!r} is gated; accept its licence at https://huggingface.co/{name}, then "
            "type: hf auth login"
        )
    if "/" not in name.partition("@")[0]:
        return _unknown_model_error(name)
    return HarnessError(message.format(name=name, reason=str(problem).splitlines()[0][:120]))


def unpack_gguf(path: Path, cache: Path, *, exact: bool = False) -> Checkpoint:
    """Save a GGUF file once as plain safetensors, its quantized weights as floats.

    They are rounded to bf16 where their kind was rounded further already, unless `exact`: then
    they are kept in the smallest float type that holds every number of the file.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as problem:
        raise HarnessError(
            "opening a .gguf file needs the gguf package; type: pip install "
            "'compression-harness[gguf]'"
        ) from problem
    tensor_type = gguf_type(path)
    key = remembered_digest(path, cache)
    is_exact = exact or tensor_type in EXACT_GGUF_TYPES
    folder = cache / "gguf" / (f"{key[:32]}-exact" if is_exact else key[:32])
    if not (folder / "config.json").exists():
        _save_as_floats(path, folder, is_exact=is_exact)
    checkpoint = describe(folder, name=path.stem, cache=cache)
    dtype = str(stored_dtype(checkpoint)).removeprefix("torch.")
    change = "kept in" if is_exact else "rounded to"
    return replace(checkpoint, note=f"unpacked from GGUF {tensor_type}, {change} {dtype}")


def _save_as_floats(path: Path, folder: Path, *, is_exact: bool) -> None:
    """Save a GGUF file's model in the smallest exact float type, or in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    with one_line_open_errors(path.name):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),  # to floats, whatever the type
        )
        tokenizer = tokenizer_of(path.parent, gguf_file=path.name)
    # Without these marks save_pretrained would refuse the model as quantized.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    dtype = smallest_exact_dtype(model) if is_exact else torch.bfloat16
    model = model.to(dtype)
    model.config.dtype = dtype

    def write(part: Path) -> None:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)

    folder.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(folder, write)


def smallest_exact_dtype(model: Any) -> "torch.dtype":
    """Return the smallest float type that holds every weight exactly: bf16, fp16, else fp32."""
    import torch

    def holds(dtype: "torch.dtype") -> bool:
        return all(
            bool(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor))
            for tensor in model.state_dict().values()
            if tensor.is_floating_point()
        )

    return next((dtype for dtype in (torch.bfloat16, torch.float16) if holds(dtype)), torch.float32)


def gguf_type(path: Path) -> str:
    """Return the commonest tensor type of a GGUF file, as "Q4_1"; refuses a damaged file."""
    from collections import Counter

    import gguf

    refuse_malformed_gguf(path)
    try:
        tensors = gguf.GGUFReader(path).tensors
        counts = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
        commonest = str(counts.most_common(1)[0][0])
    # one of these for a damaged file, depending on where it is damaged
    except (ValueError, IndexError, KeyError, OSError) as problem:
        advice = "download it again"
        if "GGMLQuantizationType" in str(problem):  # a number that names no kind
            advice = "upgrade gguf, or convert the file to another kind: llama-quantize FILE Q8_0"
        raise HarnessError(
            f"{path.name} cannot be read as a GGUF file ({str(problem)[:80]}); {advice}"
        ) from problem
    if unreadable := unreadable_kinds([tensor.tensor_type for tensor in tensors]):
        raise HarnessError(
            f"{path.name} holds tensors of kind {unreadable[0]}, which the gguf package does not "
            "unpack; convert the file to another kind: llama-quantize FILE Q8_0"
        )
    return commonest


def quantized_by(folder: Path) -> str:
    """Return how a model folder's weights are packed, "" for plain floats.

    For our own format these are the kinds of its layers, else it is the library's name.
    """
    quantization = quantization_of(folder)
    if quantization.get("quant_method") == OWN_FORMAT:
        try:
            kinds = sorted({str(spec["kind"]) for spec in quantization["modules"].values()})
        except (AttributeError, LookupError, TypeError) as problem:
            raise HarnessError(
                f"{folder / 'config.json'}: its packed modules are not described; save the model "
                "again"
            ) from problem
        return "float" if kinds == ["float"] else "+".join(kinds)
    return str(quantization.get("quant_method") or "")


def _packed_note(folder: Path) -> str:
    """Return the note on a quantized checkpoint, "" for plain floats."""
    packed = quantized_by(folder)
    return f"quantized ({packed})" if packed not in ("", "float") else ""
