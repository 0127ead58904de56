"""The one exception for mistakes that a user can mend, and how it is printed."""

import os


class UserError(Exception):
    """Bad input. The message is one line that names the file or field and the mend; the command line exits with 2."""


def one_line(text: str) -> str:
    r"""Return text on one line, without what would steer a terminal: data sets name their classes as they like.

    >>> one_line("a\n  b \x1b[31mred")
    'a b �[31mred'
    """
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def plain_name(name: str) -> str:
    r"""Return a file's name as text that any file or page can hold: bytes that are no UTF-8 stand as `\xff`.

    >>> print(plain_name("caf\udce9"), plain_name("café"))
    caf\xe9 café
    """
    return os.fsencode(name).decode("utf-8", "backslashreplace")
