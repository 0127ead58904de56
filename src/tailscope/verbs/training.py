"""The verbs that train, and what they choose from."""

from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from tailscope.experiments.options import (
    Comparison,
    Data,
    DataRoot,
    Memorization,
    Overwrite,
    Placing,
    Planning,
    Profile,
    Protocol,
    Request,
    taking,
    verb,
)
from tailscope.training import REGISTRIES

if TYPE_CHECKING:
    from tailscope.data.sources import ImageData
    from tailscope.report.objects import Comparison as Compared
    from tailscope.report.objects import Memorization as Memorized
    from tailscope.report.objects import Result


def load(source: str | Path, *, data_root: Path | str | None = None) -> "ImageData":
    """Load a data set that an experiment can train on: what `--data` takes; `UserError` where it is not usable."""
    from tailscope.data import sources

    return sources.load(source, data_root=data_root)


# -- experiments ----------------------------------------------------------------------------------------------------


@taking(Planning, leave_out={"permutations"})
def swap(request: Planning) -> "Result":
    """Swap the data set between the two stages and divide the gap (Table 1, Figure 2).

    Trains a backbone on the long-tailed (lt) and one on the full (true) training set, and two classifiers on each.
    With `--plan` it only says what it would train; of images in files also how long on one, four and eight GPUs, how
    much disk it takes, and whether decoding binds it or the GPU.

    Examples: `tailscope swap --data digits --recipe demo --out out`;
    `tailscope swap --data cifar10 --data-root DIR --profile exp:100 --protocol ldam --recipe paper`;
    `tailscope swap --data list:TRAIN.txt,TEST.txt --data-root DIR --profile FILE.json --recipe imagenet --devices 4`;
    `tailscope swap --data cifar10 --data-root DIR --seeds 12 --jobs 4 --out out`
    """
    if request.plan:
        from tailscope.experiments.hours import plan_swap
        from tailscope.report.objects import Result

        return Result(plan_swap(request))
    return _experiments(request, "swap")["swap"]


@taking(Request, leave_out={"matched", "backbones", "permutations", "mix", "stage2_sampler"})
def ladder(request: Request) -> "Result":
    """See how far augmentation and class-balanced retraining close the gap (Figure 3).

    Examples: `tailscope ladder --data digits --recipe demo --out out` (re-uses what `swap` trained there);
    `tailscope ladder --data cifar10 --data-root DIR --seeds 12 --on ray --out out`
    """
    return _experiments(request, "ladder")["ladder"]


@taking(Request, leave_out={"matched", "backbones", "bn_mode", "mix", "stage2_loss", "stage2_sampler"})
def geometry(request: Request) -> "Result":
    """Measure what long-tailed training does to each class in feature space (Figures 4 to 8).

    Example: `tailscope geometry --data digits --recipe demo --out out` (re-uses what `swap` trained there).
    """
    return _experiments(request, "geometry")["geometry"]


_NO_TRAINING = {"out", "store", "overwrite", "permutations", "device", "engine", "logger", "verify"}
_NO_TRAINING |= {option.name for option in fields(Placing)}
"""What only matters where something is trained."""

_FIXED = {"last_layer", "weights", "sampler", "mix", "pretrain", "augment", "schedule", "stage2_loss", "stage2_sampler"}
"""What every method of a comparison chooses for itself."""


@taking(Comparison, leave_out={"loss", "matched", "backbones", "bn_mode", "permutations", "logger", *_FIXED})
def compare(request: Comparison) -> "Compared":
    """Compare methods for long-tailed data: what each gains, and which of the two gaps it closes.

    All train equally long, on the same subsets, and the first is the baseline; `a + b` does what both do. Methods that
    leave stage 1 alone share a backbone. Interrupted, the same command continues.

    Examples: `tailscope compare --data digits --recipe demo --methods "ce; la; crt; mixup + crt" --out out`;
    `tailscope compare --data cifar10 --data-root DIR --protocol ldam --methods "ce; tau; lws" --tune cut`;
    `tailscope compare --data cifar10 --data-root DIR --methods "ce; balanced_softmax; loss:focal(gamma=1)" --plan`;
    `tailscope compare --data cifar10 --data-root DIR --seeds 12 --on ray --gpus 0.25 --out out`
    """
    from tailscope.experiments.compare import run

    return run(request)


_STAGE2 = {"stage2_loss", "stage2_sampler", "matched", "backbones", "bn_mode", "permutations", "logger"}
"""What an experiment without a second stage has no use for; its many short trainings would be many logs."""


