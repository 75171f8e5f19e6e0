"""The plain path: a model run as transformers runs it, in padded batches where a probe shows that
padding changes nothing.

Recurrent and hybrid models differ in all that attention has taught us to take for granted: their
caches have other names, some carry the padding along in their state, some cannot let a row leave.
So every model is asked once, on random tokens, how it may be run: several rows at once or one, with
its cache or without. One row without a cache is always right, and what all others are compared
with.

Shapes: B rows, T tokens, V vocabulary.
"""

import inspect
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from harness.models.language_model import LanguageModel
from harness.models.states import CACHE_NAMES, cache_arguments

if TYPE_CHECKING:
    import torch

_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5, "float16": 0.1}  # of a log-probability
_LIKELY = -12.0  # log-probability; all but float32 is judged by likelier tokens
# of the probe's rows: beyond the windows of small models, and one of a few tokens
_LENGTHS = (29, 18, 5)
_STEPS = 3


@dataclass(frozen=True)
class Writing:
    """How a model writes answers: rows together or alone, with which mask at each step, from its
    cache or reading anew.
    """

    together: bool = False
    # steps are shown the mask of all tokens before them; Mamba would take it for theirs
    masked: bool = False
    cached: bool = False
    why: str = ""  # why not all rows together


_READING: "WeakKeyDictionary[Any, str]" = WeakKeyDictionary()
_WRITING: "WeakKeyDictionary[Any, Writing]" = WeakKeyDictionary()


def one_row(opened: LanguageModel) -> str:
    """Return why rows are read one at a time, "" where a padded batch gives what each row gives
    alone; asked once a model.
    """
    if opened.model not in _READING:
        _READING[opened.model] = _gap(opened, lambda: _padded_gaps(opened), "padding")
    return _READING[opened.model]


def writing_of(opened: LanguageModel) -> Writing:
    """Return how answers are written: the first way whose steps give what the whole text read anew
    gives; asked once a model.
    """
    if opened.model not in _WRITING:
        _WRITING[opened.model] = _writing(opened)
    return _WRITING[opened.model]


def _writing(opened: LanguageModel) -> Writing:
    why = one_row(opened)
    for together in (True, False) if not why else (False,):
        for masked in (True, False):
            way = Writing(
                together=together, masked=masked, cached=True, why="" if together else why
            )
            problem = _gap(
                opened,
                partial(_decoded_gaps, opened, way),
                "decoding" if together else "decoding from its cache",
            )
            if not problem:
                return way
            why = why or problem
    return Writing(why=f"{why}; and each step reads the whole text: {problem}")


def note_of(opened: LanguageModel, *, writes: bool) -> str:
    """Say how a model is run where the batch size is not what decides, "" where it is."""
    why = writing_of(opened).why if writes else one_row(opened)
    return (
        why
        and f"{opened.checkpoint.name} {'writes' if writes else 'is read'} one row at a time, "
        f"whatever the batch size: {why}"
    )


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, device: str
) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
    """Return ids, attention mask and positions (B, T) with the padding on the left."""
    import torch

    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


def last_logits(opened: LanguageModel, rows: Sequence[Sequence[int]], count: int) -> "torch.Tensor":
    """Run rows; return the logits of their last `count` positions, (B, count, V). One row is run
    bare, several are padded on the left.
    """
    import torch

    if len(rows) == 1:
        return own_forward(
            opened, {"input_ids": torch.tensor([list(rows[0])], device=opened.device)}, count
        ).logits
    ids, mask, positions = left_padded(rows, opened.pad_id, opened.device)
    return own_forward(
        opened, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, count
    ).logits


@dataclass
class _Output:
    logits: "torch.Tensor"
    # by the name under which the next step hands it back
    cache: dict[str, Any] = field(default_factory=dict)


def own_forward(
    opened: LanguageModel, given: Mapping[str, Any], count: int, *, use_cache: bool = False
) -> _Output:
    """Call the model with those of the arguments that it names; keep the last `count` positions of
    its logits, and its cache.
    """
    import torch

    named = inspect.signature(opened.model.forward).parameters
    arguments = {
        name: value for name, value in given.items() if name in named or name == "input_ids"
    }
    if "use_cache" in named:
        arguments["use_cache"] = use_cache
    if "logits_to_keep" in named:
        arguments["logits_to_keep"] = count
    with torch.inference_mode():
        out = opened.model(**arguments)
    return _Output(out.logits[:, -count:], cache_arguments(out, named))


