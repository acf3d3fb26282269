"""Text in a browser is cut into the ids that `tokenizers` gives, and comes back the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tokenizers
from evermind_exporters.peer_tokenizer import peer_tokenizer

from evermind_pack.training.corpus import build_corpus
from tests.network.server import Server
from tests.packages import LM_CONFIG, export, random_source

from .browser import Browser
from .site import run

TEXTS = [
    "def main(argv):\n    return  0  # it's we'll THEY'LL don't\n",
    "naïve café, Zürich… 日本語 \U0001f600 \u0301e ½ ٣ x\u00a0y\u0085z\ufeffw \t\r\n\n end  ",
    "a<|endoftext|>b 12345 __init__ <|endo",
    "",
]


def test_byte_pairs(tmp_path: Path, serve: Callable[..., Server], chromium: Browser) -> None:
    """A trained vocabulary and a peer's, which differ in how text is cut; malformed bytes last."""
    trained = build_corpus([Path(__file__).read_text(), "naïve café"], vocab_size=420).tokenizer
    assert isinstance(trained, bytes)
    own = tokenizers.Tokenizer.from_buffer(trained)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {token: number for number, token in enumerate([*sorted(alphabet), "he", "Ġt", "Ġthe"])}
    peer = peer_tokenizer(vocab, [("h", "e"), ("Ġ", "t"), ("Ġt", "he")])
    framed = framed_byte_level().to_str().encode()
    for number, data in enumerate([trained, peer, framed]):
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
        config = LM_CONFIG | {"vocabSize": tokenizer.get_vocab_size()}
        package = export(
            random_source("evermind-lm", config, tokenizer=data), tmp_path / f"p{number}"
        )
        page = chromium.page(serve(package).url + "index.html", context=chromium.new_context())
        found = run(
            page,
            """
            const pack = await open();
            const ids = await Promise.all(texts.map((text) => pack.encode(text)));
            const bare = await Promise.all(
              texts.map((text) => pack.encode(text, { special: false })));
            let made = [], written = '';
            for await (const piece of pack.generate(texts[0], { maxNewTokens: 24, temperature: 2 }))
              { made.push(piece.token); written += piece.text; }
            return { ids, bare, made, written };
            """,
            texts=TEXTS,
        )
        expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
        assert found["bare"] == expected
        assert found["ids"] == [tokenizer.encode(text).ids for text in TEXTS]
        raw = b"".join(_bytes_of(tokenizer, token) for token in found["made"])
        assert found["written"] == raw.decode(errors="replace")
    assert own.token_to_id("<|endoftext|>") is not None


def framed_byte_level() -> tokenizers.Tokenizer:
    """As Llama 3 has it, with a bos and, for the test, an end."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=True))
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()] * 2, trainer)
    processors = tokenizers.processors
    frame = processors.TemplateProcessing(
        single="<s> $A </s>", pair="$A $B", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), frame])
    return tokenizer


def _bytes_of(tokenizer: tokenizers.Tokenizer, token: int) -> bytes:
    """A token's bytes, from GPT-2's printable stand-ins."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = {chr(byte): byte for byte in prints}
    hidden = [byte for byte in range(256) if byte not in prints]
    stand_ins |= {chr(256 + number): byte for number, byte in enumerate(hidden)}
    text = tokenizer.id_to_token(token)
    if text.startswith("<|"):
        return text.encode()
    return bytes(stand_ins[one] for one in text)
