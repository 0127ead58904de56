"""The one net under what is not ours: a user's module, factory, transform and network may fail in any way.

Everything else in the project catches a short list of documented exceptions; here, and only here, all of them become
one line that says what failed and where in the user's own file.
"""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tailscope.array_files import message_of
from tailscope.errors import UserError

_SHOWN = 200
_LIBRARIES = (
    str(Path(__file__).resolve().parents[1]),
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


@contextmanager
def foreign_code(what: str, mend: str = "") -> Iterator[None]:
    """Turn whatever the code within raises into one line: `what` failed how, at which line of the user's file.

    Args:
        what: what was tried, such as "my:factory: its transform fails on an image of 40 x 32 pixels".
        mend: what the user may do about it.

    Raises:
        UserError: anything was raised but KeyboardInterrupt; a `UserError` passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the documented net: a module may also call sys.exit while imported
        advice = "take a smaller --batch" if isinstance(error, torch.OutOfMemoryError) else mend
        reason = f"{type(error).__name__}: {message_of(error)[:_SHOWN]}"
        raise UserError(f"{what}: {reason}{_line_of(error)}{advice and f'; {advice}'}") from error


def _line_of(error: BaseException) -> str:
    """Return " (FILE line N)": the innermost line that is neither ours nor a library's; nothing where there is none."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f" ({_shown(error.filename)} line {error.lineno})"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(("<", *_LIBRARIES)):
            return f" ({_shown(frame.filename)} line {frame.lineno})"
    return ""


def _shown(filename: str) -> str:
    path, here = Path(filename), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
