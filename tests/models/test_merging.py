"""A mixture begins as its sub-models say, seed by seed; sub-models that do not fit are named."""

from dataclasses import replace

import pytest
import torch

from collective_pipeline.config import (
    Arm,
    ImageSpec,
    MixtureArchitecture,
    MlpArchitecture,
    SubModelArchitecture,
    UserError,
)
from collective_pipeline.models.build import build_model, initialise
from collective_pipeline.models.checkpoint import Checkpoint
from collective_pipeline.models.merging import OTHER_BIAS, OWN_BIAS, check_submodels, merge
from collective_pipeline.randomness import make_generator

SHAPE, CHANNELS, SEEDS = (1, 4, 4), (3, 4, 5, 6), (5, 8)
GROUPS = ((0, 1), (1, 2, 3), (0, 3))
IMAGES = ImageSpec(shape=SHAPE, mean=(0.5,), std=(0.2,), class_names=tuple("abcd"))


def make(architecture, num_classes, purpose="weights", seeds=SEEDS):
    model = build_model(architecture, in_dim=16, num_classes=num_classes, num_seeds=len(seeds))
    initialise(model, [make_generator(seed, purpose) for seed in seeds])
    return model


def make_mixture(**changes):
    architecture = MixtureArchitecture(image_shape=SHAPE, channels=CHANNELS, gate_width=4, **changes)
    return make(architecture, len(IMAGES.class_names)), architecture


@pytest.fixture
def submodels():
    """One for each group, whose norms have seen a batch, trained with more seeds than the mixture has."""
    checkpoints = []
    for number, group in enumerate(GROUPS):
        architecture = SubModelArchitecture(image_shape=SHAPE, channels=CHANNELS)
        model = make(architecture, len(group), f"group {number}", seeds=(8, 1, 5)).train()
        model(torch.randn(3, 20, 16, generator=make_generator(number, "images")))
        arm = Arm(
            model_type="sub_model",
            in_dim=16,
            num_classes=len(group),
            params=1,
            target_params=1,
            architecture=architecture,
        )
        images = IMAGES.model_copy(update={"class_names": tuple("abcd"[label] for label in group)})
        checkpoints.append(Checkpoint(arm, "mnist", images, (8, 1, 5), (1, 2, 3), model.state_dict()))
    return checkpoints


def merged(submodels, **changes):
    model, architecture = make_mixture(**changes)
    check_submodels(submodels, architecture, groups=GROUPS, images=IMAGES, seeds=SEEDS)
    merge(model, submodels, architecture, groups=GROUPS, seeds=SEEDS)
    return model


def rows(submodel, name):
    """A tensor of a sub-model for the seeds of the mixture, in their order."""
    return submodel.weights[name][[2, 0]]


def test_average_is_the_mean_of_all_weights_and_statistics(submodels):
    state = merged(submodels).extractor.state_dict()

    assert any(name.endswith("running_var") for name in state)
    for name, tensor in state.items():
        mean = sum(rows(submodel, f"extractor.{name}") for submodel in submodels) / 3
        assert torch.allclose(tensor, mean, atol=1e-6), name


def test_copy_is_one_of_them(submodels):
    state = merged(submodels, initialise="copy", copy_of=2).extractor.state_dict()

    assert all(torch.equal(tensor, rows(submodels[1], f"extractor.{name}")) for name, tensor in state.items())


@pytest.mark.parametrize("initialise", ["average", "copy"])
@pytest.mark.parametrize("n_experts", [2, 3, 4])
def test_every_expert_is_that_of_its_own_sub_model_while_there_are_some(submodels, initialise, n_experts):
    """Experts beyond the sub-models stay as they were drawn."""
    changes = {"initialise": initialise, "n_experts": n_experts}
    drawn, _ = make_mixture(**changes)
    for name, tensor in merged(submodels, **changes).experts.state_dict().items():
        for n in range(n_experts):
            source = rows(submodels[n], f"experts.{name}")[:, 0] if n < 3 else drawn.experts.state_dict()[name][:, n]
            assert torch.equal(tensor[:, n], source), (name, n)


