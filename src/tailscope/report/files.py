"""Writing a file whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path

from tailscope.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    """Write `content` to `path` atomically, making its folder; text is UTF-8 with plain newlines.

    Raises:
        UserError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --out") from None
    return path
