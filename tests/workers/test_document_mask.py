"""Documents packed into a sequence learn as each does alone: a mask hides the others, and nothing else changes."""

import pytest
import torch
from torch import Tensor

from tests.closeness import EPS, assert_close
from tests.workers.test_attention import MODELS
from workers.common.documents import NOBODY
from workers.models import LanguageModel, build
from workers.models.attention import CausalAttention, take_logits, watch
from workers.models.masks import DocumentMask
from workers.objective import IGNORED, Batch, batch_of, summed_loss

pytestmark = pytest.mark.numeric

PACKED = {
    "several, one of a token": [[4, 1, 7, 5], [9, 8]],
    "one over all": [[17], [17]],
    "a boundary before the last input": [[15, 2], [1, 16]],
    "a last token of its own": [[16, 1], [17]],
    "tokens that are documents": [[1] * 17, [3, 14]],
}
"""Lengths of the documents in each sequence of 16 inputs and the last target."""
ENLARGED = 4
"""Two layers of logits and norms, and gradients in which much cancels."""


def numbered(packing: list[list[int]]) -> Tensor:
    return torch.stack([torch.repeat_interleave(torch.tensor(lengths)) for lengths in packing]).int()


def model_of(name: str, dtype: torch.dtype, watched: bool) -> LanguageModel:
    torch.manual_seed(0)
    model = build(MODELS[name]).to(dtype)
    watch(model, watched)
    return model


def passed(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return hidden states and the summed loss, whose gradient is added to the model's."""
    hidden = model(*batch.given)
    loss = summed_loss(hidden, model.head, batch.targets)
    loss.backward()
    return hidden.detach(), loss.detach()


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", ["moonlight", "llama"])
def test_a_packed_document_is_what_it_is_alone(name, packing, dtype, watched):
    lengths, tokens = PACKED[packing], torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))
    together, alone = model_of(name, dtype, watched), model_of(name, dtype, watched)
    batch = batch_of(tokens, documents=numbered(lengths))
    hidden, loss = passed(together, batch)

    losses, counted, at, place = torch.zeros(()), 0, 0, 0
    pieces = [document for row, sizes in zip(tokens, lengths, strict=True) for document in row.split(sizes)]
    # In bf16, whose rounding dwarfs what the computation enlarges, as much of it as it makes: 6 % in all.
    enlarged = ENLARGED if dtype == torch.float32 else torch.finfo(dtype).eps / EPS
    for document in pieces:
        row, first = divmod(at, 17)
        inputs = document if first + len(document) < 17 else document[:-1]  # The last token is a target only.
        at += len(document)
        if not len(inputs):
            continue
        targets = torch.full_like(inputs, IGNORED)
        targets[: len(document) - 1] = document[1:]
        states, single = passed(alone, Batch(inputs[None], targets[None]))
        losses, counted, place = losses + single, counted + len(document) - 1, place + len(inputs)
        assert_close(hidden[row, first : first + len(inputs)], states[0], enlarged, f"document at {row}, {first}")
    assert place == 32 and batch.counted == counted
    assert_close(loss, losses, enlarged)
    assert bool(loss) == bool(counted)
    for (parameter, p), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        if other.grad.any():
            assert_close(p.grad, other.grad, enlarged, parameter)
        else:
            assert not p.grad.any(), parameter
    if watched:
        seen, expected = take_logits(together), take_logits(alone)
        assert_close(seen.largest, expected.largest, enlarged)
        assert seen.large == expected.large and seen.queries == expected.queries


@pytest.mark.parametrize("name", MODELS)
def test_one_document_is_what_a_sequence_is_without_a_mask(name):
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(1))
    plain, masked = model_of(name, torch.float32, False), model_of(name, torch.float32, False)
    expected, found = (
        passed(plain, batch_of(tokens)),
        passed(masked, batch_of(tokens, documents=numbered([[17], [17]]))),
    )
    assert_close(found[0], expected[0], ENLARGED)
    assert_close(found[1], expected[1], ENLARGED)
    for p, other in zip(masked.parameters(), plain.parameters(), strict=True):
        assert_close(p.grad, other.grad, ENLARGED)


