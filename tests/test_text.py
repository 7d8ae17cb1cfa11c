"""Laws of vocabularies, corpora, the token store and its batches."""

import collections
import concurrent.futures
import dataclasses
import functools
import http.server
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import install_import_hook

import jaxwalk as jw
from tests.conftest import model_of

with install_import_hook("jaxwalk", "beartype.beartype"):
    from jaxwalk import text
    from jaxwalk.config import ConfigError, TextData
    from jaxwalk.text import _encoding, build, corpora

pytest.importorskip("tokenizers")
datasets = pytest.importorskip("datasets")

STRANGE = (
    "",
    " ",
    "plain\nlines\r\n\tand \n\n  runs of   space \n",
    "naïve Ω 東京 🦜👩‍👩‍👧 e\u0301 \u2028\ufeff",
    "\x00\x00 null, \x7f, \x1c",
    "<begin> Ġ Ċ <|endoftext|> [UNK] '\\xe2'",
    "a\u202eb",
)


def arbitrary(seed, length=400):
    """Random Unicode text: no surrogates, all planes, many spaces and line ends."""
    chance = random.Random(seed)
    points = [c for c in (chance.randrange(0x110000) for _ in range(length)) if not 0xD800 <= c < 0xE000]
    return "".join(chance.choice(" \n\r\tab") if chance.random() < 0.5 else chr(c) for c in points)


LINE = "the walk of a path through embedding space begins at one token vector and goes on"
WORDS = LINE.split()


def stories(n, seed=0):
    """`n` different documents of a few lines."""
    chance = random.Random(seed)
    return [f"{i}: " + " ".join(chance.choices(WORDS, k=chance.randrange(3, 40))) + ".\n" for i in range(n)]


@functools.cache
def bpe(size=310):
    return text.BPEVocabulary.train(stories(50), size)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Nothing is written below the home folder: `datasets` leaves a lock there even for what it only streams."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path):
    """A folder of 60 .txt files, whose order by name is that of `stories(60)`."""
    for i, story in enumerate(stories(60)):
        (tmp_path / "corpus").mkdir(exist_ok=True)
        (tmp_path / "corpus" / f"{i:03}.txt").write_bytes(story.encode())
    return tmp_path / "corpus"


@pytest.fixture
def config(folder, tmp_path):
    return TextData(corpus=str(folder), store=str(tmp_path / "stores"))


def replaced(config, **changes):
    return dataclasses.replace(config, **changes)


def documents_of(side):
    return [side.document(i) for i in range(len(side.starts))]


# Vocabularies.


@pytest.mark.parametrize("vocabulary", [text.ByteVocabulary(), bpe()], ids=["bytes", "bpe"])
def test_every_text_survives_the_round_trip(vocabulary):
    for sample in (*STRANGE, *map(arbitrary, range(20))):
        tokens = vocabulary.encode(sample)
        assert tokens.dtype == np.int32
        assert vocabulary.begin not in tokens
        assert vocabulary.decode(tokens) == sample
        assert vocabulary.decode([vocabulary.begin, *tokens]) == sample
        assert vocabulary.lengths[tokens].sum() == len(sample.encode())
    assert vocabulary.begin == vocabulary.size - 1
    assert vocabulary.decode(jnp.array(vocabulary.encode("jax"))) == "jax"


@pytest.mark.parametrize("vocabulary", [text.ByteVocabulary(), bpe()], ids=["bytes", "bpe"])
def test_what_is_no_text_or_no_token_is_refused(vocabulary):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at character 2"):
        vocabulary.encode("ab\ud83d")
    for wrong in (vocabulary.size, -1):
        with pytest.raises(ValueError, match=rf"from 0 to {vocabulary.size - 1}, got {wrong} at position 1"):
            vocabulary.decode([0, wrong])
        with pytest.raises(ValueError, match="expected ids"):
            vocabulary.symbol(wrong)
    with pytest.raises(ValueError, match=r"expected integers \[N\]"):
        vocabulary.decode([[1, 2]])
    with pytest.raises(ValueError, match=r"expected integers \[N\]"):
        vocabulary.decode([0.5])


