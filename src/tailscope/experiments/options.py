"""The options that several verbs have, each stated once: its type, default and help, for Python and the command line.

A type that is named beside `typer.Option` is the one that a command line has, where Python takes more.
"""

import inspect
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ForwardRef, ParamSpec, TypeAlias, TypeVar, get_args

from rich.console import Console
from typer import Argument, Option
from typer.models import ParameterInfo

from tailscope import paper
from tailscope.errors import UserError

if TYPE_CHECKING:
    from tailscope.data.sources import ImageData
    from tailscope.experiments.runs import Settings

Data: TypeAlias = Annotated[
    "str | Path | ImageData",
    Option(help="digits, cifar10, cifar100, PATH.npz, folder:PATH, list:TRAIN.txt,TEST.txt or hf:NAME."),
    str,
]
DataRoot: TypeAlias = Annotated[
    Path | str | None,
    Option(help="Folder of the data set: torchvision's layout, NAME.npz, or images of lists."),
    Path | None,
]
Profile: TypeAlias = Annotated[
    str, Option(help="Training counts: exp:IF, step:IF, balanced, balanced:N, full, counts:N,N,... or FILE.json.")
]
Protocol: TypeAlias = Annotated[
    str, Option(help="Rule that draws the subset: nested, or ldam (the published CIFAR-LT draws).")
]
Seeds: TypeAlias = Annotated[
    int | str | Sequence[int], Option(help="N for the seeds 0 ... N-1, or a list like 0,3."), str
]
Out: TypeAlias = Annotated[Path | str | None, Option(help="Folder for results."), Path | None]
StoreRoot: TypeAlias = Annotated[
    Path | str | None,
    Option("--store", envvar="TAILSCOPE_STORE", help="Folder of trained stages. [default: OUT/store]"),
    Path | None,
]
Device: TypeAlias = Annotated[str, Option(help="auto, cpu or cuda.")]
Engine: TypeAlias = Annotated[
    str, Option(help="What computes training steps: eager, fused, compiled, or auto, the fastest here.")
]
Logger: TypeAlias = Annotated[
    str | None,
    Option(help="csv, tensorboard or wandb (offline): also write losses and accuracies to OUT/logs."),
]
Overwrite: TypeAlias = Annotated[bool, Option("--overwrite", help="Replace a result of another spec in OUT.")]
Permutations: TypeAlias = Annotated[int, Option(min=0, help="Permutations of each test; 0 leaves the tests out.")]

MODEL = Option(help="timm:NAME, torchvision:NAME, resnet32 and its like, store:KEY, or your own module:factory.")
IMAGES = Option(help="digits, cifar10, cifar100, PATH.npz, folder:PATH, list:FILES or hf:NAME.")

