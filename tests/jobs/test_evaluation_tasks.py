"""Tasks by name and from a folder of one's own: what is found, and one message for each thing that is not."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from jobs.evaluation.command import Asked, check_tasks, evaluate
from jobs.evaluation.folder import SHIPPED, TaskFolder, read_folder
from jobs.evaluation.index import below, lm_evals_names, task_manager
from jobs.evaluation.loading import load_tasks, prepare_environment
from jobs.evaluation.work import OFFLINE, Evaluation, check_texts, on_record
from jobs.trained import open_trained
from orchestrator.stop import StopSignal
from tests.jobs.task_files import write_tasks
from tests.jobs.test_export import trained
from workers.common.errors import ConfigError, StorageError
from workers.common.storage import Store
from workers.data.json_tokenizer import normal_tokenizer, write_tokenizer

UNSAFE = "task: mine_code\nunsafe_code: true\ndataset_path: openai/openai_humaneval\noutput_type: generate_until\n"


ODD = "task: odd\ninclude: data_yaml\noutput_type: loglikelihood\ndoc_to_target: word\n"


def load(names, folder=None, unsafe_code=False):
    return load_tasks(names, folder, unsafe_code, None)


def test_a_folder_is_read_whole_and_laid_down_anywhere(tmp_path, monkeypatch):
    found = read_folder(str(write_tasks(tmp_path / "tasks")))
    found.lay_down(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load(["mine"], tmp_path / "elsewhere")
    assert list(loaded["tasks"]) == ["mine_word", "mine_choice"] and list(loaded["groups"]) == ["mine"]
    assert len(loaded["tasks"]["mine_choice"].eval_docs) == 8
    assert list(load(["mine_tag"], tmp_path / "elsewhere")["tasks"]) == ["mine_choice"]


def test_nothing_asks_the_network_for_the_shipped_tasks_alone():
    assert {file.stem for file in SHIPPED.glob("stdlib*.yaml")} == set(OFFLINE)
    for tasks, offline in ((("stdlib",), True), (OFFLINE, True), (("stdlib", "gsm8k"), False), (("moonlight",), False)):
        assert Evaluation(tasks=tasks).offline == offline
    assert not Evaluation(tasks=("stdlib",), folder=TaskFolder({})).offline, "the folder may have its own of that name"


def test_lm_evals_own_tasks_are_found_without_reading_all_of_them(tmp_path):
    (tmp_path / "mine.yaml").write_text("group: mine\ntask: [bbh, {group: in, task: [triviaqa]}, {task: nobodys}]\n")
    (tmp_path / "tagged.yaml").write_text("task: tagged\ntag: [mine_tag]\n")
    manager = task_manager(["moonlight_code", "minerva_math", "mine", "mine_tag", "gsm8kk"], [SHIPPED, tmp_path])
    assert set(below("moonlight_code", manager.task_index)) == {"moonlight_code", "humaneval", "mbpp"}
    assert len(below("minerva_math", manager.task_index)) == 8
    found = below("mine", manager.task_index)
    assert {"bbh_cot_fewshot_navigate", "triviaqa", "nobodys"} < set(found) and len(found) == 31
    assert set(below("mine_tag", manager.task_index)) == {"mine_tag", "tagged"}
    assert set(found) - manager.task_index.keys() == {"nobodys"} and "gsm8kk" not in manager.task_index
    assert len(manager.all_tasks) < 500 < len(lm_evals_names())


def test_the_documents_are_of_what_a_default_run_holds_out():
    from jobs.evaluation.stdlib import brackets, continuations, texts

    library = Path(os.__file__).parent
    held_out = {file.name: (text := file.read_bytes())[len(text) - round(len(text) * 0.03) :].decode(errors="ignore")
                for file in library.glob("*.py")}  # fmt: skip
    rows = texts()["test"]["text"]
    assert len(rows) > 100 and sum(any(row in text for text in held_out.values()) for row in rows) > 20
    for row in continuations()["test"]:
        assert len(set(row["choices"])) == 4 and all(12 <= len(one) <= 40 for one in row["choices"])
    answers = continuations()["test"]["answer"]
    assert min(answers.count(place) for place in range(4)) > len(answers) / 8, "a model would learn the place"
    closing = brackets()["test"]["closing"]
    assert set("".join(closing)) <= set(")]}:") and closing.count(")") < 0.7 * len(closing)


def test_the_papers_benchmarks_are_lm_evals_own_with_their_shots():
    from lm_eval.tasks._index import Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    members = [one for name in ("text", "code") for one in load_yaml(SHIPPED / f"moonlight_{name}.yaml")["task"]]
    shots = {one.get("group", one.get("task")): one["num_fewshot"] for one in members}
    assert shots == {
        **dict.fromkeys(("mmlu", "mmlu_pro", "triviaqa", "ceval-valid", "cmmlu"), 5),
        "bbh": 3,
        "gsm8k": 8,
        "minerva_math": 4,
        "humaneval": 0,
        "mbpp": 3,
    }
    assert shots.keys() <= set(lm_evals_names())
    index = task_manager(["moonlight_code", "bbh", "triviaqa", "minerva_math"], [SHIPPED]).task_index
    for one in members:
        if (entry := index.get(one.get("group", one.get("task")))) is not None:
            assert entry.kind == (Kind.GROUP if "group" in one else Kind.TASK), one


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"broken_yaml": "task: [unclosed"}, "broken.yaml: broken YAML: while parsing"),
        ({"broken_yaml": "task: x\n\tdataset_path: json"}, "broken.yaml: broken YAML"),
        ({"broken_yaml": "just words"}, "broken.yaml: no task file"),
        ({"broken_yaml": "dataset_path: json"}, "it needs a `task` or a `group`"),
        ({"broken_yaml": "task: x\ninclude: dat_yaml"}, "broken.yaml: include: dat_yaml is no file of the folder"),
        ({"broken_yaml": "task: x\ninclude: [data_yaml, ../data_yaml]"}, "include: ../data_yaml is no file"),
        ({"broken_yaml": "task: x\ninclude: broken.yaml"}, "include: broken.yaml is itself"),
    ],
)
def test_a_broken_task_file_is_told(tmp_path, files, told):
    with pytest.raises(ConfigError) as raised:
        read_folder(str(write_tasks(tmp_path / "tasks", **files)))
    assert told in str(raised.value)


def test_a_missing_or_empty_folder_is_told(tmp_path):
    with pytest.raises(ConfigError, match="--task-folder .*nowhere: no such folder"):
        read_folder(str(tmp_path / "nowhere"))
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(ConfigError, match="no task file"):
        read_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "files", "kind", "told"),
    [
        ("gsm8kk", {}, ConfigError, "did you mean gsm8k"),
        ("stdlib_txt", {}, ConfigError, "no task, group or tag of that name; did you mean stdlib_text"),
        ("mine_worde", {}, ConfigError, "did you mean mine_word"),
        ("far", {"far_yaml": "task: far\ndataset_path: nobody/nothing\noutput_type: loglikelihood\n"}, StorageError,
         "task far: its data cannot be reached: Couldn't reach 'nobody/nothing'"),
        ("near", {"near_yaml": "task: near\ninclude: data_yaml\ndataset_kwargs: {data_files: gone.jsonl}\n"},
         StorageError, "gone.jsonl"),
        ("odd", {"odd_yaml": "task: odd\ninclude: data_yaml\ndoc_to_text: !function own.nothing\n"},
         ConfigError, "task odd cannot be loaded: AttributeError"),
        ("odd", {"odd_yaml": f"{ODD}metric_list: [{{metric: acuracy, aggregation: mean}}]"}, ConfigError,
         "task odd: its metric 'acuracy' is known neither to lm-eval"),
        ("odd", {"odd_yaml": f"{ODD}metric_list: [{{metric: acc, aggregation: men}}]"}, ConfigError,
         "task odd: the aggregation of its metric 'acc' is none that lm-eval knows"),
        ("odd", {"odd_yaml": f"{ODD}metric_list: [{{metric: acuracy}}]"}, ConfigError, "KeyError: None (in task.py, "),
        ("mine_code", {"code_yaml": UNSAFE}, ConfigError, "mine_code would run code that the model has written"),
        ("all", {"code_yaml": UNSAFE, "all_yaml": "group: all\ntask: [mine_word, {task: mine_code}]\n"}, ConfigError,
         "--confirm-run-unsafe-code"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_loaded_is_one_message(tmp_path, monkeypatch, name, files, kind, told):
    folder = write_tasks(tmp_path / "tasks", **files)
    monkeypatch.chdir(folder)
    with pytest.raises(kind) as raised:
        load([name], folder)
    assert told in str(raised.value) and "\n" not in str(raised.value) and raised.value.exit_code in (2, 5)


def test_a_task_that_is_named_twice_is_told():
    with pytest.raises(ConfigError, match="Duplicate task 'stdlib_text'.*name a task once"):
        load(["stdlib", "stdlib_text"])


def test_code_is_refused_before_anything_of_its_task_is_loaded(tmp_path):
    """HumanEval's own module runs code when it is loaded."""
    prepare_environment(offline=True, unsafe_code=False)
    code = UNSAFE + "process_docs: !function loud.run\n"
    folder = write_tasks(tmp_path / "tasks", code_yaml=code)
    (folder / "loud.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\ndef run(docs): 0\n"
    )
    with pytest.raises(ConfigError, match="confirm-run-unsafe-code"):
        load(["mine_code"], folder)
    assert not (folder / "ran").exists() and os.environ["HF_ALLOW_CODE_EVAL"] == "0"
    with pytest.raises(StorageError, match="openai/openai_humaneval"):  # With leave the data is what is missing.
        load(["mine_code"], folder, unsafe_code=True)
    assert (folder / "ran").exists()


