"""The options of experiments, each stated once: its type, default and help, for Python and for the command line.

A type that is named beside `typer.Option` is the one that a command line has, where Python takes more.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

from rich.console import Console
from typer import Option

if TYPE_CHECKING:
    from tailscope.data.sources import ImageData

Data: TypeAlias = Annotated[
    "str | ImageData",
    Option(help="digits, cifar10, cifar100, PATH.npz, folder:PATH or list:TRAIN.txt,TEST.txt."),
    str,
]
DataRoot: TypeAlias = Annotated[
    Path | None, Option(help="Folder of the data set: torchvision's layout, NAME.npz, or images of lists.")
]
Profile: TypeAlias = Annotated[
    str, Option(help="Training counts: exp:IF, step:IF, balanced, balanced:N, full, counts:N,N,... or FILE.json.")
]
Protocol: TypeAlias = Annotated[
    str, Option(help="Rule that draws the subset: nested, or ldam (the published CIFAR-LT draws).")
]
Seeds: TypeAlias = Annotated[
    int | str | Sequence[int], Option(help="N for the seeds 0 ... N-1, or a list like 0,3."), str
]
Out: TypeAlias = Annotated[Path | None, Option(help="Folder for results.")]
StoreRoot: TypeAlias = Annotated[
    Path | str | None,
    Option("--store", envvar="TAILSCOPE_STORE", help="Folder of trained stages. [default: OUT/store]"),
    Path | None,
]
Device: TypeAlias = Annotated[str, Option(help="auto, cpu or cuda.")]
Engine: TypeAlias = Annotated[
    str, Option(help="What computes training steps: eager, fused, compiled, or auto, the fastest here.")
]
Overwrite: TypeAlias = Annotated[bool, Option("--overwrite", help="Replace a result of another spec in OUT.")]
Permutations: TypeAlias = Annotated[int, Option(min=0, help="Permutations of each test; 0 leaves the tests out.")]

NEGATED = object()
"""Beside `typer.Option`: the flag means the opposite of its parameter, as `--no-verdict` does of `verdict`."""


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How images in files are worked on; for images in memory everything stays at its default."""

    devices: Annotated[
        int | None, Option(min=1, help="Images in files: processes on this machine, one GPU each. [default: 1]")
    ] = None
    num_nodes: Annotated[int, Option(min=1, help="Images in files: machines.")] = 1
    micro_batches: Annotated[
        int | None,
        Option(min=1, help="Images in files: parts of a batch with statistics of their own. [default: processes]"),
    ] = None
    workers: Annotated[int | None, Option(min=0, help="Images in files: decoding processes for each process.")] = None
    verify: Annotated[
        bool, Option("--verify", help="Images in files: end with a list of all that cannot be read, if any.")
    ] = False

    @property
    def on_files(self) -> "FileOptions":
        """These options alone."""
        return FileOptions(**{option.name: getattr(self, option.name) for option in fields(FileOptions)})


@dataclass(frozen=True, kw_only=True)
class _Training:
    """What is trained, on what."""

    data: Data = field(kw_only=False)
    profile: Profile = "exp:100"
    out: Out = None
    recipe: Annotated[str, Option(help="demo, fast, paper, imagenet ...; see `tailscope methods`.")] = "fast"
    model: Annotated[str | None, Option(help="Another network than the recipe's; see `tailscope methods`.")] = None
    loss: Annotated[str | None, Option(help="Another loss of stage 1 than the recipe's, such as 'focal(gamma=1)'.")] = (
        None
    )
    seeds: Seeds = 3
    protocol: Protocol = "nested"
    subset_seed: Annotated[int | None, Option(help="One subset for all seeds; by default each seed draws its own.")] = (
        None
    )
    matched: Annotated[
        bool, Option("--matched", help="Add a third level: class-balanced with as many images as the long-tailed set.")
    ] = False
    backbones: Annotated[
        str | None,
        Option(help="Backbones to train, such as lt; without both lt and true nothing is attributed. [default: all]"),
    ] = None
    bn_mode: Annotated[
        str,
        Option(help="Batch-norm statistics in stage 2: frozen, or shifted (re-estimated on its data, as in MiSLAS)."),
    ] = "frozen"
    permutations: Permutations = 999
    data_root: DataRoot = None


@dataclass(frozen=True, kw_only=True)
class Request(FileOptions, _Training):
    """The options of an experiment, as given."""

    store: StoreRoot = None
    device: Device = "auto"
    engine: Engine = "auto"
    overwrite: Overwrite = False
    console: Console | None = None
    """Where progress and notes are shown, if anywhere."""
