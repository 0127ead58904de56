"""Learning-rate schedules: one multiplier of the base rate for every step, known before the first."""

import math

from tailscope.errors import UserError
from tailscope.registry import Registry

SCHEDULES: Registry[list[float]] = Registry("schedule")


@SCHEDULES.register("cosine")
def cosine(steps: int, steps_per_epoch: int, /) -> list[float]:
    """Half a cosine from 1 down to 0, without warm-up."""
    return [0.5 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]


@SCHEDULES.register("multistep")
def multistep(
    steps: int, steps_per_epoch: int, /, warmup: int = 5, drops: tuple[int, ...] = (160, 180), factor: float = 0.01
) -> list[float]:
    """Constant within an epoch: (e+1)/warmup in the first `warmup` epochs, times `factor` at each epoch in `drops`."""

    def multiplier(epoch: int) -> float:
        return min(1.0, (epoch + 1) / max(1, warmup)) * factor ** sum(epoch >= drop for drop in drops)

    return [multiplier(step // steps_per_epoch) for step in range(steps)]


@SCHEDULES.register("onecycle")
def onecycle(steps: int, steps_per_epoch: int, /, peak: float = 0.25, start: float = 0.1) -> list[float]:
    """Linear from `start` up to 1 at the fraction `peak` of all steps, then linear down to nearly 0.

    Smith and Topin (2019), with straight lines.

    Raises:
        UserError: `peak` is not strictly between 0 and 1.
    """
    if not 0 < peak < 1:
        raise UserError(f"schedule onecycle: peak={peak} must lie strictly between 0 and 1")
    top = peak * steps

    def multiplier(step: int) -> float:
        return start + (1 - start) * step / top if step < top else (steps - step) / (steps - top)

    return [multiplier(step) for step in range(steps)]
