"""lm-eval over checkpoints: its own `hf` model on what is exported of them finds the same."""

import itertools
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from jobs.chat import ends_of_turn, template_of
from jobs.evaluation.chat import Conversations, refuses_system
from jobs.evaluation.lm import CheckpointLM
from jobs.evaluation.loading import load_tasks
from jobs.evaluation.work import Evaluation, Figure, figures_of, run_lm
from jobs.export import export
from jobs.screen import Screen
from jobs.tokenizer import END, train_tokenizer
from jobs.trained import open_trained
from tests.jobs.task_files import write_tasks
from tests.jobs.test_export import MODELS, trained
from workers.common.errors import ConfigError
from workers.common.storage import Store
from workers.data.chat import PLAIN, ChatTemplate, bound
from workers.data.config import DataConfig
from workers.data.json_tokenizer import write_template, write_tokenizer
from workers.data.tokenizer import BYTES
from workers.data.tokenizer_files import open_tokenizer
from workers.generate import generate

SEQ_LEN = 48
BEGIN, TURN = "<|begin|>", "<|turn|>"
LONG = "".join(f"def f{number}(x):\n    return x * {number}\n\n" for number in range(24))
PAIRS = [
    ("import os\nimport ", "sys\n"),
    ("import os\nimport ", "re\n"),
    ("x = [1, 2", "]"),
    ("x = [1, 2", ")"),
    ("", "def naïve(x):\n"),
    ("", "\x00begins with the end"),
    ("", "x"),
    ("\n", "class"),
    ("   ", "indented"),
    (LONG, "return x"),
    ("short", LONG[:40]),
    (LONG[:100], LONG[100:140]),
    (f"{BEGIN}import ", "os"),
    ("a\x00b", "c\x00"),
    (f"text {END} more", f" {END}"),
    ("日本", "語は\u2603"),
]
TEXTS = ["", "x", "def f():\n    pass\n", LONG, LONG[:SEQ_LEN], LONG[: SEQ_LEN + 1], f"{BEGIN}日本\x00 {END}"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "plain": PLAIN,
    "chatml": CHATML,
    "stripped": CHATML.replace("m.content", "(m.content | trim)"),
    "without system": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
    "begun": "{{ bos_token }}" + CHATML.replace("'<|im_end|>\n'", "eos_token + ' \n'"),
}
SYSTEM, QUESTION = {"role": "system", "content": "Be  brief.\n"}, {"role": "user", "content": " naïve 日本? "}
ANSWER = {"role": "assistant", "content": " Answer: "}
HISTORIES = [
    ([QUESTION], True),
    ([SYSTEM, QUESTION], True),
    ([QUESTION, ANSWER, QUESTION], True),
    ([QUESTION, ANSWER], False),
    ([SYSTEM, QUESTION, ANSWER, QUESTION, {**ANSWER, "content": "x"}], False),
]
ASKED = [
    {"until": ["\n"], "max_gen_toks": 12},
    {"until": [], "max_gen_toks": SEQ_LEN - 8},  # Looked at more than once.
    {"until": ["e", "x"], "max_new_tokens": 20},
]


def requests(kind: str, arguments) -> list[Instance]:
    return [Instance(kind, {}, one, 0, (kind, number, 1)) for number, one in enumerate(arguments)]


BEGUN = """
task: begun
include: data_yaml
output_type: multiple_choice
doc_to_choice: !function own.choices
doc_to_target: 0
gen_prefix: It is
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITTEN = """
task: written
include: data_yaml
output_type: generate_until
doc_to_target: word
generation_kwargs: {until: [e], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Bytes, a real BPE, and the same with a template that begins each text."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.processors import TemplateProcessing

    root = tmp_path_factory.mktemp("tokenizers")
    (root / "text.py").write_text(LONG + Path(os.__file__).read_text())
    train_tokenizer(str(root / "text.py"), 400, str(root / "bpe"), "text", 0, Screen(quiet=True))
    begun = Tokenizer.from_file(str(root / "bpe" / "tokenizer.json"))
    begun.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BEGIN, TURN)])
    special = [(BEGIN, begun.token_to_id(BEGIN))]
    begun.post_processor = TemplateProcessing(single=f"{BEGIN} $A", special_tokens=special)
    (root / "begun").mkdir()
    begun.save(str(root / "begun" / "tokenizer.json"))
    found = {name: open_tokenizer(DataConfig(tokenizer=str(root / name))) for name in ("bpe", "begun")}
    assert found["begun"].begin is not None and found["bpe"].begin is None
    return {"bytes": BYTES, **found}


