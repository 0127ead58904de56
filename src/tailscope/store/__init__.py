"""Trained stages and extracted features on disk: kept under their keys, checked when read, packed to be moved.

`Store` keeps entries; `pack` and `add` move them between machines as one archive; `inventory`, `verify` and `prune`
look after a store. The files themselves (`tailscope.store.files`) are written whole or not at all.
"""

from tailscope.store.archives import Added, add, pack, packed_bytes
from tailscope.store.care import Pruned, Row, inventory, prune, verify
from tailscope.store.entries import CHEAP, KINDS, Store, try_lock
from tailscope.store.files import Artifact, Damaged, Meta, Tensors, make_folder

__all__ = [
    "CHEAP",
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
    "inventory",
    "make_folder",
    "pack",
    "packed_bytes",
    "prune",
    "try_lock",
    "verify",
]
