"""Open any source of images, in memory or on disk, as streams: what `--data` names, for feature extraction."""

from dataclasses import dataclass
from pathlib import Path

from tailscope.data import folders, huggingface, listfiles, sources
from tailscope.data.imageset import ImageSet
from tailscope.data.streams import ImageStream, MemoryImages
from tailscope.errors import UserError, expanded


@dataclass(frozen=True, eq=False)
class OpenedImages:
    """A source's splits as streams, and the training split as tensors where it is in memory."""

    source: str
    splits: dict[str, ImageStream]
    in_memory: ImageSet | None

    def split(self, name: str | None) -> tuple[str, ImageStream]:
        """Return a split with its name, which any of `folders.SPLITS` may call; None takes the only one there is.

        Raises:
            UserError: there is no such split, or None does not say which.
        """
        known = ", ".join(self.splits)
        if name is None:
            if len(self.splits) > 1:
                raise UserError(f"{self.source} has the splits {known}; say which with --split")
            name = next(iter(self.splits))
        if name not in self.splits:
            name = folders.split_of(name) or name
        if name not in self.splits:
            raise UserError(f"--split {name}: {self.source} has {known}")
        return name, self.splits[name]


def open_images(source: str, *, data_root: Path | None = None) -> OpenedImages:
    """Open `folder:PATH`, `list:TRAIN.txt[,TEST.txt]`, `hf:NAME:SPLIT`, or anything that `sources.load` knows.

    Raises:
        UserError: as the module that loads the source.
    """
    kind, _, rest = source.partition(":")
    if kind == "folder":
        return OpenedImages(source, dict(folders.load(expanded(rest))), None)
    if kind == "list":
        return OpenedImages(source, dict(listfiles.load(rest, data_root)), None)
    if kind == "hf":
        return OpenedImages(source, dict(huggingface.load(rest)), None)
    data = sources.load(source, data_root=data_root, also=("folder:PATH", "list:TRAIN.txt[,TEST.txt]", "hf:NAME:SPLIT"))
    splits: dict[str, ImageStream] = {
        split: MemoryImages.of(data.name, split, images)
        for split, images in [("train", data.train), ("test", data.test)]
    }
    return OpenedImages(source, splits, data.train)
