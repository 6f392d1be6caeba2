"""The exported tokenizer: every text is its UTF-8 bytes, in transformers and in the raw tokenizers library."""

import json

import pytest
from tokenizers import Tokenizer

from jobs.hugging_face import config_of, trained_with
from tests.jobs.test_export import MODELS
from workers.data.byte_tokenizer import byte_tokenizer
from workers.data.tokenizer import ByteTokenizer

PLANE = [chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000]
BYTES = [list(character.encode()) for character in PLANE]
TEXTS = [
    "",
    " ",
    "  two spaces before, two after  ",
    "\r\n\t\x0b\x0c\x1b[31m \x7f\x85\xa0\u2028\ufeff",
    "e\u0301 é ﬁ Å \u212b ½ 한 \u1112\u1161\u11ab",  # Other texts after any normalization.
    "😀🏳️‍🌈 \U00010000 \U0010ffff",
    "Ā", "ĀĀ a Ā", "Ġ Ċ ĉ ł", "ÄĢ",
    "<s></s><unk><pad><|endoftext|><|begin_of_text|>[CLS][SEP]<0x00>\\0\\u0000",
    "a . b , c ' s 's n't do not",
    "".join(PLANE),
]  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    about = trained_with(ByteTokenizer(), 128)
    del about["generation_config"]
    config = config_of(MODELS[request.param], about, "float32")
    for name, text in {**byte_tokenizer(), "config.json": json.dumps(config)}.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("saved_again", [False, True])
def test_transformers_reads_bytes(folder, tmp_path, saved_again):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if saved_again:
        tokenizer.save_pretrained(tmp_path)
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for options in ({}, {"add_special_tokens": False}, {"split_special_tokens": True}):
        assert tokenizer(PLANE, **options)["input_ids"] == BYTES
        for text in TEXTS:
            assert tokenizer(text, **options)["input_ids"] == list(text.encode())
    assert tokenizer.batch_decode(BYTES) == PLANE
    skipped = tokenizer.batch_decode(BYTES, skip_special_tokens=True)
    assert skipped == ["", *PLANE[1:]], "the end of a document is no text, and nothing else is a special token"
    for text in TEXTS:
        assert tokenizer.decode(list(text.encode())) == text
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert ids == (0, 0, 0, None) and len(tokenizer) == 256
    padded = tokenizer(["aĀ", "b"], padding=True)
    assert padded["input_ids"] == [[97, 0xC4, 0x80], [98, 0, 0]] and padded["attention_mask"][1] == [1, 0, 0]
    assert tokenizer("a" + tokenizer.eos_token)["input_ids"] == [97, 0]
    assert tokenizer.decode([0xE6, 0x97, 0x41]) == b"\xe6\x97A".decode(errors="replace")


def test_the_raw_library_reads_bytes(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for as_text in (False, True):
        tokenizer.encode_special_tokens = as_text
        for special in (True, False):
            assert [one.ids for one in tokenizer.encode_batch(PLANE, add_special_tokens=special)] == BYTES
            assert [one.ids for one in tokenizer.encode_batch(TEXTS, add_special_tokens=special)] == [
                list(text.encode()) for text in TEXTS
            ]
    assert tokenizer.decode_batch(BYTES, skip_special_tokens=False) == PLANE
    assert tokenizer.decode_batch(BYTES) == ["", *PLANE[1:]]
    assert tokenizer.get_vocab_size() == 256
