r"""Trains the embedded teachers `tiny` and `tiny-math`, and their tokenizer.

`harness train-tiny` calls this; the loop is the one that students use. Rows are the tasks' own
training splits. Prompts are trained too, as for any base model. Everything runs on one thread, so
that the same seed gives the same bytes whatever the number of cores.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.contract import Checkpoint, Progress, Split, Task
from harness.data.source import LocalOrHubData
from harness.errors import HarnessError
from harness.models.language_model import LanguageModel
from harness.models.shaping import save_student
from methods.training.loop import fit
from methods.training.rows import TokenRow, encode
from methods.training.settings import LoopSettings, Training
from methods.training.state import TrainingResult
from methods.training.terms import Objective, hard_labels

VOCABULARY = 1024
END, PAD = "<|end|>", "<|pad|>"
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
MAX_TOKENS = 1024


@dataclass(frozen=True)
class EmbeddedTeacherRecipe:
    """How one embedded teacher is trained: rows of each kind, budget and seed."""

    name: str
    problems: int  # word problems with worked answers
    choices: int  # four-choice questions
    seen_tokens: int
    seed: int


RECIPES = (
    EmbeddedTeacherRecipe("tiny", problems=50_000, choices=15_000, seen_tokens=4_600_000, seed=1),
    EmbeddedTeacherRecipe("tiny-math", problems=50_000, choices=600, seen_tokens=5_000_000, seed=2),
)
SETTINGS = LoopSettings(
    learning_rate=0.02,
    batch_size=16,
    micro_batch_size=16,
    warmup_ratio=0.03,
    weight_decay=0.01,
    max_grad_norm=1.0,
    validation_rows=400,
    optimizer="muon",
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that encodes any text; each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|[^\S ]+| ?[^\s\d]+| "), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def train_teacher(
    recipe: EmbeddedTeacherRecipe,
    *,
    tasks: Mapping[str, Task],
    source: LocalOrHubData,
    folder: Path,
    budget: int | None,
    progress: Callable[[Progress], None],
) -> Checkpoint:
    """Train one teacher from random weights; save it in bf16 with its recipe and log.

    `budget` replaces the recipe's number of tokens.
    """
    recipe = replace(recipe, seen_tokens=budget or recipe.seen_tokens)
    workdir = folder.with_name(f".{folder.name}.work")
    workdir.mkdir(parents=True, exist_ok=True)
    _refuse_other_recipe(workdir / "recipe.json", recipe)
    texts = _Texts(tasks["gsm8k-mini"], tasks["mmlu-mini"], source)
    tokenizer = train_tokenizer(
        prompt + completion for prompt, completion in texts.pairs("train", 5_000, 3_000)
    )
    model = random_model(tokenizer, recipe.seed)
    student = LanguageModel(
        model, tokenizer, "cpu", Checkpoint(path=folder, name=recipe.name, digest="")
    )
    result = _train_on_one_thread(student, texts, recipe, workdir, progress)
    teacher = save_student(student, folder, name=recipe.name, dtype=torch.bfloat16, parents=())
    document: dict[str, Any] = {
        "recipe": asdict(recipe),
        "settings": asdict(SETTINGS),
        "spent": asdict(result),
        "torch": torch.__version__,
    }
    text = json.dumps(document, indent=1) + "\n"
    (folder / "training.json").write_text(text, encoding="utf-8")
    _copy_every_25th_step(workdir / "training.jsonl", folder / "training.jsonl")
    shutil.rmtree(workdir)
    return teacher


def random_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a model of the embedded shape with random weights."""
    end_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=end_id, pad_token_id=pad_id)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=end_id, pad_token_id=pad_id
    )
    return model


def _train_on_one_thread(
    student: LanguageModel,
    texts: "_Texts",
    recipe: EmbeddedTeacherRecipe,
    workdir: Path,
    progress: Callable[[Progress], None],
) -> TrainingResult:
    pairs = texts.pairs("train", recipe.problems, recipe.choices)
    random.Random(recipe.seed).shuffle(pairs)
    half = SETTINGS.validation_rows // 2
    # from the first token on: a base model learns its prompts too
    rows = [TokenRow(row.ids, 1) for row in _encoded(student, pairs)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fit(
            student,
            rows=rows,
            validation=_encoded(student, texts.pairs("validation", half, half)),
            objective=Objective(terms=[hard_labels()]),
            settings=SETTINGS,
            training=Training(
                seen_tokens=recipe.seen_tokens,
                seed=recipe.seed,
                workdir=workdir,
                progress=lambda step: progress(
                    replace(step, detail=f"{recipe.name}, {step.detail}")
                ),
            ),
        )
    finally:
        torch.set_num_threads(threads)


def _encoded(student: LanguageModel, pairs: Iterable[tuple[str, str]]) -> list[TokenRow]:
    return encode(student.tokenizer, pairs, longest=MAX_TOKENS)[0]


@dataclass(frozen=True)
class _Texts:
    """The two tasks whose texts the embedded teachers learn."""

    problems: Task
    choices: Task
    source: LocalOrHubData

    def pairs(self, split: Split, problems: int, choices: int) -> list[tuple[str, str]]:
        """Return the first (prompt, completion) pairs of a split, so many of each task."""
        return [
            *_pairs(self.problems, split, self.source, problems),
            *_pairs(self.choices, split, self.source, choices),
        ]


def _pairs(task: Task, split: Split, source: LocalOrHubData, count: int) -> list[tuple[str, str]]:
    return [
        (example.prompt, example.completion)
        for example in islice(task.examples(split, source), count)
    ]


def _refuse_other_recipe(path: Path, recipe: EmbeddedTeacherRecipe) -> None:
    """Refuse to resume a stopped training that has another recipe."""
    text = json.dumps([asdict(recipe), asdict(SETTINGS), SHAPE])
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise HarnessError(
            f"{path.parent} has a stopped training with another recipe; delete that folder and "
            "type the command again"
        )
    path.write_text(text, encoding="utf-8")


def _copy_every_25th_step(source: Path, target: Path) -> None:
    """Copy a training log, with every 25th line and every validation."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = (
        line for number, line in enumerate(lines) if number % 25 == 0 or "validation_ce" in line
    )
    target.write_text("".join(kept), encoding="utf-8")
