import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import yaml

from jobs.load import CONFIGS, documented_yaml, load, load_values, plain_yaml
from jobs.planning.state import layout_of
from optim.checks import ConfigProblems
from orchestrator.config import RunConfig
from workers.common.errors import ConfigError
from workers.config import LlamaConfig


def test_overrides_win_and_defaults_fill():
    config = load("demo", ["optim.lr=3e-2", "train.steps=7", "run.name=123", "optim.name=adamw"])
    assert (config.optim.lr, config.train.steps, config.run.name) == (0.03, 7, "123")
    assert config.optim.name == "adamw" and config.optim.momentum == 0.95 and config.model.num_experts == 8


@pytest.mark.parametrize(
    ("override", "name"),
    [
        *((f"run.name={text}", text) for text in ("1e-3", "2026_11_22", "0012", "on", "12:30", "a #3", "null")),
        ("run.name='in quotes'", "in quotes"),
        ('run.name="a \\u00e9"', "a é"),
    ],
)
def test_a_text_of_the_command_line_stands_for_itself(override, name):
    """As YAML most of these are numbers, truth values or comments."""
    assert load("demo", [override]).run.name == name


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_built_in_configs_are_valid_and_survive_a_round_trip(name, tmp_path):
    config = load(name, [])
    for i, text in enumerate((plain_yaml(config), documented_yaml(config))):
        path = tmp_path / f"{i}.yaml"
        path.write_text(text)
        assert load(str(path), []) == config


def test_every_key_is_documented():
    lines = documented_yaml(load("demo", [])).splitlines()
    for before, line in pairwise(lines):
        if ":" in line and not line.lstrip().startswith("#"):
            assert before.lstrip().startswith("# ") or before.endswith(":"), line
    assert yaml.safe_load("\n".join(lines)).keys() == {field.name for field in fields(RunConfig)}


def test_the_models_name_chooses_its_keys():
    config = load("demo-llama", ["model.num_kv_heads=4"])
    assert isinstance(config.model, LlamaConfig) and config.model.num_kv_heads == 4
    with pytest.raises(ConfigError, match=r"model.name: must be one of moonlight, llama, llama-moe, not 'lama'"):
        load("demo-llama", ["model.name=lama"])
    with pytest.raises(ConfigError, match="model.kv_lora_rank: unknown key where model.name=llama"):
        load("demo-llama", ["model.kv_lora_rank=4"])


def sections() -> list[tuple[str, object]]:
    """Return every section of a config with each of its forms."""
    config = load("demo", [])
    found = [(field.name, getattr(config, field.name)) for field in fields(RunConfig) if field.name != "seed"]
    return [*found, ("model", LlamaConfig())]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_number_has_to_be_finite(value):
    checked = 0
    for _, section in sections():
        for field in fields(section):
            if isinstance(getattr(section, field.name), float):
                with pytest.raises(ConfigProblems) as raised:
                    replace(section, **{field.name: value})
                assert raised.value.problems[0] == f"{field.name} must be a finite number, not {value}"
                checked += 1
    assert checked > 25


@pytest.mark.parametrize(
    "override",
    [
        *(
            "optim.lr=1e4",
            "optim.lr=0",
            "optim.weight_decay=1e3",
            "optim.update_rms=1e3",
            "optim.eps=0",
            "optim.eps=10",
        ),
        *(
            "optim.lr=.inf",
            "optim.weight_decay=1e999",
            "optim.ns_steps=1000000",
            "model.norm_eps=0",
            "model.norm_eps=7",
        ),
        *("model.rope_theta=0", "model.rope_theta=1e30", "model.init_std=100", "model.routed_scaling_factor=0"),
        *("optim.lr=1e-9", "optim.eps=1e-30", "optim.update_rms=1e-9", "optim.grad_clip=1e-9", "optim.grad_clip=-1"),
        *("optim.qk_clip=1e-9", "model.init_std=1e-9", "model.norm_eps=1e-30", "model.routed_scaling_factor=1e-9"),
        *("model.router_bias_rate=3", "model.router_bias_rate=.nan", "checkpoint.grace_s=.inf", "scaling.wait_s=.inf"),
    ],
)
def test_numbers_that_ruin_a_model_are_refused_by_key(override):
    key, _, _ = override.partition("=")
    with pytest.raises(ConfigError, match=rf"{key}:? must be"):
        load("demo", [override])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        *(("train.steps=010", 10), ("train.steps= 7", 7), ("train.steps='12'", 12), ("optim.lr=1e-3", 1e-3)),
        *(("optim.lr=.5", 0.5), ("optim.nesterov=off", False), ("optim.nesterov=0", False)),
        *(("optim.nesterov=True", True), ("optim.warmup_steps=${train.steps}", 400)),
        *(("train.steps=12:30", None), ("train.steps=0x10", None), ("train.steps=0b1", None), ("train.steps=", None)),
        *(("train.steps=null", None), ("train.steps=true", None), ("optim.lr=1:30", None), ("optim.lr=true", None)),
        *(("optim.nesterov=2", None), ("optim.nesterov=1.0", None), ("optim.nesterov=null", None)),
    ],
)
def test_a_number_is_what_people_read_and_not_what_yaml_makes_of_it(override, value):
    """To YAML 010 is 8 and 12:30 is 750; whatever is not 0 would be true."""
    key = override.partition("=")[0]
    if value is None:
        with pytest.raises(ConfigError, match=f"{key}: must be"):
            load("demo", [override])
    else:
        section, name = key.split(".")
        assert getattr(getattr(load("demo", [override]), section), name) == value


