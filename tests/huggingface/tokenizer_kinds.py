"""Small tokenizers of the kinds that checkpoints have, trained on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? It's 2026; they'll see 1234 of 567.",
    "def main(argv):\n    return {key: value for key, value in argv.items()}\n\n\n",
    "Ein Bär überquert die Straße; naïve café, Zürich, Ελληνικά, Привет, мир!",
    "日本語のテキスト、中文文本。한국어 문장입니다.",
    "مرحبا بالعالم שלום עולם",
    "emoji 😀👍🏽👩‍👩‍👧‍👦 and symbols ½ ≠ ∑ → ™",
    "user assistant system tool answer question hello world please",
] * 4

#: Prompts that tokenizers stumble over.
TEXTS = [
    "",
    " ",
    "   ",
    "hello world",
    " hello",
    "hello ",
    "  hello   world  ",
    "\n",
    "\n\n\nhello\n\n",
    "a\r\nb\rc\td",
    "don't they'll WE'VE I'm 12345678 3.14159",
    "e\u0301 \u00e9 a\u0300\u0301\u0302 \u1e9b\u0323",
    "\U0001f600\U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "日本語のテキスト、한국어 中文 ｆｕｌｌｗｉｄｔｈ ﬁne",
    "مرحبا بالعالم \u202bשלום\u202c עולם \u0661\u0662",
    "\x00\x01\x1b[31m\x7f\x85",
    "\ufeffbom \u00a0nbsp\u2003em\u3000wide \u200bzero\u2060",
    "\u2581metaspace \u0120stand-in",
    "<s>hello</s>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|> <|im_end|><|im_end",
    " <s> x</s> y",
    "[CLS] word [SEP] [MASK]",
    "\U00010348\U0001d54f\U000e0041",
    "x" * 300,
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 नमस्ते \u0915\u094d\u0937",
    "tab\tand\vvertical\fform",
    "\ufffd replacement",
]

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _train(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _begin(tokenizer: Tokenizer, single: str = "<s> $A") -> Tokenizer:
    used = [part for part in single.split() if part != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        pair=f"{single} $B",
        special_tokens=[(one, tokenizer.token_to_id(one)) for one in used],
    )
    return tokenizer


def byte_level() -> Tokenizer:
    """As Llama 3 has it: its own pattern, a bos."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _train(tokenizer, trainer)
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), _begin(tokenizer).post_processor]
    )
    return tokenizer


def plain_byte_level() -> Tokenizer:
    """As OLMo and Qwen have it: NFC, nothing put around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|padding|>", *SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _train(tokenizer, trainer)


def metaspace_bpe() -> Tokenizer:
    """As Llama 2 and Mixtral have it: SentencePiece's BPE, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    _train(tokenizer, trainer)
    # Bytes are ordinary tokens: their names in a text are text.
    raw = json.loads(tokenizer.to_str())
    raw["added_tokens"] = [one for one in raw["added_tokens"] if one["content"] in SPECIAL]
    return _begin(Tokenizer.from_str(json.dumps(raw)))


def unigram() -> Tokenizer:
    """As T5 and its like have it: SentencePiece's unigrams."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return _begin(_train(tokenizer, trainer), "$A </s>")


def word_piece() -> Tokenizer:
    """As BERT has it: lower case, words in pieces, a frame around the text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SPECIAL]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    return _begin(_train(tokenizer, trainer), "[CLS] $A [SEP]")


def cut_and_padded() -> Tokenizer:
    """One whose file says to cut and to pad, as some do that were used for training."""
    tokenizer = byte_level()
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


def with_added() -> Tokenizer:
    """Tokens that were added later, with what may be around them."""
    tokenizer = plain_byte_level()
    tokenizer.add_tokens([AddedToken("hello", single_word=True), AddedToken("<tool>", lstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True, normalized=False)])
    return tokenizer


#: name → (how it is made, the model it belongs to, tokenizer_config.json).
KINDS: dict[str, tuple[Callable[[], Tokenizer], str, dict[str, Any]]] = {
    "byte-level": (
        byte_level,
        "phimoe",
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
    ),
    "olmo": (plain_byte_level, "olmoe", {"tokenizer_class": "GPTNeoXTokenizer"}),
    "qwen": (
        plain_byte_level,
        "qwen3_moe",
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None},
    ),
    "metaspace-bpe": (
        metaspace_bpe,
        "mixtral",
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": {"content": "<s>", "__type": "AddedToken"},
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "legacy": False,
        },
    ),
    # Where there is a tokenizer.json, transformers takes no bos from the configuration.
    "bos-by-config": (
        plain_byte_level,
        "mixtral",
        {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"},
    ),
    "unigram": (unigram, "mixtral", {"unk_token": "<unk>", "eos_token": "</s>"}),
    "word-piece": (word_piece, "granitemoe", {"unk_token": "[UNK]", "cls_token": "[CLS]"}),
    "cut-and-padded": (cut_and_padded, "mixtral", {"bos_token": "<s>"}),
    "added": (with_added, "mixtral", {"additional_special_tokens": ["<|im_start|>", "<|new|>"]}),
    "no-config": (byte_level, "deepseek_v3", {}),
}


def write_kind(folder: Path, kind: str) -> Path:
    """A checkpoint folder without weights: tokenizer files and config.json."""
    make, model_type, config = KINDS[kind]
    folder.mkdir(parents=True, exist_ok=True)
    make().save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder
