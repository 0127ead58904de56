"""`tailscope store`: what is there, in words and as JSON; checked, packed, added and thinned out by command."""

import json
import re
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tailscope.store import KINDS, Store, inventory, prune, verify
from tailscope.store.files import CHECKPOINT, save_tensors
from test_store import TENSORS, assert_complete, made

SPEC = {
    "data": {"name": "digits", "profile": "exp:100"},
    "model": "resnet8",
    "augment": ["crop(padding=1)", "flip"],
    "mix": "mixup",
    "loss": "focal(gamma=1)",
}
TRAINED = {
    "spec": SPEC,
    "seed": 3,
    "epochs": 12,
    "device": {"cpu": "A processor", "threads": 2, "gpu": None},
    "precision": "bfloat16",
    "fused": True,
    "arithmetic": {"torch": "2.11.0", "engine": "eager"},
}
BACKBONE, CLASSIFIER, VIEW, UNFINISHED = ("a1" + "0" * 30, "b2" + "0" * 30, "c3" + "0" * 30, "d4" + "0" * 30)


@pytest.fixture
def store(tmp_path) -> Store:
    """A store with an entry of three kinds and a checkpoint."""
    store = Store(tmp_path / "store")
    store.get_or_make("stage1", BACKBONE, lambda _: (TENSORS, TRAINED))
    store.get_or_make("stage2", CLASSIFIER, lambda _: (TENSORS, {"spec": {**SPEC, "model": None}, "seed": 3}))
    store.get_or_make("views", VIEW, lambda _: ({"features": torch.zeros(40, 8)}, {"images": 40, "seconds": 1.0}))
    scratch = store.scratch("stage1", UNFINISHED)
    scratch.mkdir(parents=True)
    save_tensors(scratch / CHECKPOINT, TENSORS, {"epochs": 7})
    return store


@pytest.fixture
def run(tailscope_, store):
    return lambda *arguments: tailscope_("store", *arguments, "--store", store.root)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x11")


def test_the_list_says_what_each_entry_is(run, store):
    (store.root / "stage2" / CLASSIFIER / "DONE").write_bytes(b"")
    listed = run("list")
    assert (listed.code, listed.err) == (0, "")
    view, classifier, backbone, checkpoint = listed.out.splitlines()
    assert re.fullmatch(
        r"stage1 +a10000000000 +[\d.]+ kB +now +digests +digits exp:100, resnet8, crop\(padding=1\)\+flip\+mixup, "
        r"focal\(gamma=1\), 12 epochs, seed 3; A processor, 2 threads, bfloat16, fused, torch 2.11.0, engine eager",
        backbone,
    )
    assert re.fullmatch(r"stage2 +b20000000000 .* unverified +digits exp:100, .*, seed 3", classifier)
    assert re.fullmatch(r"views +c30000000000 .* digests +40 images", view)
    assert re.fullmatch(r"stage1 checkpoint +d40000000000 .* digests +after epoch 7", checkpoint)


def test_the_list_as_json(run, store):
    damage(store.entry("stage1", BACKBONE) / "meta.json")
    shown = json.loads(run("list", "--json").out)
    assert shown["schema"] == "tailscope.store-list/1"
    rows = {row["key"]: row for row in shown["entries"]}
    assert rows[VIEW]["bytes"] == sum(path.stat().st_size for path in store.entry("views", VIEW).iterdir())
    assert [rows[key]["state"] for key in (BACKBONE, CLASSIFIER, VIEW)] == ["damaged", "digests", "digests"]
    assert "meta.json: damaged" in rows[BACKBONE]["problem"]
    assert (rows[UNFINISHED]["checkpoint"], rows[UNFINISHED]["what"]) == (True, "after epoch 7")


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"spec": 3},
        {"spec": {"data": 1, "augment": 2}},
        {"images": "x"},
        {"spec": SPEC, "device": 1, "arithmetic": []},
    ],
    ids=str,
)
def test_descriptions_that_lack_what_is_shown_are_listed(run, store, meta):
    store.get_or_make("stage1", "e", lambda _: (TENSORS, meta))
    assert run("list").code == 0


def test_names_from_files_do_not_steer_the_terminal(run, store):
    spec = {**SPEC, "data": {"name": "\x1b[31mred\n[bold]", "profile": "x"}}
    store.get_or_make("stage1", "e", lambda _: ({"\x1b[0m": torch.zeros(1)}, {"spec": spec}))
    store.get_or_make("stage2", "f", lambda _: ({"\x1b[0m": torch.zeros(1)}, {}))
    shown = run("list").out
    assert "\x1b" not in shown
    assert "�[31mred [bold] x" in shown
    assert len(shown.splitlines()) == 6


