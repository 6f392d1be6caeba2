"""Tokenizers as people have them: the ids are those of the library that each was made for, whichever engine encodes."""

import json
import random
import sysconfig
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tokenizers import Tokenizer as Reference

from jobs import tokenizer as training
from jobs.prepare import prepared
from jobs.screen import Screen
from jobs.tokenizer import train_tokenizer
from orchestrator.config import RunConfig
from orchestrator.identity import data_identity, refuse_other
from orchestrator.origin import other_tokens
from orchestrator.stop import StopSignal
from tests.workers.test_tiktoken_file import strings
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store
from workers.data import gigatoken_encoder
from workers.data.byte_tokenizer import byte_tokenizer
from workers.data.config import DataConfig
from workers.data.corpus import Corpus, read_index
from workers.data.enough import check_corpora
from workers.data.gigatoken_encoder import GigatokenEncoder, encoder_of
from workers.data.prepare import prepare
from workers.data.tiktoken_file import PATTERNS, tiktoken_of
from workers.data.tokenizer import BYTES
from workers.data.tokenizer_files import open_tokenizer

VOCAB = 1200
END = "<|endoftext|>"


def trained(folder: Path, vocab: int = VOCAB) -> Path:
    """Train one on Python source and text of other scripts, and return its folder."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py")):
        (texts / file.name).write_bytes(file.read_bytes())
    (texts / "others.txt").write_text("日本語の漢字 中文English混合 émigré 😀😀 we'LL 12345\n" * 50)
    train_tokenizer(str(texts), vocab, str(folder / "made"), "text", 0, Screen(quiet=True))
    return folder / "made"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory, bpe) -> Path:
    """A tokenizer.json of 128,000 ids: the small one, and merges of its tokens."""
    parsed = json.loads((bpe / "tokenizer.json").read_text())
    vocab, dice = parsed["model"]["vocab"], random.Random(0)
    tokens = [token for token in vocab if token != END]
    while len(vocab) < 128_000:
        left, right = dice.choice(tokens), dice.choice(tokens)
        if left + right not in vocab and len(left + right) < 40:
            vocab[left + right] = len(vocab)
            parsed["model"]["merges"].append([left, right])
    folder = tmp_path_factory.mktemp("wide")
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    return folder


@pytest.fixture(scope="module")
def kimi(tmp_path_factory) -> Path:
    """A tiktoken file as Moonlight's: ranks, and a config that names the class whose pattern splits the texts."""
    folder = tmp_path_factory.mktemp("kimi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "PATTERN", PATTERNS["kimi"])
        made = trained(folder)
    parsed = json.loads((made / "tokenizer.json").read_text())
    vocab = {token: number - 1 for token, number in parsed["model"]["vocab"].items() if token != END}
    data = tiktoken_of({**parsed, "model": {"vocab": vocab}}, PATTERNS["kimi"])
    assert data is not None
    (folder / "tiktoken.model").write_bytes(data)
    special = {str(len(vocab)): {"content": "[BOS]", "special": True}}
    special[str(len(vocab) + 1)] = {"content": "[EOS]", "special": True}
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "added_tokens_decoder": special,
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def rows() -> list[str]:
    """Texts of every kind, some of which look like special tokens, and are not."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("[b-d]*.py"))[:20]
    texts = [file.read_text() for file in library]
    texts += [text for text in strings(random.Random(1), 3000) if text.strip() and "\0" not in text]
    return [*texts, f"a{END}b", END, "[EOS]", "<|reserved_token_1300|>", "don't 'RE 1234567"]


@pytest.fixture
def data(tmp_path) -> DataConfig:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in rows())
    (tmp_path / "rows.jsonl").write_text(lines)
    return DataConfig(source=f"{tmp_path}/rows.jsonl", prepared_url=f"{tmp_path}/prepared", held_out_fraction=0.1)


def documents_of(corpus: Corpus, end: int) -> list[list[int]]:
    """Return the ids of all documents, without what ends them."""
    found = []
    for shard in (*corpus.train, *corpus.validation):
        ids = np.frombuffer(corpus.store.read(shard.name), corpus.dtype)
        found += [part.tolist() for part in np.split(ids, np.flatnonzero(ids == end) + 1)]
    return sorted(part[:-1] for part in found if part)


def engines_of(corpus: Corpus) -> list[str]:
    return read_index(corpus.store)["engines"]


def no_gigatoken(patch: pytest.MonkeyPatch) -> None:
    def refuse(parsed: dict) -> None:
        raise ImportError("gigatoken")

    gigatoken_encoder._encoder.cache_clear()
    patch.setattr(gigatoken_encoder, "_load", refuse)


@pytest.mark.parametrize(("name", "dtype"), [("bpe", "uint16"), ("wide", "uint32"), ("kimi", "uint16")])
def test_the_ids_are_the_reference_s_on_all_documents_whichever_engine_encodes(
    name, dtype, data, tmp_path, request, monkeypatch
):
    folder = request.getfixturevalue(name)
    config = replace(data, tokenizer=str(folder))
    (fast,) = prepare(config)
    assert (engines_of(fast), fast.dtype) == (["gigatoken"], dtype)
    tokenizer = open_tokenizer(config)
    assert tokenizer.end is not None and tokenizer.begin is None and fast.vocab_size == tokenizer.vocab_size
    if name == "kimi":
        ranks = json.loads(tokenizer.files["tokenizer.json"])["model"]["vocab"]
        letters = gigatoken_encoder.tiktoken_of(json.loads(tokenizer.files["tokenizer.json"]), PATTERNS["kimi"])
        assert letters == (folder / "tiktoken.model").read_bytes()
        from tiktoken.load import load_tiktoken_bpe

        encoding = tiktoken.Encoding(
            "kimi",
            pat_str=PATTERNS["kimi"],
            mergeable_ranks=load_tiktoken_bpe(str(folder / "tiktoken.model")),
            special_tokens={},
        )
        known = [encoding.encode_ordinary(text) for text in rows()]
        assert tokenizer.end == len(ranks) + 1 and tokenizer.vocab_size == len(ranks) + 256
    else:
        reference = Reference.from_file(str(folder / "tokenizer.json"))
        reference.encode_special_tokens = True
        known = [reference.encode(text, add_special_tokens=False).ids for text in rows()]
    assert documents_of(fast, tokenizer.end) == sorted(known)
    if name == "wide":
        return
    no_gigatoken(monkeypatch)
    (slow,) = prepare(replace(config, prepared_url=f"{tmp_path}/slow"))
    assert engines_of(slow) == ["tokenizers"] and slow.content_hash == fast.content_hash


def test_where_a_sample_differs_the_reference_makes_the_whole_shard(bpe, data, tmp_path, monkeypatch):
    """gigatoken is made to err in one letter, which no probe has; the third batch and those after it have it."""
    config = replace(data, tokenizer=str(bpe))
    ids = GigatokenEncoder._ids

    def wrong(self, texts):
        return [found + np.uint32(b"QZQ" in text) for found, text in zip(ids(self, texts), texts, strict=True)]

    with (tmp_path / "rows.jsonl").open("a") as file:
        for _ in range(300):
            file.write(json.dumps({"text": "QZQ " * 2000}) + "\n")
    monkeypatch.setattr(GigatokenEncoder, "_ids", wrong)
    (corpus,) = prepare(config)
    assert engines_of(corpus) == ["tokenizers"]
    tokenizer = open_tokenizer(config)
    expected = tokenizer.encode([text.encode() for text in (*rows(), *["QZQ " * 2000] * 300)])
    assert documents_of(corpus, tokenizer.end) == sorted(found.tolist() for found in expected)


def test_a_tokenizer_is_in_the_folder_decodes_and_is_refused_damaged(bpe, data):
    (corpus,) = prepare(replace(data, tokenizer=str(bpe)))
    tokenizer = corpus.open_tokenizer()
    assert tokenizer.sha256 == corpus.tokenizer
    for text in rows():
        assert tokenizer.decode(tokenizer.encode([text.encode()])[0].tolist()) == text
    file = Path(corpus.url, "tokenizer", "tokenizer.json")
    file.write_text(file.read_text().replace("{1,3}", "{1,2}"))
    with pytest.raises(StorageError, match=r"tokenizer: damaged \(its hash is"):
        corpus.open_tokenizer()


def test_what_would_change_a_text_is_left_out(bpe, tmp_path):
    parsed = json.loads((bpe / "tokenizer.json").read_text())
    parsed["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    parsed["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": END,
    }
    parsed["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    plain, cleaned = (open_tokenizer(DataConfig(tokenizer=str(folder))) for folder in (bpe, tmp_path))
    assert cleaned.sha256 == plain.sha256
    text = "what would be cut after eight tokens, and filled up to sixty-four " * 5
    assert cleaned.encode([text.encode()])[0].tolist() == plain.encode([text.encode()])[0].tolist()


def written(folder: Path, bpe: Path, config: dict | None = None, **changes) -> DataConfig:
    parsed = {**json.loads((bpe / "tokenizer.json").read_text()), **changes}
    (folder / "tokenizer.json").write_text(json.dumps(parsed))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return DataConfig(tokenizer=str(folder))


def added(*tokens: tuple[int, str]) -> list[dict]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [{"id": number, "content": token, "special": True, **flags} for number, token in tokens]


def test_begin_and_end_are_the_tokenizer_s_own_or_what_is_set(bpe, tmp_path):
    specials = added((0, END), (VOCAB, "<s>"), (VOCAB + 1, "</s>"))
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [VOCAB], "tokens": ["<s>"]}},
    }
    config = written(tmp_path, bpe, {"eos_token": {"content": "</s>"}, "bos_token": "<s>"}, added_tokens=specials)

    def ends(config: DataConfig) -> tuple[int | None, int | None]:
        tokenizer = open_tokenizer(config)
        return tokenizer.begin, tokenizer.end

    assert ends(config) == (None, VOCAB + 1), "bos_token alone puts nothing before a text"
    about = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    assert ends(written(tmp_path, bpe, about, added_tokens=specials)) == (VOCAB, VOCAB + 1)
    config = written(tmp_path, bpe, {"eos_token": END}, added_tokens=specials, post_processor=template)
    assert ends(config) == (VOCAB, 0), "its template does"
    assert ends(replace(config, begin_of_document="none", end_of_document="</s>")) == (None, VOCAB + 1)
    assert ends(replace(config, begin_of_document="<s>", end_of_document="none")) == (VOCAB, None)
    hashes = {open_tokenizer(replace(config, end_of_document=end)).sha256 for end in ("", END, "</s>", "none")}
    assert len(hashes) == 3, "what ends documents is part of the tokenizer's hash"
    with pytest.raises(ConfigError, match=r"end_of_document='<eod>' is no token of .*special tokens are <\|endoft"):
        open_tokenizer(replace(config, end_of_document="<eod>"))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"does not say which token ends a document.*set data\.end_of_document"):
        open_tokenizer(written(tmp_path, bpe, added_tokens=specials))


def test_begin_and_end_lie_around_every_document(bpe, data, tmp_path):
    about = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    specials = added((0, END), (VOCAB, "<s>"), (VOCAB + 1, "</s>"))
    named = written(tmp_path, bpe, about, added_tokens=specials).tokenizer
    (corpus,) = prepare(replace(data, tokenizer=named))
    found = documents_of(corpus, VOCAB + 1)
    assert len(found) == len(rows()) and all(part[0] == VOCAB and VOCAB not in part[1:] for part in found)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer.json": "{}"}, "no tokenizer.json: it has no `model`"),
        ({"tokenizer.json": '{"model": {"type": "BPE"'}, "not a JSON object"),
        ({"tokenizer.json": '{"model": {"type": "BPX"}}'}, "tokenizers cannot read it"),
        ({"tokenizer.json": "\x08\x01spiece"}, "is no tokenizer.json and no tiktoken file"),
        ({"tokenizer.model": "\x08\x01spiece"}, "a SentencePiece model becomes a tokenizer.json by transformers"),
        ({"vocab.txt": "a"}, "there is no tokenizer.json, no tiktoken.model and no one .tiktoken file"),
        ({"a.tiktoken": "YQ== 0\n", "b.tiktoken": "YQ== 0\n"}, "no one .tiktoken file"),
        ({"own.tiktoken": "YQ== 0\n"}, "does not say by which pattern"),
    ],
)
def test_what_is_no_tokenizer_is_one_message(tmp_path, files, told):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        open_tokenizer(DataConfig(tokenizer=str(tmp_path)))
    assert told in str(error.value)


def test_ids_that_tokenizers_would_change_are_refused(bpe, tmp_path):
    with pytest.raises(ConfigError, match=r"gives '<s>' the id 1300, and tokenizers gives it 1200"):
        open_tokenizer(written(tmp_path, bpe, {"eos_token": END}, added_tokens=added((0, END), (1300, "<s>"))))


def test_a_missing_tokenizer_is_told_by_its_place(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer='.*nowhere': nothing is there"):
        open_tokenizer(DataConfig(tokenizer=f"{tmp_path}/nowhere"))


def test_an_exported_byte_tokenizer_is_bytes(tmp_path):
    for name, text in byte_tokenizer().items():
        (tmp_path / name).write_text(text)
    assert open_tokenizer(DataConfig(tokenizer=str(tmp_path))) is BYTES


def test_ends_of_bytes_cannot_be_set():
    with pytest.raises(ValueError, match="needs a data.tokenizer other than byte"):
        DataConfig(end_of_document="</s>")


def test_ids_beyond_the_model_s_vocabulary_are_refused_before_anything_is_made(bpe, data, tmp_path):
    config = RunConfig(data=replace(data, tokenizer=str(bpe)))
    with pytest.raises(ConfigError, match=r"has ids up to 1,199; set model\.vocab_size=1280"):
        prepared(config, None, StopSignal(lambda run_id: ""), Screen(quiet=True))
    assert not (tmp_path / "prepared").exists()
    corpora = prepare(config.data)
    with pytest.raises(ConfigError, match=r"has ids up to 1,199"):
        check_corpora(corpora, 16, [1] * len(corpora), VOCAB - 1)
    check_corpora(corpora, 16, [1] * len(corpora), VOCAB)


def test_another_tokenizer_is_another_run(bpe, kimi, data):
    one, other = (replace(data, tokenizer=str(folder)) for folder in (bpe, kimi))
    was, wanted = (data_identity(RunConfig(data=each), prepare(each)) for each in (one, other))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: the checkpoint has '"):
        refuse_other("runs/x", was, wanted, 0)
    assert other_tokens(was, was["data.tokenizer"]) == ""
    assert "was trained with tokenizer" in other_tokens(was, wanted["data.tokenizer"])
    assert "of bytes" in other_tokens(was, "")


def test_tokens_that_somebody_has_made_are_taken_as_they_are(bpe, tmp_path):
    tokenizer = open_tokenizer(DataConfig(tokenizer=str(bpe)))
    ids = np.concatenate([np.append(found, tokenizer.end) for found in tokenizer.encode([t.encode() for t in rows()])])
    ids = np.tile(ids, 12)
    np.save(tmp_path / "tokens.npy", ids.astype(np.uint16))
    config = DataConfig(source=f"{tmp_path}/tokens.npy", tokenizer=str(bpe), prepared_url=f"{tmp_path}/prepared")
    (corpus,) = prepare(replace(config, held_out_fraction=0.5))
    parts = [
        np.concatenate([np.frombuffer(corpus.store.read(shard.name), corpus.dtype) for shard in shards])
        for shards in (corpus.train, corpus.validation)
    ]
    assert sum(map(len, parts)) == len(ids) and np.bincount(np.concatenate(parts)).tolist() == np.bincount(ids).tolist()
    text = len(tokenizer.decode(parts[1].tolist()).encode())
    assert corpus.bytes_per_token == pytest.approx(text / len(parts[1]), rel=1e-4)
    np.save(tmp_path / "tokens.npy", np.append(ids, VOCAB))
    with pytest.raises(ConfigError, match=r"has the id 1200, but the vocabulary has the ids 0 to 1199"):
        prepare(config)
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"tokens\.npy holds tokens, and .*text\.txt does not"):
        prepare(replace(config, source=str(tmp_path), prepared_url="/nowhere"))


def test_encoding_is_gigatoken_s_where_it_can_be(bpe):
    tokenizer = open_tokenizer(DataConfig(tokenizer=str(bpe)))
    encoder = encoder_of(tokenizer)
    assert encoder.engine == "gigatoken" and encoder.encode([]) == []
    empty, text = encoder.encode([b"", b"text"])
    assert len(empty) == 0 and text.tolist() == tokenizer.encode([b"text"])[0].tolist()


def test_a_training_makes_the_same_tokenizer_twice(bpe, tmp_path):
    assert (trained(tmp_path) / "tokenizer.json").read_bytes() == (bpe / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("vocab", "told"), [(256, "257 is the least"), (10**6, "this text has no more than"), (300, "something is there")]
)
def test_a_training_that_cannot_be_is_one_message(tmp_path, vocab, told):
    (tmp_path / "a.txt").write_text("some text, some text")
    if vocab == 300:
        Store(str(tmp_path / "to")).put("x", b"")
    with pytest.raises(ConfigError, match=told):
        train_tokenizer(str(tmp_path / "a.txt"), vocab, str(tmp_path / "to"), "text", 0, Screen(quiet=True))