@taking(Memorization, leave_out=_STAGE2)
def memorization(request: Memorization) -> "Memorized":
    """Find what networks memorise, by training on random parts (Feldman and Zhang 2020), beside the spread gap.

    An image is memorised as far as a network gets it right only because it was trained on it. Trains a backbone on the
    whole long-tailed set and `--trainings` on parts, for each seed. Interrupted, the same command continues, and a
    higher `--trainings` (with `--overwrite`) adds to what is there.

    Examples: `tailscope memorization --data digits --recipe demo --trainings 30 --out out`;
    `tailscope memorization --data cifar10 --data-root DIR --protocol ldam --trainings 8 --plan`
    """
    from tailscope.experiments.memorization import run

    return run(request)


_DEMO = {"out", "seeds", "store", "device", "engine", "overwrite", "console"}


@taking(partial(Request, "digits", recipe="demo"), leave_out={option.name for option in fields(Request)} - _DEMO)
def demo(request: Request) -> "dict[str, Result]":
    """Tell the whole story on scikit-learn's digits in a few minutes.

    Subset, swap, ladder, geometry and report at imbalance factor 100, with the recipe `demo`.

    Example: `tailscope demo --out demo`, then open `demo/report.html`.
    """
    return _experiments(request, "subset", "swap", "ladder", "geometry")


def _experiments(request: Request, *verbs: str) -> "dict[str, Result]":
    """Run experiments, and build their report where they are written."""
    from tailscope.experiments.plans import run
    from tailscope.report import build
    from tailscope.report.objects import Result

    results = run(request, verbs)
    if request.out is not None:
        build(request.out)
    return {verb: Result(result) for verb, result in results.items()}


@verb
def subset(
    data: Data,
    profile: Profile = "exp:100",
    protocol: Protocol = "nested",
    seed: Annotated[int, Option(help="Seed of the draw.")] = 0,
    out: Annotated[
        Path | str | None, Option(help="Folder for subset.json; without it the subset is only shown."), Path | None
    ] = None,
    data_root: DataRoot = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Build and show a long-tailed subset; write its indices to OUT/subset.json.

    Example: `tailscope subset --data cifar10 --data-root DIR --profile exp:100 --protocol ldam --seed 0 --out out`
    """
    from tailscope.data.sources import load
    from tailscope.data.subsets import require_seed
    from tailscope.experiments.plans import describe_subset
    from tailscope.results import check_free, write
    from tailscope.store import make_folder

    require_seed(seed, protocol, "--seed")
    result = describe_subset(load(data, data_root=data_root), profile, protocol, seed)
    if out is not None:
        folder = make_folder(out, "--out")
        check_free(folder, "subset", result["spec"], overwrite=overwrite)
        write(folder, "subset", result)
    return result


@taking(Request, leave_out=_NO_TRAINING)
def check(request: Request) -> dict[str, Any]:
    """Look for traps in what a training is about to do, without training.

    Test images that are training images too, counts of another factor than stated, a rate that does not go with the
    batch, a sampler without effect, MixUp in a short schedule. Trainings tell the same as warnings of their results.

    Examples: `tailscope check --data cifar100 --data-root DIR --profile exp:100`;
    `tailscope check --data list:TRAIN.txt,TEST.txt --data-root DIR --recipe 'imagenet(batch=2048)'`
    """
    from tailscope.experiments.plans import find_traps

    return {"traps": find_traps(request)}


@verb
def methods(
    check: Annotated[
        str | None,
        Option(metavar="NAME", help="Check all that has this name, a call-string, against what methods promise."),
    ] = None,
) -> dict[str, Any]:
    """List all that has a name: methods to compare, losses, class weights, samplers, models, classifiers, recipes ...

    With `--check` it says of each promise whether the method keeps it, and why not; the exit code is 1 if not all are.

    Examples: `tailscope methods --json`; `tailscope methods --import my_methods --check mine`
    """
    if check is not None:
        from tailscope.training import contract

        return {"checks": [asdict(outcome) for outcome in contract.check(check)]}
    from tailscope.data import PROFILES
    from tailscope.training.recipes import recipes

    listed: dict[str, Any] = {
        kind: [{"name": e.name, "defaults": e.defaults, "summary": e.summary, "needs": list(e.needs)} for e in registry]
        for kind, registry in REGISTRIES.items()
    }
    listed["recipes"] = [recipe.model_dump(mode="json") for recipe in recipes()]
    listed["profiles"] = PROFILES.split(", ")
    return listed
