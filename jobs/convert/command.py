"""`raymuon convert`: opens a dense model, makes a mixture of it, writes that as a checkpoint to begin with."""

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.convert.layers import Dense, copies, parts
from jobs.convert.target import Shape, mixture_of
from jobs.first_checkpoint import check_room, new_folder, write_first
from jobs.hugging_face import trained_with
from jobs.trained import Trained, finite_tensor, open_trained, trained_here, undeleted
from workers.checkpoint.manifest import BUFFER, WEIGHT, Manifest
from workers.common.errors import ConfigError
from workers.common.storage import Store
from workers.config import MixtureConfig
from workers.data.json_tokenizer import read_template, write_template

if TYPE_CHECKING:
    from workers.models import LanguageModel

Tensors = dict[str, np.ndarray]
FEED_FORWARD = re.compile(r"model\.layers\.(\d+)\.mlp\..+")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for."""

    what: str
    """A run, a checkpoint or a Hugging Face folder."""
    to: str
    shape: Shape
    sharpness: float = 0.0
    """Of the routers of parts."""
    noise: float = 0.0
    """Of copies."""
    text: str = ""
    """Of which a sample is taken; empty for none."""
    seed: int = 0
    tracking_uri: str = ""
    s3_endpoint: str = ""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was made."""

    url: str
    made_of: str
    method: str
    model: dict[str, Any]
    """The section `model` of a config that trains it."""
    parameters: int
    active_parameters: int
    """That a token meets."""
    dense_parameters: int
    """Of what it was made of."""
    bytes: int
    loss: float | None = None
    """Of the mixture on the second half of the sample of text, in nats per token."""
    dense_loss: float | None = None


def convert(asked: Asked, say: Callable[[str], object] = lambda text: None) -> Converted:
    """Make a mixture of a dense model, and write it into a new folder, whole or not at all.

    Raises:
        ConfigError: there is no such model, it is no dense one or cannot be cut so, or something is in the folder.
        StorageError: the model is damaged or not finite, or the folder cannot be written.
    """
    trained = open_trained(asked.what, asked.tracking_uri, asked.s3_endpoint)
    asked = replace(asked, s3_endpoint=asked.s3_endpoint or trained.s3_endpoint)
    store = new_folder(asked.to, asked.s3_endpoint)
    model = mixture_of(trained.model_config, asked.shape, trained.where)
    shapes, buffers = _shapes(model)
    check_room(store, 4 * sum(map(prod, shapes.values())))
    sample = _sample(asked, trained, say)
    with undeleted((trained.log, trained.commit)):
        dense = {name: finite_tensor(trained.reader, WEIGHT, name) for name in trained.reader.names(WEIGHT)}
    made = dict(_made(asked, model, dense, trained, sample))
    if {name: list(tensor.shape) for name, tensor in made.items()} != shapes:
        raise AssertionError("what was made is not the model")
    with store.whole_or_nothing():
        _write(store, asked, trained, model, {name: made[name] for name in shapes}, buffers)
    dense_loss, loss = _losses(trained, model, made, sample)
    parameters, active = _sizes(model, shapes, buffers)
    return Converted(
        url=store.url,
        made_of=trained.where,
        method=asked.shape.method,
        model=asdict(model),
        parameters=parameters,
        active_parameters=active,
        dense_parameters=sum(tensor.size for tensor in dense.values()),
        bytes=sum(file.size for file in store.files("").values()),
        loss=loss,
        dense_loss=dense_loss,
    )


def _sample(asked: Asked, trained: Trained, say: Callable[[str], object]) -> np.ndarray | None:
    if not asked.text:
        return None
    if trained.tokenizer is None:
        raise ConfigError(f"--text {asked.text}: {trained.where} has no tokenizer that could read it; leave --text out")
    from jobs.convert.sample import LONGEST, read_sample

    seq_len = min(trained.seq_len, LONGEST)
    sequences = read_sample(asked.text, trained.tokenizer, seq_len, asked.seed, asked.s3_endpoint)
    told = f"{len(sequences)} sequences of {seq_len} tokens of {asked.text}"
    say(f"{told}: the first half to convert by, the second to measure on")
    return sequences


