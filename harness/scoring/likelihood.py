"""Log-probabilities of given continuations: each distinct token in its context is computed once.

Requests are sorted, those with a long common beginning share one pass over it, and what follows is
laid into packs as a tree: the choices of a question share the question, the questions of a subject
share its examples. Only the positions that are scored reach the language-model head.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from typing import TYPE_CHECKING

from harness.machine.memory import is_out_of_memory
from harness.models.encoding import shared_prefix_length
from harness.models.language_model import LanguageModel
from harness.scoring.backend import Answer, BatchSize, Scored, unheard
from harness.scoring.batch_sizes import WORTH_SHARING, pack_tokens
from harness.scoring.finite import NoNumber, not_finite
from harness.scoring.generation import why_plain
from harness.scoring.plain import last_logits, note_of, one_row
from harness.scoring.prefix_sharing import (
    KeyValues,
    Tree,
    forward_tree,
    prefix_of,
    shared_attention,
)

if TYPE_CHECKING:
    import torch

PLAIN_ROWS = 16  # of a padded batch where the batch size is left to us
_LOGIT_VALUES = 2**26  # of one forward: 256 MiB in fp32


def log_likelihoods(
    opened: LanguageModel,
    rows: Sequence[Scored],
    *,
    batch_size: BatchSize = "auto",
    pack: int | None = None,
    known: Mapping[int, Answer] | None = None,
    finished: Callable[[int, Answer], None] = unheard,
    say: Callable[[str], None] = unheard,
) -> list[Answer]:
    """Score every row; answers in the given order, `finished` called for each that was computed, as
    they come.

    On the shared path a forward takes `pack` tokens (None: by the device); `batch_size` counts the
    rows of the plain one. Out of memory halves either and tells `say`. Rows whose answer is `known`
    are not computed, but keep their place: the other rows are in the same company as without it,
    and a scoring that goes on after a kill ends with the same digits.
    """
    found: dict[int, Answer] = dict(known or {})

    def keep(row: int, answer: Answer) -> None:
        if row in found:  # it stands in a pack with one that was asked
            return
        if not math.isfinite(answer.log_probability):
            raise NoNumber(rows[row].ids[:-1])
        found[row] = answer
        finished(row, answer)

    plain = bool(why_plain(opened))
    if plain and rows and (note := note_of(opened, writes=False)):
        say(note)
    size = (
        (PLAIN_ROWS if batch_size == "auto" else batch_size)
        if plain
        else pack or pack_tokens(opened)
    )
    try:
        with nullcontext() if plain else shared_attention(opened):
            run = _padded if plain else _shared
            _until_done(
                lambda left, size: run(opened, rows, left, size, keep),
                rows,
                found,
                size,
                "rows" if plain else "tokens",
                say,
            )
    # the text is read once more to find the place, by the model's own attention
    except NoNumber as problem:
        raise not_finite(opened, problem.ids) from None
    return [found[row] for row in range(len(rows))]


def _until_done(
    run: Callable[[Set[int], int], None],
    rows: Sequence[Scored],
    found: Mapping[int, Answer],
    size: int,
    unit: str,
    say: Callable[[str], None],
) -> None:
    """Run what is left until all rows are found; where memory runs out, half as much at once."""
    while len(found) < len(rows):
        try:
            run({row for row in range(len(rows)) if row not in found}, size)
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem) or size == 1:
                raise
            before, size = size, max(1, size // 2)
            say(f"out of memory: {before} {unit} at once became {size}")


def _shared(
    opened: LanguageModel,
    rows: Sequence[Scored],
    left: Set[int],
    most: int,
    keep: Callable[[int, Answer], None],
) -> None:
    """Score what is left. All rows are laid into packs, and those packs run that hold a row that is
    left.
    """
    order = sorted(range(len(rows)), key=lambda row: list(rows[row].ids))
    loose: list[int] = []
    for members, common in runs(rows, order):
        # one pack holds it all: the tree shares the beginning by itself
        if _tree_size(rows, members) <= most:
            loose += members
        elif not left.isdisjoint(members):
            prefix = prefix_of(opened, rows[members[0]].ids[:common], most=most)
            _packs(opened, rows, members, left, prefix, most, keep)
    _packs(opened, rows, loose, left, KeyValues(), most, keep)


def runs(rows: Sequence[Scored], order: Sequence[int]) -> list[tuple[list[int], int]]:
    """Cut sorted rows into runs that share a beginning worth a pass of its own; return (rows,
    shared tokens) of each.

    A shared beginning ends before the first scored position's input, so that every logit is
    computed behind it.
    """
    found: list[tuple[list[int], int]] = []
    for row in order:
        room = len(rows[row].ids) - rows[row].count - 1
        if found:
            members, common = found[-1]
            together = min(common, room, shared_prefix_length(rows[members[-1]].ids, rows[row].ids))
            if together >= WORTH_SHARING and 2 * together >= len(rows[members[0]].ids):
                members.append(row)
                found[-1] = (members, together)
                continue
        found.append(([row], room))
    return found


def _tree_size(rows: Sequence[Scored], members: Sequence[int]) -> int:
    size, before = 0, rows[members[0]].ids[:0]
    for row in members:
        size += len(rows[row].ids) - shared_prefix_length(before, rows[row].ids)
        before = rows[row].ids
    return size


def _packs(
    opened: LanguageModel,
    rows: Sequence[Scored],
    members: Sequence[int],
    left: Set[int],
    prefix: KeyValues,
    most: int,
    keep: Callable[[int, Answer], None],
) -> None:
    """Score rows behind a prefix, as many at once as a pack holds; a pack of which no row is left
    is not run.
    """
    skipped = prefix.length
    most_logits = max(1, _LOGIT_VALUES // int(opened.text_config.vocab_size))
    pack: list[int] = []
    size, logits = 0, 0
    before: Sequence[int] = ()
    for row in members:
        fed = rows[row].ids[skipped:-1]
        if len(fed) > most or rows[row].count > most_logits:
            if row in left:
                keep(row, _chain(opened, rows[row], prefix, min(most, most_logits)))
            continue
        new = len(fed) - shared_prefix_length(before, fed)
        if pack and (size + new > most or logits + rows[row].count > most_logits):
            _pack(opened, rows, pack, left, prefix, keep)
            pack, size, logits, new = [], 0, 0, len(fed)
        pack.append(row)
        size, logits, before = size + new, logits + rows[row].count, fed
    _pack(opened, rows, pack, left, prefix, keep)


def _pack(
    opened: LanguageModel,
    rows: Sequence[Scored],
    pack: Sequence[int],
    left: Set[int],
    prefix: KeyValues,
    keep: Callable[[int, Answer], None],
) -> None:
    import torch

    if left.isdisjoint(pack):
        return
    skipped = prefix.length
    tree = Tree.of([rows[row].ids[skipped:-1] for row in pack])
    asked = [
        path[len(path) - rows[row].count :] for row, path in zip(pack, tree.paths, strict=True)
    ]
    nodes = sorted({node for path in asked for node in path})
    at = {node: index for index, node in enumerate(nodes)}
    logits, _ = forward_tree(opened, tree, prefix, nodes)
    places = torch.tensor([at[node] for path in asked for node in path], device=logits.device)
    wanted = torch.tensor(
        [token for row in pack for token in rows[row].ids[len(rows[row].ids) - rows[row].count :]],
        device=logits.device,
    )
    values, likeliest = _at(logits, places, wanted)
    start = 0
    for row in pack:
        end = start + rows[row].count
        keep(row, Answer(sum(values[start:end]), all(likeliest[start:end])))
        start = end


def _at(
    logits_KV: "torch.Tensor", places: "torch.Tensor", wanted: "torch.Tensor"
) -> tuple[list[float], list[bool]]:
    """Return the log-probability of each wanted token at its place, in fp32, and whether it is the
    likeliest.
    """
    import torch

    logits_KV = logits_KV.float()
    values = logits_KV[places, wanted] - torch.logsumexp(logits_KV, dim=-1)[places]
    return values.tolist(), (logits_KV.argmax(dim=-1)[places] == wanted).tolist()


def _chain(opened: LanguageModel, row: Scored, prefix: KeyValues, most: int) -> Answer:
    """Score a text that is longer than a pack: stretch by stretch, each behind all that stands
    before it.
    """
    import torch

    ids = row.ids[prefix.length :]
    first = len(ids) - row.count  # the first scored token, predicted at the position before
    total, greedy, held = 0.0, True, prefix
    for start in range(0, len(ids) - 1, most):
        stretch = ids[start : min(start + most, len(ids) - 1)]
        scored = [index for index in range(len(stretch)) if start + index + 1 >= first]
        logits, more = forward_tree(opened, Tree.of([stretch]), held, scored)
        held = held.extended(more)
        if scored:
            wanted = torch.tensor(
                [ids[start + index + 1] for index in scored], device=logits.device
            )
            values, likeliest = _at(logits, torch.arange(len(scored), device=logits.device), wanted)
            total, greedy = total + sum(values), greedy and all(likeliest)
    return Answer(total, greedy)


def _padded(
    opened: LanguageModel,
    rows: Sequence[Scored],
    left: Set[int],
    size: int,
    keep: Callable[[int, Answer], None],
) -> None:
    """Score by the model's own attention in left-padded batches; rows with equal inputs share a
    forward.
    """
    import torch

    sharing: dict[tuple[int, ...], list[int]] = {}
    for row in range(len(rows)):
        sharing.setdefault(tuple(rows[row].ids[:-1]), []).append(row)
    keys = sorted(sharing, key=len, reverse=True)
    at_once = 1 if one_row(opened) else size
    for start in range(0, len(keys), at_once):
        batch = keys[start : start + at_once]
        if all(left.isdisjoint(sharing[key]) for key in batch):
            continue
        longest = max(rows[row].count for key in batch for row in sharing[key])
        for key, logits_KV in zip(batch, last_logits(opened, batch, longest), strict=True):
            for row in sharing[key]:
                count = rows[row].count
                wanted = torch.tensor(
                    rows[row].ids[len(rows[row].ids) - count :], device=logits_KV.device
                )
                values, likeliest = _at(
                    logits_KV[len(logits_KV) - count :],
                    torch.arange(count, device=logits_KV.device),
                    wanted,
                )
                keep(row, Answer(sum(values), all(likeliest)))