NEGATED = object()
"""Beside `typer.Option`: the flag means the opposite of its parameter, as `--no-verdict` does of `verdict`."""


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Where a network's weights come from, which images of a data set it gets, and what it sees of them."""

    checkpoint: Annotated[
        Path | str | None,
        Option(help="Local weights: .safetensors or PyTorch's, wherever in the file the network lies."),
        Path | None,
    ] = None
    checkpoint_key: Annotated[
        str | None, Option(help="Which of the checkpoint's networks, such as ema, where several fit.")
    ] = None
    pretrained: Annotated[bool, Option("--pretrained", help="Published weights of timm or torchvision.")] = False
    subset: Annotated[
        Path | str | None, Option(help="A subset.json: only those images, in its order."), Path | None
    ] = None
    store: Annotated[
        Path | str | None,
        Option(envvar="TAILSCOPE_STORE", help="Folder of trained stages, for store:KEY."),
        Path | None,
    ] = None
    data_root: DataRoot = None
    normalize: Annotated[str | None, Option(help="imagenet, cifar, data, none or MEANS/DEVIATIONS.")] = None
    image_size: Annotated[int | None, Option(min=1, help="Height and width of the input.")] = None
    resize: Annotated[
        int | str | None,
        Option(help="Pixels of the shorter side before the centre is cropped, or none for no resizing."),
        str | None,
    ] = None

    def __post_init__(self) -> None:
        """Make paths of text, which Python may give."""
        for name in ("checkpoint", "subset", "store", "data_root"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(given))


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How images are taken to a network."""

    skip_unreadable: Annotated[
        bool, Option("--skip-unreadable", help="Leave out images that cannot be read, with a count.")
    ] = False
    batch: Annotated[int, Option(min=1, help="Images at a time.")] = 64
    workers: Annotated[int | None, Option(min=0, help="Processes that decode images.")] = None


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How images in files are worked on; for images in memory everything stays at its default."""

    devices: Annotated[
        int | None, Option(min=1, help="Images in files: processes on this machine, one GPU each. [default: 1]")
    ] = None
    num_nodes: Annotated[int, Option(min=1, help="Images in files: machines.")] = 1
    micro_batches: Annotated[
        int | None,
        Option(min=1, help="Images in files: parts of a batch with statistics of their own. [default: processes]"),
    ] = None
    workers: Annotated[int | None, Option(min=0, help="Images in files: decoding processes for each process.")] = None
    verify: Annotated[
        bool, Option("--verify", help="Images in files: end with a list of all that cannot be read, if any.")
    ] = False

    @property
    def on_files(self) -> "FileOptions":
        """These options alone."""
        return FileOptions(**{option.name: getattr(self, option.name) for option in fields(FileOptions)})


@dataclass(frozen=True, kw_only=True)
class Placing:
    """Where the stages of a sweep are made, and how many at a time."""

    jobs: Annotated[
        int | None,
        Option(
            min=1,
            help="Stages that are made at a time: by processes, on a GPU and under a time limit by threads."
            " [default: 1; Ray: all fit]",
        ),
    ] = None
    on: Annotated[
        str | None,
        Option(help="ray: make stages on the Ray cluster of $RAY_ADDRESS, else here; or ray://HOST:PORT."),
    ] = None
    cpus: Annotated[float | None, Option(min=0, help="With --on: cores for each stage. [default: 1]")] = None
    gpus: Annotated[
        float | None,
        Option(min=0, help="With --on: GPUs for each stage, such as 0.25. [default: 1 where the cluster has some]"),
    ] = None

    @property
    def elsewhere(self) -> bool:
        """Whether stages are made ahead, in other processes or by threads."""
        return self.on is not None or (self.jobs or 1) > 1

    def own_device(self, device: str) -> str:
        """Return the device of this process: one that only recalls what a cluster makes may have no GPU."""
        return "auto" if self.on is not None and device.startswith("cuda") else device

    def check_place(self) -> None:
        """Refuse options that do not go together, with a `UserError`."""
        if self.on is not None and self.on != "ray" and not self.on.startswith("ray://"):
            raise UserError(f"--on {self.on}: expected ray, or ray://HOST:PORT")
        for name in ("cpus", "gpus"):
            if self.on is None and getattr(self, name) is not None:
                raise UserError(f"--{name}: only with --on ray")
        processes = (getattr(self, "devices", None) or 1) * getattr(self, "num_nodes", 1)
        if self.elsewhere and max(processes, int(os.environ.get("WORLD_SIZE") or 1)) > 1:  # torchrun sets that
            raise UserError(
                "--devices: several processes for one training, and --jobs or --on many trainings; take one"
            )


@dataclass(frozen=True, kw_only=True)
class _Work(FileOptions, Placing):
    """Where work is done, and where it is shown."""

    store: StoreRoot = None
    device: Device = "auto"
    engine: Engine = "auto"
    overwrite: Overwrite = False
    logger: Logger = None
    console: Console | None = None
    """Where progress and notes are shown, if anywhere."""