def _made(
    asked: Asked, model: MixtureConfig, dense: Tensors, trained: Trained, sample: np.ndarray | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the mixture's tensors."""
    layers = range(model.num_dense_layers, model.num_layers)
    for name, tensor in dense.items():
        found = FEED_FORWARD.fullmatch(name)
        if found is None or int(found[1]) not in layers:
            yield name, tensor
    random = np.random.default_rng(asked.seed)
    inputs = {}
    if sample is not None and asked.shape.method == "moefy":
        from jobs.convert.sample import inputs_of

        inputs = inputs_of(trained.model("float32"), sample[: len(sample) // 2], layers)
    for layer in layers:
        one = _dense_layer(dense, layer)
        if asked.shape.method == "upcycle":
            found = copies(one, model, asked.noise, random)
        else:
            found = parts(one, model, asked.sharpness, asked.seed + layer, inputs.get(layer))
        for name, tensor in found.items():
            yield f"model.layers.{layer}.mlp.{name}", tensor


def _dense_layer(dense: Tensors, layer: int) -> Dense:
    gate, up, down = (dense[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return Dense(gate, up, down, dense[f"model.layers.{layer}.post_attention_layernorm.weight"])


def _shapes(model: MixtureConfig) -> tuple[dict[str, list[int]], set[str]]:
    """Return the shapes of all tensors in the model's order, and which are buffers."""
    import torch

    from workers.models import build_empty

    with torch.device("meta"):
        empty = build_empty(model)
    shapes = {name: list(tensor.shape) for name, tensor in empty.state_dict().items()}
    return shapes, shapes.keys() - {name for name, _ in empty.named_parameters()}


def _write(
    store: Store, asked: Asked, trained: Trained, model: MixtureConfig, tensors: Tensors, buffers: set[str]
) -> None:
    """Write the checkpoint, the tokenizer and its chat template."""
    source = trained.manifest
    identity = {"model": asdict(model), "converted": _how(asked.shape, trained), **_kept(trained)}
    if template := identity.get("data.chat_template"):
        assert trained.log is not None
        write_template(store, read_template(trained.log.store, template))
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    counters = {"step": 0, "tokens": 0, "applied_steps": 0}
    about = Manifest(source.run_id, 0, 0, 0, 1, identity, counters, shapes, ())
    kinds = [(BUFFER if name in buffers else WEIGHT, name, tensor) for name, tensor in tensors.items()]
    url = trained.where if trained.log is None else trained.log.store.url
    write_first(store, about, kinds, trained.tokenizer, source, url)


def _how(shape: Shape, trained: Trained) -> str:
    """Return in words what was done."""
    shared = f" and {shape.shared} shared" if shape.shared else ""
    made = "its neurons shared out among" if shape.method == "moefy" else "copied into"
    origin = f"{trained.run_id} at step {trained.step}" if trained_here(trained.manifest) else trained.run_id
    return f"{origin}, {made} {shape.experts} experts{shared}, of which a token visits {shape.chosen}"


def _kept(trained: Trained) -> dict[str, Any]:
    """Return what stays true of the model: its tokenizer and template, positions and ids of special tokens.

    What it was trained on and by which optimizer is its ancestor's, which the lineage tells.
    """
    identity = trained.manifest.identity
    kept = {key: identity[key] for key in ("data.tokenizer", "data.chat_template", "hugging_face") if key in identity}
    if trained_here(trained.manifest) and trained.tokenizer is not None:
        kept |= {
            "data.tokenizer": trained.tokenizer.sha256,
            "hugging_face": trained_with(trained.tokenizer, trained.seq_len),
        }
    return kept


def _sizes(model: MixtureConfig, shapes: dict[str, list[int]], buffers: set[str]) -> tuple[int, int]:
    """Return how many parameters there are, and how many of them a token meets."""
    numels = {name: prod(shape) for name, shape in shapes.items() if name not in buffers}
    routed = sum(numel for name, numel in numels.items() if ".experts." in name)
    every = sum(numels.values())
    return every, every - routed + routed * model.num_experts_per_token // model.num_experts


def _filled(model: MixtureConfig, tensors: Tensors) -> "LanguageModel":
    import torch

    from workers.models import build

    filled = build(model, initialize=False)
    filled.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()})
    return filled.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _losses(
    trained: Trained, model: MixtureConfig, made: Tensors, sample: np.ndarray | None
) -> tuple[float | None, float | None]:
    """Return the losses of the dense model and of the mixture on the sample's second half."""
    if sample is None:
        return None, None
    from jobs.convert.sample import loss_of

    rest = sample[len(sample) // 2 :]
    return loss_of(trained.model("float32"), rest), loss_of(_filled(model, made), rest)
