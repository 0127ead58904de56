"""Trained stages and extracted features on disk: kept under their keys, checked when read, packed to be moved.

`Store` keeps entries; `pack` and `add` move them between machines as one archive; `inventory`, `verify` and `prune`
look after a store. The files themselves (`save_tensors`, `write_json` ...) are written whole or not at all.
"""

from tailscope.store.archives import Added, add, pack, packed_bytes
from tailscope.store.care import Pruned, Row, inventory, prune, verify
from tailscope.store.entries import CHEAP, KINDS, Store, try_lock
from tailscope.store.files import (
    CHECKPOINT,
    Artifact,
    Damaged,
    Meta,
    Tensors,
    check_tensors,
    load_checkpoint,
    load_header,
    load_tensors,
    make_folder,
    save_tensors,
    whole_checkpoint,
    write_json,
    writing,
)

__all__ = [
    "CHEAP",
    "CHECKPOINT",
    "KINDS",
    "Added",
    "Artifact",
    "Damaged",
    "Meta",
    "Pruned",
    "Row",
    "Store",
    "Tensors",
    "add",
    "check_tensors",
    "inventory",
    "load_checkpoint",
    "load_header",
    "load_tensors",
    "make_folder",
    "pack",
    "packed_bytes",
    "prune",
    "save_tensors",
    "try_lock",
    "verify",
    "whole_checkpoint",
    "write_json",
    "writing",
]
