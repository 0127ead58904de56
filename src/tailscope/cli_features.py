"""The verb `features`: extract features with any encoder, for `diagnose`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tailscope.cli_options import DataRoot, Device, Json, Overwrite
from tailscope.cli_output import console_beside, print_json
from tailscope.errors import one_line

Model = Annotated[
    str,
    typer.Option(help="timm:NAME, torchvision:NAME, resnet32 and its like, store:KEY, or your own module:factory."),
]
Images = Annotated[
    str, typer.Option("--data", help="digits, cifar10, cifar100, PATH.npz, folder:PATH, list:FILES or hf:NAME.")
]
File = Annotated[Path, typer.Option("--out", help="Feature file to write: .npz, .safetensors or .parquet.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="Local weights: .safetensors or PyTorch's, wherever in the file the network lies.")
]
CheckpointKey = Annotated[
    str | None, typer.Option(help="Which of the checkpoint's networks, such as ema, where several fit.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Published weights of timm or torchvision.")]
Split = Annotated[str | None, typer.Option(help="Split of the data; needed where there are several.")]
Subset = Annotated[Path | None, typer.Option(help="A subset.json: only those images, in its order.")]
Part = Annotated[
    str | None,
    typer.Option(help="Of the training split: train, the images of --subset or of store:KEY's training; or unseen."),
]
StoreRoot = Annotated[
    Path | None, typer.Option("--store", envvar="TAILSCOPE_STORE", help="Folder of trained stages, for store:KEY.")
]
Normalize = Annotated[str | None, typer.Option(help="imagenet, cifar, data, none or MEANS/DEVIATIONS.")]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Height and width of the input.")]
Resize = Annotated[
    str | None, typer.Option(help="Pixels of the shorter side before the centre is cropped, or none for no resizing.")
]
Verify = Annotated[bool, typer.Option("--verify", help="Decode every image first and report all that cannot be read.")]
Skip = Annotated[bool, typer.Option("--skip-unreadable", help="Leave out images that cannot be read, with a count.")]
Mixed = Annotated[bool, typer.Option("--mixed", help="bfloat16 where the device has it; geometry wants fp32.")]
Half = Annotated[bool, typer.Option("--half", help="Store float16: half the size, three significant digits.")]
Batch = Annotated[int, typer.Option(min=1, help="Images at a time.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that decode images.")]


def features(
    model: Model,
    data: Images,
    out: File,
    checkpoint: Checkpoint = None,
    checkpoint_key: CheckpointKey = None,
    pretrained: Pretrained = False,
    split: Split = None,
    subset: Subset = None,
    part: Part = None,
    store: StoreRoot = None,
    data_root: DataRoot = None,
    normalize: Normalize = None,
    image_size: ImageSize = None,
    resize: Resize = None,
    verify: Verify = False,
    skip_unreadable: Skip = False,
    mixed: Mixed = False,
    half: Half = False,
    batch: Batch = 64,
    workers: Workers = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Extract features with any encoder from any images. Interrupted, the same command continues.

    A checkpoint's classifier is written beside the features, for `diagnose --classifier`.

    Examples: `tailscope features --model timm:resnet50 --checkpoint w.pth --data folder:photos --out f.npz`;
    `tailscope features --model resnet32 --checkpoint ldam.pth.tar --data cifar10 --split test --out unseen.npz`;
    `tailscope features --model store:892e --store out/store --data cifar10 --split train --part unseen --out u.npz`
    """
    from tailscope.encoders.extraction import Options
    from tailscope.encoders.run import run_features
    from tailscope.progress import shown_on
    from tailscope.training.runtime import Runtime

    console = console_beside(as_json)
    options = Options(
        precision="auto" if mixed else "fp32",
        stored="float16" if half else "float32",
        batch=batch,
        workers=workers,
        skip_unreadable=skip_unreadable,
    )
    with shown_on(console) as progress:
        written = run_features(
            model,
            data,
            out,
            checkpoint=checkpoint,
            checkpoint_key=checkpoint_key,
            pretrained=pretrained,
            split=split,
            subset=subset,
            part=part,
            store=store,
            data_root=data_root,
            normalize=normalize,
            image_size=image_size,
            resize=resize,
            verify=verify,
            overwrite=overwrite,
            options=options,
            runtime=Runtime.choose(device, progress=progress),
        )
    if as_json:
        print_json(asdict(written))
    else:
        _show(asdict(written), console)


def _show(written: dict[str, Any], console: Console) -> None:
    """Say what was written, and what to mind."""
    for warning in written["warnings"]:
        console.out(f"warning: {one_line(warning)}", highlight=False)
    console.out(
        f"{written['features']}: {written['rows']:,} rows of {written['width']} features, {written['classes']} classes"
        f" ({written['resumed']:,} rows were there, {written['skipped']:,} images skipped)",
        highlight=False,
    )
    if written["classifier"] is not None:
        console.out(f"{written['classifier']}: the checkpoint's classifier", highlight=False)
