"""A recorded step does what the step does; with stand-ins for CUDA's parts where there is no CUDA device."""

import copy
import gc
from functools import partial

import pytest
import torch

from collective_pipeline.config import GateConfig
from collective_pipeline.models.build import build_arm, initialise
from collective_pipeline.models.image_arms import image_architecture, make_image_arm
from collective_pipeline.randomness import make_generator
from collective_pipeline.training import cuda, loop
from collective_pipeline.training.train import train_arm

CPU = torch.device("cpu")


class Graph:
    """Replays what was called while it recorded."""

    recording: "list[Graph]" = []

    def capture_begin(self, **options) -> None:
        Graph.recording.append(self)

    def capture_end(self) -> None:
        Graph.recording.remove(self)

    def replay(self) -> None:
        self.body()


class Event:
    """Of a device that is never behind."""

    def __init__(self, *, blocking: bool) -> None:
        assert blocking

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Recorded(cuda.Recorded):
    """Hands its body to the graph that records, which then does not run it, as on a CUDA device."""

    def __init__(self, body, state) -> None:
        super().__init__(self._run, state)
        self.wrapped = body

    def _run(self, *arguments):
        for graph in Graph.recording:
            graph.body = lambda: self.wrapped(*arguments)
        return None if Graph.recording else self.wrapped(*arguments)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Steps go through `Recorded`, some at once; everything else is as on a CPU."""
    monkeypatch.setattr(cuda.torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda.torch.cuda, "Event", Event)
    monkeypatch.setattr(cuda, "_make_room", lambda: None)
    original = loop._PhaseTraining.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        self._update = Recorded(self._run_updates, self.state)

    monkeypatch.setattr(loop._PhaseTraining, "__init__", init)
    whole = loop._PhaseTraining.stops

    def stops(self, first):
        return [stop for stop in whole(self, first) if stop % 3 == 0 or stop >= self.num_updates - 1]

    monkeypatch.setattr(loop._PhaseTraining, "stops", stops)


def change(config, **changes):
    return type(config).model_validate(config.model_dump() | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulation_steps": 2, "schedule": "cosine"},
        {"accumulation_steps": 4, "ema_decay": 0.9, "clip_norm": 1.0},
        {"batch_size": 200},
        {"strategy": "pretrain_freeze_finetune"},
    ],
    ids=["plain", "remainder", "averaged", "one_step", "phases"],
)
def test_recording_changes_nothing(arm, splits, training, as_on_cuda, changes):
    """What the calls before the first replay did is undone, whenever that is; no step is lost or done twice."""
    config = change(training, **changes)
    recorded, _ = train_arm(arm, splits, config, seeds=(1, 2), device=CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorded, "__call__", lambda self, *arguments: self.wrapped(*arguments))
        expected, _ = train_arm(arm, splits, config, seeds=(1, 2), device=CPU)

    assert all(torch.equal(recorded.weights[name], tensor) for name, tensor in expected.weights.items())


@pytest.mark.parametrize("was_on", [True, False])
def test_nothing_is_collected_while_a_step_is_compiled_and_recorded(as_on_cuda, was_on):
    """And whoever had switched the collector off finds it off."""
    states = []
    recorded = Recorded(lambda: states.append(gc.isenabled()), dict)
    try:
        if not was_on:
            gc.disable()
        recorded()
        assert states[0] is False and gc.isenabled() is was_on
    finally:
        gc.enable()


def test_what_cannot_be_recorded_runs_unrecorded(arm, splits, training, as_on_cuda, monkeypatch, caplog):
    """With one sentence, and the same result."""
    expected, _ = train_arm(arm, splits, training, seeds=(1,), device=CPU)

    def refuse(self, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Graph, "capture_begin", refuse)
    monkeypatch.setattr(cuda, "_told", set())
    checkpoint, _ = train_arm(arm, splits, training, seeds=(1,), device=CPU)

    assert (
        caplog.text.count("cannot be recorded as a CUDA graph (operation not permitted when stream is capturing)") == 1
    )
    assert all(torch.equal(checkpoint.weights[name], tensor) for name, tensor in expected.weights.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("changes", [{}, {"accumulation_steps": 2}, {"strategy": "pretrain_freeze_finetune"}])
def test_training_on_a_gpu_is_training(arm, splits, training, changes):
    """The first losses are those of a CPU, up to what is drawn for dropout and how products are rounded."""
    config = change(training, precision="fp32", **changes)
    _, on_gpu = train_arm(arm, splits, config, seeds=(1, 2), device=torch.device("cuda"))
    _, on_cpu = train_arm(arm, splits, config, seeds=(1, 2), device=CPU)

    for one, other in zip(on_gpu.history[:2], on_cpu.history[:2], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.1)


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile with all of its parts but the one that needs a compiler on the machine."""
    monkeypatch.setattr(cuda.torch, "compile", partial(torch.compile, backend="aot_eager"))


def make_network():
    arm = make_image_arm(
        "resnet18_moe", image_architecture("resnet18_moe", (1, 8, 8), GateConfig(), width=2), num_classes=3
    )
    network = build_arm(arm)
    initialise(network, [make_generator(0, "weights")])
    return network


@pytest.mark.parametrize("frozen", [False, True])
def test_a_compiled_network_computes_the_same(compiler, caplog, frozen):
    """Logits, parts, gradients and statistics while it trains, also in part, and what it says afterwards."""
    plain, compiled = make_network(), make_network()
    cuda.compile_forward(compiled)
    cuda.compile_forward(compiled)  # of a second phase
    forward, calls = compiled.forward.compiled, []
    compiled.forward.compiled = lambda x: calls.append(len(x)) or forward(x)
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    for network in (plain, compiled):
        network.train()
        if frozen:  # as in the stage with fixed gates
            network.eval()
            network.network.train()
        logits, parts = network(x)
        (logits.square().sum() + sum(part.sum() for part in parts.values())).backward()

    for (name, expected), (_, found) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: n + text)
    torch.testing.assert_close(dict(compiled.named_buffers()), dict(plain.named_buffers()))
    with torch.inference_mode():
        torch.testing.assert_close(compiled.eval()(x[:, :4])[0], plain.eval()(x[:, :4])[0], rtol=1e-4, atol=1e-5)
    assert calls == [1] and "cannot be used" not in caplog.text
    assert list(compiled.state_dict()) == list(plain.state_dict())


def test_a_copy_of_a_compiled_network_has_weights_of_its_own(compiler):
    network = make_network().eval()
    cuda.compile_forward(network)
    x = torch.randn(1, 2, 64)
    copied = copy.deepcopy(network)
    before = copied(x)[0]
    with torch.no_grad():
        network.network.head.bias.add_(1)

    assert torch.equal(copied(x)[0], before)


def test_a_network_that_cannot_be_compiled_trains_without(monkeypatch, caplog):
    def refuse(function, **options):
        def fail(x):
            raise RuntimeError("no compiler here")

        return fail

    monkeypatch.setattr(cuda.torch, "compile", refuse)
    plain, network = make_network(), make_network()
    cuda.compile_forward(network)
    x = torch.randn(1, 6, 64)

    assert torch.equal(network.train()(x)[0], plain.train()(x)[0])
    assert "torch.compile cannot be used here (no compiler here)" in caplog.text