@pytest.fixture(scope="module", params=["moonlight-bytes", "llama-bpe", "moonlight-begun"])
def both(request, tmp_path_factory, tokenizers):
    """Our model over a checkpoint, and lm-eval's own over the export."""
    name, _, kind = request.param.partition("-")
    root, tokenizer = tmp_path_factory.mktemp(request.param), tokenizers[kind]
    special = {"bos_token": BEGIN if kind == "begun" else tokenizer.token_of(tokenizer.end)}
    # A turn may have an end of its own, which is no document's.
    special["eos_token"] = TURN if kind == "begun" else tokenizer.token_of(tokenizer.end)
    template = ChatTemplate(bound(TEMPLATES["begun"], special))
    known = {"data.tokenizer": tokenizer.sha256, "data.chat_template": template.sha256, "train.seq_len": SEQ_LEN}
    trained(root / "run", replace(MODELS[name], vocab_size=max(256, tokenizer.vocab_size + 3)), **known)
    write_tokenizer(Store(str(root / "run")), tokenizer)
    write_template(Store(str(root / "run")), template)
    export(str(root / "run"), str(root / "hf"), "float32")
    opened = open_trained(str(root / "run"), "")
    chat, ends = Conversations(template_of(opened, opened.tokenizer)), ends_of_turn(template, tokenizer)
    ours = CheckpointLM(opened.model(), opened.tokenizer, opened.seq_len, batch_tokens=300, ends=ends, chat=chat)
    return ours, HFLM(str(root / "hf"), device="cpu", dtype="float32", batch_size=1)


def assert_close(ours, theirs) -> None:
    """The last digit of theirs is worth more than 1e-4 where many tokens are summed in fp32."""
    assert list(ours) == [pytest.approx(one, abs=1e-4, rel=2e-7) for one in theirs]


def test_ids_are_those_of_transformers(both):
    ours, theirs = both
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
    assert ours.max_length == theirs.max_length == SEQ_LEN
    assert {*np.atleast_1d(theirs.model.generation_config.eos_token_id).tolist()} == ours._ends, "the export says less"
    for text in {*TEXTS, *itertools.chain(*PAIRS)}:
        assert ours.tok_encode(text) == theirs.tok_encode(text), text
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)


def test_likelihoods_are_those_of_lm_evals_own_model(both):
    asked = [pair for pair in PAIRS if pair[0].strip() or not pair[0]]  # With blanks alone theirs may raise.
    found, expected = (model.loglikelihood(requests("loglikelihood", asked)) for model in both)
    assert_close([value for value, _ in found], [value for value, _ in expected])
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert both[0].loglikelihood(requests("loglikelihood", [("   ", "indented")])) != found[:1]


def test_what_a_model_writes_itself_is_greedy_to_both(both):
    (text,) = both[1].generate_until(requests("generate_until", [("x", {"until": [], "max_gen_toks": 6})]))
    ids = both[0].tok_encode("x" + text)[len(both[0].tok_encode("x")) :]
    pairs = [(None, both[0].tok_encode("x"), ids), (None, both[0].tok_encode("x"), [*ids[:-1], (ids[-1] + 1) % 256])]
    found, expected = (model._loglikelihood_tokens(pairs) for model in both)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_likelihoods_are_those_of_lm_evals_own_model(both):
    found, expected = (model.loglikelihood_rolling(requests("rolling", [(text,) for text in TEXTS])) for model in both)
    assert_close(found, expected)
    assert found[3] < found[4] < found[1]


def test_generated_texts_are_those_of_lm_evals_own_model(both):
    asked = [(text, dict(ask)) for text in ("import os\n", LONG, "x", "日本") for ask in ASKED]
    found, expected = (model.generate_until(requests("generate_until", asked)) for model in both)
    assert found == expected and len(set(found)) > 4


