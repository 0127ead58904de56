"""The classifier that a diagnosis recommends, in a user's hands: as a file, an estimator, and in the network itself."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from typer.testing import CliRunner

import tailscope
from tailscope import cli
from tailscope.errors import UserError
from tailscope.networks import MODELS

FACTOR, MOST = 20, 100
COUNTS = [max(5, round(MOST * FACTOR ** (-k / 9))) for k in range(10)]
FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.ReLU())
        self.fc = nn.Linear(32, 10)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.fc(self.body(x))
"""


def split():
    """Digits: a long-tailed training set, 30 held-out samples of every class, and the rest to test on."""
    digits = load_digits()
    images = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    rng, parts = np.random.default_rng(0), ([], [], [])
    for k, count in enumerate(COUNTS):
        rows = rng.permutation(np.flatnonzero(digits.target == k))
        for part, chosen in zip(parts, (rows[:count], rows[-60:-30], rows[-30:]), strict=True):
            part.extend(chosen)
    return [(images[part], torch.from_numpy(digits.target[part])) for part in parts]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network trained on the long tail, its checkpoint, and a diagnosis of it with what that wrote."""
    folder = tmp_path_factory.mktemp("rebalance")
    (folder / "mine_rebalanced.py").write_text(FACTORY)
    namespace: dict = {}
    exec(FACTORY, namespace)
    torch.manual_seed(0)
    network = namespace["Net"]()
    train, unseen, test = split()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(train[0]), train[1]).backward()
        optimizer.step()
    network.eval()
    torch.save({"model": network.state_dict(), "epoch": 150}, folder / "w.pth")
    result = tailscope.diagnose(train, unseen, test=test, model=network, out=folder / "out", permutations=99)
    return folder, network, result


def accuracy(network, part):
    with torch.no_grad():
        return float((network(part[0]).argmax(1) == part[1]).float().mean())


def test_the_patched_checkpoint_gains_what_was_promised(trained, monkeypatch):
    folder, network, result = trained
    monkeypatch.chdir(folder)
    given = ["rebalance", "out", "--model", "mine_rebalanced:Net", "--checkpoint", "w.pth"]
    done = CliRunner().invoke(cli.app, given)
    assert done.exit_code == 0, done.output
    assert done.output.count("\n") == 1  # no doubt about the order of the classes
    held = torch.load(folder / "out" / "w-rebalanced.pth", weights_only=True)
    assert held["epoch"] == 150
    before, (_, _, test) = accuracy(network, split()[2]), split()
    network.load_state_dict(held["model"])
    try:
        after = accuracy(network, test)
    finally:
        network.load_state_dict(torch.load(folder / "w.pth", weights_only=True)["model"])
    gain = result["verdict"]["rebalancing_gap"]
    assert gain["points"] > 0.02
    assert gain["ci95"][0] <= after - before <= gain["ci95"][1]
    assert result["accuracy"]["rebalanced"]["layer"] == result["accuracy"]["rebalanced"]["classifier"]
    assert after == pytest.approx(result["accuracy"]["rebalanced"]["mean"], abs=1e-6)


def test_the_estimator_and_the_file_are_the_same_classifier(trained):
    folder, network, result = trained
    _, _, (images, labels) = split()
    given = result.rebalanced()
    features = network.features(images).detach().numpy()
    names = given.estimator().predict(features)
    assert (names == labels.numpy().astype(str)).mean() == pytest.approx(result["accuracy"]["rebalanced"]["mean"])
    with np.load(folder / "out" / "rebalanced.npz") as stored:
        assert np.array_equal(stored["weight"], given.weight)
        assert np.array_equal(stored["bias"], given.bias)
        logits = features @ stored["weight"].T + stored["bias"]
        assert np.array_equal(stored["class_names"][logits.argmax(1)], names)
    again = tailscope.diagnose(
        *[(network.features(part[0]).detach(), part[1]) for part in split()[:2]],
        classifier=given.layer,
        test=(features, labels),
        permutations=0,
    )
    assert again["accuracy"]["current"]["mean"] == pytest.approx(result["accuracy"]["rebalanced"]["mean"])


def test_scaled_features_get_a_classifier_of_their_own_scale():
    """Features are computed with at a power of two that suits them; what is returned is of those that were given."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 6)) * 1e-20

    def draw(counts):
        labels = np.repeat(np.arange(4), counts)
        return centres[labels] + rng.normal(size=(len(labels), 6)) * 9e-21, labels

    train, unseen, test = draw([80, 40, 10, 5]), draw(40), draw(100)
    given = tailscope.diagnose(train, unseen, test=test, permutations=0)
    reached = (given.rebalanced().estimator().predict(test[0].astype(np.float64)) == test[1].astype(str)).mean()
    assert reached == pytest.approx(given["accuracy"]["rebalanced"]["mean"], abs=0.01)


