"""Options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

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
Engine = Annotated[
    str, typer.Option(help="What computes training steps: eager, fused, compiled, or auto, the fastest here.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result of another spec in OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a summary.")]

Profile = Annotated[
    str, typer.Option(help="Training counts: exp:IF, step:IF, balanced, balanced:N, full, counts:N,N,... or FILE.json.")
]
Protocol = Annotated[
    str, typer.Option(help="Rule that draws the subset: nested, or ldam (the published CIFAR-LT draws).")
]
RecipeName = Annotated[str, typer.Option("--recipe", help="demo, fast, paper, imagenet ...; see `tailscope methods`.")]
ModelName = Annotated[
    str | None, typer.Option("--model", help="Another network than the recipe's; see `tailscope methods`.")
]
LossName = Annotated[
    str | None,
    typer.Option("--loss", help="Another loss of stage 1 than the recipe's, such as 'focal(gamma=1)'."),
]
SubsetSeed = Annotated[int | None, typer.Option(help="One subset for all seeds; by default each seed draws its own.")]
Matched = Annotated[
    bool,
    typer.Option("--matched", help="Add a third level: class-balanced with as many images as the long-tailed set."),
]
Backbones = Annotated[
    str | None,
    typer.Option(help="Backbones to train, such as lt; without both lt and true nothing is attributed. [default: all]"),
]
BatchNorm = Annotated[
    str,
    typer.Option(help="Batch-norm statistics in stage 2: frozen, or shifted (re-estimated on its data, as in MiSLAS)."),
]
Permutations = Annotated[int, typer.Option(min=0, help="Permutations of each test; 0 leaves the tests out.")]

Devices = Annotated[
    int | None, typer.Option(min=1, help="Images in files: processes on this machine, one GPU each. [default: 1]")
]
NumNodes = Annotated[int, typer.Option(min=1, help="Images in files: machines.")]
MicroBatches = Annotated[
    int | None,
    typer.Option(min=1, help="Images in files: parts of a batch with statistics of their own. [default: processes]"),
]
Workers = Annotated[int | None, typer.Option(min=0, help="Images in files: decoding processes for each process.")]
Verify = Annotated[
    bool, typer.Option("--verify", help="Images in files: end with a list of all that cannot be read, if any.")
]
