"""What prepared text holds, and what a step was trained on."""

from dataclasses import asdict
from typing import Annotated

import typer

from jobs.cli.options import AsJson, Run, RunEndpoint, S3Endpoint, TrackingUri
from jobs.screen import Screen
from jobs.table import print_table
from jobs.tell import tell
from orchestrator.config import DEFAULT_TRACKING_URI

app = typer.Typer()
data_app = typer.Typer(no_args_is_help=True, help="Show prepared text, and what a step was trained on.")
app.add_typer(data_app, name="data")


@data_app.command("show")
def data_show(
    url: Annotated[str, typer.Argument(help="A folder of prepared tokens, or the one over several.")],
    documents: Annotated[int, typer.Option(help="First documents that are shown, decoded.", min=0)] = 3,
    as_json: AsJson = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Show the sources, tokens and documents in prepared data."""
    from jobs.data import show

    found = show(url, documents, s3_endpoint)
    if as_json:
        tell([asdict(one) for one in found])
        return
    console = Screen()
    for one in found:
        console.print(one.url, style="bold")
        rows = [("documents", f"{one.documents:,}"), ("tokenizer", one.tokenizer or "bytes"), ("dtype", one.dtype)]
        rows += [("bytes per token", f"{one.bytes_per_token:.3f}"), ("content hash", one.content_hash)]
        for split, figures in one.splits.items():
            rows += [(f"{split} {key.replace('_', ' ')}", f"{value:,.0f}") for key, value in figures.items()]
        print_table(console, ("", ""), rows)
        for place, text in one.first:
            console.print(f"\n{place}", style="dim")
            console.print(text)


@data_app.command("at")
def data_at(
    run: Run,
    step: Annotated[int, typer.Argument(help="A step of the run; 1 is the first.")],
    text: Annotated[bool, typer.Option("--text", help="Print what was read, decoded.")] = False,
    as_json: AsJson = False,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    s3_endpoint: RunEndpoint = "",
) -> None:
    """Print which documents and tokens a step of a run was trained on, in the order of its global batch."""
    from jobs.data import place_of, samples_at
    from jobs.runs import find

    samples = samples_at(find(run, tracking_uri, s3_endpoint), step)
    if as_json:
        tell([asdict(sample) for sample in samples])
        return
    console, rows = Screen(), []
    for sample in samples:
        for piece in sample.pieces:
            place = place_of(piece.file, piece.row)
            tokens = f"{piece.first} to {piece.first + piece.tokens - 1}"
            rows.append((str(sample.index), str(sample.slot), sample.source, str(sample.epoch), place, tokens))
    print_table(console, ("sample", "slot", "source", "epoch", "document", "its tokens"), rows)
    if text:
        for sample in samples:
            for piece in sample.pieces:
                console.print(f"\n{sample.index}: {piece.file}", style="dim")
                console.print(piece.text)