@pytest.mark.parametrize("vocabulary", [text.ByteVocabulary(), bpe(), text.SymbolVocabulary(("A", "up"))])
def test_a_vocabulary_is_plain_data(vocabulary):
    again = text.vocabulary_from_dict(json.loads(json.dumps(vocabulary.to_dict())))
    assert again == vocabulary
    assert again.size == vocabulary.size
    assert again.begin == vocabulary.begin
    np.testing.assert_array_equal(again.encode("AupA"), vocabulary.encode("AupA"))


def test_data_that_is_no_vocabulary_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'bytes'"):
        text.vocabulary_from_dict({"kind": "byte"})
    with pytest.raises(ValueError, match="unknown kind"):
        text.vocabulary_from_dict({})
    with pytest.raises(ValueError, match=r"expected the fields \[\], got \['size'\]"):
        text.vocabulary_from_dict({"kind": "bytes", "size": 257})
    with pytest.raises(ValueError, match=r"expected the fields \['symbols'\]"):
        text.vocabulary_from_dict({"kind": "symbols"})
    with pytest.raises(ValueError, match="list of strings"):
        text.vocabulary_from_dict({"kind": "symbols", "symbols": "ABC"})
    word_level = {"model": {"type": "WordLevel", "vocab": {"a": 0}}}
    for broken in ("no json", "[]", "{}", json.dumps(word_level)):
        with pytest.raises(ValueError, match="byte-level BPE"):
            text.vocabulary_from_dict({"kind": "bpe", "tokenizer": broken})
    data = json.loads(bpe().tokenizer)
    del data["model"]["vocab"]["!"]
    with pytest.raises(ValueError, match="byte-level BPE"):
        text.BPEVocabulary(json.dumps(data))


def test_symbols_for_display():
    bytes_, merges = text.ByteVocabulary(), bpe()
    assert [bytes_.symbol(t) for t in (65, 32, 10, 0, 0xE2, 256)] == ["A", "␣", "\\n", "\\x00", "\\xe2", "<begin>"]
    assert merges.symbol(merges.begin) == "<begin>"
    assert {merges.symbol(int(t)) for t in merges.encode(" the")} == {"␣the"}
    assert all(bytes_.symbol(t).isprintable() for t in range(257))


def test_broken_utf8_decodes_to_the_replacement_character():
    assert text.ByteVocabulary().decode([0xE2, 65]) == "�A"


def test_bpe_is_deterministic_even_across_processes():
    assert text.BPEVocabulary.train(stories(50), 310) == bpe()
    script = (
        "import sys; from jaxwalk import text; texts = sys.stdin.read().split('\\0')\n"
        "print(text.BPEVocabulary.train(texts, 310).tokenizer, end='')"
    )
    run = [sys.executable, "-c", script]
    assert subprocess.run(run, input="\0".join(stories(50)), text=True, capture_output=True, check=True).stdout == (
        bpe().tokenizer
    )


def test_bpe_has_the_size_asked_for_or_says_why_not():
    assert bpe().size == 310
    assert len(bpe().encode("the walk of a path")) < 10
    assert text.BPEVocabulary.train([], 257).decode([*range(256)][:3]) == '!"#'
    with pytest.raises(text.CorpusError, match=r"expected 5000 tokens.*Set vocab_size to \d+"):
        text.BPEVocabulary.train(["the the the"], 5000)
    with pytest.raises(ValueError, match="at least 257"):
        text.BPEVocabulary.train(["the"], 256)
    with pytest.raises(ValueError, match="lone surrogate"):
        text.BPEVocabulary.train(["ok", "\ud800"], 300)


def test_bpe_of_a_long_text_in_chunks_is_bpe_of_the_whole(monkeypatch):
    samples = [arbitrary(s, 3000) for s in range(5)] + ["".join(stories(30)), "a \n\nb\n c\n\nd\n" * 50, "x" * 500]
    whole, trained = bpe().encode_all(samples), text.BPEVocabulary.train(samples, 300)
    monkeypatch.setattr(_encoding, "_CHUNK_SIZE", 7)
    monkeypatch.setattr(_encoding, "_GROUP_SIZE", 50)
    assert len(list(_encoding.chunk_text(samples[5]))) > 20
    for tokens, sample in zip(whole, samples, strict=True):
        assert "".join(_encoding.chunk_text(sample)) == sample
        np.testing.assert_array_equal(bpe().encode(sample), tokens)
    assert text.BPEVocabulary.train(samples, 300) == trained


