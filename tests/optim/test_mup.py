"""Rules of widths: the papers' factors, and that a sharded step has them to the element at any world size."""

from dataclasses import replace
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import nn

from optim.config import OptimConfig
from optim.layout import GroupLayout
from optim.mup import GROWS, UNSCALED, Parametrization, Step, WidthRule, decay, rate, std, stretches
from optim.polynomials import coefficients
from optim.reference import ReferenceMuon
from optim.routing import is_matrix
from tests.closeness import ADAMW_EPS, assert_close_weights, gain
from tests.optim.test_zero1_oracle import Toy, targets_of
from tests.ranks import run_ranks
from tests.workers import test_llama, test_moonlight
from workers.common.errors import ConfigError
from workers.models import build, build_empty

MODELS = {"moonlight": test_moonlight.TINY, "llama": test_llama.TINY}
RULES = get_args(WidthRule)
LR, DECAY, STEPS = 0.02, 2.0, 3
"""A decay that shows: of 4 % of the weights in a step."""


def config_of(rule: str, **settings) -> OptimConfig:
    common = {"lr": LR, "weight_decay": DECAY, "eps": ADAMW_EPS, "grad_clip": 0.0, "ns_dtype": "fp32"}
    return OptimConfig(**{**common, "wire_dtype": "fp32", "width_rule": rule, "base_width": 8, **settings})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("method", ["muon", "adamw"])
@pytest.mark.parametrize("role", GROWS)
def test_at_the_base_width_every_factor_is_exactly_one(rule, method, role):
    for rows, columns in ((3, 7), (7, 3), (352, 128), (1, 1)):
        assert std(rule, 1.0, role, rows, columns) == 1.0
        assert rate(rule, 1.0, GROWS[role], method, rows, columns) == 1.0
    assert decay(rule, 1.0, *GROWS[role]) == 1.0


PAPERS = {
    # Of a model four times as wide: std, Muon's rate, AdamW's rate, decay in a step.
    ("rms", "embedding"): (1, 1, 1, 1),
    ("rms", "hidden"): (1 / 2, 1, 1, 1),
    ("rms", "narrowing"): (1 / 2, 1, 1, 1),
    ("rms", "widening"): (1, 1, 1, 1),
    ("rms", "head"): (1 / 2, 1, 1, 1),
    # Essential AI, figure 5: on the weight itself input 1 and 1, output 1/n and 1/n, hidden 1/sqrt(n) and 1/n.
    ("essential", "embedding"): (1, 1, 1, 1 / 2),
    ("essential", "hidden"): (1 / 2, 1 / 4, 1 / 4, 1 / 4),
    ("essential", "narrowing"): (1 / 4, 1 / 4, 1 / 4, 1 / 2),
    ("essential", "widening"): (1, 1, 1, 1 / 2),
    ("essential", "head"): (1 / 4, 1 / 4, 1 / 4, 1 / 2),
    ("essential", "vector"): (1, 1, 1, 1 / 2),
    # Qiu et al., table 1: Muon's hidden rate sqrt(d_out / d_in) on O, of which 0.2 sqrt(max) has taken sqrt(n).
    ("spectral", "embedding"): (1, 1, 1, 1 / 4),
    ("spectral", "hidden"): (1 / 2, 1 / 2, 1 / 4, 1 / 4),
    ("spectral", "narrowing"): (1 / 4, 1 / 4, 1 / 4, 1 / 4),
    ("spectral", "widening"): (1, 1, 1, 1 / 4),
    ("spectral", "head"): (1 / 4, 1 / 4, 1 / 4, 1 / 4),
    ("spectral", "vector"): (1, 1, 1, 1 / 4),
}
TABLES = ("embedding", "head", "vector")
"""Never Muon's."""
SHAPES = {"narrowing": (8, 128), "widening": (128, 8)}


@pytest.mark.parametrize(("rule", "role"), PAPERS)
def test_factors_are_the_papers(rule, role):
    shape = SHAPES.get(role, (128, 256))
    found = (
        std(rule, 4.0, role, *shape),
        1.0 if role in TABLES else rate(rule, 4.0, GROWS[role], "muon", *shape),
        rate(rule, 4.0, GROWS[role], "adamw", *shape),
        decay(rule, 4.0, *GROWS[role]),
    )
    expected = PAPERS[rule, role]
    assert found == pytest.approx((expected[0], 1.0 if role in TABLES else expected[1], *expected[2:]))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 3), "narrowing", "widening"])
