"""Methods from outside the package: they run from every verb, their source is in the key, and mistakes are one line."""

import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from experiment_setups import settings
from image_trees import photos
from tailscope import plugins
from tailscope.errors import UserError
from tailscope.experiments.compare import CompareSettings
from tailscope.methods import LOSSES
from tailscope.registry import Registry
from tailscope.training.contract import EVERY

PAGE = (Path(__file__).parents[1] / "docs" / "howto-plugin.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"```py title=\"my_methods.py\"\n(.*?)```", PAGE, re.DOTALL)[1]
"""The file that the documentation shows."""
LOSS = """
from tailscope.methods import LOSSES

@LOSSES.register("{name}")
def made(counts, /, a: float = 1.0):
    '''A loss.'''
    return lambda logits, labels: (logits.float() ** 2).sum(1){more}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return an empty current folder; what is registered and imported in the test is forgotten after it."""
    importlib.import_module("tailscope.classifiers.estimators")
    before = [dict(registry._registered) for registry in EVERY]
    modules, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)

    def forget():
        for registry, entries in zip(EVERY, before, strict=True):
            registry._registered.clear()
            registry._registered.update(entries)
        for name in set(sys.modules) - modules:
            if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
        importlib.invalidate_caches()
        sys.path[:] = path

    yield Folder(tmp_path, forget)
    forget()


class Folder:
    """The current folder, and what makes this process as good as a new one."""

    def __init__(self, path, forget):
        self.path, self.forget = path, forget

    def write(self, name, text):
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_text(text)


def sha256_of(name):
    return LOSSES.plugin(name).sha256


# -- the example of the documentation -------------------------------------------------------------------------------

SWAP = (
    "swap", "--data", "digits", "--recipe", "demo", "--import", "my_methods", "--model", "resnet14(width=4)",
    "--loss", "mine(power=1)", "--sampler", "bootstrap", "--stage2-loss", "mine", "--seeds", 1, "--out", "out",
)  # fmt: skip


def test_the_example_trains_and_is_recalled_until_its_source_changes(tailscope_, folder):
    folder.write("my_methods.py", EXAMPLE)
    first = tailscope_(*SWAP)
    assert (first.code, first.err) == (0, "")
    assert "Nothing was trained" not in first.out
    stored = json.loads(Path("out/swap.json").read_text())
    recipe, (plugin,) = stored["spec"]["recipe"], stored["environment"]["plugins"]
    assert [recipe[name] for name in ("model", "loss", "sampler", "stage2_loss")] == [
        "resnet14(width=4)", "mine(power=1.0)", "bootstrap", "mine(power=0.5)",
    ]  # fmt: skip
    assert (plugin["name"], plugin["version"]) == ("my_methods", None)
    assert stored["spec"]["plugins"] == {"my_methods": plugin["sha256"]}
    assert plugin["sha256"][:16] in Path("out/report.html").read_text()
    trained = stage_specs("stage1") + stage_specs("stage2")
    assert {tuple(map(tuple, spec["plugins"])) for spec in trained} == {(("my_methods", plugin["sha256"]),)}

    folder.forget()
    again = tailscope_(*SWAP)
    assert (again.code, again.err) == (0, "")
    assert "Nothing was trained: all 6 stages were in the store." in again.out

    folder.forget()
    folder.write("my_methods.py", EXAMPLE.replace("cross_entropy(logits.float()", "0.5 * cross_entropy(logits.float()"))
    refused = tailscope_(*SWAP)
    assert (refused.code, refused.out) == (2, "")
    assert "holds a result of another spec (plugins differ)" in refused.err
    changed = tailscope_(*SWAP, "--overwrite")
    assert (changed.code, changed.err) == (0, "")
    assert "Nothing was trained" not in changed.out
    other = json.loads(Path("out/swap.json").read_text())
    keys = [{row["key"] for row in result["provenance"]} for result in (stored, other)]
    assert keys[0] & keys[1] == set()
    assert len(stage_specs("stage1")) == 4

    folder.forget()
    folder.write("my_methods.py", EXAMPLE)
    back = tailscope_(*SWAP, "--overwrite")
    assert "Nothing was trained" in back.out


