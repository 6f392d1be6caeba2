"""Conversations from files to batches: whole, once, and learned where the assistant speaks."""

import gzip
import json
import pickle
import random
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.chats import CHATML, CONVERSATIONS, LLAMA_3, many, said, tokenizer, write
from workers.common.errors import ConfigError, StorageError
from workers.data import prepare as prepare_module
from workers.data.chat import messages_of
from workers.data.chat_encoder import encode
from workers.data.config import DataConfig, SourceConfig
from workers.data.conversations import PackedSplit
from workers.data.corpus import CHAT_FORMAT, FORMAT, read_index
from workers.data.docstrings import conversations
from workers.data.ends import DocumentEnds
from workers.data.enough import check_corpora, told
from workers.data.packing import LEFT_OUT, Packing, best_fit
from workers.data.prepare import make_group, prepare, works_of
from workers.data.tokenizer_files import open_template, open_tokenizer
from workers.objective import IGNORED, batch_of


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("chatml"), CHATML, "<|im_end|>")


def config_of(folder, source, **settings) -> DataConfig:
    named = {} if settings.get("sources") else {"source": str(source)}
    return DataConfig(
        prepared_url=f"{folder}/data", **{"held_out_fraction": 0.2, "format": "chat", **named, **settings}
    )


@lru_cache
def opened(config: DataConfig):
    return open_template(config, made := open_tokenizer(config)), made


def encoded(config: DataConfig, messages):
    return encode(*opened(config), messages_of(messages))


# -- packing -----------------------------------------------------------------------------------------------------------


def plainly(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as it is defined: each sequence is looked at for each document.

    Of those with the same room it is the one that came to have it last.
    """
    found, rooms, since = [LEFT_OUT] * len(lengths), [], []
    for turn, document in enumerate(sorted(range(len(lengths)), key=lambda number: -lengths[number])):
        if lengths[document] > capacity:
            continue
        fitting = [(room, -since[number], number) for number, room in enumerate(rooms) if room >= lengths[document]]
        if not fitting:
            fitting = [(capacity, 0, len(rooms))]
            rooms.append(capacity)
            since.append(0)
        found[document] = number = min(fitting)[2]
        rooms[number], since[number] = rooms[number] - lengths[document], turn
    return found


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 40))
def test_packing_is_best_fit_decreasing(lengths, capacity):
    found = best_fit(np.array(lengths, np.int64), capacity)
    assert found.tolist() == plainly(lengths, capacity)


@given(st.lists(st.lists(st.integers(1, 30), max_size=30), max_size=4), st.integers(1, 30))
def test_every_document_lies_whole_in_one_sequence(shards, capacity):
    packing = Packing([np.array(lengths, np.int64) for lengths in shards], capacity)
    ends = np.cumsum([length for lengths in shards for length in lengths]).tolist()
    whole = {*zip([0, *ends[:-1]], ends, strict=True)} if ends else set()
    samples = [packing.documents(sample) for sample in range(packing.num_samples)]
    placed = [document for sample in samples for document in sample]
    fitting = {(start, stop) for start, stop in whole if stop - start <= capacity}
    assert len(placed) == len({*placed}) and {*placed} == fitting
    assert all(sum(stop - start for start, stop in sample) <= capacity and sample for sample in samples)
    assert packing.too_long == len(whole) - len(fitting) and packing.num_documents == len(placed)
    assert packing.num_tokens == sum(stop - start for start, stop in placed)
    with pytest.raises(IndexError):
        packing.documents(packing.num_samples)


def test_conversations_of_usual_lengths_are_packed_tightly():
    """In one pass: nothing goes through all sequences for each of them."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(6, 1, 100_000).astype(np.int64) + 2, 4097)
    found = best_fit(lengths, 4097)
    assert found.max() + 1 <= 1.01 * lengths.sum() / 4097


# -- from files to batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte", "chatml"])
def test_an_epoch_has_every_conversation_whole_and_once(tmp_path, chatml, name, monkeypatch):
    """Over several shards, with one that fills a sequence to the last target and, of two tokens more, one left out."""
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 1)
    settings = {} if name == "byte" else {"tokenizer": str(chatml)}
    rows, files = many(60), []
    for number in range(3):
        files.append(write(tmp_path / f"texts/{number}.jsonl", rows[number::3]))
    config = config_of(tmp_path, tmp_path / "texts", **settings)
    (corpus,) = prepare(config)
    assert len(corpus.train) == 3
    lengths = sorted({len(encoded(config, messages).ids) for messages in rows})
    for seq_len in (lengths[-1] - 1, lengths[-2] - 1, 4 * lengths[-1]):
        seen, long = [], 0
        for shards in (corpus.train, corpus.validation):
            split, ends = PackedSplit(corpus, shards, seq_len), DocumentEnds(corpus, shards)
            long += split.packing.too_long
            for sample in range(split.num_samples):
                tokens, counts, documents = split.sample(sample), split.counts(sample), split.documents(sample)
                assert tokens.shape == counts.shape == documents.shape == (seq_len + 1,)
                for number, (start, stop) in enumerate(split.ranges(sample)):
                    (stretch,) = ends.stretches(start, stop)
                    assert (stretch.start, stretch.stop) == (start, stop), "not cut"
                    where = documents == number
                    row = rows[int(stretch.file[-7]) :: 3][stretch.row - 1]
                    alone = encoded(config, row)
                    assert (
                        tokens[where].tolist() == alone.ids.tolist() and counts[where].tolist() == alone.counts.tolist()
                    )
                    seen.append(json.dumps(row))
                empty = documents == len(split.ranges(sample))
                assert not counts[empty].any() and not tokens[empty].any()
        left_out = [row for row in rows if len(encoded(config, row).ids) > seq_len + 1]
        assert long == len(left_out) and sorted(seen) == sorted(json.dumps(row) for row in rows if row not in left_out)


