"""Calibration: text of the training side, cut into sequences of equal length, and sums over it of
what flows into each layer.

The text is the tasks' own train split, each item once, or C4 from the data folder where a task has
none; never an evaluation item: found by exact question everywhere, by a run of 13 words in text
from outside (n-grams mean nothing in the generated tasks, which share templates and facts by
design). Name, digest, size and what was dropped stand in the record.

A sweep goes block by block: what a block sees has passed through the blocks before it as they are
by then, cut and packed. Legend: B sequences at once, T tokens of a sequence, H width, I inputs of a
layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.contract import Job, OwnData, Progress, Split
from harness.data.contamination import contaminated_texts, overlapping_prompts
from harness.data.examples import training_examples
from harness.data.source import C4, NoSplit
from harness.errors import CellFailed, HarnessError
from harness.files.digests import digest_of
from harness.models.blocks import named_blocks
from harness.models.language_model import LanguageModel
from methods.compression.layers import ignore_setting

TOKENS_PER_BATCH = 2_048  # tokens of one forward pass


@dataclass(frozen=True)
class CalibrationData:
    """Token sequences of one length, and what they are: the record keeps it."""

    ids: Tensor  # (n, T)
    told: Mapping[str, Any]

    def batches(self) -> Iterator[Tensor]:
        """Yield (B, T) parts."""
        yield from self.ids.split(max(1, TOKENS_PER_BATCH // self.ids.shape[1]))


def calibration_data(
    job: Job, opened: LanguageModel, *, source: str, sequences: int, tokens: int
) -> CalibrationData:
    """Return up to `sequences` sequences of `tokens` tokens (the model's context, where that is
    shorter).
    """
    name, texts, told = _calibration_texts(job, source)
    length = min(tokens, opened.context)
    eos = opened.tokenizer.eos_token_id
    stream: list[int] = []
    used = 0
    for text in texts:
        ids = opened.encode(text)
        stream += ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        used += 1
        if len(stream) >= sequences * length:
            break
    count = min(sequences, len(stream) // length)
    if count == 0:
        raise CellFailed(
            f"calibration: {len(stream)} tokens of {name} fill no sequence of {length}; give more "
            "--rows, or fewer tokens"
        )
    ids = torch.tensor(stream[: count * length], device=opened.device).view(count, length)
    digest = digest_of(name, texts[:used])
    return CalibrationData(
        ids,
        {
            "name": name,
            "digest": digest,
            "sequences": count,
            "tokens_each": length,
            "texts": used,
            **told,
        },
    )


def _own_calibration_texts(data: OwnData, job: Job) -> tuple[str, list[str], dict[str, Any]]:
    """Return the same of a file of the user's own: all of its examples, as the student is shown
    them.
    """
    splits: tuple[Split, ...] = ("train", "validation")
    examples = [example for split in splits for example in data.examples(split, job.source)]
    rendered = map(job.source.render, examples)
    texts = [example.prompt + example.completion for example in rendered]
    return data.name, texts, data.counts(job.source)


def _calibration_texts(job: Job, source: str) -> tuple[str, list[str], dict[str, Any]]:
    """Return the name of the text, its documents, and what was dropped for being evaluation
    text.
    """
    if source == "auto" and job.calibration is not None:
        return _own_calibration_texts(job.calibration, job)
    if source in ("auto", "train"):
        try:
            examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
            names = list(dict.fromkeys(example.task for example in examples))
            held_out = overlapping_prompts(examples, job.tasks, job.source)
            left = [
                example.prompt + example.completion
                for example in examples
                if example.prompt not in held_out
            ]
            told = {
                "compared_with": names,
                "dropped_for_evaluation_text": len(examples) - len(left),
            }
            return f"train split of {'+'.join(names)}", left, told
        except NoSplit:
            if source == "train":
                raise
    try:
        rows = job.source.rows(C4, fields=("text",))
    except HarnessError as problem:
        why = "calibration=c4" if source == "c4" else "these tasks have no train split"
        raise CellFailed(f"no text to calibrate on: {why}, and {problem}") from problem
    texts = [str(row["text"]) for row in rows]
    dropped, compared = contaminated_texts(texts, job.tasks, job.source)
    kept = [text for at, text in enumerate(texts) if at not in dropped]
    told = {
        "compared_with": compared,
        "dropped_for_evaluation_text": len(dropped) if compared else None,
    }
    return "C4 sample", kept, told


StatisticsKind = Literal["gram", "squares", "magnitude"]


@dataclass
class InputStatistics:
    """Sums over the tokens that went into layers: X^T X (I, I), squares (I,) or magnitudes (I,), in
    fp32; and how many tokens.

    `alike` divides every token's input by its norm first. The few tokens that attention rests on
    (sinks: the first of a sequence, as a rule) are hundreds of times larger than all others in some
    layers, and would decide the sums alone.
    """

    kind: StatisticsKind
    alike: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def add(self, name: str, x: Tensor) -> None:
        """Add a layer's input (..., I)."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self.alike:
            rows = nn.functional.normalize(rows, dim=-1)
        value = (
            rows.T @ rows
            if self.kind == "gram"
            else rows.square().sum(0)
            if self.kind == "squares"
            else rows.abs().sum(0)
        )
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value