def test_spectral_keeps_the_spectral_norms_of_weights_and_of_muons_updates(shape):
    """Both are to grow as `sqrt(fan_out / fan_in)`, measured on matrices; with narrow and wide ones alike."""
    role = shape if isinstance(shape, str) else "hidden"
    random, weights, updates = torch.Generator().manual_seed(0), [], []
    for width in (64, 128, 256, 512):
        rows, columns = {"narrowing": (8, width), "widening": (width, 8)}.get(role) or [width * by for by in shape]
        ratio, wanted = width / 64, (rows / columns) ** 0.5
        initial = torch.randn(rows, columns, generator=random) * std("spectral", ratio, role, rows, columns)
        weights.append(torch.linalg.matrix_norm(initial, 2).item() / wanted)
        updates.append(rate("spectral", ratio, GROWS[role], "muon", rows, columns) * max(rows, columns) ** 0.5 / wanted)
    assert max(updates) / min(updates) == pytest.approx(1.0)
    assert max(weights) / min(weights) < 1.25, weights


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rule", RULES)
def test_initial_weights_are_the_same_draws_times_the_rules_factors(model, rule):
    torch.manual_seed(0)
    plain = build(MODELS[model])
    after = torch.get_rng_state()
    torch.manual_seed(0)
    made = build(MODELS[model], optim=config_of(rule))
    assert torch.equal(torch.get_rng_state(), after)
    roles, parametrization = made.roles(), made.parametrization(config_of(rule))
    for (name, weight), standard in zip(made.named_parameters(), plain.parameters(), strict=True):
        factor = 1.0 if weight.dim() < 2 else std(rule, 4.0, roles[name], *weight.shape[-2:])
        torch.testing.assert_close(weight, standard * factor, rtol=1e-6, atol=0)
        assert weight.dim() < 2 or parametrization.std(name, *weight.shape[-2:]) == factor
        assert rule == "none" or weight.dim() < 2 or roles[name] == "embedding" or factor < 1 or "kv_b" in name


def test_every_kind_of_parameter_has_its_role():
    roles = build_empty(MODELS["moonlight"]).roles()
    told = {name.removeprefix("model.layers.1."): role for name, role in roles.items() if ".0." not in name}
    fixed = {name: role for name, role in told.items() if role not in ("hidden", "vector")}
    assert fixed == {
        "model.embed_tokens.weight": "embedding",
        "self_attn.kv_a_proj_with_mqa.weight": "narrowing",
        "self_attn.kv_b_proj.weight": "widening",
        "mlp.gate.weight": "narrowing",
        "lm_head.weight": "head",
    }
    assert sum(role == "hidden" for role in told.values()) == 8 and told["self_attn.kv_a_layernorm.weight"] == "vector"
    llama = build_empty(MODELS["llama"]).roles()
    assert {role for name, role in llama.items() if ".layers." in name and "norm" not in name} == {"hidden"}


def test_intervals_tile_a_shard_with_the_factors_of_each_element():
    names, numels = ["a", "b", "c", "d", "e"], [5, 7, 3, 1, 8]
    steps = {name: Step(*by) for name, by in zip(names, [(1, 1), (2, 1), (2, 1), (1, 3), (1, 1)], strict=True)}
    expected = [steps[name] for name, numel in zip(names, numels, strict=True) for _ in range(numel)]
    for world_size in range(1, 17):
        layout, found = GroupLayout.of(names, numels, world_size), []
        for rank in range(world_size):
            held = stretches(layout.fragments(rank), layout.partition, steps.__getitem__)
            by_place = sorted((first, last, step) for step, parts in held.items() for first, last in parts)
            assert [last for _, last, _ in by_place[:-1]] == [first for first, _, _ in by_place[1:]]
            assert not by_place or (by_place[0][0], by_place[-1][1]) == (0, layout.partition)
            assert bool(by_place) == bool(layout.fragments(rank))
            assert all(one[2] != other[2] for one, other in pairwise(by_place)), "neighbours alike are one"
            found += [step for first, last, step in by_place for _ in range(first, last)]
        assert found[: len(expected)] == expected
        alike = stretches(layout.fragments(0), layout.partition, lambda name: UNSCALED)
        assert alike == {UNSCALED: [(0, layout.partition)]}


def of_model(model: str, config: OptimConfig) -> tuple[dict, set[str], dict, Parametrization]:
    """Return shapes, tables, parts and rule of a model, its names being those that a module of one level may have."""
    made = build_empty(MODELS[model])
    plain = lambda name: name.replace(".", "_")  # noqa: E731
    shapes = {plain(name): tuple(p.shape) for name, p in made.named_parameters()}
    parts = {plain(name): rows for name, rows in made.matrix_parts(config.split).items()}
    rule = made.parametrization(config)
    named = {plain(name): role for name, role in rule.roles.items()}
    return shapes, set(map(plain, made.tables())), parts, replace(rule, roles=named, cut=frozenset(parts))


