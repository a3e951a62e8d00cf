"""Training strategies: lists of phases that share one budget of epochs.

`end_to_end` trains everything at once. `pretrain_freeze_finetune` lets every expert learn to classify alone, then
trains the rest on the frozen experts, then everything at a tenth of the rate. `layerwise_autoencoding` lets each
layer in turn, on top of the frozen ones before it, rebuild its own input, then trains everything.

Only a `Collective` has members to pretrain; any other network is trained end to end for the same number of updates.
A network with gates has two stages in any case: its last epochs are without the gates' own losses, and these frozen.
Suffixes as in `models.collective`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from collective_pipeline.config import (
    Arm,
    CollectiveConfig,
    GateConfig,
    ImageArchitecture,
    MixtureArchitecture,
    ResNetArchitecture,
    Stage,
    TrainingConfig,
    UserError,
)
from collective_pipeline.models.collective import Collective, Members
from collective_pipeline.models.gating import Gating
from collective_pipeline.models.image_classifier import ImageClassifier
from collective_pipeline.models.layers import Linear, Stack, concat_members
from collective_pipeline.models.mlp import Mlp
from collective_pipeline.training.losses import (
    Objective,
    make_objective,
    member_cross_entropy,
    reconstruction,
    weighted_diversity,
    weighted_sum,
)

FINETUNE_FACTOR = 0.1


@dataclass(frozen=True)
class Annealing:
    """A buffer of the phase's network that goes from one value to another along half a cosine, update by update.

    Attributes:
        buffer: Its name in the network.
        start: Its value at the first update.
        end: At the last one.
    """

    buffer: str
    start: float
    end: float


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own network, objective and trained modules.

    Attributes:
        network: What maps images `(S, B, I)` to `(logits, parts)` in this phase.
        trained: The modules of `network` that learn; all others are frozen, norms and dropout included.
        new: The module that this phase brings along and whose weights are to be drawn; not part of the arm.
        rate_factor: Of the configured learning rate.
        classifies: Whether the logits mean anything, so that accuracy can be measured.
        selects: Whether the network is the arm itself, so that validation may choose one of the phase's epochs.
        goes_on: Whether it is a part of one training of the same network: its learning rate is that of these epochs in
            a training without phases, and averages and moments are those of the phase before, instead of its own.
        annealed: What of the network is neither learnt nor constant.
        stage: Its images and batches, if they are not those of the whole training.
    """

    name: str
    epochs: int
    network: nn.Module
    objective: Objective
    trained: Sequence[nn.Module]
    new: nn.Module | None = None
    rate_factor: float = 1.0
    classifies: bool = True
    selects: bool = True
    goes_on: bool = False
    annealed: Sequence[Annealing] = ()
    stage: Stage | None = None