def test_verify_names_what_is_damaged_and_says_so_by_its_exit_code(run, store):
    (store.root / "stage2" / CLASSIFIER / "DONE").write_bytes(b"")
    first = run("verify")
    assert (first.code, first.out) == (0, "3 whole, 1 readable without digests, 0 damaged or unreadable\n")
    assert run("verify").out == "4 whole, 0 readable without digests, 0 damaged or unreadable\n"
    damage(store.tensors_file("stage1", BACKBONE))
    damage(store.scratch("stage1", UNFINISHED) / CHECKPOINT)
    shown = run("verify")
    assert shown.code == 1
    assert shown.out.splitlines()[0].startswith(
        f"damaged: stage1/{BACKBONE}: {store.tensors_file('stage1', BACKBONE)}: dam"
    )
    assert shown.out.splitlines()[1].startswith(f"damaged: stage1/{UNFINISHED} (checkpoint): ")
    assert shown.out.splitlines()[2] == "2 whole, 0 readable without digests, 2 damaged or unreadable"
    as_json = run("verify", "--json")
    assert as_json.code == 1
    assert [r["state"] for r in json.loads(as_json.out)["entries"]] == ["verified", "verified", "damaged", "damaged"]
    store.get_or_make("stage1", BACKBONE, made)
    assert_complete(store, key=BACKBONE)


def test_pack_and_add_move_what_is_asked_for(run, store, tailscope_, tmp_path):
    packed = run("pack", "--out", tmp_path / "a.tar")
    assert packed.code == 0
    assert packed.out.splitlines()[-1].startswith("2 entries, 0 checkpoints; `tailscope store add`")
    for arguments, counts in (
        (["a1"], (1, 0)),
        (["a1", "--checkpoints"], (1, 0)),
        (["--checkpoints"], (2, 1)),
        (["d4", "--checkpoints"], (0, 1)),
        (["--kind", "views,stage1"], (2, 0)),
    ):
        out = tmp_path / "b.tar"
        shown = json.loads(run("pack", *arguments, "--out", out, "--overwrite", "--json").out)
        assert shown == {"files": [str(out)], "entries": counts[0], "checkpoints": counts[1]}
    other = tmp_path / "other"
    added = tailscope_("store", "add", tmp_path / "a.tar", "--store", other)
    assert (added.code, added.out, added.err) == (0, "2 added\n", "")
    assert tailscope_("store", "add", tmp_path / "a.tar", "--store", other).out == "2 there already\n"
    assert Store(other).meta("stage1", BACKBONE) == TRAINED


def test_an_archive_that_is_there_stays(run, store, tmp_path):
    for taken, options in (("a.tar", ()), ("b-2.tar", ("--checkpoints", "--max-size", "20KB"))):
        (tmp_path / taken).write_text("a user's own")
        shown = run("pack", *options, "--out", tmp_path / f"{taken[0]}.tar")
        assert (shown.code, shown.err) == (2, f"error: {tmp_path / taken}: exists; use another --out or --overwrite\n")
        assert (tmp_path / taken).read_text() == "a user's own"
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["a.tar", "b-2.tar"]


