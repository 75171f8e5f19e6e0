"""Settings of methods that read training text before they change a weight, and what reading it
takes. No torch at import.
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
    """A method that reads training text first."""

    # auto: the tasks' train split, C4 of the data folder where there is none
    calibration: Literal["auto", "train", "c4"] = "auto"
    num_calibration_samples: Annotated[int, Field(ge=1, le=4096)] = 128
    max_seq_length: Annotated[int, Field(ge=8, le=8192)] = 256  # of each

    @property
    def calibrates(self) -> bool:
        """Tell that text is read."""
        return True

    def calibration_tokens(self) -> tuple[int, int]:
        """Return how many sequences are read, and the tokens of each."""
        return self.num_calibration_samples, self.max_seq_length

    def calibrate(self, job: Job, opened: "LanguageModel") -> "CalibrationData":
        """Return the text, in tokens."""
        from methods.compression.calibration import calibration_data

        return calibration_data(
            job,
            opened,
            source=self.calibration,
            sequences=self.num_calibration_samples,
            tokens=self.max_seq_length,
        )


def calibration_flops(making: StudentBuilder, data: "CalibrationData", passes: int) -> float:
    """Return the FLOPs of reading the calibration text so many times."""
    from harness.models.shape import forward_flops_per_token

    count, length = data.ids.shape
    return float(passes * count * length * forward_flops_per_token(making.model, length))
