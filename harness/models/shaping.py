"""Students cut from a base model, and how they are saved."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.contract import Checkpoint
from harness.errors import CellFailed, HarnessError, unknown
from harness.files.writing import save_atomically
from harness.models.cache_format import CacheFormat, with_cache_format
from harness.models.checkpoint import describe, read_model_json, weight_files
from harness.models.language_model import LanguageModel, open_model, refuse_non_finite
from harness.models.resolve import quantized_by
from harness.models.shape import Shape
from harness.models.stored_attention import attend_to_stored

if TYPE_CHECKING:
    import torch


# (model, share kept, what the user typed) -> the smaller model
CutFunction = Callable[[Any, float, str], Any]


class StudentCut(NamedTuple):
    """A student's starting point as it is typed: `depth:0.5`."""

    kind: str  # of CUT_KINDS
    share: float  # of the blocks or channels that are kept, above 0 and at most 1

    @property
    def draws_weights(self) -> bool:
        """Tell whether weights are drawn from a seed, so that each seed starts from others."""
        return CUT_KINDS[self.kind].draws_weights

    def shape_of(self, base: Shape) -> Shape:
        """Return the shape of the student that is cut from a base of this shape."""
        return CUT_KINDS[self.kind].shape(base, self.share)


@dataclass(frozen=True)
class CutKind:
    """One way to make a smaller model of a base model: all that the harness needs to know of it."""

    cut: CutFunction
    shape: Callable[[Shape, float], Shape]
    draws_weights: bool = False


def _cut_depth(model: Any, share: float, label: str, *, copy: bool) -> Any:
    from harness.models.blocks import named_blocks
    from harness.models.depth import with_blocks

    _, blocks = named_blocks(model)
    return with_blocks(model, kept_blocks(len(blocks), share), copy=copy, label=label)


def _cut_width(model: Any, share: float, label: str) -> Any:
    from harness.models.width import narrow_model

    return narrow_model(model, share, label=label)


CUT_KINDS: dict[str, CutKind] = {
    "depth": CutKind(partial(_cut_depth, copy=True), Shape.shallower),
    "width": CutKind(_cut_width, Shape.narrower),
    "scratch": CutKind(partial(_cut_depth, copy=False), Shape.shallower, draws_weights=True),
}


def parse_student_cut(text: str) -> StudentCut | None:
    """Parse `depth:0.5`; None where the text names a model instead."""
    kind, colon, share = text.partition(":")
    if not colon or "/" in text or "\\" in text:
        return None
    if kind not in CUT_KINDS:
        examples = ", ".join(f"{name}:0.5" for name in CUT_KINDS)
        raise unknown(
            "student recipe",
            kind,
            tuple(CUT_KINDS),
            hint=f"(write {examples}, a folder or a Hub id)",
        )
    try:
        kept_share = float(share)
    except ValueError:
        kept_share = -1.0
    if not 0 < kept_share <= 1:
        raise HarnessError(
            f"student {text!r}: the share kept must be above 0 and at most 1; write for example "
            f"{kind}:0.5"
        )
    return StudentCut(kind, kept_share)


def student_of(
    recipe: str, base: Checkpoint, *, seed: int, device: str, dtype: str
) -> LanguageModel:
    """Open the student's starting point: a cut of `base`, or `base` itself.

    depth:s keeps a share s of the blocks, evenly spaced, first and last among them. width:s keeps
    the share s of each feed-forward's channels with the largest weight norms. scratch:s has the
    shape of depth:s and random weights drawn from `seed`. Raises `CellFailed` where the cut does
    not compute what its base does without the dropped parts.
    """
    import torch

    opened = open_model(base, device=device, dtype=dtype)
    cut = parse_student_cut(recipe)
    if cut is None:
        return opened
    packing = quantized_by(base.path)
    if packing:
        raise CellFailed(
            f"student {recipe}: {base.name} is packed ({packing}) and cannot be cut; start from "
            "the floats that it was made of"
        )
    torch.manual_seed(seed)
    model = CUT_KINDS[cut.kind].cut(opened.model, cut.share, recipe)
    model.generation_config = opened.model.generation_config
    attend_to_stored(model)
    return LanguageModel(model.to(device).eval(), opened.tokenizer, device, base)


def random_weights(student: LanguageModel, *, seed: int) -> LanguageModel:
    """Return a model of the same shape with random weights, drawn from `seed` as its class does."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        student.model.config, dtype=next(student.model.parameters()).dtype
    )
    model.generation_config = student.model.generation_config
    attend_to_stored(model)
    return LanguageModel(
        model.to(student.device).eval(), student.tokenizer, student.device, student.checkpoint
    )


def kept_blocks(count: int, share: float) -> list[int]:
    """Return the numbers of the evenly spaced blocks that a share keeps.

    Their count is rounded half up, and at least one.
    """
    kept = max(1, int(count * share + 0.5))
    if kept == 1:
        return [0]
    return [int(index * (count - 1) / (kept - 1) + 0.5) for index in range(kept)]


def save_student(
    student: LanguageModel,
    folder: Path,
    *,
    name: str,
    dtype: "torch.dtype",
    parents: tuple[str, ...],
) -> Checkpoint:
    """Save a student with its tokenizer, completely or not at all; return its checkpoint.

    The saved model is opened again and compared. The digest is that of the bytes written: the same
    seed on the same machine gives the same digest.
    """
    from harness.models.blocks import is_tied
    from harness.models.packed import is_plain, refuse_changed_by_saving

    model = student.model.to(dtype)
    model.config.dtype = dtype
    if not is_plain(model):
        raise CellFailed(
            f"{name}: {student.checkpoint.name} is quantized, and packed weights are not written "
            "again; copy its folder"
        )
    refuse_non_finite(model, name)
    agree_on_tie(model)

    def write(part: Path) -> None:
        model.save_pretrained(part)
        student.tokenizer.save_pretrained(part)
        for path in weight_files(part):
            path.chmod(0o644)  # safetensors lets only the owner read
        refuse_changed_by_saving(
            part, model.state_dict(), name=name, dtype=dtype, tied=is_tied(model)
        )

    save_atomically(folder, write)
    return describe(folder, name=name, parents=parents)


def agree_on_tie(model: Any) -> None:
    """Let the configuration say that head and table are two matrices, where the file holds two."""
    from harness.models.blocks import is_tied

    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", None) and not is_tied(model):
            config.tie_word_embeddings = False


def copy_student(
    base: Checkpoint, folder: Path, *, name: str, cache_format: CacheFormat | None = None
) -> Checkpoint:
    """Copy a checkpoint's files; with a cache format, its configuration states that too.

    Packed weights cannot be saved again, since kernels lay them out anew in memory.
    """
    import shutil

    def write(part: Path) -> None:
        for path in base.path.iterdir():
            if path.is_file():
                shutil.copyfile(path, part / path.name)

        if cache_format is not None:
            config_path = part / "config.json"
            config = with_cache_format(read_model_json(config_path), cache_format)
            config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    save_atomically(folder, write)
    return describe(folder, name=name, parents=(base.digest,))
