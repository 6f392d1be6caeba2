"""Conversations as text and tokens, against transformers' `apply_chat_template`."""

import json
from datetime import datetime

import numpy as np
import pytest

from tests.chats import CHATML, CONVERSATIONS, ENDS, LLAMA_3, SYSTEM_DEFAULT, TEMPLATES, said, tokenizer, unmarked
from workers.common.errors import ConfigError
from workers.data.chat import PLAIN, ChatError, ChatTemplate, bound, messages_of
from workers.data.chat_encoder import encode
from workers.data.config import DataConfig
from workers.data.tokenizer import BYTES
from workers.data.tokenizer_files import open_template, open_tokenizer


def opened(folder, **settings):
    config = DataConfig(tokenizer=str(folder), format="chat", **settings)
    return (made := open_tokenizer(config)), open_template(config, made)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: tokenizer(root / name, text, ENDS[name]) for name, text in TEMPLATES.items()}


def compiled(template: str):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def theirs(folder, messages, **settings):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    return loaded.apply_chat_template(messages, **settings)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_ids_and_masks_are_transformers(folders, name):
    made, template = opened(folders[name])
    masked = 0
    for messages in CONVERSATIONS:
        ours = encode(template, made, messages)
        assert template.render(messages) == theirs(folders[name], messages, tokenize=False)
        found = theirs(folders[name], messages, return_dict=True, return_assistant_tokens_mask=True)
        assert ours.ids.tolist() == found["input_ids"]
        assert ours.counts.astype(int).tolist() == found["assistant_masks"]
        masked += sum(found["assistant_masks"])
        prompt = template.render(messages[:1], add_generation_prompt=True)
        assert prompt == theirs(folders[name], messages[:1], tokenize=False, add_generation_prompt=True)
    assert masked > 100


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_that_are_not_marked_are_found_by_what_comes_before(folders, name):
    """The same as where they are marked, for a template that writes the same; white space after an end is nobody's."""
    made, template = opened(folders[name])
    plain = unmarked(template.source)
    assert "generation %" not in plain
    other = ChatTemplate(plain)
    for messages in CONVERSATIONS:
        assert other.rendered(messages, made.special) == template.rendered(messages, made.special)


def test_the_built_in_template_is_jinja_that_transformers_runs(tmp_path):
    """With bytes and with a tokenizer; with bytes every token is a byte, and a zero byte ends each answer."""
    config = DataConfig(format="chat")
    template = open_template(config, BYTES)
    for messages in CONVERSATIONS:
        found = encode(template, BYTES, messages)
        text = bytes(found.ids.tolist())
        assert text.decode() == template.render(messages)
        answers = b"".join(one["content"].encode() + b"\0" for one in messages if one["role"] == "assistant")
        assert text and bytes(found.ids[found.counts].tolist()) == answers and found.said_bytes == len(answers)
    folder = tokenizer(tmp_path, PLAIN)
    made, ours = opened(folder)
    _, plain = opened(folder, chat_template="plain")
    for messages in CONVERSATIONS:
        found = theirs(folder, messages, return_dict=True, return_assistant_tokens_mask=True)
        whole, begun = encode(ours, made, messages), encode(plain, made, messages)
        assert whole.ids.tolist() == found["input_ids"]
        assert whole.counts.astype(int).tolist() == found["assistant_masks"]
        assert begun.ids.tolist() == found["input_ids"][1:], "texts have no <s> before them with this tokenizer"


@pytest.mark.parametrize("end", ["</s>", '<"\\😀\n>', "\0"])
def test_a_template_has_its_special_tokens_in_it(end):
    """So it writes the same wherever its text goes, and the blanks at its beginning are as they were."""
    written = {
        "{{ eos_token }}": "E",
        "\n{{ eos_token }}": "\nE",
        "  {%- if eos_token is defined %} {{ eos_token }}{% endif %}": " E",
        "   {% if bos_token is defined %}{{ bos_token }}{% endif %}x{{ eos_token }}": "xE",
        "{% if not bos_token %}{{ eos_token }}{% endif %}{{ bos_token }}": "E",
        "{% macro m() %}{{ eos_token }}{% endmacro %}{% for one in [1] %}{{ m() }}{% endfor %}": "E",
    }
    for source, text in written.items():
        whole = bound(source, {"eos_token": end, "pad_token": "<pad>"})
        elsewhere = compiled(whole).render(bos_token="other", eos_token="other", pad_token="other")
        assert elsewhere == text.replace("E", end), "as transformers renders it with another tokenizer's tokens"
        assert ChatTemplate(whole).render([]) == text.replace("E", end)
        assert "<pad>" not in whole and bound(whole, {"eos_token": "other"}) == whole


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        (LLAMA_3, [said("user", "a"), said("user", "b"), said("assistant", "c")], "refuses it: two of the user"),
        ("{{ messages[7].role }}", CONVERSATIONS[0], "fails: list object has no element 7"),
        ("{{ ''.__class__.mro() }}", CONVERSATIONS[0], "fails: access to attribute '__class__'"),
        ("{{ strftime_now('%Y') }}", CONVERSATIONS[0], "set data.chat_date"),
        ("{{ messages[-1].content }}", CONVERSATIONS[2], "does not tell where the assistant speaks in messages[1]"),
        ("{{ messages[0].content }}", CONVERSATIONS[0], "writes nothing that the assistant says"),
        ("{{ messages[0].role + messages[-1].role }}", [said("assistant", "a")], "the messages before messages[0]"),
        ("{% set x %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}{{ x | length }}",
         CONVERSATIONS[0], "changes what stands within {% generation %}"),
        (CHATML, [said("user", "a<|im_end|>b"), said("assistant", "c")], "messages[0] has '<|im_end|>' in it"),
        (CHATML, [said("user", "a"), {**said("assistant", "c"), "name": "<s>"}], "messages[1] has '<s>' in it"),
        (CHATML, [said("user", "a"), {**said("assistant", "c"), "calls": [{"x": ["</s>"]}]}], "messages[1] has '</s>'"),
    ],
)  # fmt: skip
def test_a_conversation_that_a_template_cannot_write_is_told(folders, template, messages, told):
    made, _ = opened(folders["chatml"])
    with pytest.raises(ChatError) as raised:
        encode(ChatTemplate(template), made, messages)
    assert told in str(raised.value)


