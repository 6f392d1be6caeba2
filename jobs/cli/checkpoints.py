"""Checkpoints, and models made of them."""

import time
from dataclasses import asdict
from functools import partial
from typing import Annotated

import typer

from jobs.cli.options import AsJson, CheckpointUrl, S3Endpoint, TrackingUri
from jobs.screen import Screen
from jobs.table import print_table
from jobs.tell import tell
from orchestrator.config import DEFAULT_TRACKING_URI

app = typer.Typer()
checkpoints_app = typer.Typer(no_args_is_help=True, help="List, show, compare, verify, delete and pin checkpoints.")
app.add_typer(checkpoints_app, name="checkpoints")


@checkpoints_app.command("ls")
def checkpoints_ls(
    url: Annotated[str, typer.Argument(help="A run's folder, or the folder over all runs.")],
    as_json: AsJson = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """List committed checkpoints."""
    from jobs.checkpoints import list_checkpoints

    rows = list_checkpoints(url, s3_endpoint)
    if as_json:
        tell(rows)
        return
    told = []
    for row in rows:
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"]))
        known = ("?", "?", "?")
        if not row["damaged"]:
            known = (str(row["world_size"]), f"{row['tokens']:,}", f"{row['bytes'] / 1e6:,.1f} MB")
        note = row["damaged"] or ("pinned" if row["pinned"] else "")
        told.append((row["run_id"], str(row["step"]), str(row["attempt"]), saved, *known, note))
    head = ("run", "step", "attempt", "saved", "world size", "tokens", "size", "")
    print_table(Screen(), head, told)


@checkpoints_app.command("show")
def checkpoints_show(
    url: CheckpointUrl,
    as_json: AsJson = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Show what a checkpoint holds."""
    from jobs.checkpoints import show
    from jobs.lineage import told as lineage_told
    from workers.checkpoint.lineage import Lineage

    found = show(url, s3_endpoint)
    if as_json:
        tell(found)
        return
    console = Screen()
    for key in ("run_id", "step", "attempt", "world_size", "counters", "identity"):
        console.print(f"{key}: {found[key]}")
    lineage = found["lineage"] and Lineage.read(found["lineage"])
    for key, text in lineage_told(lineage, places=True).items():
        console.print(f"{key}: {text}")
    rows = [(tensor["kind"], tensor["name"], str(tensor["shape"])) for tensor in found["tensors"]]
    print_table(console, ("kind", "tensor", "shape"), rows)


@checkpoints_app.command("diff")
def checkpoints_diff(
    first: CheckpointUrl,
    second: CheckpointUrl,
    as_json: AsJson = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Compare two checkpoints, tensor by tensor."""
    from jobs.checkpoints import diff

    differences = diff(first, second, s3_endpoint)
    equal = all(difference.bitwise_equal for difference in differences)
    largest = max((d.max_abs for d in differences if d.max_abs is not None), default=None)
    if as_json:
        tensors = [asdict(difference) for difference in differences]
        tell({"bitwise_equal": equal, "max_abs": largest, "tensors": tensors})
        return
    rows = [(d.kind, d.name, d.note or f"{d.max_abs:.3g}", "yes" if d.bitwise_equal else "no") for d in differences]
    console = Screen()
    print_table(console, ("kind", "tensor", "largest difference", "bitwise equal"), rows)
    console.print("bitwise equal" if equal else f"different; largest difference {largest}")


@checkpoints_app.command("verify")
def checkpoints_verify(url: CheckpointUrl, as_json: AsJson = False, s3_endpoint: S3Endpoint = "") -> None:
    """Read every byte of a checkpoint and check it against its hashes; exit code 5 where one is wrong."""
    from jobs.checkpoints import verify

    found = verify(url, s3_endpoint)
    if as_json:
        tell(asdict(found))
    else:
        for text in found.damaged:
            typer.echo(text, err=True)
        typer.echo(
            f"step {found.step}: {found.files} file(s), {found.bytes / 1e6:.1f} MB, {len(found.damaged)} damaged"
        )
    if found.damaged:
        raise typer.Exit(5)


@checkpoints_app.command("rm")
def checkpoints_rm(
    url: CheckpointUrl,
    force: Annotated[
        bool, typer.Option("--force", help="Also the newest one, with which the run would go on.")
    ] = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Delete the checkpoint at FOLDER@STEP."""
    from jobs.checkpoints import remove

    typer.echo(f"deleted: {remove(url, force, s3_endpoint)}")


@checkpoints_app.command("pin")
def checkpoints_pin(
    url: CheckpointUrl,
    undo: Annotated[bool, typer.Option("--undo", help="Let it go again.")] = False,
    reason: Annotated[str, typer.Option(help="For people.")] = "",
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Keep a checkpoint, whatever the run's retention says."""
    from jobs.checkpoints import pin

    typer.echo(f"{'not pinned any more' if undo else 'pinned'}: {pin(url, reason, undo, s3_endpoint)}")


@app.command()
def export(
    url: CheckpointUrl,
    to: Annotated[str, typer.Option(help="A new folder, or an fsspec URL.")],
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16 or float32.")] = "bfloat16",
    series: Annotated[bool, typer.Option("--series", help="All checkpoints, each in a folder of its own.")] = False,
    register: Annotated[str, typer.Option(help="Make it a version of this model in MLflow's registry.")] = "",
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    as_json: AsJson = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Write a checkpoint as a Hugging Face model: safetensors, config, tokenizer, model card."""
    from jobs.export import export, export_series, recorded, registry
    from jobs.export import register as register_
    from workers.common.errors import ConfigError, StorageError

    if dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"--dtype must be bfloat16 or float32, not {dtype!r}")
    evaluated = recorded(url, tracking_uri, partial(typer.echo, err=True), s3_endpoint)
    tracking = registry(register, to, tracking_uri) if register else None
    if series:
        exported = export_series(url, to, dtype, s3_endpoint, evaluated)
    else:
        exported = [export(url, to, dtype, s3_endpoint=s3_endpoint, evaluated=evaluated)]
    versions, failure = None, None
    if tracking:
        try:
            versions = register_(exported, register, tracking)
        except StorageError as error:  # What is exported is told first.
            failure = error
    for number, one in enumerate(exported):
        line = f"step {one.step}: {len(one.files)} file(s), {one.bytes / 1e6:.1f} MB in {one.url}"
        told = asdict(one)
        if versions:
            told["version"] = versions[number]
            line += f", version {told['version']} of {register}"
        if as_json:
            tell(told)
        else:
            typer.echo(line)
    if failure:
        raise failure


@app.command(name="import")
def import_(
    folder: Annotated[
        str, typer.Argument(help="With config.json and *.safetensors, of DeepSeek-V3, Llama or GLM-4 MoE.")
    ],
    to: Annotated[str, typer.Option(help="A new folder, or an fsspec URL.")],
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Make a Hugging Face model a checkpoint with which a run can begin: train.init=URL."""
    from jobs.import_ import import_model

    url = import_model(folder, to, typer.echo, s3_endpoint)
    typer.echo(f"imported; begin a run with it: train.init={url}")
