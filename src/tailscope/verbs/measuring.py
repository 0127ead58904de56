"""The verbs that measure features which a user has, or a network that makes them, and show results."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Argument, Option

from tailscope.classifiers import CLASSIFIERS
from tailscope.effort import parse_size
from tailscope.errors import UserError, one_line, require_file
from tailscope.experiments.options import (
    IMAGES,
    MODEL,
    NEGATED,
    DecodingOptions,
    Device,
    EncoderOptions,
    Logger,
    Out,
    Overwrite,
    Permutations,
    taking,
    verb,
)
from tailscope.progress import Progress, logging_to, shown_on

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader

    from tailscope.diagnosis.diagnose import DiagnosisSettings
    from tailscope.encoders import FeaturesResult
    from tailscope.report.objects import Diagnosis
    from tailscope.tables.table import LinearLayer, LinearSource, Source

REBALANCED = "rebalanced.npz"
"""The file of a diagnosis that holds the classifier that it recommends."""


# -- features that the user brings ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _FeaturesRequest(DecodingOptions, EncoderOptions):
    """The options of `features`, as given."""

    model: Annotated[str, MODEL] = field(kw_only=False)
    data: Annotated[str | Path, IMAGES, str] = field(kw_only=False)
    out: Annotated[
        Path | str,
        Option(
            metavar="PATH",
            help="Feature file to write: .npz, .safetensors or .parquet; or, with a slash at its end, a folder of"
            " Parquet files.",
        ),
        str,
    ] = field(kw_only=False)
    split: Annotated[str | None, Option(help="Split of the data; needed where there are several.")] = None
    part: Annotated[
        str | None,
        Option(help="Of the training split: train, the images of --subset or of store:KEY's training; or unseen."),
    ] = None
    verify: Annotated[bool, Option("--verify", help="Decode every image first and report all that cannot be read.")] = (
        False
    )
    mixed: Annotated[bool, Option("--mixed", help="bfloat16 where the device has it; geometry wants fp32.")] = False
    half: Annotated[bool, Option("--half", help="Store float16: half the size, three significant digits.")] = False
    devices: Annotated[
        int | None,
        Option(min=1, help="Processes on this machine that write a folder, one GPU each. [default: 1]"),
    ] = None
    device: Device = "auto"
    overwrite: Overwrite = False
    console: Console | None = None


@taking(_FeaturesRequest)
def features(request: _FeaturesRequest) -> "FeaturesResult":
    """Extract features with any encoder from any images. Interrupted, the same command continues.

    A folder (`--out f/`) gets Parquet files, which together may be larger than memory. With `--devices N`, or started
    by torchrun, several processes write it, each its part; its rows are the same as with one. A checkpoint's classifier
    is written beside the features, for `diagnose --classifier`.

    Examples: `tailscope features --model timm:resnet50 --checkpoint w.pth --data folder:photos --out f.npz`;
    `tailscope features --model resnet32 --checkpoint ldam.pth.tar --data cifar10 --split test --out unseen.npz`;
    `tailscope features --model store:892e --store out/store --data cifar10 --split train --part unseen --out u.npz`;
    `tailscope features --model timm:resnet50 --pretrained --data folder:photos --out f/ --devices 4`
    """
    from tailscope.device import Runtime, Solo, form
    from tailscope.encoders.extract import Options
    from tailscope.encoders.features import run_features
    from tailscope.encoders.parts import is_folder

    options = Options(
        precision="auto" if request.mixed else "fp32",
        stored="float16" if request.half else "float32",
        **_of(DecodingOptions, request),
    )
    chosen = {name: getattr(request, name) for name in ("model", "split", "part", "verify", "overwrite")}
    chosen |= {"data": str(request.data), "out": Path(request.out), "folder": is_folder(request.out)}
    runtime = Runtime.choose(request.device)
    if not chosen["folder"] and request.devices not in (None, 1):
        raise UserError(f"--devices {request.devices}: several processes write a folder; give --out {request.out}/")
    team = form(request.devices, 1, runtime.device.type) if chosen["folder"] else Solo()
    with shown_on(request.console if team.rank == 0 else None) as progress:
        runtime = replace(runtime, progress=progress, device=team.device or runtime.device)
        found = run_features(**chosen, **_of(EncoderOptions, request), options=options, runtime=runtime, team=team)
    team.leave()
    return found


def _of(options: type, request: Any) -> dict[str, Any]:
    """Return those options of a request."""
    return {one.name: getattr(request, one.name) for one in fields(options)}


def _tell(console: Console | None, text: str) -> None:
    """Show a line, if anything is shown."""
    if console is not None:
        console.print(one_line(text), highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """Features, or a network and images."""

    train: Annotated[
        "Source | Sequence[Source] | DataLoader[Any] | None",
        Option(
            help="Features of training samples: .npz, .npy, .pt, .safetensors, .parquet, .csv. Repeat for more"
            " encoders."
        ),
        list[Path] | None,
    ] = field(default=None, kw_only=False)
    unseen: Annotated[
        "Source | Sequence[Source] | DataLoader[Any] | None",
        Option(
            help="Features of samples that had no part in training, one per --train; beside --model images, as --data."
        ),
        list[Path] | None,
    ] = field(default=None, kw_only=False)
    test: Annotated[
        "Source | Sequence[Source] | DataLoader[Any] | None",
        Option(help="Features, or images, that only score; without them, the unseen ones do, cross-fitted."),
        list[Path] | None,
    ] = None
    classifier: Annotated[
        "LinearSource | Sequence[LinearSource] | None",
        Option(
            help="The linear classifier in use: weight [C, d], bias [C]. [default: the network's own, or one fitted to"
            " --train]"
        ),
        list[Path] | None,
    ] = None
    model: Annotated["nn.Module | str | None", MODEL, str | None] = None
    data: Annotated[str | Path | None, IMAGES, str | None] = None
    holdout: Annotated[
        float | None, Option(help="Of --data, the share of every class that the network was not trained on.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class _DiagnosisRequest(DecodingOptions, EncoderOptions, _Samples):
    """The options of `diagnose`, as given."""

    out: Out = None
    ceiling: Annotated[float, Option(help="The accuracy that would be perfect, where labels allow no more.")] = 1.0
    ceiling_from: Annotated[
        Path | str | None,
        Option(help="diagnosis.json of another encoder of the same images: its bound is the ceiling."),
        Path | None,
    ] = None
    bound_at: Annotated[
        int | None,
        Option(min=1, help="Samples of every class for the classifier bound. [default: as the most frequent one has]"),
    ] = None
    remedy: Annotated[
        Sequence[str] | None,
        Option(help="A classifier to try among the remedies; see `tailscope methods`. Repeat for more."),
        list[str] | None,
    ] = None
    permutations: Permutations = 999
    alpha: Annotated[float, Option(help="False discovery rate at which classes are flagged.")] = 0.05
    verdict: Annotated[bool, Option("--no-verdict", help="Measure only; fit no classifiers."), NEGATED] = True
    report: Annotated[bool, Option("--no-report", help="Write diagnosis.json only."), NEGATED] = True
    drop_duplicates: Annotated[
        bool, Option("--drop-duplicates", help="Leave out unseen samples that are also training samples.")
    ] = False
    seed: Annotated[int, Option(min=0, help="Seed of permutations, folds and the hold-out.")] = 0
    device: Annotated[
        str | None,
        Option(
            help="auto, cpu or cuda. [default: auto for a --model, cpu for the geometry; classifiers fit on the CPU]"
        ),
    ] = None
    memory: Annotated[
        str | None,
        Option(
            help="The most memory to hold, such as 2GiB; features in folders, .npy and .safetensors are not held."
            " [default: three quarters of what there is]"
        ),
    ] = None
    overwrite: Overwrite = False
    logger: Logger = None
    console: Console | None = None

    @property
    def settings(self) -> "DiagnosisSettings":
        """What the diagnosis depends on besides its inputs."""
        from tailscope.diagnosis.diagnose import DiagnosisSettings

        flags = self.verdict, self.drop_duplicates
        remedies = tuple(CLASSIFIERS.canonical(call) for call in self.remedy or ())
        return DiagnosisSettings(
            self.ceiling, self.permutations, self.alpha, *flags, self.seed, self.bound_at, remedies=remedies
        )

    def tell(self, text: str) -> None:
        """Show a line, if anything is shown."""
        _tell(self.console, text)

    def check(self) -> None:
        """Refuse options that do not go together, with a `UserError`."""
        if self.remedy and not self.verdict:
            raise UserError("--remedy: is fitted and scored for a verdict; leave out --no-verdict")
        with_model = ["data", "holdout", *(one.name for one in fields(EncoderOptions)), "skip_unreadable", "workers"]
        given = [name for name in with_model if name != "store" and getattr(self, name) not in (None, False)]
        if self.model is None and given:
            raise UserError(f"--{given[0].replace('_', '-')}: goes with --model, the network that makes the features")
        if self.model is None:
            return
        from tailscope.tables.table import several

        if not isinstance(self.model, str):
            if self.data is not None or self.train is None or self.unseen is None:
                raise UserError("model: with a module give its inputs as train and unseen, and no data")
            if given:
                raise UserError(f"{given[0]}: goes with a network that is named; a module has its weights")
        elif several(self.train):
            raise UserError("--model and --train: give images for the network by --data, or features without --model")
        elif self.data is None:
            raise UserError(f"--model {self.model}: give the images by --data")


@taking(_DiagnosisRequest)
def diagnose(request: _DiagnosisRequest) -> "Diagnosis":
    """Say what holds back a classifier: a verdict with error bars, and advice.

    Takes features that you already have (`--train`, `--unseen`), or a network and images (`--model`, `--data`), whose
    features it extracts once, to OUT/features. Writes diagnosis.json and report.html. Feature files hold `features`
    [N, d] and `labels` [N] (numbers or names), and may hold `class_names`, `ids` (find duplicates, pair encoders) and
    `groups` (related samples, permuted together). In Python, `model` may also be a `torch.nn.Module`; `train`, `unseen`
    and `test` are then DataLoaders, or pairs (images [N, C, H, W], labels [N]), of inputs of that network.

    Examples: `tailscope diagnose --train train.npz --unseen held-out.npz --out out`;
    `tailscope diagnose --train a.npz --unseen a-u.npz --train b.npz --unseen b-u.npz --out compared`;
    `tailscope diagnose --model timm:resnet50 --checkpoint w.pth --data folder:photos --out out`;
    `tailscope diagnose --model timm:resnet50 --pretrained --data folder:photos --holdout 0.2 --out out`
    """
    from tailscope.device import Runtime
    from tailscope.diagnosis.diagnose import OtherBound, prepare, run, spec
    from tailscope.report import build
    from tailscope.report.objects import Diagnosis
    from tailscope.report.thumbnails import Thumbnails
    from tailscope.results import check_free
    from tailscope.store import make_folder

    request.check()
    settings, out = request.settings, None if request.out is None else Path(request.out)
    limit = None if request.memory is None else parse_size(request.memory, "--memory")
    ceiling = {} if request.ceiling_from is None else OtherBound.read(Path(request.ceiling_from))
    runtime = Runtime.choose(request.device or "cpu", keep_memory=False)
    with shown_on(request.console) as shown, logging_to(shown, request.logger, out) as progress:
        given, pictures = _features_of(request, progress)
        inputs = prepare(*given, settings)
        if request.ceiling_from is not None:
            first = next(iter(inputs.values()))
            other = OtherBound.of(Path(request.ceiling_from), ceiling, first, request.bound_at)
            settings = replace(settings, ceiling_from=other)
        if out is not None:
            check_free(make_folder(out, "--out"), "diagnosis", spec(inputs, settings), overwrite=request.overwrite)
        found, layer = run(inputs, settings, replace(runtime, progress=progress), limit)
        result = Diagnosis(found, layer, Thumbnails.of(found, pictures, progress))
        progress.log("diagnosis", 0, result.scalars(), last=True)
    if out is not None:
        # Another process may have been faster.
        check_free(out, "diagnosis", result["spec"], overwrite=request.overwrite)
        (out / REBALANCED).unlink(missing_ok=True)  # of an earlier diagnosis: not to stand beside this one for a moment
        result.save(out)
        if result.layer is not None:
            result.layer.save(out / REBALANCED)
        if request.report:
            try:
                build(out)
            except UserError as error:
                raise UserError(f"{error} - the diagnosis itself is in {out / 'diagnosis.json'}") from None
    return result


def _features_of(
    request: _DiagnosisRequest, progress: Progress
) -> tuple[tuple[Any, Any, Any, Any, str | None], dict[str, Any]]:
    """Return features of each part, the classifier and the data's name, as `prepare` takes them; what has images."""
    if request.model is None:
        return (request.train, request.unseen, request.test, request.classifier, None), {}
    from tailscope.data.sources import Division
    from tailscope.device import Runtime
    from tailscope.encoders.extract import Options
    from tailscope.encoders.features import Network, extract_parts, pass_batches
    from tailscope.tables.table import several

    runtime = Runtime.choose(request.device or "auto", progress=progress)
    if not isinstance(request.model, str):
        named = {part: getattr(request, part) for part in ("train", "unseen", "test")}
        given = {part: batches for part, batches in named.items() if batches is not None}
        found = pass_batches(request.model, given, batch=request.batch, runtime=runtime, tell=request.tell)
    else:
        found = extract_parts(
            request.model,
            str(request.data),
            Network(**_of(EncoderOptions, request)),
            Division(_one("--unseen", request.unseen), _one("--test", request.test), request.holdout, request.seed),
            out=None if request.out is None else Path(request.out),
            options=Options(**_of(DecodingOptions, request)),
            runtime=runtime,
            overwrite=request.overwrite,
            tell=request.tell,
        )
    test, classifier = found.tables.get("test"), several(request.classifier) or found.classifier
    return (found.tables["train"], found.tables["unseen"], test, classifier, found.name), found.pictures


