"""The command line: one verb per experiment. Mistakes of the user are one line and exit code 2."""

import io
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import tailscope
from tailscope.cli_options import (
    Backbones,
    BatchNorm,
    Devices,
    LossName,
    Matched,
    MicroBatches,
    ModelName,
    NumNodes,
    Permutations,
    Profile,
    Protocol,
    RecipeName,
    SubsetSeed,
    Verify,
    Workers,
)
from tailscope.errors import UserError, one_line
from tailscope.origin import from_command_line

INTERRUPTED = 130
"""The exit code of a process ended by SIGINT, as shells have it."""

app = typer.Typer(
    name="tailscope",
    help="Is the classifier or the representation the bottleneck of a long-tailed data set, for which classes, and how "
    "sure is that?",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Data = Annotated[str, typer.Option(help="digits, cifar10, cifar100, PATH.npz, folder:PATH or list:TRAIN.txt,TEST.txt.")]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder of the data set: torchvision's layout, NAME.npz, or images of lists.")
]
Seeds = Annotated[str, typer.Option(help="N for the seeds 0 ... N-1, or a list like 0,3.")]
Out = Annotated[Path, typer.Option(help="Folder for results.")]
StoreRoot = Annotated[
    Path | None,
    typer.Option("--store", envvar="TAILSCOPE_STORE", help="Folder of trained stages. [default: OUT/store]"),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result of another spec in OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a summary.")]


def main() -> None:
    """Run the command line; the entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a console without Unicode shows "?" instead of failing
            stream.reconfigure(errors="replace")
    try:
        with from_command_line(sys.argv[1:]):
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except UserError as error:
        code = _fail(str(error))
    except typer.TyperException as error:
        code = _fail(error.format_message())
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    if code == INTERRUPTED:  # typer turns the interrupt of a running verb into this code
        print("\ninterrupted; the same command keeps what is finished and does the rest", file=sys.stderr)  # noqa: T201
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    """Print one line to standard error and return the exit code of a mistake."""
    print(f"error: {one_line(message)}", file=sys.stderr)  # noqa: T201
    return 2


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tailscope {tailscope.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    out: Out = Path("demo"),
    seeds: Seeds = "3",
    store: StoreRoot = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Tell the whole story on scikit-learn's digits in about two minutes.

    Subset, swap, ladder, geometry and report at imbalance factor 100, with the recipe `demo`.

    Example: `tailscope demo --out demo`, then open `demo/report.html`.
    """
    from tailscope import verbs

    request = verbs.Request("digits", "exp:100", "demo", seeds, out, store=store, device=device, overwrite=overwrite)
    _show(verbs.experiments(request, ["subset", "swap", "ladder", "geometry"], _console(as_json)), out, as_json)


@app.command()
def swap(
    data: Data,
    profile: Profile = "exp:100",
    out: Out = Path("out"),
    recipe: RecipeName = "fast",
    model: ModelName = None,
    loss: LossName = None,
    seeds: Seeds = "3",
    protocol: Protocol = "nested",
    subset_seed: SubsetSeed = None,
    matched: Matched = False,
    backbones: Backbones = None,
    bn_mode: BatchNorm = "frozen",
    data_root: DataRoot = None,
    devices: Devices = None,
    num_nodes: NumNodes = 1,
    micro_batches: MicroBatches = None,
    workers: Workers = None,
    verify: Verify = False,
    store: StoreRoot = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Swap the data set between the two stages and divide the gap (Table 1, Figure 2).

    Trains a backbone on the long-tailed (lt) and one on the full (true) training set, and two classifiers on each.

    Examples: `tailscope swap --data digits --recipe demo --out out`;
    `tailscope swap --data cifar10 --data-root DIR --profile exp:100 --protocol ldam --recipe paper`;
    `tailscope swap --data list:TRAIN.txt,TEST.txt --data-root DIR --profile FILE.json --recipe imagenet --devices 4`
    """
    _experiment("swap", **locals())


@app.command()
def ladder(
    data: Data,
    profile: Profile = "exp:100",
    out: Out = Path("out"),
    recipe: RecipeName = "fast",
    model: ModelName = None,
    loss: LossName = None,
    seeds: Seeds = "3",
    protocol: Protocol = "nested",
    subset_seed: SubsetSeed = None,
    bn_mode: BatchNorm = "frozen",
    data_root: DataRoot = None,
    devices: Devices = None,
    num_nodes: NumNodes = 1,
    micro_batches: MicroBatches = None,
    workers: Workers = None,
    verify: Verify = False,
    store: StoreRoot = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """See how far augmentation and class-balanced retraining close the gap (Figure 3).

    Example: `tailscope ladder --data digits --recipe demo --out out` (re-uses what `swap` trained there).
    """
    _experiment("ladder", **locals())


@app.command()
def geometry(
    data: Data,
    profile: Profile = "exp:100",
    out: Out = Path("out"),
    recipe: RecipeName = "fast",
    model: ModelName = None,
    loss: LossName = None,
    seeds: Seeds = "3",
    protocol: Protocol = "nested",
    subset_seed: SubsetSeed = None,
    permutations: Permutations = 999,
    data_root: DataRoot = None,
    devices: Devices = None,
    num_nodes: NumNodes = 1,
    micro_batches: MicroBatches = None,
    workers: Workers = None,
    verify: Verify = False,
    store: StoreRoot = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure what long-tailed training does to each class in feature space (Figures 4 to 8).

    Example: `tailscope geometry --data digits --recipe demo --out out` (re-uses what `swap` trained there).
    """
    _experiment("geometry", **locals())


@app.command()
def subset(
    data: Data,
    profile: Profile = "exp:100",
    protocol: Protocol = "nested",
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for subset.json; without it the subset is only shown.")
    ] = None,
    data_root: DataRoot = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Build and show a long-tailed subset; write its indices to OUT/subset.json.

    Example: `tailscope subset --data cifar10 --data-root DIR --profile exp:100 --protocol ldam --seed 0 --out out`
    """
    from tailscope import verbs

    result = verbs.subset(data, profile, protocol, seed, out, data_root=data_root, overwrite=overwrite)
    if as_json:
        _print_json(result)
    else:
        verbs.show_subset(result, out, Console())


@app.command()
def report(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with result files.")],
    figures: Annotated[bool, typer.Option(help="Also write every chart as SVG, PNG and PDF.")] = True,
) -> None:
    """Build report.html, figures and tables from the stored results in DIR. Nothing is computed anew.

    Example: `tailscope report out`
    """
    from tailscope.report import build

    typer.echo(build(out, figures=figures))


@app.command()
def methods(as_json: Json = False) -> None:
    """List every loss, sampler, augmentation, mixing, model, schedule, profile and recipe with its defaults.

    Example: `tailscope methods --json`
    """
    from tailscope import verbs

    if as_json:
        _print_json(verbs.list_methods())
    else:
        verbs.show_methods(Console())


def _experiment(verb: str, *, as_json: bool, out: Path, **options: Any) -> None:
    """Run one experiment and its report, and show the end of the story."""
    from tailscope import verbs
    from tailscope.experiments.workplace import FileOptions

    on_files = {name: options.pop(name) for name in FileOptions.__dataclass_fields__}
    request = verbs.Request(out=out, files=FileOptions(**on_files), **options)
    _show(verbs.experiments(request, [verb], _console(as_json)), out, as_json)


def _console(as_json: bool) -> Console:
    """Return where progress goes: standard error when standard output carries JSON."""
    return Console(stderr=as_json)


def _show(results: dict[str, dict[str, Any]], out: Path, as_json: bool) -> None:
    from tailscope import verbs

    if as_json:
        _print_json(next(iter(results.values())) if len(results) == 1 else results)
    else:
        verbs.show_story(out, Console())


def _print_json(value: Any) -> None:
    import json

    typer.echo(json.dumps(value, indent=1, allow_nan=False))


from tailscope import cli_diagnose, cli_features, cli_paper  # noqa: E402, F401 - they register their verbs