SYSTEM = """
from tailscope.methods import SYSTEMS
from tailscope.methods.systems import System

@SYSTEMS.register("whole")
def whole() -> System:
    '''The loss of another plug-in.'''
    return System(stage1={"loss": "mine"})
"""


@pytest.mark.parametrize(
    ("methods", "named"), [("ce; la", []), ("ce; loss:mine", ["my_methods"]), ("ce; nearest_mean", ["my_methods"])]
)
def test_a_comparison_names_the_plugins_of_its_methods(folder, methods, named):
    folder.write("my_methods.py", EXAMPLE)
    plugins.load("my_methods")
    compared = CompareSettings.model_validate({**dict(settings()), "methods": methods})
    assert [one.name for one in compared.plugins()] == named


def test_a_comparison_is_not_overwritten_by_one_of_another_source(tailscope_, folder):
    folder.write("my_methods.py", EXAMPLE)
    folder.write("systems.py", SYSTEM)
    compare = (
        "compare", "--data", "digits", "--profile", "exp:20", "--recipe", "demo", "--seeds", 1, "--gaps", "none",
        "--import", "my_methods", "--import", "systems", "--methods", "ce; whole", "--out", "out",
    )  # fmt: skip
    first = tailscope_(*compare)
    assert (first.code, first.err) == (0, "")
    stored = json.loads(Path("out/compare.json").read_text())
    named = {plugin["name"]: plugin["sha256"] for plugin in stored["environment"]["plugins"]}
    assert stored["spec"]["plugins"] == named
    assert list(named) == ["my_methods", "systems"]
    folder.forget()
    folder.write("my_methods.py", EXAMPLE + "# changed\n")
    refused = tailscope_(*compare)
    assert (refused.code, "holds a result of another spec (plugins differ)" in refused.err) == (2, True)


PLAIN_NETWORK = """
from torch import nn
from tailscope.networks import MODELS

class Net(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        convolution = nn.Conv2d(channels, 8, 3, stride=2, padding=1)
        self.body = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.feature_dim, self.classifier = 32, nn.Linear(32, classes)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.classifier(self.features(x))

@MODELS.register("own_net")
def own_net(in_channels, num_classes, /):
    '''One convolution.'''
    return Net(in_channels, num_classes)
"""


def test_a_network_of_any_class_trains_and_gives_features(tailscope_, folder):
    folder.write("nets.py", PLAIN_NETWORK)
    checked = tailscope_("methods", "--import", "nets", "--check", "own_net")
    assert (checked.code, "failed" in checked.out) == (0, False), checked.out
    swap = ("swap", "--data", "digits", "--recipe", "demo", "--model", "own_net", "--seeds", 1, "--bn-mode", "shifted")
    trained = tailscope_(*swap, "--import", "nets", "--backbones", "lt", "--out", "out")
    assert (trained.code, trained.err) == (0, "")
    key = json.loads(Path("out/swap.json").read_text())["provenance"][0]["key"]
    features = ("features", "--model", f"store:{key}", "--store", "out/store", "--data", "digits", "--split", "test")
    made = tailscope_(*features, "--import", "nets", "--out", "f.npz")
    assert (made.code, made.err) == (0, "")
    stored = [load_file(path)["features"] for path in Path("out/store/features").glob("*/tensors.safetensors")]
    with np.load("f.npz") as found:  # the other is of shifted statistics
        assert [np.allclose(found["features"], one, rtol=1e-4, atol=1e-5) for one in stored].count(True) == 1
    folder.forget()
    without = tailscope_(*features, "--out", "g.npz")
    assert (without.code, "names in a file are only looked up" in without.err) == (2, True)
    assert "it was trained with --import nets" in without.err
    folder.write("nets.py", PLAIN_NETWORK.replace("self.body(x)", "2 * self.body(x)"))
    changed = tailscope_(*features, "--import", "nets", "--out", "g.npz")
    assert (changed.code, "nets has changed since its network own_net was trained" in changed.err) == (2, True)
    folder.forget()


