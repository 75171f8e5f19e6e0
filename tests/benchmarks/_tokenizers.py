"""Small tokenizers of the families in use, trained on made-up text.

They differ in how words, spaces, rare letters and the ends of texts are marked.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_TEXT = (
    "the red fox walks over a long hill and sees four small houses near river water while children "
    "count green apples under "
    "old trees what is two plus three answer question which of these words comes next nobody knows "
    "why trains run late "
    "naïve café Zürich value number seven eight nine ten result equal more less than half twice"
)
WORDS = _TEXT.split()
VOCABULARY = 420


def corpus() -> Iterator[str]:
    """Yield made-up sentences with digits, punctuation and line breaks, the same every time."""
    import random

    draw = random.Random("corpus")
    for _ in range(600):
        words = [draw.choice(WORDS) for _ in range(draw.randrange(4, 14))]
        number = draw.randrange(1000)
        yield (
            f"Question: {' '.join(words)}?\nA. {number}\nB. {words[0]}\nAnswer: "
            f"{draw.choice('ABCD')}, {words[-1].title()}.\n\n"
        )


def _bpe(**options: Any) -> Any:
    from tokenizers import Tokenizer, models

    return Tokenizer(models.BPE(**options))


def _train(
    tokenizer: Any,
    *,
    special: tuple[str, ...],
    alphabet: tuple[str, ...] = (),
    most: int = VOCABULARY,
) -> Any:
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=most,
        special_tokens=list(special),
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def _byte_level() -> Any:
    from tokenizers import decoders, pre_tokenizers

    tokenizer = _bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _train(
        tokenizer,
        special=("<pad>", "<s>", "</s>"),
        alphabet=tuple(pre_tokenizers.ByteLevel.alphabet()),
    )


def _with_frame(tokenizer: Any, frame: str) -> Any:
    """Let a tokenizer put BOS before or EOS behind every text."""
    from tokenizers import processors

    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>") if token in frame]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    return tokenizer


def _byte_fallback(normalizer: Any) -> Any:
    """Return a tokenizer of pieces marked with `▁`, with a token for each other byte.

    Llama 2 and Gemma have this form.
    """
    from tokenizers import decoders, pre_tokenizers

    special = ("<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)))
    tokenizer = _bpe(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer.normalizer = normalizer
    # no piece holds two words, as sentencepiece trains
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    _train(tokenizer, special=special, most=VOCABULARY + 260)
    tokenizer.pre_tokenizer = None
    return tokenizer, decoders


def _llama_like() -> Any:
    from tokenizers import normalizers

    tokenizer, decoders = _byte_fallback(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _with_frame(tokenizer, "<s> $A")


def _gemma_like() -> Any:
    from tokenizers import normalizers

    tokenizer, decoders = _byte_fallback(normalizers.Replace(" ", "▁"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _with_frame(tokenizer, "<s> $A")


def _metaspace(scheme: str) -> Callable[[], Any]:
    def make() -> Any:
        from tokenizers import decoders, pre_tokenizers

        tokenizer = _bpe(unk_token="<unk>")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
        return _train(tokenizer, special=("<pad>", "<s>", "</s>", "<unk>"))

    return make


def _wordpiece() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte-bpe": _byte_level,
    "byte-bpe-bos": lambda: _with_frame(_byte_level(), "<s> $A"),
    "prepend": _llama_like,
    "metaspace-always": _metaspace("always"),
    "metaspace-first": _metaspace("first"),
    "metaspace-never": _metaspace("never"),
    "byte-fallback": _gemma_like,
    "wordpiece": _wordpiece,
    "appends-eos": lambda: _with_frame(_byte_level(), "$A </s>"),
}


def build_tokenizer(family: str, folder: Path | None = None) -> Any:
    """Return a family's tokenizer as transformers opens it; save it if a folder is given."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    inner = TOKENIZERS[family]()
    special = {"unk_token": "<unk>"} if inner.token_to_id("<unk>") is not None else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        **special,
    )
    if folder is None:
        return tokenizer
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
