"""Dense models made mixtures of experts."""

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import typer

from jobs.cli.options import AsJson, RunEndpoint, TrackingUri, at_least_0, greater_than_0
from jobs.screen import Screen
from jobs.tell import tell
from orchestrator.config import DEFAULT_TRACKING_URI

app = typer.Typer()
convert_app = typer.Typer(
    no_args_is_help=True, help="Make a dense llama or moonlight a mixture of experts, to be trained on."
)
app.add_typer(convert_app, name="convert")

What = Annotated[
    str,
    typer.Argument(help="A run's id, name or folder, its newest checkpoint, or RUN@STEP; or a Hugging Face folder."),
]
To = Annotated[str, typer.Option(help="A new folder, or an fsspec URL.")]
Experts = Annotated[int, typer.Option(help="Routed experts of each layer.")]
DenseLayers = Annotated[int, typer.Option(help="First layers that stay dense.")]
Text = Annotated[
    str, typer.Option(help="Text, as in data.source: a sample of it is used, and both losses are measured.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of all that is drawn.")]


@convert_app.command("moefy")
def convert_moefy(
    what: What,
    to: To,
    experts: Experts,
    active: Annotated[int | None, typer.Option(help="Experts that a token visits; half of them if not given.")] = None,
    shared: Annotated[int, typer.Option(help="Experts' worth of neurons that every token visits.")] = 0,
    dense_layers: DenseLayers = 0,
    text: Text = "",
    sharpness: Annotated[
        float, typer.Option(help="Standard deviation of the routers' first logits.", callback=greater_than_0)
    ] = 0.1,
    seed: Seed = 0,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    as_json: AsJson = False,
    s3_endpoint: RunEndpoint = "",
) -> None:
    """Share the neurons of each dense layer out among experts: no more parameters, fewer of them active."""
    from jobs.convert.target import Shape

    shape = Shape(method="moefy", experts=experts, active=active, shared=shared, dense_layers=dense_layers)
    places = {"tracking_uri": tracking_uri, "s3_endpoint": s3_endpoint}
    _convert(as_json, what=what, to=to, shape=shape, text=text, sharpness=sharpness, seed=seed, **places)


@convert_app.command("upcycle")
def convert_upcycle(
    what: What,
    to: To,
    experts: Experts,
    active: Annotated[int | None, typer.Option(help="Experts that a token visits; 2 if not given.")] = None,
    dense_layers: DenseLayers = 0,
    text: Text = "",
    noise: Annotated[
        float, typer.Option(help="Added to each copy, as a share of its weights' RMS.", callback=at_least_0)
    ] = 0.0,
    seed: Seed = 0,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    as_json: AsJson = False,
    s3_endpoint: RunEndpoint = "",
) -> None:
    """Make each expert a copy of its dense layer: more parameters, the same output at first."""
    from jobs.convert.target import Shape

    shape = Shape(method="upcycle", experts=experts, active=active, dense_layers=dense_layers)
    places = {"tracking_uri": tracking_uri, "s3_endpoint": s3_endpoint}
    _convert(as_json, what=what, to=to, shape=shape, text=text, noise=noise, seed=seed, **places)


def _convert(as_json: bool, **asked: Any) -> None:
    from jobs.convert.command import Asked, convert

    made = convert(Asked(**asked), partial(typer.echo, err=True))
    if as_json:
        tell(asdict(made))
        return
    screen = Screen()
    screen.print(
        f"{made.parameters:,} parameters, {made.active_parameters:,} of them active, of {made.dense_parameters:,}; "
        f"{made.bytes / 1e6:.1f} MB in {made.url}"
    )
    if made.loss is not None:
        screen.print(f"loss on the other half of the text: {made.loss:.4f} nats per token, dense {made.dense_loss:.4f}")
    screen.print(f"begin a run with it: train.init={made.url}, and in the config\nmodel:")
    for key, value in made.model.items():
        screen.print(f"  {key}: {value}")