REST = """
import torch
from tailscope.methods import AUGMENTATIONS, MIXINGS
from tailscope.methods.mixing import Mix
from tailscope.training import SCHEDULES
from tailscope.training.recipes import PARAMETRISED, Recipe, recipe_by_name

@AUGMENTATIONS.register("dim")
def dim(factor: float = 0.5):
    '''Darkens every image.'''
    return lambda images, generator: (images.float() * factor).to(torch.uint8)

class Halves:
    def draw(self, labels, size, generator):
        half = torch.full((len(labels), 1), 0.5)
        return Mix(half.view(-1, 1, 1, 1, 1), half, torch.rand(labels.shape, generator=generator).argsort(1))

@MIXINGS.register("halves")
def halves():
    '''The mean of two images.'''
    return Halves()

@SCHEDULES.register("flat")
def flat(steps, steps_per_epoch, /):
    '''Always the base rate.'''
    return [1.0] * steps

@PARAMETRISED.register("own")
def own(learning_rate: float = 0.05) -> Recipe:
    '''A few steps, of dim images.'''
    demo = recipe_by_name("demo")
    stage1 = demo.stage1.model_copy(update={"learning_rate": learning_rate, "schedule": "flat"})
    return Recipe(**{**demo.model_dump(), "name": "own", "stage1": stage1, "augment": ("dim",), "autoaugment": "flip"})
"""


def test_a_recipe_with_parts_of_its_own_trains_and_its_views_depend_on_them(tailscope_, folder):
    folder.write("rest.py", REST)
    for name in ("dim", "halves", "flat", "own"):
        checked = tailscope_("methods", "--import", "rest", "--check", name)
        assert (checked.code, "failed" in checked.out) == (0, False), checked.out
        folder.forget()
    swap = ("swap", "--data", "digits", "--seeds", 1, "--backbones", "lt", "--import", "rest", "--mix", "halves")
    for recipe, rate in (("own", 0.05), ("own(learning_rate=0.01)", 0.01)):
        done = tailscope_(*swap, "--recipe", recipe, "--out", "out", "--overwrite")
        assert (done.code, done.err) == (0, "")
        stored = json.loads(Path("out/swap.json").read_text())["spec"]["recipe"]
        assert (stored["name"], stored["stage1"]["learning_rate"], stored["always_mix"]) == (recipe, rate, "halves")
        folder.forget()
    views = len(list(Path("out/store/views").glob("*/tensors.safetensors")))
    assert "Nothing was trained" in tailscope_(*swap, "--recipe", "own", "--out", "b", "--store", "out/store").out
    folder.forget()
    folder.write("rest.py", REST.replace("images.float() * factor", "images.float() * factor * 0.9"))
    assert "Nothing was trained" not in tailscope_(*swap, "--recipe", "own", "--out", "c", "--store", "out/store").out
    assert len(list(Path("out/store/views").glob("*/tensors.safetensors"))) > views
    assert "unknown --recipe 'onw'; did you mean 'own'?" in tailscope_(*swap, "--recipe", "onw").err


def stage_specs(kind):
    return [json.loads(path.read_text())["spec"] for path in Path("out/store").glob(f"{kind}/*/meta.json")]


def test_a_stage_that_names_nothing_of_a_plugin_does_not_depend_on_it(tailscope_, folder):
    plain = ("swap", "--data", "digits", "--recipe", "demo", "--seeds", 1, "--backbones", "lt")
    assert tailscope_(*plain, "--out", "out").code == 0
    folder.write("my_methods.py", EXAMPLE)
    assert "Nothing was trained" in tailscope_(*plain, "--out", "out", "--import", "my_methods.py").out
    mixed = tailscope_(*plain, "--out", "b", "--store", "out/store", "--import", "my_methods", "--stage2-loss", "mine")
    assert (mixed.code, mixed.err) == (0, "")
    assert len(stage_specs("stage1")) == 1  # the loss of stage 2 is none of its business


def test_the_example_keeps_every_promise(tailscope_, folder):
    folder.write("my_methods.py", EXAMPLE)
    for name in ("mine(power=1)", "bootstrap", "resnet14(width=4)", "nearest_mean"):
        checked = tailscope_("methods", "--import", "my_methods", "--check", name, "--json")
        folder.forget()
        outcomes = json.loads(checked.out)["checks"]
        assert (checked.code, [one for one in outcomes if not one["passed"]]) == (0, [])
        assert len(outcomes) >= 3


