"""A callback for Lightning's Trainer that diagnoses the network every few epochs."""

from pathlib import Path
from typing import Any

from tailscope.errors import UserError
from tailscope.integrations.monitor import History, Monitor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    raise UserError("DiagnosisCallback: needs the package lightning; pip install 'tailscope[lightning]'") from None


class DiagnosisCallback(Callback):
    """Diagnoses the network after every n-th epoch, and gives the main numbers to the trainer's loggers.

    They are `Diagnosis.scalars`, under `tailscope/`: `tailscope/accuracy`, `tailscope/classifier_gap` and so on. The
    training ends with the same weights as without the callback.
    """

    def __init__(
        self,
        train: Any,
        heldout: Any,
        *,
        every: int = 1,
        network: str = "",
        out: Path | str | None = None,
        **options: Any,
    ) -> None:
        """Say on which samples to diagnose, and how often.

        Args:
            train: as `Monitor` takes it.
            heldout: as `Monitor` takes it.
            every: diagnose after so many epochs.
            network: name of the module's attribute that is the network, such as `model`; by default the whole module.
            out: folder for the results of each, as `Monitor` takes it.
            options: further ones of `Monitor` and of `tailscope.diagnose`.

        Raises:
            UserError: as `Monitor`.
        """
        super().__init__()
        self._monitor, self._network = Monitor(train, heldout, every=every, out=out, **options), network

    @property
    def history(self) -> History:
        """The diagnoses so far."""
        return self._monitor.history

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work before the training begins.

        Raises:
            UserError: several processes train, or the module has no such network.
        """
        if trainer.world_size > 1:
            raise UserError(
                f"DiagnosisCallback: {trainer.world_size} processes train, and it works in one only; leave it out, and"
                " diagnose checkpoints with tailscope.diagnose"
            )
        try:
            pl_module.get_submodule(self._network)
        except AttributeError:
            raise UserError(
                f"network: {type(pl_module).__name__} has no module {self._network!r}; leave it out for the whole"
            ) from None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Diagnose, if it is time."""
        result = self._monitor(pl_module.get_submodule(self._network), trainer.current_epoch)
        if result is None:
            return
        numbers = {f"tailscope/{name}": value for name, value in result.scalars().items()}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)
