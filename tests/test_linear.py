"""`linear` equals torch's linear in values and in gradients, with oneDNN and without."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hark.models import linear as module
from hark.models.linear import Linear, linear, linear_to_float32, packed_weights, use_onednn

# Sums of 64 products of size 1 in another order: some 1e-6 of values up to 30.
TOLERANCE = dict(atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 64), (3, 1, 64), (0, 64)])
def test_values_and_gradients_are_those_of_torch(shape, bias, mkl, monkeypatch):
    """Whichever library computes the gradients."""
    monkeypatch.setattr(module, "MKL_IS_FAST", mkl)
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


def half_precision(bias: bool) -> tuple[torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 96, bias=bias, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return torch.randn(2, 5, 64, generator=generator).bfloat16().requires_grad_(), layer


@pytest.mark.parametrize("bias", [True, False])
def test_the_sums_of_half_precision_are_not_rounded_where_a_device_can_return_them(bias, monkeypatch):
    """The device is a stand-in: a product of the same numbers in float32."""
    x, layer = half_precision(bias)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    rounded = linear_to_float32(x, layer)
    assert rounded.dtype == torch.float32 and (rounded - exact).abs().max() > 0.01, "values up to 30, of 8 bits"
    wanted = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    theirs = torch.autograd.grad((rounded * wanted).sum(), [x, *layer.parameters()])

    monkeypatch.setattr(module, "WIDE", ("cpu",))
    monkeypatch.setattr(module, "_wide_product", lambda x, weight: x.float() @ weight.float().T)
    wide = linear_to_float32(x, layer)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), exact, **TOLERANCE)
    ours = torch.autograd.grad((wide * wanted).sum(), [x, *layer.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        torch.testing.assert_close(a, b, atol=0.05, rtol=0.02)  # sums in another order, rounded to 8 bits


def test_the_product_with_float32_sums_is_one_that_torch_has(monkeypatch):
    """On the device that only computes shapes; that of frozen weights needs no gradient."""
    monkeypatch.setattr(module, "WIDE", ("meta",))
    layer = nn.Linear(64, 96, dtype=torch.bfloat16, device="meta")
    x = torch.empty(2, 5, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    layer.weight.requires_grad_(False)
    output = linear_to_float32(x, layer)
    output.sum().backward()
    assert (output.dtype, output.shape, x.grad.dtype, layer.weight.grad) == (
        torch.float32, (2, 5, 96), torch.bfloat16, None,
    )  # fmt: skip


def test_a_layer_with_a_forward_of_its_own_keeps_it(monkeypatch):
    monkeypatch.setattr(module, "WIDE", ("cpu",))
    x, layer = half_precision(bias=False)
    layer.__class__ = type("Adapted", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    assert torch.equal(linear_to_float32(x, layer), (2 * F.linear(x, layer.weight)).float())


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a torch with MKL")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 64), (7, 64), (8, 1, 64), (64, 64), (70, 64)])
def test_packed_weights_give_the_same_products_and_leave_gradients_alone(shape, bias, monkeypatch):
    monkeypatch.setattr(module, "MKL_IS_FAST", True)
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 96, bias=bias))
    use_onednn(layer)
    x = torch.randn(shape, generator=generator)
    expected = F.linear(x, layer[0].weight, layer[0].bias)
    (wanted,) = torch.autograd.grad(expected.sum(), layer[0].weight)
    with packed_weights(layer):
        with torch.no_grad():
            kept = layer[0].weight.clone()
            layer[0].weight.zero_()  # so that the copy alone can give the product
            torch.testing.assert_close(layer(x), expected.detach(), **TOLERANCE)
            layer[0].weight.copy_(kept)
        torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), layer[0].weight)[0], wanted, **TOLERANCE)
    with torch.no_grad():
        layer[0].weight.zero_()
        assert torch.equal(layer(x), (layer[0].bias if bias else torch.zeros(96)).expand(*shape[:-1], 96))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs a torch with MKL")
def test_half_precision_and_other_processors_pack_nothing(monkeypatch):
    layers = nn.Sequential(nn.Linear(64, 96), nn.Linear(64, 96, dtype=torch.bfloat16))
    use_onednn(layers)
    monkeypatch.setattr(module, "MKL_IS_FAST", True)
    with packed_weights(layers):
        assert [layer.packed is None for layer in layers] == [False, True]
    assert all(layer.packed is None for layer in layers)
    monkeypatch.setattr(module, "MKL_IS_FAST", False)
    with packed_weights(layers):
        assert all(layer.packed is None for layer in layers)
