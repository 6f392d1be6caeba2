"""What a dense layer's SwiGLU becomes: experts, a router, and shared experts, as arrays under the names of ours.

Invariants: copies give what the layer gave, whichever are chosen, as their gates sum up to 1. Parts give it where all
are chosen, and a router that has nothing to choose has no weights, so that each gate is 1. Where some are chosen, its
logits are small (`sharpness`), so that gates are nearly 1, whoever is chosen; the choice goes by their order.
"""

from dataclasses import dataclass

import numpy as np

from jobs.convert.clusters import equal_clusters
from workers.config import MixtureConfig

CLUSTERED_TOKENS = 2048
"""Of a sample, by which neurons are put together."""
RIDGE = 1e-3
"""Of the mean square of the inputs, added where the router is fitted."""


@dataclass(frozen=True)
class Dense:
    """A dense layer."""

    gate: np.ndarray
    """`[width, hidden]`."""
    up: np.ndarray
    down: np.ndarray
    """`[hidden, width]`."""
    gain: np.ndarray
    """Of the norm before it, `[hidden]`."""


@dataclass(frozen=True)
class Parts:
    """Which neurons go where."""

    shared: np.ndarray
    """Numbers of the shared experts' neurons, rising."""
    experts: np.ndarray
    """`[experts, width]`, rising within each."""


def copies(dense: Dense, model: MixtureConfig, noise: float, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Return a layer whose every expert is a copy of the dense one, with a router that is drawn as a new one is.

    Args:
        dense: the layer.
        model: the mixture.
        noise: added to each expert's weights, as a share of their root mean square.
        random: of router and noise.
    """

    def copied(weight: np.ndarray) -> np.ndarray:
        stack = np.repeat(weight[None], model.num_experts, 0)
        if noise:
            stack += noise * np.sqrt(np.square(weight).mean()) * random.standard_normal(stack.shape, np.float32)
        return stack

    router = model.init_std * random.standard_normal((model.num_experts, model.hidden_size), np.float32)
    return _named(copied(dense.gate), copied(dense.up), copied(dense.down), router)


def parts(
    dense: Dense, model: MixtureConfig, sharpness: float, seed: int, inputs: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return a layer whose experts share the dense one's neurons out.

    Args:
        dense: the layer.
        model: the mixture.
        sharpness: standard deviation of the router's logits where something is chosen.
        seed: of the clusters.
        inputs: what the layer gets of a sample of text, `[tokens, hidden]`; None: what can be known from weights alone.
    """
    found = _parts(dense, model, seed, inputs)
    router = np.zeros((model.num_experts, model.hidden_size), np.float32)
    if model.num_experts_per_token < model.num_experts:
        router = _by_weights(dense, found, sharpness) if inputs is None else _fitted(dense, found, sharpness, inputs)
    down = np.moveaxis(dense.down[:, found.experts], 0, 1)  # [experts, hidden, width]
    named = _named(dense.gate[found.experts], dense.up[found.experts], down, router)
    if model.num_shared_experts:
        named["shared_experts.gate_proj.weight"] = dense.gate[found.shared]
        named["shared_experts.up_proj.weight"] = dense.up[found.shared]
        named["shared_experts.down_proj.weight"] = dense.down[:, found.shared]
    return named


def _named(gate: np.ndarray, up: np.ndarray, down: np.ndarray, router: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "experts.gate_proj": gate,
        "experts.up_proj": up,
        "experts.down_proj": down,
        "gate.weight": router,
        "gate.e_score_correction_bias": np.zeros(len(router), np.float32),
    }


def _parts(dense: Dense, model: MixtureConfig, seed: int, inputs: np.ndarray | None) -> Parts:
    """Share the neurons out: what is used most is shared, and what is used together comes together."""
    if inputs is None:
        weights = (dense.gate * dense.gain, dense.up * dense.gain, dense.down.T)
        used = np.prod([np.linalg.norm(weight, axis=1) for weight in weights], axis=0)
        alike = weights[0]
    else:
        alike = _contributions(dense, inputs[:: max(1, len(inputs) // CLUSTERED_TOKENS)][:CLUSTERED_TOKENS]).T
        used = np.square(alike).mean(1)
    order = np.argsort(-used, kind="stable")
    cut = model.num_shared_experts * model.moe_intermediate_size
    rest = np.sort(order[cut:])
    points = alike[rest] / np.maximum(np.linalg.norm(alike[rest], axis=1, keepdims=True), 1e-30)
    return Parts(np.sort(order[:cut]), rest[equal_clusters(points, model.num_experts, seed)])


def _hidden(dense: Dense, inputs: np.ndarray) -> np.ndarray:
    """Return what the last product gets, `[tokens, width]`."""
    gate = inputs @ dense.gate.T
    return gate / (1 + np.exp(-np.clip(gate, -80, 80))) * (inputs @ dense.up.T)


def _contributions(dense: Dense, inputs: np.ndarray) -> np.ndarray:
    """Return the norm of what each neuron adds to the output, `[tokens, width]`."""
    return np.abs(_hidden(dense, inputs)) * np.linalg.norm(dense.down, axis=0)


def _by_weights(dense: Dense, found: Parts, sharpness: float) -> np.ndarray:
    """Return the router whose logits are the mean of the gates of each expert's neurons, over the experts' mean."""
    means = dense.gate[found.experts].mean(1)
    means = means - means.mean(0)
    size = np.sqrt(np.square(means * dense.gain).sum(1).mean())  # Of a logit, for inputs that are normed and random.
    return (sharpness / max(size, 1e-30) * means).astype(np.float32)


def _fitted(dense: Dense, found: Parts, sharpness: float, inputs: np.ndarray) -> np.ndarray:
    """Return the router whose logits tell, as a linear map can, how much each expert adds to a token's output."""
    hidden = _hidden(dense, inputs)
    sizes = np.stack([np.linalg.norm(hidden[:, part] @ dense.down[:, part].T, axis=1) for part in found.experts], 1)
    aims = sizes - sizes.mean(1, keepdims=True)
    square = (inputs.T @ inputs).astype(np.float64) / len(inputs)
    square += RIDGE * np.trace(square) / len(square) * np.eye(len(square))
    router = np.linalg.solve(square, (inputs.T @ aims).astype(np.float64) / len(inputs)).T
    router -= router.mean(0)
    return (sharpness / max((inputs @ router.T).std(), 1e-30) * router).astype(np.float32)
