"""The plain path over families: batch sizes change no answer, and NaN or infinity is an error."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _architectures

from harness.errors import CellFailed
from harness.models.language_model import LanguageModel, open_model
from harness.models.resolve import resolve
from harness.scoring.backend import LikelihoodRequest
from harness.scoring.generation import generate, reason_for_plain_path
from harness.scoring.likelihood import log_likelihoods
from harness.scoring.lm_eval_model import HarnessLM
from harness.scoring.plain import decoding_mode, reason_for_single_rows, single_row_note

RECURRENT = (
    "mamba",
    "mamba2",
    "falcon_mamba",
    "rwkv",
    "recurrent_gemma",
    "lfm2",
    "qwen3_next",
    "bamba",
    "jamba",
    "granitemoehybrid",
    "zamba2",
    "falcon_h1",
)
WINDOWED = ("mistral", "gemma2", "gemma3_text", "gpt_neo", "llama4_text", "bloom", "mpt")


@pytest.fixture(scope="module")
def model(embedded):
    """Return a maker of small random models with the embedded tokenizer, each made once."""
    models = {}

    def make(kind, **changes):
        key = (kind, *changes)
        if key not in models:
            random_model = _architectures.random_model(kind, vocabulary=1024, **changes)
            models[key] = LanguageModel(
                random_model, embedded.tokenizer, "cpu", embedded.checkpoint
            )
        return models[key]

    return make


def texts(count=7):
    draw = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, 1000, (length,), generator=draw).tolist()
        for length in (31, 7, 22, 3, 40, 12, 57)[:count]
    ]


def alone(opened, row, count):
    """Return the log-probability of a text's last tokens, from a bare call of the model."""
    with torch.inference_mode():
        logs = torch.log_softmax(opened.model(torch.tensor([row])).logits[0].float(), -1)
    return sum(
        float(logs[position - 1, row[position]]) for position in range(len(row) - count, len(row))
    )


@pytest.mark.parametrize("kind", RECURRENT + WINDOWED)
def test_batch_size_changes_no_log_probability_in_any_family(kind, model):
    opened = model(kind)
    rows = [LikelihoodRequest(row, min(3, len(row) - 1)) for row in texts()]
    truth = [alone(opened, row.ids, row.count) for row in rows]
    for size in (1, 3, 16):
        assert [
            value for value, _ in log_likelihoods(opened, rows, batch_size=size)
        ] == pytest.approx(truth, abs=1e-3)
    assert reason_for_plain_path(opened)


