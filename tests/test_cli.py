"""The command line: what each verb prints and writes, and how an interrupt goes on."""

import inspect
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.main import get_command

import tailscope
from experiment_setups import CPU, TINY, timeless
from tailscope import cli, report, verbs
from tailscope.device import Runtime
from tailscope.errors import UserError
from tailscope.experiments import plans
from tailscope.experiments.options import Request
from tailscope.experiments.stages import Stages
from tailscope.results import write
from tailscope.training.recipes import RECIPES

VERBS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
SWAP = ("swap", "--data", "digits", "--recipe", "demo", "--seeds", "1")


@pytest.fixture
def no_report(monkeypatch):
    """Leave out the report, which has tests of its own and takes seconds."""
    monkeypatch.setattr(report, "build", lambda *_, **__: None)


def test_version(tailscope_):
    assert tailscope_("--version").out == f"tailscope {tailscope.__version__}\n"


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "tailscope"]
    shown = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert (shown.stdout, shown.stderr) == (f"tailscope {tailscope.__version__}\n", "")
    wrong = subprocess.run([*command, "swap"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "error: Missing option '--data'.\n")


def test_help_names_every_verb_and_each_has_an_example(tailscope_):
    assert {"demo", "subset", "swap", "ladder", "geometry", "report", "methods"} <= set(VERBS)
    for arguments in ((), ("--help",), ("-h",)):
        shown = tailscope_(*arguments)
        assert (shown.code, shown.err) == (0, "")
        assert all(verb in shown.out for verb in VERBS)
    for verb in VERBS:
        shown = tailscope_(verb, "--help")
        assert (shown.code, shown.err) == (0, "")
        assert "Example" in shown.out
        assert f"tailscope {verb}" in shown.out


def test_subset_of_cifar10_by_the_published_protocol(tailscope_, cifar10_npz, tmp_path):
    arguments = ("subset", "--data", "cifar10", "--data-root", cifar10_npz.parent, "--profile", "exp:100")
    shown = tailscope_(*arguments, "--protocol", "ldam", "--seed", 0, "--out", tmp_path)
    assert (shown.code, shown.err) == (0, "")
    assert shown.out.startswith("12,406 images, counts 5000 2997 1796 1077 645 387 232 139 83 50\nsha256 4bf45bff")
    stored = json.loads((tmp_path / "subset.json").read_text())
    assert stored["counts"] == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert stored["sha256"].startswith("4bf45bff")
    assert [len(kept) for kept in stored["indices"]] == stored["counts"]
    assert stored["spec"]["protocol"] == "ldam"


def test_subset_shows_and_writes_what_it_drew(tailscope_, tmp_path):
    quiet = tailscope_("subset", "--data", "digits", "--profile", "exp:20", "--json")
    assert (quiet.code, quiet.err) == (0, "")
    printed = json.loads(quiet.out)
    assert printed["schema"] == "tailscope.subset/1"
    shown = tailscope_("subset", "--data", "digits", "--profile", "exp:20", "--out", tmp_path)
    stored = json.loads((tmp_path / "subset.json").read_text())
    assert {**stored, "created": ""} == {**printed, "created": ""}
    assert f"written: {tmp_path / 'subset.json'}\n" in shown.out
    assert stored["sha256"] in shown.out
    # Its counts are a profile: the same subset comes out.
    again = tailscope_("subset", "--data", "digits", "--profile", tmp_path / "subset.json", "--json")
    assert json.loads(again.out)["indices"] == stored["indices"]


def test_methods_as_tables_and_as_json(tailscope_):
    listed = json.loads(tailscope_("methods", "--json").out)
    assert {recipe["name"] for recipe in listed["recipes"]} == set(RECIPES)
    shown = tailscope_("methods")
    assert (shown.code, shown.err) == (0, "")
    for kind in verbs.REGISTRIES:
        assert {entry["name"] for entry in listed[kind]} == {entry.name for entry in verbs.REGISTRIES[kind]}
        assert all(entry["name"] in shown.out for entry in listed[kind])


def test_a_swap_prints_its_story_and_the_same_again_trains_nothing(tailscope_, tmp_path):
    first = tailscope_(*SWAP, "--out", tmp_path)
    assert (first.code, first.err) == (0, "")
    assert first.out.endswith(f"report: {tmp_path / 'report.html'}\n")
    assert (tmp_path / "report.html").is_file()
    assert "Nothing was trained" not in first.out
    stored = json.loads((tmp_path / "swap.json").read_text())
    assert stored["command"] == f"tailscope {' '.join(SWAP)} --out {tmp_path.name}"  # no folder of this machine
    again = tailscope_(*SWAP, "--out", tmp_path, "--json")
    assert again.err == "Nothing was trained: all 6 stages were in the store.\n"
    assert timeless(json.loads(again.out)) == timeless(stored)
    assert timeless(json.loads((tmp_path / "swap.json").read_text())) == timeless(stored)


@pytest.mark.usefixtures("no_report")
def test_a_terminal_shows_bars_with_speed_and_what_is_done(monkeypatch, tmp_path):
    monkeypatch.setitem(RECIPES, "demo", TINY)
    shown = []
    for _ in range(2):
        terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
        plans.run(Request("digits", recipe="demo", seeds=1, out=tmp_path, console=terminal), ["swap"])
        shown.append(terminal.file.getvalue())
    assert re.search(r"seed 0: backbone on lt.*[\d,]+/s", shown[0])
    assert shown[0].count("done: seed 0") == 6
    assert shown[1].count("stored already: seed 0") == 6
    assert "Nothing was trained" in shown[1]


@pytest.mark.usefixtures("no_report")
def test_a_result_of_another_spec_is_never_overwritten_silently(tailscope_, tmp_path):
    assert tailscope_(*SWAP, "--out", tmp_path, "--json").code == 0
    before = (tmp_path / "swap.json").read_bytes()
    trained = {path.name for path in tmp_path.glob("store/*/*")}
    for change in (
        ["--profile", "exp:10"],
        ["--seeds", "2"],
        ["--subset-seed", "3"],
        ["--matched"],
        ["--protocol", "ldam"],
    ):
        refused = tailscope_(*SWAP, "--out", tmp_path, *change)
        assert refused.code == 2
        assert "holds a result of another spec" in refused.err
        assert "--overwrite" in refused.err
        assert refused.err.count("\n") == 1
    assert (tmp_path / "swap.json").read_bytes() == before
    assert {path.name for path in tmp_path.glob("store/*/*")} == trained
    # Another verb has a file of its own.
    assert tailscope_("subset", "--data", "digits", "--out", tmp_path).code == 0
    assert tailscope_("subset", "--data", "digits", "--out", tmp_path, "--seed", "1").code == 2
    assert tailscope_("subset", "--data", "digits", "--out", tmp_path, "--seed", "1", "--overwrite").code == 0
    assert json.loads((tmp_path / "subset.json").read_text())["spec"]["seed"] == 1
    replaced = tailscope_(*SWAP, "--out", tmp_path, "--subset-seed", "3", "--overwrite", "--json")
    assert replaced.code == 0
    assert json.loads((tmp_path / "swap.json").read_text())["spec"]["subset_seed"] == 3


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b'{"spec": null}', b'{"spec": [1]}', b'{"spec": 3}', b"\xff"]
)
@pytest.mark.usefixtures("no_report")
def test_a_file_that_is_no_result_is_not_overwritten(tailscope_, tmp_path, content):
    (tmp_path / "swap.json").write_bytes(content)
    refused = tailscope_(*SWAP, "--out", tmp_path)
    assert refused.code == 2
    assert "swap.json: exists but is no readable result" in refused.err or "another spec" in refused.err
    assert refused.err.count("\n") == 1
    assert (tmp_path / "swap.json").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["swap.json"]


