"""The plan against real engines, and what it refuses."""

import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from typer import TyperException
from typer.testing import CliRunner

from jobs.cli import app
from jobs.doctor.slot_probe import SlotProbe
from jobs.load import CONFIGS, load
from jobs.planning.cost import seconds, seconds_of
from jobs.planning.estimate import Machines
from jobs.planning.plan import Terms, plan_run
from jobs.planning.state import layout_of
from jobs.planning.timing import update_works
from jobs.planning.traffic import traffic_of
from jobs.planning.work import micro_batch_of, recorded
from orchestrator.config import RunConfig
from tests.ranks import run_ranks
from workers.calibrate import Calibration, Collective, Curve
from workers.common.errors import ConfigError
from workers.recipe import TrainConfig
from workers.work import KINDS, Work, product

CPU = Calibration(
    device="a test's CPU",
    kind="cpu",
    precision="fp32",
    memory_bytes=64 * 10**9,
    seconds_per_op=1e-6,
    curves={kind: Curve((1.0,), (1e10,)) for kind in KINDS},
    host_bytes_per_s=1e9,
    collectives=tuple(Collective(name, 2, 1e-4, 1e9) for name in ("all_reduce", "reduce", "all_gather", "all_to_all")),
)
SMALL = ["model.num_layers=2", "train.global_batch=4", "train.micro_batch=1", "train.seq_len=32"]


def real_step(rank: int, world_size: int, config: RunConfig) -> tuple[int, int, int, dict[str, int]]:
    """Return bytes of a snapshot's shard, of all of it, and of weights, and what a step and its boundary send."""
    from workers.boundary import Told, agree
    from workers.engine import build_engine
    from workers.objective import batch_of, summed_loss
    from workers.state import shard_map, shard_tensors
    from workers.traffic import Traffic

    built = build_engine(config.model, config.optim, config.train, 0, torch.device("cpu"))
    with Traffic() as traffic:
        batch = batch_of(torch.zeros(1, 33, dtype=torch.int64))
        loss = summed_loss(built.engine(batch.inputs), built.model.head, batch.targets)
        built.engine.backward(loss, scale_wrt_gas=False)
        built.engine.step()
    sent = dict(traffic.sent)
    with Traffic() as traffic:
        agree(Told(*[1.0] * len(fields(Told))), 1, built.model.expert_load(), world_size, built.all_reduce)
    sent["boundary"] = traffic.sent["all_reduce"]
    weights = sum(flat.nbytes for flat in built.zero.bit16_groups_flat)
    weights += sum(buffer.nbytes for buffer in built.model.buffers())
    state = sum(tensor.nbytes for tensor in shard_tensors(built))
    return state, shard_map(built, world_size, rank).size.values, weights, sent


@pytest.mark.parametrize(("name", "world_size"), [("demo", 1), ("demo", 2), ("demo", 4), ("demo-llama", 3)])
def test_state_and_traffic_are_those_of_the_engine(name, world_size):
    config = load(name, SMALL)
    results = run_ranks(world_size, real_step, config)
    plan = plan_run(config, Machines(gpus=world_size, gpus_per_node=1, calibration=CPU))
    for state, snapshot, weights, _ in results:
        assert plan.memory.state["master weights"] + plan.memory.state["optimizer state"] == state
        assert plan.snapshot_bytes == snapshot
        told = SlotProbe.snapshot_bytes(None, config.model, config.optim, world_size)  # type: ignore[arg-type]
        assert told == snapshot, "the doctor has the same"
        assert plan.memory.state["weights"] == weights
    for collective, planned in {**plan.sent, "boundary": plan.boundary_bytes}.items():
        assert sum(sent[collective] for *_, sent in results) / world_size == pytest.approx(planned, abs=4), collective
    assert set(plan.sent) == {name for name, nbytes in results[0][3].items() if nbytes and name != "boundary"}