def test_a_classifier_that_gains_nothing_is_not_handed_out():
    labels = np.repeat(np.arange(4), [80, 40, 10, 5]), np.repeat(np.arange(4), 40)
    rng = np.random.default_rng(0)
    apart = [(100 * np.eye(4)[y] + rng.normal(size=(len(y), 4)), y) for y in labels]
    result = tailscope.diagnose(*apart, permutations=0)
    assert result["verdict"]["rebalancing_gap"]["points"] == 0
    with pytest.raises(UserError, match="recommends no classifier"):
        result.rebalanced()


def test_where_nothing_can_be_recommended_there_is_no_classifier(tmp_path):
    rng = np.random.default_rng(0)
    noise = [(rng.normal(size=(n * 4, 5)), np.repeat(np.arange(4), n)) for n in (40, 30)]
    result = tailscope.diagnose(*noise, out=tmp_path, permutations=0)
    assert not (tmp_path / "rebalanced.npz").exists()
    with pytest.raises(UserError, match="recommends no classifier"):
        result.rebalanced()


def test_a_gain_that_may_be_chance_is_not_handed_out(tmp_path):
    rng = np.random.default_rng(0)
    centres = 1.5 * rng.normal(size=(3, 4))
    labels = [np.repeat(np.arange(3), counts) for counts in ([60, 20, 8], [15] * 3, [10] * 3)]
    train, unseen, test = [(centres[y] + rng.normal(size=(len(y), 4)), y) for y in labels]
    result = tailscope.diagnose(train, unseen, test=test, out=tmp_path, permutations=0, report=False)
    gain = result["verdict"]["rebalancing_gap"]
    assert gain["points"] > 0 > gain["ci95"][0]
    assert result["advice"][0]["text"].startswith("Leave the classifier as it is")
    assert not (tmp_path / "rebalanced.npz").exists()
    with pytest.raises(UserError, match="its diagnosis recommends no classifier"):
        tailscope.rebalance(tmp_path, "resnet20", tmp_path / "w.pth")


def test_mistakes_are_one_line(trained, monkeypatch, tmp_path):
    folder, _, _ = trained
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="holds no diagnosis; give the folder that"):
        tailscope.rebalance(tmp_path, "mine_rebalanced:Net", folder / "w.pth")
    torch.save(MODELS.make("resnet20", 3, 7).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"the new classifier's \[10, 32\]"):
        tailscope.rebalance(folder / "out", "resnet20", tmp_path / "other.pth")
    tailscope.rebalance(folder / "out", "mine_rebalanced:Net", folder / "w.pth", to=tmp_path / "new.pth")
    with pytest.raises(UserError, match="is there already"):
        tailscope.rebalance(folder / "out", "mine_rebalanced:Net", folder / "w.pth", to=tmp_path / "new.pth")


@pytest.fixture(scope="module")
def by_name(trained):
    """Diagnoses of the network's features under names of classes, without its classifier: by order of the names."""
    folder, network, _ = trained
    orders = {
        "same": [f"digit {k}" for k in range(10)],
        "other": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
        "exchanged": [f"digit {k}" for k in [0, 1, 2, 3, 4, 6, 5, 7, 8, 9]],
    }
    for order, names in orders.items():
        given = [(network.features(x).detach(), np.array(names)[y]) for x, y in split()]
        tailscope.diagnose(*given[:2], test=given[2], out=folder / order, permutations=0, report=False)
    return folder


def rebalance(folder, out, monkeypatch):
    monkeypatch.chdir(folder)
    return CliRunner().invoke(
        cli.app, ["rebalance", out, "--model", "mine_rebalanced:Net", "--checkpoint", "w.pth"], catch_exceptions=True
    )


@pytest.mark.parametrize(
    ("out", "said"), [("other", "“eight” is output 8 and not 0"), ("exchanged", "is output 6 and")]
)
def test_classes_in_another_order_are_refused(by_name, monkeypatch, out, said):
    done = rebalance(by_name, out, monkeypatch)
    assert isinstance(done.exception, UserError)
    assert "rebalanced.npz and w.pth: their classes are in different orders" in str(done.exception)
    assert said in str(done.exception)
    assert not (by_name / out / "w-rebalanced.pth").exists()


def test_the_order_of_classes_that_no_names_confirm_is_said(by_name, monkeypatch):
    done = rebalance(by_name, "same", monkeypatch)
    assert "taken to be classes in the order of the diagnosis: digit 0, digit 1, digit 2," in done.output
    held = torch.load(by_name / "same" / "w-rebalanced.pth", weights_only=True)["model"]
    with np.load(by_name / "same" / "rebalanced.npz") as stored:
        assert np.array_equal(held["fc.weight"].numpy(), stored["weight"])


def test_a_diagnosis_without_advice_leaves_no_classifier_of_an_earlier_one(tmp_path):
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(40, 4)).astype(np.float32), np.repeat([0, 1], 20))
    (tmp_path / "rebalanced.npz").write_bytes(b"of before")
    tailscope.diagnose(table, table, out=tmp_path, verdict=False, permutations=0, report=False)
    assert not (tmp_path / "rebalanced.npz").exists()
    assert (tmp_path / "diagnosis.json").is_file()
