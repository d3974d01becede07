"""`linear` equals torch's linear in values and in gradients, with oneDNN and without."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hark.models import linear as module
from hark.models.linear import Linear, linear, use_onednn

# Sums of 64 products of size 1 in another order: some 1e-6 of values up to 30.
TOLERANCE = dict(atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 64), (3, 1, 64), (0, 64)])
def test_values_and_gradients_are_those_of_torch(shape, bias):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, generator=generator, requires_grad=True) for size in (shape, (96, 64), (96,))]
    tensors = tensors if bias else tensors[:2]
    expected, got = F.linear(*tensors), linear(*tensors)
    torch.testing.assert_close(got, expected, **TOLERANCE)
    wanted = torch.randn(expected.shape, generator=generator)
    both = [torch.autograd.grad((result * wanted).sum(), tensors) for result in (expected, got)]
    for theirs, ours in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(linear(*tensors), expected, **TOLERANCE)


def test_gradients_reach_only_what_is_trained_and_strides_do_not_matter():
    x, weight = torch.randn(64, 7).T, torch.randn(64, 96).T.requires_grad_()
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(dim=0).expand(96, -1), **TOLERANCE)
    frozen, x = weight.detach(), x.clone().requires_grad_()
    linear(x, frozen).sum().backward()
    torch.testing.assert_close(x.grad, frozen.sum(dim=0).expand(7, -1), **TOLERANCE)


def test_half_precision_and_machines_without_the_operator_use_torchs_own(monkeypatch):
    x, weight = torch.randn(3, 64), torch.randn(96, 64)
    assert torch.equal(linear(x.bfloat16(), weight.bfloat16()), F.linear(x.bfloat16(), weight.bfloat16()))
    monkeypatch.setattr(module, "AVAILABLE", False)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_every_plain_linear_layer_of_a_module_is_changed_in_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ModuleList([nn.Linear(4, 2)]))
    names = list(model.state_dict())
    use_onednn(model)
    assert [type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)] == [Linear, Linear]
    assert list(model.state_dict()) == names
