"""What every network on images keeps, whatever it does with its members: seeds and images stay apart."""

import pytest
import torch
from tests.models import test_image_collective, test_mixture
from tests.models.test_mixture import BATCH, CPU, SEEDS, make, make_images

from collective_pipeline.training.dropout_bits import DropoutBits

NETWORKS = test_mixture.TINY | test_image_collective.TINY


@pytest.fixture(params=list(NETWORKS))
def architecture(request):
    return NETWORKS[request.param]


def test_a_seed_does_not_depend_on_its_neighbours(architecture):
    """Weights, statistics, dropout and noise of a seed among three are those of it alone."""

    def with_bits(seeds):
        model, bits = make(architecture, seeds).train(), DropoutBits(seeds, CPU)
        bits.attach(model, BATCH)
        bits.draw(torch.tensor([4]))
        return model

    together, images = with_bits(SEEDS), make_images()
    logits, _ = together(images)
    for s, seed in enumerate(SEEDS):
        alone = with_bits((seed,))

        assert torch.allclose(alone(images[s : s + 1])[0], logits[s : s + 1], atol=1e-5)
        for name, tensor in alone.state_dict().items():
            assert torch.allclose(tensor, together.state_dict()[name][s : s + 1], atol=1e-5), name


def test_images_that_all_seeds_share_come_once(architecture):
    model, images = make(architecture).eval(), make_images(1)

    assert torch.allclose(model(images)[0], model(images.expand(len(SEEDS), -1, -1))[0], atol=1e-5)


def test_one_image_does_not_influence_another(architecture):
    model, images = make(architecture).eval(), make_images()

    assert torch.allclose(model(images)[0][:, 2:3], model(images[:, 2:3])[0], atol=1e-5)
