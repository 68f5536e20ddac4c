"""Conversations on series whose answer is known, and the nulls that keep or break what they should."""

import numpy as np
import pytest
import torch

from helpers.sae import conversations, latents, splice
from helpers.sae.conversations import Talk
from helpers.sae.splice import Spoken


def run(user, answer, width=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    flags = np.array([False] * user + [True] * answer)
    return Spoken(torch.randn(user + answer, width, generator=g), torch.arange(user + answer), flags)


def talk(behavior, user=8, answer=12, seed=0):
    return Talk(behavior, "?", *(run(user, answer, seed=seed + i) for i in range(3)), "said", "a reply")


ASKED = [
    ("a", "What is tin used for in the kitchens of this town?"),
    ("b", "Why do cats purr when somebody scratches them?"),
]


class Halver:
    """A dictionary that gives half of every row back, so that its error is the other half."""

    device = "cpu"

    def encode(self, x):
        return x

    def decode(self, z):
        return z / 2


class Cutter(Halver):
    """Keeps what is above zero, all of it."""

    class cfg:
        d_in = 6

    W_dec = torch.eye(6)

    def encode(self, x):
        return x.clamp_min(0)

    def decode(self, z):
        return z


def test_a_drop_and_a_dip_are_what_hand_arithmetic_gives():
    series = np.array([1.0, 1, 1, 1, 0.2, 0.4, 0.6, 0.6, 0.6])
    answer = np.array([False] * 5 + [True] * 4)
    assert conversations.drop(series, answer) == pytest.approx(4.2 / 5 - 2.2 / 4)
    assert conversations.dip(series, 5) == pytest.approx((1 + 1 + 1 + 0.6 + 0.6 + 0.6) / 6 - 0.3)
    assert conversations.dip(np.ones(9), 5) == 0


def test_numbers_are_averaged_within_behaviours_then_behaviours_count_alike():
    talks = [talk("a"), talk("a"), talk("b")]
    assert conversations.by_behavior(talks, [1.0, 3.0, 10.0]).tolist() == [2.0, 10.0]
    each = [np.array([1.0, 0]), np.array([3.0, 0]), np.array([10.0, 1])]  # two SAEs
    assert conversations.by_behavior(talks, each).tolist() == [[2.0, 10.0], [0.0, 1.0]]


def test_errors_of_a_shift_are_those_of_shifted_rows_for_every_sae():
    runs = [run(3, 4, seed=1), run(5, 3, seed=2)]
    pushes = [torch.randn(6), torch.zeros(6)]
    (found,) = conversations.errors([Halver(), Cutter()], runs, pushes)
    for x, v, e in zip(runs, pushes, found, strict=True):
        for i, sae in enumerate((Halver(), Cutter())):
            alone = splice.compare_errors(sae, x.rows, x.rows + v)
            np.testing.assert_allclose(e.ratio[i], alone.ratio, rtol=1e-6)
            np.testing.assert_allclose(e.cosine[i], alone.cosine, rtol=1e-6)
    np.testing.assert_allclose(found[1].ratio, 1, rtol=1e-6)
    talks = [talk("a"), talk("b")]
    assert conversations.ratios(talks, found).tolist() == [[e.ratio[i].mean() for e in found] for i in (0, 1)]


def test_drops_are_those_of_the_run_that_is_asked_for():
    t = talk("a", user=8, answer=12)
    cosine = np.where(t.plain.answer, 0.2, 0.7)[None]
    found = [splice.Errors(cosine, cosine)]
    assert conversations.drops([t], found) == pytest.approx(0.5)
    assert conversations.drops([t], found, "inside") == pytest.approx(0.5)


def test_series_that_wander_have_no_drop_and_rotating_keeps_the_height():
    talks = [talk("a", seed=i) for i in range(6)]
    steps = [np.where(t.plain.answer, 0.0, 1.0) + 0.01 * i for i, t in enumerate(talks)]
    null = conversations.sluggish_drops(talks, steps, 200, 0)
    assert null.shape == (200,) and abs(null.mean()) < 0.1
    peaks = conversations.rotated(talks, steps, lambda series, at: float(series.max() - series.min()), 20, 0)
    assert peaks == pytest.approx(np.ones(20))
    both = [np.stack([s, 2 * s]) for s in steps]  # two SAEs
    assert conversations.rotated(talks, both, conversations.dip, 5, 0).shape == (5,)


def test_latents_are_scored_by_those_that_other_pairs_raise():
    """Latents are the dimensions: the vector raises dimension 0, as do pairs it was not made of."""
    g = torch.Generator().manual_seed(0)
    zero, one = torch.zeros(8, 6), torch.eye(6)[0]
    noise = [0.01 * torch.rand(8, 6, generator=g) for _ in range(4)]
    made, held = [(noise[0] + one, zero), (noise[1] + one, zero)], [(noise[2] + one, zero), (noise[3] + one, zero)]
    other = torch.eye(6)[1]
    made[1], held[1] = (noise[1] + other, zero), (noise[3] + other, zero)
    found = conversations.scores([Cutter(), Cutter()], torch.stack([one, other]), noise[0], made, held, 1)
    for m in (conversations.IN_PLACE, conversations.PAIRS):
        assert found[m].shape == (2, 2, 2) and (found[m] == np.eye(2)).all()  # each its own latent, none the other's
    assert conversations.reference(Cutter(), held[1]).argmax() == 1
    half = {conversations.ALONE: np.zeros((1, 2, 2)), conversations.IN_PLACE: np.eye(2)[None]}
    (more,) = conversations.beyond(half, 50, 0).values()
    assert more.own.tolist() == [[1, 1]] and set(more.null) == {0, 1}  # dealt out, both are kept or neither
    i, before, after = conversations.changed(Cutter(), torch.ones(6), 3 * one, 2)[0]
    assert (i, before, after) == (0, 1, 4)
    talks = [talk("a"), talk("b")]
    assert len(conversations.some_rows(talks, 10)) == 10 and len(conversations.some_rows(talks, 1000)) == 24


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


def test_errors_of_two_texts_are_compared_word_by_word_on_the_answers():
    t = talk("a")
    alike, apart = conversations.two_texts([Halver(), Cutter()], [t.plain] * 2, [t.plain, t.steered])
    assert alike == pytest.approx(np.zeros(2)) and apart.shape == (2,) and apart[0] > 0.4


def test_early_words_and_those_at_the_boundary_can_be_left_out():
    t = talk("a", user=8, answer=12)
    cosine = np.r_[[9.0] * 4, [0.7] * 3, 9, 9, [0.2] * 11][None]
    later = conversations.settled([t], [splice.Errors(cosine, cosine)], 4)
    assert conversations.drops(*later) == pytest.approx(0.5) and len(later[0][0].plain.rows) == 14


def test_what_arrives_is_the_vector_where_nothing_stands_between(tiny):
    talks = conversations.held(tiny, 0, ASKED, torch.zeros(2, tiny.d_model), float("inf"), 6)
    vectors = {n: torch.randn(tiny.d_model) for n in "ab"}
    gaps = conversations.carried(tiny, 0, talks, [vectors[t.behavior] for t in talks], [0, 1], batch=1)
    for t, gap, later in zip(talks, gaps[0], gaps[1], strict=True):
        torch.testing.assert_close(gap, vectors[t.behavior].expand_as(gap), atol=1e-5, rtol=1e-4)
        assert later.shape == gap.shape and not torch.allclose(later, gap, atol=1e-3)
    together = conversations.carried(tiny, 0, talks, [vectors[t.behavior] for t in talks], [1])
    torch.testing.assert_close(torch.cat(together[1]), torch.cat(gaps[1]), atol=1e-4, rtol=1e-3)
    found = conversations.arrived(talks, gaps[0], vectors, {n: (v, v) for n, v in vectors.items()})
    assert found.kept == pytest.approx(np.ones(2)) and np.diag(found.own) == pytest.approx(np.ones(2))
    np.testing.assert_allclose(found.own, found.vector, atol=1e-5)
    assert found.ceiling == pytest.approx(np.ones(2))


def test_a_stream_that_is_still_steered_points_at_any_vector():
    t = talk("a")
    v = 3 * torch.randn(6, generator=torch.Generator().manual_seed(9))
    steered = conversations.still_steered(t.steered, v)
    torch.testing.assert_close(steered.rows[:8], t.steered.rows[:8])
    assert conversations.rise(steered, v) > conversations.rise(t.steered, v) + 0.3
    beyond = conversations.beyond_plain(t, v)
    assert len(beyond) == 20 and abs(beyond[:8].mean()) < 1e-12


@pytest.mark.parametrize("seed", [0, 1])
def test_tracking_is_an_identity_for_any_vector(seed):
    g = torch.Generator().manual_seed(seed)
    found = conversations.tracking(Halver(), torch.randn(50, 6, generator=g), torch.randn(6, generator=g))
    assert abs(found.ratio - 1) < 1e-6 and found.opposed == pytest.approx(1)


def test_conversations_are_read_where_the_answer_starts(tiny):
    talks = conversations.held(tiny, 1, ASKED, torch.zeros(2, tiny.d_model), float("inf"), 6)
    assert [t.behavior for t in talks] == ["a", "b"]
    for t in talks:
        assert t.plain.answer.sum() >= conversations.LEAST and torch.equal(t.plain.rows, t.steered.rows)
        assert not t.inside.answer[0]


def test_a_latent_is_shown_by_where_it_fires_and_what_it_promotes():
    context = latents.Context("a *", "b", "|c", 1.0)
    shown = latents.cells(latents.Latent(3, 0.1, [context], ["x|y", "z"], []))
    assert shown == [r"a \*«b»\|c", "'x\\|y', 'z'"]
    assert latents.cells(latents.Latent(3, 0.0, [], [], [])) == ["(never fired)", ""]


def test_hovering_over_a_latent_shows_its_text_as_text():
    context = latents.Context("a <br>\n", "<b>", " c", 1.0)
    shown = latents.facts(latents.Latent(3, 0.1, [context] * 3, ["<i>", "z"], []))
    place = "a &lt;br&gt; «&lt;b&gt;» c"
    assert shown == {
        "latent": "3",
        "fires most on": f"{place}<br>{place}",
        "makes likelier": "&#x27;&lt;i&gt;&#x27;, &#x27;z&#x27;",
    }
    assert latents.facts(latents.Latent(3, 0.0, [], [], []))["fires most on"] == "(never)"
