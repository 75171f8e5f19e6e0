"""Scores a model on tasks: requests, batches, shared prefixes, answers, items, figures. torch
inside functions.

`score.score_task` scores a task through lm-eval. `backend.Backend` is the protocol before
everything that asks a model; `transformers_backend` and `vllm_backend` are its two implementations,
`generation.Writer` and `reading.Reader` parts of the first. `lm_eval_model` and `request_tokens`
import lm-eval and torch when they are imported. Methods may use `backend`, `generation` and
`reading` only.
"""

__all__ = [
    "admission",
    "answer_cache",
    "backend",
    "batch_sizes",
    "decoding",
    "fidelity",
    "finite",
    "forbidden",
    "generation",
    "greedy",
    "items",
    "journalled",
    "likelihood",
    "lm_eval_model",
    "outcomes",
    "parts",
    "plain",
    "plain_reading",
    "prefix_sharing",
    "reading",
    "request_tokens",
    "rounding",
    "sampling",
    "score",
    "stopping",
    "transformers_backend",
    "vllm_backend",
]