def _one(option: str, given: Any) -> str | None:
    """Return the one source of images that an option beside `--model` names."""
    from tailscope.tables.table import several

    found = several(given)
    if len(found) > 1 or not all(isinstance(source, str | Path) for source in found):
        raise UserError(f"{option}: beside --model give one source of images, such as folder:PATH")
    return str(found[0]) if found else None


@verb
def rebalance(
    out: Annotated[
        Path | str, Argument(metavar="DIR", help="Folder of a diagnosis, which holds rebalanced.npz."), Path
    ],
    model: Annotated[
        str, Option(help="The network: timm:NAME, torchvision:NAME, resnet32 or your own module:factory.")
    ],
    checkpoint: Annotated[
        Path | str, Option(help="Its weights, .safetensors or PyTorch's; the file stays as it is."), Path
    ],
    checkpoint_key: Annotated[
        str | None, Option(help="Which of the checkpoint's networks, such as ema, where several fit.")
    ] = None,
    to: Annotated[
        Path | str | None, Option(help="File to write. [default: DIR/NAME-rebalanced.SUFFIX]"), Path | None
    ] = None,
    console: Console | None = None,
) -> Path:
    """Put the classifier that a diagnosis recommends into a checkpoint, in the place of its last layer.

    Everything else in the file stays, to the byte. Features must have been those of this checkpoint, and classes in the
    order of its outputs, unless it names them: another order is refused.

    Example: `tailscope rebalance out --model timm:resnet50 --checkpoint w.pth`
    """
    from tailscope.encoders.loading import find_layer
    from tailscope.encoders.patching import replace_classifier, require_same_order
    from tailscope.errors import first_few
    from tailscope.tables.table import LinearLayer

    out, checkpoint = Path(out), Path(checkpoint)
    _require_advised(out)
    new = LinearLayer.load(out / REBALANCED)
    old, layer = find_layer(model, checkpoint, checkpoint_key)
    if old.class_names is not None:
        new = new.aligned(old.class_names, old.weight.shape[1], str(checkpoint))
    elif not _is_classifier_of(out, old):  # whose rows the diagnosis has seen to be its classes'
        require_same_order(checkpoint, old, new)
        classes = f"in the order of the diagnosis: {first_few(new.class_names or ())}"
        _tell(console, f"{checkpoint} names no classes; its outputs are taken to be classes {classes}")
    written = out / f"{checkpoint.stem}-rebalanced{checkpoint.suffix}" if to is None else Path(to)
    replace_classifier(checkpoint, layer, new, written)
    return written


