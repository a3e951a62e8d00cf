"""What the members of a trained collective have learnt, and how far they agree.

Three views, each with its own question. Do two members represent the images alike (`linear_cka`)? What does a member
know on its own, and do two of them say the same (`probe_predictions`, `agreement`)? Does the collective need a member
(`ablation_drops`)?

Suffixes: S seeds, B images, I input features, N members, E member features, F all members' features,
K classes.
"""

import contextlib
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from collective_pipeline.models.collective import Collective
from collective_pipeline.models.image_collective import ImageCollective

IMAGES_AT_ONCE = 1024
# Networks whose members stand in `experts` and `analysts`, and whose parts of these names are the members' features.
WithMembers = Collective | ImageCollective


def member_outputs(model: WithMembers, x_SBI: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits `(S, B, K)` and the members' features, as the model's forward gives them, for any number of images.

    The model is put in evaluation mode: nothing is dropped.

    Args:
        model: With trained weights, as `Checkpoint.build` makes it.
        x_SBI: Normalised images on the model's device; `(1, B, I)` shows the same images to all seeds.
    """
    model.eval()
    with torch.inference_mode():
        chunks = [model(chunk) for chunk in x_SBI.split(IMAGES_AT_ONCE, dim=1)]
    parts = {name: torch.cat([parts[name] for _, parts in chunks], dim=2) for name in ("experts", "analysts")}
    return torch.cat([logits for logits, _ in chunks], dim=1), parts


def linear_cka(*groups_SNBE: Tensor) -> Tensor:
    """Linear centred kernel alignment of every pair of members, of all groups in turn, `(S, N, N)`.

    1 where two members' features are the same up to rotation, a common factor and an offset; 0 where no feature of
    one is correlated with any of the other. Unlike a cosine of two outputs it does not depend on which feature stands
    where, which is arbitrary in networks that were trained apart. Use many more images than a member has features:
    with few, chance alone makes any two alike. NaN for a member whose output is the same for all images.

    Kornblith, Norouzi, Lee and Hinton (2019), Similarity of Neural Network Representations Revisited.
    """
    width = max(group.shape[-1] for group in groups_SNBE)
    # Zeros beside the features of a narrower group change no inner product.
    features_SNBE = torch.cat([F.pad(group, (0, width - group.shape[-1])) for group in groups_SNBE], dim=1)
    members = features_SNBE.shape[1], width
    centred_SNBE = features_SNBE.double() - features_SNBE.double().mean(dim=2, keepdim=True)
    all_SBF = centred_SNBE.transpose(1, 2).flatten(2)
    covariance_SNENE = (all_SBF.mT @ all_SBF).unflatten(2, members).unflatten(1, members)
    squares_SNN = covariance_SNENE.square().sum(dim=(2, 4))
    norm_SN = squares_SNN.diagonal(dim1=1, dim2=2).sqrt()
    cka_SNN: Tensor = squares_SNN / (norm_SN.unsqueeze(2) * norm_SN.unsqueeze(1))
    return cka_SNN


def probe_predictions(train_SNBE: Tensor, labels_B: Tensor, test_SNBE: Tensor) -> tuple[Tensor, Tensor]:
    """The class that each member's features alone speak for, int64 `(S, N, B)`, and how probable its probe finds it.

    A linear probe is a linear classifier on frozen features, here scikit-learn's logistic regression on standardised
    ones. It says what a member knows in a form that the next layer can read, not what the collective makes of it.

    Alain and Bengio (2016), Understanding intermediate layers using linear classifier probes.

    Args:
        train_SNBE: Features of the images that the probes are fitted on, not those to predict.
        labels_B: Their labels.
        test_SNBE: Features of the images to predict.
    """
    # Here: every command would wait for them.
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415
    from sklearn.pipeline import make_pipeline  # noqa: PLC0415
    from sklearn.preprocessing import StandardScaler  # noqa: PLC0415

    predictions_SNB = torch.empty(test_SNBE.shape[:3], dtype=torch.int64)
    probabilities_SNB = torch.empty(test_SNBE.shape[:3])
    for seed, member in itertools.product(*map(range, test_SNBE.shape[:2])):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        # Beside threads that train, BLAS threads mostly wait: nine probes stood for 40 s on 16 cores.
        with threadpool_limits(1, user_api="blas"):
            probe.fit(train_SNBE[seed, member].numpy(force=True), labels_B.numpy(force=True))
        probabilities_BK = torch.from_numpy(probe.predict_proba(test_SNBE[seed, member].numpy(force=True)))
        highest = probabilities_BK.max(dim=1)
        probabilities_SNB[seed, member] = highest.values
        predictions_SNB[seed, member] = torch.from_numpy(probe.classes_)[highest.indices]
    return predictions_SNB.to(test_SNBE.device), probabilities_SNB.to(test_SNBE.device)


def agreement(predictions_SNB: Tensor) -> Tensor:
    """Percent of the images on which two members predict the same class, for every pair, `(S, N, N)`.

    100 minus the disagreement measure of Kuncheva and Whitaker (2003), Measures of Diversity in Classifier Ensembles.
    Read it beside their accuracies: two members that are right on 98 % of the images agree on at least 96 % of them.
    """
    return 100 * (predictions_SNB.unsqueeze(2) == predictions_SNB.unsqueeze(1)).double().mean(dim=-1)


def ablation_drops(model: WithMembers, x_SBI: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    """What the collective loses without each member: `experts` and `analysts`, `(S, N)` percentage points of accuracy.

    Mean ablation: the member's output is replaced by its mean over the images, so that what follows gets no word about
    the image and yet values of the size that it is used to. Analysts read what the experts say, so an expert's drop
    includes what is lost through them. Negative where the collective does better without the member. A small drop does
    not say that a member knows little: others may know the same.
    """
    logits_SBK, parts = member_outputs(model, x_SBI)
    drops = {}
    for name, members in (("experts", model.experts), ("analysts", model.analysts)):
        mean_SN1E = parts[name].mean(dim=2, keepdim=True)
        without = []
        for position in range(mean_SN1E.shape[1]):
            with _held_constant(members, position, mean_SN1E):
                without.append(_accuracy(member_outputs(model, x_SBI)[0], labels_B))
        drops[name] = _accuracy(logits_SBK, labels_B).unsqueeze(1) - torch.stack(without, dim=1)
    return drops


@contextlib.contextmanager
def _held_constant(members: nn.Module, position: int, value_SN1E: Tensor) -> Iterator[None]:
    """Within it, one of the members says `value_SN1E` whatever it is shown."""

    def replace(_module: nn.Module, _inputs: object, output_SNBE: Tensor) -> Tensor:
        changed_SNBE = output_SNBE.clone()
        changed_SNBE[:, position] = value_SN1E[:, position]
        return changed_SNBE

    handle = members.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def _accuracy(logits_SBK: Tensor, labels_B: Tensor) -> Tensor:
    return 100 * (logits_SBK.argmax(dim=-1) == labels_B).double().mean(dim=1)