def test_a_date_is_what_was_said():
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", datetime(2024, 7, 26)).render([]) == "26 Jul 2024"
    dated = DataConfig(format="chat", chat_date="2024-07-26")
    assert open_template(dated, BYTES).now == datetime(2024, 7, 26)


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("Hi", "a text, not a list of messages"),
        (None, "null, not a list of messages"),
        ([], "an empty list, not a list of messages"),
        (["Hi"], "messages[0] is a text, not an object with role and content"),
        ([{"content": "Hi"}], "messages[0] has no role"),
        ([said("robot", "Hi")], "role 'robot'; it must be one of system, user, assistant, tool"),
        ([said("user", "Hi"), {"role": "assistant"}], "messages[1] has no content"),
        ([said("user", "Hi"), {"role": "assistant", "content": ["Hi"]}], "content that is a list, not a text"),
        ([said("user", "Hi"), said("assistant", "a\0")], "messages[1] has a zero byte"),
        ([said("user", "Hi"), said("assistant", "")], "messages[1] is the assistant's, and empty"),
        ([said("system", "a"), said("user", "b")], "no message is the assistant's, so there is nothing to learn from"),
    ],
)
def test_what_is_no_conversation_is_told(messages, told):
    with pytest.raises(ChatError) as raised:
        messages_of(messages)
    assert told in str(raised.value)


def test_what_a_message_has_besides_goes_to_the_template():
    (message,) = messages_of([{"role": "assistant", "content": "a", "name": "b", "tool_calls": None}])
    assert message == {"role": "assistant", "content": "a", "name": "b"}
    assert ChatTemplate("{{ messages[0].name }}").render([message]) == "b"


def test_what_no_text_should_have_may_be_in_one(folders):
    """All of Unicode's noncharacters, of which marks are taken, as transformers has them."""
    made, template = opened(folders["chatml"])
    messages = [said("user", "".join(map(chr, range(0xFDD0, 0xFDF0)))), said("assistant", "b\ufdd0c")]
    found = theirs(folders["chatml"], messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = encode(template, made, messages)
    assert ours.ids.tolist() == found["input_ids"] and ours.counts.astype(int).tolist() == found["assistant_masks"]


@pytest.mark.parametrize("value", [3, {"default": "x"}, ["x"], [{"name": "default"}]])
def test_a_template_that_is_no_text_is_told(tmp_path, value):
    """Unless another one is named; one beside the tokenizer that is no UTF-8, too."""
    folder = tokenizer(tmp_path / "one")
    about = {"eos_token": "</s>", "chat_template": value}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"chat_template in .*tokenizer_config.json is .*, and no text"):
        opened(folder)
    (folder / "chat_template.jinja").write_bytes("ä".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"chat_template.jinja is no UTF-8"):
        opened(folder)
    assert opened(folder, chat_template="plain")[1].source.endswith(PLAIN)


def test_which_template_writes_is_the_config_s_choice(folders, tmp_path):
    """The tokenizer's own, also out of a file beside it or a list of them, a file, or the built-in one."""
    folder = tokenizer(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"it has no chat template.*set data.chat_template=plain"):
        opened(folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    assert opened(folder)[1].source == CHATML
    about = {"eos_token": "</s>", "chat_template": [{"name": "tool_use", "template": "a"}]}
    about["chat_template"].append({"name": "default", "template": SYSTEM_DEFAULT})
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    assert opened(folder)[1].source == SYSTEM_DEFAULT
    (tmp_path / "own.jinja").write_text("{{ eos_token }}" + CHATML)
    named = opened(folder, chat_template=str(tmp_path / "own.jinja"))[1]
    assert named.source == '{% set eos_token = "</s>" %}\n{{ eos_token }}' + CHATML
    assert opened(folder, chat_template="plain")[1].source.endswith(PLAIN)
    for settings, told in (
        ({"chat_template": "nowhere.jinja"}, "no text file is there"),
        ({"chat_template": "plain", "end_of_document": "none"}, "set data.end_of_document"),
    ):
        with pytest.raises(ConfigError, match=told):
            opened(folder, **settings)
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"its chat template: it is no Jinja template: .*line 1"):
        opened(folder)


def test_a_token_across_the_border_of_a_turn_counts(folders):
    made, _ = opened(folders["chatml"])
    template = ChatTemplate("a{% generation %}b{{ messages[1].content }}{% endgeneration %}")
    found = encode(template, made, [said("user", "x"), said("assistant", "is")])
    letter = ChatTemplate("a{% generation %}{{ messages[1].content }}{% endgeneration %}b")
    counts = encode(letter, made, [said("user", "x"), said("assistant", "😀")]).counts.tolist()
    assert counts == [False, True, True, True, True, False], "all of it; transformers takes the first token alone"
    assert found.counts.any() and np.flatnonzero(found.counts).tolist() == [
        place
        for place, (_, end) in enumerate(made.marked_up().encode("abis", add_special_tokens=False).offsets)
        if end > 1
    ]