@dataclass(frozen=True, kw_only=True)
class _Training:
    """What is trained, on what."""

    data: Data = field(kw_only=False)
    profile: Profile = "exp:100"
    out: Out = None
    recipe: Annotated[str, Option(help="demo, fast, paper, imagenet ...; see `tailscope methods`.")] = "fast"
    model: Annotated[str | None, Option(help="Another network than the recipe's; see `tailscope methods`.")] = None
    loss: Annotated[str | None, Option(help="Another loss of stage 1 than the recipe's, such as 'focal(gamma=1)'.")] = (
        None
    )
    last_layer: Annotated[
        str | None, Option(help="Another last layer of stage 1 than the recipe's, such as 'cosine(scale=16)'.")
    ] = None
    weights: Annotated[
        str | None, Option(help="Class weights in stage 1's loss, such as 'drw(start=0.8)'. [default: none]")
    ] = None
    sampler: Annotated[
        str | None, Option(help="Another sampler of stage 1 than the recipe's, such as class_balanced.")
    ] = None
    mix: Annotated[
        str | None,
        Option(help="What mixes every backbone's batches, such as 'mixup(alpha=0.2)'. [default: nothing]"),
    ] = None
    pretrain: Annotated[
        str | None,
        Option(help="What backbones learn from the images without labels before stage 1, such as rotation."),
    ] = None
    augment: Annotated[
        Sequence[str] | None,
        Option(help="Another augmentation than the recipe's, in both stages; repeat for several in order, or none."),
        list[str] | None,
    ] = None
    schedule: Annotated[
        str | None, Option(help="Another schedule of stage 1's learning rate than the recipe's, such as cosine.")
    ] = None
    stage2_loss: Annotated[
        str | None, Option(help="Another loss of stage 2 than the recipe's, such as balanced_softmax.")
    ] = None
    stage2_sampler: Annotated[
        str | None, Option(help="Another sampler of stage 2 than the recipe's, such as class_balanced.")
    ] = None
    seeds: Seeds = 3
    protocol: Protocol = "nested"
    subset_seed: Annotated[int | None, Option(help="One subset for all seeds; by default each seed draws its own.")] = (
        None
    )
    matched: Annotated[
        bool, Option("--matched", help="Add a third level: class-balanced with as many images as the long-tailed set.")
    ] = False
    backbones: Annotated[
        str | None,
        Option(help="Backbones to train, such as lt; without both lt and true nothing is attributed. [default: all]"),
    ] = None
    bn_mode: Annotated[
        str,
        Option(help="Batch-norm statistics in stage 2: frozen, or shifted (re-estimated on its data, as in MiSLAS)."),
    ] = "frozen"
    permutations: Permutations = 999
    data_root: DataRoot = None


@dataclass(frozen=True, kw_only=True)
class Request(_Work, _Training):
    """The options of an experiment, as given."""


Rate: TypeAlias = Annotated[
    str | None,
    Option(help="With --plan: images a second that a GPU trains, or a file of what --plan --json prints on one."),
]


@dataclass(frozen=True, kw_only=True)
class Planning(Request):
    """The options of an experiment that may only be planned, as given."""

    plan: Annotated[
        bool,
        Option("--plan", help="Only say what would be trained, and of images in files how long and how much disk."),
    ] = False
    rate: Rate = None

    def __post_init__(self) -> None:
        """Refuse a rate without a plan."""
        if self.rate is not None and not self.plan:
            raise UserError("--rate: only with --plan")


@dataclass(frozen=True, kw_only=True)
class Comparison(Request):
    """The options of `compare`, as given."""

    methods: Annotated[
        str,
        Option(
            help="Methods, the baseline first, separated by `;`: 'ce; crt; tau(tau=0.7); mixup + crt'; see `tailscope"
            " methods`. Any loss, sampler, mixing, augmentation or classifier is one too."
        ),
    ] = "ce; la; tau; crt; lws; balanced_softmax"
    tune: Annotated[
        str,
        Option(
            help="none: the values as written, or published; cut: chosen on a tenth of each class's training images."
        ),
    ] = "none"
    gaps: Annotated[
        str,
        Option(
            help="all: what methods do to both gaps; bounds: the same without a backbone trained on the full set, the"
            " representation gap only against the baseline's; none: accuracies alone."
        ),
    ] = "all"
    plan: Annotated[bool, Option("--plan", help="Only say what would be trained, and what is stored already.")] = False


