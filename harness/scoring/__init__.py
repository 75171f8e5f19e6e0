"""Scores a model on tasks: requests, batches, shared prefixes, answers, items, figures. torch inside functions.

`score.score_task` scores a task through lm-eval; `generation.generate` and `likelihood.log_likelihoods` ask the model;
`lm_eval_model` imports lm-eval and torch when it is imported. Methods may use `generation` only.
"""

__all__ = [
    "admission",
    "answer_cache",
    "fidelity",
    "finite",
    "forbidden",
    "generation",
    "greedy",
    "items",
    "likelihood",
    "lm_eval_model",
    "outcomes",
    "parts",
    "plain",
    "prefix_sharing",
    "rounding",
    "sampling",
    "score",
    "vllm_backend",
]
