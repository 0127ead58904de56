"""Generate the pages of docs/ that say what the code and the results say: `python scripts/docs_pages.py [--check]`.

`measures.md` has every field of a diagnosis with its explanation and definition, `methods.md` every verb and everything
that is registered by name, with its defaults and where it is written; `docs_reference` writes `reference-cli.md` and
`reference-json.md`. In `reproduction.md` every folder under `results` that holds result files has a block, between two
comments that name it:

    <!-- results: cifar10-fast -->
    ...
    <!-- /results: cifar10-fast -->

Blocks are written anew, `overview` among them; everything outside of them is prose that stays as it is. A folder
without a block gets one at the end. With `--check` nothing is written, and the exit code says whether the pages are up
to date.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import docs_reference
import docs_systems
from tailscope import cli, paper
from tailscope.data import PROFILES
from tailscope.errors import UserError
from tailscope.intervals import CELLS
from tailscope.measures.fields import COLLAPSE, FIELDS, SHOWN, Measure
from tailscope.progress import duration
from tailscope.registry import Registry
from tailscope.report.rows import load
from tailscope.report.text import DASH, Column, Table, listed, plural, significant, to_markdown, with_interval
from tailscope.reproduce import claims
from tailscope.reproduce.claims import label
from tailscope.reproduce.evidence import Evidence
from tailscope.store.files import write as write_file
from tailscope.training.recipes import PARAMETRISED, RECIPES
from tailscope.verbs import REGISTRIES

Result = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"<!-- results: (?P<name>\S+) -->\n.*?<!-- /results: (?P=name) -->", re.DOTALL)
OPENING = re.compile(r"<!-- /?results: (\S+) -->")
TRAINED = ("swap", "ladder", "geometry")
OVERVIEW = "overview"
BENCHMARKS = "bench"
"""The folder of the benchmarks' records, which share names with results and are none."""


def generate(results: Path, text: str) -> str:
    """Return the page `text` with every block written anew from the folders under `results`.

    Raises:
        UserError: there are no results, the page names some that are not there, a block's end is missing, or a folder
            mixes data sets or recipes.
    """
    folders = _folders(results)
    if not folders:
        raise UserError(f"{results}: no folder with result files; run `tailscope reproduce` with --out in it")
    named = OPENING.findall(text)
    for name in named:
        if name not in folders and name != OVERVIEW:
            raise UserError(f"the page's block 'results: {name}' has no result files in {results / name}")
    stored = {name: _read(folder) for name, folder in folders.items()}
    blocks = {OVERVIEW: _overview(stored), **{name: _block(name, found) for name, found in stored.items()}}
    for name in stored:
        if name not in named:
            text = f"{text.rstrip()}\n\n{_marked(name, '')}\n"
    if len(OPENING.findall(text)) != 2 * len(BLOCK.findall(text)):
        raise UserError("the page has a block 'results: NAME' without its end '/results: NAME', or the other way round")
    return BLOCK.sub(lambda block: _marked(block["name"], blocks[block["name"]]), text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the pages; return the exit code: 0, 1 (out of date) or 2 (a mistake, told in one line)."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "results", help="a folder for each reproduction")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs", help="where the pages are")
    options = parser.parse_args(arguments)
    reproduction = options.docs / "reproduction.md"
    try:
        pages = {options.docs / name: written() for name, written in GENERATED.items()}
        pages[reproduction] = generate(options.results, reproduction.read_text(encoding="utf-8"))
        old = [page for page, text in pages.items() if not page.is_file() or page.read_text(encoding="utf-8") != text]
        for page in old:
            if options.check:
                print(f"{page} is out of date: run python scripts/docs_pages.py", file=sys.stderr)
            else:
                write_file(page, pages[page])
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(bool(old) and options.check)


# -- measures.md ----------------------------------------------------------------------------------------------------

INTRODUCTION = """# Measures

The fields of `classes` and `groups` in `diagnosis.json` and `geometry.json`, and, [at the end](#all-classes-together),
those of `collapse` in both files. This page is generated (`python scripts/docs_pages.py`).

S are a class's n training samples, U its m unseen ones, T both together; mu_S, mu_U and mu_T their means, Sigma_S,
Sigma_U and Sigma_T their sample covariances (denominator n - 1). Angles are in degrees between raw vectors. A field is
`null` where it is undefined. "By chance" means: on average over splits of T into n training and m unseen samples at
random. p comes from those splits (permutations), q from Benjamini-Hochberg over the classes. Below 5 training samples a
class has no p and q; its group is tested instead. A group's field is the mean over its classes, its counts are sums.
"""