def test_the_papers_code_is_refused_by_its_group():
    with pytest.raises(ConfigError, match="humaneval, mbpp would run code .*moonlight_text"):
        load(["moonlight_code"])


def asked(what: Path, **others) -> Asked:
    return Asked(what=str(what), tasks=("stdlib",), tracking_uri=f"sqlite:///{what.parent}/mlflow.db", **others)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    parsed = {"model": {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(300)}, "unk_token": "w0"}}
    tokenizer = normal_tokenizer(parsed, {}, "none", "none", "here")
    trained(tmp_path / "run", "llama", **{"data.tokenizer": tokenizer.sha256})
    write_tokenizer(Store(str(tmp_path / "run")), tokenizer)
    with pytest.raises(ConfigError, match="ids up to 299 and the model a vocabulary of 256"):
        evaluate(asked(tmp_path / "run"), StopSignal(), False)


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path):
    trained(tmp_path / "run", "llama")
    opened = replace(open_trained(str(tmp_path / "run"), ""), tokenizer=None)
    with pytest.raises(ConfigError, match="without a tokenizer.*import the model once more"):
        check_texts(opened, False, "")


def test_without_lm_eval_the_way_to_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    done = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--tasks", "stdlib"], standalone_mode=False)
    assert isinstance(done.exception, ConfigError) and "pip install 'raymuon[eval]'" in str(done.exception)