def test_nothing_counts_but_what_the_assistant_says_in_its_own_conversation(tmp_path):
    """Not the first token of a conversation, which the one before it would have to predict, and nothing of the rest."""
    config = config_of(tmp_path, write(tmp_path / "chat.jsonl", many(40)))
    (corpus,) = prepare(config)
    split = PackedSplit(corpus, corpus.train, 256)
    for sample in range(split.num_samples):
        tokens, counts, documents = split.sample(sample), split.counts(sample), split.documents(sample)
        batch = batch_of(*(torch.from_numpy(one)[None] for one in (tokens, counts, documents.astype(np.int32))))
        answers = b""
        for start, stop in split.ranges(sample):
            place = sum(end - begin for begin, end in split.ranges(sample) if begin < start)
            text = bytes(tokens[place : place + stop - start].tolist()).decode()
            for part in text.split("\0")[:-1]:
                answers += part.rpartition("Assistant:\n")[2].encode() + b"\0"
        learned = batch.targets[batch.targets != IGNORED]
        assert bytes(learned.tolist()) == answers
        assert batch.targets[batch.targets != IGNORED].equal(torch.from_numpy(tokens)[1:][batch.targets[0] != IGNORED])


def test_whoever_makes_the_groups_in_whichever_order_makes_the_same(tmp_path, chatml, monkeypatch):
    monkeypatch.setattr(prepare_module, "GROUP_BYTES", 1)
    for number in range(5):
        write(tmp_path / f"texts/{number}.jsonl", many(50)[number::5])
    found = []
    for seed in (0, 1):
        config = config_of(tmp_path / str(seed), tmp_path / "texts", tokenizer=str(chatml))
        (work,) = works_of(config)
        groups = list(work.groups)
        random.Random(seed).shuffle(groups)
        for group in groups[:3]:
            make_group(work, group)
        (corpus,) = prepare(config)
        found.append({name: corpus.store.read(name) for name in corpus.store.names("") if "." in name})
    assert found[0] == found[1]
    assert {name.rpartition(".")[2] for name in found[0]} == {"json", "bin", "sums", "ends", "counts"}
    assert sum(name.startswith("train") for name in found[0]) == 5 * 4
    assert read_index(corpus.store)["format"] == CHAT_FORMAT


@pytest.mark.parametrize("kind", ["gz", "zst", "parquet", "arrow", "field"])
def test_conversations_are_the_same_however_they_are_kept(tmp_path, kind):
    """Of rows that have None in some keys, too, as tables do."""
    plain = write(tmp_path / "plain.jsonl", many(30))
    settings = {}
    if kind in ("parquet", "arrow"):
        table = pa.table({"number": [*range(30)], "messages": [[{**m, "name": None} for m in row] for row in many(30)]})
        other = tmp_path / f"other.{kind}"
        if kind == "parquet":
            pq.write_table(table, other, row_group_size=7)
        else:
            with pa.OSFile(str(other), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table, 7)
    elif kind == "field":
        other = tmp_path / "other.jsonl"
        other.write_text("".join(json.dumps({"a": {"chat": row}}) + "\n" for row in many(30)))
        source = SourceConfig(name="x", urls=(str(other),), format="chat", field="a.chat")
        settings, other = {"sources": (source,), "format": "auto"}, DataConfig().source
    else:
        other = tmp_path / f"other.jsonl.{kind}"
        pack = gzip.compress if kind == "gz" else zstandard.ZstdCompressor().compress
        other.write_bytes(pack(plain.read_bytes()))
    (ours,), (theirs,) = prepare(config_of(tmp_path, plain)), prepare(config_of(tmp_path, other, **settings))
    assert theirs.content_hash == ours.content_hash and theirs.url != ours.url


