"""What a GGUF file says of its tokenizer, so that llama.cpp cuts texts as the student's own does.

llama.cpp knows ways of cutting a text by name. Byte-level BPE is written, in the ways that stand in
`_CUTS`; another one is refused by name. No torch.
"""

import json
from pathlib import Path
from typing import Any

from harness.errors import HarnessError
from harness.files.untrusted import MODEL_LIMITS, read_object

# Split patterns of tokenizer.json, as their own files have them.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
# the step before BPE, in the parts that decide -> llama.cpp's name of it
_CUTS = {
    json.dumps([["ByteLevel", True]]): "gpt-2",
    json.dumps([["Digits", True], ["ByteLevel", True]]): "smollm",
    json.dumps([["Split", _LLAMA_3], ["ByteLevel", False]]): "llama-bpe",
    json.dumps([["Split", _QWEN_2], ["ByteLevel", False]]): "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens


def add_tokenizer(writer: Any, folder: Path, label: str, vocabulary: int) -> None:
    """Write a model folder's tokenizer into a `gguf.GGUFWriter`.

    `vocabulary` is the number of rows of the token table; rows without a token become unused ones.
    Raises `HarnessError` for a tokenizer that llama.cpp has no name for.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _no_such_tokenizer(label, "it has no tokenizer.json")
    tokenizer = read_object(path, MODEL_LIMITS)
    model = tokenizer.get("model") or {}
    cut = cut_name(tokenizer)
    if model.get("type") != "BPE" or model.get("byte_fallback") or not cut:
        kind = "byte fallback" if model.get("byte_fallback") else str(model.get("type"))
        raise _no_such_tokenizer(label, f"{kind} whose texts are cut in another way")
    tokens, kinds = _tokens(tokenizer, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = model.get("merges") or []
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in merges])
    _add_special_tokens(writer, folder, tokenizer)


def cut_name(tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name of the way in which a tokenizer.json cuts texts; "" for no name."""
    if tokenizer.get("normalizer") is not None:
        return ""
    step = tokenizer.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    parts = []
    for part in steps:
        kind = part.get("type")
        if kind == "ByteLevel" and not part.get("add_prefix_space"):
            parts.append([kind, bool(part.get("use_regex", True))])
        elif kind == "Digits":
            parts.append([kind, bool(part.get("individual_digits"))])
        elif kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            parts.append([kind, str((part.get("pattern") or {}).get("Regex"))])
        else:
            return ""
    return _CUTS.get(json.dumps(parts), "")


def _no_such_tokenizer(label: str, reason: str) -> HarnessError:
    return HarnessError(
        f"{label}: llama.cpp has no name for its tokenizer ({reason}; known are byte-level BPE as "
        "of GPT-2, SmolLM, Llama 3 and Qwen2); type --form safetensors, and convert that with "
        "llama.cpp's convert_hf_to_gguf.py"
    )


def _tokens(tokenizer: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Return the text and the kind of each token, by id."""
    texts = {int(number): text for text, number in tokenizer["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for added in tokenizer.get("added_tokens") or []:
        number = int(added["id"])
        texts[number] = str(added["content"])
        kinds[number] = CONTROL if added.get("special") else USER_DEFINED
    ids = range(max(vocabulary, max(texts) + 1))
    return (
        [texts.get(number, f"[PAD{number}]") for number in ids],
        [kinds.get(number, UNUSED) for number in ids],
    )


def _add_special_tokens(writer: Any, folder: Path, tokenizer: dict[str, Any]) -> None:
    """Write the special tokens' ids, whether texts begin with one, and the chat template."""
    from harness.models.language_model import tokenizer_of

    opened = tokenizer_of(folder)
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(opened, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(int(number))
    plain = opened("a", add_special_tokens=False)["input_ids"]
    encoded = opened("a")["input_ids"]
    writer.add_add_bos_token(bool(encoded[: len(encoded) - len(plain)]) and encoded != plain)
    writer.add_add_eos_token(bool(encoded) and encoded[-1] == opened.eos_token_id != plain[-1])
    if opened.chat_template:
        writer.add_chat_template(opened.chat_template)