def real_update(rank: int, world_size: int, config: RunConfig) -> dict[str, float]:
    """Return what a real step of the optimizer does, by kind of work."""
    from workers.engine import build_engine

    built = build_engine(config.model, config.optim, config.train, 0, torch.device("cpu"))
    done: Counter[str] = Counter()
    for group in built.optimizer.param_groups:
        (shard,) = group["params"]
        if group["method"] == "muon":
            shard.grad, found = torch.randn_like(shard), built.optimizer.state[shard]["momentum_buffer"]
            assert built.optimizer.exchange is not None
            built.optimizer.exchange.step(shard.detach(), shard.grad, found, 0.1, 0.1)  # Its memory is there now.
            with recorded() as recorder, torch.no_grad():
                built.optimizer.exchange.step(shard.detach(), shard.grad, found, 0.1, 0.1)
            for work, count in recorder.take_works().items():
                done[work.kind] += count * work.amount
    return dict(done)


@pytest.mark.parametrize("changes", [[], ["optim.nesterov=false", "optim.rms_control=update_norm"]])
def test_the_optimizer_does_what_is_planned(changes):
    config = load("demo", [*SMALL, *changes])
    (done,) = run_ranks(1, real_update, config)
    layout = layout_of(config.model, config.optim, 1)
    planned: Counter[str] = Counter()
    for works in update_works(
        replace(layout, groups=[g for g in layout.groups if g.method == "muon"]), config.optim, "cpu"
    ):
        for work, count in works.items():
            planned[work.kind] += count * work.amount
    assert planned["matmul"] == done["matmul"] > 0
    assert planned["elementwise"] == pytest.approx(done["elementwise"], rel=0.01)


def test_validations_are_as_many_as_steps_that_have_one():
    for every in (0, 1, 3, 7, 10, 11):
        train = TrainConfig(steps=10, validate_every=every)
        assert train.validations == sum(train.validates(step) for step in range(train.steps + 1))


def test_traffic_of_a_gpu_has_half_the_bytes():
    config = load("demo", [])
    layout = layout_of(config.model, config.optim, 4)
    full, half = traffic_of(layout, 4, 4), traffic_of(layout, 2, 2)
    for name in ("reduce", "all_gather", "all_to_all"):
        assert full[name] == 2 * half[name]


