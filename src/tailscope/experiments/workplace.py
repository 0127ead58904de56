"""Where an experiment runs: its device, the processes that share the work, and the lab on the data that can be read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tailscope.data.decoding import readable
from tailscope.data.sources import ImageData
from tailscope.errors import UserError
from tailscope.experiments.imagery import check, follow
from tailscope.experiments.lab import Lab
from tailscope.progress import Progress
from tailscope.store import Store
from tailscope.training.recipes import Recipe
from tailscope.training.runtime import Runtime
from tailscope.training.team import Solo, Team, form


@dataclass(frozen=True)
class FileOptions:
    """How images in files are worked on; for images in memory everything stays at its default.

    Attributes:
        devices: processes on each machine, one GPU each; None: what `torchrun` started, else 1.
        num_nodes: machines.
        micro_batches: parts that stage 1's batches are cut into; None: one for each process.
        workers: processes that decode, for each of the others; None decides.
        verify: refuse data with images that cannot be read, instead of leaving them out.
    """

    devices: int | None = None
    num_nodes: int = 1
    micro_batches: int | None = None
    workers: int | None = None
    verify: bool = False


@dataclass(frozen=True)
class Workplace:
    """A runtime and a team that this process leads, for a data set."""

    data: ImageData
    runtime: Runtime
    team: Team
    options: FileOptions

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe with its batches cut for the team.

        Raises:
            UserError: the recipe does not suit the data, or the team.
        """
        recipe = recipe.with_micro_batches(self.options.micro_batches or self.team.size)
        check(self.data, self.team, recipe.stage1, recipe.augment)
        return recipe

    def lab(self, store: Store, progress: Progress, tell: Callable[[str], object] = str) -> Lab:
        """Return a lab that works here, on the images that can be read.

        Args:
            store: of the lab.
            progress: receives the work done.
            tell: receives a line for every image that cannot be read, where the options say `verify`.

        Raises:
            UserError: as `decoding.readable`.
        """
        verify, workers = self.options.verify, self.options.workers
        data = readable(self.data, store, verify=verify, workers=workers, progress=progress, tell=tell)
        return Lab(data, store, replace(self.runtime, progress=progress), self.team, workers)


@contextmanager
def workplace(data: ImageData, options: FileOptions, runtime: Runtime) -> Iterator[Workplace]:
    """Start the processes that the options ask for; only their leader comes back from here, the others serve it.

    Raises:
        UserError: the options are for images in files and these are in memory; or as `form`.
    """
    if data.in_memory and options != FileOptions():
        raise UserError(
            f"{data.name}: --devices, --num-nodes, --micro-batches, --workers and --verify are for images in files"
            " (folder:, list: or hf:)"
        )
    team = Solo() if data.in_memory else form(options.devices, options.num_nodes, runtime.device.type)
    if team.device is not None:
        runtime = replace(runtime, device=team.device)
    if team.rank > 0:
        follow(team, runtime, options.workers)
    try:
        yield Workplace(data, runtime, team, options)
    finally:
        team.dismiss()
