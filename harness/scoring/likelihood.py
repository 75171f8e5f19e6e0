"""Log-probabilities of given continuations; each distinct token in its context is computed once.

Requests are sorted, and those with a long common beginning share one pass over it. The rest is
packed as a tree: the choices of a question share the question, the questions of a subject share its
examples. The language-model head runs only at the positions that are scored.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from harness.machine.memory import is_out_of_memory
from harness.models.encoding import shared_prefix_length
from harness.models.language_model import LanguageModel
from harness.scoring.backend import BatchSize, Likelihood, LikelihoodRequest, ignore_report
from harness.scoring.batch_sizes import MIN_SHARED_TOKENS, tokens_per_pack
from harness.scoring.finite import NonFiniteLogits, non_finite_error
from harness.scoring.generation import reason_for_plain_path
from harness.scoring.plain import last_logits, reason_for_single_rows, single_row_note
from harness.scoring.prefix_sharing import (
    KeyValues,
    TokenTree,
    compute_prefix,
    forward_tree,
    shared_attention,
)

if TYPE_CHECKING:
    import torch

DEFAULT_PLAIN_ROWS = 16  # of a padded batch, for batch size "auto"
_MAX_LOGITS = 2**26  # of one forward: 256 MiB in float32


def log_likelihoods(
    opened: LanguageModel,
    rows: Sequence[LikelihoodRequest],
    *,
    batch_size: BatchSize = "auto",
    pack: int | None = None,
    known: Mapping[int, Likelihood] | None = None,
    finished: Callable[[int, Likelihood], None] = ignore_report,
    say: Callable[[str], None] = ignore_report,
) -> list[Likelihood]:
    """Score every row; return the answers in the given order.

    `finished` is called for each row as soon as it is computed. On the shared path a forward takes
    `pack` tokens (None: by the device); on the plain path it takes `batch_size` rows. Where memory
    runs out, the number is halved and `say` is called. Rows whose answer is `known` are not
    computed but keep their place: the other rows are batched as they would be without it, so a
    scoring that resumes after a kill ends with the same digits.
    """
    answers: dict[int, Likelihood] = dict(known or {})

    def keep(row: int, likelihood: Likelihood) -> None:
        if row in answers:  # a known row in the same pack as a missing one
            return
        if not math.isfinite(likelihood.log_probability):
            raise NonFiniteLogits(rows[row].ids[:-1])
        answers[row] = likelihood
        finished(row, likelihood)

    is_plain = bool(reason_for_plain_path(opened))
    if is_plain and rows and (note := single_row_note(opened, writes=False)):
        say(note)
    plain_rows = DEFAULT_PLAIN_ROWS if batch_size == "auto" else batch_size
    size = plain_rows if is_plain else pack or tokens_per_pack(opened)
    score = _score_padded if is_plain else _score_shared
    try:
        with nullcontext() if is_plain else shared_attention(opened):
            _score_missing(
                lambda missing, size: score(_Scoring(opened, rows, missing, keep), size),
                rows,
                answers,
                size,
                "rows" if is_plain else "tokens",
                say,
            )
    # outside of shared_attention: the text is read again by the model's own attention
    except NonFiniteLogits as problem:
        raise non_finite_error(opened, problem.ids) from None
    return [answers[row] for row in range(len(rows))]


def _score_missing(
    score: Callable[[Set[int], int], None],
    rows: Sequence[LikelihoodRequest],
    answers: Mapping[int, Likelihood],
    size: int,
    unit: str,
    say: Callable[[str], None],
) -> None:
    """Score until every row has an answer; each time memory runs out, halve the `size`."""
    while len(answers) < len(rows):
        try:
            score({row for row in range(len(rows)) if row not in answers}, size)
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem) or size == 1:
                raise
            size_before, size = size, max(1, size // 2)
            say(f"out of memory: {size_before} {unit} at once became {size}")


@dataclass(frozen=True)
class _Scoring:
    """One pass over the rows: all of them, those whose answer is missing, and where answers go."""

    opened: LanguageModel
    rows: Sequence[LikelihoodRequest]
    missing: Set[int]
    keep: Callable[[int, Likelihood], None]


def _score_shared(scoring: _Scoring, most: int) -> None:
    """Score the missing rows in packs of at most `most` tokens.

    Packs are made of all rows. Those packs are computed that hold a missing row.
    """
    rows = scoring.rows
    order = sorted(range(len(rows)), key=lambda row: list(rows[row].ids))
    ungrouped: list[int] = []
    for members, common in prefix_groups(rows, order):
        # a group that fits into one pack shares its beginning there
        if _tree_size(rows, members) <= most:
            ungrouped += members
        elif not scoring.missing.isdisjoint(members):
            shared_ids = rows[members[0]].ids[:common]
            prefix = compute_prefix(scoring.opened, shared_ids, most=most)
            _score_in_packs(scoring, members, prefix, most)
    _score_in_packs(scoring, ungrouped, KeyValues(), most)


class PrefixGroup(NamedTuple):
    """Rows with a common beginning: their indices, and how many tokens they share."""

    members: list[int]
    common: int


def prefix_groups(rows: Sequence[LikelihoodRequest], order: Sequence[int]) -> list[PrefixGroup]:
    """Cut sorted rows into groups whose common beginning is worth a pass of its own.

    The beginning ends before the input of the first scored position, so that every logit is
    computed after it.
    """
    groups: list[PrefixGroup] = []
    for row in order:
        unscored = len(rows[row].ids) - rows[row].count - 1
        if groups:
            members, common = groups[-1]
            shared = shared_prefix_length(rows[members[-1]].ids, rows[row].ids)
            together = min(common, unscored, shared)
            if together >= MIN_SHARED_TOKENS and 2 * together >= len(rows[members[0]].ids):
                members.append(row)
                groups[-1] = PrefixGroup(members, together)
                continue
        groups.append(PrefixGroup([row], unscored))
    return groups


def _tree_size(rows: Sequence[LikelihoodRequest], members: Sequence[int]) -> int:
    """Return how many nodes the tree of some sorted rows has."""
    size, previous = 0, rows[members[0]].ids[:0]
    for row in members:
        size += len(rows[row].ids) - shared_prefix_length(previous, rows[row].ids)
        previous = rows[row].ids
    return size


def _score_in_packs(
    scoring: _Scoring, members: Sequence[int], prefix: KeyValues, most: int
) -> None:
    """Score rows behind a prefix, as many at once as a pack of `most` tokens holds."""
    opened, rows = scoring.opened, scoring.rows
    max_logits = max(1, _MAX_LOGITS // int(opened.text_config.vocab_size))
    pack: list[int] = []
    size, logits = 0, 0
    previous: Sequence[int] = ()
    for row in members:
        fed = rows[row].ids[prefix.length : -1]
        if len(fed) > most or rows[row].count > max_logits:
            if row in scoring.missing:
                scoring.keep(
                    row, _score_long_text(opened, rows[row], prefix, min(most, max_logits))
                )
            continue
        new_tokens = len(fed) - shared_prefix_length(previous, fed)
        if pack and (size + new_tokens > most or logits + rows[row].count > max_logits):
            _score_pack(scoring, pack, prefix)
            pack, size, logits, new_tokens = [], 0, 0, len(fed)
        pack.append(row)
        size, logits, previous = size + new_tokens, logits + rows[row].count, fed
    _score_pack(scoring, pack, prefix)


def _score_pack(scoring: _Scoring, pack: Sequence[int], prefix: KeyValues) -> None:
    """Score the rows of one pack in one forward, unless no row of it is missing."""
    import torch

    if scoring.missing.isdisjoint(pack):
        return
    rows = scoring.rows
    tree = TokenTree.of([rows[row].ids[prefix.length : -1] for row in pack])
    # the nodes that predict the scored tokens of each row
    predicting = [
        path[len(path) - rows[row].count :] for row, path in zip(pack, tree.paths, strict=True)
    ]
    nodes = sorted({node for path in predicting for node in path})
    index_of = {node: index for index, node in enumerate(nodes)}
    logits, _ = forward_tree(scoring.opened, tree, prefix, nodes)
    positions = torch.tensor(
        [index_of[node] for path in predicting for node in path], device=logits.device
    )
    tokens = torch.tensor(
        [token for row in pack for token in _scored_tokens(rows[row])], device=logits.device
    )
    log_p, is_likeliest = _token_scores(logits, positions, tokens)
    start = 0
    for row in pack:
        end = start + rows[row].count
        scoring.keep(row, Likelihood(sum(log_p[start:end]), all(is_likeliest[start:end])))
        start = end


def _scored_tokens(row: LikelihoodRequest) -> Sequence[int]:
    return row.ids[len(row.ids) - row.count :]


def _token_scores(
    logits_KV: "torch.Tensor", positions: "torch.Tensor", tokens: "torch.Tensor"
) -> tuple[list[float], list[bool]]:
    """Return each token's log-probability at its position, and whether it is the likeliest there.

    Computed in float32.
    """
    import torch

    logits_KV = logits_KV.float()
    log_p = logits_KV[positions, tokens] - torch.logsumexp(logits_KV, dim=-1)[positions]
    return log_p.tolist(), (logits_KV.argmax(dim=-1)[positions] == tokens).tolist()


def _score_long_text(
    opened: LanguageModel, row: LikelihoodRequest, prefix: KeyValues, most: int
) -> Likelihood:
    """Score a text that is longer than a pack, in stretches of at most `most` tokens."""
    import torch

    ids = row.ids[prefix.length :]
    first_scored = len(ids) - row.count  # this token is predicted at the position before it
    total, is_greedy, computed = 0.0, True, prefix
    for start in range(0, len(ids) - 1, most):
        stretch = ids[start : min(start + most, len(ids) - 1)]
        predicting = [index for index in range(len(stretch)) if start + index + 1 >= first_scored]
        logits, more = forward_tree(opened, TokenTree.of([stretch]), computed, predicting)
        computed = computed.extended(more)
        if predicting:
            device = logits.device
            tokens = torch.tensor([ids[start + index + 1] for index in predicting], device=device)
            positions = torch.arange(len(predicting), device=device)
            log_p, is_likeliest = _token_scores(logits, positions, tokens)
            total, is_greedy = total + sum(log_p), is_greedy and all(is_likeliest)
    return Likelihood(total, is_greedy)


def _score_padded(scoring: _Scoring, size: int) -> None:
    """Score the missing rows by the model's own attention, in left-padded batches.

    Rows with equal inputs share a forward.
    """
    import torch

    rows = scoring.rows
    rows_of_input: dict[tuple[int, ...], list[int]] = {}
    for row in range(len(rows)):
        rows_of_input.setdefault(tuple(rows[row].ids[:-1]), []).append(row)
    inputs = sorted(rows_of_input, key=len, reverse=True)
    batch_size = 1 if reason_for_single_rows(scoring.opened) else size
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        if all(scoring.missing.isdisjoint(rows_of_input[ids]) for ids in batch):
            continue
        longest = max(rows[row].count for ids in batch for row in rows_of_input[ids])
        batch_logits = last_logits(scoring.opened, batch, longest)
        for ids, logits_KV in zip(batch, batch_logits, strict=True):
            device = logits_KV.device
            for row in rows_of_input[ids]:
                count = rows[row].count
                log_p, is_likeliest = _token_scores(
                    logits_KV[len(logits_KV) - count :],
                    torch.arange(count, device=device),
                    torch.tensor(_scored_tokens(rows[row]), device=device),
                )
                scoring.keep(row, Likelihood(sum(log_p), all(is_likeliest)))