def test_symbol_vocabulary_takes_the_longest_match_and_skips_whitespace():
    vocabulary = text.SymbolVocabulary(("a", "ab", "abc", "c"))
    assert vocabulary.encode("abc  ab\nca").tolist() == [2, 1, 3, 0]
    assert vocabulary.encode("").tolist() == []
    assert vocabulary.begin is None
    assert vocabulary.symbol(2) == "abc"
    tokens = np.random.default_rng(0).integers(0, 4, 100)
    np.testing.assert_array_equal(vocabulary.encode(vocabulary.decode(tokens)), tokens)
    single = text.SymbolVocabulary(("A", "B"))
    assert single.decode([0, 1, 1]) == "ABB"
    assert single.encode("A BB").tolist() == [0, 1, 1]


def test_symbol_vocabulary_refuses_what_it_cannot_encode():
    vocabulary = text.SymbolVocabulary(("red", "green"))
    with pytest.raises(ValueError, match=r"'blue' at character 4.*red green"):
        vocabulary.encode("red blue green")
    with pytest.raises(ValueError, match="from 0 to 1"):
        vocabulary.decode([2])
    for wrong in ((), ("a", "a"), ("a", ""), ("a b",)):
        with pytest.raises(ValueError, match="each distinct"):
            text.SymbolVocabulary(wrong)


# Corpora.


def test_pydoc_is_english_of_about_half_a_megabyte():
    topics = list(text.documents(TextData()))
    assert len(topics) > 70
    assert 4e5 < len("".join(topics)) < 6e5
    assert any("assert" in topic for topic in topics)


def test_local_formats_give_equal_documents(folder, tmp_path):
    expected = stories(60)
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "parquet").mkdir()
    for part in range(2):
        rows = [{"n": i, "body": s} for i, s in enumerate(expected)][part * 30 : (part + 1) * 30]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "jsonl" / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "parquet" / f"{part}.parquet")
    (folder / "notes.md").write_text("left out")
    for corpus in (folder, f"{folder}/*.txt", tmp_path / "jsonl", f"{tmp_path}/parquet/*", f"{tmp_path}/**/*.jsonl"):
        assert list(text.documents(TextData(corpus=str(corpus), column="body"))) == expected
    assert list(text.documents(TextData(corpus=str(folder / "007.txt")))) == expected[7:8]


def test_a_document_is_the_files_exact_text_and_empty_ones_are_none(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo \x00 🦜".encode())
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "d.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "three"}\n')
    assert list(text.documents(TextData(corpus=str(tmp_path)))) == ["\ufeffone\r\ntwo \x00 🦜", "three"]


@pytest.mark.parametrize(("name", "before"), [("a.txt", b"caf"), ("a.jsonl", b'{"text": "ok"}\n{"text": "caf')])
def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path, name, before):
    (tmp_path / name).write_bytes(before + b'\xe9!"}\n')
    with pytest.raises(text.CorpusError, match=rf"{name}: expected UTF-8, got the byte 0xe9 at offset {len(before)}"):
        list(text.documents(TextData(corpus=str(tmp_path))))


def test_broken_files_and_columns_are_named(tmp_path):
    def refused(match, column="text"):
        with pytest.raises(text.CorpusError, match=match):
            list(text.documents(TextData(corpus=str(file), column=column)))

    file = tmp_path / "a.jsonl"
    file.write_text('{"texts": "a", "n": 1}\n')
    refused(r"a.jsonl, row 0: unknown column 'text'. Did you mean 'texts'\? Choices: n, texts")
    refused("expected text in column 'n', got int", column="n")
    file.write_text('{"text": "a"}\n{"text": \n')
    refused("a.jsonl: could not be read as .jsonl")
    file = tmp_path / "a.parquet"
    file.write_bytes(b"no parquet")
    refused("a.parquet: could not be read as .parquet")
    file = tmp_path / "a.csv"
    file.write_text("text\na\n")
    refused(r"expected .txt, .jsonl, .parquet files; of 1 found, none.*corpus='pydoc'")