def test_fresh_leaves_everything_as_it_was_drawn(submodels):
    drawn, _ = make_mixture(initialise="fresh")
    state = merged(submodels, initialise="fresh").state_dict()

    assert all(torch.equal(tensor, drawn.state_dict()[name]) for name, tensor in state.items())


def test_the_rest_is_as_it_was_drawn(submodels):
    drawn, _ = make_mixture()
    for name, tensor in merged(submodels).state_dict().items():
        if name.startswith(("gate", "head")):
            assert torch.equal(tensor, drawn.state_dict()[name])


def test_where_logits_are_mixed_an_expert_begins_with_its_own_classes(submodels):
    classifiers = merged(submodels, combine="logits").head.classifiers
    for n, group in enumerate(GROUPS):
        for place, label in enumerate(group):
            assert torch.equal(
                classifiers.weight[:, n, :, label], rows(submodels[n], "classifier.weight")[:, 0, :, place]
            )
            own = rows(submodels[n], "classifier.bias")[:, 0, 0, place] + OWN_BIAS
            assert torch.equal(classifiers.bias[:, n, 0, label], own)
        others = [label for label in range(4) if label not in group]
        assert (classifiers.bias[:, n, 0][:, others] == OTHER_BIAS).all()
        assert classifiers.weight[:, n][..., others].abs().max() < 0.05


def test_one_sub_model_alone_gives_its_own_answers(submodels):
    """Merged of three equal ones and asked for one expert, the mixture's features are the sub-model's."""
    same = [replace(submodel, weights=submodels[0].weights) for submodel in submodels]
    model, architecture = make_mixture()
    merge(model, same, architecture, groups=GROUPS, seeds=SEEDS)
    images = torch.randn(2, 7, 16, generator=make_generator(0, "images"))
    alone = submodels[0].of_seeds(SEEDS).build()
    features, _ = model.eval().read(images)
    expected = alone.classifier(features[:, 1:2]).squeeze(1)

    assert torch.allclose(alone(images)[0], expected, atol=1e-5)


def with_images(submodel, **changes):
    return replace(submodel, images=submodel.images.model_copy(update=changes))


def with_architecture(submodel, architecture):
    return replace(submodel, arm=submodel.arm.model_copy(update={"architecture": architecture}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: with_images(s, class_names=("b", "c", "e")), "has classes b, c, e where the mixture has b, c, d"),
        (lambda s: with_images(s, mean=(0.25,)), "has images with mean 0.25 where the mixture has 0.5"),
        (lambda s: with_images(s, shape=(1, 8, 8)), "has images of shape 1, 8, 8 where the mixture has 1, 4, 4"),
        (
            lambda s: with_architecture(s, SubModelArchitecture(image_shape=SHAPE, channels=(3, 4, 5, 7))),
            "has channels 3, 4, 5, 7 where the mixture has 3, 4, 5, 6",
        ),
        (lambda s: with_architecture(s, MlpArchitecture(hidden_dims=(4,))), "is a network of kind mlp"),
        (lambda s: replace(s, seeds=(8, 1, 6)), "lacks the seeds 5"),
        (lambda s: replace(s, best_epochs=(1, 2, 0)), "diverged with the seeds 5"),
    ],
)
def test_a_sub_model_that_does_not_fit_is_named(submodels, change, problem):
    _, architecture = make_mixture()
    with pytest.raises(UserError) as caught:
        check_submodels(
            [submodels[0], change(submodels[1]), submodels[2]], architecture, groups=GROUPS, images=IMAGES, seeds=SEEDS
        )

    assert str(caught.value).startswith(f"the sub-model of group 2 {problem}")
    assert "\n" not in str(caught.value)


def test_there_is_a_sub_model_for_every_group(submodels):
    _, architecture = make_mixture()
    with pytest.raises(UserError, match="3 groups of classes need as many sub-models, and there are 2"):
        check_submodels(submodels[:2], architecture, groups=GROUPS, images=IMAGES, seeds=SEEDS)
    _, architecture = make_mixture(initialise="copy", copy_of=4)
    with pytest.raises(UserError, match="copy_of=4 is no group: choose from 1 to 3"):
        check_submodels(submodels, architecture, groups=GROUPS, images=IMAGES, seeds=SEEDS)