def test_weights_take_the_place_of_all_that_were_there():
    """A source that is left out gives nothing, as in a file."""
    for override, weights in (
        ("={chosen: 1}", {"chosen": 1.0}),
        ("={chosen: 0.5, code: 1}", {"chosen": 0.5, "code": 1.0}),
        ("={}", {}),
        (".code=3", {"code": 3.0, "chosen": 1.0}),
    ):
        config = load("moonlight-demo", [f"train.stages.3.weights{override}"])
        assert config.train.stages[3].weights == weights, override


def test_a_stage_s_rate_and_the_decay_take_no_more_than_a_run_s():
    load("moonlight-demo", ["train.stages.1.final_lr=1", "train.stages.3.lr=1", "optim.weight_decay=0.1"])
    with pytest.raises(ConfigError, match=r"optim.weight_decay=2 takes more than a tenth .* of stage cooldown, at a"):
        load("moonlight-demo", ["train.stages.3.lr=0.06", "optim.weight_decay=2"])


def test_an_override_that_cannot_be_put_anywhere_is_named():
    for override in ("train.stages.4.steps=3", "train.stages={}"):
        with pytest.raises(ConfigError, match=f"moonlight-demo: {override}: "):
            load("moonlight-demo", [override])


def test_a_switch_in_a_file_is_no_number(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {nesterov: 2}")
    with pytest.raises(ConfigError, match="optim.nesterov: must be true or false, not 2"):
        load(str(tmp_path / "a.yaml"), [])


def test_all_problems_are_gathered_with_hints():
    wrong = [
        "optim.lrr=1",
        "optim.learning_rate=1",
        "steps=3",
        "train.steps=many",
        "train.micro_batch=5",
        "data=3",
        "scaling.max_workers=0",
        "optim.name=adam",
        "nonsense=1",
        "train.seq_len=1.5",
    ]
    with pytest.raises(ConfigError) as raised:
        load("demo", wrong)
    text = str(raised.value)
    assert (raised.value.exit_code == 2 and "8 problem(s)" in text.splitlines()[0]) or "problem(s)" in text
    for expected in (
        "optim.lrr: unknown key; did you mean optim.lr?",
        "steps: unknown key; did you mean train.steps or train.stages[].steps?",
        "train.steps: must be a whole number, not 'many'",
        "train.seq_len: must be a whole number, not '1.5'",
        "data: is a section with keys of its own, not 3",
        "optim.name: must be one of muon, adamw, not 'adam'",
        "nonsense: unknown key",
        "scaling.max_workers must be at least min_workers (1), not 0",
    ):
        assert expected in text, expected


def test_a_source_that_would_not_be_read_is_refused():
    """It would be trained on the sources as before, and nobody told."""
    with pytest.raises(ConfigError, match=r"data.source=my.txt would not be read beside data.sources \(code, chosen\)"):
        load("moonlight-demo", ["data.source=my.txt"])
    assert load("moonlight-demo", ["data.source=python-stdlib"]), "as a config that is printed has it"


def test_a_batch_that_cannot_be_formed():
    with pytest.raises(ConfigError, match=r"train.global_batch must be a multiple of micro_batch \(5\), not 16"):
        load("demo", ["train.micro_batch=5"])


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "a: ${b}", "\x00", "run: {name: }}"])
def test_broken_yaml_is_one_message(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="broken.yaml"):
        load(str(path), [])


def test_a_missing_config_and_a_wrong_override():
    with pytest.raises(ConfigError, match="no such config; give a YAML file or one of demo"):
        load("nowhere.yaml", [])
    with pytest.raises(ConfigError, match="key=value"):
        load("demo", ["optim.lr"])


@pytest.mark.parametrize(
    "override",
    [
        "data.source=python-stdlib,https://token@host/corpus.txt",
        "checkpoint.url=sftp://me:secret@host/runs",
        "storage.s3_endpoint=http://key:secret@host:9000",
        "train.init=https://me:secret@host/runs",
        "tracking.uri=http://me:secret@host:5000",
        "tracking.uri=postgresql://me:secret@host/mlflow",
    ],
)
def test_a_password_in_any_url_is_refused_and_not_repeated(override):
    with pytest.raises(ConfigError, match="must have no user or password in it") as refusal:
        load("demo", [override])
    assert "secret" not in str(refusal.value) and "token@" not in str(refusal.value)


def test_a_user_without_a_password_is_no_secret():
    load("demo", ["checkpoint.url=abfs://container@account.dfs.core.windows.net/runs", "train.init=s3://bucket/a@5"])


def test_a_config_of_data_and_a_name_is_of_a_small_model():
    config = load_values({"run": {"name": "mine"}, "data": {"source": "texts"}}, [], "mine")
    for model in (config.model, LlamaConfig()):
        assert layout_of(model, config.optim, 1).parameters < 1.5e6


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml") if "demo" not in path.stem))
def test_a_large_config_states_all_of_its_model_itself(name):
    values, config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), load(name, [])
    assert set(values["model"]) == {field.name for field in fields(config.model)}
    assert config.run.name == name and not config.train.micro_batch
