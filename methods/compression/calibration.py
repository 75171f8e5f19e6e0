"""Calibration: training text as token sequences, and statistics of what it sends into each layer.

The text is the train split of the tasks, each item once, or C4 from the data folder where a task
has no train split. It never holds an evaluation item. Questions of the evaluation are found by
exact comparison in the train split, and by runs of 13 shared words in C4 (the generated tasks share
templates and facts by design, so that n-grams mean nothing there). The record keeps the text's name
and digest, its size, and how many documents were dropped.

`visit_blocks` works block by block. The text that reaches a block has passed through the blocks
before it as they are at that time: already pruned or quantized.

Legend: B sequences of a batch, T tokens of a sequence, H hidden size, I inputs of a layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from harness.contract import Job, OwnData, Progress
from harness.data.contamination import contaminated_texts, overlapping_prompts
from harness.data.examples import training_examples
from harness.data.source import C4, NoSplit
from harness.errors import CellFailed, HarnessError
from harness.files.digests import digest_of
from harness.machine.memory import return_freed_memory
from harness.models.blocks import input_states, named_blocks, output_states, temporary_hooks
from harness.models.language_model import LanguageModel
from methods.compression.layers import ignore_setting

TOKENS_PER_BATCH = 2_048
_INPUTS_AT_ONCE = 2_048  # of a layer, for X^T X of all of them: 16 MiB in fp32


@dataclass(frozen=True)
class CalibrationData:
    """Token sequences of one length, and the description of their text for the record."""

    ids: Tensor  # (n, T)
    description: Mapping[str, Any]

    def batches(self) -> Iterator[Tensor]:
        """Yield batches of about `TOKENS_PER_BATCH` tokens, (B, T)."""
        yield from self.ids.split(max(1, TOKENS_PER_BATCH // self.ids.shape[1]))


def calibration_data(
    job: Job, opened: LanguageModel, *, source: str, num_sequences: int, max_length: int
) -> CalibrationData:
    """Cut training text into at most `num_sequences` sequences of `max_length` tokens.

    Sequences are shorter where the model's context is. Raises `CellFailed` where there is no text,
    or not enough of it for one sequence.
    """
    text = _calibration_text(job, source)
    length = min(max_length, opened.context)
    eos = opened.tokenizer.eos_token_id
    tokens: list[int] = []
    documents_read = 0
    for document in text.documents:
        ids = opened.encode(document)
        tokens += ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        documents_read += 1
        if len(tokens) >= num_sequences * length:
            break
    count = min(num_sequences, len(tokens) // length)
    if count == 0:
        raise CellFailed(
            f"calibration: the {len(tokens)} tokens of {text.name} fill no sequence of {length}; "
            "give more --rows, or a smaller max_seq_length"
        )
    ids = torch.tensor(tokens[: count * length], device=opened.device).view(count, length)
    description = {
        "name": text.name,
        "digest": digest_of(text.name, text.documents[:documents_read]),
        "sequences": count,
        "tokens_each": length,
        "texts": documents_read,
        **text.notes,
    }
    return CalibrationData(ids, description)


class _Text(NamedTuple):
    """Documents to calibrate on, and notes on how many were dropped as evaluation text."""

    name: str
    documents: list[str]
    notes: dict[str, Any]


def _calibration_text(job: Job, source: str) -> _Text:
    """Return the text of `source`: `auto`, `train` or `c4`.

    `auto` is the user's own file where there is one, else the train split of the tasks, else C4.
    """
    if source == "auto" and job.calibration is not None:
        return _text_of_user(job.calibration, job)
    if source in ("auto", "train"):
        try:
            return _train_split(job)
        except NoSplit:
            if source == "train":
                raise
    try:
        rows = job.source.rows(C4, fields=("text",))
    except HarnessError as problem:
        reason = "calibration=c4" if source == "c4" else "these tasks have no train split"
        raise CellFailed(f"no text to calibrate on: {reason}, and {problem}") from problem
    texts = [str(row["text"]) for row in rows]
    dropped, compared = contaminated_texts(texts, job.evaluated_tasks or job.tasks, job.source)
    notes = {
        "compared_with": compared,
        "dropped_for_evaluation_text": len(dropped) if compared else None,
    }
    documents = [text for position, text in enumerate(texts) if position not in dropped]
    return _Text("C4 sample", documents, notes)


def _text_of_user(data: OwnData, job: Job) -> _Text:
    """Return all examples of a file of the user's own, in the form that the student is shown."""
    rendered = map(job.source.render, data.all_examples(job.source))
    documents = [example.prompt + example.completion for example in rendered]
    return _Text(data.name, documents, data.counts(job.source))


