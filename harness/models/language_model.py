"""A language model in memory: opened with its tokenizer, encoding, chat templates, context.

torch and transformers are imported inside the functions, so that planning and reporting start
without them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.contract import Checkpoint
from harness.errors import CellFailed, HarnessError, in_one_line
from harness.models.adapters import open_weights
from harness.models.bounded import TimeLimitExceeded, time_limit
from harness.models.checkpoint import first_non_finite
from harness.models.encoding import encode_prompt
from harness.models.formats import require_format
from harness.models.shape import stored_tensors
from harness.models.stored_attention import attend_to_stored

if TYPE_CHECKING:
    import torch

# in every chat template that writes a date: the day that Llama 3.1's falls back to
TEMPLATE_DATE = date(2024, 7, 26)
DEFAULT_CONTEXT = 2048  # tokens, where neither configuration nor tokenizer tells: lm-eval's own
_NO_LIMIT = 10**18  # what transformers gives for a tokenizer without a longest text is above
_HOW_IT_WAS_OPENED = ("is_local", "local_files_only")  # what transformers notes in a tokenizer
_DATE_CODES = "aAbBcdFHIjmMpSTuUwWxXyYZ"  # of strftime


@dataclass(frozen=True)
class LanguageModel:
    """An opened checkpoint. The scorer cannot tell a teacher from a student."""

    model: Any  # a transformers causal LM, in eval mode
    tokenizer: Any
    device: str
    checkpoint: Checkpoint
    # the type of its products under mixed precision, where that is not its weights'
    autocast: str = ""

    @property
    def dtype(self) -> str:
        """The type that it computes in, as "float32"; tolerances of comparisons depend on it."""
        return self.autocast or str(self.model.dtype).removeprefix("torch.")

    @property
    def pad_id(self) -> int:
        """An id for padding, which is always masked.

        The tokenizer's, if the embedding has a row for it, else any id.
        """
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next(
            (
                int(token)
                for token in candidates
                if token is not None and 0 <= token < self.vocabulary
            ),
            0,
        )

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends an answer: the tokenizer's and the generation config's."""
        stated = getattr(self.model.generation_config, "eos_token_id", None)
        ids = [*(stated if isinstance(stated, list) else [stated]), self.tokenizer.eos_token_id]
        return frozenset(int(token) for token in ids if token is not None)

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """Encode a text as the tokenizer does by default, but with no second BOS."""
        return encode_prompt(self.tokenizer, text, special=special)

    def refuse_unknown_ids(self, ids: Sequence[int]) -> None:
        """Refuse token ids without a row in the embedding.

        A tokenizer gives such ids if tokens were added to it and the model was not resized.
        """
        if ids and max(ids) >= self.vocabulary:
            token = max(ids)
            raise CellFailed(
                f"the tokenizer of {self.checkpoint.name} writes "
                f"{self.tokenizer.convert_ids_to_tokens(token)!r} as id {token:,}, and its "
                f"embedding table has {self.vocabulary:,} rows; save the model again after "
                "model.resize_token_embeddings(len(tokenizer))"
            )

    @property
    def text_config(self) -> Any:
        """The configuration of the language model, without vision or audio parts."""
        return text_config(self.model.config)

    @property
    def placeholders(self) -> frozenset[int]:
        """Ids that stand for an image or a sound: the model fails on a text that holds one."""
        token_ids = {
            key: value
            for key, value in self.model.config.to_dict().items()
            if key.endswith(("_token_id", "_token_index"))
        }
        text_prefixes = ("bos_", "eos_", "pad_", "sep_", "unk_", "decoder_")
        return frozenset(
            value
            for key, value in token_ids.items()
            if isinstance(value, int) and not key.startswith(text_prefixes)
        )

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: how many ids the model accepts."""
        get_embedding = getattr(self.model, "get_input_embeddings", lambda: None)
        embedding = get_embedding()
        return int(self.text_config.vocab_size if embedding is None else embedding.weight.shape[0])

    @property
    def context(self) -> int:
        """The longest sequence that the model was built for, in tokens.

        By lm-eval's rule: what the configuration says, else the tokenizer, else 2,048.
        """
        lengths = (
            getattr(self.text_config, name, None)
            for name in ("n_positions", "max_position_embeddings", "n_ctx")
        )
        length = next((value for value in lengths if value is not None), None)
        if length is None:
            length = self.tokenizer.model_max_length
        return int(length) if length is not None and length < _NO_LIMIT else DEFAULT_CONTEXT


def text_config(config: Any) -> Any:
    """Return the part of a configuration that describes the language model, or all of it."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


MAX_TEMPLATE_SECONDS = 10.0  # for one prompt: the slowest real templates take milliseconds
MAX_TEMPLATE_CHARACTERS = 200_000  # of one prompt, plus ten times its contents


