"""swap: the whole 2x2 for one seed on a tenth of CIFAR-10, against four decoupled trainings one after the other."""

from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.measure import Arm, Slice, Spread, Worker, fastest, paired, start
from benchmarks.record import Options, Record, Row, joined

EPOCHS = 10  # of stage 2; as many views, so that both protocols are the same
STAGE2_BATCH = 512


@dataclass(frozen=True)
class Size:
    """The protocol, and how long the slices are that take turns."""

    train_images: int
    test_images: int
    steps: int
    batch: int
    model: str
    views: int
    profile: str
    our_seconds: float
    rival_seconds: float
    workers: tuple[int, ...]


SIZES = {
    "full": Size(5_000, 1_000, 600, 128, "resnet32", EPOCHS, "exp:100", 40.0, 6.0, (0, 2)),
    "quick": Size(500, 100, 16, 128, "resnet32", EPOCHS, "exp:100", 8.0, 1.5, (0,)),
    "tiny": Size(60, 20, 4, 16, "resnet8(width=8)", EPOCHS, "exp:2", 0.0, 0.0, (0,)),
}


def run(options: Options) -> Record:
    """Run our swap in slices between which the rival's two stages are measured."""
    size = SIZES[options.size]
    record = Record("swap", options)
    stage1 = _best("benchmarks.arms.rivals:textbook", size, size.batch, options)
    stage2 = _best("benchmarks.arms.rivals:textbook_classifier", size, min(STAGE2_BATCH, size.train_images), options)
    with ExitStack() as stack:
        workers = start({"ours": _ours(size, options), **stage1, **stage2}, stack, inline=options.inline)
        infos = [worker.wait_until_ready() for worker in workers.values()]
        rivals = list(workers.values())[1:]
        for rival in rivals:
            rival.warm_up()
        mine, theirs = _take_turns(workers["ours"], rivals, size)
    record.rows = _rows(mine, theirs, infos[0], list(workers)[1:], size, options)
    record.raw = {
        "ours_seconds": [s.seconds for s in mine],
        "rival_seconds_per_image": [[s.per_item for s in slices] for slices in theirs],
        "images": infos[0],
    }
    return record


def _ours(size: Size, options: Options) -> Arm:
    settings = {
        "data": options.data, "train_images": size.train_images, "test_images": size.test_images, "steps": size.steps,
        "batch": size.batch, "model": size.model, "views": size.views, "profile": size.profile,
        "device": options.device,
    }  # fmt: skip
    return Arm("benchmarks.arms.ours:swap_once", settings)


def _best(target: str, size: Size, batch: int, options: Options) -> dict[str, Arm]:
    """Return one of the rival's loops with the better number of workers."""
    shared = {
        "data": options.data, "images": size.train_images, "batch": batch, "model": size.model, "device": options.device
    }  # fmt: skip
    stage = "stage 2" if target.endswith("classifier") else "stage 1"
    arms = {
        f"{stage}: {w} workers": Arm(target, {**shared, "workers": w}, settle=4 if w else 0, warm_up=2)
        for w in size.workers
    }
    best = fastest(arms, seconds=size.rival_seconds / 2, inline=options.inline)
    return {best: arms[best]}


def _take_turns(ours: Worker, rivals: list[Worker], size: Size) -> tuple[list[Slice], list[list[Slice]]]:
    """Alternate until our swap has ended."""
    mine: list[Slice] = []
    theirs: list[list[Slice]] = [[] for _ in rivals]
    while not mine or mine[-1].result is None:
        mine.append(ours.run(size.our_seconds))
        for slices, rival in zip(theirs, rivals, strict=True):
            slices.append(rival.run(size.rival_seconds))
    return mine, theirs


def images_trained(images: int, steps: int, batch: int) -> int:
    """Return how many images `steps` batches of an epoch-wise loop see; each epoch's last batch is short.

    >>> images_trained(100, 4, 64)
    200
    """
    per_epoch = -(-images // batch)
    epochs, rest = divmod(steps, per_epoch)
    return epochs * images + min(rest * batch, images)


def _rows(
    mine: list[Slice], theirs: list[list[Slice]], info: dict[str, int], names: list[str], size: Size, options: Options
) -> list[Row]:
    total = sum(s.seconds for s in mine)
    sizes = info["lt_images"], info["true_images"]
    # Four trainings: each backbone twice, once for either classifier.
    stage1_images = 2 * sum(images_trained(n, size.steps, size.batch) for n in sizes)
    stage2_images = 2 * EPOCHS * sum(sizes)
    rival = [a.per_item * stage1_images + b.per_item * stage2_images for a, b in zip(*theirs, strict=True)]
    seen = [sum(s.items for s in slices) for slices in theirs]
    trainings = (mine[-1].result or {})["trainings"]
    return [
        Row(
            "tailscope: two backbones, four classifiers on shared views, evaluation",
            Spread.of([total]),
            "s",
            note=joined(
                [
                    f"{size.steps} steps a backbone, |lt| = {sizes[0]:,}, |true| = {sizes[1]:,}, {size.views} views",
                    f"{trainings} trainings in all",
                    options.images_note,
                ]
            ),
        ),
        Row(
            "four decoupled trainings through the textbook loop",
            Spread.of(rival),
            "s",
            paired(rival, [total] * len(rival)),
            "this / ours",
            5.0,
            note=joined(
                [
                    f"measured on {seen[0]:,} of {stage1_images:,} images of stage 1"
                    f" and {seen[1]:,} of {stage2_images:,} of stage 2, in turns with ours",
                    ", ".join(names),
                    "its evaluation is not counted",
                    options.images_note,
                ]
            ),
        ),
    ]
