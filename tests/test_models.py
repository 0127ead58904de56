import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tailscope.models import MODELS, count_parameters
from tailscope.models.batchnorm import BatchNorm2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_batch_norm_agrees_with_torch(dtype):
    x = (3 * torch.randn(16, 8, 5, 5) + 1).to(memory_format=torch.channels_last).to(dtype)
    ours, theirs = BatchNorm2d(8), nn.BatchNorm2d(8)
    for norm in (ours, theirs):
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 8))
            norm.bias.copy_(torch.linspace(-1, 1, 8))
    upstream = torch.randn(16, 8, 5, 5).to(dtype)
    results = []
    for forward, norm in ((ours._one_pass, ours), (theirs, theirs)):
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        out.backward(upstream)
        results.append((out, leaf.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    for mine, expected in zip(*results, strict=True):
        assert mine.dtype == expected.dtype
        torch.testing.assert_close(mine.float(), expected.float(), **tolerance)


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
