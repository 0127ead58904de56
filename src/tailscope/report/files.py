"""Writing a file whole or not at all."""

from pathlib import Path

from tailscope.store.files import replacing


def write(path: Path, content: str | bytes) -> Path:
    """Write `content` to `path` atomically, making its folder; text is UTF-8 with plain newlines.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path, durable=False) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