def test_what_a_killed_prune_left_the_next_one_removes(store, monkeypatch):
    def killed(path, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(store, kinds=["stage1"])
    monkeypatch.undo()
    assert not store.has("stage1", BACKBONE)
    (left,) = store.root.glob("scratch/removing-*")
    assert [row.key for row in prune(store, kinds=["views"], dry_run=True).removed] == [VIEW]
    assert left.exists()
    prune(store, kinds=["views"])
    assert not left.exists()


def test_packing_in_parts(run, store, tailscope_, tmp_path):
    shown = run("pack", "--checkpoints", "--max-size", "20KB", "--out", tmp_path / "a.tar")
    assert [line.split(":")[0] for line in shown.out.splitlines()[:-1]] == [
        str(tmp_path / f"a-{n}.tar") for n in (1, 2, 3)
    ]
    parts = sorted(tmp_path.glob("a-*.tar"))
    assert json.loads(tailscope_("store", "add", *parts, "--store", tmp_path / "o", "--json").out)["added"] == [
        f"stage1/{BACKBONE}",
        f"stage2/{CLASSIFIER}",
        f"stage1/{UNFINISHED} (checkpoint)",
    ]


def test_what_differs_is_left_and_said(run, store, tailscope_, tmp_path):
    run("pack", "a1", "--out", tmp_path / "a.tar")
    other = Store(tmp_path / "other")
    other.get_or_make("stage1", BACKBONE, made)
    shown = tailscope_("store", "add", tmp_path / "a.tar", "--store", other.root)
    assert shown.code == 2
    assert (
        shown.err == f"error: stage1/{BACKBONE}: there with another content, and left; --replace takes the archive's\n"
    )
    assert_complete(other, key=BACKBONE)
    replaced = tailscope_("store", "add", tmp_path / "a.tar", "--store", other.root, "--replace")
    assert (replaced.code, replaced.out) == (0, "1 replaced\n")


MISTAKES = {
    "no store": (("list", "--store", "nowhere"), "--store nowhere: no such folder"),
    "no key": (("pack", "zz", "--out", "a.tar"), "zz: no such key among stage1, stage2, pretrained; .* holds 1 views"),
    "no kind": (
        ("pack", "--kind", "stage3", "--out", "a.tar"),
        "unknown --kind 'stage3'; did you mean 'stage2'",
    ),
    "no size": (("pack", "--max-size", "big", "--out", "a.tar"), "--max-size big: expected a size such as 2GiB"),
    "nothing to pack": (
        ("pack", "--kind", "checked", "--out", "a.tar"),
        "nothing to pack; it holds 1 views .*1 checkpoints",
    ),
    "too small": (("pack", "--max-size", "1KB", "--out", "a.tar"), "more than the limit of 1,000 allows"),
    "no archive": (("add", "none.tar"), "none.tar: no such file"),
    "no key to keep": (
        ("prune", "--kind", "stage1", "--keep", "zz"),
        "--keep zz: no such key in .*; nothing was removed",
    ),
    "nothing to prune": (("prune",), "say what may go: --kind, --scratch or --damaged; .* holds 1 views .*, 1 stage2"),
    "no kind to prune": (("prune", "--kind", "view"), "unknown --kind 'view'; did you mean 'views'"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(tailscope_, store, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAILSCOPE_STORE", str(store.root))
    shown = tailscope_("store", *arguments)
    assert (shown.code, shown.out) == (2, "")
    assert re.fullmatch(f"error: .*{message}.*\n", shown.err)
    assert not list(tmp_path.glob("*.tar"))


def test_which_store_has_to_be_said(tailscope_, monkeypatch):
    monkeypatch.delenv("TAILSCOPE_STORE", raising=False)
    assert "which store?" in tailscope_("store", "list").err
    shown = tailscope_("store")
    assert shown.code == 0
    assert all(verb in shown.out for verb in ("list", "verify", "pack", "add", "prune"))


@pytest.mark.parametrize("verb", ["list", "verify", "pack", "add", "prune"])
def test_every_help_has_an_example(tailscope_, verb):
    shown = tailscope_("store", verb, "--help").out
    assert f"tailscope store {verb}" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ({"kinds": ["views"]}, {VIEW}),
        ({"kinds": ["views", "stage2", "stage1"]}, {VIEW, CLASSIFIER, BACKBONE}),
        ({"kinds": ["views", "stage1"], "keep": ["a"]}, {VIEW}),
        ({"scratch": True}, {UNFINISHED}),
        ({"scratch": True, "keep": ["d4"]}, set()),
        ({"damaged": True}, {CLASSIFIER}),
        ({"kinds": ["views", "stage2"], "dry_run": True}, {VIEW, CLASSIFIER}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),  # a set has no order of its own
)
def test_pruning_takes_what_is_asked_for_and_nothing_else(store, options, gone):
    damage(store.tensors_file("stage2", CLASSIFIER))
    before = {row.key for row in inventory(store)}
    done = prune(store, **options)
    assert {row.key for row in done.removed} == gone
    order = [list(KINDS).index(row.kind) for row in done.removed]
    assert order == sorted(order)  # the easiest to make again first
    left = {row.key for row in inventory(store)}
    assert left == (before if options.get("dry_run") else before - gone)


def test_pruning_leaves_what_a_running_process_works_on(run, store):
    with (
        FileLock(store.root / "locks" / f"views-{VIEW}.lock"),
        FileLock(store.root / "locks" / f"stage1-{UNFINISHED}.lock"),
    ):
        shown = run("prune", "--kind", "views,stage2", "--scratch")
    assert shown.out.splitlines()[-1].startswith("1 removed, ")
    assert shown.out.splitlines()[-1].endswith("kB; 2 in use stayed")
    assert {row.key for row in inventory(store)} == {BACKBONE, VIEW, UNFINISHED}
    assert all(row.state == "verified" for row in verify(store))


@pytest.mark.parametrize("kind", ["stage2", "checkpoint"])
def test_what_another_process_mends_before_it_is_pruned_stays(store, monkeypatch, kind):
    path = store.tensors_file("stage2", CLASSIFIER)
    if kind == "checkpoint":
        path = store.scratch("stage1", UNFINISHED) / CHECKPOINT
    whole = path.read_bytes()
    damage(path)
    held = Store.held

    def mended_meanwhile(*place):
        path.write_bytes(whole)
        return held(*place)

    monkeypatch.setattr(Store, "held", mended_meanwhile)
    assert prune(store, damaged=True).removed == []
    assert path.read_bytes() == whole
    assert [row.state for row in verify(store)] == ["verified"] * 4
    removed = prune(store, damaged=True, kinds=["stage2"]).removed  # asked for by name, whole or not
    assert [row.key for row in removed] == [CLASSIFIER]


def test_pruning_what_is_damaged_keeps_the_checkpoint_before(store):
    path = store.scratch("stage1", UNFINISHED) / CHECKPOINT
    save_tensors(path, TENSORS, {"epochs": 8})
    damage(path)
    assert [row.name for row in prune(store, damaged=True).removed] == [f"stage1/{UNFINISHED} (checkpoint)"]
    assert store.checkpoint("stage1", UNFINISHED) == {"epochs": 7}
    assert [row.state for row in verify(store)] == ["verified"] * 4