TOGETHER = """## All classes together

The fields of `collapse.train` and `collapse.unseen` in `diagnosis.json`, and in each entry of `geometry.json`: one
number for all classes, of the training samples and of the unseen ones. C is the number of classes, S_W and S_B are the
covariances within and between them. Every class counts once, however many samples it has; variances have the
denominator n - 1, and no sample is paired with itself; for classes of one size the formulas are otherwise the papers'.
A class with one sample takes no part. The classifier is the one in use, in `geometry.json` the one that was trained
with the encoder; without one (`--no-verdict` without `--classifier`), `nc3` and `nc4` are `null`.

Read the two sets beside each other. Training long after the last mistake draws the *training* samples of a class
together, so that `nc1` and `cdnv` go to 0 there (Papyan et al. 2020); how far from 0 they stay on unseen samples tells
how much of that holds beyond the training set.
"""


def measures() -> str:
    """Return the page of measures in Markdown."""
    entries = [_measure("##", field, definition, SHOWN.get(field)) for field, definition in FIELDS.items()]
    together = [_measure("###", name, measure.definition, measure) for name, measure in COLLAPSE.items()]
    return "\n".join([INTRODUCTION, *entries, TOGETHER, *together])


def _measure(level: str, field: str, definition: str, shown: Measure | None) -> str:
    lines = [f"{level} {field}", ""]
    lines += [f"*{shown.title}.* {shown.meaning}", ""] if shown else []
    return "\n".join([*lines, f"Defined as: {definition}.", ""])


# -- methods.md ------------------------------------------------------------------------------------------------------

METHODS = """# Verbs and methods

What `tailscope --help` and `tailscope methods` list, and the classifiers on features. A name is a call-string: it takes
the hyperparameters that are written behind it here with their defaults, so `focal` is `focal(gamma=2.0)`, and
`--loss 'focal(gamma=1)'` changes it. This page is generated (`python scripts/docs_pages.py`).

Every verb has `-q` (`--quiet`: errors and the path of what was written, no more) and `-v` (`--verbose`: also what is
read, how long each part takes, and all caveats and warnings). The verdict is coloured on a terminal, unless
`NO_COLOR` is set; off a terminal a line a minute tells how far long work is. A name that is not known is answered
with the nearest that is.
"""


AUTHORS = """## Writing your own

A factory is registered under a name. What stands before the `/` the program supplies, the rest a user may set; with
`needs=` it asks for more:

- A **loss** takes the counts of the classes and returns `loss(logits, labels)`, float32 [B]; nothing is averaged. It
  may need `features` (the factory takes their width after the counts, the loss `features=` [B, d]), `progress` (the
  loss takes `progress=`), `cosine` or `distance` (its logits are cosines, or squared distances) or `unmixed` (mixed
  images are refused).
- **Class weights** take the counts and return `weights(progress)`, float32 [C]. With `batch` they are divided by their
  mean over each batch.
- A **sampler** takes labels and the number of classes and returns `draw(n, generator)`, n indices; with `progress` it
  is `draw(n, generator, progress)`, in stage 1 only.
- A **mixing** is an object with `draw(labels, size, generator)`, which returns a `Mix`. Its factory may need `counts`
  and `hidden`, the number of places between the network's stages; it takes them in this order.
- A **pre-training task** has `classes`, how many answers there are, and `length`, how many times stage 1's steps it
  takes; `task(images, generator)` returns the images as they are shown, and the answers, int64 [B].
- A **last layer** takes the network's linear layer and returns the module in its place, features [B, d] to logits [B,
  C]. It has `as_linear()`, a weight and a bias that decide alike, and `cosines(features)` or `distances(features)`
  if it computes them. Where that linear layer's logits are not the layer's own, as with cosines, `inputs(features)` is
  what `on_inputs()`, a weight and a bias, makes them of: what re-balances a classifier starts from these.
- A **model** takes the numbers of channels and classes. It has `features(images)` [B, d], `feature_dim` and
  `classifier`, a linear layer. To be mixed inside it has `hidden_places`, and `features(images, between)` calls
  `between(place, activations)` at each. To end in two branches, for `bbn`, it names its last stage, a sequence of
  blocks whose channels are averaged to features, in `last_stage`.

`progress` is the share of the training that is done, in [0, 1): a tensor for losses and weights, since a GPU replays
captured steps (so `torch.where`, not `if`), and a plain number for samplers, as it is when the epoch begins.

```python
import torch
from torch import nn
from tailscope.methods import LOSSES


class Centers(nn.Module):
    def __init__(self, classes, width, weight):
        super().__init__()
        self.centers = nn.Parameter(torch.randn(classes, width))
        self.weight = weight

    def forward(self, logits, labels, *, features):
        distance = (features - self.centers[labels]).square().sum(1)
        return nn.functional.cross_entropy(logits, labels, reduction="none") + self.weight / 2 * distance


@LOSSES.register("centers", needs=("features",))
def centers(counts, width, /, weight: float = 0.01):
    \"""Cross-entropy, and the distance to a trained centre of the class.\"""
    return Centers(len(counts), width, weight)
```

A loss that is a module makes its parameters on the CPU. They are trained with the network's, at the same rate and
without weight decay, kept for resuming with its buffers, and left out of the result. Processes that train together sum
the gradients of the parameters; buffers they do not share.

A `Mix` says of each batch how much of an image's own stays: of its pixels (`images`, any shape that broadcasts to
[steps, batch, C, H, W]), of its label's loss (`labels`, [steps, batch] or [steps, 1]) and of its activations
(`hidden`, [steps, places]). The rest is its partner's (`partner`, int64 [steps, batch]). Shapes must be the same every
time: where a batch is not mixed, a weight is 1.

A classifier that computes cosines decides as a linear one with rows of length 1 and no bias does: its logits are that
one's times a positive factor for each image. It is this linear one that stage 2 starts from, and that is evaluated.
"""