def test_the_classifier_of_the_example_is_a_remedy(tailscope_, folder):
    stream = np.random.default_rng(0)
    for name, counts in (("train", [60, 20, 8]), ("held-out", [30, 30, 30])):
        labels = np.repeat(np.arange(3), counts)
        features = (3 * np.eye(3, 8)[labels] + stream.normal(size=(len(labels), 8))).astype(np.float32)
        np.savez(f"{name}.npz", features=features, labels=labels)
    folder.write("my_methods.py", EXAMPLE)
    command = ("diagnose", "--train", "train.npz", "--unseen", "held-out.npz", "--permutations", 19, "--no-report")
    shown = tailscope_(*command, "--import", "my_methods", "--remedy", "nearest_mean", "--out", "d")
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(Path("d/diagnosis.json").read_text())
    tried = found["accuracy"]["rebalanced"]["remedies"]["nearest_mean"]
    with np.load("train.npz") as train, np.load("held-out.npz") as unseen:
        means = np.stack([train["features"][train["labels"] == k].mean(axis=0) for k in range(3)])
        distances = ((unseen["features"][:, None] - means) ** 2).sum(axis=2)
        assert tried == pytest.approx((distances.argmin(axis=1) == unseen["labels"]).mean(), abs=0.03)
    assert found["spec"]["remedies"] == ["nearest_mean"]
    assert [plugin["name"] for plugin in found["environment"]["plugins"]] == ["my_methods"]


def test_methods_lists_what_is_registered_outside(tailscope_, folder):
    folder.write("my_methods.py", EXAMPLE)
    listed = json.loads(tailscope_("methods", "--import", "my_methods", "--json").out)
    ours = {(kind, entry["name"]) for kind, entries in listed.items() if kind != "profiles" for entry in entries}
    assert ours >= {("losses", "mine"), ("models", "resnet14"), ("classifiers on features", "nearest_mean")}


# -- checks ---------------------------------------------------------------------------------------------------------

BROKEN = """
import torch
from torch.nn.functional import cross_entropy
from tailscope.methods import LOSSES, SAMPLERS

@LOSSES.register("mean_loss")
def mean_loss(counts, /):
    '''One number for all.'''
    return lambda logits, labels: cross_entropy(logits.float(), labels)

@LOSSES.register("first_class_loss")
def first_class_loss(counts, /):
    '''Treats the first class better than others.'''
    weights = torch.ones(len(counts))
    weights[0] = 0.1
    return lambda logits, labels: weights[labels] * cross_entropy(logits.float(), labels, reduction="none")

@LOSSES.register("infinite_loss")
def infinite_loss(counts, /):
    '''Takes the logarithm of 0.'''
    return lambda logits, labels: -logits.float().softmax(1).log().gather(1, labels[:, None])[:, 0]

@SAMPLERS.register("careless")
def careless(labels, num_classes, /):
    '''Draws from the default generator.'''
    return lambda n, generator: torch.randint(len(labels), (n,))

@SAMPLERS.register("beyond")
def beyond(labels, num_classes, /):
    '''Draws what is not there.'''
    return lambda n, generator: torch.full((n,), len(labels))

@SAMPLERS.register("failing")
def failing(labels, num_classes, /):
    '''Fails.'''
    return lambda n, generator: {}["key"]
"""


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mean_loss", "losses of torch.float32 logits are torch.float32 [], not torch.float32 [32]"),
        ("first_class_loss", "classes in another order have other losses"),
        ("infinite_loss", "is not finite"),
        ("careless", "it draws from the default generator of PyTorch"),
        ("beyond", "of 58 images it draws others"),
        ("failing", "it raises: KeyError: 'key' (broken.py line 36)"),
    ],
)
def test_a_promise_that_is_not_kept_has_a_reason_and_an_exit_code(tailscope_, folder, name, reason):
    folder.write("broken.py", BROKEN)
    checked = tailscope_("methods", "--import", "broken", "--check", name)
    assert (checked.code, checked.err) == (1, "")
    assert reason in " ".join(checked.out.split())
    assert "failed" in checked.out