def test_the_offline_tasks_come_to_the_same(both):
    found, expected = (
        evaluate(model, load_tasks(["stdlib"], None, False, None), limit=5, bootstrap_iters=0) for model in both
    )
    for name, samples in expected["samples"].items():
        mine, theirs = ([one["resps"] for one in found["samples"][name]], [one["resps"] for one in samples])
        assert len(mine) == len(theirs) == 5
        for ours, other in zip(np.ravel(mine).tolist(), np.ravel(theirs).tolist(), strict=True):
            assert ours == (other if isinstance(other, str) else pytest.approx(other, abs=1e-4))
    figures = [one for name in sorted(found["results"]) for one in figures_of(name, found)]
    assert [one.metric for one in figures] == ["exact_match", "acc", "acc_norm", "bits_per_byte"]
    for one in figures:
        assert one.value == pytest.approx(expected["results"][one.task][f"{one.metric},none"], abs=1e-5), one
        assert (one.documents, one.shots, one.stderr) == (5, 0, None)


@pytest.mark.parametrize("both", ["llama-bpe"], indirect=True)
def test_examples_are_drawn_as_lm_eval_itself_draws_them(both, tmp_path, monkeypatch):
    """Twice over the same tasks, as for two checkpoints: the second time must not draw others."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    ours, theirs = both
    folder = write_tasks(tmp_path / "tasks")
    monkeypatch.chdir(folder)
    tasks = load_tasks(["mine_word"], folder, False, 2)
    first, again = (run_lm(ours, tasks, Evaluation(tasks=())) for _ in range(2))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    expected = simple_evaluate(theirs, tasks=["mine_word"], num_fewshot=2, task_manager=manager, bootstrap_iters=1000)
    (found,) = figures_of("mine_word", first)
    assert figures_of("mine_word", again) == [found] and found.shots == 2
    assert found.value == pytest.approx(expected["results"]["mine_word"]["perplexity,none"], rel=1e-5)
    assert found.stderr == pytest.approx(expected["results"]["mine_word"]["perplexity_stderr,none"], rel=1e-4)
    none = run_lm(ours, load_tasks(["mine_word"], folder, False, None), Evaluation(tasks=()))
    assert figures_of("mine_word", none)[0].value != pytest.approx(found.value, rel=1e-3)


@pytest.mark.parametrize("both", ["llama-bpe", "moonlight-begun"], indirect=True)
def test_a_chat_is_asked_as_lm_evals_own_model_asks_it(both, tmp_path, monkeypatch):
    """With an example as a turn, a system's message, and answers that the task begins."""
    folder = write_tasks(tmp_path / "tasks", begun_yaml=BEGUN, written_yaml=WRITTEN)
    monkeypatch.chdir(folder)
    names, seen = ["mine_choice", "begun", "written"], []
    for model in both:
        tasks = load_tasks(names, folder, False, 1)
        run_lm(model, tasks, Evaluation(tasks=(), chat=True, system="Hi.", limit=2))
        seen.append([one for name in names for one in tasks["tasks"][name].instances])
    assert [one.args for one in seen[0]] == [one.args for one in seen[1]]
    for mine, other in zip(*([one.resps[0] for one in instances] for instances in seen), strict=True):
        assert mine == (other if isinstance(other, str) else (pytest.approx(other[0], abs=1e-4), other[1]))
    begun = next(one.args[0] for one in seen[0] if one.task_name == "begun")
    assert begun.count("<|im_start|>") == 5 and begun.endswith("assistant\nIt is") and "system\nHi." in begun


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_the_batch_does_not_matter(both, batch_tokens):
    ours, _ = both
    other = CheckpointLM(ours._model, BYTES, SEQ_LEN, batch_tokens)
    other._texts = ours._texts
    asked = requests("loglikelihood", PAIRS)
    values = [[value for value, _ in model.loglikelihood(asked)] for model in (ours, other)]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    writing = requests("generate_until", [(text, dict(ASKED[0])) for text in ("import os\n", LONG, "x")])
    assert ours.generate_until(writing) == other.generate_until(writing)


