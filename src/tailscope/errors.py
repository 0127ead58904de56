"""The one exception for mistakes that a user can mend, and how it is printed."""

import os
from collections.abc import Sequence
from pathlib import Path


class UserError(Exception):
    """Bad input. The message is one line that names the file or field and the mend; the command line exits with 2."""


def one_line(text: str) -> str:
    r"""Return text on one line, without what would steer a terminal: data sets name their classes as they like.

    >>> one_line("a\n  b \x1b[31mred")
    'a b �[31mred'
    """
    return printable(" ".join(text.split()))


def first_few(texts: Sequence[str], most: int = 5) -> str:
    """Return the first few texts, and how many there are beyond.

    >>> first_few(["ant", "bee", "cat"], most=2)
    'ant, bee and 1 more'
    """
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def printable(text: str) -> str:
    """Return text without control characters, line ends among them, and what else a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def expanded(path: Path | str) -> Path:
    """Return a path that a user typed, with `~` and `~name` replaced.

    Raises:
        UserError: there is no such user, or nobody knows the home folder.
    """
    found = Path(os.path.expanduser(path))  # noqa: PTH111 -- pathlib's raises a RuntimeError
    user = found.parts[0] if found.parts else ""
    if user.startswith("~") and not Path(user).exists():
        raise UserError(f"{path}: no home folder is known for {user}; write the path out, or set HOME")
    return found


def plain_name(name: str) -> str:
    r"""Return a file's name as text that any file or page can hold: bytes that are no UTF-8 stand as `\xff`.

    >>> print(plain_name("caf\udce9"), plain_name("café"))
    caf\xe9 café
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")
