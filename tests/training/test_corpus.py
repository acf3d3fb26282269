"""Corpora: which files, in which order, and tokens that decode to the text again."""

from __future__ import annotations

import numpy as np
import pytest
from evermind_manifests.errors import ConfigError, InputError
from tokenizers import Tokenizer

from evermind_pack.training import (
    build_corpus,
    read_documents,
    standard_library,
    stream_windows,
)
from evermind_pack.training.corpus import END_OF_TEXT

TEXTS = [f"def f{i}(x):\n    return x + {i}  # größer\n" * 5 for i in range(20)]


def test_documents_are_the_same_wherever_and_in_whatever_order_they_lie(tmp_path):
    for root, order in (("a", range(20)), ("b/c", reversed(range(20)))):
        for i in order:
            path = tmp_path / root / f"d{i % 3}" / f"m{i}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(TEXTS[i], encoding="utf-8")
    first = read_documents([tmp_path / "a"])
    assert first == read_documents([tmp_path / "b" / "c"])
    assert sorted(first) == sorted(TEXTS)
    limited = read_documents([tmp_path / "a"], max_bytes=1000)
    assert limited == first[: len(limited)]
    assert 1000 <= sum(map(len, limited)) < 1000 + len(max(TEXTS, key=len))


def test_tests_caches_packages_and_other_files_are_left_out(tmp_path):
    for name in ("tests/a.py", "x/__pycache__/b.py", "site-packages/c.py", "d.bin", "e.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    assert read_documents([tmp_path]) == ["e.py"]
    assert read_documents([tmp_path / "d.bin"]) == ["d.bin"]
    with pytest.raises(InputError, match=r"no \.rst file"):
        read_documents([tmp_path], suffixes=[".rst"])


def test_the_standard_library_is_a_corpus_on_every_machine():
    documents = read_documents([standard_library()], max_bytes=200_000)
    assert sum(map(len, documents)) >= 200_000
    assert any("import " in document for document in documents)


def test_bytes_decode_to_the_text():
    corpus = build_corpus(TEXTS)
    assert corpus.tokenizer == "bytes"
    assert corpus.vocab_size == 256
    assert corpus.train.astype(np.uint8).tobytes().decode() == "\n\n".join(TEXTS[:19])
    assert corpus.validation.astype(np.uint8).tobytes().decode() == TEXTS[19]


def test_bpe_decodes_to_the_text_and_is_deterministic():
    corpus = build_corpus(TEXTS, vocab_size=300, validation_fraction=0.2)
    again = build_corpus(TEXTS, vocab_size=300, validation_fraction=0.2)
    assert corpus.tokenizer == again.tokenizer
    assert corpus.sha256 == again.sha256
    tokenizer = Tokenizer.from_str(corpus.tokenizer.decode())
    assert corpus.vocab_size == tokenizer.get_vocab_size() == 300
    decoded = tokenizer.decode(corpus.validation.tolist(), skip_special_tokens=False)
    assert decoded == "".join(text + END_OF_TEXT for text in TEXTS[16:])
    # Held-out text the vocabulary was not trained on, any byte included.
    odd = "\t\x00é漢 <|x|>"
    assert tokenizer.decode(tokenizer.encode(odd).ids) == odd


def test_digest_tells_corpora_apart():
    assert build_corpus(TEXTS).sha256 != build_corpus(TEXTS[:19]).sha256
    assert build_corpus(TEXTS).sha256 != build_corpus(TEXTS, validation_fraction=0.3).sha256


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="256"):
        build_corpus(TEXTS, vocab_size=255)


def test_windows_depend_on_seed_and_step_only_and_cover_the_stream():
    tokens = np.arange(50, dtype=np.int32)
    batch = stream_windows(tokens, seed=1, step=2, batch_size=400, window=8)
    assert batch.shape == (400, 9)
    assert (np.diff(batch, axis=1) == 1).all()
    assert set(batch[:, 0].tolist()) == set(range(42))
    again = stream_windows(tokens, seed=1, step=2, batch_size=400, window=8)
    assert (batch == again).all()
    for seed, step in ((1, 3), (2, 2)):
        other = stream_windows(tokens, seed=seed, step=step, batch_size=400, window=8)
        assert (batch != other).any()
    # The draws are part of a run's identity: they must not change between versions.
    assert batch[:5, 0].tolist() == FIRST_STARTS
    with pytest.raises(InputError, match="more than 50 tokens"):
        stream_windows(tokens, seed=1, step=2, batch_size=1, window=50)


FIRST_STARTS = [13, 40, 3, 20, 19]