def test_a_number_that_comes_again_is_another_document():
    mask = DocumentMask(torch.tensor([[7, 7, 2, 7, 7, 7], [0, 0, 0, 0, 0, 0]], dtype=torch.int32))
    assert mask.positions.tolist() == [[0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert [row.tolist() for row in (mask.added(torch.float32)[0, 0] == 0).int()] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert (mask.added(torch.float32)[1, 0] == 0).equal(torch.ones(6, 6).tril().bool()), "of another sequence"


def test_flex_attentions_mask_hides_the_same():
    """Its kernel needs a GPU; what it asks for each block and each pair does not."""
    documents = numbered([[200, 56], [1, 255]])
    mask = DocumentMask(documents)
    blocks, place = mask.blocks(), torch.arange(256)
    for row in range(2):
        seen = blocks.mask_mod(torch.tensor(row), torch.tensor(0), place[:, None], place[None, :])
        assert seen.equal(mask.added(torch.float32)[row, 0] == 0)
    assert mask.blocks() is blocks, "made once for all layers"


def test_logits_of_other_documents_are_not_seen():
    attention = CausalAttention(1)
    watch(attention, True)
    q, k = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    k[0, 0, 1] = 500.0
    attention(q, k, k, DocumentMask(torch.tensor([[0, 0, 1, 1]])))
    seen = take_logits(attention)
    assert seen.largest.item() == 1000 and seen.large == 1 and seen.queries == 4, "the query beside it alone"


@pytest.mark.parametrize("name", MODELS)
def test_what_fills_a_sequence_up_is_not_counted(name):
    """Neither by the routers, whose biases it would move, nor where QK-Clip looks, however large it is there."""
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))
    documents = torch.tensor([[0] * 7 + [1] * 4 + [NOBODY] * 5, [0] * 16]).int()
    model = model_of(name, torch.float32, watched=True)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokens[0, 11:]] *= 100
        model(tokens, documents)
        seen, load = take_logits(model), model.expert_load().clone()
        model.clear_expert_load()
        for document in (tokens[0, :7], tokens[0, 7:11], tokens[1]):
            model(document[None])
    alone = take_logits(model)
    assert_close(seen.largest, alone.largest, ENLARGED)
    assert seen.large == alone.large and seen.queries == alone.queries == 27 * len(seen.largest)
    assert load.equal(model.expert_load()) and load.sum() in (0, 27 * 2)


def test_the_first_token_of_a_document_is_no_target():
    tokens, documents = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 2]], dtype=torch.int32)
    batch = batch_of(tokens, documents=documents)
    assert batch.targets.tolist() == [[6, IGNORED, 8, IGNORED]] and batch.documents.tolist() == [[0, 0, 1, 1]]
    both = batch_of(tokens, torch.tensor([[True, False, True, True, True]]), documents)
    assert both.targets.tolist() == [[IGNORED, IGNORED, 8, IGNORED]]
    assert both.without_targets().documents is both.documents and both.to(torch.device("cpu")).documents is not None
    assert len(batch.given) == 2 and len(batch_of(tokens).given) == 1, "models without documents are not asked"


def test_transformers_agrees():
    """Its positions and a mask of four dimensions, for the same packed sequence."""
    transformers = pytest.importorskip("transformers")
    config = MODELS["llama"]
    model = model_of("llama", torch.float32, False)
    theirs = transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attn_implementation="eager",
        )
    )
    theirs.load_state_dict(model.model.state_dict())
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))
    documents = numbered([[4, 1, 6, 5], [9, 7]])
    position = torch.cat([torch.arange(n) for n in (4, 1, 6, 5, 9, 7)]).view(2, 16)
    hidden = (documents[:, :, None] != documents[:, None, :]) | torch.ones(16, 16).triu(1).bool()
    scores = torch.zeros(2, 1, 16, 16).masked_fill(hidden[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, attention_mask=scores, position_ids=position).last_hidden_state
        assert_close(model(tokens, documents), expected, ENLARGED)


def test_a_plan_is_told_what_a_mask_costs():
    from jobs.planning.work import micro_batch_of

    def flops(kind: str, documents: bool) -> float:
        micro = micro_batch_of(MODELS["llama"], 2, 1024, torch.float32, kind, documents=documents)
        return sum(work.amount * count for work, count in micro.forward.items() if work.kind == "attention")

    assert flops("cuda", True) == flops("cuda", False), "blocks that are left out are not known before the data"
    assert flops("cpu", False) < flops("cpu", True), "there a mask leaves out no block"