def test_what_is_checked_must_be_there(tailscope_, folder):
    shown = tailscope_("methods", "--check", "focl")
    assert (shown.code, "did you mean 'focal'?" in shown.err) == (2, True)
    shown = tailscope_("methods", "--check", "focal(alpha=1)")
    assert (shown.code, "unknown argument 'alpha'" in shown.err) == (2, True)


# -- the source -----------------------------------------------------------------------------------------------------


def digest_of(folder, files, name="plug"):
    folder.forget()
    for path in folder.path.rglob("*.py"):
        path.unlink()
    for path, text in files.items():
        folder.write(path, text)
    plugins.load(name)
    return sha256_of("mine")


def test_the_digest_is_of_all_that_a_plugin_is_made_of(folder):
    loss, package = LOSS.format(name="mine", more=""), {"plug/__init__.py": "from plug import losses"}
    alone = digest_of(folder, {"plug.py": loss})
    assert digest_of(folder, {"plug.py": loss, "other.py": "x = 1"}) == alone
    assert digest_of(folder, {"plug.py": loss.replace("\n", "\r\n")}) == alone
    texts = [
        {"plug.py": LOSS.format(name="mine", more=" + 1")},
        {"plug.py": f"import helper\n{loss}", "helper.py": "x = 1"},
        {"plug.py": f"import helper\n{loss}", "helper.py": "x = 2"},
        {"plug.py": f"import helper\n{loss}", "helper.py": "import further", "further.py": "x = 1"},
        {"plug.py": f"import helper\n{loss}", "helper.py": "import further", "further.py": "x = 2"},
        {"plug.py": f"def f():\n    from helper.a import x\n{loss}", "helper/a.py": "x = 1"},
        {"plug.py": f"def f():\n    from helper.a import x\n{loss}", "helper/a.py": "x = 2"},
        {**package, "plug/losses.py": loss},
        {**package, "plug/losses.py": loss, "plug/sub/more.py": "x = 1"},
        {**package, "plug/losses.py": f"import helper\n{loss}", "helper.py": "x = 1"},
    ]
    texts.append({**package, "plug/losses.py": loss, "plug/template.py": "def {{ name }}(:"})
    digests = [alone, *(digest_of(folder, files) for files in texts)]
    assert len(set(digests)) == len(digests)


def test_the_digest_is_of_the_source_when_it_was_imported(folder):
    digest_of(folder, {"plug.py": LOSS.format(name="mine", more="")})
    before = sha256_of("mine")
    folder.write("plug.py", LOSS.format(name="mine", more=" + 100"))
    assert sha256_of("mine") == before


def test_a_package_of_its_own_version_says_it(folder):
    digest_of(folder, {"plug/__init__.py": f"__version__ = '1.2'\n{LOSS.format(name='mine', more='')}"})
    assert LOSSES.plugin("mine").version == "1.2"
    assert LOSSES.plugin("mine").name == "plug"
    assert LOSSES.plugin("focal") is None


def test_a_notebook_registers_again_and_what_has_no_source_is_refused(monkeypatch):
    things = Registry("thing")
    notebook = {"__name__": "__main__", "things": things}
    source = "@things.register('a')\ndef a(context, /):\n    return 1\n"
    with pytest.raises(UserError, match=r"its source cannot be read .* put it into a file"):
        exec(source, notebook)
    monkeypatch.setattr("inspect.getsource", lambda _: source)
    exec(source, notebook)
    exec(source, notebook)
    assert things.plugin("a") == plugins.Plugin("__main__", None, hashlib.sha256(source.encode()).hexdigest())