def methods() -> str:
    """Return the page in Markdown."""
    verbs = [
        (command.name or "", (command.callback.__doc__ or "").split("\n")[0]) for command in cli.app.registered_commands
    ]
    verbs += [
        (group.typer_instance.info.name or "", group.typer_instance.info.help or "")
        for group in cli.app.registered_groups
    ]
    recipes = [(f"`{recipe.name}`", recipe.card) for recipe in RECIPES.values()]
    parts = [
        _listing("Verbs", ("verb", "what it does"), ((f"`{name}`", summary) for name, summary in verbs)),
        *(_registered(name, registry) for name, registry in REGISTRIES.items()),
        _listing("Recipes", ("recipe", "what it does"), recipes),
        _registered("recipes that take values", PARAMETRISED),
        docs_systems.section(REPOSITORY / "results"),
        f"## Profiles\n\n{PROFILES}: see [Data and subsets](data.md).\n",
        AUTHORS,
    ]
    return "\n".join([METHODS, *parts])


def _registered(title: str, registry: Registry[Any]) -> str:
    rows = (
        (
            f"`{registry.canonical(entry.name)}`",
            entry.summary,
            f"`{entry.factory.__module__.removeprefix('tailscope.')}`",
        )
        for entry in registry
    )
    return _listing(title[0].upper() + title[1:], ("call", "what it is", "where"), rows)


def _listing(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in [head, ("---",) * len(head), *rows]]
    return "\n".join([f"## {title}", "", *(f"| {line} |" for line in lines), ""])


GENERATED = {
    "measures.md": measures,
    "methods.md": methods,
    "reference-cli.md": docs_reference.command_line,
    "reference-json.md": docs_reference.result_files,
}
"""The pages that are written whole, by what writes them."""


# -- reproduction.md ------------------------------------------------------------------------------------------------


def _folders(results: Path) -> dict[str, Path]:
    """Return the folders with result files by their path below `results`."""
    found = {path.parent for verb in TRAINED for path in results.rglob(f"{verb}.json")} - {results / BENCHMARKS}
    return {folder.relative_to(results).as_posix(): folder for folder in sorted(found)}


def _read(folder: Path) -> dict[str, Result]:
    """Return a folder's results by verb; `claims` are decided anew where there is no claims.json."""
    found: dict[str, Result] = {**load(folder)}  # type: ignore[dict-item]
    trained = {verb: found[verb] for verb in TRAINED if verb in found}
    identities = {(r["dataset"]["name"], r["recipe"]["name"], str(r["spec"].get("profile"))) for r in trained.values()}
    if len(identities) > 1:
        raise UserError(f"{folder}: holds results of different data sets or recipes; give each a folder of its own")
    if "claims" not in found:
        evidence = Evidence(trained)
        trained["claims"] = claims.document(evidence, claims.check(evidence), "")
    else:
        trained["claims"] = found["claims"]
    return trained


def _overview(stored: Mapping[str, Mapping[str, Result]]) -> str:
    rows = []
    for name, results in stored.items():
        evidence = _evidence(results)
        rows.append(
            {
                "folder": f"results/{name}",
                "dataset": _dataset(evidence),
                "recipe": claims.label_of(evidence.recipe),
                "seeds": _seeds(evidence),
                "hardware": _hardware(evidence),
                "claims": claims.tally(results["claims"]["claims"]),
            }
        )
    overview = Table(OVERVIEW, "What was run", [Column(field, field) for field in rows[0]], rows)
    return f"{to_markdown(overview)}\n{to_markdown(_at_a_glance(stored))}"