@pytest.mark.usefixtures("no_report")
def test_the_store_is_where_the_option_or_the_environment_says(tailscope_, tmp_path, monkeypatch):
    monkeypatch.setenv("TAILSCOPE_STORE", str(tmp_path / "environment"))
    assert tailscope_(*SWAP, "--out", tmp_path / "a", "--json").code == 0
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["swap.json"]
    assert len(list((tmp_path / "environment").glob("stage1/*/DONE"))) == 2
    recalled = tailscope_(*SWAP, "--out", tmp_path / "b", "--store", tmp_path / "environment", "--json")
    assert recalled.err.startswith("Nothing was trained")


ODD = "\u00fc \U0001f600 [bold] [/x] \\[red] 'quoted' $HOME %s {}"
NAMES = ("<script>alert('a, \"b\"')</script>", "[/bold] \\[/red]", "=1+1|`x`")


def test_odd_paths_and_class_names_are_printed_as_they_are(tailscope_, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / ODD
    folder.mkdir(parents=True)
    labels = np.repeat([0, 1, 2, 3], 20)
    images = np.random.default_rng(0).integers(0, 256, (80, 9, 7), dtype=np.uint8)
    np.savez(
        folder / "data [x].npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
        class_names=np.array([*NAMES, "\x1b[2Jgone\u202e caf\udce9"]),
    )
    data = ("--data", folder / "data [x].npz", "--profile", "exp:20")
    assert "\x1b" not in (subset := tailscope_("subset", *data, "--out", folder / "out")).out
    assert (subset.code, subset.err) == (0, "")
    assert f"written: {folder / 'out' / 'subset.json'}\n" in subset.out
    assert all(name in subset.out for name in NAMES)
    swap = tailscope_("swap", *data, "--recipe", "demo", "--seeds", "1", "--out", folder / "out")
    assert (swap.code, swap.err) == (0, "")
    assert f"report: {folder / 'out' / 'report.html'}\n" in swap.out
    assert "<script>alert" not in (folder / "out" / "report.html").read_text(encoding="utf-8")


def test_a_console_without_unicode_shows_question_marks():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [
        sys.executable,
        "-c",
        "from tailscope.cli import main; main()",
        "subset",
        "--data",
        "digits",
        "--profile",
        "exp:5",
    ]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "?" in shown.stdout


INTERRUPTED = """
import os, signal, sys
from experiment_setups import TINY
from tailscope.cli import main
from tailscope.training import loop, recipes

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
recipes.RECIPES["demo"] = TINY
loop.SPACING = 0  # a checkpoint after every epoch, however short
save, interrupted = loop.save_tensors, []

def save_and_interrupt(path, tensors, meta):
    save(path, tensors, meta)
    if meta["epochs"] == 2 and not interrupted:  # what is finished is saved again on the way out
        interrupted.append(path)
        os.kill(os.getpid(), signal.SIGINT)

loop.save_tensors = save_and_interrupt
sys.argv = ["tailscope", *sys.argv[1:]]
main()
"""


@pytest.mark.usefixtures("no_report")
def test_an_interrupted_run_says_how_to_go_on_and_goes_on(tailscope_, tmp_path):
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", INTERRUPTED, *SWAP, "--out", str(out)]
    stopped = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert stopped.returncode == 130
    assert stopped.stderr.strip() == "interrupted; the same command keeps what is finished and does the rest"
    assert not (out / "swap.json").exists()
    assert len(list(out.glob("store/scratch/*/checkpoint.safetensors"))) == 1
    finished = tailscope_(*SWAP, "--out", out, "--json")
    assert finished.code == 0
    whole = tailscope_(*SWAP, "--out", tmp_path / "whole", "--json")
    assert timeless(json.loads(finished.out)) == timeless(json.loads(whole.out))
    assert not any((out / "store" / "scratch").iterdir())


def test_the_api_says_what_the_command_line_says(tailscope_, no_report, tmp_path, monkeypatch):
    monkeypatch.setattr(Runtime, "choose", classmethod(lambda *_, **__: CPU))
    shown = json.loads(tailscope_(*SWAP, "--out", tmp_path, "--json").out)
    options = {"recipe": "demo", "store": tmp_path / "store"}
    assert timeless(tailscope.swap(tailscope.load("digits"), seeds=1, **options)) == timeless(shown)
    trained = []
    monkeypatch.setattr(Stages, "_tell", lambda lab, found, label: trained.append(found))
    assert tailscope.swap(tailscope.load("digits"), seeds=[0], **options)["seeds"] == [0]
    assert all(trained)


SCREEN = {"as_json", "quiet", "verbose", "imports"}  # what only a command line needs


def test_a_verb_in_python_takes_the_options_of_the_command_line_and_no_others(no_report, tmp_path):
    assert tailscope.api is verbs
    commands = get_command(cli.app).commands
    for name in set(verbs.__all__) - {"load"}:
        parameters = inspect.signature(getattr(verbs, name)).parameters
        assert set(parameters) - {"console"} == {option.name for option in commands[name].params} - SCREEN
    with pytest.raises(TypeError, match="matched"):
        tailscope.ladder("digits", matched=True)
    with pytest.raises(TypeError, match="data"):
        tailscope.swap(profile="exp:10")
    with pytest.raises(UserError, match="--seeds"):
        tailscope.swap("digits", seeds=[1, 1])


def test_a_verb_in_python_writes_where_it_is_told_to_and_is_silent(no_report, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(RECIPES, "demo", TINY)
    found = tailscope.ladder("digits", recipe="demo", seeds=1, out=tmp_path)
    assert timeless(json.loads((tmp_path / "ladder.json").read_text())) == timeless(found)
    assert {path.name for path in tmp_path.iterdir()} == {"ladder.json", "store"}
    with pytest.raises(UserError, match="holds a result of another spec"):
        tailscope.ladder("digits", recipe="demo", seeds=[3], out=tmp_path)
    ladder = plans.EXPERIMENTS["ladder"]

    def slow(stages, settings):  # another process writes what it found meanwhile
        result = ladder(stages, settings)
        write(tmp_path / "shared", "ladder", {**result, "spec": {**result["spec"], "profile": "exp:7"}})
        return result

    with monkeypatch.context() as patched:
        patched.setitem(plans.EXPERIMENTS, "ladder", slow)
        with pytest.raises(UserError, match="holds a result of another spec"):
            tailscope.ladder("digits", recipe="demo", seeds=1, out=tmp_path / "shared", store=tmp_path / "store")
    rows, labels = np.eye(3, 8).repeat(20, axis=0), np.arange(3).repeat(20)
    monkeypatch.chdir(tmp_path)
    judged = tailscope.diagnose((rows, labels), (rows + 0.1, labels), permutations=0, verdict=False)
    assert not (tmp_path / "diagnosis.json").exists()
    assert judged["verdict"] is None
    tailscope.diagnose((rows, labels), (rows + 0.1, labels), permutations=0, verdict=False, out=tmp_path)
    assert (tmp_path / "diagnosis.json").exists()
    assert capfd.readouterr() == ("", "")
