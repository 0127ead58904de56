"""The verbs in Python: what `tailscope VERB` does is the function of that name, and its parameters are the options.

Each returns what the command line prints with `--json`. Results are written where `out` names a folder. `console` shows
progress and notes; without one a verb is silent. PyTorch takes seconds to import, so it waits until a verb is called.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ForwardRef, ParamSpec, TypeVar, get_args

from rich.console import Console
from typer import Argument, Option
from typer.models import ParameterInfo

from tailscope.errors import UserError
from tailscope.experiments.options import (
    NEGATED,
    Data,
    DataRoot,
    Device,
    Out,
    Overwrite,
    Permutations,
    Profile,
    Protocol,
    Request,
)
from tailscope.methods import AUGMENTATIONS, LOSSES, MIXINGS, PHOTO_AUGMENTATIONS, SAMPLERS
from tailscope.networks import MODELS
from tailscope.progress import shown_on
from tailscope.registry import Registry
from tailscope.training import SCHEDULES

if TYPE_CHECKING:
    from tailscope.data.sources import ImageData
    from tailscope.encoders import FeaturesResult
    from tailscope.report.objects import Diagnosis, Result
    from tailscope.tables.table import LinearLayer, Source

__all__ = ["demo", "diagnose", "features", "geometry", "ladder", "load", "methods", "report", "subset", "swap"]
REGISTRIES: dict[str, Registry[Any]] = {
    "models": MODELS,
    "losses": LOSSES,
    "samplers": SAMPLERS,
    "augmentations": AUGMENTATIONS,
    "augmentations of photographs in files": PHOTO_AUGMENTATIONS,
    "mixings": MIXINGS,
    "schedules": SCHEDULES,
}
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


def _verb(function: Callable[P, R]) -> Callable[P, R]:
    """Make a verb of a function whose annotations are its options."""
    return _described(function, inspect.signature(function))


def taking(request: Callable[P, Q], *, leave_out: Collection[str] = ()) -> Callable[[Callable[[Q], R]], Callable[P, R]]:
    """Make a verb of a function of a request: its options are the fields of the request, apart from some."""
    whole = inspect.signature(request)
    taken = [p for p in whole.parameters.values() if p.name not in leave_out]

    def decorate(function: Callable[[Q], R]) -> Callable[P, R]:
        signature = whole.replace(parameters=taken, return_annotation=inspect.signature(function).return_annotation)

        @wraps(function)
        def verb(*args: P.args, **kwargs: P.kwargs) -> R:
            signature.bind(*args, **kwargs)
            return function(request(*args, **kwargs))

        del verb.__wrapped__  # the signature is the verb's own
        return _described(verb, signature)

    return decorate


def load(source: str, *, data_root: Path | None = None) -> "ImageData":
    """Load a data set that an experiment can train on: what `--data` takes; `UserError` where it is not usable."""
    from tailscope.data import sources

    return sources.load(source, data_root=data_root)


# -- experiments ----------------------------------------------------------------------------------------------------


@taking(Request, leave_out={"permutations"})
def swap(request: Request) -> "Result":
    """Swap the data set between the two stages and divide the gap (Table 1, Figure 2).

    Trains a backbone on the long-tailed (lt) and one on the full (true) training set, and two classifiers on each.

    Examples: `tailscope swap --data digits --recipe demo --out out`;
    `tailscope swap --data cifar10 --data-root DIR --profile exp:100 --protocol ldam --recipe paper`;
    `tailscope swap --data list:TRAIN.txt,TEST.txt --data-root DIR --profile FILE.json --recipe imagenet --devices 4`
    """
    return _experiments(request, "swap")["swap"]


@taking(Request, leave_out={"matched", "backbones", "permutations"})
def ladder(request: Request) -> "Result":
    """See how far augmentation and class-balanced retraining close the gap (Figure 3).

    Example: `tailscope ladder --data digits --recipe demo --out out` (re-uses what `swap` trained there).
    """
    return _experiments(request, "ladder")["ladder"]


@taking(Request, leave_out={"matched", "backbones", "bn_mode"})
def geometry(request: Request) -> "Result":
    """Measure what long-tailed training does to each class in feature space (Figures 4 to 8).

    Example: `tailscope geometry --data digits --recipe demo --out out` (re-uses what `swap` trained there).
    """
    return _experiments(request, "geometry")["geometry"]


_DEMO = {"out", "seeds", "store", "device", "engine", "overwrite", "console"}


@taking(partial(Request, "digits", recipe="demo"), leave_out={option.name for option in fields(Request)} - _DEMO)
def demo(request: Request) -> "dict[str, Result]":
    """Tell the whole story on scikit-learn's digits in about two minutes.

    Subset, swap, ladder, geometry and report at imbalance factor 100, with the recipe `demo`.

    Example: `tailscope demo --out demo`, then open `demo/report.html`.
    """
    return _experiments(request, "subset", "swap", "ladder", "geometry")


def _experiments(request: Request, *verbs: str) -> "dict[str, Result]":
    """Run experiments, and build their report where they are written."""
    from tailscope.experiments.plans import run
    from tailscope.report.objects import Result

    results = run(request, verbs)
    if request.out is not None:
        report(request.out)
    return {verb: Result(result) for verb, result in results.items()}


@_verb
def subset(
    data: Data,
    profile: Profile = "exp:100",
    protocol: Protocol = "nested",
    seed: Annotated[int, Option(help="Seed of the draw.")] = 0,
    out: Annotated[Path | None, Option(help="Folder for subset.json; without it the subset is only shown.")] = None,
    data_root: DataRoot = None,
    overwrite: Overwrite = False,
) -> dict[str, Any]:
    """Build and show a long-tailed subset; write its indices to OUT/subset.json.

    Example: `tailscope subset --data cifar10 --data-root DIR --profile exp:100 --protocol ldam --seed 0 --out out`
    """
    from tailscope.data.sources import load
    from tailscope.experiments.plans import describe_subset
    from tailscope.results import check_free, write
    from tailscope.store import make_folder

    result = describe_subset(load(data, data_root=data_root), profile, protocol, seed)
    if out is not None:
        check_free(make_folder(out, "--out"), "subset", result["spec"], overwrite=overwrite)
        write(out, "subset", result)
    return result


# -- features that the user brings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _EncoderAndImages:
    """The network and the images, as given."""

    model: Annotated[
        str, Option(help="timm:NAME, torchvision:NAME, resnet32 and its like, store:KEY, or your own module:factory.")
    ]
    data: Annotated[str, Option(help="digits, cifar10, cifar100, PATH.npz, folder:PATH, list:FILES or hf:NAME.")]
    out: Annotated[Path, Option(help="Feature file to write: .npz, .safetensors or .parquet.")]
    checkpoint: Annotated[
        Path | None, Option(help="Local weights: .safetensors or PyTorch's, wherever in the file the network lies.")
    ] = None
    checkpoint_key: Annotated[
        str | None, Option(help="Which of the checkpoint's networks, such as ema, where several fit.")
    ] = None
    pretrained: Annotated[bool, Option("--pretrained", help="Published weights of timm or torchvision.")] = False
    split: Annotated[str | None, Option(help="Split of the data; needed where there are several.")] = None
    subset: Annotated[Path | None, Option(help="A subset.json: only those images, in its order.")] = None
    part: Annotated[
        str | None,
        Option(help="Of the training split: train, the images of --subset or of store:KEY's training; or unseen."),
    ] = None
    store: Annotated[Path | None, Option(envvar="TAILSCOPE_STORE", help="Folder of trained stages, for store:KEY.")] = (
        None
    )
    data_root: DataRoot = None
    normalize: Annotated[str | None, Option(help="imagenet, cifar, data, none or MEANS/DEVIATIONS.")] = None
    image_size: Annotated[int | None, Option(min=1, help="Height and width of the input.")] = None
    resize: Annotated[
        str | None, Option(help="Pixels of the shorter side before the centre is cropped, or none for no resizing.")
    ] = None
    verify: Annotated[bool, Option("--verify", help="Decode every image first and report all that cannot be read.")] = (
        False
    )


@dataclass(frozen=True)
class _FeaturesRequest(_EncoderAndImages):
    """The options of `features`, as given."""

    skip_unreadable: Annotated[
        bool, Option("--skip-unreadable", help="Leave out images that cannot be read, with a count.")
    ] = False
    mixed: Annotated[bool, Option("--mixed", help="bfloat16 where the device has it; geometry wants fp32.")] = False
    half: Annotated[bool, Option("--half", help="Store float16: half the size, three significant digits.")] = False
    batch: Annotated[int, Option(min=1, help="Images at a time.")] = 64
    workers: Annotated[int | None, Option(min=0, help="Processes that decode images.")] = None
    device: Device = "auto"
    overwrite: Overwrite = False
    console: Console | None = None


@taking(_FeaturesRequest)
def features(request: _FeaturesRequest) -> "FeaturesResult":
    """Extract features with any encoder from any images. Interrupted, the same command continues.

    A checkpoint's classifier is written beside the features, for `diagnose --classifier`.

    Examples: `tailscope features --model timm:resnet50 --checkpoint w.pth --data folder:photos --out f.npz`;
    `tailscope features --model resnet32 --checkpoint ldam.pth.tar --data cifar10 --split test --out unseen.npz`;
    `tailscope features --model store:892e --store out/store --data cifar10 --split train --part unseen --out u.npz`
    """
    from tailscope.device import Runtime
    from tailscope.encoders.extract import Options, run_features

    options = Options(
        precision="auto" if request.mixed else "fp32",
        stored="float16" if request.half else "float32",
        batch=request.batch,
        workers=request.workers,
        skip_unreadable=request.skip_unreadable,
    )
    given = {one.name: getattr(request, one.name) for one in fields(_EncoderAndImages)}
    with shown_on(request.console) as progress:
        runtime = Runtime.choose(request.device, progress=progress)
        return run_features(**given, overwrite=request.overwrite, options=options, runtime=runtime)


@_verb
def diagnose(
    train: Annotated[
        "Source | Sequence[Source]",
        Option(
            help="Features of training samples: .npz, .npy, .pt, .safetensors, .parquet, .csv. Repeat for more"
            " encoders."
        ),
        list[Path],
    ],
    unseen: Annotated[
        "Source | Sequence[Source]",
        Option(help="Features of samples that had no part in training, one per --train."),
        list[Path],
    ],
    *,
    test: Annotated[
        "Source | Sequence[Source] | None",
        Option(help="Features that only score; without them, the unseen ones do, cross-fitted."),
        list[Path] | None,
    ] = None,
    classifier: Annotated[
        "LinearLayer | Path | str | Sequence[Path | str] | None",
        Option(help="The linear classifier in use: weight [C, d], bias [C]. [default: one fitted to --train]"),
        list[Path] | None,
    ] = None,
    out: Out = None,
    ceiling: Annotated[float, Option(help="The accuracy that would be perfect, where labels allow no more.")] = 1.0,
    ceiling_from: Annotated[
        Path | None, Option(help="diagnosis.json of another encoder of the same images: its bound is the ceiling.")
    ] = None,
    bound_at: Annotated[
        int | None,
        Option(min=1, help="Samples of every class for the classifier bound. [default: as the most frequent one has]"),
    ] = None,
    permutations: Permutations = 999,
    alpha: Annotated[float, Option(help="False discovery rate at which classes are flagged.")] = 0.05,
    verdict: Annotated[bool, Option("--no-verdict", help="Measure only; fit no classifiers."), NEGATED] = True,
    report: Annotated[bool, Option("--no-report", help="Write diagnosis.json only."), NEGATED] = True,
    drop_duplicates: Annotated[
        bool, Option("--drop-duplicates", help="Leave out unseen samples that are also training samples.")
    ] = False,
    seed: Annotated[int, Option(min=0, help="Seed of permutations and folds.")] = 0,
    device: Annotated[str, Option(help="auto, cpu or cuda, for the geometry; classifiers fit on the CPU.")] = "cpu",
    overwrite: Overwrite = False,
    console: Console | None = None,
) -> "Diagnosis":
    """Say what holds back a classifier on features that you already have: a verdict with error bars, and advice.

    Writes diagnosis.json and report.html. Feature files hold `features` [N, d] and `labels` [N] (numbers or names), and
    may hold `class_names`, `ids` (find duplicates, pair encoders) and `groups` (related samples, permuted together).

    Examples: `tailscope diagnose --train train.npz --unseen held-out.npz --out out`;
    `tailscope diagnose --train a.npz --unseen a-u.npz --train b.npz --unseen b-u.npz --out compared`
    """
    from tailscope.device import Runtime
    from tailscope.diagnosis.diagnose import DiagnosisSettings, OtherBound, prepare, run, spec
    from tailscope.report import build
    from tailscope.report.objects import Diagnosis
    from tailscope.results import check_free, write
    from tailscope.store import make_folder

    settings = DiagnosisSettings(ceiling, permutations, alpha, verdict, drop_duplicates, seed, bound_at)
    runtime = Runtime.choose(device, keep_memory=False)
    inputs = prepare(train, unseen, test, classifier, settings)
    if ceiling_from is not None:
        other = OtherBound.of(Path(ceiling_from), next(iter(inputs.values())), bound_at)
        settings = replace(settings, ceiling_from=other)
    if out is not None:
        check_free(make_folder(out, "--out"), "diagnosis", spec(inputs, settings), overwrite=overwrite)
    with shown_on(console) as progress:
        result = Diagnosis(run(inputs, settings, replace(runtime, progress=progress)))
    if out is not None:
        check_free(out, "diagnosis", result["spec"], overwrite=overwrite)  # another process may have been faster
        write(out, "diagnosis", result)
        if report:
            try:
                build(out)
            except UserError as error:
                raise UserError(f"{error} - the diagnosis itself is in {out / 'diagnosis.json'}") from None
    return result


# -- the rest -------------------------------------------------------------------------------------------------------


@_verb
def report(
    out: Annotated[Path, Argument(metavar="DIR", help="Folder with result files.")],
    figures: Annotated[bool, Option(help="Also write every chart as SVG, PNG and PDF.")] = True,
) -> Path:
    """Build report.html, figures and tables from the stored results in DIR. Nothing is computed anew.

    Example: `tailscope report out`
    """
    from tailscope.report import build

    return build(out, figures=figures)


@_verb
def methods() -> dict[str, Any]:
    """List every loss, sampler, augmentation, mixing, model, schedule, profile and recipe with its defaults.

    Example: `tailscope methods --json`
    """
    from tailscope.data import PROFILES
    from tailscope.training.recipes import RECIPES

    listed: dict[str, Any] = {
        kind: [{"name": e.name, "defaults": e.defaults, "summary": e.summary} for e in registry]
        for kind, registry in REGISTRIES.items()
    }
    listed["recipes"] = [recipe.model_dump(mode="json") for recipe in RECIPES.values()]
    listed["profiles"] = PROFILES.split(", ")
    return listed
