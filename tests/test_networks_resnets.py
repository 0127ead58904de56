import pytest
import torch
from torch.nn import functional as F

from tailscope.networks import MODELS
from tailscope.networks.resnets import count_parameters


@pytest.mark.parametrize(("name", "parameters"), [("resnet20", 269_722), ("resnet32", 464_154), ("resnet56", 853_018)])
def test_parameters_are_those_of_the_published_networks(name, parameters):
    """0.27, 0.46 and 0.85 million: He et al. 2016, table 6."""
    assert count_parameters(MODELS.make(name, 3, 10)) == parameters


@pytest.mark.parametrize("entry", [e.name for e in MODELS if e.name.startswith("resnet") and e.name != "resnet10"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 9, 7)])
def test_forward_is_classifier_of_features(entry, shape):
    model = MODELS.make(entry, shape[0], 5).eval()
    x = torch.randn(2, *shape)
    features = model.features(x)
    assert features.shape == (2, model.feature_dim)
    torch.testing.assert_close(model(x), model.classifier(features))


def test_option_a_shortcut_subsamples_and_pads_with_zeros():
    block = MODELS.make("resnet8", 3, 2).layer2[0].eval()
    with torch.no_grad():
        block.bn2.weight.zero_()
        block.bn2.bias.zero_()
    x = torch.rand(1, 8, 6, 6)
    out = block(x)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
    torch.testing.assert_close(out, expected)