# -- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "name", "says"),
    [
        (
            {"my_methods.py": ""},
            "my_method",
            "no module of that name in the current folder or on PYTHONPATH; did you",
        ),
        ({}, "gone.py", "--import gone.py: no such file"),
        ({}, "my-methods", "no module can have this name"),
        (
            {"a.py": "import gone_too"},
            "a",
            "cannot be imported: ModuleNotFoundError: No module named 'gone_too' (a.py",
        ),
        ({"a.py": "x = 1\ny = z"}, "a", "cannot be imported: NameError: name 'z' is not defined (a.py line 2)"),
        ({"a.py": "def f(:"}, "a.py", "cannot be imported: SyntaxError: "),
        ({"a.py": "import sys; sys.exit(3)"}, "a", "cannot be imported: SystemExit: 3 (a.py line 1)"),
        (
            {"a.py": LOSS.format(name="focal", more="")},
            "a",
            "loss 'focal' is registered twice, by tailscope and a",
        ),
        ({"a.py": 2 * LOSS.format(name="mine", more="")}, "a", "loss 'mine' is registered twice, by a; take another"),
        ({"a.py": LOSS.format(name="two words", more="")}, "a", "expected a name of letters, digits and underscores"),
        ({"a.py": LOSS.format(name="b", more="").replace(" = 1.0", "")}, "a", "hyperparameters without a default: a"),
        ({"json.py": "x = 1"}, "json.py", "there is another module json"),
        ({"a.py": "import b", "b.py": "x = 1 / 0"}, "a", "ZeroDivisionError: division by zero (b.py line 1)"),
    ],
)
def test_a_mistake_is_one_true_line(tailscope_, folder, files, name, says):
    for path, text in files.items():
        folder.write(path, text)
    shown = tailscope_("methods", "--import", name)
    assert (shown.code, shown.out) == (2, "")
    assert says in shown.err
    assert shown.err.count("\n") == 1


def test_two_plugins_of_one_name_are_told_apart_in_the_message(folder):
    for name in ("a", "b"):
        folder.write(f"{name}.py", LOSS.format(name="mine", more=""))
    plugins.load("a")
    plugins.load("a")  # it is imported already
    with pytest.raises(UserError, match="loss 'mine' is registered twice, by a and b; take another name"):
        plugins.load("b")


def test_an_unknown_method_is_answered_with_the_nearest_of_the_plugin(tailscope_, folder):
    folder.write("my_methods.py", EXAMPLE)
    shown = tailscope_("swap", "--data", "digits", "--import", "my_methods", "--loss", "mien")
    assert (shown.code, "unknown loss 'mien'; did you mean 'mine'?" in shown.err) == (2, True)


# -- installed plug-ins ---------------------------------------------------------------------------------------------


def installed(folder, monkeypatch, module, text):
    folder.write(f"site/{module}.py", text)
    folder.write(f"site/{module}-3.1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {module}\nVersion: 3.1\n")
    folder.write(f"site/{module}-3.1.dist-info/entry_points.txt", f"[tailscope.plugins]\nown = {module}\n")
    monkeypatch.syspath_prepend(folder.path / "site")
    monkeypatch.setattr(plugins, "_installed_are_loaded", False)


def test_an_installed_plugin_needs_no_import(folder, monkeypatch, tailscope_):
    installed(folder, monkeypatch, "their_methods", LOSS.format(name="theirs", more=""))
    assert "theirs" in tailscope_("methods").out
    found = LOSSES.plugin("theirs(a=2)")
    assert (found.name, found.version) == ("their_methods", "3.1")
    folder.forget()


def test_an_installed_plugin_that_fails_is_named(folder, monkeypatch, tailscope_):
    installed(folder, monkeypatch, "bad_methods", "1 / 0")
    shown = tailscope_("methods")
    assert shown.code == 2
    assert "the installed plug-in own: cannot be imported: ZeroDivisionError" in shown.err
    assert "repair or uninstall bad_methods" in shown.err


# -- other processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_that_train_together_import_the_same_plugins(folder):
    for split in ("train", "test"):
        photos(folder.path, [12, 12, 12], split=split, side=20)
    folder.write("my_methods.py", EXAMPLE)
    swap = (
        "swap", "--data", "list:train.txt,test.txt", "--profile", "exp:3", "--recipe",
        "imagenet(size=24, width=4, epochs=2, batch=16, learning_rate=0.005, views=1)", "--import", "my_methods",
        "--model", "resnet14(width=4)", "--loss", "mine", "--sampler", "bootstrap", "--stage2-loss", "mine",
        "--seeds", "1", "--devices", "2", "--device", "cpu", "--out", "out", "--workers", "0",
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "tailscope", *swap], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert {spec["loss"] for spec in stage_specs("stage1")} == {"mine(power=0.5)"}