def sharded(rank: int, world_size: int, model: str, config: OptimConfig) -> dict[str, torch.Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from optim.zero1 import Zero1Optimizer
    from workers.recipe import TrainConfig
    from workers.settings import deepspeed_config

    shapes, tables, parts, parametrization = of_model(model, config)
    toy = Toy(shapes)
    optimizer = Zero1Optimizer(toy.named_parameters(), config, tables, parts, parametrization=parametrization)
    ours = deepspeed_config(TrainConfig(), config, "cpu", sum(p.numel() for p in toy.parameters()))
    engine, *_ = deepspeed.initialize(model=toy, optimizer=optimizer, config=ours, dist_init_required=False)
    optimizer.bind(engine.optimizer)
    for step in range(STEPS):
        engine.backward(engine(targets_of(toy, step, rank, True)), scale_wrt_gas=False)
        engine.step()
    found = {name: safe_get_full_fp32_param(p).clone() for name, p in toy.named_parameters()}
    engine.destroy()
    return found


def reference(world_size: int, model: str, config: OptimConfig, scaled: tuple[bool, bool] = (True, True)) -> dict:
    """Return the weights before and after: exact arithmetic, one matrix after the other, each with a rate of its own.

    `scaled` tells whether the rates have their factors, and whether the decays do.
    """
    shapes, tables, parts, rule = of_model(model, config)
    toy, pieces = Toy(shapes).double(), {}
    for name, weight in toy.named_parameters():
        muon = config.name == "muon" and is_matrix(name, shapes[name], tables)
        rows = parts.get(name, (shapes[name][-2],)) if muon else (shapes[name][0],)
        cut = weight.detach().split(rows, dim=-2) if muon else (weight.detach(),)
        for number, part in enumerate(cut):
            piece = nn.Parameter(part.clone())
            step = rule.step(name, "muon" if muon else "adamw", *(part.shape[-2:] if muon else ()))
            by_rate, by_decay = (by if on else 1.0 for by, on in zip((step.rate, step.decay), scaled, strict=True))
            settings = {"lr": LR * by_rate, "weight_decay": DECAY * by_decay / by_rate}
            pieces[name, number] = piece, muon, rows, settings
    groups = [
        [{"params": [piece], **settings} for piece, muon, _, settings in pieces.values() if muon == kind]
        for kind in (True, False)
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups[1], betas=(0.9, 0.95), eps=ADAMW_EPS)]
    if groups[0]:
        optimizers.append(ReferenceMuon(groups[0], LR, ns_dtype=torch.float64))
    for step in range(STEPS):
        by_rank = [targets_of(toy, step, rank, True) for rank in range(world_size)]
        for (name, number), (piece, muon, rows, _) in pieces.items():
            mean = sum(targets[name].double() for targets in by_rank) / world_size
            piece.grad = mean.split(rows, dim=-2)[number] if muon else mean
        for optimizer in optimizers:
            optimizer.step()
    found = {}
    for name, weight in toy.named_parameters():
        own = [piece.detach() for (of, _), (piece, *_) in pieces.items() if of == name]
        found[name] = weight.detach(), torch.cat(own, dim=-2) if len(own) > 1 else own[0]
    return found


def assert_equals(found: dict, expected: dict, config: OptimConfig) -> None:
    enlarged = gain(coefficients(config.ns_coefficients, config.ns_steps)) if config.name == "muon" else 1.0
    for name, (before, after) in expected.items():
        assert_close_weights(found[name], after, before, enlarged, name)


@pytest.mark.numeric
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {"width_rule": "spectral", "split": "heads"},
        {"width_rule": "essential"},
        {"width_rule": "spectral", "name": "adamw"},
    ],
    ids=["spectral by heads", "essential", "spectral adamw"],
)
def test_sharded_steps_equal_the_reference_with_a_rate_and_a_decay_of_each_matrix(ranks, model, settings):
    config = config_of(**{"rule": settings["width_rule"], **settings})
    expected = reference(ranks.world_size, model, config)
    for found in ranks.run(sharded, model, config):
        assert_equals(found, expected, config)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_reference_sees_each_factor_alone(name):
    """A rate or a decay without its factor would show in every parameter that has one."""
    config = config_of("spectral", name=name)
    (found,) = run_ranks(1, sharded, "moonlight", config)
    *_, rule = of_model("moonlight", config)
    for scaled in ((False, True), (True, False)):
        for parameter, (before, after) in reference(1, "moonlight", config, scaled).items():
            method = "adamw" if before.dim() < 2 or rule.roles[parameter] in TABLES else name
            step = rule.step(parameter, method, *(before.shape[-2:] if before.dim() > 1 else ()))
            if (step.decay if scaled[0] else step.rate) != 1.0:
                with pytest.raises(AssertionError, match="apart"):
                    assert_equals(found, {parameter: (before, after)}, config)


def test_a_model_whose_head_is_its_embedding_and_too_large_a_decay_are_refused():
    model = build_empty(MODELS["llama"])
    with pytest.raises(ConfigError, match=r"at width 32 a step would take 0.32 of the weights.*optim.weight_decay=2"):
        model.parametrization(config_of("spectral", base_width=256))
    model.parametrization(config_of("rms", base_width=256))
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match=r"width_rule=rms: model.embed_tokens.weight is the embedding and the output"):
        model.parametrization(config_of("rms"))
    with pytest.raises(ValueError, match="base_width must be the width"):
        OptimConfig(width_rule="spectral")
