"""Recipes: in what form a student's weights are opened, trained and saved.

full: opened in float32, every weight trained, saved in the type of the base's file. bf16: opened,
trained and saved in bf16. lora: opened in float32, adapters trained beside frozen weights, merged
and saved in the type of the base's file; packed weights are opened and saved as they are, with the
adapters beside them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.contract import Checkpoint, Job
from harness.errors import CellFailed
from harness.models.language_model import LanguageModel, stored_dtype
from harness.models.packed import FORMAT, is_plain
from harness.models.packed_training import Adapter, save_with_adapters
from harness.models.resolve import packing_library, quantized_by
from harness.models.shaping import parse_student_cut, save_student
from methods.training.bf16 import optimizer_notes, refuse_bf16_training
from methods.training.lora import add_adapters, merge_adapters, require_peft, take_adapters

if TYPE_CHECKING:
    from methods.training.base import Trained


class Recipe:
    """Trains every weight in float32 (`recipe=full`); the other recipes differ in parts."""

    opened_as = "float32"
    mixes_precision = True  # autocast where the job's type is bf16

    def __init__(self, method: "Trained", job: Job) -> None:
        self.method, self.job = method, job

    @property
    def label(self) -> str:
        """The method with its recipe, as a refusal names it."""
        return f"{type(self.method).__name__}[recipe={self.method.recipe}]"

    def refuse(self) -> None:
        """Raise `CellFailed` or `Skipped` where this machine or this student cannot be trained so.

        It is asked before a teacher writes or reads anything.
        """
        base = self.job.student_base
        if (packing := quantized_by(base.path)) not in ("", "float"):
            raise CellFailed(
                f"{self.label}: {base.name} is packed ({packing}), and packed weights take no "
                "gradient; use recipe=lora"
            )

    def prepare(self, student: LanguageModel, seed: int) -> None:
        """Make an opened student ready to be trained."""

    def finish(self, student: LanguageModel) -> None:
        """Give a trained student the form that is saved."""

    def notes(self) -> dict[str, Any]:
        """Return what the record says of the recipe; nothing for every weight in float32."""
        return {}

    @property
    def saved_dtype(self) -> torch.dtype:
        """The type of the floats that are saved."""
        return stored_dtype(self.job.student_base)

    def save(self, student: LanguageModel, folder: Path, *, parents: tuple[str, ...]) -> Checkpoint:
        """Save the trained student."""
        name = type(self.method).__name__
        return save_student(student, folder, name=name, dtype=self.saved_dtype, parents=parents)


class Bf16Recipe(Recipe):
    """Trains every weight in bf16, with 8-bit moments and stochastic rounding."""

    opened_as = "bfloat16"
    mixes_precision = False  # weights that are bf16 themselves need no copies in it
    saved_dtype = torch.bfloat16  # whatever its base is stored in

    def refuse(self) -> None:
        """Refuse packed students, a missing torchao and a card without bf16."""
        super().refuse()
        refuse_bf16_training(self.job.device, self.label)

    def notes(self) -> dict[str, Any]:
        """Return the optimizer with its library and version."""
        return {"recipe": "bf16", **optimizer_notes(self.job.device)}


class LoraRecipe(Recipe):
    """Trains adapters beside frozen weights, float or packed."""

    def __init__(self, method: "Trained", job: Job) -> None:
        super().__init__(method, job)
        self.adapter_weights = 0
        self.adapters: dict[str, Adapter] = {}  # beside packed weights, once training is over

    def refuse(self) -> None:
        """Refuse what has no weights worth freezing, other libraries' packing, a missing peft."""
        cut = parse_student_cut(self.job.student)
        if cut is not None and cut.draws_weights:
            raise CellFailed(
                f"recipe=lora freezes the weights that --student {self.job.student} draws; use "
                "recipe=full"
            )
        base = self.job.student_base
        if packing_library(base.path) not in ("", FORMAT):
            raise CellFailed(
                f"{self.label}: {base.name} is packed ({quantized_by(base.path)}), and adapters "
                "are trained beside packed weights of int8 and int4 alone"
            )
        require_peft()

    def prepare(self, student: LanguageModel, seed: int) -> None:
        """Freeze the weights and put adapters beside them."""
        self.adapter_weights = add_adapters(
            student.model,
            rank=self.method.lora_rank,
            alpha=self.method.lora_alpha,
            seed=seed,
            label=self.label,
        )

    def finish(self, student: LanguageModel) -> None:
        """Merge the adapters; take them out where the weights are packed."""
        if is_plain(student.model):
            merge_adapters(student.model)
        else:
            self.adapters = take_adapters(student.model)

    def notes(self) -> dict[str, Any]:
        """Return how many weights the adapters have."""
        return {"recipe": "lora", "adapter_weights": self.adapter_weights}

    def save(self, student: LanguageModel, folder: Path, *, parents: tuple[str, ...]) -> Checkpoint:
        """Save the merged student, or the packed one with its adapters beside it."""
        if not self.adapters:
            return super().save(student, folder, parents=parents)
        return save_with_adapters(
            student,
            folder,
            self.adapters,
            name=type(self.method).__name__,
            dtype=self.saved_dtype,
            parents=parents,
        )


_OTHER_RECIPES = {"bf16": Bf16Recipe, "lora": LoraRecipe}


def recipe_of(method: "Trained", job: Job) -> Recipe:
    """Return the recipe that a method's settings name."""
    return _OTHER_RECIPES.get(method.recipe, Recipe)(method, job)