def test_a_missing_corpus_names_the_offline_choices(tmp_path):
    for missing in ("nothing.txt", f"{tmp_path}/nothing", f"{tmp_path}/*.txt"):
        with pytest.raises(text.CorpusError, match=r"corpus='pydoc'.*local .txt, .jsonl or .parquet"):
            text.open_store(TextData(corpus=missing, store=str(tmp_path / "stores")))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(text.CorpusError, match="got none with any text"):
        text.open_store(TextData(corpus=str(tmp_path / "empty.txt"), store=str(tmp_path / "stores")))
    assert not list(tmp_path.glob("stores/*"))
    choices: tuple[dict[str, Any], ...] = ({"split": "test"}, {"subset": "en"})
    for choice in choices:
        for corpus in ("pydoc", str(tmp_path / "empty.txt")):
            with pytest.raises(text.CorpusError, match="only datasets on the hub"):
                list(text.documents(TextData(corpus=corpus, **choice)))


@pytest.fixture
def online(monkeypatch):
    """The hub's client told that there is a network, with its endpoint still to be set."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    return functools.partial(monkeypatch.setattr, "datasets.config.HF_ENDPOINT")


@pytest.mark.parametrize("streaming", [False, True])
def test_no_network_is_said_soon_with_the_offline_choices(tmp_path, online, monkeypatch, streaming):
    config = TextData(corpus="someone/stories", streaming=streaming, max_tokens=100, store=str(tmp_path / "stores"))
    start = time.monotonic()
    online("http://127.0.0.1:9")
    with pytest.raises(text.CorpusError, match=r"no such file or folder here.*corpus='pydoc'") as refusal:
        text.open_store(config)
    assert "ConnectError" in type(refusal.value.__cause__).__name__
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(text.CorpusError, match=r"corpus='pydoc'.*HF_HUB_OFFLINE=1"):
        text.open_store(config)
    assert time.monotonic() - start < 10


def test_a_hub_that_never_answers_is_given_up_soon(online, monkeypatch):
    monkeypatch.setattr(corpora, "_HUB_TIMEOUT", 0.5)
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        online(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(text.CorpusError, match=r"Timeout.*corpus='pydoc'"):
            list(text.documents(TextData(corpus="someone/stories")))
    assert time.monotonic() - start < 5


def test_a_dataset_that_is_not_on_the_hub_is_said_so(online):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        online(f"http://127.0.0.1:{hub.server_port}")
        with pytest.raises(text.CorpusError, match="RepositoryNotFoundError"):
            list(text.documents(TextData(corpus="someone/stories")))
        hub.shutdown()


@pytest.fixture
def on_the_hub(tmp_path, monkeypatch):
    """200 stories as the dataset "someone/stories", column "story"; returns the rows read from it so far."""
    import huggingface_hub

    source = tmp_path / "hub.jsonl"
    source.write_text("".join(json.dumps({"n": i, "story": s}) + "\n" for i, s in enumerate(stories(200))))
    real, read = datasets.load_dataset, []

    def load_dataset(name, subset, split, streaming):
        assert (name, subset, split) == ("someone/stories", "en", "train")
        loaded = real("json", data_files=[str(source)], split=split, streaming=streaming)
        if not streaming:
            return loaded

        def rows():
            for row in loaded:
                read.append(row["n"])
                yield row

        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    return read


HUB: dict[str, Any] = {"corpus": "someone/stories", "subset": "en", "column": "story"}


def test_hub_datasets_streamed_or_not_are_the_same_documents(on_the_hub):
    assert list(text.documents(TextData(**HUB))) == stories(200)
    assert list(text.documents(TextData(**HUB, streaming=True, max_tokens=1))) == stories(200)
    with pytest.raises(text.CorpusError, match=r"unknown column 'text'.*story"):
        list(text.documents(TextData(**{**HUB, "column": "text"})))


@pytest.mark.parametrize("vocab_size", [257, 300])
def test_a_stream_fills_the_store_up_to_max_tokens(on_the_hub, tmp_path, monkeypatch, vocab_size):
    monkeypatch.setattr(_encoding, "_GROUP_SIZE", 500)
    tokenizer = "bytes" if vocab_size == 257 else "bpe"
    choices = {"tokenizer": tokenizer, "vocab_size": vocab_size, "streaming": True, "validation": 0.25}
    store = text.open_store(TextData(**HUB, **choices, max_tokens=4000, store=str(tmp_path / "stores")))
    assert (len(store.train.tokens), len(store.validation.tokens)) == (3000, 1000)
    if tokenizer == "bytes":
        assert on_the_hub[-1] < 100, "the stream was read on after the store was full"
    # The last document is cut, not left out.
    whole = {tuple(store.vocabulary.encode(s)) for s in stories(200)}
    for side in (store.train, store.validation):
        *before, last = [tuple(d[1:]) for d in documents_of(side)]
        assert set(before) <= whole
        assert any(w[: len(last)] == last for w in whole)


def test_a_stream_that_ends_early_gives_all_it_has(on_the_hub, tmp_path):
    store = text.open_store(TextData(**HUB, streaming=True, max_tokens=10**6, store=str(tmp_path / "stores")))
    assert len(store.train.starts) + len(store.validation.starts) == 200
    read = len(on_the_hub)
    text.open_store(TextData(**HUB, streaming=True, max_tokens=10**6, store=str(tmp_path / "stores")))
    assert len(on_the_hub) == read, "the hub was asked again for a store that is there"


def test_too_small_a_max_tokens_is_refused(config):
    with pytest.raises(text.CorpusError, match="Raise max_tokens"):
        text.open_store(replaced(config, max_tokens=10))


# The store.


def test_the_store_holds_the_documents_each_once(config):
    for choices in ({}, {"tokenizer": "bpe", "vocab_size": 300}):
        store = text.open_store(replaced(config, **choices))
        documents = [*documents_of(store.train), *documents_of(store.validation)]
        assert all(d[0] == store.vocabulary.begin for d in documents)
        assert all(store.vocabulary.begin not in d[1:] for d in documents)
        assert collections.Counter(store.vocabulary.decode(d) for d in documents) == collections.Counter(stories(60))


def test_splits_are_disjoint_by_document_and_never_empty(config, folder):
    side = {}
    for seed in range(3):
        (folder / f"copy{seed}.txt").write_text(stories(60)[seed])
    for share in (0.5, 0.1, 0.001, 0.999):
        store = text.open_store(replaced(config, validation=share))
        train, held_out = (
            {store.vocabulary.decode(d) for d in documents_of(s)} for s in (store.train, store.validation)
        )
        assert train
        assert held_out
        if share in (0.5, 0.1):
            assert not train & held_out
            assert abs(len(held_out) / 60 - share) < 0.2
        side[share] = held_out
    assert side[0.1] < side[0.5], "a document changed sides for no reason"


def test_a_single_document_is_cut_in_two(tmp_path):
    whole = "".join(stories(40))
    (tmp_path / "a.txt").write_text(whole)
    config = TextData(corpus=str(tmp_path / "a.txt"), store=str(tmp_path / "stores"), validation=0.2)
    store = text.open_store(config)
    parts = [store.vocabulary.decode(side.tokens.astype(np.int32)) for side in (store.train, store.validation)]
    assert "".join(parts) == whole
    assert len(parts[0]) == round(0.8 * len(whole))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(text.CorpusError, match="at least 2 characters"):
        text.open_store(config)


def test_a_store_is_made_once(config, monkeypatch):
    lines: list[str] = []
    first = text.open_store(config)
    monkeypatch.setattr(build, "documents", lambda config: pytest.fail("read the corpus again"))
    again = text.open_store(config, report=lines.append)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.train.tokens, first.train.tokens)
    assert not again.train.tokens.flags.writeable


def test_the_fingerprint_is_of_all_that_matters_and_nothing_else(config, folder, tmp_path):
    def fingerprint(**changes):
        return text.open_store(replaced(config, **changes)).fingerprint

    same, bpe_choice = fingerprint(), {"tokenizer": "bpe", "vocab_size": 300}
    moved = folder.rename(tmp_path / "moved")
    assert fingerprint(corpus=str(moved)) == same
    moved.rename(folder)
    different = [
        same,
        fingerprint(validation=0.2),
        fingerprint(max_tokens=500),
        fingerprint(**bpe_choice),
        fingerprint(**{**bpe_choice, "vocab_size": 310}),
        fingerprint(corpus="pydoc"),
    ]
    (folder / "000.txt").write_text("other")
    different.append(fingerprint())
    assert len(set(different)) == len(different)


def test_damaged_stores_are_refused_with_the_remedy(config):
    store = text.open_store(config)

    def refused(match):
        with pytest.raises(text.StoreError, match=f"{match}.*Delete the folder"):
            text.open_store(config)

    for name in ("train.tokens", "validation.starts"):
        file = store.folder / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-2])
        refused(rf"{name}: expected {len(whole)} bytes.*got {len(whole) - 2}")
        file.unlink()
        refused(rf"{name}: expected {len(whole)} bytes.*got none")
        file.write_bytes(whole)
    about = store.folder / "store.json"
    described = about.read_text()
    about.write_text(described[:100])
    refused("store.json: cannot be read")
    about.write_text(described.replace(store.fingerprint, "0" * 64))
    refused("expected the store with fingerprint")
    about.write_text(described.replace('"bytes"\n', '"byte"\n'))
    refused("unknown kind of vocabulary")
    about.write_text(described)
    text.open_store(config)


@pytest.mark.parametrize("choices", [{}, {"tokenizer": "bpe", "vocab_size": 300}], ids=["bytes", "bpe"])
def test_a_failed_build_leaves_nothing(config, folder, tmp_path, choices):
    (folder / "999.txt").write_bytes(b"\xff")
    with pytest.raises(text.CorpusError, match=r"999\.txt: expected UTF-8"):
        text.open_store(replaced(config, **choices))
    assert list(tmp_path.glob("stores/*")) == []


def test_an_interrupted_build_leaves_nothing(config, tmp_path, monkeypatch):
    def interrupted(config):
        yield from stories(5)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text.open_store(config)
    assert list((tmp_path / "stores").iterdir()) == []


def test_bpe_is_trained_on_training_documents_only(config):
    store = text.open_store(replaced(config, tokenizer="bpe", vocab_size=300))
    training = [store.vocabulary.decode(d) for d in documents_of(store.train)]
    assert text.BPEVocabulary.train(training, 300) == store.vocabulary
    assert text.BPEVocabulary.train(stories(60), 300) != store.vocabulary


def test_progress_is_reported(config, monkeypatch):
    monkeypatch.setattr(build, "_REPORT_EVERY", 1000)
    monkeypatch.setattr(_encoding, "_GROUP_SIZE", 500)
    lines: list[str] = []
    text.open_store(config, report=lines.append)
    assert len(lines) >= 3
    assert re.fullmatch(r"text: tokenised [\d,]+ tokens of .*corpus", lines[0])


def test_builders_at_the_same_time_agree(config, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(text.open_store, [config] * 8))
    assert [p.name for p in (tmp_path / "stores").iterdir()] == [stores[0].folder.name]
    for store in stores:
        np.testing.assert_array_equal(store.train.tokens, stores[0].train.tokens)


def test_bytes_are_counted_exactly(config):
    total = sum(len(s.encode()) for s in stories(60))
    for choices in ({}, {"tokenizer": "bpe", "vocab_size": 300}):
        store = text.open_store(replaced(config, **choices))
        assert store.train.bytes + store.validation.bytes == total
        for name in text.SPLITS:
            side = store.split(name)
            decoded = store.vocabulary.decode(side.tokens.astype(np.int32))
            assert side.bytes == len(decoded.encode())
            predicted = len(side.tokens) - len(side.starts)
            assert store.bytes_per_token(name) == side.bytes / predicted
    assert text.open_store(config).bytes_per_token("train") == 1


# Batches.


def slow_segments(side, at, length):
    """Tokens and segments of one window, token by token."""
    number = np.cumsum(np.isin(np.arange(len(side.tokens)), side.starts))
    tokens, segments = np.zeros(length, int), np.zeros(length, int)
    for i in range(length):
        if at + i < len(side.tokens):
            tokens[i] = side.tokens[at + i]
            segments[i] = number[at + i] - number[at] + 1
    return tokens, segments


def test_batches_are_a_pure_function_of_seed_step_and_split(config):
    store, again = text.open_store(config), text.open_store(config)
    seen = set()
    for seed, step, split in [(0, 0, "train"), (0, 1, "train"), (1, 0, "train"), (0, 0, "validation")]:
        tokens, segments = store.batch(seed, step, 8, 33, split)
        assert tokens.shape == segments.shape == (8, 33)
        assert tokens.dtype == segments.dtype == np.int32
        np.testing.assert_array_equal(again.batch(seed, step, 8, 33, split), (tokens, segments))
        seen.add(tokens.tobytes())
    assert len(seen) == 4
    np.testing.assert_array_equal(store.batch(0, 5, 4, 33)[0], store.batch(0, 5, 8, 33)[0][:4])


def test_batches_are_the_same_everywhere_and_for_ever(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i} " for i in range(300)))
    store = text.open_store(TextData(corpus=str(tmp_path / "a.txt"), store=str(tmp_path / "stores")))

    def rows(*which):
        return [store.vocabulary.decode(row) for row in store.batch(*which)[0]]

    # Written down once: a run resumed under another version of numpy must see the batches it would have seen.
    assert rows(0, 7, 3, 12) == [" 132 133 134", "9 240 241 24", " 19 20 21 22"]
    assert rows(2**40, 10**6, 3, 12, "validation") == ["6 277 278 27", " 294 295 296", "94 295 296 2"]


def test_batch_windows_and_segments_are_right_and_reach_everything(config):
    store = text.open_store(config)
    for name, length in [("train", 65), ("train", 300), ("validation", 2)]:
        side = store.split(name)
        packed, places = side.tokens.astype("<u2").tobytes(), set()
        for step in range(5):
            for tokens, segments in zip(*store.batch(0, step, 16, length, name), strict=True):
                at = next(
                    m.start() // 2
                    for m in re.finditer(re.escape(tokens.astype("<u2").tobytes()), packed)
                    if m.start() % 2 == 0 and np.array_equal(segments, slow_segments(side, m.start() // 2, length)[1])
                )
                places.add(at)
        assert len(places) > 30
    side, ends = store.validation, set()
    length = len(side.tokens) - 2
    for step in range(20):
        ends |= {tuple(row) for row in store.batch(0, step, 4, length, "validation")[0]}
    assert ends == {tuple(side.tokens[i : i + length]) for i in range(3)}


def test_a_window_longer_than_the_split_is_padded(config):
    store = text.open_store(config)
    n = len(store.validation.tokens)
    tokens, segments = store.batch(0, 0, 2, n + 10, "validation")
    for row in range(2):
        np.testing.assert_array_equal((tokens[row], segments[row]), slow_segments(store.validation, 0, n + 10))
    assert (segments[:, n:] == 0).all()
    assert (segments[:, :n] > 0).all()


@pytest.mark.parametrize("length", [7, 64, 10**5])
def test_windows_cover_every_token_once(config, length):
    store = text.open_store(config)
    for name in text.SPLITS:
        side = store.split(name)
        batches = list(store.windows(name, length, batch_size=5 if length < 10**5 else 1))
        assert {t.shape for t, _ in batches} == {batches[0][0].shape}
        rows = [row for tokens, segments in batches for row in zip(tokens, segments, strict=True)]
        covered = np.concatenate([t[s > 0] for t, s in rows])
        np.testing.assert_array_equal(covered, side.tokens)
        for i, row in enumerate(rows):
            np.testing.assert_array_equal(row, slow_segments(side, i * length, length))


def test_windows_that_share_a_token_cover_every_step_once(config):
    store = text.open_store(config)
    for name in text.SPLITS:
        side = store.split(name)
        for length in (2, 10, len(side.tokens), len(side.tokens) - 1):
            rows = [r for b in store.windows(name, length, stride=length - 1) for r in zip(*b, strict=True)]
            scored = sum(int(((s[1:] == s[:-1]) & (s[1:] > 0)).sum()) for _, s in rows)
            assert scored == len(side.tokens) - len(side.starts)


def test_windows_can_be_limited_and_refuse_nonsense(config):
    store = text.open_store(config)
    assert sum(int((s[:, 0] > 0).sum()) for _, s in store.windows("train", 9, limit=13, batch_size=4)) == 13
    for wrong in ({"stride": 0}, {"stride": 10}, {"limit": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected at"):
            store.windows("train", 9, **wrong)
    sizes: dict[str, Any] = {"seed": 0, "step": 0, "batch_size": 1, "length": 1}
    for wrong in ({"seed": -1}, {"step": -1}, {"batch_size": 0}, {"length": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected at least"):
            store.batch(**{**sizes, **wrong})
    with pytest.raises(ConfigError, match="Did you mean 'validation'"):
        store.bytes_per_token("valid")


def test_scoring_a_packed_window_is_scoring_its_documents(config):
    store = text.open_store(config)
    model = model_of(vocab_size=store.vocabulary.size, max_length=255)
    (tokens,), (segments,) = store.batch(3, 0, 1, 256, "validation")
    assert segments.max() > 1
    score = jax.jit(lambda tokens, segments: jw.path_log_prob(model, tokens, segments=segments))
    packed = score(tokens, segments)
    # Each piece alone, and padded to one length so that one compiled function scores them all.
    one_by_one = 0
    for s in range(1, segments.max() + 1):
        piece = tokens[segments == s]
        rest = (0, 256 - len(piece))
        one_by_one += score(np.pad(piece, rest), np.pad(np.ones_like(piece), rest))
    np.testing.assert_allclose(packed, one_by_one, rtol=1e-5)


def test_importing_text_imports_nothing_heavy():
    script = "import sys, jaxwalk.text; print([m for m in ('jax', 'datasets', 'tokenizers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_missing_extra_names_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxwalk\[text\]'"):
        text.BPEVocabulary.train(["a"], 257)
    again = text.BPEVocabulary(bpe().tokenizer)
    assert again.decode([0, again.begin]) == "!"
    with pytest.raises(ImportError, match="tokenizers"):
        again.encode("a")


def cut_text(n_words, seed=0):
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


def test_pieces_of_a_text_that_is_looked_at(tmp_path):
    """Every token is in one piece, every piece is of one document and begins with the begin-of-path token."""
    file = tmp_path / "notes.md"
    file.write_text(cut_text(4000))
    vocabulary = text.ByteVocabulary()
    store = text.cut(str(file), vocabulary, longest=100)
    sides = [side.tokens.reshape(len(side.starts), -1) for side in (store.validation, store.train)]
    assert all(side.shape[1] == 65 for side in sides)  # the longest of the lengths that the model walks
    assert all((side[:, 0] == vocabulary.begin).all() for side in sides)
    assert len(sides[0]) == pytest.approx(3 * len(sides[1]), abs=3)
    pieces = [vocabulary.decode(row) for side in sides for row in side]
    whole = file.read_text()
    assert sorted(pieces) == sorted(whole[i : i + 64] for i in range(0, len(whole) - 63, 64))
    assert store.bytes_per_token() == 1
    again = text.cut(str(file), vocabulary, longest=100)
    np.testing.assert_array_equal(again.validation.tokens, store.validation.tokens)
    # Fewer tokens make shorter pieces, down to the shortest; a length may be asked for.
    file.write_text(cut_text(400))
    lengths = [len(text.cut(str(file), vocabulary, 1000, length).validation.document(0)) - 1 for length in (None, 40)]
    assert lengths == [32 if len(file.read_text()) * 3 / 4 >= 64 * 32 else 16, 40]


def test_pieces_lie_in_one_document_each(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(str(i) * 200)
    store = text.cut(str(tmp_path), text.ByteVocabulary(), 64, 16)
    for side in (store.validation, store.train):
        for row in side.tokens.reshape(len(side.starts), -1):
            assert len(set(row[1:].tolist())) == 1


def test_pieces_without_a_begin_of_path_token(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text(cut_text(4000))
    trained = text.BPEVocabulary.train([file.read_text()], 300)
    vocabulary = text.TokenizerVocabulary(trained.tokenizer, None, 300)
    store = text.cut(str(file), vocabulary, 64, 32)
    rows = store.validation.tokens.reshape(-1, 33)
    per_token = np.array([len(vocabulary.spellings[t]) for t in rows[:, 1:].ravel()])  # the first is given
    assert store.bytes_per_token() == pytest.approx(per_token.mean())


@pytest.mark.parametrize(
    ("length", "content", "message"),
    [
        (1, "x" * 900, "length: expected from 2 to 64"),
        (65, "x" * 900, "length: expected from 2 to 64"),
        (None, "x" * 90, "expected at least 10 pieces of 16 tokens, of which one in 4 is for fitting nulls, got 5"),
        (None, "", "got 0"),
    ],
)
def test_texts_that_cannot_be_cut(length, content, message, tmp_path):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(ConfigError, match=message):
        text.cut(str(tmp_path / "a.txt"), text.ByteVocabulary(), 64, length)
    with pytest.raises(ConfigError, match="symbols of a world"):
        text.cut(str(tmp_path / "a.txt"), text.SymbolVocabulary(("a", "b")), 64)
    with pytest.raises(ConfigError, match="no such file"):
        text.cut(str(tmp_path / "b.txt"), text.ByteVocabulary(), 64)
