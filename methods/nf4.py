"""Formats of bitsandbytes through transformers: NF4 and int8; they need the `quant` extra.

NF4: Dettmers et al., 2023, QLoRA. Int8: Dettmers et al., 2022, LLM.int8(). Table and head stay
floats, as bitsandbytes leaves them. Cost: seconds, no data. The 4-bit kernels are slow: they unpack
before they multiply.
"""

from typing import ClassVar, Literal

from harness.contract import Checkpoint, Family, Job
from methods.base import settings
from methods.compression.base import Compressed


@settings
class _BitsAndBytes(Compressed):
    """A format that bitsandbytes packs while transformers opens the model."""

    needs_plain: ClassVar[bool] = True
    family: ClassVar[Family] = "quantization"
    _name: ClassVar[str] = ""

    def library_settings(self) -> dict[str, object]:
        """Return the arguments of `BitsAndBytesConfig`."""
        raise NotImplementedError

    def compress(self, job: Job) -> Checkpoint:
        """Let transformers quantise the model while it opens it."""
        from methods.compression.external import (
            count_matrices,
            explaining_library_errors,
            require_package,
            save_library_student,
        )

        require_package("bitsandbytes", "quant")
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        from harness.errors import CellFailed
        from harness.models.language_model import stored_dtype
        from methods.compression.base import StudentBuilder

        builder = StudentBuilder(job, self._name, plain=True)
        expected = count_matrices(builder.model, self._name)
        with explaining_library_errors(self._name, "bitsandbytes", builder.base):
            packed = AutoModelForCausalLM.from_pretrained(
                builder.base.path,
                quantization_config=BitsAndBytesConfig(**self.library_settings()),
                # what is not packed is saved in the base's own type
                dtype=stored_dtype(builder.base),
                device_map=job.device,
            )
            count = sum(
                type(module).__module__.startswith("bitsandbytes.") for module in packed.modules()
            )
        if count != expected:
            raise CellFailed(
                f"{self._name}: {count} of {expected} matrices were packed; use int8 or int4"
            )
        notes = {
            "library": "bitsandbytes",
            "packed_layers": count,
            "table_and_head": "skip",
            **self.library_settings(),
        }
        return save_library_student(builder, packed.eval(), notes)


@settings
class Nf4(_BitsAndBytes):
    """Weights in bitsandbytes' 4-bit NormalFloat."""

    _name: ClassVar[str] = "nf4"

    compute: Literal["float32", "bfloat16"] = "bfloat16"  # what the matrix products run in
    double: bool = False  # quantise the scales too

    @property
    def bits_per_weight(self) -> float:
        """Return 4 bits, and a 32-bit scale for 64 weights (8 bits with `double`)."""
        return 4 + (8 if self.double else 32) / 64

    def library_settings(self) -> dict[str, object]:
        """Return the arguments of `BitsAndBytesConfig`."""
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": self.compute,
            "bnb_4bit_use_double_quant": self.double,
        }


@settings
class BitsAndBytesInt8(_BitsAndBytes):
    """Weights in bitsandbytes' int8; activation outliers are multiplied in floats."""

    _name: ClassVar[str] = "bnb-int8"

    threshold: float = 6.0  # activations above it are multiplied in floats

    @property
    def bits_per_weight(self) -> float:
        """Return 8 bits, and those of a 32-bit scale for a row of 320 inputs or more."""
        return 8.1

    def library_settings(self) -> dict[str, object]:
        """Return the arguments of `BitsAndBytesConfig`."""
        return {"load_in_8bit": True, "llm_int8_threshold": self.threshold}
