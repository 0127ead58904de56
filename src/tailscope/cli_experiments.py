"""The verbs of the experiments: `demo`, `swap`, `ladder`, `geometry`, and the `subset` that they train on."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tailscope.cli_options import (
    Backbones,
    BatchNorm,
    Data,
    DataRoot,
    Device,
    Devices,
    Engine,
    Json,
    LossName,
    Matched,
    MicroBatches,
    ModelName,
    NumNodes,
    Out,
    Overwrite,
    Permutations,
    Profile,
    Protocol,
    RecipeName,
    Seeds,
    StoreRoot,
    SubsetSeed,
    Verify,
    Workers,
)
from tailscope.cli_output import console_beside, print_json


def demo(
    out: Out = Path("demo"),
    seeds: Seeds = "3",
    store: StoreRoot = None,
    device: Device = "auto",
    engine: Engine = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Tell the whole story on scikit-learn's digits in about two minutes.

    Subset, swap, ladder, geometry and report at imbalance factor 100, with the recipe `demo`.

    Example: `tailscope demo --out demo`, then open `demo/report.html`.
    """
    from tailscope import verbs

    request = verbs.Request(
        "digits", "exp:100", "demo", seeds, out, store=store, device=device, engine=engine, overwrite=overwrite
    )
    _show(verbs.experiments(request, ["subset", "swap", "ladder", "geometry"], console_beside(as_json)), out, as_json)


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
    engine: Engine = "auto",
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
    engine: Engine = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """See how far augmentation and class-balanced retraining close the gap (Figure 3).

    Example: `tailscope ladder --data digits --recipe demo --out out` (re-uses what `swap` trained there).
    """
    _experiment("ladder", **locals())


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
    engine: Engine = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure what long-tailed training does to each class in feature space (Figures 4 to 8).

    Example: `tailscope geometry --data digits --recipe demo --out out` (re-uses what `swap` trained there).
    """
    _experiment("geometry", **locals())


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
        print_json(result)
    else:
        verbs.show_subset(result, out, Console())


def _experiment(verb: str, *, as_json: bool, out: Path, **options: Any) -> None:
    """Run one experiment and its report, and show the end of the story."""
    from tailscope import verbs
    from tailscope.experiments.workplace import FileOptions

    on_files = {name: options.pop(name) for name in FileOptions.__dataclass_fields__}
    request = verbs.Request(out=out, files=FileOptions(**on_files), **options)
    _show(verbs.experiments(request, [verb], console_beside(as_json)), out, as_json)


def _show(results: dict[str, dict[str, Any]], out: Path, as_json: bool) -> None:
    from tailscope import verbs

    if as_json:
        print_json(next(iter(results.values())) if len(results) == 1 else results)
    else:
        verbs.show_story(out, Console())
