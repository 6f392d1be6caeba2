"""What a trained model writes."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.options import AsJson, RunEndpoint, TrackingUri
from jobs.output import check_kept, nobody_reads
from jobs.tell import tell
from orchestrator.config import DEFAULT_TRACKING_URI
from workers.common.errors import ConfigError
from workers.common.text import visible

if TYPE_CHECKING:
    from jobs.generate import Written

app = typer.Typer()
DTYPES = ("auto", "float32", "bfloat16")


@app.command()
def generate(
    what: Annotated[
        str,
        typer.Argument(help="A run's id, name or folder, its newest checkpoint or @STEP; or a Hugging Face folder."),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to go on from; - for stdin. Several times: all at once.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Talk to a fine-tuned model, line by line.")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Written after each prompt, at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens that have this share together.")] = 1.0,
    seed: Annotated[
        int, typer.Option(min=0, max=2**63 - 1, help="Of what is drawn; a prompt and a seed give one text.")
    ] = 0,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Read everything again for each token.")] = False,
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "auto",
    as_json: AsJson = False,
    tracking_uri: TrackingUri = DEFAULT_TRACKING_URI,
    s3_endpoint: RunEndpoint = "",
) -> None:
    """Write on from a prompt with a trained model, until it ends the document."""
    from jobs.chat import Conversation
    from jobs.generate import Settings, write
    from jobs.trained import open_trained

    if bool(prompt) == chat:
        raise ConfigError("give either --prompt TEXT, several times if need be, or --chat")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not {dtype!r}")
    settings = Settings(tokens, temperature, top_p, seed, not no_cache, dtype)
    prompts = [_text(one) for one in prompt or []]
    trained = open_trained(what, tracking_uri, s3_endpoint)
    say = (lambda text: None) if as_json else _say
    if chat:
        conversation = Conversation(trained, settings)
        written = _answers(lambda line: conversation.answer(line, say), as_json)
    else:
        written = write(trained, prompts, settings, say)
    for one in written:
        if as_json:
            tell({"run_id": trained.run_id, "step": trained.step, **asdict(one)})


def _answers(answer: Callable[[str], "Written"], as_json: bool) -> Iterator["Written"]:
    """Yield the answers to the lines of stdin until it ends; at a terminal a Ctrl-C is its end, too."""
    terminal = sys.stdin.isatty() and not as_json
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # A line that is no text is refused, and the next one read.
    with suppress(EOFError, KeyboardInterrupt if terminal else EOFError):
        while True:
            line = input("> " if terminal else "")
            if not line.strip():
                continue
            try:
                yield answer(_utf8("the line", line.encode(errors="surrogateescape")))
            except ConfigError as error:  # It was never said.
                typer.echo(visible(f"raymuon: {error}"), err=True)
            if not as_json:
                typer.echo()
    if terminal:
        typer.echo()


def _say(text: str) -> None:
    typer.echo(visible(text), nl=False)
    check_kept()
    if nobody_reads():  # As behind `| head`: the rest would be written for nobody, a token at a time.
        raise typer.Exit


def _text(prompt: str) -> str:
    return _utf8("--prompt", _stdin() if prompt == "-" else prompt.encode(errors="surrogateescape"))


def _utf8(what: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is no UTF-8 ({error})") from error


@cache
def _stdin() -> bytes:
    return sys.stdin.buffer.read()
