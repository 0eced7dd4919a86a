"""The commands. Each one parses, calls one function of the package, and prints what came back.

Whatever a user can get wrong ends in exit code 2 and one line, see :mod:`tensortrain.cli.guard`.
What takes long to import and is no part of torch is imported where it is used: ``--help`` does not wait for it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tensortrain._command import leave_quietly_on_interrupt
from tensortrain.cli import commands
from tensortrain.cli.guard import guarded, ready_streams
from tensortrain.cli.reproduce import ReproduceOptions, list_experiments
from tensortrain.cli.reproduce import reproduce as run_experiments

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="tensortrain",
    help="Make trained PyTorch models smaller and faster, and prove it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="conv-fc, mlp, package.module:function, or a folder that save_pretrained wrote, ours or transformers'.",
    ),
]
Weights = Annotated[Path | None, typer.Option(help="State dict (.safetensors or .pt) or checkpoint folder for MODEL.")]
Data = Annotated[Path | None, typer.Option(help="Folder with the files of the data set.")]
Dataset = Annotated[str | None, typer.Option(help="fashion-mnist, digits, or movie-snippets for sentence encoders.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder of the tokenizer, where MODEL's folder has none.")]
Shape = Annotated[str | None, typer.Option(help="Shape of one input, such as 1x28x28.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, progress on stderr.")]
Limit = Annotated[int | None, typer.Option(help="Use the first so many test examples only.")]


@app.command()
def inspect(
    model: Model,
    weights: Weights = None,
    shape: Shape = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """List the layers that can be compressed, and how fast their singular values fall."""
    commands.inspect(model, weights, shape=shape, seed=seed, json=json)


@app.command()
def compress(
    model: Model,
    budget: Annotated[
        str,
        typer.Option(
            help="20x, a share such as 0.05, or some of params=N, flops=4x, bytes=N, latency_ms=T, batch_size=N and "
            "max_metric_drop=P with + between; several with commas, such as 1.5x,2x,3x."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for model/, report.json, report.html, plan.json.")],
    weights: Weights = None,
    data: Data = None,
    dataset: Dataset = None,
    tokenizer: Tokenizer = None,
    epochs: Annotated[int, typer.Option(help="Passes over the data to heal.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Steps to heal, in place of epochs.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of healing; by default one that suits the data.")
    ] = None,
    no_heal: Annotated[bool, typer.Option("--no-heal", help="Do not train after compression.")] = False,
    formats: Annotated[str | None, typer.Option(help="Weight formats to choose among, such as tt,low_rank.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Layer names or patterns to compress.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layer names or patterns to leave.")] = None,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="Also take forms that are predicted slower than dense.")
    ] = False,
    shape: Shape = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Fit a model into a budget, heal it, and write checkpoint and report.

    Without --data and --dataset, models of the package take Fashion-MNIST, and others are compressed by
    their weights alone. A sentence encoder with --dataset movie-snippets is drawn to the original's vectors.
    """
    options = commands.CompressOptions(
        budget=budget,
        out=out,
        epochs=epochs,
        steps=steps,
        lr=lr,
        heal=not no_heal,
        formats=_split([formats] if formats else None),
        include=_split(include),
        exclude=_split(exclude),
        allow_slower=allow_slower,
        seed=seed,
    )
    commands.compress(model, weights, options, data=data, dataset=dataset, tokenizer=tokenizer, shape=shape, json=json)


@app.command()
def evaluate(
    model: Model,
    weights: Weights = None,
    data: Data = None,
    dataset: Dataset = None,
    tokenizer: Tokenizer = None,
    limit: Limit = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Measure accuracy on the test images of a data set (Fashion-MNIST unless --dataset names another).

    With --dataset movie-snippets, a sentence encoder is judged by a logistic regression on its vectors.
    """
    commands.evaluate(
        model, weights, data=data, dataset=dataset, tokenizer=tokenizer, limit=limit, seed=seed, json=json
    )


@app.command()
def bench(
    model: Model,
    other: Annotated[str | None, typer.Argument(metavar="[MODEL2]", help="Timed turn about.")] = None,
    weights: Weights = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas between.")] = "1,128",
    repeats: Annotated[int, typer.Option(help="Least runs of each model and batch size.")] = 20,
    shape: Shape = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Time forward passes: medians and 90th percentiles, models in alternation."""
    commands.bench(model, other, weights, batch=batch, repeats=repeats, shape=shape, seed=seed, json=json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and reports; work is resumed from it.")] = Path(
        "runs/demo"
    ),
    data: Data = None,
    dataset: Dataset = None,
    budget: Annotated[str, typer.Option(help="20x, a share such as 0.05, params=N or flops=4x.")] = "40x",
    seed: Seed = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A minute's worth of images and epochs.")] = False,
    json: Json = False,
) -> None:
    """Train a network, compress it, heal it, and check the checkpoint in a new process.

    It can be killed at any moment: the same command goes on and ends with the same result.
    """
    agrees = commands.demo(out, data=data, dataset=dataset, budget=budget, seed=seed, quick=quick, json=json)
    if not agrees:
        raise typer.Exit(1)


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Experiments to run, or all; --list shows them.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show what there is: published, recorded, minutes.")] = False,
    quick: Annotated[bool, typer.Option("--quick/--full", help="About a minute of it, or all as recorded.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for what comes out; work is resumed from it.")] = Path(
        "runs/reproduce"
    ),
    record: Annotated[
        bool, typer.Option("--record", help="Replace the record in experiments/, which README and docs read.")
    ] = False,
    data: Data = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Only this seed.")] = None,
    json: Json = False,
) -> None:
    """Run recorded experiments again, and put the figures beside those published and those recorded.

    It can be killed at any moment: the same command goes on with what is not finished.
    """
    if list_ or not names:
        list_experiments(json=json)
        return
    run_experiments(names, ReproduceOptions(out, quick, record, data, seed, json))


@app.command(name="build-kernels")
def build_kernels(
    force: Annotated[bool, typer.Option("--force", help="Compile them anew.")] = False,
    json: Json = False,
) -> None:
    """Compile the kernels that make small layers two to three times faster on this machine's CPU; a minute, once."""
    commands.build_kernels(force=force, json=json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    ready_streams()
    code = run(arguments)
    leave_quietly_on_interrupt()
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Those of the process when None.

    Returns:
        int: 0; 1 where a check of the command failed; 2 for whatever cannot be done; 130 when interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: app(args=given or ["--help"], prog_name="tensortrain", standalone_mode=False))


def _split(values: list[str] | None) -> list[str] | None:
    """Several options, or one with commas, or both."""
    return [part.strip() for value in values for part in value.split(",") if part.strip()] if values else None