@pytest.mark.parametrize(
    ("kind", "arguments", "told"),
    [
        ("loglikelihood", ("x", ""), "'' has no token of its own"),
        ("loglikelihood", ("x", LONG), "tokens, and the model looks at 48"),
        ("generate_until", ("x", {"until": [], "max_gen_toks": 48}), "up to 48 new tokens, and the model looks at 48"),
        ("generate_until", ("x", {"until": [], "do_sample": True, "temperature": 1.0}), "it samples"),
        ("generate_until", ("x", {"until": [], "num_beams": 4}), "num_beams"),
        ("generate_until", ("x", {"until": [], "max_gen_toks": "many"}), "generation_kwargs cannot be understood: inv"),
    ],
)
def test_what_a_model_cannot_do_is_told_with_the_task(tmp_path, kind, arguments, told):
    model = trained(tmp_path / "run", "llama")
    with pytest.raises(ConfigError) as raised:
        getattr(CheckpointLM(model, BYTES, SEQ_LEN, 100), kind)(requests(kind, [arguments]))
    assert told in str(raised.value) and f"task {kind}" in str(raised.value)


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_written_as_by_lm_evals_own_model(name):
    from transformers import PreTrainedTokenizerFast

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=BYTES.marked_up(), chat_template=TEMPLATES[name], **special)
    ours = Conversations(ChatTemplate(bound(TEMPLATES[name], special)))
    hf = SimpleNamespace(tokenizer=theirs, chat_template_args={})
    for history, to_answer in HISTORIES:
        expected = HFLM.apply_chat_template(hf, history, add_generation_prompt=to_answer)
        assert ours.text(history, to_answer) == expected
    assert refuses_system(ours.template) == (name == "without system")
    assert ours.left_out == (2 if name == "without system" else 0)


def test_a_template_that_fails_is_one_message():
    broken = Conversations(ChatTemplate("{{ raise_exception('never') }}"))
    with pytest.raises(ConfigError, match="refuses it: never"):
        broken.text([SYSTEM, QUESTION], True)
    with pytest.raises(ConfigError, match="does not write what the assistant has begun"):
        Conversations(ChatTemplate("{{ messages[0].content }}")).text([QUESTION, ANSWER], False)


@pytest.mark.parametrize("both", ["moonlight-begun"], indirect=True)
def test_special_tokens_end_a_text_where_a_task_or_the_model_says_so(both, monkeypatch):
    """A task's stop that is a special token, as `<|im_end|>` often is, never stands in a text that is decoded."""
    ours, theirs = both
    ids, asked = ours.tok_encode("import os\n"), {"until": [], "max_gen_toks": 12}
    token, special = generate(ours._model, [ids], 5)[0][-1], ours.tok_encode(BEGIN)[-1]
    with torch.no_grad():
        for head in (ours._model.head, theirs.model.lm_head.weight):
            head[special] = 1.5 * head[token]  # The special token is written in that one's stead.
    told = [model.generate_until(requests("g", [("import os\n", {**asked, "until": until}) for until in ([], [BEGIN])]))
            for model in both]  # fmt: skip
    assert told[0] == told[1] and len(told[0][1]) < len(told[0][0]), "another text's stop, or none"
    monkeypatch.setattr(theirs.model.generation_config, "eos_token_id", [*ours._ends, special])
    monkeypatch.setattr(ours, "_ends", ours._ends | {special})
    asked = requests("g", [("import os\n", asked)])
    assert ours.generate_until(asked) == theirs.generate_until(asked) == told[0][1:]


def test_figures_are_whatever_numbers_a_metric_makes():
    values = {"a,none": np.float32(0.5), "a_stderr,none": np.float64(0.1), "b,none": np.int64(3), "alias": "x"}
    found = {"results": {"t": {**values, "sample_len": 7, "c,none": "N/A"}}, "n-shot": {"t": 0}}
    assert figures_of("t", found) == [Figure("t", "a", 0.5, 0.1, 0, 7), Figure("t", "b", 3.0, None, 0, 7)]
