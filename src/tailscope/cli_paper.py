"""The verb `reproduce`: the paper's tables and figures from one command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from tailscope.cli_options import (
    DataRoot,
    Device,
    Devices,
    Engine,
    Json,
    MicroBatches,
    NumNodes,
    Out,
    Overwrite,
    Seeds,
    StoreRoot,
    Verify,
    Workers,
)
from tailscope.cli_output import console_beside, print_json
from tailscope.errors import UserError, printable

if TYPE_CHECKING:  # PyTorch takes its time, and --help need not wait for it
    from tailscope.paper.reproduce import Reproduction

What = Annotated[
    str, typer.Argument(metavar="WHAT", help="table1, fig2, fig3, ... fig8, all, or everything: both CIFAR data sets.")
]
DatasetName = Annotated[str, typer.Option("--dataset", help="cifar10-lt, cifar100-lt or imagenet-lt.")]
Recipe = Annotated[str | None, typer.Option("--recipe", help="Another recipe than the paper's. [default: paper]")]
Quick = Annotated[bool, typer.Option("--quick", help="A shortened run, recipe fast or imagenet-fast: no reproduction.")]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        help="Stop in time, such as 9m or 1h30m, one finished piece after the other; the same command goes on."
    ),
]
Jobs = Annotated[
    int,
    typer.Option(min=1, help="With a time limit or everything: backbones trained at a time; 4 may suit a GPU."),
]
WaitForData = Annotated[
    bool,
    typer.Option("--wait-for-data", help="With a time limit or everything: train as soon as NAME.npz is in DATA_ROOT."),
]
Bundle = Annotated[
    Path | None,
    typer.Option(
        help="With a time limit or everything: folder for results and trained stages as a few archives, to carry home."
    ),
]
Backbones = Annotated[
    str | None, typer.Option(help="Of table1 or fig2: backbones to train, such as lt. [default: all]")
]
ImageNet = Annotated[
    str | None, typer.Option("--data", help="Of imagenet-lt: all of ImageNet, list:TRAIN.txt,TEST.txt or folder:DIR.")
]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Only say what would be trained and how long it would take.")]


def reproduce(
    what: What,
    dataset: DatasetName = "cifar10-lt",
    out: Out = Path("reproduction"),
    seeds: Seeds = "3",
    quick: Quick = False,
    plan: PlanOnly = False,
    time_limit: TimeLimit = None,
    jobs: Jobs = 1,
    wait_for_data: WaitForData = False,
    bundle: Bundle = None,
    backbones: Backbones = None,
    recipe: Recipe = None,
    data: ImageNet = None,
    data_root: DataRoot = None,
    devices: Devices = None,
    num_nodes: NumNodes = 1,
    micro_batches: MicroBatches = None,
    workers: Workers = None,
    verify: Verify = False,
    store: StoreRoot = None,
    device: Device = "auto",
    engine: Engine = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Reproduce the paper's tables and figures, beside its printed numbers, and check its claims.

    Says first what will be trained, what is stored already and about how long it takes. Interrupted at any point, the
    same command continues. With a time limit it stops in time, says what is left (`finished` in OUT/reproduce.json) and
    exits with 0. Writes swap.json, ladder.json and geometry.json, claims.json, tables/paper-* and the report.

    Examples: `tailscope reproduce table1 --dataset cifar10-lt --data-root DIR --quick --seeds 1`;
    `tailscope reproduce all --dataset cifar10-lt --data-root DIR --plan`;
    `tailscope reproduce everything --data-root DIR --time-limit 9m --out results`;
    `tailscope reproduce table1 --dataset imagenet-lt --data list:TRAIN.txt,TEST.txt --data-root DIR --devices 4`
    """
    from tailscope.experiments.workplace import FileOptions
    from tailscope.paper.queue import EVERYTHING, run_queue
    from tailscope.paper.reproduce import Reproduction, draw, run_reproduce
    from tailscope.progress import shown_on

    console = console_beside(as_json)
    reproduction = Reproduction(
        what,
        dataset,
        out,
        seeds=seeds,
        recipe=recipe,
        quick=quick,
        data_root=data_root,
        store=store,
        device=device,
        overwrite=overwrite,
        backbones=backbones,
        time_limit=time_limit,
        data=data,
        files=FileOptions(devices, num_nodes, micro_batches, workers, verify),
        jobs=jobs,
        engine=engine,
        wait_for_data=wait_for_data,
        bundle=bundle,
    )
    queued = what == EVERYTHING or time_limit is not None
    _refuse_what_does_not_go_together(reproduction, queued, plan)

    def tell(text: str) -> None:
        console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    with shown_on(console) as progress:
        if queued:
            done = run_queue(reproduction, tell=tell, progress=progress)
        else:
            done = run_reproduce(reproduction, tell=tell, progress=progress, plan_only=plan)
    if queued:
        if as_json:
            print_json(done)
        if done["failed"]:
            raise typer.Exit(1)
        return
    if not plan:
        draw(out, tell)
    if as_json:
        print_json({k: v for k, v in done.items() if k != "results"})
    elif not plan:
        _show(done, out, console)


def _refuse_what_does_not_go_together(asked: "Reproduction", queued: bool, plan: bool) -> None:
    if queued and (asked.data is not None or asked.dataset == "imagenet-lt"):
        raise UserError("--time-limit: only for the CIFAR data sets; a training on files goes on where it was stopped")
    for option, given in (
        ("--jobs", asked.jobs > 1),
        ("--wait-for-data", asked.wait_for_data),
        ("--bundle", asked.bundle is not None),
    ):
        if given and not queued:
            raise UserError(f"{option}: only with --time-limit or `everything`")
    if asked.wait_for_data and asked.data_root is None:
        raise UserError("--wait-for-data: give --data-root, the folder where cifar10.npz or cifar100.npz will appear")
    if queued and plan:
        raise UserError("--plan: leave out --time-limit, and take `all` of one data set instead of `everything`")


def _show(done: dict[str, Any], out: Path, console: Console) -> None:
    """Print the printed tables beside ours, and what becomes of the claims."""
    from rich.table import Table

    from tailscope.paper.claims import tally

    for name in ("table1", "fig3"):
        if name in done["tables"]:
            table = Table("", "paper", "ours, %: mean ± sd (seeds)", "difference, points", box=None)
            for row in done["tables"][name]:
                table.add_row(row["label"], row["paper_written"], row["written"], row["difference_written"])
            console.print(table)
    console.print(f"claims: {tally(done['claims'])}; {done['label']}", highlight=False, markup=False)
    console.print(f"report: {out / 'report.html'}, tables: {out / 'tables'}", highlight=False, markup=False)