def render_chat(
    tokenizer: Any, turns: Sequence[dict[str, str]], *, continue_last: bool = False
) -> str:
    """Render a conversation by the tokenizer's template, the same on every day.

    `continue_last` leaves the last turn open to be continued. A template that asks for the date
    gets `TEMPLATE_DATE`: with the real one, prompts, digests and caches would change every day.
    """
    template_options: dict[str, str] = {}
    if tokenizer.chat_template:  # mistral-common's tokenizers have none and write no date
        template_options = {
            "chat_template": _date_macro() + tokenizer.get_chat_template(),
            "date_string": TEMPLATE_DATE.strftime("%d %b %Y"),
        }
    try:
        with time_limit(MAX_TEMPLATE_SECONDS):
            text: str = tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=not continue_last,
                continue_final_message=continue_last,
                **template_options,
            )
    except TimeLimitExceeded:
        raise CellFailed(
            f"the chat template takes more than {MAX_TEMPLATE_SECONDS:g} s for one prompt; type "
            "--chat-template off"
        ) from None
    # Jinja's sandbox limits the length of ranges, Python the depth of calls.
    except (MemoryError, RecursionError, OverflowError) as problem:
        raise CellFailed(
            f"the chat template cannot be used ({in_one_line(problem)}); type --chat-template off"
        ) from problem
    content_length = sum(len(str(turn.get("content", ""))) for turn in turns)
    if len(text) > MAX_TEMPLATE_CHARACTERS + 10 * content_length:
        raise CellFailed(
            f"the chat template writes {len(text):,} characters around {content_length:,}; type "
            "--chat-template off"
        )
    return text


def _date_macro() -> str:
    """Return a Jinja macro that replaces the template's `strftime_now`.

    A macro, because transformers passes texts to a template and no functions.
    """
    codes = "".join(
        f".replace('%{code}', '{TEMPLATE_DATE.strftime(f'%{code}')}')" for code in _DATE_CODES
    )
    return (
        "{% macro strftime_now(format) %}{{ format.replace('%-', '%')"
        + codes
        + " }}{% endmacro %}\n"
    )


def open_model(
    checkpoint: Checkpoint, *, device: str = "cpu", dtype: str = "float32"
) -> LanguageModel:
    """Open a checkpoint with plain transformers, in eval mode.

    A model that states a cache format attends to keys and values as that cache stores them.
    """
    import torch

    import harness.models.packed  # noqa: F401  the formats of our own students

    require_format(checkpoint.model_folder, checkpoint.name, device=device)
    with one_line_open_errors(checkpoint.name):
        model = open_weights(
            checkpoint.path,
            base=checkpoint.base,
            dtype=getattr(torch, dtype),
            **placement(device),
        )
        tokenizer = tokenizer_of(checkpoint.model_folder)
    model.to(device).eval()
    attend_to_stored(model)
    refuse_non_finite(model, checkpoint.name)
    return LanguageModel(model, tokenizer, device, checkpoint)


def placement(device: str) -> dict[str, dict[str, str]]:
    """Return what `from_pretrained` needs to read weights onto a GPU, tensor by tensor.

    Without it a model is opened in the machine's memory first, and copied as a whole.
    """
    return {"device_map": {"": device}} if device.startswith("cuda") else {}


@contextmanager
def one_line_open_errors(name: str) -> Iterator[None]:
    """Turn what a library raises over a model's files into one line with the model's name.

    Errors about memory and kernels pass unchanged.
    """
    try:
        yield
    except (HarnessError, CellFailed, MemoryError, RuntimeError):
        raise
    except Exception as problem:
        raise HarnessError(
            f"{name} cannot be opened ({in_one_line(problem)}); download or save the model again"
        ) from problem


def refuse_non_finite(model: Any, name: str) -> None:
    """Refuse a model with a NaN or an infinity: its scores would look like results."""
    # a buffer that is never saved may hold a mask of infinities
    saved_names = model.state_dict(keep_vars=True).keys()
    buffers = ((key, buffer) for key, buffer in model.named_buffers() if key in saved_names)
    place = first_non_finite((*model.named_parameters(), *buffers))
    if place:
        raise CellFailed(
            f"{name} holds numbers that are not finite: {place}; train, save or download it again"
        )


def student_tokenizer(checkpoint: Checkpoint) -> Any:
    """Open a checkpoint's tokenizer alone."""
    with one_line_open_errors(checkpoint.name):
        return tokenizer_of(checkpoint.model_folder)


def tokenizer_of(folder: Path, **options: Any) -> Any:
    """Open the tokenizer of a folder, as transformers does.

    transformers notes in it how it was opened (from a folder, with the Hub switched off) and writes
    that into every tokenizer that is saved. Students of one training would have other bytes, and
    another digest, where HF_HUB_OFFLINE is set; so the notes are removed.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    for name in _HOW_IT_WAS_OPENED:
        getattr(tokenizer, "init_kwargs", {}).pop(name, None)
    return tokenizer


def stored_dtype(checkpoint: Checkpoint) -> "torch.dtype":
    """Return the dtype of a checkpoint's largest float matrix on disk; students are saved in it."""
    import torch

    dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
    floats = [tensor for tensor in stored_tensors(checkpoint.path) if tensor.dtype in dtypes]
    largest = max(floats, key=lambda tensor: (tensor.numel, tensor.dtype))
    return dtypes[largest.dtype]