class ExpertClassifiers(nn.Module):
    """Every expert with a Linear of its own for a head; the logits are the experts' mean."""

    def __init__(self, model: Collective, probe: Linear) -> None:
        super().__init__()
        self.experts = model.experts
        self.probe = probe

    def forward(self, x_SBI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits `(S, B, K)` and the parts `experts` and `expert_logits`."""
        e_SNBE = self.experts(x_SBI.unsqueeze(1))
        logits_SNBK = self.probe(e_SNBE)
        return logits_SNBK.mean(dim=1), {"experts": e_SNBE, "expert_logits": logits_SNBK}


class Autoencoder(nn.Module):
    """One layer of the collective, and a decoder that rebuilds what the layer read."""

    def __init__(
        self, model: Collective, read: Callable[[Collective, Tensor], Tensor], layer: nn.Module, decoder: nn.Module
    ) -> None:
        super().__init__()
        self.model = model
        self.read = read
        self.layer = layer
        self.decoder = decoder

    def forward(self, x_SBI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return no logits, `(S, B, 0)`, and the parts `original` and `reconstruction`."""
        original = self.read(self.model, x_SBI.unsqueeze(1))
        rebuilt = self.decoder(self.layer(original))
        logits_SB0 = rebuilt.new_empty(len(rebuilt), x_SBI.shape[1], 0)
        return logits_SB0, {"original": original, "reconstruction": rebuilt}


def plan_phases(arm: Arm, model: nn.Module, config: TrainingConfig, *, num_seeds: int) -> list[Phase]:
    """The phases of the configured strategy for this arm, their epochs adding up to `config.epochs`.

    Raises:
        UserError: If a stage has no epoch.
    """
    objective = make_objective(arm.architecture, config.label_smoothing)
    if isinstance(arm.architecture, ImageArchitecture) and arm.architecture.gates is not None:
        assert isinstance(model, ImageClassifier) and model.gating is not None
        return _gate_stages(arm, model, model.gating, arm.architecture.gates, config)
    if config.stages and isinstance(arm.architecture, ResNetArchitecture):
        return _plan_stages(arm.architecture, model, objective, config)
    if (
        config.strategy == "end_to_end"
        or not isinstance(model, Collective)
        or not isinstance(arm.architecture, CollectiveConfig)
    ):
        return [Phase("train", config.epochs, model, objective, [model], annealed=_anneal(arm))]
    match config.strategy:
        case "pretrain_freeze_finetune":
            pretrain, train, finetune = _share(config, [0.3, 0.4, 0.3])
            probe = Linear(Stack(num_seeds, len(model.experts.dims)), model.experts.dims[0][-1], arm.num_classes)
            rest = [child for child in model.children() if child is not model.experts]
            classify = {"cross_entropy": (1.0, member_cross_entropy("expert_logits", config.label_smoothing))}
            alone = weighted_sum(classify | weighted_diversity("experts", arm.architecture.expert_diversity))
            experts = ExpertClassifiers(model, probe)
            return [
                Phase("pretrain_experts", pretrain, experts, alone, [experts], new=probe, selects=False),
                Phase("train_rest", train, model, objective, rest),
                Phase("finetune", finetune, model, objective, [model], rate_factor=FINETUNE_FACTOR),
            ]
        case "layerwise_autoencoding":
            layers = _autoencoders(model, num_seeds)
            *pretrain_epochs, finetune = _share(config, [*[0.4 / len(layers)] * len(layers), 0.6])
            rebuild = weighted_sum({"reconstruction": (1.0, reconstruction)})
            return [
                *(
                    Phase(
                        f"autoencode_{name}",
                        epochs,
                        network,
                        rebuild,
                        [network.layer, network.decoder],
                        new=network.decoder,
                        classifies=False,
                        selects=False,
                    )
                    for (name, network), epochs in zip(layers.items(), pretrain_epochs, strict=True)
                ),
                Phase("finetune", finetune, model, objective, [model]),
            ]


def _plan_stages(
    architecture: ResNetArchitecture, model: nn.Module, objective: Objective, config: TrainingConfig
) -> list[Phase]:
    """The stages of the plan as parts of one training; those with smaller images than the last ones choose no epoch.

    What a network says of images of one size and of another cannot be compared.
    """
    own = architecture.image_shape[1]
    return [
        Phase(
            f"{stage.image_size or own}px",
            stage.epochs,
            model,
            objective,
            [model],
            goes_on=True,
            selects=stage.image_size in {None, own},
            stage=stage,
        )
        for stage in config.plan()
    ]


def _anneal(arm: Arm) -> list[Annealing]:
    """The temperature of a mixture's gate, where it has one."""
    mixture = arm.architecture
    if not isinstance(mixture, MixtureArchitecture) or mixture.n_experts == 1:
        return []
    return [Annealing("gate.temperature", mixture.initial_temperature, mixture.final_temperature)]


def _gate_stages(
    arm: Arm, model: ImageClassifier, gating: Gating, gates: GateConfig, config: TrainingConfig
) -> list[Phase]:
    """Everything with the gates' losses; then, for the last epochs, without those and with the gates frozen."""
    first = config.epochs - gates.freeze_epochs
    if first < 1:
        raise UserError(
            f"{arm.model_type}: freeze_epochs={gates.freeze_epochs} leaves its gates none of training.epochs="
            f"{config.epochs} to learn in: choose fewer, or more epochs"
        )
    learning = make_objective(arm.architecture, config.label_smoothing)
    stages = [Phase("train", first, model, learning, [model], goes_on=True)]
    if gates.freeze_epochs:
        fixed = make_objective(arm.architecture, config.label_smoothing, gates_learn=False)
        trained = [model.network, *([gating.heads] if gates.freeze == "embedding" else [])]
        stages.append(Phase("freeze_gates", gates.freeze_epochs, model, fixed, trained, goes_on=True))
    return stages


def _share(config: TrainingConfig, parts: Sequence[float]) -> list[int]:
    """Whole epochs in these proportions, at least one each."""
    spare = config.epochs - len(parts)
    ends = [round(spare * sum(parts[: i + 1])) for i in range(len(parts))]
    return [1 + end - start for start, end in zip([0, *ends], ends, strict=False)]


def _autoencoders(model: Collective, num_seeds: int) -> dict[str, Autoencoder]:
    """Every layer of the collective below the head with a mirrored decoder, in the order they are trained."""

    def mirrored(layer: nn.Module) -> nn.Module:
        if isinstance(layer, Members):
            return Members(num_seeds, [dims[::-1] for dims in layer.dims], dropout=0.0, shared_input=False)
        assert isinstance(layer, Mlp)
        return Mlp(Stack(num_seeds), layer.dims[::-1], dropout=[0.0] * (len(layer.dims) - 2))

    steps: dict[str, tuple[Callable[[Collective, Tensor], Tensor], nn.Module]] = {
        "experts": (_image, model.experts),
        "expert_encoder": (_expert_features, model.expert_encoder),
        "analysts": (_image_and_experts, model.analysts),
        "analyst_encoder": (_analyst_features, model.analyst_encoder),
    }
    return {
        name: Autoencoder(model, read, layer, mirrored(layer))
        for name, (read, layer) in steps.items()
        if not isinstance(layer, nn.Identity)
    }


def _image(model: Collective, x_S1BI: Tensor) -> Tensor:
    return x_S1BI


def _expert_features(model: Collective, x_S1BI: Tensor) -> Tensor:
    return concat_members(model.experts(x_S1BI))


def _image_and_experts(model: Collective, x_S1BI: Tensor) -> Tensor:
    return torch.cat([x_S1BI, model.expert_encoder(_expert_features(model, x_S1BI))], dim=-1)


def _analyst_features(model: Collective, x_S1BI: Tensor) -> Tensor:
    return concat_members(model.analysts(_image_and_experts(model, x_S1BI)))