def _at_a_glance(stored: Mapping[str, Mapping[str, Result]]) -> Table:
    """Return Table 1 of every folder, with the paper's above each data set's first."""
    cells = ("lt stage1", *CELLS)
    rows: list[dict[str, Any]] = []
    for name, results in stored.items():
        evidence = _evidence(results)
        if "swap" not in results:
            continue
        dataset = _dataset(evidence)
        found = {name: evidence.accuracies()}
        printed = paper.table1(dataset) | paper.stage1(dataset)
        if printed and dataset not in [row["dataset"] for row in rows]:
            found = {"the paper": {cell: [value] for cell, value in printed.items()}} | found
        for folder, accuracies in found.items():
            written = {cell: claims.in_percent(accuracies.get(cell, [])) for cell in cells}
            rows.append({"dataset": dataset, "folder": folder, **written})
    columns = [Column("dataset", "dataset"), Column("folder", "results"), Column("lt stage1", "lt, own classifier")]
    columns += [Column(cell, label(cell)) for cell in CELLS]
    return Table("glance", "Table 1 at a glance: accuracy, % (mean ± sd over seeds)", columns, rows)


def _block(name: str, results: Mapping[str, Result]) -> str:
    evidence = _evidence(results)
    parts = [f"### {_dataset(evidence)}, {claims.label_of(evidence.recipe)}", _card(name, evidence)]
    parts += [to_markdown(written) for _, written in claims.build(evidence)]
    if results["claims"]["claims"]:
        parts.append(to_markdown(_claims(results["claims"]["claims"])))
    return "\n".join(f"{part.rstrip()}\n" for part in parts)


def _card(name: str, evidence: Evidence) -> str:
    """Return what a reader must know to compare these numbers with others."""
    cards = [row for result in evidence.results.values() for row in result["provenance"]]
    trained = {row["key"]: row for row in cards}
    seconds = sum(row["seconds"] for row in trained.values())
    first = next(iter(evidence.results.values()))
    versions = first["environment"]["versions"]
    parameters = listed(sorted({f"{row['model']} ({row['parameters']:,} parameters)" for row in cards}))
    lines = [
        f"- Recipe `{evidence.recipe['name']}`: {evidence.recipe['card']}",
        f"- Seeds {_seeds(evidence)}; long-tailed subset {listed(sorted({h[:16] for h in first['subset_sha256']}))}… "
        f"({sum(first['counts']):,} images)",
        f"- {parameters}; {plural(len(trained), 'backbone')}, {duration(seconds)} of training on {_hardware(evidence)}",
        f"- {', '.join(f'{package} {version}' for package, version in versions.items())}",
        f"- Files: `results/{name}`",
    ]
    return "\n".join(lines)


def _claims(stored: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        {
            **claim,
            "paper": significant(claim.get("published")),
            "ours": with_interval(significant(claim["estimate"]), claim["ci95"], 3, 1.0),
            "direction": DASH if claim.get("as_claimed") is None else "yes" if claim["as_claimed"] else "no",
            "why": claim.get("reason") or DASH,
        }
        for claim in stored
    ]
    columns = [
        Column("figure", "where"),
        Column("claim", "claim"),
        Column("statistic", "what decides it"),
        Column("paper", "paper"),
        Column("ours", "ours [95 %]"),
        Column("direction", "estimate as claimed"),
        Column("verdict", "verdict"),
        Column("why", "why"),
    ]
    return Table("claims", f"The paper's claims on these results: {claims.tally(stored)}", columns, rows)


def _evidence(results: Mapping[str, Result]) -> Evidence:
    return Evidence({verb: results[verb] for verb in TRAINED if verb in results})


def _dataset(evidence: Evidence) -> str:
    first = next(iter(evidence.results.values()))
    return evidence.dataset or str(first["dataset"]["name"])


def _seeds(evidence: Evidence) -> str:
    """Return the seeds, by experiment where they differ."""
    seeds = {verb: " ".join(map(str, result["seeds"])) for verb, result in evidence.results.items()}
    if len(set(seeds.values())) == 1:
        return next(iter(seeds.values()))
    return ", ".join(f"{verb} {text}" for verb, text in seeds.items())


def _hardware(evidence: Evidence) -> str:
    return listed(sorted({row["device"] for r in evidence.results.values() for row in r["provenance"]}))


def _marked(name: str, content: str) -> str:
    return f"<!-- results: {name} -->\n{content}<!-- /results: {name} -->"


if __name__ == "__main__":
    sys.exit(main())
