"""A vector trained by preference: the loss and its gradient, where the vector may lie, and a plant that must be found."""

import numpy as np
import pytest
import torch
from test_steer import ITEMS, naive

from helpers.lm import replies
from helpers.steering import preference
from helpers.steering.preference import Config, Pairs

PAIRS = [(i.question, i.matching, i.non_matching) for i in ITEMS]
WORDS = (
    "tin air glue sand rain milk jazz moss rust soap wool corn lead fog clay dust snow wine rock hay salt ink silk peat"
)
FEW = Config(pace=0.2, looks=(1, 2, 6))


@pytest.mark.parametrize("name", ["tiny", "gemma"])
def test_a_batch_gives_what_plain_steered_passes_give_and_twice_the_same(name, request):
    lm = request.getfixturevalue(name)
    pairs, v = Pairs(lm, PAIRS, 1, batch=2), torch.randn(48)
    assert pairs.batches == 2
    found = torch.cat([pairs.under(i, v)[0] for i in range(2)])
    expected = torch.tensor([naive(lm, 1, v, 1.0, ITEMS[i]) for i in pairs.order])
    torch.testing.assert_close(found.double(), expected.double(), atol=2e-3, rtol=1e-4)
    again = torch.cat([pairs.under(i, v)[0] for i in range(2)])
    assert torch.equal(again, found)
    counts = torch.cat([pairs.under(i, v)[1] for i in range(2)])
    assert counts.tolist() == pairs.lengths()[pairs.order].tolist()


def test_the_loss_by_hand():
    now, before = torch.tensor([[-2.0, -5.0], [-1.0, -1.0]]), torch.tensor([[-3.0, -4.0], [-1.0, -1.0]])
    counts = torch.tensor([[2, 5], [1, 1]])
    by_hand = -(np.log(1 / (1 + np.exp(-0.5 * 2))) + np.log(0.5)) / 2 - 0.25 * (-2 / 2 - 1) / 2
    assert float(preference.loss(now, before, counts, 0.5, 0.25)) == pytest.approx(by_hand, rel=1e-6)


def test_its_gradient_is_that_of_finite_differences_and_goes_through_every_batch_again(tiny):
    pairs, b, u = Pairs(tiny, PAIRS, 1), 0.1 * torch.randn(48), torch.randn(48)

    def of(x):
        now, counts = pairs.under(0, x)
        return preference.loss(now, now.detach() - 1 * torch.tensor([0.3, -0.2]), counts, 1.0, 0.25), now, counts

    before = pairs.under(0, torch.zeros(48))[0]
    for _ in range(2):  # a second backward pass must not meet the graph of the first
        with torch.enable_grad():
            x = b.clone().requires_grad_(True)
            now, counts = pairs.under(0, x)
            (g,) = torch.autograd.grad(preference.loss(now, before, counts, 0.1, 0.25), [x])
        steps = [preference.loss(pairs.under(0, b + h * u)[0], before, counts, 0.1, 0.25) for h in (1e-2, -1e-2)]
        assert float(g @ u) == pytest.approx(float(steps[0] - steps[1]) / 2e-2, rel=0.02)


def test_training_lowers_the_loss_is_seeded_and_keeps_the_vector_where_it_may_lie(tiny):
    pairs, v = Pairs(tiny, PAIRS, 1, batch=2), torch.randn(48).double()
    free = preference.train(pairs, Config(pace=0.2, looks=(2, 30)))
    assert free.path.shape == (2, 48) and free.losses[1] < free.losses[0] - 0.05
    same, other = (preference.train(pairs, FEW, seed).path for seed in (0, 1))
    assert torch.equal(same, preference.train(pairs, FEW, 0).path) and not torch.equal(same, other)
    on, off = (preference.train(pairs, FEW, 0, keep(v)).vector for keep in (preference.along, preference.aside))
    assert abs(torch.cosine_similarity(on, v, dim=0)) > 1 - 1e-6
    assert abs(torch.cosine_similarity(off, v, dim=0)) < 1e-6 and off.norm() > 0.1


def test_a_planted_vector_is_found_and_one_of_shuffled_preferences_is_not(tiny):
    """Chosen are the model's own replies under u, rejected those under -u: what is learned points along u."""
    g = torch.Generator().manual_seed(3)
    u = torch.nn.functional.normalize(torch.randn(48, generator=g), dim=0)
    asked = [f"What is {word}?" for word in WORDS.split()]
    said = [replies.generate(tiny, asked, 1, sign * 4 * u, max_new_tokens=12) for sign in (1, -1)]
    planted = [(q, a, b) for q, a, b in zip(asked, *said, strict=True) if a.strip() and b.strip() and a != b]
    assert len(planted) > 16
    mixed = [(q, b, a) if i % 2 else (q, a, b) for i, (q, a, b) in enumerate(planted)]
    config = Config(pace=0.2, looks=(20,), likelihood=0.0)
    found, by_chance = (preference.train(Pairs(tiny, p, 1), config).vector.float() for p in (planted, mixed))
    assert torch.cosine_similarity(found, u, dim=0) > 0.4  # three standard deviations of a random direction's
    assert abs(torch.cosine_similarity(by_chance, u, dim=0)) < 0.35


def test_the_mean_loss_is_that_of_all_batches(tiny):
    pairs, v = Pairs(tiny, PAIRS, 1, batch=2), torch.randn(48)
    found = preference.losses(pairs, FEW, torch.stack([torch.zeros(48), v]))
    whole, counts = Pairs(tiny, PAIRS, 1).under(0, v)
    before = Pairs(tiny, PAIRS, 1).under(0, 0 * v)[0]
    assert found[1] == pytest.approx(float(preference.loss(whole, before, counts, 0.1, 0.25)), rel=1e-4)
    assert found[0] == pytest.approx(float(preference.loss(before, before, counts, 0.1, 0.25)), rel=1e-4)


def test_bad_input_is_refused_in_words(tiny):
    pairs = Pairs(tiny, PAIRS, 1)
    with pytest.raises(ValueError, match=r"looks \[2, 1\]"):
        preference.train(pairs, Config(0.1, looks=(2, 1)))
    with pytest.raises(ValueError, match="no prompts"):
        Pairs(tiny, [], 1)
