"""The generator: with a cache as without, together as alone, drawn as the definition says, and nothing left behind."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.closeness import EPS, assert_close
from tests.workers import test_llama, test_moonlight
from workers.common.errors import ConfigError, TrainingError
from workers.data.text_stream import TextStream
from workers.data.tokenizer import BYTES
from workers.generate import Sampling, generate, stream, write_sample
from workers.models import build, logits_of
from workers.models.attention import CausalAttention, watch
from workers.models.cache import KeyValueCache
from workers.models.moonlight import LatentAttention

pytestmark = pytest.mark.numeric
MODELS = {"moonlight": test_moonlight.TINY, "llama": test_llama.TINY}
PROMPTS = [[5], list(range(1, 40)), [7, 3, 7], list(range(200, 217))]


@pytest.fixture(params=MODELS)
def model(request):
    """Return a model with router biases that change the choice of experts."""
    torch.manual_seed(0)
    made = build(MODELS[request.param])
    for name, buffer in made.named_buffers():
        if name.endswith("correction_bias"):
            buffer.copy_(torch.randn(buffer.shape) * 0.1)
    return made.eval()


def by_definition(model, prompt: list[int], count: int) -> list[int]:
    """Take the likeliest token each time, with nothing of ours but the forward pass of training."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(logits_of(model, torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("cache", [True, False])
def test_greedy_is_the_likeliest_token_each_time_together_as_alone(model, cache):
    exact = [by_definition(model, prompt, 40) for prompt in PROMPTS]
    assert len({*itertools.chain(*exact)}) > 20, "a text of one token would hide what is wrong"
    assert generate(model, PROMPTS, 40, cache=cache) == exact
    assert [generate(model, [prompt], 40, cache=cache)[0] for prompt in PROMPTS] == exact


def test_a_text_that_ends_leaves_the_others_as_they_are(model):
    whole = generate(model, PROMPTS, 40)
    stop = {text[place] for text, place in zip(whole, (3, 11, 25, 39), strict=True)}
    cut = [list(itertools.takewhile(lambda token: token not in stop, text)) for text in whole]
    assert len({len(text) for text in cut}) > 2 and min(map(len, cut)) < 5
    assert generate(model, PROMPTS, 40, stop=stop) == cut
    ends = [number for number, token in stream(model, PROMPTS, 40, stop) if token is None]
    assert sorted(ends) == [0, 1, 2, 3], "each end is told once"


def in_parts(model, tokens: torch.Tensor, parts: list[list[int]]) -> list[torch.Tensor]:
    """Return the logits of each row, read in parts of so many tokens of each."""
    padding = max(abs(a - b) for a, b in itertools.accumulate(parts, lambda x, y: [x[0] + y[0], x[1] + y[1]]))
    cache, rows = KeyValueCache(len(tokens), tokens.size(1) + padding, tokens.device), [[] for _ in tokens]
    at = [0] * len(tokens)
    for counts in parts:
        cache.expect(counts)
        given = [tokens[row, at[row] : at[row] + count] for row, count in enumerate(counts)]
        padded = torch.nn.utils.rnn.pad_sequence(given, batch_first=True, padding_value=9)
        with torch.no_grad():
            found = torch.nn.functional.linear(model(padded, cache=cache), model.head)
        for row, count in enumerate(counts):
            rows[row].append(found[row, :count])
            at[row] += count
    return [torch.cat(row) for row in rows]


