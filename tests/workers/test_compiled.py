"""Layers that torch.compile has made compute what those compute that run as they are written."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tests.closeness import assert_close
from tests.workers import test_llama, test_moonlight
from workers.config import ModelConfig
from workers.models import LanguageModel, build
from workers.models.attention import take_logits, watch
from workers.models.compiled import compile_ahead, compile_layers
from workers.models.recompute import recompute
from workers.objective import batch_of, summed_loss

# Two layers, the second like the first or with experts: compiled code is shared where it can be.
MODELS = {"moonlight": replace(test_moonlight.TINY, num_dense_layers=1), "llama": test_llama.TINY}


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Forget what other tests have compiled, and how often."""
    torch.compiler.reset()
    counters.clear()


def made(config: ModelConfig) -> LanguageModel:
    torch.manual_seed(0)
    return build(config)


def trained(model: LanguageModel, micro_batches: int = 1, documents: bool = False) -> list[Tensor]:
    """Return the loss and the gradients of a few micro-batches."""
    model.zero_grad()
    random = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for _ in range(micro_batches):
        tokens = torch.randint(256, (2, 25), generator=random)
        ends = torch.randint(9, (2, 25), generator=random).eq(0).cumsum(1).int() if documents else None
        batch = batch_of(tokens, documents=ends)
        found = summed_loss(model(*batch.given), model.head, batch.targets) / batch.counted
        found.backward()
        loss += found.detach()
    return [loss, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


# Not all four: compiling takes half a minute for each where nothing is kept of it.
@pytest.mark.parametrize(("name", "watched"), [("moonlight", False), ("llama", True)], ids=["moonlight", "watched"])
def test_compiled_layers_train_as_plain_ones(name, watched):
    config = MODELS[name]
    plain, compiled = made(config), made(config)
    compile_layers(compiled, watched)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compile_ahead(compiled, 2, 24, documents=False, watched=watched)
    made_ahead = counters["stats"]["unique_graphs"]
    assert made_ahead == (2 if name == "moonlight" else 1), "layers that are alike share their code"
    assert all(parameter.grad is None for parameter in compiled.parameters()) and not compiled.expert_load().sum()

    for model in (plain, compiled):
        watch(model, watched)
    expected, found = trained(plain), trained(compiled)
    assert len(expected) == len(found) == 1 + sum(1 for _ in plain.parameters())
    for exact, close in zip(expected, found, strict=True):
        assert_close(close, exact, config.num_layers)
    assert torch.equal(plain.expert_load(), compiled.expert_load())
    exact, close = take_logits(plain), take_logits(compiled)
    assert (close.queries, close.large) == (exact.queries, exact.large) and (close.queries > 0) == watched
    assert torch.equal(close.largest, exact.largest) or watched
    if watched:
        assert_close(close.largest, exact.largest, config.num_layers)

    watch(compiled, not watched), watch(plain, not watched)
    assert all(map(torch.equal, trained(compiled, 3), trained(plain, 3))), "what only some steps do is not compiled"
    exact, close = take_logits(plain), take_logits(compiled)
    assert torch.equal(close.largest, exact.largest) and close.queries == exact.queries

    watch(compiled, watched)
    assert all(map(torch.equal, found, trained(compiled))), "the same every time, whatever was in between"
    compiled.eval(), plain.eval()
    with torch.no_grad():
        for time in (5, 6):
            tokens = torch.arange(time).unsqueeze(0)
            assert torch.equal(compiled(tokens), plain(tokens))
    assert counters["stats"]["unique_graphs"] == made_ahead, "only training is compiled"

    compiled.train(), compiled.clear_expert_load(), plain.clear_expert_load()
    recompute(compiled, config.num_layers)
    again, _ = trained(compiled), trained(plain.train())
    for exact, close in zip(expected, again, strict=True):
        assert_close(close, exact, config.num_layers)
    assert torch.equal(plain.expert_load(), compiled.expert_load()), "counted once"
    assert all(map(torch.equal, again, trained(compiled)))


def test_a_mask_of_documents_is_kept_to():
    plain, compiled = made(MODELS["llama"]), made(MODELS["llama"])
    compile_layers(compiled)
    for exact, close in zip(trained(plain, 2, documents=True), trained(compiled, 2, documents=True), strict=True):
        assert_close(close, exact, 2)


def test_a_process_that_goes_on_with_another_run_compiles_anew():
    """What was compiled for the models of all runs would come to the limit, behind which code runs as written."""
    from workers.training import forget

    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    for expected in (1, 1, 2):
        if expected == 2:
            forget()
        assert double(torch.ones(3)).tolist() == [2, 2, 2] and counters["stats"]["unique_graphs"] == expected
