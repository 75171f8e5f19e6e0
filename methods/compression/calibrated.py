"""Settings of methods that read calibration text before they change a weight, and its cost.

Importing this module imports no torch.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from harness.contract import Job
from methods.base import settings
from methods.compression.base import Compressed, StudentBuilder

if TYPE_CHECKING:
    from harness.models.language_model import LanguageModel
    from methods.compression.calibration import CalibrationData


@settings
class Calibrated(Compressed):
    """Settings of a method that reads calibration text first."""

    # auto: the train split of the tasks, or C4 from the data folder where they have none
    calibration: Literal["auto", "train", "c4"] = "auto"
    num_calibration_samples: Annotated[int, Field(ge=1, le=4096)] = 128
    max_seq_length: Annotated[int, Field(ge=8, le=8192)] = 256  # tokens of each sample

    @property
    def calibrates(self) -> bool:
        """Return True: the method reads calibration text."""
        return True

    def calibration_tokens(self) -> tuple[int, int]:
        """Return the number of calibration sequences and the tokens of each."""
        return self.num_calibration_samples, self.max_seq_length

    def calibrate(self, job: Job, opened: "LanguageModel") -> "CalibrationData":
        """Return the calibration text as token sequences."""
        from methods.compression.calibration import calibration_data

        return calibration_data(
            job,
            opened,
            source=self.calibration,
            num_sequences=self.num_calibration_samples,
            max_length=self.max_seq_length,
        )


def calibration_flops(builder: StudentBuilder, data: "CalibrationData", passes: int) -> float:
    """Return the FLOPs of `passes` forward passes over the calibration text."""
    from harness.models.shape import forward_flops_per_token

    count, length = data.ids.shape
    return float(passes * count * length * forward_flops_per_token(builder.model, length))