class Continuing:
    """Rows that are being continued by the model's own attention and cache: left-padded, and any of
    them may leave.
    """

    def __init__(self, opened: LanguageModel, rows: Sequence[Sequence[int]], way: Writing) -> None:
        self.opened, self.way = opened, way
        self.rows = [list(row) for row in rows]
        self._given: dict[str, Any] = {}

    def begin(self) -> "torch.Tensor":
        """Read the prompts; return the logits behind them (B, V)."""
        if not self.way.cached:
            return self._again()
        ids, mask, positions = left_padded(self.rows, self.opened.pad_id, self.opened.device)
        self._given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return self._run()

    def go_on(self, kept: Sequence[int], tokens: Sequence[int]) -> "torch.Tensor":
        """Let all rows but `kept` leave, give each of those its next token, and return the logits
        behind it (B, V).
        """
        import torch

        leave = len(kept) < len(self.rows)
        self.rows = [[*self.rows[index], token] for index, token in zip(kept, tokens, strict=True)]
        if not self.way.cached:
            return self._again()
        device = self.opened.device
        if leave:
            self._select(torch.tensor(list(kept), device=device))
        self._given["input_ids"] = torch.tensor(list(tokens), device=device)[:, None]
        mask = self._given["attention_mask"]
        self._given["attention_mask"] = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
        self._given["position_ids"] = self._given["position_ids"][:, -1:] + 1
        return self._run()

    def _select(self, kept: "torch.Tensor") -> None:
        for name in ("attention_mask", "position_ids"):
            self._given[name] = self._given[name][kept]
        for name in CACHE_NAMES:
            # batch_select_indices leaves the states of recurrent layers as they are, or lacks them
            if name in self._given:
                self._given[name].reorder_cache(kept)

    def _run(self) -> "torch.Tensor":
        given = dict(self._given)
        if not self.way.masked and any(name in given for name in CACHE_NAMES):
            del given["attention_mask"]
        out = own_forward(self.opened, given, 1, use_cache=True)
        if not out.cache:
            raise NotImplementedError("its forward returns no cache that it would take back")
        self._given |= out.cache
        return out.logits[:, -1]

    def _again(self) -> "torch.Tensor":
        import torch

        return torch.cat([last_logits(self.opened, [row], 1)[:, -1] for row in self.rows])


def _rows(opened: LanguageModel) -> list[list[int]]:
    """Return the probe's rows: made-up tokens, of several lengths."""
    longest = max(2, opened.context - _STEPS - 1)
    return [_made_up(opened, min(length, longest), seed=length) for length in _LENGTHS]


def _made_up(opened: LanguageModel, count: int, *, seed: int) -> list[int]:
    """Return random tokens, none that stands for an image."""
    draw, without = random.Random(f"probe/{seed}"), opened.placeholders
    ids = (draw.randrange(opened.vocabulary) for _ in range(100 * count + 1_000))
    return list(islice((token for token in ids if token not in without), count))


def _gap(opened: LanguageModel, gaps: "Callable[[], list[torch.Tensor]]", what: str) -> str:
    """Return why a way of running a model is not its own, "" where the log-probabilities are the
    same.
    """
    import torch

    from harness.machine.memory import is_out_of_memory

    try:
        widest = float(torch.stack(gaps()).max())
    # Models of any origin come by here: whatever one of them raises means that it is not run this
    # way, for this reason.
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        lines = str(problem).splitlines() or ["no message"]
        return f"{what} fails with {type(problem).__name__}: {lines[0][:100]}"
    tolerance = (
        1.0 if getattr(opened.model, "is_quantized", False) else _TOLERANCE.get(opened.dtype, 0.5)
    )
    return "" if widest <= tolerance else f"{what} moves its log-probabilities by {widest:.2g}"


def _alone(opened: LanguageModel, row: Sequence[int], count: int) -> "torch.Tensor":
    import torch

    return torch.log_softmax(last_logits(opened, [row], count)[0].float(), -1)


def _apart(opened: LanguageModel, told: "torch.Tensor", own: "torch.Tensor") -> "torch.Tensor":
    """Return the widest gap between logits and log-probabilities, of likely tokens alone where
    floats are short.
    """
    import torch

    whole = opened.dtype == "float32" and not getattr(opened.model, "is_quantized", False)
    gap = torch.log_softmax(told.float(), -1) - own
    return gap.masked_fill(own < (-torch.inf if whole else _LIKELY), 0.0).abs().max()


def _padded_gaps(opened: LanguageModel) -> "list[torch.Tensor]":
    rows = _rows(opened)
    own = [_alone(opened, row, min(len(row), 4)) for row in rows]
    logits = last_logits(opened, rows, 4)
    return [
        _apart(opened, told[len(told) - len(alone) :], alone)
        for told, alone in zip(logits, own, strict=True)
    ]


def _decoded_gaps(opened: LanguageModel, way: Writing) -> "list[torch.Tensor]":
    """Read rows, go on with made-up tokens, let the middle one leave; compare each step with the
    whole text read anew.
    """
    going = Continuing(opened, _rows(opened)[: None if way.together else 1], way)
    logits, gaps = going.begin(), []
    for step in range(_STEPS + 1):
        gaps += [
            _apart(opened, told[None], _alone(opened, row, 1))
            for told, row in zip(logits, going.rows, strict=True)
        ]
        if step < _STEPS:
            kept = [index for index in range(len(going.rows)) if not (step == 1 and index == 1)]
            logits = going.go_on(kept, _made_up(opened, len(kept), seed=-step))
    return gaps
