"""Tokenizers."""

from dataclasses import asdict
from typing import Annotated

import typer

from jobs.cli.options import AsJson, S3Endpoint, at_least_0
from jobs.screen import Screen, command
from jobs.tell import tell

app = typer.Typer()
tokenizer_app = typer.Typer(no_args_is_help=True, help="Make a tokenizer of one's own text.")
app.add_typer(tokenizer_app, name="tokenizer")


@tokenizer_app.callback()
def tokenizers() -> None:
    """Keep `train` a command of its own: alone, it would be the whole application."""


@tokenizer_app.command("train")
def tokenizer_train(
    source: Annotated[str, typer.Argument(help="Text, as in data.source: files, folders, globs, of any fsspec URL.")],
    vocab: Annotated[int, typer.Option(help="Tokens that it shall have.")],
    to: Annotated[str, typer.Option(help="A new folder, local or an fsspec URL.")],
    field: Annotated[str, typer.Option(help="That holds the text, in rows of JSONL, Parquet or Arrow.")] = "text",
    most_mb: Annotated[float, typer.Option(help="Of text to learn from, in MB; 0: all.", callback=at_least_0)] = 0.0,
    as_json: AsJson = False,
    s3_endpoint: S3Endpoint = "",
) -> None:
    """Train a byte-level BPE on text, and write it as a tokenizer.json."""
    from jobs.tokenizer import train_tokenizer
    from workers.data.corpus import vocabulary_for

    console = Screen(stderr=as_json)
    trained = train_tokenizer(source, vocab, to, field, most_mb, console, s3_endpoint)
    console.print(
        f"{trained.vocab_size:,} tokens, {trained.bytes_per_token:.2f} bytes per token, of {trained.documents:,} "
        f"documents ({trained.bytes / 1e6:,.1f} MB) in {trained.seconds:.0f} s, in {trained.url}"
    )
    wide = f"model.vocab_size={vocabulary_for(trained.vocab_size)}"
    on = command("raymuon", "train", "demo", f"data.source={source}", f"data.tokenizer={trained.url}", wide)
    console.print(f"train with it: {on}")
    if as_json:
        tell(asdict(trained))