def test_another_template_is_other_tokens_and_text_is_as_it_was(tmp_path, chatml):
    (tmp_path / "own.jinja").write_text(LLAMA_3)
    plain = write(tmp_path / "plain.jsonl", many(20))
    configs = [config_of(tmp_path, plain, tokenizer=str(chatml), chat_template=one) for one in ("", "plain")]
    configs.append(config_of(tmp_path, plain, tokenizer=str(chatml), chat_template=str(tmp_path / "own.jinja")))
    hashes = {prepare(config)[0].content_hash for config in configs}
    assert len(hashes) == 3
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(200)))
    (text,) = prepare(config_of(tmp_path, tmp_path / "text.jsonl", format="jsonl"))
    index = read_index(text.store)
    assert index["format"] == FORMAT and "counted" not in index and all("counts" not in one for one in index["train"])


def test_a_damaged_mask_is_refused(tmp_path):
    (corpus,) = prepare(config_of(tmp_path, write(tmp_path / "chat.jsonl", many(20))))
    file = corpus.store.path(corpus.train[0].beside("counts"))
    with open(file, "r+b") as opened:  # noqa: PTH123
        opened.write(b"\xff")
    with pytest.raises(StorageError, match=r"train-00000.counts: damaged"):
        PackedSplit(corpus, corpus.train, 256).counts(0)


def test_bits_per_byte_are_of_what_the_assistant_says(tmp_path, chatml):
    config = config_of(tmp_path, write(tmp_path / "chat.jsonl", many(60)), tokenizer=str(chatml))
    (corpus,) = prepare(config)
    split = PackedSplit(corpus, corpus.validation, 2000)
    counted = sum(int(split.counts(sample).sum()) for sample in range(split.num_samples))
    held_out = [split.ranges(sample) for sample in range(split.num_samples)]
    assert sum(map(len, held_out)) and 1.0 < corpus.bytes_per_token < 10.0
    index = read_index(corpus.store)
    assert index["counted"]["validation"] == counted
    assert corpus.bytes_per_token == index["bytes"]["validation"] / counted


def test_docstrings_are_conversations_with_known_answers(tmp_path):
    source = b'''
def area(width, height):
    """Return the area of
    a rectangle.

    More."""
class A:
    def close(self):
        "Close it."
    def nothing(self): pass
'''
    first, second = conversations(source)
    assert [one["role"] for one in first] == ["system", "user", "assistant", "user", "assistant"]
    assert first[1]["content"] == "What does area(width, height) do?"
    assert (first[2]["content"], first[4]["content"]) == ("Return the area of a rectangle.", "width, height")
    assert [one["content"] for one in second[1:]] == ["What does close() do?", "Close it."]
    assert list(conversations(b"def f(:")) == [] and list(conversations(b"\0")) == []
    (tmp_path / "half.py").write_text('def f(x):\n    "a \\ud800"\n')
    with pytest.raises(ConfigError, match=r"half.py:1: half a character"):
        prepare(config_of(tmp_path, tmp_path / "half.py"))
    (tmp_path / "a.py").write_bytes(source)
    (corpus,) = prepare(config_of(tmp_path, tmp_path / "a.py", held_out_fraction=0.01))
    assert corpus.documents == 2


# -- bad input ---------------------------------------------------------------------------------------------------------

GOOD = CONVERSATIONS[0]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ([said("user", "a"), said("user", "b")], "no message is the assistant's, so there is nothing to learn from"),
        ("Hi", "field 'messages': a text, not a list of messages"),
        ([said("user", "a"), said("bot", "b")], "messages[1] has role 'bot'"),
        ([said("user", "a"), {"role": "assistant"}], "messages[1] has no content"),
        ([said("user", "a\ud800"), said("assistant", "b")], "half a character (\\ud800) is in it"),
        (
            [said("user", "a"), said("user", "b"), said("assistant", "c")],
            "template refuses it: two of the user",
        ),
        ([said("user", "<|eot_id|>"), said("assistant", "c")], "messages[0] has '<|eot_id|>' in it"),
    ],
)
def test_a_bad_conversation_is_told_with_its_place_and_left_out_where_it_may_be(tmp_path, row, told):
    folder = tokenizer(tmp_path / "tokenizer", LLAMA_3, "<|eot_id|>")
    file = write(tmp_path / "chat.jsonl", [*many(20), row])
    with pytest.raises(ConfigError) as raised:
        prepare(config_of(tmp_path, file, tokenizer=str(folder)))
    assert f"{file}:21: " in str(raised.value) and told in str(raised.value) and raised.value.exit_code == 2
    assert str(raised.value).startswith(f"data.source={str(file)!r}: 1 document(s) cannot be read")
    (corpus,) = prepare(config_of(tmp_path, file, tokenizer=str(folder), max_bad_documents=1))
    assert corpus.documents == 20 and read_index(corpus.store)["bad"] == 1