def held_and_flops(rank: int, world_size: int, config: RunConfig) -> tuple[int, int]:
    """Return the bytes that a real forward pass keeps for the backward one, and the operations of both."""
    from torch.utils.flop_counter import FlopCounterMode

    from workers.models import build
    from workers.objective import batch_of, summed_loss

    model = build(config.model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = batch_of(torch.randint(256, (config.train.micro_batch, config.train.seq_len + 1)))
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        summed_loss(model(batch.inputs), model.head, batch.targets).backward()
    return sum(kept.values()), counter.get_total_flops()


def test_activations_and_operations_are_those_of_a_real_pass():
    config = load("demo-llama", ["train.micro_batch=2", "train.seq_len=128", "train.global_batch=2"])
    ((kept, flops),) = run_ranks(1, held_and_flops, config)
    micro = micro_batch_of(config.model, 2, 128, torch.float32, "cpu")
    assert kept <= micro.peak <= 1.35 * kept, "at the peak there is little but what is kept for the backward pass"
    products = sum(
        work.amount * count
        for works in (micro.forward, micro.backward)
        for work, count in works.items()
        if work.kind == "matmul"
    )
    assert products == flops, "torch's counter knows no attention on a CPU"


def test_gradients_count_once_where_they_are_there_before():
    config = load("demo-llama", SMALL)
    micro = micro_batch_of(config.model, 1, 32, torch.float32, "cpu")
    parameters = 4 * layout_of(config.model, config.optim, 1).parameters
    largest = 4 * 480 * 128
    assert micro.peak > parameters
    assert micro.peak_beside_gradients <= micro.peak <= parameters + micro.peak_beside_gradients
    assert micro.peak_beside_gradients >= largest


def test_a_longer_run_on_more_machines_takes_no_other_arithmetic():
    config = load("demo", SMALL)
    one, two = (plan_run(config, Machines(gpus=gpus, calibration=CPU), Terms(price=3.0)) for gpus in (1, 2))
    assert two.time.forward == pytest.approx(one.time.forward / 2)
    assert one.time.gather == 0 < two.time.gather
    assert one.tokens == 400 * 4 * 32 and one.days * 86400 == pytest.approx(one.tokens / one.tokens_per_second)
    assert one.money == pytest.approx(3 * one.gpu_hours) and two.gpu_hours == pytest.approx(48 * two.days)
    failing = plan_run(config, Machines(gpus=2, calibration=CPU), Terms(mtbf_hours=100.0))
    assert failing.goodput is not None and failing.days > two.days
    longer = plan_run(config, Machines(gpus=1, calibration=CPU), Terms(tokens=10 * one.tokens))
    assert longer.days == pytest.approx(10 * one.days, rel=0.01), "but for the validation at the start"
    assert longer.time.validation < one.time.validation


def test_stages_are_planned_each_for_itself():
    config = load("moonlight-demo", ["model.num_layers=2", "train.micro_batch=0"])
    machines, terms = Machines(gpus=2, calibration=CPU), Terms(price=3.0)
    plan = plan_run(config, machines, terms)
    assert plan.config.train.micro_batch > 0 and all(b % plan.config.train.micro_batch == 0 for b in (16, 32))
    fixed = replace(config, train=plan.config.train)
    alone = [plan_run(replace(fixed, train=fixed.train.of_stage(i)), machines, terms) for i in range(4)]
    assert [one.tokens for one in plan.stages] == [one.tokens for one in alone]
    assert plan.tokens == sum(one.tokens for one in alone) == config.recipe.samples_before(611) * 256
    assert plan.days == pytest.approx(sum(one.days for one in alone))
    assert plan.money == pytest.approx(sum(one.money or 0 for one in alone))
    assert [plan.of_stage(stage)[0] for stage in plan.stages] == pytest.approx([one.days for one in alone])
    assert plan.time.total == alone[2].time.total > alone[0].time.total
    with pytest.raises(ConfigError, match="--tokens 5: this config has train.stages"):
        plan_run(config, machines, Terms(tokens=5))


def test_the_roofline_takes_the_longer_of_both():
    curves = {**CPU.curves, "matmul": Curve((16.0, 64.0), (1e9, 4e9)), "elementwise": Curve((1.0,), (1e9,))}
    device = replace(CPU, curves=curves, seconds_per_op=0.0)
    wide, thin = product(1, 64, 64, 64, 4), product(1, 2048, 1, 2048, 4)
    assert seconds_of(wide, device) == pytest.approx(2 * 64**3 / 4e9)
    assert seconds_of(thin, device) == pytest.approx(4 * (2048 * 2 + 2048**2) / 1e9)
    assert device.curves["matmul"].rate(32.0) == pytest.approx(2e9), "straight on logarithmic axes"
    assert seconds({wide: 3}, replace(device, share=0.5)) == pytest.approx(6 * seconds_of(wide, device))
    gpu = replace(device, kind="cuda", seconds_per_op=1.0)
    assert seconds_of(Work("call"), gpu) == 0.0 and seconds({wide: 2, Work("call"): 3}, gpu) == 5.0, "called ahead"
    assert seconds({wide: 2}, replace(gpu, seconds_per_op=0.0)) == 2 * seconds_of(wide, gpu)


def test_a_calibration_survives_its_file(tmp_path):
    assert Calibration.from_json(CPU.to_json()) == CPU
    for text, problem in (
        ("no json", "not a calibration"),
        (CPU.to_json().replace('"format": 1', '"format": 9'), "format 9; this raymuon reads 1"),
        (CPU.to_json().replace("gather", "gathering"), "lacks gather"),
        (CPU.to_json().replace('"share"', '"shares"'), "damaged calibration"),
    ):
        with pytest.raises(ConfigError, match=problem):
            Calibration.from_json(text)
    median = CPU.with_speed_of([replace(CPU, seconds_per_op=3e-6), replace(CPU, seconds_per_op=2e-6)])
    assert median == replace(CPU, seconds_per_op=2e-6)


PLAIN = {"recompute": "none", "logits": "whole", "gradients": "whole", "accumulate": "weights"}
"""Of `train`: no memory is saved."""


def refused(*arguments: str) -> tuple[int, str]:
    error = CliRunner().invoke(app, ["plan", *arguments], standalone_mode=False).exception
    assert isinstance(error, (ConfigError, TyperException))
    return error.exit_code, error.format_message() if isinstance(error, TyperException) else str(error)


def test_what_cannot_fit_is_refused_with_what_would():
    code, text = refused("moonlight-16b", "--gpus", "8", "--gpu-type", "l4")
    assert code == 2
    assert "does not fit: 66.0 GB" in text and "L4 (data sheet) has 24.0 GB" in text
    assert "weights 31.9 GB" in text and "27 of 27 layers computed again, chunked logits, partitioned gradients" in text
    assert "would fit: 8 x H100 (80 GB)" in text
    plain = [f"train.{key}={value}" for key, value in PLAIN.items()]
    _, text = refused("moonlight-16b", *plain, "train.micro_batch=1", "--gpus", "8", "--gpu-type", "l4")
    assert "does not fit: 13" in text and "gradients 31.9 GB" in text and "would fit: 8 x H200 (141 GB)" in text


def test_the_smallest_change_comes_first():
    # Room for six sequences' activations, so for four as a divisor of the batch of eight.
    kept = [f"train.{key}={value}" for key, value in PLAIN.items()]
    config = load("demo-llama", ["train.global_batch=8", "train.micro_batch=8", "telemetry.every=0", *kept])
    gpu = replace(CPU, kind="cuda", precision="bf16")

    def plan(memory: int, **train: int) -> None:
        changed = replace(config, train=replace(config.train, **train))
        plan_run(changed, Machines(gpus=1, calibration=replace(gpu, memory_bytes=memory))).require_fit()

    need = plan_run(config, Machines(gpus=1, calibration=gpu)).memory.peak
    four = plan_run(replace(config, train=replace(config.train, micro_batch=4)), Machines(gpus=1, calibration=gpu))
    plan(need)
    with pytest.raises(ConfigError) as refusal:
        plan((need + four.memory.peak) // 2)
    first = str(refusal.value).splitlines()[2]
    assert first == "  would fit: train.micro_batch=4 instead of 8, with as many ranks"
    plan((need + four.memory.peak) // 2, micro_batch=4)


def test_a_machine_that_is_too_small_is_offered_fewer_workers():
    config = load("demo-llama", ["train.global_batch=8", "train.micro_batch=1", "telemetry.every=0"])
    two, eight = (plan_run(config, Machines(gpus=gpus, calibration=CPU)) for gpus in (2, 8))
    room = replace(CPU, memory_bytes=(two.needed + eight.needed) // 2)
    with pytest.raises(ConfigError, match=r"would fit: [24] worker\(s\)$"):
        plan_run(config, Machines(gpus=8, calibration=room)).require_fit()


def test_the_precision_of_the_config_counts():
    gpu = Machines(gpus=1, calibration=replace(CPU, kind="cuda", precision="bf16"))
    with pytest.raises(ConfigError, match="train.precision=fp32: the figures of a test's CPU are of bf16 products"):
        plan_run(load("demo", ["train.precision=fp32"]), gpu)
    half, whole = (plan_run(load("demo", SMALL), machines) for machines in (gpu, Machines(gpus=1, calibration=CPU)))
    assert 2 * half.memory.state["weights"] == pytest.approx(whole.memory.state["weights"], rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--gpu-type", "H101"], "H101: not in the table; known are B200"),
        (["--calibration", "no-such-file"], "cannot be read"),
        (["--gpu-type", "H100", "--price", "-1"], "--price': must be a finite number greater than 0, not -1"),
    ],
)
def test_wrong_options_are_told(arguments, problem):
    code, text = refused("demo", *arguments)
    assert code == 2 and problem in text


def test_both_forms_of_the_command(tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text(CPU.to_json())
    arguments = ["plan", "demo", *SMALL, "--gpus", "2", "--calibration", str(file), "--mtbf", "100", "--price", "1"]
    table = CliRunner().invoke(app, arguments)
    assert table.exit_code == 0
    assert "master weights" in table.output and "goodput expected" in table.output
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert told["fits"] and told["memory"]["peak_bytes"] > 0 and told["bytes_sent"]["reduce"] > 0
    assert told["seconds"]["total"] > 0 and told["goodput"]["share"] < 1 and told["money"] > 0
    assert told["matrices"]["straddlers"] == 1


def test_a_rule_of_widths_is_told_for_each_kind_of_parameter():
    arguments = ["plan", "demo", "--gpu-type", "H100", "optim.width_rule=spectral", "optim.base_width=32"]
    output = CliRunner().invoke(app, arguments).output
    told = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)["width_rule"]
    by_kind = {(kind["kind"], kind["role"]): kind for kind in told}
    assert len(by_kind) == len(told) == 10
    dense, head = by_kind["dense", "hidden"], by_kind["head", "head"]
    assert (dense["init_std"], dense["lr"], dense["decay"]) == pytest.approx((0.05 / 2, 0.016 / 2, 0.0016 / 4))
    assert (head["init_std"], head["lr"], head["method"]) == pytest.approx((0.05 / 4, 0.016 / 4, "adamw"))
    assert "width rule spectral, from base width 32" in output and "std 0.025, muon 0.008, decay 0.0004" in output
    assert "width rule" not in CliRunner().invoke(app, arguments[:4]).output
    code, text = refused("demo", *arguments[2:4], "optim.width_rule=spectral", "optim.base_width=16384")
    assert code == 2 and "optim.base_width=16384: at width 128 a step would take" in text


@pytest.mark.parametrize("width", ["20", "80"])
def test_without_a_type_those_that_hold_the_run_are_planned_and_the_tables_are_whole(width):
    arguments = ["plan", "moonlight-16b", "--gpus", "8", "--gpus", "64", "train.stages=[]", "train.tokens=0"]
    arguments += ["train.seq_len=4096", "train.micro_batch=1", "train.recompute=all", "train.logits=chunked"]
    output = CliRunner(env={"COLUMNS": width}).invoke(app, arguments).output
    assert "the smallest and the fastest GPUs that hold the run" in output and "…" not in output
    heads = re.findall(r"^ .*data sheet.*$", output, re.MULTILINE)
    cases = re.findall(r"\d+ x \S+ \(data sheet\)", heads[0])
    assert len(heads) == 7 and len(cases) >= 3 and {case.split(" ")[0] for case in cases} == {"8", "64"}
    rows = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in output.splitlines() if "  " in line.strip())
    assert rows["weights"].split("  ")[0] == "31.9 GB" and rows["speed"].count("tokens/s") == len(cases)
    assert rows["time"].count("days") == rows["GPU time"].count("hours") == len(cases)
    assert rows["straddlers"].split()[0] == "7" and rows["work in all"].count("TFLOP") == len(cases)
    assert "DOES NOT FIT" not in output


def test_where_no_type_holds_the_run_the_largest_is_shown_and_refused():
    done = CliRunner().invoke(app, ["plan", "moonlight-16b", "--gpus", "1"])
    assert isinstance(done.exception, ConfigError) and "1 x B200 (data sheet)" in done.output
    assert "180.0 GB: DOES NOT FIT" in done.output


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_built_in_config_is_planned_and_fits(name):
    config = load(name, ["train.micro_batch=1"])
    plan = plan_run(config, Machines(gpus=config.scaling.max_workers, gpu_type="H100"))
    assert plan.fits and plan.tokens_per_second > 0 and 0 < plan.mfu < 1


def test_a_plan_starts_neither_ray_nor_deepspeed():
    code = "import sys, jobs.planning.plan; sys.exit(bool({'ray', 'deepspeed', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
