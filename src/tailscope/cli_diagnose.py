"""The verb `diagnose`: a verdict on features that the user already has."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tailscope.cli_options import Json, Out, Overwrite, Permutations
from tailscope.cli_output import console_beside, print_json
from tailscope.errors import UserError, one_line

Train = Annotated[
    list[Path],
    typer.Option(
        help="Features of training samples: .npz, .npy, .pt, .safetensors, .parquet, .csv. Repeat for more encoders."
    ),
]
Unseen = Annotated[list[Path], typer.Option(help="Features of samples that had no part in training, one per --train.")]
Test = Annotated[
    list[Path] | None, typer.Option(help="Features that only score; without them, the unseen ones do, cross-fitted.")
]
Classifier = Annotated[
    list[Path] | None,
    typer.Option(help="The linear classifier in use: weight [C, d], bias [C]. [default: one fitted to --train]"),
]
Ceiling = Annotated[float, typer.Option(help="The accuracy that would be perfect, where labels allow no more.")]
Alpha = Annotated[float, typer.Option(help="False discovery rate at which classes are flagged.")]
NoVerdict = Annotated[bool, typer.Option("--no-verdict", help="Measure only; fit no classifiers.")]
NoReport = Annotated[bool, typer.Option("--no-report", help="Write diagnosis.json only.")]
DropDuplicates = Annotated[
    bool, typer.Option("--drop-duplicates", help="Leave out unseen samples that are also training samples.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of permutations and folds.")]


GeometryDevice = Annotated[
    str, typer.Option("--device", help="auto, cpu or cuda, for the geometry; classifiers fit on the CPU.")
]


def diagnose(
    train: Train,
    unseen: Unseen,
    test: Test = None,
    classifier: Classifier = None,
    out: Out = Path("out"),
    ceiling: Ceiling = 1.0,
    permutations: Permutations = 999,
    alpha: Alpha = 0.05,
    no_verdict: NoVerdict = False,
    no_report: NoReport = False,
    drop_duplicates: DropDuplicates = False,
    seed: Seed = 0,
    device: GeometryDevice = "cpu",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Say what holds back a classifier on features that you already have: a verdict with error bars, and advice.

    Writes diagnosis.json and report.html. Feature files hold `features` [N, d] and `labels` [N] (numbers or names), and
    may hold `class_names`, `ids` (find duplicates, pair encoders) and `groups` (related samples, permuted together).

    Examples: `tailscope diagnose --train train.npz --unseen held-out.npz --out out`;
    `tailscope diagnose --train a.npz --unseen a-u.npz --train b.npz --unseen b-u.npz --out compared`
    """
    from tailscope import report
    from tailscope.diagnosis.assemble import DiagnosisSettings, prepare, run, spec
    from tailscope.progress import shown_on
    from tailscope.result_files import check_free, write
    from tailscope.store import make_folder
    from tailscope.training.runtime import Runtime

    console = console_beside(as_json)
    settings = DiagnosisSettings(ceiling, permutations, alpha, not no_verdict, drop_duplicates, seed)
    runtime = Runtime.choose(device, keep_memory=False)
    inputs = prepare(train, unseen, test, classifier, settings)
    make_folder(out, "--out")
    check_free(out, "diagnosis", spec(inputs, settings), overwrite=overwrite)
    with shown_on(console) as progress:
        result = run(inputs, settings, replace(runtime, progress=progress))
    check_free(out, "diagnosis", result["spec"], overwrite=overwrite)  # another process may have been faster
    write(out, "diagnosis", result)
    try:
        page = None if no_report else report.build(out)
    except UserError as error:
        raise UserError(f"{error} - the diagnosis itself is in {out / 'diagnosis.json'}") from None
    if as_json:
        print_json(result)
    else:
        _show(result, out, page, console)


def _show(result: Any, out: Path, page: Path | None, console: Console) -> None:
    """Print the verdict, the accuracies behind it, and the advice."""
    from rich.table import Table

    from tailscope.report import diagnosis

    def tell(text: str) -> None:
        console.print(one_line(text), highlight=False, markup=False, soft_wrap=True)  # it names classes

    tell(diagnosis.headline(result))
    if result["accuracy"] is not None:
        table = Table("", "accuracy", "head", "body", "tail", box=None)
        for row in diagnosis.accuracy_rows(result):
            table.add_row(*row)
        console.print(table)
    shown = diagnosis.findings(result)[0 if result["verdict"] is None else 1 :]  # the table says the first
    for text in [*shown, *(piece["text"] for piece in result["advice"])]:
        tell(f"- {text}")
    if result["warnings"]:
        tell(f"{len(result['warnings'])} warnings, the first: {result['warnings'][0]}")
    tell(f"written: {out / 'diagnosis.json'}")
    if page is not None:
        tell(f"report: {page}")
