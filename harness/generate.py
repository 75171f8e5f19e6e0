"""Decodes batches of prompts: every row stops for itself, and a finished row leaves the batch.

Used by the scorer, by methods that let a teacher write, and by the stopwatch. In fp32 the batch size does not
change an answer: padding stands on the left, masked, with each row's own positions.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from harness.model import LanguageModel

if TYPE_CHECKING:
    import torch

StopReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt: text cut before its stop string, token count with the ending one."""

    text: str
    tokens: int
    stop: StopReason


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Draw instead of taking the likeliest token. Row r always draws from the stream of (seed, r)."""

    temperature: float
    seed: int


def left_padded(rows: Sequence[Sequence[int]], pad: int, device: str) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
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


def generate(
    opened: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 64,
    sampling: Sampling | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Generation]:
    """Continue each prompt (token ids) until EOS, a stop string or `max_new_tokens`; answers in the given order."""
    stops = _StopRule.of(opened, stop)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    answers: list[Generation | None] = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        for row, ids in _decode_batch(opened, {row: prompts[row] for row in rows}, max_new_tokens, stops, sampling).items():
            answers[row] = stops.finish(ids, max_new_tokens)
        progress(len(rows))
    return [answer for answer in answers if answer is not None]


def _decode_batch(
    opened: LanguageModel, prompts: dict[int, Sequence[int]], max_new_tokens: int, stops: "_StopRule", sampling: Sampling | None
) -> dict[int, list[int]]:
    import torch

    rows = list(prompts)
    written: dict[int, list[int]] = {row: [] for row in rows}
    draws = {row: _stream(sampling, row, opened.device) for row in rows} if sampling else {}
    ids, mask, positions = left_padded(list(prompts.values()), opened.pad_id, opened.device)
    cache: Any = None
    with torch.inference_mode():
        for _ in range(max_new_tokens):
            out = opened.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            cache = out.past_key_values
            logits_BV = out.logits[:, -1].float()
            if sampling:
                weights = torch.softmax(logits_BV / sampling.temperature, dim=-1)
                chosen = torch.stack([torch.multinomial(weights[i], 1, generator=draws[row])[0] for i, row in enumerate(rows)])
            else:
                chosen = logits_BV.argmax(dim=-1)
            for row, token in zip(rows, chosen.tolist(), strict=True):
                written[row].append(token)
            ended = stops.ended([written[row] for row in rows])
            if all(ended):
                break
            if any(ended):  # finished rows leave; the others do not wait for them, nor they for the others
                keep = torch.tensor([i for i, done in enumerate(ended) if not done], device=opened.device)
                rows = [rows[i] for i in keep.tolist()]
                cache.batch_select_indices(keep)
                mask, positions, chosen = mask[keep], positions[keep], chosen[keep]
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones((len(rows), 1))], dim=1)
            positions = positions[:, -1:] + 1
    return written


def _stream(sampling: Sampling, row: int, device: str) -> "torch.Generator":
    import torch

    digest = hashlib.sha256(f"{sampling.seed}/{row}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class _StopRule:
    """When a row is over, decided from that row alone."""

    tokenizer: Any
    ids: frozenset[int]
    strings: tuple[str, ...]
    tail: int  # enough tokens to hold any stop string

    @classmethod
    def of(cls, opened: LanguageModel, stop: Sequence[str]) -> "_StopRule":
        # A stop string that is one special token would be gone from the decoded text: it stops by its id.
        special = {
            text: i for text, i in opened.tokenizer.get_vocab().items() if text in stop and i in set(opened.tokenizer.all_special_ids)
        }
        strings = tuple(text for text in stop if text and text not in special)
        longest = max((len(text.encode()) for text in strings), default=0)
        return cls(opened.tokenizer, opened.eos_ids | frozenset(special.values()), strings, longest + 1)

    def ended(self, rows: list[list[int]]) -> list[bool]:
        over = [row[-1] in self.ids for row in rows]
        if self.strings and not all(over):
            tails = self.tokenizer.batch_decode([row[-self.tail :] for row in rows], skip_special_tokens=True)
            over = [done or any(text in tail for text in self.strings) for done, tail in zip(over, tails, strict=True)]
        return over

    def finish(self, ids: list[int], max_new_tokens: int) -> Generation:
        by_id = ids[-1] in self.ids
        text = self.tokenizer.decode(ids[:-1] if by_id else ids, skip_special_tokens=True)
        cut = min((at for at in (text.find(stop) for stop in self.strings) if at >= 0), default=-1)
        reason: StopReason = "eos" if by_id else "stop" if cut >= 0 else "length"
        return Generation(text[:cut] if cut >= 0 else text, len(ids), reason)
