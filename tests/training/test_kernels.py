"""The fused kernels compute what the modules define; interpreted on a CPU where there is no CUDA device."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from collective_pipeline.data.batches import Batches
from collective_pipeline.models.layers import FanOut, Linear, Stack
from collective_pipeline.models.mlp import HiddenLayer
from collective_pipeline.training import cuda, kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_layer(stack: Stack, in_dim: int, out_dim: int, **options) -> HiddenLayer:
    generator = torch.Generator().manual_seed(0)
    layer = HiddenLayer(stack, in_dim, out_dim, dropout=0.3, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer.to(DEVICE).train()


@pytest.mark.parametrize(
    ("stack", "dims", "batch", "options"),
    [
        (Stack(1), (5, 7), 6, {}),
        (Stack(2), (6, 24), 16, {"residual": True}),
        (Stack(2), (8, 8), 9, {"residual": True}),
        (Stack(2, 3), (6, 17), 8, {"fans_out": True}),
        (Stack(3, 2), (6, 16), 33, {"fans_out": True}),
    ],
)
def test_a_fused_layer_is_the_layer(stack, dims, batch, options):
    """Output, every gradient and the running statistics, with the same random bits."""
    plain, fused = (make_layer(stack, *dims, **options) for _ in range(2))
    kernels.fuse(fused)
    generator = torch.Generator().manual_seed(1)
    members = 1 if options.get("fans_out") else stack.num_members
    x = torch.randn(stack.num_seeds, members, batch, dims[0], generator=generator).to(DEVICE)
    bits = torch.randint(-(2**15), 2**15, (*stack, batch, dims[1]), generator=generator, dtype=torch.int16).to(DEVICE)
    weights = torch.randn(*stack, batch, dims[1], generator=generator).to(DEVICE)
    results = []
    for layer in (plain, fused):
        layer.dropout.draw.bits = bits
        inputs = x.clone().requires_grad_()
        output = layer(inputs)
        (output * weights).sum().backward()
        gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
        results.append({"output": output, "input": inputs.grad, **gradients, **dict(layer.named_buffers())})

    assert (results[0]["output"] == 0).float().mean() > 0.3
    for name, expected in results[0].items():
        torch.testing.assert_close(
            results[1][name], expected, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_a_fused_layer_that_is_evaluated_is_the_layer():
    """Dropout and the batch's own statistics are for training only."""
    layer = make_layer(Stack(2), 6, 8).eval()
    x = torch.randn(2, 1, 4, 6, device=DEVICE)
    expected = layer(x)
    kernels.fuse(layer)

    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(("strength", "cutout"), [(0.0, 0), (1.0, 0), (0.0, 5), (1.0, 4)])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_fused_batches_are_the_batches(splits, strength, cutout, name):
    """Gathered, moved, normalised and cut out alike."""
    moved = replace(splits, name=name).to(DEVICE)
    plain, fused = (
        Batches(moved, (1, 2), batch_size=16, augmentation_strength=strength, cutout=cutout) for _ in range(2)
    )
    kernels.fuse_batches(fused)

    for (x, y), (fused_x, fused_y) in zip(list(plain.epoch(1))[:2], list(fused.epoch(1))[:2], strict=True):
        torch.testing.assert_close(fused_x, x, rtol=1e-3, atol=1e-3)
        assert torch.equal(fused_y, y)


def test_fused_bits_belong_to_the_seed_and_the_step():
    """Uniform; the same alone and among others; others for another seed, step or place."""
    layer = HiddenLayer(Stack(1), 4, 1000, dropout=0.5).to(DEVICE)

    def draw(seeds: tuple[int, ...], step: int) -> torch.Tensor:
        stacked = HiddenLayer(Stack(len(seeds)), 4, 1000, dropout=0.5).to(DEVICE)
        bits = kernels.FusedBits(seeds, DEVICE)
        bits.attach(stacked, 8)
        bits.draw(torch.tensor([step], device=DEVICE))
        return stacked.dropout.draw.bits.clone()

    assert layer.training
    alone, among = draw((7,), 3), draw((1, 7), 3)
    assert torch.equal(alone[0], among[1]) and not torch.equal(among[0], among[1])
    assert not torch.equal(alone, draw((7,), 4))
    assert torch.equal(alone, draw((7,), 3))
    assert (alone < 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert alone.unique().numel() > 0.9 * 65536 * (1 - 2.718 ** (-8000 / 65536))


@pytest.mark.parametrize("layer", [Linear, FanOut])
def test_products_on_the_device(layer):
    """A layer without its bias is the layer minus the bias."""
    made = layer(Stack(2, 3), 6, 8).to(DEVICE)
    x = torch.randn(2, 1 if layer is FanOut else 3, 4, 6, device=DEVICE)

    torch.testing.assert_close(made(x), made.product(x))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_a_number_stays_so():
    """As through torch's own relu: or a network that diverged would look as if it had not."""
    plain, fused = (make_layer(Stack(1), 4, 8) for _ in range(2))
    kernels.fuse(fused)
    x = torch.ones(1, 1, 4, 4, device=DEVICE)
    x[0, 0, 0, 0] = torch.inf

    assert plain(x).isnan().all() and fused(x).isnan().any(dim=2).all()


def test_trying_out_is_quiet():
    """Where kernels can be compiled."""
    if DEVICE.type == "cuda":
        kernels.try_out(DEVICE)
        assert cuda.load_kernels(DEVICE) is kernels


def test_a_machine_that_cannot_compile_is_told_once(monkeypatch, caplog):
    """And works without kernels."""

    def no_compiler(device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "try_out", no_compiler)
    monkeypatch.setattr(cuda, "_told", set())
    monkeypatch.setattr(cuda, "_tried", set())

    assert cuda.load_kernels(DEVICE) is None and cuda.load_kernels(DEVICE) is None
    assert caplog.text.count("Triton cannot be used here (Failed to find C compiler)") == 1
