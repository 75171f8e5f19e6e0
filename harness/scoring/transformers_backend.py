"""The default backend: the opened model itself, on the shared path where a probe lets it, else on
its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from harness.models.language_model import LanguageModel
from harness.scoring.backend import Answer, Scored, unheard
from harness.scoring.generation import Writer, why_plain
from harness.scoring.likelihood import log_likelihoods
from harness.scoring.plain_reading import PlainReader


@dataclass(frozen=True, eq=False)
class Transformers(Writer, PlainReader):
    """Computes with transformers in this process: writes, reads and scores.

    `batch_size` counts the rows at once, by memory unless given; on the shared path a forward that
    scores takes `pack` tokens, by the device unless given.
    """

    pack: int | None = field(default=None, kw_only=True)

    @property
    def path(self) -> str:
        """The path that this model takes; asked of it once, when it is first wanted."""
        return path_of(self.opened)

    def score(
        self,
        rows: Sequence[Scored],
        *,
        known: Mapping[int, Answer],
        finished: Callable[[int, Answer], None] = unheard,
        say: Callable[[str], None] = unheard,
    ) -> list[Answer]:
        """Score every row that is not `known`."""
        return log_likelihoods(
            self.opened,
            rows,
            batch_size=self.batch_size,
            pack=self.pack,
            known=known,
            finished=finished,
            say=say,
        )


def path_of(opened: LanguageModel) -> str:
    """Return the path that a transformers model takes."""
    return "transformers/plain/2" if why_plain(opened) else "transformers/shared/1"
