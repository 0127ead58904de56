"""Processes that train together: one leads and owns the store and the results, the others follow its orders.

Every process runs the same command. The leader goes on alone, and calls the others in where work is worth sharing: it
announces an order, all carry it out, and sum what they found. Lightning Fabric starts the processes (also under
`torchrun`), gives each its device and connects them (gloo on CPUs, NCCL on GPUs).
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from tailscope.errors import UserError, one_line

_PATIENCE = timedelta(days=7)
"""How long followers wait for the leader, who may fit classifiers and measure geometry for hours in between."""


class Team:
    """The processes that work on one command; by itself a team of one, with nothing to send and nothing to sum."""

    rank: int = 0
    """Number of this process; 0 leads."""
    size: int = 1
    device: torch.device | None = None
    """Of this process; None leaves the choice to the runtime."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes; all must call it with the same shapes."""

    def share(self, value: Any) -> Any:
        """Return the leader's value in every process."""
        return value

    def lead(self, order: Any) -> AbstractContextManager[None]:
        """Give the followers an order, which all processes carry out in the block."""
        return nullcontext()

    def orders(self) -> Iterator[Any]:
        """Yield a follower the leader's orders until it is dismissed."""
        return iter(())

    def dismiss(self) -> None:
        """Let the followers go."""


Solo = Team


class _FabricTeam(Team):
    """Several processes, started and connected by Lightning Fabric."""

    def __init__(self, fabric: Any) -> None:
        self._fabric = fabric
        self._listening = True
        self.rank, self.size, self.device = fabric.global_rank, fabric.world_size, fabric.device

    def sum(self, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([t.reshape(-1).float() for t in tensors])  # one message, in float32
        with _connected():
            flat = self._fabric.all_reduce(flat, reduce_op="sum")
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))

    def share(self, value: Any) -> Any:
        with _connected():
            return self._fabric.broadcast(value, src=0)

    @contextmanager
    def lead(self, order: Any) -> Iterator[None]:
        self.share(order)
        self._listening = False  # after an exception in the block they no longer do
        yield
        self._listening = True

    def orders(self) -> Iterator[Any]:
        while (order := self.share(None)) is not None:
            yield order
        torch.distributed.destroy_process_group()

    def dismiss(self) -> None:
        if self._listening:  # those left in the middle of an order end when the connection does
            self.share(None)
            torch.distributed.destroy_process_group()


@contextmanager
def _connected() -> Iterator[None]:
    """Turn a broken connection, which only says that another process has ended, into one line."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"another process of this run has ended ({one_line(str(error))}); see its message") from None


def form(devices: int | None, num_nodes: int, accelerator: str) -> Team:
    """Start the processes and return this one's place among them.

    There are `devices` on each of the machines, one GPU each; None: as many as `torchrun` started, else 1. Without
    Fabric's own environment this starts `devices` - 1 more processes, which run the same command up to here.

    Raises:
        UserError: Lightning is not installed, or there are fewer GPUs than `devices`.
    """
    if torch.distributed.is_torchelastic_launched():
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        if devices not in (None, local):
            raise UserError(f"--devices {devices}: torchrun has started {local} processes here; leave --devices out")
        devices, num_nodes = local, int(os.environ["WORLD_SIZE"]) // local
    devices = devices or 1
    if devices * num_nodes == 1:
        return Solo()
    if accelerator == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPUs that PyTorch can use")
    try:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies.ddp import DDPStrategy
    except ImportError:
        raise UserError("--devices: several processes need Lightning; pip install 'tailscope[ddp]'") from None
    for name in ("lightning.fabric", "lightning.pytorch"):  # it tells standard error who has joined
        logging.getLogger(name).setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    fabric = Fabric(
        accelerator=accelerator, devices=devices, num_nodes=num_nodes, strategy=DDPStrategy(timeout=_PATIENCE)
    )
    fabric.launch()
    if accelerator == "cpu":
        torch.set_num_threads(max(1, threads // devices))
    return _FabricTeam(fabric)