@pytest.mark.parametrize("kind", RECURRENT + WINDOWED)
def test_batch_size_changes_no_answer_in_any_family(kind, model):
    """A row gets transformers' own answer, whatever rows are beside it and whenever they leave."""
    opened = model(kind)
    prompts = texts(5)
    free = [generate(opened, [prompt], max_new_tokens=8)[0] for prompt in prompts]
    theirs = [
        opened.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=sorted(opened.eos_ids),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    assert [list(answer.ids) for answer in free] == theirs
    stop = (free[1].text[1:3],)  # some row ends before the others
    single = [generate(opened, [prompt], max_new_tokens=8, stop=stop)[0] for prompt in prompts]
    for size in (3, 16):
        assert generate(opened, prompts, max_new_tokens=8, stop=stop, batch_size=size) == single
    assert len({answer.tokens for answer in single}) > 1


def test_a_model_that_padding_changes_is_run_one_row_at_a_time_and_says_so(model):
    opened = model("rwkv")
    assert reason_for_single_rows(opened).startswith("padding moves its log-probabilities by")
    lines = []
    log_likelihoods(
        opened,
        [LikelihoodRequest([5, 6, 7], 1), LikelihoodRequest([5, 6], 1)],
        batch_size=16,
        say=lines.append,
    )
    assert (
        lines == [single_row_note(opened, writes=False)]
        and "one row at a time, whatever the batch size" in lines[0]
    )
    assert not decoding_mode(opened).batched and decoding_mode(opened).uses_cache


def test_hybrid_models_are_written_in_batches_where_their_caches_allow_it(model):
    for kind in ("mamba", "lfm2", "qwen3_next", "bamba", "falcon_h1"):
        assert decoding_mode(model(kind)).batched and not single_row_note(model(kind), writes=True)
    # its steps would take the whole text's mask for theirs
    assert not decoding_mode(model("mamba")).masks_steps


def test_a_model_without_a_cache_reads_each_text_anew(model):
    mode = decoding_mode(model("recurrent_gemma"))
    assert not mode.uses_cache and "each step reads the whole text" in mode.reason


def test_fidelity_reads_a_model_that_padding_changes_one_row_at_a_time(model):
    from harness.scoring.fidelity import PromptedAnswer, distribution_reader, read_answers

    opened = model("rwkv")
    answers = [PromptedAnswer(row[:-3], row[-3:]) for row in texts(3)]
    readings = read_answers(distribution_reader(opened), answers)
    for text, reading in zip(answers, readings, strict=True):
        total = sum(float(reading.log_p[index, token]) for index, token in enumerate(text.answer))
        assert total == pytest.approx(alone(opened, text.prompt + text.answer, 3), abs=1e-3)


@pytest.mark.parametrize("kind", ["llama", "lfm2", "gemma2"])
def test_numbers_that_are_none_fail_the_row_and_name_their_module(kind, model):
    opened = LanguageModel(
        _architectures.random_model(kind, vocabulary=1024),
        model(kind).tokenizer,
        "cpu",
        model(kind).checkpoint,
    )
    name = next(
        name
        for name, _ in opened.model.named_modules()
        if name.endswith(("layers.1.mlp.down_proj", "layers.1.feed_forward.w2"))
    )
    with torch.no_grad():
        opened.model.get_submodule(name).weight[2, 3] = float("nan")
    rows = [LikelihoodRequest(row, 2) for row in texts(2)]
    for run in (
        lambda: log_likelihoods(opened, rows),
        lambda: generate(opened, texts(2), max_new_tokens=3),
    ):
        with pytest.raises(CellFailed, match=f"the first one is in the output of {name}"):
            run()


def test_floats_that_overflow_fail_the_row_too(model):
    opened = LanguageModel(
        _architectures.random_model("llama", vocabulary=1024),
        model("llama").tokenizer,
        "cpu",
        model("llama").checkpoint,
    )
    with torch.no_grad():
        opened.model.lm_head.weight[7].fill_(3e38)
    with pytest.raises(
        CellFailed,
        match="NaN or infinity, computed in float32: the first one is in the output of lm_head",
    ):
        log_likelihoods(opened, [LikelihoodRequest([5, 6, 7, 8], 2)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_damaged_checkpoint_is_refused_where_it_is_opened(bad, random_model, tmp_path):
    opened = open_model(random_model)
    with torch.no_grad():
        opened.model.model.layers[1].self_attn.k_proj.weight[3, 1] = bad
    opened.model.save_pretrained(tmp_path / "bad")
    opened.tokenizer.save_pretrained(tmp_path / "bad")
    with pytest.raises(
        CellFailed,
        match=r"bad holds numbers that are not finite: model.layers.1.self_attn.k_proj.weight\[3, "
        r"1\] is",
    ):
        open_model(resolve(str(tmp_path / "bad"), cache=tmp_path))


def test_fidelity_refuses_numbers_that_are_none():
    from harness.scoring.fidelity import _compare_tokens

    good, bad = torch.zeros(3, 9), torch.zeros(3, 9)
    bad[1, 4] = float("nan")
    for pair, whose in (((good, bad), "the student's"), ((bad, good), "the teacher's")):
        with pytest.raises(CellFailed, match=f"{whose} logits at token 2"):
            _compare_tokens(*pair)


_TEXT = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 200,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
_PARTS = {
    "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
}
MULTIMODAL = {
    "gemma3": {
        "text_config": {**_TEXT, "sliding_window": 8, "model_type": "gemma3_text"},
        "mm_tokens_per_image": 4,
        "image_token_index": 1000,
        "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "clip_vision_model"},
        "image_token_index": 1000,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
        "image_token_index": 1000,
        "vision_config": {**_VISION, "model_type": "pixtral"},
    },
    "idefics2": {
        "text_config": {**_TEXT, "model_type": "mistral"},
        "vision_config": {**_VISION, "model_type": "idefics2"},
        "perceiver_config": {
            "hidden_size": 32,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "num_key_value_heads": 1,
            "resampler_head_dim": 8,
        },
    },
    "idefics3": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "idefics3_vision"},
    },
    "smolvlm": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VISION, "model_type": "smolvlm_vision"},
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, **_PARTS, "model_type": "qwen2_vl_text"},
        "image_token_id": 1000,
        "video_token_id": 1001,
        "vision_config": {
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": 14,
        },
    },
}


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_text_model_inside_a_multimodal_class_is_scored_as_lm_eval_scores_it(
    kind, embedded, tmp_path
):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(kind, **MULTIMODAL[kind])
    ).save_pretrained(tmp_path / kind)
    embedded.tokenizer.save_pretrained(tmp_path / kind)
    opened = open_model(resolve(str(tmp_path / kind), cache=tmp_path))
    peer = HFLM(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=1)
    assert (opened.context, opened.vocabulary) == (peer.max_length, 1024) == (200, 1024)
    # the second is cut on the left
    contexts = ["Question: What is 2 and 2?\nAnswer:", "The red fox " * 90]
    choices = [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=(text, word),
            idx=0,
            metadata=("t", item, 1),
        )
        for item, text in enumerate(contexts)
        for word in (" A", " four of them")
    ]
    # theirs forbid the placeholders of pictures: here what the model would like to write
    if kind.startswith(("idefics", "smolvlm")):
        free = HarnessLM(opened).engine.generate(
            [opened.tokenizer(contexts[0])["input_ids"]],
            max_new_tokens=6,
            stop=(),
            progress=print,
            finished=print,
            say=print,
        )
        opened.model.generation_config.bad_words_ids = [[token] for token in free[0].ids]
    settings = {"until": ["\n"], "max_new_tokens": 6}
    requests = [
        Instance(
            request_type="generate_until",
            doc={},
            arguments=(text, settings),
            idx=0,
            metadata=("t", item, 1),
        )
        for item, text in enumerate(contexts)
    ]
    for size in (1, 3):
        ours = HarnessLM(opened, batch_size=size)
        our_scores, their_scores = (
            ours.loglikelihood(choices),
            peer.loglikelihood(choices, disable_tqdm=True),
        )
        assert [score[0] for score in our_scores] == pytest.approx(
            [score[0] for score in their_scores], abs=1e-3
        )
        assert ours.generate_until(requests) == peer.generate_until(requests, disable_tqdm=True)
        assert ours.cut_prompts == 3
