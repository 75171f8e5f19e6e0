"""Log-probabilities of given continuations; each distinct token in its context is computed once.

Requests are sorted, and those with a long common beginning share one pass over it. The rest is
packed as a tree: the choices of a question share the question, the questions of a subject share its
examples. The language-model head runs only at the positions that are scored.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
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
from harness.scoring.shapes import without_planning

if TYPE_CHECKING:
    import torch

DEFAULT_PLAIN_ROWS = 16  # of a padded batch, for batch size "auto"
_MAX_LOGITS = 2**26  # of one forward: 256 MiB in float32


def log_likelihoods(
    opened: LanguageModel,
    requests: Sequence[LikelihoodRequest],
    *,
    batch_size: BatchSize = "auto",
    pack: int | None = None,
    known: Mapping[int, Likelihood] | None = None,
    finished: Callable[[int, Likelihood], None] = ignore_report,
    say: Callable[[str], None] = ignore_report,
) -> list[Likelihood]:
    """Score every request; return the answers in the given order.

    `finished` is called for each request as soon as it is computed. On the shared path a forward
    takes `pack` tokens (None: by the device); on the plain path it takes `batch_size` rows. Where
    memory runs out, the number is halved and `say` is called. A request whose answer is `known` is
    not computed but keeps its place: the others are batched as they would be without it, so a
    scoring that resumes after a kill ends with the same digits.
    """
    answers: dict[int, Likelihood] = dict(known or {})

    def keep(index: int, likelihood: Likelihood) -> None:
        if index in answers:  # known, but in the same pack as a missing one
            return
        if not math.isfinite(likelihood.log_probability):
            raise NonFiniteLogits(requests[index].ids[:-1])
        answers[index] = likelihood
        finished(index, likelihood)

    is_plain = bool(reason_for_plain_path(opened))
    if is_plain and requests and (note := single_row_note(opened, writes=False)):
        say(note)
    plain_rows = DEFAULT_PLAIN_ROWS if batch_size == "auto" else batch_size
    size = plain_rows if is_plain else pack or tokens_per_pack(opened)
    score = _score_padded if is_plain else _score_shared
    try:
        with without_planning(opened.device) if is_plain else shared_attention(opened):
            _score_missing(
                lambda missing, size: score(_Scoring(opened, requests, missing, keep), size),
                requests,
                answers,
                size,
                "rows" if is_plain else "tokens",
                say,
            )
    # outside of shared_attention: the text is read again by the model's own attention
    except NonFiniteLogits as problem:
        raise non_finite_error(opened, problem.ids) from None
    return [answers[index] for index in range(len(requests))]


def _score_missing(
    score: Callable[[Set[int], int], None],
    requests: Sequence[LikelihoodRequest],
    answers: Mapping[int, Likelihood],
    size: int,
    unit: str,
    say: Callable[[str], None],
) -> None:
    """Score until every request has an answer; each time memory runs out, halve the `size`."""
    while len(answers) < len(requests):
        try:
            score({index for index in range(len(requests)) if index not in answers}, size)
        except (RuntimeError, MemoryError) as problem:
            if not is_out_of_memory(problem) or size == 1:
                raise
            size_before, size = size, max(1, size // 2)
            say(f"out of memory: {size_before} {unit} at once became {size}")


@dataclass(frozen=True)
class _Scoring:
    """One pass: all requests, the indices of those without an answer, and where answers go."""

    opened: LanguageModel
    requests: Sequence[LikelihoodRequest]
    missing: Set[int]
    keep: Callable[[int, Likelihood], None]


def _score_shared(scoring: _Scoring, most: int) -> None:
    """Score the missing requests in packs of at most `most` tokens.

    Packs are made of all requests; a pack is computed where an answer of it is missing.
    """
    requests = scoring.requests
    order = sorted(range(len(requests)), key=lambda index: list(requests[index].ids))
    ungrouped: list[int] = []
    for members, common in prefix_groups(requests, order):
        # a group that fits into one pack shares its beginning there
        if _tree_size(requests, members) <= most:
            ungrouped += members
        elif not scoring.missing.isdisjoint(members):
            shared_ids = requests[members[0]].ids[:common]
            prefix = compute_prefix(scoring.opened, shared_ids, most=most)
            _score_in_packs(scoring, members, prefix, most)
    _score_in_packs(scoring, ungrouped, KeyValues(), most)


class PrefixGroup(NamedTuple):
    """Requests with a common beginning: their indices, and how many tokens they share."""

    members: list[int]
    common: int


def prefix_groups(requests: Sequence[LikelihoodRequest], order: Sequence[int]) -> list[PrefixGroup]:
    """Cut sorted requests into groups whose common beginning is worth a pass of its own.

    The beginning ends before the input of the first scored position, so that every logit is
    computed after it.
    """
    groups: list[PrefixGroup] = []
    for index in order:
        ids = requests[index].ids
        unscored = len(ids) - requests[index].count - 1
        if groups:
            members, common = groups[-1]
            shared = shared_prefix_length(requests[members[-1]].ids, ids)
            together = min(common, unscored, shared)
            if together >= MIN_SHARED_TOKENS and 2 * together >= len(requests[members[0]].ids):
                members.append(index)
                groups[-1] = PrefixGroup(members, together)
                continue
        groups.append(PrefixGroup([index], unscored))
    return groups


def _tree_size(requests: Sequence[LikelihoodRequest], members: Sequence[int]) -> int:
    """Return how many nodes the tree of some sorted requests has."""
    size, previous = 0, requests[members[0]].ids[:0]
    for index in members:
        ids = requests[index].ids
        size += len(ids) - shared_prefix_length(previous, ids)
        previous = ids
    return size


def _score_in_packs(
    scoring: _Scoring, members: Sequence[int], prefix: KeyValues, most: int
) -> None:
    """Score requests after a prefix, as many at once as a pack of `most` tokens holds."""
    max_logits = max(1, _MAX_LOGITS // int(scoring.opened.text_config.vocab_size))
    pack: list[int] = []
    size, logits = 0, 0
    previous: Sequence[int] = ()
    for index in members:
        request = scoring.requests[index]
        fed = request.ids[prefix.length : -1]
        if len(fed) > most or request.count > max_logits:
            if index in scoring.missing:
                stretch = min(most, max_logits)
                scoring.keep(index, _score_long_text(scoring.opened, request, prefix, stretch))
            continue
        new_tokens = len(fed) - shared_prefix_length(previous, fed)
        if pack and (size + new_tokens > most or logits + request.count > max_logits):
            _score_pack(scoring, pack, prefix)
            pack, size, logits, new_tokens = [], 0, 0, len(fed)
        pack.append(index)
        size, logits, previous = size + new_tokens, logits + request.count, fed
    _score_pack(scoring, pack, prefix)


def _score_pack(scoring: _Scoring, pack: Sequence[int], prefix: KeyValues) -> None:
    """Score the requests of one pack in one forward, unless it has all answers already."""
    import torch

    if scoring.missing.isdisjoint(pack):
        return
    requests = [scoring.requests[index] for index in pack]
    tree = TokenTree.of([request.ids[prefix.length : -1] for request in requests])
    # the nodes that predict the scored tokens of each request
    predicting = [
        path[len(path) - request.count :]
        for request, path in zip(requests, tree.paths, strict=True)
    ]
    nodes = sorted({node for path in predicting for node in path})
    index_of = {node: node_index for node_index, node in enumerate(nodes)}
    logits, _ = forward_tree(scoring.opened, tree, prefix, nodes)
    positions = torch.tensor(
        [index_of[node] for path in predicting for node in path], device=logits.device
    )
    tokens = torch.tensor(
        [token for request in requests for token in _scored_tokens(request)], device=logits.device
    )
    log_p, is_likeliest = _token_scores(logits, positions, tokens)
    start = 0
    for index, request in zip(pack, requests, strict=True):
        end = start + request.count
        scoring.keep(index, Likelihood(sum(log_p[start:end]), all(is_likeliest[start:end])))
        start = end


def _scored_tokens(request: LikelihoodRequest) -> Sequence[int]:
    return request.ids[len(request.ids) - request.count :]


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
    opened: LanguageModel, request: LikelihoodRequest, prefix: KeyValues, most: int
) -> Likelihood:
    """Score a text that is longer than a pack, in stretches of at most `most` tokens."""
    import torch

    ids = request.ids[prefix.length :]
    first_scored = len(ids) - request.count  # this token is predicted at the position before it
    total, is_greedy, computed = 0.0, True, prefix
    for start in range(0, len(ids) - 1, most):
        stretch = ids[start : min(start + most, len(ids) - 1)]
        predicting = [
            offset for offset in range(len(stretch)) if start + offset + 1 >= first_scored
        ]
        logits, more = forward_tree(opened, TokenTree.of([stretch]), computed, predicting)
        computed = computed.extended(more)
        if predicting:
            device = logits.device
            tokens = torch.tensor([ids[start + offset + 1] for offset in predicting], device=device)
            positions = torch.arange(len(predicting), device=device)
            log_p, is_likeliest = _token_scores(logits, positions, tokens)
            total, is_greedy = total + sum(log_p), is_greedy and all(is_likeliest)
    return Likelihood(total, is_greedy)


def _score_padded(scoring: _Scoring, size: int) -> None:
    """Score the missing requests by the model's own attention, in left-padded batches.

    Requests with equal inputs share a row of a batch.
    """
    import torch

    requests = scoring.requests
    indices_of: dict[tuple[int, ...], list[int]] = {}
    for index in range(len(requests)):
        indices_of.setdefault(tuple(requests[index].ids[:-1]), []).append(index)
    inputs = sorted(indices_of, key=len, reverse=True)
    batch_size = 1 if reason_for_single_rows(scoring.opened) else size
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start : start + batch_size]
        if all(scoring.missing.isdisjoint(indices_of[ids]) for ids in batch):
            continue
        longest = max(requests[index].count for ids in batch for index in indices_of[ids])
        batch_logits = last_logits(scoring.opened, batch, longest)
        for ids, logits_KV in zip(batch, batch_logits, strict=True):
            device = logits_KV.device
            for index in indices_of[ids]:
                count = requests[index].count
                log_p, is_likeliest = _token_scores(
                    logits_KV[len(logits_KV) - count :],
                    torch.arange(count, device=device),
                    torch.tensor(_scored_tokens(requests[index]), device=device),
                )
                scoring.keep(index, Likelihood(sum(log_p), all(is_likeliest)))