def _train_split(job: Job) -> _Text:
    """Return the solved training items whose question is no evaluation item's. Raises `NoSplit`."""
    examples = training_examples(job.tasks, job.source, rows=job.budget.rows)
    task_names = list(dict.fromkeys(example.task for example in examples))
    evaluated = overlapping_prompts(examples, job.tasks, job.source)
    documents = [
        example.prompt + example.completion
        for example in examples
        if example.prompt not in evaluated
    ]
    notes = {
        "compared_with": task_names,
        "dropped_for_evaluation_text": len(examples) - len(documents),
    }
    return _Text(f"train split of {'+'.join(task_names)}", documents, notes)


StatisticsKind = Literal["gram", "squares", "magnitude"]


@dataclass
class InputStatistics:
    """Sums over the inputs of layers, in fp32, by the layer's name; and the number of tokens.

    `kind` is `gram` (X^T X, shape (I, I)), `squares` (of each input, shape (I,)) or `magnitude`
    (shape (I,)). `normalize_tokens` divides each token's input by its norm first: in some layers
    the few tokens that attention rests on (attention sinks, usually the first of a sequence) are
    hundreds of times larger than all others, and would decide the sums alone.
    """

    kind: StatisticsKind
    normalize_tokens: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def add(self, name: str, inputs: Tensor) -> None:
        """Add inputs of a layer, (..., I), to its sums."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if self.normalize_tokens:
            rows = nn.functional.normalize(rows, dim=-1)
        if self.kind == "gram" and rows.shape[1] > _INPUTS_AT_ONCE:
            self._add_large_gram(name, rows)
            return
        if self.kind == "gram":
            value = rows.T @ rows
        elif self.kind == "squares":
            value = rows.square().sum(0)
        else:
            value = rows.abs().sum(0)
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value

    def _add_large_gram(self, name: str, rows: Tensor) -> None:
        """Add X^T X of rows (N, I) part by part: a second matrix of its size costs memory."""
        inputs = rows.shape[1]
        if name not in self.sums:
            self.sums[name] = rows.new_zeros(inputs, inputs)
        step = max(1, _INPUTS_AT_ONCE**2 // inputs)
        for start in range(0, inputs, step):
            part = slice(start, min(start + step, inputs))
            self.sums[name][part] += rows[:, part].T @ rows


@contextmanager
def recording_inputs(
    statistics: InputStatistics, layers: Mapping[str, nn.Module]
) -> Iterator[None]:
    """Sum what enters these layers while the model runs.

    Layers that get the very same tensor, one after another, share one sum: queries, keys and values
    do.
    """
    last: list[tuple[Tensor, str]] = []  # the last summed tensor, and the layer that got it

    def recorder(name: str) -> Callable[..., None]:
        def before(module: nn.Module, positional: tuple[Any, ...]) -> None:
            inputs = positional[0]
            if last and last[-1][0] is inputs:
                statistics.sums[name] = statistics.sums[last[-1][1]]
                return
            last[:] = [(inputs, name)]
            statistics.add(name, inputs)

        return before

    handles = [layer.register_forward_pre_hook(recorder(name)) for name, layer in layers.items()]
    with temporary_hooks(handles):
        yield


@dataclass(frozen=True, kw_only=True)
class VisitOptions:
    """How `visit_blocks` runs the text through the blocks.

    `rerun`: run each block again after its visit, so that the next block gets what the changed
    block returns. Without it the next block gets what the unchanged block returned.
    `changing(block)`: a context in which the block's weights are in memory, and may change.
    """

    normalize_tokens: bool = False  # as in `InputStatistics`
    rerun: bool = True
    progress: Callable[[Progress], None] = lambda _: None
    method: str = "METHOD"  # the name of the method whose settings an error names
    changing: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext()


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
    """Call `visit(block_name, statistics)` for every block, in the order of a forward pass.

    The statistics are those of the inputs of the block's `layers`. A visit may change the block;
    later blocks get what the changed block returns. Raises `CellFailed` for layers outside the
    blocks, for layers that no token reaches, and for models whose blocks cannot run alone.
    """
    prefix, blocks = named_blocks(opened.model)
    _refuse_layers_outside_blocks(layers, prefix, options.method)
    states, arguments, samples = _record_blocks(opened.model, blocks, data)
    batch_size = len(states[0])
    _refuse_blocks_that_differ_alone(opened.model, blocks, arguments, samples, batch_size)
    with torch.no_grad():
        for number, block in enumerate(blocks):
            name = f"{prefix}.{number}"
            block_layers = {
                path: layer for path, layer in layers.items() if path.startswith(f"{name}.")
            }
            statistics = InputStatistics(
                kind, options.normalize_tokens, tokens=int(data.ids.numel())
            )
            run = partial(_run_block, block, arguments=arguments[number], batch_size=batch_size)
            with options.changing(name):
                with recording_inputs(statistics, block_layers):
                    _pass_states(run, states, keep=not options.rerun)
                _refuse_layers_without_input(
                    block_layers, statistics, name, options.method, len(data.ids)
                )
                return_freed_memory()
                visit(name, statistics)
                statistics.sums.clear()
                return_freed_memory()
                if options.rerun:
                    _pass_states(run, states, keep=True)
            options.progress(
                Progress(stage="calibrate", done=number + 1, total=len(blocks), unit="blocks")
            )


def _pass_states(run: Callable[[Tensor], Tensor], states: list[Tensor], *, keep: bool) -> None:
    """Run a block on the states of every batch; put what it returns in their place with `keep`.

    In their place, since two copies of all states cost memory.
    """
    for index, state in enumerate(states):
        output = run(state)
        if keep:
            states[index] = output


def _refuse_layers_outside_blocks(
    layers: Mapping[str, nn.Module], prefix: str, method: str
) -> None:
    """Raise `CellFailed` where a layer is in no block."""
    outside = [name for name in layers if not name.startswith(f"{prefix}.")]
    if outside:
        raise CellFailed(
            f"{', '.join(outside)} is outside the blocks ({prefix}), and only inputs of blocks are "
            f"recorded; leave it as it is with --set {ignore_setting(method, outside)}"
        )


def _refuse_layers_without_input(
    layers: Mapping[str, nn.Module],
    statistics: InputStatistics,
    block: str,
    method: str,
    num_sequences: int,
) -> None:
    """Raise `CellFailed` for a layer that got no token: an expert that no token was routed to."""
    names = [name for name in layers if name not in statistics.sums]
    if names:
        raise CellFailed(
            f"no token of the calibration text reached {names[0]} and {len(names) - 1} more of "
            f"{block}; give more text with --set {method}.num_calibration_samples="
            f"{4 * num_sequences}"
        )


@dataclass(frozen=True)
class _BlockArguments:
    """What a block is called with besides its hidden states: masks and positions."""

    positional: tuple[Any, ...] = ()
    named: Mapping[str, Any] = field(default_factory=dict)


class _BlockSample(NamedTuple):
    """What entered and what left a block inside the model, for one batch: (B, T, H) each."""

    inputs: Tensor
    outputs: Tensor


class _Recorded(NamedTuple):
    """What a pass of the calibration text through the model showed of its blocks.

    `arguments` are those of the first batch. All sequences have one length and no padding, so masks
    and positions are the same for every batch. `samples` holds the first and the last block by
    number, for the second batch, or for the first where there is no other.
    """

    states: list[Tensor]  # what enters the first block, a tensor (B, T, H) for each batch
    arguments: list[_BlockArguments]
    samples: dict[int, _BlockSample]


class _FirstBlockRead(Exception):
    """Ends a forward pass of which only the input of the first block is needed."""


def _record_blocks(model: Any, blocks: nn.ModuleList, data: CalibrationData) -> _Recorded:
    """Run the calibration text, and record what enters the blocks.

    The first two batches pass through the whole model, the others only up to the first block.
    """
    recorded = _Recorded([], [_BlockArguments() for _ in blocks], {})
    last = len(blocks) - 1
    handles = [
        block.register_forward_pre_hook(_argument_recorder(recorded, number), with_kwargs=True)
        for number, block in enumerate(blocks)
    ]
    handles += [
        blocks[number].register_forward_hook(_sample_recorder(recorded, number), with_kwargs=True)
        for number in {0, last}
    ]
    with temporary_hooks(handles), torch.no_grad():
        for batch in data.batches():
            with suppress(_FirstBlockRead):
                model(input_ids=batch, use_cache=False, logits_to_keep=1)
    return recorded


def _argument_recorder(recorded: _Recorded, number: int) -> Callable[..., None]:
    """Return a hook before a block: it records the states of the first, the arguments of all."""

    def before(module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        if number == 0:
            recorded.states.append(input_states(positional, named))
            if len(recorded.states) > 2:
                raise _FirstBlockRead
        if len(recorded.states) > 1:
            return
        not_passed_on = ("hidden_states", "past_key_values", "past_key_value")
        recorded.arguments[number] = _BlockArguments(
            positional[1:], {key: value for key, value in named.items() if key not in not_passed_on}
        )

    return before


def _sample_recorder(recorded: _Recorded, number: int) -> Callable[..., None]:
    """Return a hook behind a block: it records what entered and what left it."""

    def behind(
        module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        recorded.samples[number] = _BlockSample(
            input_states(positional, named), output_states(output)
        )

    return behind


def _refuse_blocks_that_differ_alone(
    model: Any,
    blocks: nn.ModuleList,
    arguments: Sequence[_BlockArguments],
    samples: Mapping[int, _BlockSample],
    batch_size: int,
) -> None:
    """Raise `CellFailed` where a block that runs alone returns other states than in the model."""
    for number, sample in samples.items():
        if not bool(torch.isfinite(sample.outputs).all()):
            raise CellFailed(
                f"{type(model).__name__}: what block {number} returns is not finite on the "
                "calibration text; no method can use that"
            )
        try:
            with torch.no_grad():
                alone = _run_block(blocks[number], sample.inputs, arguments[number], batch_size)
            same = torch.allclose(
                alone.float(),
                sample.outputs.float(),
                rtol=1e-3,
                atol=1e-3 * float(sample.outputs.float().abs().max()),
            )
        # the block needs an argument that was not recorded, or one of another shape
        except (TypeError, AttributeError, RuntimeError):
            same = False
        if not same:
            raise CellFailed(
                f"{type(model).__name__}: block {number} run alone returns other states than "
                "inside the model, so the text cannot pass through the model block by block; use a "
                "method that reads no text"
            )


def _run_block(
    block: nn.Module, state: Tensor, arguments: _BlockArguments, batch_size: int
) -> Tensor:
    """Return what a block makes of states (B, T, H); `arguments` are of a batch of `batch_size`."""
    positional, named = arguments.positional, arguments.named
    if len(state) != batch_size:
        positional = tuple(_first_rows(value, batch_size, len(state)) for value in positional)
        named = {key: _first_rows(value, batch_size, len(state)) for key, value in named.items()}
    return output_states(block(state, *positional, **named))


def _first_rows(value: Any, batch_size: int, rows: int) -> Any:
    """Cut masks and positions of a full batch down to the last batch, which may be smaller."""
    if isinstance(value, tuple):
        return tuple(_first_rows(part, batch_size, rows) for part in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == batch_size:
        return value[:rows]
    return value


def block_influence(opened: LanguageModel, data: CalibrationData) -> list[float]:
    """Return each block's influence: the mean over tokens of 1 - cos(input, output).

    Men et al., 2024, ShortGPT.
    """
    _, blocks = named_blocks(opened.model)
    sums = [0.0] * len(blocks)

    def recorder(number: int) -> Callable[..., None]:
        def behind(
            module: nn.Module, positional: tuple[Any, ...], named: dict[str, Any], output: Any
        ) -> None:
            inputs, outputs = input_states(positional, named), output_states(output)
            sums[number] += float(
                (1 - torch.cosine_similarity(inputs.float(), outputs.float(), dim=-1)).sum()
            )

        return behind

    handles = [
        block.register_forward_hook(recorder(number), with_kwargs=True)
        for number, block in enumerate(blocks)
    ]
    with temporary_hooks(handles), torch.no_grad():
        for batch in data.batches():
            opened.model(input_ids=batch, use_cache=False, logits_to_keep=1)
    return [total / int(data.ids.numel()) for total in sums]
