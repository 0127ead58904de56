"""Fixtures that several test files share."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]
UNPACK = REPOSITORY.parent / "shared" / "data" / "unpack.py"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tailscope-tests"


# A busy machine is no failure.
settings.register_profile("tailscope", deadline=None)
settings.load_profile("tailscope")


def pytest_configure(config: pytest.Config) -> None:
    """Give each worker of pytest-xdist one thread: the workers already fill the cores."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def unpacked(name: str) -> Path:
    """Return the prepared NAME.npz, unpacked once to a cache outside the repository; skip where there is none."""
    target = CACHE / f"{name}.npz"
    if not target.is_file():
        if not UNPACK.is_file():
            pytest.skip(f"{name} is not here: no prepared data beside the repository")
        # A folder of its own, then a rename: parallel workers may unpack at once, and none sees half a file.
        own = CACHE / f"unpacking-{os.getpid()}"
        subprocess.run([sys.executable, str(UNPACK), str(own), name], check=True, capture_output=True)
        (own / f"{name}.npz").replace(target)
        own.rmdir()
    return target


@pytest.fixture(scope="session")
def cifar10_npz() -> Path:
    """CIFAR-10 as an image `.npz`."""
    return unpacked("cifar10")


@pytest.fixture(scope="session")
def cifar100_npz() -> Path:
    """CIFAR-100 as an image `.npz`."""
    return unpacked("cifar100")


@pytest.fixture(scope="session")
def published_imagenet_lt_counts() -> dict[str, int]:
    """Images per class of ImageNet-LT as published; skip where they are not."""
    index = UNPACK.parent / "index" / "ImageNet_LT_class_count.json"
    if not index.is_file():
        pytest.skip("the published counts are not here")
    counts: dict[str, int] = json.loads(index.read_text())
    return counts


@pytest.fixture
def tailscope_(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run the command line in this process, with the recipe `demo` cut to a few steps; return code, out and err."""
    from experiment_setups import TINY
    from tailscope import cli
    from tailscope.training.recipes import RECIPES

    monkeypatch.setitem(RECIPES, "demo", TINY)

    def run(*arguments: object) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["tailscope", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return SimpleNamespace(code=ended.value.code, out=printed.out, err=printed.err)

    return run
