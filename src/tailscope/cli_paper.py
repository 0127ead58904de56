"""The verb `reproduce`: the paper's tables and figures from one command."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer import Argument, Option

from tailscope.cli_output import Options
from tailscope.errors import UserError, printable
from tailscope.experiments.options import DataRoot, Device, Engine, FileOptions, Overwrite, Seeds, StoreRoot
from tailscope.progress import shown_on
from tailscope.verbs import taking

if TYPE_CHECKING:
    from tailscope.reproduce.reproduce import Reproduction


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is to be reproduced."""

    what: Annotated[
        str, Argument(metavar="WHAT", help="table1, fig2, fig3, ... fig8, all, or everything: both CIFAR data sets.")
    ] = field(kw_only=False)
    dataset: Annotated[str, Option(help="cifar10-lt, cifar100-lt or imagenet-lt.")] = "cifar10-lt"
    out: Annotated[Path, Option(help="Folder for results.")] = Path("reproduction")
    seeds: Seeds = 3
    quick: Annotated[
        bool, Option("--quick", help="A shortened run, recipe fast or imagenet-fast: no reproduction.")
    ] = False
    plan: Annotated[bool, Option("--plan", help="Only say what would be trained and how long it would take.")] = False
    time_limit: Annotated[
        str | None,
        Option(help="Stop in time, such as 9m or 1h30m, one finished piece after the other; the same command goes on."),
    ] = None
    jobs: Annotated[
        int, Option(min=1, help="With a time limit or everything: backbones trained at a time; 4 may suit a GPU.")
    ] = 1
    wait_for_data: Annotated[
        bool,
        Option("--wait-for-data", help="With a time limit or everything: train as soon as NAME.npz is in DATA_ROOT."),
    ] = False
    bundle: Annotated[
        Path | None,
        Option(
            help="With a time limit or everything: folder for results and trained stages as a few archives, to carry"
            " home."
        ),
    ] = None
    backbones: Annotated[
        str | None, Option(help="Of table1 or fig2: backbones to train, such as lt. [default: all]")
    ] = None
    recipe: Annotated[str | None, Option(help="Another recipe than the paper's. [default: paper]")] = None
    data: Annotated[
        str | None, Option(help="Of imagenet-lt: all of ImageNet, list:TRAIN.txt,TEST.txt or folder:DIR.")
    ] = None
    data_root: DataRoot = None


@dataclass(frozen=True, kw_only=True)
class _Request(FileOptions, _Asked):
    """What is to be reproduced, and where."""

    store: StoreRoot = None
    device: Device = "auto"
    engine: Engine = "auto"
    overwrite: Overwrite = False
    console: Console | None = None

    @property
    def queued(self) -> bool:
        """Whether the work is done piece by piece, under a time limit or on all data sets."""
        return self.time_limit is not None or self.what == "everything"

    def reproduction(self) -> "Reproduction":
        """Return what these options ask for.

        Raises:
            UserError: some do not go together.
        """
        from tailscope.reproduce.reproduce import Reproduction

        self._refuse_what_does_not_go_together()
        passed_on = {
            option.name: getattr(self, option.name) for option in fields(Reproduction) if option.name != "files"
        }
        return Reproduction(**passed_on, files=self.on_files)

    def _refuse_what_does_not_go_together(self) -> None:
        if self.queued and (self.data is not None or self.dataset == "imagenet-lt"):
            raise UserError(
                "--time-limit: only for the CIFAR data sets; a training on files goes on where it was stopped"
            )
        for option, given in (
            ("--jobs", self.jobs > 1),
            ("--wait-for-data", self.wait_for_data),
            ("--bundle", self.bundle is not None),
        ):
            if given and not self.queued:
                raise UserError(f"{option}: only with --time-limit or `everything`")
        if self.wait_for_data and self.data_root is None:
            raise UserError(
                "--wait-for-data: give --data-root, the folder where cifar10.npz or cifar100.npz will appear"
            )
        if self.queued and self.plan:
            raise UserError("--plan: leave out --time-limit, and take `all` of one data set instead of `everything`")


@taking(_Request)
def reproduce(request: _Request) -> dict[str, Any]:
    """Reproduce the paper's tables and figures, beside its printed numbers, and check its claims.

    Says first what will be trained, what is stored already and about how long it takes. Interrupted at any point, the
    same command continues. With a time limit it stops in time, says what is left (`finished` in OUT/reproduce.json) and
    exits with 0. Writes swap.json, ladder.json and geometry.json, claims.json, tables/paper-* and the report.

    Examples: `tailscope reproduce table1 --dataset cifar10-lt --data-root DIR --quick --seeds 1`;
    `tailscope reproduce all --dataset cifar10-lt --data-root DIR --plan`;
    `tailscope reproduce everything --data-root DIR --time-limit 9m --out results`;
    `tailscope reproduce table1 --dataset imagenet-lt --data list:TRAIN.txt,TEST.txt --data-root DIR --devices 4`
    """
    from tailscope.reproduce.queue import run_queue
    from tailscope.reproduce.reproduce import draw, run_reproduce

    reproduction, console = request.reproduction(), request.console or Console(quiet=True)

    def tell(text: str) -> None:
        console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    with shown_on(console) as progress:
        if request.queued:
            return run_queue(reproduction, tell=tell, progress=progress)
        done = run_reproduce(reproduction, tell=tell, progress=progress, plan_only=request.plan)
    if not request.plan:
        draw(request.out, tell)
    return {name: value for name, value in done.items() if name != "results"}


def show(done: dict[str, Any], options: Options, console: Console) -> None:
    """Print the printed tables beside ours, and what becomes of the claims; a plan, or pieces, were told already."""
    if "claims" not in done:
        return
    from tailscope.reproduce.claims import tally

    for name in ("table1", "fig3"):
        if name in done["tables"]:
            table = Table("", "paper", "ours, %: mean ± sd (seeds)", "difference, points", box=None)
            for row in done["tables"][name]:
                table.add_row(row["label"], row["paper_written"], row["written"], row["difference_written"])
            console.print(table)
    console.print(f"claims: {tally(done['claims'])}; {done['label']}", highlight=False, markup=False)
    console.print(
        f"report: {options['out'] / 'report.html'}, tables: {options['out'] / 'tables'}", highlight=False, markup=False
    )


def end(done: dict[str, Any]) -> None:
    """Exit with 1 where pieces failed.

    Raises:
        typer.Exit: some did.
    """
    if done.get("failed"):
        raise typer.Exit(1)
