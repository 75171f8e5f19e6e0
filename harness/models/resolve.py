"""From a name to a model's folder: embedded pair, folder, GGUF file, Hub id."""

import difflib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contract import Checkpoint
from harness.errors import HarnessError, unknown
from harness.files.writing import save_atomically
from harness.models.checkpoint import (
    describe,
    read_model_json,
    refuse_damaged,
    remembered_digest,
    weight_files,
)
from harness.models.foreign import refuse_malformed, refuse_malformed_gguf
from harness.models.language_model import one_line_open_errors, stored_dtype, tokenizer_of

if TYPE_CHECKING:
    import torch


EMBEDDED = Path(__file__).parents[1] / "embedded"


EMBEDDED_MODELS = ("tiny", "tiny-math")


# of a GGUF file, kept to the last bit; fewer bits were rounded far more than bf16 is
EXACT_GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0")


def is_embedded(name: str) -> bool:
    """Tell whether a model name is one of the models that the package ships."""
    return name in EMBEDDED_MODELS


def resolve(name: str, *, cache: Path) -> Checkpoint:
    """Find the model that the user named and return its checkpoint, unpacking a GGUF file into
    `cache` once.
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
        return _unpack_gguf(path, cache)
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; it holds {inside[0]}: name that file" if inside else ""
            raise HarnessError(f"folder {name} holds no model (config.json is missing){hint}")
        if not any(path.glob("*.safetensors")):
            raise _no_safetensors_error(name, path)
        refuse_damaged(path)
        return describe(path, name=path.resolve().name, note=_packed_note(path), cache=cache)
    if not _is_hub_id(name):
        raise _unknown_model_error(name)
    return _from_hub(name)


# opening one runs what it says
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.pickle")


def _no_safetensors_error(name: str, folder: Path) -> HarnessError:
    """Return the line for a folder without safetensors; weights that are pickles are named and
    never opened.
    """
    pickled = next(
        (path.name for pattern in _PICKLE_PATTERNS for path in sorted(folder.glob(pattern))), ""
    )
    told = f": {pickled} is a pickle, which is a program, and is not opened" if pickled else ""
    return HarnessError(
        f"folder {name} holds no *.safetensors weights{told}; save it with save_pretrained()"
    )


_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


def _is_hub_id(name: str) -> bool:
    """Tell whether a name may be a Hub id: org/name, or a single name (gpt2) that is not nearly an
    embedded one, @revision behind it.
    """
    alone = "/" not in name.partition("@")[0]
    return _HUB_ID.fullmatch(name) is not None and not (
        alone and difflib.get_close_matches(name, EMBEDDED_MODELS, n=1, cutoff=0.5)
    )


def _unknown_model_error(name: str) -> HarnessError:
    return unknown(
        "model",
        name,
        EMBEDDED_MODELS,
        hint="(a model is an embedded name, a folder, a .gguf file or a Hub id like org/name, gpt2 "
        "or org/name@revision)",
    )


def _split_revision(name: str) -> tuple[str, dict[str, str]]:
    """Split a Hub id into its repository and the revision that is asked for, if any."""
    found = _HUB_ID.fullmatch(name)
    assert found is not None
    return found["id"], {"revision": found["revision"]} if found["revision"] else {}


def configuration_folder(name: str, *, cache: Path) -> Path:
    """Return a folder with a model's configuration and, where that is free, nothing else: no
    weights are fetched, opened or hashed.
    """
    path = Path(name).expanduser()
    if is_embedded(name):
        return EMBEDDED / name
    if path.is_dir() and (path / "config.json").is_file():
        return path
    if _is_hub_id(name) and path.suffix != ".gguf" and not path.exists():
        from huggingface_hub import hf_hub_download

        repository, revision = _split_revision(name)
        try:
            return Path(hf_hub_download(repository, "config.json", **revision)).parent
        except Exception as problem:
            told = (
                "the configuration of {name!r} is not to be had from the Hub ({reason}); give a "
                "folder or a size: 7B"
            )
            raise _hub_error(name, problem, told) from problem
    # a GGUF file is unpacked once, as any run on it would; names that mean nothing are refused
    return resolve(name, cache=cache).path


def _from_hub(name: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.json", "*.model", "*.jinja"]
        repository, revision = _split_revision(name)
        folder = Path(
            snapshot_download(
                repository, allow_patterns=wanted, ignore_patterns=["consolidated*"], **revision
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
        if "/" not in name:
            raise _unknown_model_error(name) from problem
        told = (
            "model {name!r} is neither a folder here nor to be had from the Hub ({reason}); give a "
            "folder or a .gguf file"
        )
        raise _hub_error(name, problem, told) from problem
    if not any(folder.glob("*.safetensors")):
        raise HarnessError(
            f"model {name!r} has no *.safetensors weights on the Hub; pickles are programs and are "
            "not opened"
        )
    # The snapshot folder is named by the commit: the Hub's own content address.
    refuse_malformed(folder, read_model_json(folder / "config.json"))
    size = sum(path.stat().st_size for path in weight_files(folder))
    note = _packed_note(folder)
    return Checkpoint(
        path=folder,
        name=name,
        digest=f"hub:{repository}@{folder.name}",
        bytes_on_disk=size,
        note=note,
    )


def _hub_error(name: str, problem: Exception, told: str) -> HarnessError:
    """Return the line for a model that the Hub does not give: a name without a slash is more likely
    a slip than one of the Hub's few.
    """
    from huggingface_hub.errors import GatedRepoError

    if isinstance(problem, GatedRepoError):
        return HarnessError(
            f"model {name!r} is gated; accept its licence at https://huggingface.co/{name}, then "
            "type: hf auth login"
        )
    if "/" not in name.partition("@")[0]:
        return _unknown_model_error(name)
    return HarnessError(told.format(name=name, reason=str(problem).splitlines()[0][:120]))


def _unpack_gguf(path: Path, cache: Path) -> Checkpoint:
    """Save a GGUF file once as plain safetensors (its quantised weights dequantised to floats)."""
    try:
        import gguf  # noqa: F401
    except ImportError as problem:
        raise HarnessError(
            "opening a .gguf file needs the gguf package; type: pip install "
            "'compression-harness[gguf]'"
        ) from problem
    kind = gguf_type(path)
    key = remembered_digest(path, cache)
    exact = kind in EXACT_GGUF_TYPES
    folder = cache / "gguf" / (f"{key[:32]}-exact" if exact else key[:32])
    if not (folder / "config.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        # dequantize=True: never stays packed. Then the mark goes, or save_pretrained refuses it as
        # quantised.
        with one_line_open_errors(path.name):
            model = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = tokenizer_of(path.parent, gguf_file=path.name)
        model.hf_quantizer = None
        model.is_quantized = False
        model.quantization_method = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        dtype = smallest_exact_dtype(model) if exact else torch.bfloat16
        model = model.to(dtype)
        model.config.dtype = dtype

        def write(fresh: Path) -> None:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)

        folder.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(folder, write)
    checkpoint = describe(folder, name=path.stem, cache=cache)
    floats = str(stored_dtype(checkpoint)).removeprefix("torch.")
    return replace(
        checkpoint,
        note=f"unpacked from GGUF {kind}, {'kept in' if exact else 'rounded to'} {floats}",
    )


def smallest_exact_dtype(model: Any) -> "torch.dtype":
    """Return the smallest type of floats that holds every weight of a model as it is: bfloat16 or
    float16, else float32.
    """
    import torch

    def holds(dtype: "torch.dtype") -> bool:
        return all(
            bool(torch.equal(one.to(dtype).to(one.dtype), one))
            for one in model.state_dict().values()
            if one.is_floating_point()
        )

    return next((dtype for dtype in (torch.bfloat16, torch.float16) if holds(dtype)), torch.float32)


def gguf_type(path: Path) -> str:
    """Read the commonest tensor type of a GGUF file (Q4_1, Q8_0, F16...); refuses a file whose
    header is none.
    """
    from collections import Counter

    import gguf

    refuse_malformed_gguf(path)
    try:
        counts = Counter(
            tensor.tensor_type.name
            for tensor in gguf.GGUFReader(path).tensors
            if len(tensor.shape) > 1
        )
        return str(counts.most_common(1)[0][0])
    # what the reader raises for a torn file, by where it is torn
    except (ValueError, IndexError, KeyError, OSError) as problem:
        raise HarnessError(
            f"{path.name} cannot be read as a GGUF file ({str(problem)[:80]}); download it again"
        ) from problem


def quantized_by(folder: Path) -> str:
    """Return which library packed a model folder's weights, as its configuration says; "" for plain
    floats.
    """
    told = read_model_json(folder / "config.json").get("quantization_config") or {}
    if not isinstance(told, dict):
        raise HarnessError(
            f"{folder / 'config.json'}: quantization_config is no object; download or save the "
            "model again"
        )
    if told.get("quant_method") == "compression-harness":
        try:
            kinds = sorted({str(spec["kind"]) for spec in told["modules"].values()})
        except (AttributeError, LookupError, TypeError) as problem:
            raise HarnessError(
                f"{folder / 'config.json'}: its packed modules are not described; save the model "
                "again"
            ) from problem
        return "float" if kinds == ["float"] else "+".join(kinds)
    return str(told.get("quant_method") or "")


def _packed_note(folder: Path) -> str:
    packed = quantized_by(folder)
    return f"quantized ({packed})" if packed not in ("", "float") else ""
