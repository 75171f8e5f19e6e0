"""Opening models (embedded name, folder, GGUF file, Hub id), shaping students, saving them.

torch and transformers are imported inside the functions, so that planning and reporting start without them.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contract import Checkpoint
from harness.errors import CellFailed, HarnessError, in_one_line, unknown
from harness.models.bounded import TooLong, bounded
from harness.models.checkpoint import (
    describe,
    first_non_finite,
    model_class,
    read_object,
    refuse_torn,
    remembered_digest,
    save_atomically,
    weight_files,
)
from harness.models.encoding import encoded
from harness.models.foreign import refuse_foreign, refuse_gguf
from harness.models.shape import stored_tensors

if TYPE_CHECKING:
    import torch

EMBEDDED = Path(__file__).parents[1] / "embedded"
EMBEDDED_MODELS = ("tiny", "tiny-math")
RECIPES = ("depth", "width", "scratch")
EXACT_KINDS = ("F32", "F16", "BF16", "Q8_0")  # of a GGUF file, kept to the last bit; fewer bits were rounded far more than bf16 is
TODAY = date(2024, 7, 26)  # in every chat template that writes a date: the day that Llama 3.1's falls back to
DEFAULT_CONTEXT = 2048  # tokens, where neither configuration nor tokenizer tells: lm-eval's own
_ENDLESS = 10**18  # what transformers gives for a tokenizer without a longest text is above
_DATE_CODES = "aAbBcdFHIjmMpSTuUwWxXyYZ"  # of strftime


@dataclass(frozen=True)
class LanguageModel:
    """An opened checkpoint. The scorer cannot tell a teacher from a student."""

    model: Any  # a transformers causal LM, in eval mode
    tokenizer: Any
    device: str
    checkpoint: Checkpoint
    autocast: str = ""  # the type of its products under mixed precision, where that is not its weights'

    @property
    def dtype(self) -> str:
        """The type that it computes in: "float32", "bfloat16"; what a comparison of two ways to compute must allow for follows from it."""
        return self.autocast or str(self.model.dtype).removeprefix("torch.")

    @property
    def pad_id(self) -> int:
        """An id for padding, which is always masked: the tokenizer's where the embedding table has it, else any that it has."""
        listed = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(token) for token in listed if token is not None and 0 <= token < self.vocabulary), 0)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends an answer: the tokenizer's and the generation config's."""
        listed = getattr(self.model.generation_config, "eos_token_id", None)
        ids = listed if isinstance(listed, list) else [listed]
        return frozenset(int(i) for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """Encode as the tokenizer would by default; a text that already starts with BOS (a chat template's) gets no second one."""
        return encoded(self.tokenizer, text, special=special)

    def refuse_unknown(self, ids: Sequence[int]) -> None:
        """Refuse token ids that the embedding table does not have, as a tokenizer gives them that was added to without resizing."""
        if ids and max(ids) >= self.vocabulary:
            token = max(ids)
            raise CellFailed(
                f"the tokenizer of {self.checkpoint.name} writes {self.tokenizer.convert_ids_to_tokens(token)!r} as id {token:,}, and its "
                f"embedding table has {self.vocabulary:,} rows; save the model again after model.resize_token_embeddings(len(tokenizer))"
            )

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, which models with a vision or audio tower keep inside their own."""
        return text_config(self.model.config)

    @property
    def placeholders(self) -> frozenset[int]:
        """Ids that stand for an image or a sound: a text that holds one is refused by the model for want of it."""
        named = {key: value for key, value in self.model.config.to_dict().items() if key.endswith(("_token_id", "_token_index"))}
        spoken = ("bos_", "eos_", "pad_", "sep_", "unk_", "decoder_")
        return frozenset(value for key, value in named.items() if isinstance(value, int) and not key.startswith(spoken))

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table: the ids that the model can be shown."""
        table = self.model.get_input_embeddings() if hasattr(self.model, "get_input_embeddings") else None
        return int(self.text_config.vocab_size if table is None else table.weight.shape[0])

    @property
    def context(self) -> int:
        """The longest sequence that the model was built for, in tokens, by lm-eval's rule: configuration, tokenizer, 2,048."""
        told = (getattr(self.text_config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
        length = next((value for value in told if value is not None), None)
        if length is None:
            length = self.tokenizer.model_max_length
        return int(length) if length is not None and length < _ENDLESS else DEFAULT_CONTEXT


def text_config(config: Any) -> Any:
    """Return the part of a configuration that describes the language model: itself, unless there are towers beside it."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


TEMPLATE_SECONDS = 10.0  # of one prompt: the longest of real templates takes milliseconds
TEMPLATE_CHARACTERS = 200_000  # beside ten times what is shown


def as_chat(tokenizer: Any, turns: Sequence[dict[str, str]], *, goes_on: bool = False) -> str:
    """Render a conversation as the tokenizer's template does, the same on every day; `goes_on` leaves the last turn open to be continued.

    A template that asks for the date is told `TODAY`: with the real one, yesterday's prompts, digests and caches would not be today's.
    """
    told: dict[str, str] = {}
    if tokenizer.chat_template:  # mistral-common's tokenizers have none and write no date
        told = {"chat_template": _clock() + tokenizer.get_chat_template(), "date_string": TODAY.strftime("%d %b %Y")}
    try:
        with bounded(TEMPLATE_SECONDS):
            text: str = tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on, **told
            )  # fmt: skip
    except TooLong:
        raise CellFailed(f"the chat template takes more than {TEMPLATE_SECONDS:g} s for one prompt; type --chat-template off") from None
    except (MemoryError, RecursionError, OverflowError) as problem:  # Jinja's sandbox bounds ranges, and Python calls
        raise CellFailed(f"the chat template cannot be used ({in_one_line(problem)}); type --chat-template off") from problem
    shown = sum(len(str(turn.get("content", ""))) for turn in turns)
    if len(text) > TEMPLATE_CHARACTERS + 10 * shown:
        raise CellFailed(f"the chat template writes {len(text):,} characters around {shown:,}; type --chat-template off")
    return text


def _clock() -> str:
    """Return a Jinja macro that hides the template's `strftime_now`: transformers passes texts to a template, and no functions."""
    codes = "".join(f".replace('%{code}', '{TODAY.strftime(f'%{code}')}')" for code in _DATE_CODES)
    return "{% macro strftime_now(format) %}{{ format.replace('%-', '%')" + codes + " }}{% endmacro %}\n"


def is_embedded(name: str) -> bool:
    """Tell whether a model name is one of the models that the package ships."""
    return name in EMBEDDED_MODELS


def parse_recipe(text: str) -> tuple[str, float] | None:
    """Split `depth:0.5` into its parts; None when the text names a model instead."""
    kind, colon, share = text.partition(":")
    if not colon or "/" in text or "\\" in text:
        return None
    if kind not in RECIPES:
        raise unknown("student recipe", kind, RECIPES, hint="(write depth:0.5, width:0.5, scratch:0.5, a folder or a Hub id)")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise HarnessError(f"student {text!r}: the share kept must be above 0 and at most 1; write for example {kind}:0.5")
    return kind, value


def resolve(name: str, *, cache: Path) -> Checkpoint:
    """Find the model that the user named and return its checkpoint, unpacking a GGUF file into `cache` once."""
    if is_embedded(name):
        folder = EMBEDDED / name
        if not (folder / "config.json").exists():
            raise HarnessError(f"the embedded model {name!r} is missing from {folder}; type: harness train-tiny")
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
            raise _no_safetensors(name, path)
        refuse_torn(path)
        return describe(path, name=path.resolve().name, note=_packed_note(path), cache=cache)
    if not _is_hub_id(name):
        raise _unknown_model(name)
    return _from_hub(name)


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.pickle")  # opening one runs what it says


def _no_safetensors(name: str, folder: Path) -> HarnessError:
    """Return the line for a folder without safetensors; weights that are pickles are named and never opened."""
    pickled = next((path.name for pattern in _PICKLES for path in sorted(folder.glob(pattern))), "")
    told = f": {pickled} is a pickle, which is a program, and is not opened" if pickled else ""
    return HarnessError(f"folder {name} holds no *.safetensors weights{told}; save it with save_pretrained()")


_HUB_ID = re.compile(r"(?P<id>\w[\w.-]*(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


def _is_hub_id(name: str) -> bool:
    """Tell whether a name may be a Hub id: org/name, or a single name (gpt2) that is not nearly an embedded one, @revision behind it."""
    alone = "/" not in name.partition("@")[0]
    return _HUB_ID.fullmatch(name) is not None and not (alone and difflib.get_close_matches(name, EMBEDDED_MODELS, n=1, cutoff=0.5))


def _unknown_model(name: str) -> HarnessError:
    return unknown(
        "model", name, EMBEDDED_MODELS,
        hint="(a model is an embedded name, a folder, a .gguf file or a Hub id like org/name, gpt2 or org/name@revision)",
    )  # fmt: skip


def _at_revision(name: str) -> tuple[str, dict[str, str]]:
    """Split a Hub id into its repository and the revision that is asked for, if any."""
    found = _HUB_ID.fullmatch(name)
    assert found is not None
    return found["id"], {"revision": found["revision"]} if found["revision"] else {}


def configuration_of(name: str, *, cache: Path) -> Path:
    """Return a folder with a model's configuration and, where that is free, nothing else: no weights are fetched, opened or hashed."""
    path = Path(name).expanduser()
    if is_embedded(name):
        return EMBEDDED / name
    if path.is_dir() and (path / "config.json").is_file():
        return path
    if _is_hub_id(name) and path.suffix != ".gguf" and not path.exists():
        from huggingface_hub import hf_hub_download

        repository, revision = _at_revision(name)
        try:
            return Path(hf_hub_download(repository, "config.json", **revision)).parent
        except Exception as problem:
            told = "the configuration of {name!r} is not to be had from the Hub ({reason}); give a folder or a size: 7B"
            raise _refused_by_hub(name, problem, told) from problem
    return resolve(name, cache=cache).path  # a GGUF file is unpacked once, as any run on it would; names that mean nothing are refused


def _from_hub(name: str) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        wanted = ["*.safetensors", "*.json", "*.model", "*.jinja"]
        repository, revision = _at_revision(name)
        folder = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=["consolidated*"], **revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as problem:
        if "/" not in name:
            raise _unknown_model(name) from problem
        told = "model {name!r} is neither a folder here nor to be had from the Hub ({reason}); give a folder or a .gguf file"
        raise _refused_by_hub(name, problem, told) from problem
    if not any(folder.glob("*.safetensors")):
        raise HarnessError(f"model {name!r} has no *.safetensors weights on the Hub; pickles are programs and are not opened")
    # The snapshot folder is named by the commit: the Hub's own content address.
    refuse_foreign(folder, read_object(folder / "config.json"))
    size = sum(path.stat().st_size for path in weight_files(folder))
    note = _packed_note(folder)
    return Checkpoint(path=folder, name=name, digest=f"hub:{repository}@{folder.name}", bytes_on_disk=size, note=note)


def _refused_by_hub(name: str, problem: Exception, told: str) -> HarnessError:
    """Return the line for a model that the Hub does not give: a name without a slash is more likely a slip than one of the Hub's few."""
    from huggingface_hub.errors import GatedRepoError

    if isinstance(problem, GatedRepoError):
        return HarnessError(f"model {name!r} is gated; accept its licence at https://huggingface.co/{name}, then type: hf auth login")
    if "/" not in name.partition("@")[0]:
        return _unknown_model(name)
    return HarnessError(told.format(name=name, reason=str(problem).splitlines()[0][:120]))


def _unpack_gguf(path: Path, cache: Path) -> Checkpoint:
    """Save a GGUF file once as plain safetensors (its quantised weights dequantised to floats)."""
    try:
        import gguf  # noqa: F401
    except ImportError as problem:
        raise HarnessError("opening a .gguf file needs the gguf package; type: pip install 'compression-harness[gguf]'") from problem
    kind = gguf_kind(path)
    key = remembered_digest(path, cache)
    exact = kind in EXACT_KINDS
    folder = cache / "gguf" / (f"{key[:32]}-exact" if exact else key[:32])
    if not (folder / "config.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        # dequantize=True: never stays packed. Then the mark goes, or save_pretrained refuses it as quantised.
        with _opening(path.name):
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model.hf_quantizer = None
        model.is_quantized = False
        model.quantization_method = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        dtype = smallest_exact(model) if exact else torch.bfloat16
        model = model.to(dtype)
        model.config.dtype = dtype

        def write(fresh: Path) -> None:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)

        folder.parent.mkdir(parents=True, exist_ok=True)
        save_atomically(folder, write)
    checkpoint = describe(folder, name=path.stem, cache=cache)
    floats = str(stored_dtype(checkpoint)).removeprefix("torch.")
    return replace(checkpoint, note=f"unpacked from GGUF {kind}, {'kept in' if exact else 'rounded to'} {floats}")


def smallest_exact(model: Any) -> "torch.dtype":
    """Return the smallest type of floats that holds every weight of a model as it is: bfloat16 or float16, else float32."""
    import torch

    def holds(dtype: "torch.dtype") -> bool:
        return all(bool(torch.equal(one.to(dtype).to(one.dtype), one)) for one in model.state_dict().values() if one.is_floating_point())

    return next((dtype for dtype in (torch.bfloat16, torch.float16) if holds(dtype)), torch.float32)


def gguf_kind(path: Path) -> str:
    """Read the commonest tensor type of a GGUF file (Q4_1, Q8_0, F16...); refuses a file whose header is none."""
    from collections import Counter

    import gguf

    refuse_gguf(path)
    try:
        counts = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1)
        return str(counts.most_common(1)[0][0])
    except (ValueError, IndexError, KeyError, OSError) as problem:  # what the reader raises for a torn file, by where it is torn
        raise HarnessError(f"{path.name} cannot be read as a GGUF file ({str(problem)[:80]}); download it again") from problem


def quantized_by(folder: Path) -> str:
    """Return which library packed a model folder's weights, as its configuration says; "" for plain floats."""
    told = read_object(folder / "config.json").get("quantization_config") or {}
    if not isinstance(told, dict):
        raise HarnessError(f"{folder / 'config.json'}: quantization_config is no object; download or save the model again")
    if told.get("quant_method") == "compression-harness":
        try:
            kinds = sorted({str(spec["kind"]) for spec in told["modules"].values()})
        except (AttributeError, LookupError, TypeError) as problem:
            raise HarnessError(f"{folder / 'config.json'}: its packed modules are not described; save the model again") from problem
        return "float" if kinds == ["float"] else "+".join(kinds)
    return str(told.get("quant_method") or "")


def _packed_note(folder: Path) -> str:
    packed = quantized_by(folder)
    return f"quantized ({packed})" if packed not in ("", "float") else ""


def open_model(checkpoint: Checkpoint, *, device: str = "cpu", dtype: str = "float32") -> LanguageModel:
    """Open a checkpoint with plain transformers, in eval mode."""
    import torch
    from transformers import AutoTokenizer

    import harness.models.packed  # noqa: F401  the formats of our own students

    with _opening(checkpoint.name):
        model = model_class(checkpoint.path).from_pretrained(checkpoint.path, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    model.to(device).eval()
    refuse_non_finite(model, checkpoint.name)
    return LanguageModel(model, tokenizer, device, checkpoint)


@contextmanager
def _opening(name: str) -> Iterator[None]:
    """Turn what a library raises over a model's files into one line; want of memory and of kernels stays what it is."""
    try:
        yield
    except (HarnessError, CellFailed, MemoryError, RuntimeError):
        raise
    except Exception as problem:
        raise HarnessError(f"{name} cannot be opened ({in_one_line(problem)}); download or save the model again") from problem


def refuse_non_finite(model: Any, name: str) -> None:
    """Refuse a model that holds a number which is none: whatever is computed with it would be noise that looks like a result."""
    kept = model.state_dict(keep_vars=True).keys()  # a buffer that is never saved may hold a mask of infinities
    buffers = ((key, buffer) for key, buffer in model.named_buffers() if key in kept)
    place = first_non_finite((*model.named_parameters(), *buffers))
    if place:
        raise CellFailed(f"{name} holds numbers that are not finite: {place}; train, save or download it again")


def release_memory(device: str) -> None:
    """Give back what models that nobody holds any more have left with the allocator."""
    import gc

    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def student_tokenizer(checkpoint: Checkpoint) -> Any:
    """Open a checkpoint's tokenizer alone."""
    from transformers import AutoTokenizer

    with _opening(checkpoint.name):
        return AutoTokenizer.from_pretrained(checkpoint.path)


def stored_dtype(checkpoint: Checkpoint) -> "torch.dtype":
    """Return the dtype in which a checkpoint's largest matrix of floats lies on disk: a student is saved in its base's."""
    import torch

    floats = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    _, kind = max((count, kind) for _, kind, count in stored_tensors(checkpoint.path) if kind in floats)
    return floats[kind]


def student_of(recipe: str, base: Checkpoint, *, seed: int, device: str, dtype: str) -> LanguageModel:
    """Open the student's starting point: a cut of `base` (depth, width, scratch), or `base` itself.

    depth:s keeps a share s of the blocks, evenly spaced, first and last among them; width:s keeps the share s of
    each feed-forward's channels with the largest weight norms; scratch:s has the shape of depth:s and random
    weights drawn from `seed`. Raises `CellFailed` where a cut is not what its recipe says.
    """
    import torch

    from harness.models.blocks import blocks_of
    from harness.models.depth import with_blocks
    from harness.models.width import narrowed

    opened = open_model(base, device=device, dtype=dtype)
    parsed = parse_recipe(recipe)
    if parsed is None:
        return opened
    kind, share = parsed
    packed = quantized_by(base.path)
    if packed:
        raise CellFailed(f"student {recipe}: {base.name} is packed ({packed}) and cannot be cut; start from the floats that it was made of")
    torch.manual_seed(seed)
    if kind == "width":
        model = narrowed(opened.model, share, cut=recipe)
    else:
        _, blocks = blocks_of(opened.model)
        model = with_blocks(opened.model, kept_blocks(len(blocks), share), copy=kind == "depth", cut=recipe)
    model.generation_config = opened.model.generation_config
    return LanguageModel(model.to(device).eval(), opened.tokenizer, device, base)


def random_weights(student: LanguageModel, *, seed: int) -> LanguageModel:
    """Return a model of the same shape whose weights are drawn from `seed`, as its class initialises them."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(student.model.config, dtype=next(student.model.parameters()).dtype)
    model.generation_config = student.model.generation_config
    return LanguageModel(model.to(student.device).eval(), student.tokenizer, student.device, student.checkpoint)


def kept_blocks(count: int, share: float) -> list[int]:
    """Return the indices of the evenly spaced blocks that a share keeps (at least one, rounded half up)."""
    keep = max(1, int(count * share + 0.5))
    return [int(i * (count - 1) / (keep - 1) + 0.5) for i in range(keep)] if keep > 1 else [0]


def save_student(student: LanguageModel, folder: Path, *, name: str, dtype: "torch.dtype", parents: tuple[str, ...]) -> Checkpoint:
    """Save a student whole or not at all, with its tokenizer; return its checkpoint. What is saved is opened again and compared.

    The digest is the digest of the bytes written: same seed, same machine, same digest.
    """
    from harness.models.blocks import is_tied
    from harness.models.packed import is_plain, refuse_otherwise

    model = student.model.to(dtype)
    model.config.dtype = dtype
    if not is_plain(model):
        raise CellFailed(f"{name}: {student.checkpoint.name} is quantized, and packed weights are not written again; copy its folder")
    refuse_non_finite(model, name)
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", None) and not is_tied(model):
            config.tie_word_embeddings = False  # the file held a head of its own, and the configuration said otherwise

    def write(fresh: Path) -> None:
        model.save_pretrained(fresh)
        student.tokenizer.save_pretrained(fresh)
        for path in weight_files(fresh):
            path.chmod(0o644)  # safetensors writes for the owner alone
        refuse_otherwise(fresh, model.state_dict(), name=name, dtype=dtype, tied=is_tied(model))

    save_atomically(folder, write)
    return describe(folder, name=name, parents=parents)


def copy_student(base: Checkpoint, folder: Path, *, name: str) -> Checkpoint:
    """Copy a checkpoint's files whole: what is packed is not written again, since kernels lay its weights out anew."""
    import shutil

    def write(fresh: Path) -> None:
        for path in base.path.iterdir():
            if path.is_file():
                shutil.copyfile(path, fresh / path.name)

    save_atomically(folder, write)
    return describe(folder, name=name, parents=(base.digest,))
