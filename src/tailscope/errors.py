"""The one exception for mistakes that a user can mend, how it is printed, and what is no file to be read.

Code of others may raise anything: `foreign_code` makes one line of it.
"""

import errno
import os
import stat
import sysconfig
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

GIT_LFS = b"version https://git-lfs"
"""What a file begins with that stands for one which Git LFS has not fetched."""

_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))


class UserError(ValueError):
    """Bad input. The message is one line that names the file or field and the mend; the command line exits with 2."""


def one_line(text: str) -> str:
    r"""Return text on one line, without what would steer a terminal: data sets name their classes as they like.

    >>> one_line("a\n  b \x1b[31mred")
    'a b �[31mred'
    """
    return printable(" ".join(text.split()))


def message_of(error: BaseException) -> str:
    """Return an exception's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def first_few(texts: Sequence[str], most: int = 5) -> str:
    """Return the first few texts, and how many there are beyond.

    >>> first_few(["ant", "bee", "cat"], most=2)
    'ant, bee and 1 more'
    """
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a name that is not among the known ones: these, and the nearest.

    >>> str(unknown("loss", "focl", ["ce", "focal"]))
    "unknown loss 'focl'; did you mean 'focal'? known: ce, focal"
    """
    names = list(known)
    return UserError(f"unknown {what} {name!r};{guess(name, names)} known: {', '.join(names)}")


def guess(name: str, known: Iterable[str]) -> str:
    """Return a question that names the nearest of the known names, with a space before it; nothing if none is near.

    >>> guess("Resnet5O", ["resnet50", "vgg16"]), guess("tpu", ["auto", "cpu", "cuda"]), guess("xyz", ["auto"])
    (" did you mean 'resnet50'?", " did you mean 'cpu'?", '')
    """
    names = {one.lower(): one for one in known}
    near = get_close_matches(name.lower(), names, 1)
    return f" did you mean {names[near[0]]!r}?" if near else ""


_LIBRARIES = (
    str(Path(__file__).resolve().parent),
    "<",  # no file: importlib's own frames among them
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


@contextmanager
def foreign_code(what: str, mend: str = "") -> Iterator[None]:
    """Turn whatever the code within raises into one line: `what` failed how, at which line of the user's file; `mend`.

    Raises:
        UserError: anything was raised but KeyboardInterrupt; a `UserError` passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the documented net: a module may also call sys.exit while imported
        advice = "take a smaller --batch" if type(error).__name__ == "OutOfMemoryError" else mend
        reason = f"{type(error).__name__}: {message_of(error)[:200]}"
        raise UserError(f"{what}: {reason}{_line_of(error)}{advice and f'; {advice}'}") from error


def _line_of(error: BaseException) -> str:
    """Return " (FILE line N)": the innermost line that is neither ours nor a library's; nothing where there is none."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f" ({_shown(error.filename)} line {error.lineno})"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(_LIBRARIES):
            return f" ({_shown(frame.filename)} line {frame.lineno})"
    return ""


def _shown(filename: str) -> str:
    path, here = Path(filename), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def printable(text: str) -> str:
    """Return text without control characters, line ends among them, and what else a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def expanded(path: Path | str) -> Path:
    """Return a path that a user typed, with `~` and `~name` replaced; an unknown one is a UserError."""
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


def _not_a_file(path: Path) -> str | None:
    """Say what a path is that is there and no file: a pipe would be waited for, a device has no end."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return None
    return f"{next((name for holds, name in _KINDS if holds(mode)), 'a device')}, not a file"


def unreadable(path: Path) -> str | None:
    """Say why a path is no file with something in it that can be opened; None if it is one."""
    try:
        if problem := _not_a_file(path):
            return problem
        if path.stat().st_size == 0:
            return "empty"
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        circle = isinstance(error, OSError) and error.errno == errno.ELOOP
        reason = "links that lead in a circle" if circle else getattr(error, "strerror", None) or error
        return f"cannot be opened, {reason}"
    return None if os.access(path, os.R_OK) else "may not be read"


def require_file(path: Path, option: str = "") -> None:
    """Refuse a path that `unreadable` says is none; the message begins with the option that named it."""
    words = {"missing": "no such file", "empty": "the file is empty"}
    words["may not be read"] = "may not be read (permission denied)"
    if problem := unreadable(path):
        raise UserError(f"{option}{path}: {words.get(problem, problem)}")