def test_names_are_taken_with_commas():
    assert check_tasks(["a,b", " c ,a"]) == ("a", "b", "c")
    with pytest.raises(ConfigError, match="--tasks"):
        check_tasks([" , "])


def test_on_record_is_what_was_asked_for():
    """A group that has a figure of its own stands for its members; one that has none, and a tag, do not."""
    value = {"acc,none": 0.5, "acc_stderr,none": 0.1}
    found = {
        "results": {"mmlu": value, "mmlu_a": value, "mmlu_b": value, "all": {"alias": "all"}, "other": value},
        "group_subtasks": {"all": ["mmlu", "other"], "mmlu": ["mmlu_a", "mmlu_b"]},
        "configs": {"other": {"tag": "tagged"}, "mmlu_a": {"tag": ["tagged", "more"]}, "mmlu_b": {}},
        "n-shot": {},
    }
    assert on_record(["all"], found) == ["mmlu", "other"]
    assert on_record(["mmlu", "mmlu_a"], found) == ["mmlu", "mmlu_a"]
    assert on_record(["tagged"], found) == ["mmlu_a", "other"]


def test_a_folder_travels():
    import pickle

    folder = TaskFolder({"a.yaml": b"task: a"})
    assert pickle.loads(pickle.dumps(folder)) == folder
