"""The commands and their options, declared for typer."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import tensorfork
from tensorfork import demo as the_demo

app = typer.Typer(name="tensorfork", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(requested: bool) -> None:
    if requested:
        typer.echo(tensorfork.__version__)
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fork a running model's weights into another process, memory to memory, verified."""


@app.command()
def digests(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="The seed's, such as tcp://10.0.0.7:4180.")],
    include: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only these tensors; may be repeated.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Not these tensors.")] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Seconds to wait for the seed.", min=0.1)] = 300.0,
) -> None:
    """Print the digests of a running seed's weights: a line for each tensor, then one for all content.

    Seeds that hold the same weights under the same names print the same. The version goes to standard error.
    """
    try:
        found = tensorfork.digests(address, include=include, exclude=exclude, timeout=timeout)
    except (tensorfork.TensorForkError, ValueError) as error:
        typer.echo(f"tensorfork digests: {error}", err=True)
        raise typer.Exit(2) from None
    for name, digest in found.items():
        typer.echo(f"{digest}  {name if name.isprintable() else ascii(name)}")
    typer.echo(f"{found.content}  all content ({found.algorithm})")
    typer.echo(f"version {found.version}, generation {found.generation}", err=True)


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A Hugging Face folder with safetensors, instead of the packaged MiniLM."),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Size of the generated model, such as 512MiB or 8GiB; 2GiB by default."),
    ] = None,
    transport: Annotated[str, typer.Option(metavar="NAME", help="The transport to use.")] = "auto",
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Seconds that each step may take.", min=1.0)
    ] = 600.0,
    verify: Annotated[bool, typer.Option(help="Compare the digest of every tensor with the seed's.")] = True,
) -> None:
    """Fork a model between two processes, and show that both compute the same, bit for bit.

    First the real weights of all-MiniLM-L6-v2, then a large generated model. Each fork is compared with reading a file.
    With --model, the model in that folder instead, and a generated one only if --size is given too.
    """
    try:
        nbytes = None if size is None else the_demo.parse_size(size)
        options = the_demo.Options(model, nbytes, transport, timeout, verify)
        equal = the_demo.run(options, the_demo.Screen(Console(highlight=False)))
    except the_demo.DemoFailed as error:
        typer.echo(f"tensorfork demo: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("tensorfork demo: stopped", err=True)
        raise typer.Exit(130) from None
    raise typer.Exit(0 if equal else 1)
