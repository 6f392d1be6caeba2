"""`raymuon generate --chat`: the conversation is transformers', and what cannot be said was never said."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from jobs.chat import ends_of_turn, template_of
from jobs.cli import app
from jobs.export import export
from jobs.trained import open_trained
from tests.chats import CHATML, ENDS, LLAMA_3, TEMPLATES, tokenizer, unmarked
from tests.jobs.test_export import MODELS, trained
from workers.common.errors import ConfigError
from workers.data.chat import ChatTemplate
from workers.data.config import DataConfig
from workers.data.json_tokenizer import write_template
from workers.data.tokenizer import BYTES
from workers.data.tokenizer_files import open_tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a Hugging Face folder of a llama that has learned of conversations no more than how to end a turn."""
    root = tmp_path_factory.mktemp("chat")
    trained(root / "run", replace(MODELS["llama"], vocab_size=384))
    export(str(root / "run"), str(root / "hf"), "float32")
    return root


def folder_of(exported, tmp_path, template: str):
    folder = tmp_path / "hf"
    shutil.copytree(exported / "hf", folder)
    shutil.copytree(tokenizer(tmp_path / "tokenizer", template), folder, dirs_exist_ok=True)
    return folder


def talk(folder, *arguments: str, lines: bytes):
    done = CliRunner().invoke(app, ["generate", str(folder), "--chat", *arguments], input=lines)
    assert done.exception is None, done.exception
    return done


@pytest.mark.numeric
@pytest.mark.parametrize("template", [CHATML, LLAMA_3])
def test_a_conversation_is_transformers_token_by_token(exported, tmp_path, template):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of(exported, tmp_path, template)
    told = talk(folder, "--json", "--tokens", "25", lines="Hi, naïve 日本!\n\nWhat is 2 + 2?\n".encode()).stdout
    rows = [json.loads(line) for line in told.splitlines()]
    assert [row["prompt"] for row in rows] == ["Hi, naïve 日本!", "What is 2 + 2?"], "an empty line says nothing"
    theirs, known = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    opened, messages = open_trained(str(folder), ""), []
    stop = opened.ends | ends_of_turn(template_of(opened, opened.tokenizer), opened.tokenizer)
    for row in rows:
        messages.append({"role": "user", "content": row["prompt"]})
        ids = known.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        given = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": [*stop]}
        written = theirs.generate(torch.tensor([ids]), **given)[0, len(ids) :].tolist()
        ended = written[-1] in stop
        assert row["tokens"] == written[: len(written) - ended] and row["ended"] == ended
        assert row["text"] == known.decode(row["tokens"], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": row["text"]})


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_ends_with_what_the_template_ends_it_with(tmp_path, name, marked):
    template = TEMPLATES[name] if marked else unmarked(TEMPLATES[name])
    known = open_tokenizer(DataConfig(tokenizer=str(tokenizer(tmp_path / "tokenizer", template))))
    eos = {"llama 3": "</s>"}.get(name, ENDS[name])
    source = "{% set bos_token = '<s>' %}{% set eos_token = '</s>' %}" + template
    assert ends_of_turn(ChatTemplate(source), known) == {known.id_of(eos)}


def test_what_is_refused_was_never_said_and_the_conversation_goes_on(exported, tmp_path):
    folder = folder_of(exported, tmp_path, CHATML)
    lines = [b"<|im_end|>", b"\xff", b"a " * 100, b"Hi"]
    done = talk(folder, "--json", "--tokens", "5", lines=b"\n".join(lines) + b"\n")
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert row["prompt"] == "Hi"
    alone = talk(folder, "--json", "--tokens", "5", lines=b"Hi\n").stdout
    assert json.loads(alone)["tokens"] == row["tokens"]
    for told in (
        "has '<|im_end|>' in it, which is a special token",
        "the line is no UTF-8",
        "was trained to look back on 128",
    ):
        assert told in done.stderr


@pytest.mark.parametrize(("terminal", "code"), [(True, 0), (False, 130)])
def test_an_interrupt_ends_what_a_person_says_at_a_terminal_and_breaks_off_all_else(monkeypatch, terminal, code):
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    monkeypatch.setattr("jobs.trained.open_trained", lambda *given: None)
    monkeypatch.setattr("jobs.chat.Conversation", lambda *given: None)
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda stream: terminal)
    assert CliRunner().invoke(app, ["generate", "a", "--chat"]).exit_code == code


def test_answers_are_shown_without_what_would_steer_the_terminal(exported, tmp_path):
    folder = folder_of(exported, tmp_path, CHATML)
    shown = talk(folder, "--tokens", "40", "--temperature", "5", lines=b"a\nb\n").stdout
    assert shown.count("\n") >= 2 and not set(map(chr, range(32))) - {"\n", "\t"} & set(shown)


def test_a_tuned_run_has_its_own_template(tmp_path):
    trained(tmp_path / "run", "llama")
    opened = open_trained(f"{tmp_path}/run", "")
    with pytest.raises(ConfigError, match="it was not tuned with conversations"):
        template_of(opened, BYTES)
    template = ChatTemplate("{% set eos_token = '\0' %}{{ strftime_now('%Y') }}{{ messages[0].content }}")
    write_template(opened.reader.store, template)
    opened.manifest.identity["data.chat_template"] = template.sha256
    assert template_of(opened, BYTES).render([{"role": "user", "content": "x"}]).startswith("20"), "it is told the day"


def test_a_model_without_a_template_says_so(exported, tmp_path):
    folder = folder_of(exported, tmp_path, "")
    done = CliRunner().invoke(app, ["generate", str(folder), "--chat"], input=b"")
    assert isinstance(done.exception, ConfigError) and "no chat template" in str(done.exception)