@dataclass(frozen=True, kw_only=True)
class Memorization(Request):
    """The options of `memorization`, as given."""

    seeds: Seeds = 1
    trainings: Annotated[int, Option(min=2, help="Networks for each seed, each trained on a random part.")] = 20
    share: Annotated[float, Option(help="Share of the long-tailed set that each of them is trained on.")] = 0.7
    plan: Annotated[bool, Option("--plan", help="Only say what would be trained, and what is stored already.")] = False


@dataclass(frozen=True, kw_only=True)
class _OfThePaper:
    """What of the paper is reproduced."""

    what: Annotated[
        str, Argument(metavar="WHAT", help="table1, fig2, fig3, ... fig8, all, or everything: both CIFAR data sets.")
    ] = field(kw_only=False)
    dataset: Annotated[str, Option(help="cifar10-lt, cifar100-lt or imagenet-lt.")] = field(
        default="cifar10-lt", kw_only=False
    )
    out: Annotated[Path, Option(help="Folder for results.")] = field(default=Path("reproduction"), kw_only=False)
    seeds: Seeds = 3
    quick: Annotated[
        bool, Option("--quick", help="A shortened run, recipe fast or imagenet-fast: no reproduction.")
    ] = False
    plan: Annotated[bool, Option("--plan", help="Only say what would be trained and how long it would take.")] = False
    rate: Rate = None
    time_limit: Annotated[
        str | None,
        Option(help="Stop in time, such as 9m or 1h30m, one finished piece after the other; the same command goes on."),
    ] = None
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
class Reproduction(_Work, _OfThePaper):
    """The options of `reproduce`, as given."""

    @property
    def queued(self) -> bool:
        """Whether the work is done piece by piece, under a time limit or on all data sets."""
        return self.time_limit is not None or self.what == "everything"

    def check(self) -> None:
        """Refuse options that do not go together, with a `UserError`."""
        self.check_place()
        if self.queued and (self.data is not None or self.dataset == "imagenet-lt"):
            raise UserError(
                "--time-limit: only for the CIFAR data sets; a training on files goes on where it was stopped"
            )
        alone = {"--wait-for-data": self.wait_for_data, "--bundle": self.bundle is not None}
        for option in [] if self.queued else [option for option, given in alone.items() if given]:
            raise UserError(f"{option}: only with --time-limit or `everything`")
        if self.wait_for_data and self.data_root is None:
            raise UserError(
                "--wait-for-data: give --data-root, the folder where cifar10.npz or cifar100.npz will appear"
            )
        if self.rate is not None and not (self.plan and paper.benchmark(self.dataset).in_files):
            raise UserError("--rate: only with --plan, of images in files")
        if self.queued and self.on_files != FileOptions():
            raise UserError("--devices, --num-nodes, --micro-batches, --workers and --verify: are for images in files")
        if self.queued and self.plan:
            raise UserError("--plan: leave out --time-limit, and take `all` of one data set instead of `everything`")

    def open(self) -> "ImageData":
        """Return the data set; `UserError` where imagenet-lt comes without `data`, or another with it.

        A plan of imagenet-lt needs no `data`: how many images there are is known.
        """
        from tailscope.data.made import promised
        from tailscope.data.sources import load

        known = paper.benchmark(self.dataset)
        if known.in_files and self.data is None and self.plan:
            return promised(known.data, paper.IMAGENET_TRAIN, paper.IMAGENET_TEST)
        if known.in_files and self.data is None:
            raise UserError(
                f"--dataset {self.dataset}: give all of ImageNet with --data list:TRAIN.txt,TEST.txt (and"
                " --data-root) or --data folder:DIR"
            )
        if not known.in_files and self.data is not None:
            raise UserError(f"--data {self.data}: only imagenet-lt takes it; --data-root says where {known.data} lies")
        data = load(self.data or known.data, data_root=self.data_root)
        if known.in_files and data.in_memory:
            raise UserError(f"--data {self.data}: imagenet-lt is read from image files; give list: or folder:")
        return replace(data, name=known.data)

    def wanted(self) -> list[str]:
        """Return the needed experiments; `UserError` for unknown figures and backbones that they cannot do without."""
        wanted = paper.experiments(self.what, self.dataset)
        if self.backbones is not None and wanted != ["swap"]:
            raise UserError(f"--backbones {self.backbones}: only table1 and fig2 can do without a backbone")
        return wanted

    def settings(self) -> "Settings":
        """Return the checked part that decides results; `UserError` for an unusable recipe, seed or data set."""
        from tailscope.experiments.runs import Settings, parse_backbones, parse_seeds
        from tailscope.training.recipes import recipe_by_name

        known = paper.benchmark(self.dataset)
        if self.quick and self.recipe not in (None, known.quick):
            raise UserError(f"--quick means --recipe {known.quick}; leave out --recipe {self.recipe} or --quick")
        return Settings(
            profile=known.profile,
            protocol=known.protocol,
            recipe=recipe_by_name(self.recipe or (known.quick if self.quick else known.recipe)),
            seeds=parse_seeds(self.seeds),
            subset_seed=paper.SUBSET_SEED,
            backbones=parse_backbones(self.backbones),
        )