@pytest.mark.parametrize(
    "parts",
    [
        [[24, 24]],
        [[1, 1]] * 24,
        [[8, 8], [1, 1], [7, 7], [1, 1], [7, 7]],
        [[3, 9], [1, 1], [5, 2], [2, 5], [9, 3], [1, 1]],  # Ragged, with more than one token behind what is there.
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_same_however_a_sequence_is_read(name, parts):
    torch.manual_seed(1)
    model, tokens = build(MODELS[name]).eval(), torch.randint(256, (2, 24))
    with torch.no_grad():
        exact = logits_of(model, tokens)
    for row, found in enumerate(in_parts(model, tokens, parts)):
        assert_close(found, exact[row, : len(found)], MODELS[name].num_layers, f"row {row}")


@pytest.mark.parametrize("name", MODELS)
def test_bf16_differs_by_its_rounding(name):
    """All experts are visited: which are the best of two that are as good rounding would decide."""
    torch.manual_seed(1)
    config = replace(MODELS[name], num_experts_per_token=6) if name == "moonlight" else MODELS[name]
    model, tokens = build(config).bfloat16().eval(), torch.randint(256, (2, 24))
    with torch.no_grad():
        whole = logits_of(model, tokens).float()
    rounding = 2.0**-8 / EPS
    for row, found in enumerate(in_parts(model, tokens, [[8, 8], *[[1, 1]] * 16])):
        assert_close(found.float(), whole[row], rounding, f"row {row}")
    (alone,), together = generate(model, [[5]], 20), generate(model, PROMPTS, 20)
    assert len(alone) == 20 and all(len(text) == 20 for text in together)


def test_what_is_kept_is_small_and_is_taken_once(model):
    cache = KeyValueCache(1, 30, torch.device("cpu"))
    places = set()
    for count in (10, 1, 1):
        cache.expect([count])
        with torch.no_grad():
            model(torch.full((1, count), 3), cache=cache)
        places |= {one.data_ptr() for kept in cache._kept.values() for one in kept}
    config, kept = model.config, list(cache._kept.items())
    assert len(kept) == config.num_layers
    for layer, tensors in kept:
        shapes = [tuple(one.shape) for one in tensors]
        if isinstance(layer, LatentAttention):
            assert shapes == [(1, 1, 30, config.kv_lora_rank + config.qk_rope_head_dim)]
        else:
            assert isinstance(layer, CausalAttention)
            assert shapes == [(1, config.num_kv_heads, 30, config.head_dim)] * 2
    assert len(places) == sum(len(tensors) for _, tensors in kept), "memory moved"
    with pytest.raises(ValueError, match="12 and 19 more tokens are more than the cache's 30"):
        cache.expect([19])


@pytest.mark.parametrize("prompt", [[5], list(range(1, 17)), list(range(1, 30))])
def test_a_text_goes_on_from_the_last_half_of_its_context(model, prompt):
    """One token, as many as the context has, and more."""
    seen, exact = list(prompt), []
    for _ in range(40):
        if len(seen) > 16:
            seen = seen[-8:]
        exact += by_definition(model, seen, 1)
        seen.append(exact[-1])
    for cache in (True, False):
        assert generate(model, [prompt], 40, cache=cache, context=16) == [exact]
    others = generate(model, [prompt, [1, 2, 3], [9] * 12], 40, context=16)
    assert others[0] == exact and others[1:] == [
        generate(model, [one], 40, context=16)[0] for one in ([1, 2, 3], [9] * 12)
    ]


def test_draws_have_the_probabilities_of_the_nucleus():
    logits = torch.tensor([2.0, -1.0, 0.5, 1.9, -30.0, 0.0, 1.0])
    for temperature, top_p in itertools.product((0.5, 1.0, 3.0), (1.0, 0.8, 0.5, 1e-9)):
        likely = [torch.tensor(logit / temperature).exp().item() for logit in logits.tolist()]
        likely = [one / sum(likely) for one in likely]
        order, nucleus = sorted(range(7), key=lambda token: -likely[token]), []
        while sum(likely[token] for token in nucleus) < top_p and len(nucleus) < 7:
            nucleus.append(order[len(nucleus)])
        mass = sum(likely[token] for token in nucleus)
        random, draws = torch.Generator().manual_seed(3), 4000
        counts = [0] * 7
        for _ in range(draws):
            counts[Sampling(temperature, top_p).choose(logits, random)] += 1
        for token in range(7):
            expected = likely[token] / mass if token in nucleus else 0.0
            error = 4.5 * (expected * (1 - expected) / draws) ** 0.5
            assert abs(counts[token] / draws - expected) <= error + 1e-6, (temperature, top_p, token)


def test_the_borders_of_what_is_drawn():
    random = torch.Generator().manual_seed(0)
    even = torch.zeros(4)
    assert {Sampling(1.0, 0.5).choose(even, random) for _ in range(200)} == {0, 1}, "half of four is two"
    assert {Sampling(1.0, 0.51).choose(even, random) for _ in range(200)} == {0, 1, 2}
    far = torch.tensor([0.0, -1e4, 3.0, 2.9])
    assert {Sampling(1e-30).choose(far, random) for _ in range(50)} == {2}
    assert {Sampling(1e9).choose(torch.tensor([5.0, -5.0]), random) for _ in range(100)} == {0, 1}
    assert Sampling().choose(torch.tensor([1.0, 2.0, 2.0]), random) == 1, "greedy takes the first of equals"


def test_a_seed_and_a_prompt_give_one_text_whatever_is_beside_it(model):
    drawn = {"temperature": 0.9, "top_p": 0.9, "seed": 4}
    alone = [generate(model, [prompt], 30, **drawn)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS, 30, **drawn) == alone
    assert generate(model, PROMPTS[::-1], 30, cache=False, **drawn) == alone[::-1]
    assert generate(model, PROMPTS, 30, **{**drawn, "seed": 5}) != alone


def test_training_sees_nothing_of_it(model):
    model.train()
    watch(model, True)
    model(torch.randint(256, (2, 8)))
    loads, logits = model.expert_load().clone(), [m.queries.clone() for m in model.modules() if hasattr(m, "queries")]
    generate(model, PROMPTS, 5)
    assert model.training and torch.equal(model.expert_load(), loads)
    assert [m.queries for m in model.modules() if hasattr(m, "queries")] == logits
    coming = stream(model, PROMPTS, 5)
    next(coming)
    assert torch.is_grad_enabled() and not model.training
    coming.close()
    assert model.training, "whoever stops early gets it back, too"
    assert model(torch.randint(256, (1, 4))).requires_grad


def test_a_sample_ends_with_its_size_or_the_document(model):
    ticks = []
    text = write_sample(model, BYTES, "def ", 20, 8, seed=1, progress=lambda: ticks.append(0))
    assert text.startswith("def ") and 0 < len(text) - 4 <= 20 and len(ticks) >= len(text) - 4
    assert text == write_sample(model, BYTES, "def ", 20, 8, seed=1)
    assert write_sample(model, BYTES, "def ", 0, 8, seed=1) == "def "
    assert write_sample(model, BYTES, "", 20, 8, seed=1) == "", "there is nothing to go on from"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompts": [[1], []]}, "prompt 2 is empty, and the tokenizer has no token that begins a document"),
        ({"prompts": [[1, 256]]}, "prompt 1 has a token 256, and the model knows tokens up to 255"),
        ({"temperature": -0.1}, "temperature must be a finite number of 0 (greedy) or more, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be a finite number of 0 (greedy) or more, not nan"),
        ({"top_p": 0.0}, "top-p must be above 0 and at most 1, not 0"),
        ({"top_p": 1.1}, "top-p must be above 0 and at most 1, not 1.1"),
    ],
)
def test_what_cannot_be_is_told(model, given, told):
    with pytest.raises(ConfigError) as raised:
        generate(model, **{"prompts": [[1]], "max_new_tokens": 3, **given})
    assert told in str(raised.value)


def test_logits_that_are_not_finite_are_told(model):
    assert generate(model, [], 5) == [] and generate(model, [[1]], 0) == [[]]
    list(model.parameters())[-2].data[0] = float("nan")
    with pytest.raises(TrainingError, match="logits are not finite"):
        generate(model, [[1, 2]], 3)


def test_pieces_of_bytes_are_whole_characters_and_together_the_text():
    random = torch.Generator().manual_seed(0)
    text = "naïve 日本 ☃ 🙂 e\u0301\N{REPLACEMENT CHARACTER}."
    for ids in (list(text.encode()), *(torch.randint(256, (40,), generator=random).tolist() for _ in range(50))):
        coming = TextStream(BYTES)
        pieces = [*(coming.add(token) for token in ids), coming.rest()]
        assert "".join(pieces) == BYTES.decode(ids)
        if ids == list(text.encode()):
            assert "".join(pieces) == text and all(len(piece) <= 1 for piece in pieces[:-5])