@contextmanager
def recording_inputs(flow: InputStatistics, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Sum what goes into these layers while they run; layers that are handed the very same tensor
    share one sum.
    """
    last: list[tuple[Tensor, str]] = []

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, given: tuple[Any, ...]) -> None:
            if last and last[-1][0] is given[0]:
                flow.sums[name] = flow.sums[last[-1][1]]  # queries, keys and values read one tensor
                return
            last[:] = [(given[0], name)]
            flow.add(name, given[0])

        return before

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class VisitOptions:
    """How a sweep reads the text.

    `again` runs each block once more after its visit; without it the next block sees what this one
    gave before.
    """

    alike: bool = False  # as `Flow` has it
    again: bool = True
    progress: Callable[[Progress], None] = lambda _: None
    method: str = "METHOD"  # the row whose settings an error names


_DEFAULT_OPTIONS = VisitOptions()


def visit_blocks(
    opened: LanguageModel,
    data: CalibrationData,
    layers: Mapping[str, nn.Module],
    *,
    kind: StatisticsKind,
    visit: Callable[[str, InputStatistics], None],
    options: VisitOptions = _DEFAULT_OPTIONS,
) -> None:
    """Visit every block with the sums of what flows into its layers (`Flow`); a visit may change
    the block, and the next ones see that.
    """
    prefix, blocks = named_blocks(opened.model)
    _refuse_outside(layers, prefix, options.method)
    states, given, seen = _entered(opened.model, blocks, data)
    whole = len(states[0])
    _check_alone(opened.model, blocks, given, seen, whole)
    with torch.no_grad():
        for at, block in enumerate(blocks):
            name = f"{prefix}.{at}"
            inside = {one: layer for one, layer in layers.items() if one.startswith(f"{name}.")}
            flow = InputStatistics(kind, options.alike, tokens=int(data.ids.numel()))
            with recording_inputs(flow, inside):
                after = []
                for state in states:
                    out = _output(block, state, given[at], whole)
                    # two copies of all states are not held at once
                    after += [] if options.again else [out]
            _refuse_unread(
                inside, flow, name, f"{options.method}.num_calibration_samples={4 * len(data.ids)}"
            )
            visit(name, flow)
            states = (
                [_output(block, state, given[at], whole) for state in states]
                if options.again
                else after
            )
            options.progress(
                Progress(stage="calibrate", done=at + 1, total=len(blocks), unit="blocks")
            )


def _refuse_outside(layers: Mapping[str, nn.Module], prefix: str, method: str) -> None:
    """Refuse layers beside the blocks."""
    outside = [one for one in layers if not one.startswith(f"{prefix}.")]
    if outside:
        raise CellFailed(
            f"{', '.join(outside)} stands outside the blocks ({prefix}), whose inputs alone are "
            "seen; leave it as it is with --set " + ignore_setting(method, outside)
        )


def _refuse_unread(
    inside: Mapping[str, nn.Module], flow: InputStatistics, block: str, more: str
) -> None:
    """Refuse a layer that nothing flowed into: an expert that no token was sent to."""
    unread = [one for one in inside if one not in flow.sums]
    if unread:
        raise CellFailed(
            f"no token of the calibration text reached {unread[0]} and {len(unread) - 1} more of "
            f"{block}; give more text with --set {more}"
        )


@dataclass(frozen=True)
class _Beside:
    """What a block is handed beside its hidden states."""

    positional: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)


def _entered(
    model: Any, blocks: nn.ModuleList, data: CalibrationData
) -> tuple[list[Tensor], list[_Beside], dict[int, tuple[Tensor, Tensor]]]:
    """Return the hidden states that enter the first block, by batch, and what each block is handed
    beside them.

    Masks and positions are those of the first batch: all sequences have one length and no padding,
    so they are the same for all. The last value holds what the first and the last block made of the
    *second* batch inside the model (of the first where there is no other): (states in, states out)
    by the block's number.
    """
    given = [_Beside() for _ in blocks]
    states: list[Tensor] = []
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    class _Seen(Exception):
        pass

    def keep(at: int) -> Callable[..., None]:
        def before(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            if at == 0:
                states.append(positional[0] if positional else named["hidden_states"])
                if len(states) > 2:
                    raise _Seen
            if len(states) > 1:
                return
            left_out = ("hidden_states", "past_key_values", "past_key_value")
            given[at] = _Beside(
                positional[1:], {key: value for key, value in named.items() if key not in left_out}
            )

        return before

    def keep_own(at: int) -> Callable[..., None]:
        def after(
            module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], out: Any
        ) -> None:
            seen[at] = (
                positional[0] if positional else named["hidden_states"],
                out[0] if isinstance(out, tuple) else out,
            )

        return after

    handles = [
        block.register_forward_pre_hook(keep(at), with_kwargs=True)
        for at, block in enumerate(blocks)
    ]
    handles += [
        blocks[at].register_forward_hook(keep_own(at), with_kwargs=True)
        for at in {0, len(blocks) - 1}
    ]
    try:
        with torch.no_grad():
            for batch in data.batches():
                try:
                    model(input_ids=batch, use_cache=False, logits_to_keep=1)
                except _Seen:
                    continue
    finally:
        for handle in handles:
            handle.remove()
    return states, given, seen


def _check_alone(
    model: Any,
    blocks: nn.ModuleList,
    given: Sequence[_Beside],
    seen: Mapping[int, tuple[Tensor, Tensor]],
    whole: int,
) -> None:
    """Refuse a model whose blocks, run one by one with what they were handed for the first batch,
    do not give what they give inside it.
    """
    for at, (before, after) in seen.items():
        if not bool(torch.isfinite(after).all()):
            raise CellFailed(
                f"{type(model).__name__}: what leaves block {at} is not finite on the calibration "
                "text; no method can read that"
            )
        try:
            with torch.no_grad():
                alone = _output(blocks[at], before, given[at], whole)
            same = torch.allclose(
                alone.float(),
                after.float(),
                rtol=1e-3,
                atol=1e-3 * float(after.float().abs().max()),
            )
        # it wants more than it was handed, or something of another shape
        except (TypeError, AttributeError, RuntimeError):
            same = False
        if not same:
            raise CellFailed(
                f"{type(model).__name__}: block {at} run by itself gives other states than inside "
                "the model, so text cannot be led through "
                "it block by block; use a method that reads no text"
            )


def _output(block: nn.Module, state: Tensor, given: _Beside, whole: int) -> Tensor:
    positional, named = given.positional, given.named
    if len(state) != whole:
        positional = tuple(_cut(value, whole, len(state)) for value in positional)
        named = {key: _cut(value, whole, len(state)) for key, value in named.items()}
    out = block(state, *positional, **named)
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _cut(value: Any, whole: int, rows: int) -> Any:
    """Fit masks and positions made for a whole batch to the last one, which may be smaller."""
    if isinstance(value, tuple):
        return tuple(_cut(one, whole, rows) for one in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == whole:
        return value[:rows]
    return value


def block_influence(opened: LanguageModel, data: CalibrationData) -> list[float]:
    """Return each block's influence: 1 - mean cos(what enters, what leaves), over all tokens (Men
    et al., 2024, ShortGPT).
    """
    _, blocks = named_blocks(opened.model)
    sums = [0.0] * len(blocks)

    def hook(at: int) -> Callable[..., None]:
        def after(
            module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], out: Any
        ) -> None:
            before = positional[0] if positional else named["hidden_states"]
            left = out[0] if isinstance(out, tuple) else out
            sums[at] += float(
                (1 - torch.cosine_similarity(before.float(), left.float(), dim=-1)).sum()
            )

        return after

    handles = [
        block.register_forward_hook(hook(at), with_kwargs=True) for at, block in enumerate(blocks)
    ]
    try:
        with torch.no_grad():
            for batch in data.batches():
                opened.model(input_ids=batch, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [one / int(data.ids.numel()) for one in sums]