# ---- verbs of functions and requests

P = ParamSpec("P")
Q = TypeVar("Q")
R = TypeVar("R")


def _described(function: Callable[P, R], signature: inspect.Signature) -> Callable[P, R]:
    """Give a function a signature with plain types, and its options' help as the `Args:` of its docstring.

    Its `__annotations__` have the options as the command line needs them.
    """

    def plain(annotation: Any) -> Any:
        origin = get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation
        return origin.__forward_arg__ if isinstance(origin, ForwardRef) else origin

    parameters = signature.parameters.values()
    function.__annotations__ = {p.name: p.annotation for p in parameters}
    shown = signature.replace(parameters=[p.replace(annotation=plain(p.annotation)) for p in parameters])
    function.__signature__ = shown  # type: ignore[attr-defined]
    lines = []
    for p in parameters:
        said = get_args(p.annotation)
        helps = [one.help for one in said if isinstance(one, ParameterInfo)]
        lines += [f"    {p.name}: {'False: ' if NEGATED in said else ''}{text}" for text in helps]
    function.__doc__ = "\n".join([inspect.getdoc(function) or "", *(["", "Args:", *lines] if lines else [])])
    return function


def verb(function: Callable[P, R]) -> Callable[P, R]:
    """Make a verb of a function whose annotations are its options."""
    return _described(function, inspect.signature(function))


def taking(request: Callable[P, Q], *, leave_out: Collection[str] = ()) -> Callable[[Callable[[Q], R]], Callable[P, R]]:
    """Make a verb of a function of a request: its options are the fields of the request, apart from some."""
    whole = inspect.signature(request)
    taken = [p for p in whole.parameters.values() if p.name not in leave_out]

    def decorate(function: Callable[[Q], R]) -> Callable[P, R]:
        signature = whole.replace(parameters=taken, return_annotation=inspect.signature(function).return_annotation)

        @wraps(function)
        def made(*args: P.args, **kwargs: P.kwargs) -> R:
            signature.bind(*args, **kwargs)
            return function(request(*args, **kwargs))

        del made.__wrapped__  # the signature is the verb's own
        return _described(made, signature)

    return decorate