def test_rows_without_messages_name_their_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "b": 1}\n')
    with pytest.raises(ConfigError, match=r"a.jsonl:1: no field 'messages'; its fields are text, b"):
        prepare(config_of(tmp_path, tmp_path / "a.jsonl"))
    pq.write_table(pa.table({"messages": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"column 'messages' is of type string, not of lists"):
        prepare(config_of(tmp_path, tmp_path / "a.parquet"))


def test_a_conversation_that_is_longer_than_the_sequence_is_refused_or_left_out_and_told(tmp_path):
    rows = [*many(40), [said("user", "a"), said("assistant", "b" * 500)]]
    (corpus,) = prepare(config_of(tmp_path, write(tmp_path / "chat.jsonl", rows)))
    with pytest.raises(ConfigError) as raised:
        check_corpora((corpus,), 400, [1], 256)
    longest = len(encoded(config_of(tmp_path, "x"), rows[-1]).ids)
    for part in ("1 of 41 conversation(s) is longer than train.seq_len=400", f"the longest has {longest}",
                 "data.max_long_conversations=0; none is cut", "set data.max_long_conversations=1"):  # fmt: skip
        assert part in str(raised.value)
    check_corpora((corpus,), 400, [1], 256, most_long=1)
    assert "and left out" in told(corpus, 400) and "left out" not in told(corpus, 600)
    check_corpora((corpus,), longest - 1, [1], 256)
    with pytest.raises(ConfigError, match=rf"longer than train.seq_len={longest - 2}"):
        check_corpora((corpus,), longest - 2, [1], 256)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"format": "auto", "chat_template": "plain"}, "chat_template is for conversations"),
        ({"chat_date": "today"}, "chat_date must be a date such as 2026-11-30"),
        ({"held_out": "ends"}, "held_out=ends would cut conversations"),
        ({"max_long_conversations": -1}, "max_long_conversations must be 0"),
        ({"sources": (SourceConfig(name="a", urls=("x",)),)}, "format=chat is of data.source"),
    ],
)
def test_settings_that_do_not_go_together_are_told(settings, told):
    with pytest.raises(ValueError, match=told):
        DataConfig(**{"format": "chat", **settings})


def test_chats_and_texts_are_read_in_one_run(tmp_path):
    """Of a text all counts but a document's first token; of a chat what the assistant says."""
    from tests.trainer import member_of
    from tests.workers.test_loop import task_of
    from workers.feed import Feed

    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"row {n} " * 9}) + "\n" for n in range(300)))
    chat = SourceConfig(name="chat", urls=(str(write(tmp_path / "chat.jsonl", many(60))),), format="chat")
    text = SourceConfig(name="text", urls=(str(tmp_path / "text.jsonl"),), weight=2.0)
    data = DataConfig(sources=(chat, text), prepared_url=f"{tmp_path}/data", held_out_fraction=0.2)
    task = task_of(tmp_path, seq_len=256)
    task = replace(task, data=data, corpora=prepare(data))
    feed, seen = Feed(task, member_of(0, 1)), set()
    for slot in feed.step(1) + feed.step(2):
        inputs, targets, documents = slot.batch.inputs, slot.batch.targets, slot.batch.documents
        for row, (source, sample) in enumerate(zip(slot.drawn.source, slot.drawn.sample, strict=True)):
            seen.add(int(source))
            split = feed.train.tokens[source]
            assert inputs[row].tolist() == split.sample(int(sample))[:-1].tolist()
            learned = (targets[row] != IGNORED).numpy()
            if source == 0:
                assert learned.tolist() == split.counts(int(sample))[1:].tolist()
            else:
                ended = inputs[row].numpy() == 0
                assert learned.tolist() == (~ended).tolist() and documents[row].max() == ended[:-1].sum()
    assert seen == {0, 1} and {source for source, _ in feed.validation()} == {0, 1}
    feed.close()


def test_a_source_travels_to_a_task(tmp_path, chatml):
    config = config_of(
        tmp_path, write(tmp_path / "chat.jsonl", many(20)), tokenizer=str(chatml), chat_date="2024-07-26"
    )
    (work,) = works_of(config)
    other = pickle.loads(pickle.dumps(work))
    assert other.recipe.template.identity == work.recipe.template.identity
    assert make_group(other, other.groups[0])["counted"]["train"] > 0
