"""Students cut from a base model, and how they are saved."""

from pathlib import Path
from typing import TYPE_CHECKING

from harness.contract import Checkpoint
from harness.errors import CellFailed, HarnessError, unknown
from harness.files.writing import save_atomically
from harness.models.checkpoint import describe, weight_files
from harness.models.language_model import LanguageModel, open_model, refuse_non_finite
from harness.models.resolve import quantized_by

if TYPE_CHECKING:
    import torch


RECIPES = ("depth", "width", "scratch")


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
