"""`raymuon generate`: what it writes is what transformers writes, and what it cannot write is told."""

import json

import pytest
import torch
from typer.testing import CliRunner

from jobs.cli import app
from jobs.generate import Turns
from jobs.screen import Screen
from jobs.tokenizer import train_tokenizer
from jobs.trained import open_trained
from tests.jobs.folders import KINDS
from tests.jobs.test_export import trained
from workers.common.errors import ConfigError, RaymuonError, TrainingError
from workers.data.config import DataConfig
from workers.data.text_stream import TextStream
from workers.data.tokenizer_files import open_tokenizer
from workers.generate import generate

PROMPTS = [[5], list(b"def f(x):"), list(range(1, 64))]


def run(*arguments: str, stdin: bytes | None = None) -> str:
    done = CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin, catch_exceptions=False)
    if done.exception:
        raise done.exception
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a run's folder with checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "run-7"
    trained(folder, "moonlight", steps=(10, 20))
    return folder


@pytest.mark.numeric
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_transformers_token_by_token(exported, kind):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(exported / f"{kind}-hf", dtype=torch.float32)
    opened = open_trained(str(exported / f"{kind}-run"), "")
    model, stop = opened.model("float32"), opened.ends
    options = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": [*stop]}
    exact = []
    for prompt in PROMPTS:
        found = theirs.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        exact.append(found[:-1] if found[-1] in stop else found)
    assert len({token for text in exact for token in text}) > 20
    for cache in (True, False):
        assert generate(model, PROMPTS, 50, stop=stop, cache=cache) == exact


def test_it_writes_what_the_generator_writes_and_shows_what_would_steer_the_terminal(folder):
    opened = open_trained(str(folder), "")
    expected = generate(opened.model(), [list(b"def "), list(b"class A")], 30, stop=opened.ends)
    texts = [bytes(ids).decode(errors="replace") for ids in expected]
    told = run(folder, "--prompt", "def ", "--prompt", "-", "--tokens", "30", "--json", stdin=b"class A")
    rows = [json.loads(line) for line in told.splitlines()]
    assert [row["tokens"] for row in rows] == expected and [row["text"] for row in rows] == texts
    assert [row["prompt"] for row in rows] == ["def ", "class A"] and {row["step"] for row in rows} == {20}
    assert [row["ended"] for row in rows] == [len(ids) < 30 for ids in expected]
    shown = run(f"{folder}@10", "--prompt", "\x1b[2J", "--tokens", "5", "--temperature", "2", "--seed", "3")
    assert shown.startswith("\\x1b[2J") and not set(map(chr, range(32))) - {"\n", "\t"} & set(shown)
    assert shown == run(
        folder, "--prompt", "\x1b[2J", "--tokens", "5", "--temperature", "2", "--seed", "3", "--no-cache"
    )


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (
            ["{folder}@15", "--prompt", "a"],
            2,
            "no committed checkpoint of step 15; there are checkpoints of step 10, 20",
        ),
        (
            ["{folder}", "--prompt", "a" * 129],
            2,
            "prompt 1 has 129 tokens, and {folder}@20 was trained to look back on 128",
        ),
        (
            ["{folder}", "--prompt", "a", "--prompt", ""],
            2,
            "prompt 2 is empty, and the tokenizer has no token that begins",
        ),
        (
            ["{folder}", "--prompt", "a", "--temperature", "-1"],
            2,
            "temperature must be a finite number of 0 (greedy) or more",
        ),
        (["{folder}", "--prompt", "a", "--top-p", "0"], 2, "top-p must be above 0 and at most 1, not 0"),
        (["{folder}", "--prompt", "a", "--dtype", "int8"], 2, "--dtype must be auto, float32 or bfloat16, not 'int8'"),
        (["{folder}"], 2, "give either --prompt TEXT, several times if need be, or --chat"),
        (["{folder}", "--chat"], 2, "{folder}@20: it was not tuned with conversations (data.format=chat)"),
        (["{folder}", "--prompt", "\udcff"], 2, "--prompt is no UTF-8"),
        (["{folder}/none", "--prompt", "a"], 2, "no run's folder (there is no log/ in it), and no Hugging Face model"),
    ],
)
def test_what_cannot_be_written_is_told(folder, arguments, code, told):
    with pytest.raises(RaymuonError) as raised:
        run(*(one.format(folder=folder) for one in arguments))
    assert told.format(folder=folder) in str(raised.value) and raised.value.exit_code == code


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_cannot_be_is_told(seed):
    told = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["generate", "nowhere", "--prompt", "a", f"--seed={seed}"])
    assert told.exit_code == 2 and "--seed" in told.stderr and told.exception.code == 2


def test_it_ends_where_nobody_reads(folder, monkeypatch):
    read = iter([False, False, True])
    monkeypatch.setattr("jobs.cli.generate.nobody_reads", lambda: next(read))
    assert len(run(folder, "--prompt", "a", "--tokens", "100", "--temperature", "0.1")) <= 4, (
        "two pieces and what is lost"
    )


def test_a_prompt_may_be_as_long_as_the_context_and_the_text_go_on_behind_it(folder):
    (row,) = run(folder, "--prompt", "a" * 128, "--tokens", "100", "--json", "--temperature", "3").splitlines()
    assert len(json.loads(row)["tokens"]) > 50


def test_logits_that_overflow_are_told(tmp_path):
    def enlarge(model) -> None:
        model.lm_head.weight.data.fill_(torch.finfo(torch.float32).max)

    trained(tmp_path / "run", "llama", change=enlarge)
    with pytest.raises(TrainingError, match="logits are not finite"):
        run(tmp_path / "run", "--prompt", "a")


def test_a_model_without_a_tokenizer_says_so(exported):
    with pytest.raises(ConfigError, match="it came without a tokenizer"):
        run(exported / "llama", "--prompt", "a")


def test_texts_that_grow_at_the_same_time_are_said_one_after_the_other():
    said = []
    turns = Turns(["a", "b", "c"], said.append)
    for number, piece, done in ((1, "1", False), (0, "0", False), (2, "2", True), (0, "x", True), (1, "y", True)):
        turns.add(number, piece, done)
    assert said == ["a", "0", "x", "\n", "b1", "y", "\n", "c2", "\n"]


def test_pieces_of_a_trained_tokenizer_are_together_its_text(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("naïve 日本語 text, ☃ and words that come again and again and again 🙂\n" * 50)
    train_tokenizer(str(texts), 300, f"{tmp_path}/bpe", "text", 0, Screen(quiet=True))
    tokenizer = open_tokenizer(DataConfig(tokenizer=str(tmp_path / "bpe")))
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randint(tokenizer.vocab_size, (60,), generator=random).tolist() for _ in range(30)]
    for ids in (*drawn, tokenizer.encode(["日本 🙂 ☃ naïve again".encode()])[0].tolist()):
        coming = TextStream(tokenizer)
        assert "".join([*(coming.add(token) for token in ids), coming.rest()]) == tokenizer.decode(ids)
    assert tokenizer.decode(ids) == "日本 🙂 ☃ naïve again" and len(ids) < 26, "tokens of several bytes"
