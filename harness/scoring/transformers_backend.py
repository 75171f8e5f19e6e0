"""The default backend: the opened model itself, on the shared path or on the plain one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from harness.models.language_model import LanguageModel
from harness.models.unpacked import unpacked_once
from harness.scoring.backend import Likelihood, LikelihoodRequest, ignore_report
from harness.scoring.generation import Writer, reason_for_plain_path
from harness.scoring.likelihood import log_likelihoods
from harness.scoring.plain_reading import LeftPaddedReader


@dataclass(frozen=True, eq=False)
class TransformersBackend(Writer, LeftPaddedReader):
    """Computes with transformers in this process: writes, reads and scores.

    `batch_size` is the number of rows at once, by memory unless given. On the shared path a forward
    that scores takes `pack` tokens, by the device unless given.
    """

    pack: int | None = field(default=None, kw_only=True)

    @property
    def path(self) -> str:
        """The path that this model takes; the first use probes the model."""
        return path_label(self.opened)

    def score(
        self,
        requests: Sequence[LikelihoodRequest],
        *,
        known: Mapping[int, Likelihood],
        finished: Callable[[int, Likelihood], None] = ignore_report,
        say: Callable[[str], None] = ignore_report,
    ) -> list[Likelihood]:
        """Score every request that is not `known`."""
        with unpacked_once(self.opened):
            return log_likelihoods(
                self.opened,
                requests,
                batch_size=self.batch_size,
                pack=self.pack,
                known=known,
                finished=finished,
                say=say,
            )


def path_label(opened: LanguageModel) -> str:
    """Return the path that a transformers model takes, as records print it."""
    return "transformers/plain/2" if reason_for_plain_path(opened) else "transformers/shared/1"