def _require_advised(out: Path) -> None:
    """Refuse a folder without a classifier, and say whether a diagnosis there recommends none."""
    if (out / REBALANCED).exists():
        return require_file(out / REBALANCED)
    if (out / "diagnosis.json").exists():
        raise UserError(f"{out}: its diagnosis recommends no classifier for a last layer; see its advice")
    raise UserError(f"{out}: holds no diagnosis; give the folder that `tailscope diagnose --out` has written to")


def _is_classifier_of(out: Path, layer: "LinearLayer") -> bool:
    """Whether a diagnosis, if its file is beside the classifier that it recommends, was of this very classifier."""
    from tailscope.diagnosis.inputs import digest
    from tailscope.report.reading import read

    if not (out / "diagnosis.json").exists():
        return False
    encoders = read(out / "diagnosis.json", "diagnosis")["spec"]["encoders"]
    known = (next(iter(encoders.values()))["classifier"] or {}) if encoders else {}
    return bool(known.get("sha256") == digest(layer.weight, layer.bias))


@verb
def report(
    out: Annotated[Path | str, Argument(metavar="DIR", help="Folder with result files."), Path],
    figures: Annotated[bool, Option(help="Also write every chart as SVG, PNG and PDF.")] = True,
) -> Path:
    """Build report.html, figures and tables from the stored results in DIR. Nothing is computed anew.

    Example: `tailscope report out`
    """
    from tailscope.report import build

    return build(out, figures=figures)
