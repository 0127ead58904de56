"""Sizes as users write them, and the memory that a process may hold: the machine's, or what a container allows."""

import os
from pathlib import Path

import pytest

from tailscope.effort import parse_size, usable_memory
from tailscope.errors import UserError

GIB = 2**30
UNLIMITED = 9223372036854771712


def system(root: Path, groups: str | None, limits: dict[str, object]) -> Path:
    """Write what the kernel would say of this process's groups, and of their limits."""
    if groups is not None:
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text(groups)
    for name, limit in limits.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    return root


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="control groups are Linux's")
@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": 2 * GIB}, 2 * GIB),  # a container that sees its own group alone
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": GIB, "memory.max": "max"}, GIB),
        ("0::/job/step\n", {"job/step/memory.max": GIB, "job/memory.max": 2 * GIB}, GIB),
        ("5:cpu:/a\n4:memory:/a\n", {"memory/a/memory.limit_in_bytes": GIB, "a/memory.max": 5}, GIB),
        ("4:memory:/docker/4711\n", {"memory/memory.limit_in_bytes": GIB}, GIB),  # the host's path is not to be seen
        ("4:cpu,memory:/\n0::/\n", {"memory/memory.limit_in_bytes": UNLIMITED}, None),
        ("0::/other\n", {"another/memory.max": 5}, None),
        ("0::/\n", {}, None),
        (None, {"memory.max": 5}, None),
    ],
)
def test_the_smallest_limit_of_the_groups_around_a_process_counts(tmp_path, groups, limits, expected):
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert usable_memory(system(tmp_path, groups, limits)) == min(machine, expected or machine)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2**31),
        ("2 gb", 2 * 10**9),
        ("1.5M", 3 * 2**19),
        ("123", 123),
        ("7 B", 7),
        ("1t", 2**40),
        ("16MB", 16e6),
    ],
)
def test_sizes_as_users_write_them(text, size):
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "much", "0", "-1GiB", "2 GiB 3", "GiB", "MB", "1 XB", "1iB"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match=f"--max-size {text}: expected a size such as 2GiB"):
        parse_size(text, "--max-size")
