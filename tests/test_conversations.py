"""Conversations on series whose answer is known, and the nulls that keep or break what they should."""

import numpy as np
import pytest
import torch

from helpers.sae import conversations, splice
from helpers.sae.conversations import Talk
from helpers.sae.splice import Spoken


def run(user, answer, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    flags = np.array([False] * user + [True] * answer)
    return Spoken(torch.randn(user + answer, width, generator=g), torch.arange(user + answer), flags)


def talk(behavior, user=8, answer=12, seed=0):
    return Talk(behavior, "?", *(run(user, answer, seed=seed + i) for i in range(3)), "a reply")


class Halver:
    """A dictionary that gives half of every row back, so that its error is the other half."""

    device = "cpu"

    def encode(self, x):
        return x

    def decode(self, z):
        return z / 2


def test_a_drop_and_a_dip_are_what_hand_arithmetic_gives():
    series = np.array([1.0, 1, 1, 1, 0.2, 0.4, 0.6, 0.6, 0.6])
    answer = np.array([False] * 5 + [True] * 4)
    assert conversations.drop(series, answer) == pytest.approx(4.2 / 5 - 2.2 / 4)
    assert conversations.dip(series, 5) == pytest.approx((1 + 1 + 1 + 0.6 + 0.6 + 0.6) / 6 - 0.3)
    assert conversations.dip(np.ones(9), 5) == 0


def test_numbers_are_averaged_within_behaviours_then_behaviours_count_alike():
    talks = [talk("a"), talk("a"), talk("b")]
    assert conversations.by_behavior(talks, [1.0, 3.0, 10.0]).tolist() == [2.0, 10.0]
    assert conversations.by_behavior(talks, [[1.0, 3.0, 10.0], [0.0, 0.0, 1.0]]).tolist() == [[2.0, 10.0], [0.0, 1.0]]


def test_errors_of_a_shift_are_those_of_shifted_rows():
    runs = [run(3, 4, seed=1), run(5, 3, seed=2)]
    pushes = [torch.randn(6), torch.zeros(6)]
    (found,) = conversations.errors(Halver(), runs, pushes)
    for x, v, e in zip(runs, pushes, found, strict=True):
        alone = splice.compare_errors(Halver(), x.rows, x.rows + v)
        np.testing.assert_allclose(e.ratio, alone.ratio, rtol=1e-6)
        np.testing.assert_allclose(e.cosine, alone.cosine, rtol=1e-6)
    np.testing.assert_allclose(found[1].ratio, 1, rtol=1e-6)


def test_shuffling_takes_a_step_away_and_rotating_keeps_its_height():
    talks = [talk("a", seed=i) for i in range(6)]
    steps = [np.where(t.plain.answer, 0.0, 1.0) for t in talks]
    assert abs(conversations.shuffled_drops(talks, steps, 200, 0).mean()) < 0.05
    peaks = conversations.rotated(talks, steps, lambda series, at: float(series.max() - series.min()), 20, 0)
    assert (peaks == 1).all() and peaks.shape == (20, 6)


def test_a_step_at_the_start_is_found_there_and_a_step_elsewhere_is_not():
    series = np.r_[np.ones(10), np.zeros(10)] + np.random.default_rng(0).normal(0, 0.05, 20)
    assert conversations.Turning(2)(series, 10) == 1.0 and conversations.Turning(2)(series, 15) == 0.0


def test_the_stream_rises_towards_a_planted_direction():
    x = run(6, 6)
    v = torch.eye(6)[0]
    toward = Spoken(x.rows + 5 * torch.from_numpy(x.answer)[:, None] * v, x.ids, x.answer)
    assert conversations.rise(toward, v) > 0.5
    assert abs(conversations.turned(toward, v)[~x.answer].mean()) < 1e-12
    assert conversations.start(x) == 6


def test_two_texts_differ_from_the_answer_on_without_any_vector():
    t = talk("a")
    same_question = Spoken(torch.cat([t.plain.rows[:8], t.steered.rows[8:]]), t.plain.ids, t.plain.answer)
    assert conversations.two_texts(Halver(), t._replace(steered=same_question), torch.zeros(6)) > 0.5
    assert abs(conversations.two_texts(Halver(), t._replace(steered=t.plain), torch.zeros(6))) < 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_tracking_is_an_identity_for_any_vector(seed):
    g = torch.Generator().manual_seed(seed)
    found = conversations.tracking(Halver(), torch.randn(50, 6, generator=g), torch.randn(6, generator=g))
    assert abs(found.ratio - 1) < 1e-6 and found.opposed == pytest.approx(1)


def test_conversations_are_read_where_the_answer_starts(tiny):
    asked = [("a", "What is tin?"), ("b", "Why do cats purr?")]
    talks = conversations.held(tiny, 1, asked, torch.zeros(2, tiny.d_model), float("inf"), 6)
    for t in talks:
        assert t.plain.answer.sum() >= conversations.LEAST and torch.equal(t.plain.rows, t.steered.rows)
        assert not t.inside.answer[0]
    cosine = conversations.added(tiny, 1, [("What is tin?", [5, 6, 7])], torch.randn(tiny.d_model))
    assert (cosine > 0.999).all()
