"""What a terminal sees: words whole, the verdict in colour, and as much or as little as is asked for."""

import io
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailscope import cli_screen

LONG = "extraordinarily-long-class-name"


@pytest.fixture
def samples(tmp_path):
    """Feature files of three classes that lie well apart, long-tailed and balanced."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(3, 8))
    for name, counts in (("train", (90, 30, 12)), ("unseen", (25, 25, 25))):
        labels = np.repeat(np.arange(3), counts)
        features = centres[labels] + 2 * rng.normal(size=(len(labels), 8))
        names = np.array([f"{LONG}-{k}" for k in range(3)])
        np.savez(tmp_path / f"{name}.npz", features=features, labels=labels, class_names=names)
    return tmp_path


def diagnose(folder, *options, out="out"):
    files = "--train", str(folder / "train.npz"), "--unseen", str(folder / "unseen.npz"), "--out", str(folder / out)
    return ("diagnose", *files, "--permutations", "0", "--no-report", *options)


def test_quiet_prints_the_path_alone_and_errors(tailscope_, samples):
    shown = tailscope_(*diagnose(samples, "-q"))
    assert (shown.code, shown.out, shown.err) == (0, f"{samples / 'out'}\n", "")
    shown = tailscope_("methods", "--quiet")
    assert (shown.code, shown.out, shown.err) == (0, "", "")
    shown = tailscope_("swap", "--data", "digits", "--recipe", "demo", "--plan", "-q", "--out", samples / "none")
    assert (shown.code, shown.out, (samples / "none").exists()) == (0, "", False)  # nothing was written
    shown = tailscope_("subset", "--data", "digts", "-q")
    assert (shown.code, shown.out) == (2, "")
    assert "did you mean 'digits'?" in shown.err


def test_verbose_adds_what_was_read_and_how_long_it_took(tailscope_, samples):
    plain, verbose = tailscope_(*diagnose(samples)), tailscope_(*diagnose(samples, "-v", out="again"))
    assert "read " not in plain.err
    assert f"read {samples / 'train.npz'}: features [132, 8], labels [132]" in verbose.err
    assert re.search(r"classifiers: \d+\.\d s\n.*done in \d+\.\d s\n$", verbose.err, re.DOTALL)
    caveats = [line for line in verbose.out.splitlines() if line.startswith(("caveat: ", "warning: "))]
    held = sum(map(int, re.findall(r"(\d+) (?:other )?(?:caveat|warning)", plain.out)))
    assert len(caveats) == held > 0


def test_json_stays_json_however_much_is_told(tailscope_):
    for option in ("-q", "-v"):
        assert tailscope_("methods", "--json", option).out == tailscope_("methods", "--json").out


@pytest.mark.parametrize("width", [80, 60, 40])
def test_no_word_is_broken_in_a_table(width):
    table = Table("call", "what it is", "n")
    words = [
        f"{LONG}(head=0.4, tail=0.1)",
        "An explanation that goes on for quite some words, hyphen-ated ones too",
        "1,234",
    ]
    table.add_row(*words)
    screen = Console(file=io.StringIO(), width=width)
    cli_screen.show_on(screen, table)
    shown = screen.file.getvalue()
    assert [word for words_ in words for word in words_.split() if word not in shown] == []
    assert max(map(len, shown.splitlines())) <= max(width, 67)
    assert screen.width == width


@pytest.mark.parametrize(("terminal", "lines"), [(True, 3), (False, 1)])
def test_lines_break_between_words_on_a_terminal_only(terminal, lines):
    screen = Console(file=io.StringIO(), width=30, force_terminal=terminal, color_system=None)
    text = f"a line of words that is longer {LONG}-{LONG} than thirty"
    cli_screen.show_on(screen, Text(text, "bold"))
    shown = screen.file.getvalue().splitlines()
    assert (len(shown), " ".join(shown)) == (lines, text)


@pytest.mark.parametrize("plain", [False, True])
def test_the_verdict_is_coloured_on_a_terminal_unless_unwanted(samples, plain):
    """The process has a terminal of its own."""
    mine, its = pty.openpty()
    unwanted = {"NO_COLOR": "1"} if plain else {}
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color"} | unwanted
    command = [sys.executable, "-m", "tailscope", *diagnose(samples)]
    with subprocess.Popen(command, stdout=its, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(its)
        shown = b""
        try:
            while piece := os.read(mine, 1 << 16):
                shown += piece
        except OSError:  # how the end of a terminal is told
            pass
    os.close(mine)
    assert process.returncode == 0
    coloured = re.search(rb"\x1b\[1;3[356]m[A-Z]", shown)
    assert (coloured is None) == plain
