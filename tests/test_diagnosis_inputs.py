"""What `diagnose` refuses, in one line and with exit code 2, and what it only warns about."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import tailscope
from diagnosis_cases import CENTRES, head_biased, separable, table
from tailscope import cli
from tailscope.diagnosis import diagnose
from tailscope.diagnosis.inputs import read
from tailscope.errors import UserError
from tailscope.results import write
from tailscope.tables.table import FeatureTable, LinearLayer

QUICK = ("--permutations", "0", "--no-verdict", "--no-report")


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["tailscope", "diagnose", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return command


@pytest.fixture
def files(tmp_path):
    """A folder with train.npz and unseen.npz, and a function that changes fields of one of them."""
    fields = {}
    for name, (features, labels) in zip(("train", "unseen"), separable(), strict=True):
        names = [f"class {k}" for k in range(9)]
        fields[name] = {"features": features.astype(np.float32), "labels": labels, "class_names": names}
        np.savez(tmp_path / f"{name}.npz", **fields[name])

    def change(name, **changed):
        stored = fields[name] | changed
        np.savez(tmp_path / f"{name}.npz", **{field: value for field, value in stored.items() if value is not None})

    change.folder = tmp_path
    change.fields = fields
    return change


def nan(files):
    features = files.fields["unseen"]["features"].copy()
    features[[3, 7], 1] = np.nan
    files("unseen", features=features)


def infinite(files):
    features = files.fields["train"]["features"].copy()
    features[5] = -np.inf
    files("train", features=features)


def short(files):
    files("unseen", features=files.fields["unseen"]["features"][:, :5])


def missing_class(files):
    kept = files.fields["train"]["labels"] != 4
    files("train", features=files.fields["train"]["features"][kept], labels=files.fields["train"]["labels"][kept])


def float_labels(files):
    files("train", labels=files.fields["train"]["labels"] + 0.5)


def few_names(files):
    files("train", class_names=["a", "b"])


def other_names(files):
    files("unseen", class_names=[f"class {k}" for k in range(8)] + ["zebra"])


def empty(files):
    (files.folder / "unseen.npz").write_bytes(b"")


def truncated(files):
    path = files.folder / "unseen.npz"
    path.write_bytes(path.read_bytes()[:2000])


def objects(files):
    np.savez(files.folder / "unseen.npz", features=np.array([{}], dtype=object), labels=np.array([0]))


def absent(files):
    (files.folder / "unseen.npz").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (nan, ("unseen.npz", "2 of 450 rows hold NaN or infinity", "the first is row 3")),
        (infinite, ("train.npz", "1 of 633 rows hold NaN or infinity", "the first is row 5")),
        (short, ("unseen.npz", "d = 5", "d = 12")),
        (missing_class, ("train.npz", "no training samples of 'class 4'")),
        (float_labels, ("train.npz", "label 0.5 in row 0 (and 632 more) is no whole number")),
        (few_names, ("train.npz", "class_names has 2 names")),
        (other_names, ("unseen.npz", "has samples of 'zebra', which", "train.npz has not")),
        (empty, ("unseen.npz", "the file is empty")),
        (truncated, ("unseen.npz", "truncated")),
        (objects, ("unseen.npz", "features holds Python objects, which are never unpickled")),
        (absent, ("unseen.npz", "no such file")),
    ],
)
def test_bad_files_are_one_line_and_exit_code_2(run, files, damage, words):
    damage(files)
    code, out, err = run("--train", files.folder / "train.npz", "--unseen", files.folder / "unseen.npz", *QUICK)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--ceiling", "0"), "--ceiling 0.0: expected"),
        (("--ceiling", "87"), "--ceiling 87.0: expected"),
        (("--alpha", "1"), "--alpha 1.0: expected"),
        (("--alpha", "1e-9"), "--alpha 1e-09: expected a number from 0.001"),
        (("--permutations", "-1"), "permutations"),
        (("--permutations", "9" * 12), "expected 0 to 1,000,000"),
        (("--device", "tpu"), "unknown --device 'tpu'; did you mean 'cpu'? known:"),
        (("--train", "x.npz"), "1 given for 2 --train"),
        (("--classifier", "no.npz"), "no.npz: no such file"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(run, files, tmp_path, options, words):
    given = ("--train", files.folder / "train.npz", "--unseen", files.folder / "unseen.npz", "--out", tmp_path / "out")
    code, out, err = run(*given, *options)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert words in err


def test_a_classifier_of_another_width_is_refused(tmp_path):
    train, unseen = separable()
    path = tmp_path / "classifier.npz"
    head_biased().save(path)
    with pytest.raises(UserError, match=r"classifier.npz: weight takes d = 12, but .* has d = 6"):
        read(table(train[0][:, :6], train[1]), table(unseen[0][:, :6], unseen[1]), classifier=path)


def test_measuring_imports_nothing_that_only_verdicts_and_reports_need(files):
    """A process of its own, from start to end: its command line is recorded without the folders of this machine."""
    code = (
        "import sys; from tailscope import cli\ntry: cli.main()\nexcept SystemExit as end: assert end.code == 0, end\n"
        "print({'sklearn', 'scipy.stats', 'pandas', 'altair', 'torchvision', 'torch._dynamo'} & {*sys.modules})"
    )
    paths = ("--train", files.folder / "train.npz", "--unseen", files.folder / "unseen.npz", "--out", files.folder)
    arguments = ["diagnose", *map(str, paths), *QUICK]
    shown = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("set()\n"), shown.stdout
    command = json.loads((files.folder / "diagnosis.json").read_text())["command"]
    assert command.startswith("tailscope diagnose --train train.npz --unseen unseen.npz --out ")
    assert str(files.folder.parent) not in command


def test_a_result_of_another_spec_is_not_replaced(run, files, tmp_path):
    given = ("--train", files.folder / "train.npz", "--unseen", files.folder / "unseen.npz", "--out", tmp_path / "out")
    assert run(*given, *QUICK)[0] == 0
    assert run(*given, *QUICK)[0] == 0
    code, _, err = run(*given, *QUICK, "--seed", "1")
    assert code == 2
    assert "seed differ" in err
    assert run(*given, *QUICK, "--seed", "1", "--overwrite")[0] == 0


def test_what_is_only_warned_about(run, files, tmp_path):
    features, labels = files.fields["train"]["features"].copy(), files.fields["train"]["labels"]
    features[0] = 0
    kept = [*np.flatnonzero(labels != 8), np.flatnonzero(labels == 8)[0]]
    unseen, truth = files.fields["unseen"]["features"].copy(), files.fields["unseen"]["labels"]
    unseen[0] = features[1]
    files("train", features=features[kept], labels=labels[kept])
    files("unseen", features=unseen[truth != 2], labels=truth[truth != 2])
    code, out, err = run(
        "--train", files.folder / "train.npz", "--unseen", files.folder / "unseen.npz", *QUICK, "--json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert (code, err) == (0, "")
    text = "\n".join(json.loads(out)["warnings"])
    assert "1 feature vectors of length 0" in text
    assert "1 training sample: spread, width, gap and escape undefined, see the group: class 8" in text
    assert "no unseen samples: shift, gap and escape not assessable: class 2" in text
    assert "1 of 400 samples of" in text
    stored = json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert stored["classes"][8]["spread_train_deg"] is None
    assert stored["classes"][2]["center_shift_deg"] is None


def test_duplicates_are_counted_by_copies_and_ids_and_dropped_on_demand():
    (features, labels), (unseen, truth) = separable()
    copied = unseen.copy()
    copied[:4] = features[:4]
    train = table(features, labels, ids=np.arange(len(labels)))
    held_out = table(copied, truth, ids=np.concatenate([[7], 10_000 + np.arange(len(truth) - 1)]))
    kept = read(train, held_out)
    assert len(kept.unseen) == len(truth)
    assert kept.warnings[0].startswith("4 of 450 samples")
    dropped = read(train, held_out, drop_duplicates=True)
    assert len(dropped.unseen) == len(truth) - 4
    assert "they were dropped" in dropped.warnings[0]
    with pytest.raises(UserError, match="nothing is left"):
        read(train, train, drop_duplicates=True)


@pytest.mark.parametrize("ids", [True, False])
def test_a_duplicate_with_one_encoder_is_dropped_with_all(ids):
    (features, labels), (unseen, truth) = separable()
    blind = unseen.copy()
    blind[3] = features[0]  # the second encoder sees no difference
    first, second = ({"ids": np.arange(n) + 1000 * k} if ids else {} for k, n in enumerate([len(labels), len(truth)]))
    trains = [table(features, labels, **first)] * 2
    others = [table(one, truth, **second) for one in (unseen, blind)]
    found = tailscope.diagnose(trains, others, drop_duplicates=True, verdict=False, permutations=0)
    assert found["dataset"]["unseen_images"] == len(truth) - 1
    for one in found["encoders"].values():
        assert "they were dropped" in one["warnings"][0]
        assert one["warnings"][0].startswith(f"1 of {len(truth)} samples")
    first, second = (one["warnings"][0] for one in found["encoders"].values())
    assert ("another encoder" in first, "another encoder" in second) == (True, False)


def test_ids_of_different_data_sets_say_nothing_about_duplicates():
    (features, labels), (unseen, truth) = separable()
    ids = np.array([f"ant/{n:03d}.png" for n in range(len(labels))])
    train = table(features, labels, ids=ids, provenance={"data": "folder:train"})
    for data, said in (("folder:train", True), ("folder:new", False)):
        held_out = table(unseen, truth, ids=ids[: len(truth)], provenance={"data": data})
        assert any("are also in" in text for text in read(train, held_out).warnings) is said


def test_the_same_files_by_another_path_are_the_same_diagnosis(run, files, tmp_path, monkeypatch):
    options = ("--out", tmp_path / "out", *QUICK)
    assert run("--train", files.folder / "train.npz", "--unseen", files.folder / "unseen.npz", *options)[0] == 0
    monkeypatch.chdir(files.folder)
    assert run("--train", "train.npz", "--unseen", "unseen.npz", *options)[::2] == (0, "")
    assert str(files.folder) not in (tmp_path / "out" / "diagnosis.json").read_text()


def test_a_call_from_python_records_nothing_of_the_callers_command_line(files, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mine.py", "--token", "hunter2"])
    result = tailscope.diagnose(files.folder / "train.npz", files.folder / "unseen.npz", permutations=0, verdict=False)
    assert result["command"] == "tailscope, called from Python"


def test_an_uneven_scored_set_is_warned_about():
    train, (unseen, truth) = separable()
    kept = np.concatenate([np.flatnonzero(truth == 0), np.flatnonzero(truth > 0)[::5]])
    warnings = read(table(*train), table(unseen[kept], truth[kept])).warnings
    assert any("10 to 50 samples a class" in text for text in warnings)


@pytest.mark.parametrize(
    ("dtype", "suffix"), [(np.float16, "parquet"), (np.float32, "npz"), (np.float64, "safetensors")]
)
def test_every_floating_type_and_format_gives_a_verdict(dtype, suffix, tmp_path):
    train, unseen = (FeatureTable.from_arrays(features.astype(dtype), labels) for features, labels in separable())
    for name, one in (("train", train), ("unseen", unseen)):
        one.save(tmp_path / f"{name}.{suffix}")
    files = [tmp_path / f"{name}.{suffix}" for name in ("train", "unseen")]
    found = tailscope.diagnose(*files, permutations=0, classifier=head_biased())
    assert found["verdict"]["bottleneck"] == "classifier"


def test_names_do_not_steer_the_terminal(run, files, tmp_path):
    names = ["new\nline", "\x1b[31mred", "\x07bell", *(f"class {k}" for k in range(3, 9))]
    features = files.fields["train"]["features"].copy()
    features[files.fields["train"]["labels"] < 3] = 0
    files("train", class_names=names, features=features)
    files("unseen", class_names=names)
    given = ("--train", files.folder / "train.npz", "--unseen", files.folder / "unseen.npz", "--out", tmp_path / "out")
    code, out, _ = run(*given, "--permutations", "0", "--no-verdict", "--no-report")
    assert code == 0
    assert {"\x1b", "\x07"}.isdisjoint(out)
    assert "new\nline" not in out


def test_a_result_that_another_process_wrote_meanwhile_is_not_lost(run, files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    given = ("--train", files.folder / "train.npz", "--unseen", files.folder / "unseen.npz", "--out", out)
    measured = diagnose.run

    def slow(inputs, settings, *others):
        write(out, "diagnosis", measured(inputs, replace(settings, seed=7), *others)[0])
        return measured(inputs, settings, *others)

    monkeypatch.setattr(diagnose, "run", slow)
    code, _, err = run(*given, *QUICK)
    assert (code, "seed differ" in err) == (2, True)
    assert json.loads((out / "diagnosis.json").read_text())["spec"]["seed"] == 7
    assert run(*given, *QUICK, "--overwrite")[0] == 0


@pytest.mark.parametrize("field", ["class_names", "groups", "ids"])
def test_a_result_of_other_names_groups_or_ids_is_not_replaced(run, files, tmp_path, field):
    given = ("--train", files.folder / "train.npz", "--unseen", files.folder / "unseen.npz", "--out", tmp_path / "out")
    numbers = {name: np.arange(len(one["labels"])) for name, one in files.fields.items()}
    first = {**{name: numbers[name] // 2 for name in numbers}, "class_names": [f"class {k}" for k in range(9)]}
    other = {**{name: numbers[name] // 4 for name in numbers}, "class_names": [f"animal {k}" for k in range(9)]}
    for values in (first, other):
        for name in numbers:
            files(name, **{field: values[field if field == "class_names" else name]})
        code, _, err = run(*given, *QUICK)
    assert (code, "holds a result of another spec (encoders differ)" in err) == (2, True)
    assert run(*given, *QUICK, "--overwrite")[0] == 0
    assert run(*given, *QUICK)[0] == 0


def test_a_spec_without_names_groups_and_ids_is_what_it_was(files):
    bare = [(one["features"], one["labels"]) for one in files.fields.values()]
    assert all(set(one or {}) <= {"source", "sha256"} for one in read(*bare).fingerprints.values())


@pytest.mark.parametrize(("held", "what"), [(None, "no such file"), ({"schema": "tailscope.swap/1"}, "'schema' is")])
def test_a_ceiling_from_something_else_is_refused_before_anything_is_read(run, tmp_path, held, what):
    other = tmp_path / "swap.json"
    if held is not None:
        other.write_text(json.dumps(held))
    code, _, err = run("--train", "no.npz", "--unseen", "no.npz", "--ceiling-from", other, *QUICK)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: --ceiling-from {other}: ")
    assert what in err
    assert err.endswith("; give the diagnosis.json of another encoder\n")


def test_a_report_that_cannot_be_written_says_where_the_diagnosis_is(run, files, tmp_path):
    (tmp_path / "out" / "report.html").mkdir(parents=True)
    given = ("--train", files.folder / "train.npz", "--unseen", files.folder / "unseen.npz", "--out", tmp_path / "out")
    code, _, err = run(*given, "--permutations", "0", "--no-verdict")
    assert (code, err.count("\n")) == (2, 1)
    assert "report.html" in err
    assert "the diagnosis itself is in" in err


def test_scored_samples_of_one_class_are_refused():
    train, unseen = separable()
    only = (unseen[0][unseen[1] == 3], unseen[1][unseen[1] == 3])
    for test in ({"unseen": table(*only)}, {"unseen": table(*unseen), "test": table(*only)}):
        with pytest.raises(UserError, match="all samples are of class '3'"):
            tailscope.diagnose(table(*train), permutations=0, **test)


def test_too_few_bursts_are_counted_as_bursts():
    train, (unseen, truth) = separable()
    given = [table(unseen, truth, groups=np.arange(len(truth)) % bursts) for bursts in (1, 2)]
    with pytest.raises(UserError, match=r"no classifier can be fitted to the unseen samples .*--no-verdict"):
        tailscope.diagnose(table(*train), given[0], permutations=0)
    assert tailscope.diagnose(table(*train), given[1], permutations=0)["verdict"]["scored"] == len(truth)


def test_test_samples_among_the_unseen_ones_flatter():
    train, unseen = (table(*one) for one in separable())
    assert "they flatter what was fitted" in read(train, unseen, unseen).warnings[0]


def test_a_classifier_that_overflows_the_features_type_is_refused():
    train, unseen = (table(*one) for one in separable())
    huge = LinearLayer.from_arrays(CENTRES * 1e300)
    with pytest.raises(UserError, match="beyond float32"):
        tailscope.diagnose(train, unseen, classifier=huge, permutations=0)
