"""Scores a model on tasks: requests, batches, shared prefixes, answers, items, figures.

`score.score_task` scores a task through lm-eval. `backend.Backend` is the protocol of everything
that computes a model's answers; `transformers_backend`, `vllm_backend` and `llama_cpp_backend`
implement it. `generation.Writer` and `reading.Reader` are parts of the first. `lm_eval_model` and
`request_tokens` import lm-eval and torch when they are imported; the other modules import torch
only inside functions. Methods may use `backend`, `generation` and `reading` only.
"""

__all__ = [
    "admission",
    "answer_cache",
    "backend",
    "batch_sizes",
    "cached_backend",
    "decoding",
    "fidelity",
    "finite",
    "forbidden",
    "generation",
    "greedy",
    "items",
    "likelihood",
    "llama_cpp_backend",
    "lm_eval_model",
    "outcomes",
    "parts",
    "plain",
    "plain_reading",
    "prefix_sharing",
    "prompt_lengths",
    "reading",
    "request_tokens",
    "rounding",
    "sampling",
    "score",
    "shapes",
    "stopping",
    "text_divergence",
    "transformers_backend",
    "vllm_backend",
]
