"""A planted latent tells the sides apart and steers as far as was planted; where nothing is planted nothing is."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from test_decompose import sae_of, unit

from helpers import stats
from helpers.sae import decompose, evidence, projections
from helpers.sae.latents import Context, Latent

D, LATENTS, PAIRS, PLANTED, LOWERED = 40, 120, 24, 7, 11


def dictionary(kind="standard", **more):
    g = torch.Generator().manual_seed(5)
    rows = unit(torch.randn(LATENTS, D, generator=g))
    rows[PLANTED], rows[LOWERED] = torch.eye(D)[0], torch.eye(D)[1]
    return sae_of(kind, 2 * rows, 0.1 * torch.randn(LATENTS, generator=g), torch.randn(D, generator=g), **more)


def pairs(sae, plus=0.0, minus=0.0, seed=0):
    """Both sides of pairs: noise that both share, some of their own, and what is planted on the one or the other."""
    g = torch.Generator().manual_seed(seed)
    base = sae.b_dec + torch.randn(PAIRS, D, generator=g)
    pos, neg = (base + 0.3 * torch.randn(PAIRS, D, generator=g) for _ in range(2))
    return pos + plus * torch.eye(D)[0], neg + minus * torch.eye(D)[1]


def gradients(along, seed=1):
    """Held-out items whose log-odds rise by `along` nats per unit on the first axis, in the mean, exactly."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(30, D, generator=g, dtype=torch.float64)
    return (noise - noise.mean(0) + along * torch.eye(D)[0].double()).numpy()


def found(sae, sides, along=0.0, n=3):
    made, held = evidence.halved(sides)
    alive = torch.ones(LATENTS, dtype=torch.bool)
    return evidence.of_latents(sae, made, held, gradients(along), 2.0, 8, n, alive)


@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_a_planted_latent_tells_all_held_out_pairs_apart_and_its_row_steers_as_planted(kind):
    sae = dictionary(kind, **({"k": 12, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}))
    listed = found(sae, pairs(sae, plus=6.0), along=0.7)
    one = listed.first(evidence.PURSUIT)
    assert one == listed.first(evidence.DIFFERENCE) and one.ways == evidence.WAYS
    assert one.latent == PLANTED and one.in_v > 0 and one.on_pairs > 0
    assert one.auroc.value == one.pre_auroc.value == 1.0 and 0.7 < one.pre_auroc.low < one.pre_auroc.high == 1.0
    assert one.response.value == pytest.approx(2.0 * 0.7)  # its length times what an item moves per unit
    assert one.response_p == pytest.approx(len(listed.rows) / LATENTS)  # the best of all, so many times asked
    assert one.pre_auroc_p <= 0.15  # what is aligned with it tells them apart too
    assert listed.together > 0.8  # what reads the first axis writes it
    assert listed.auroc.value == 1.0 and listed.response.value == pytest.approx(1.4, rel=0.1)
    assert len(listed.null_auroc) == len(listed.null_response) == LATENTS


def test_a_latent_that_is_lowered_counts_downwards():
    sae = dictionary()
    listed = found(sae, pairs(sae, minus=6.0))
    one = listed.first(evidence.PURSUIT)
    assert one.latent == LOWERED and one.in_v < 0 > one.on_pairs and one.auroc.value == one.pre_auroc.value == 1.0


def test_where_nothing_is_planted_latents_are_listed_and_none_stands_out():
    low = []
    for seed in range(30):
        sae = dictionary()
        listed = found(sae, pairs(sae, seed=seed))
        assert [len(x) for x in listed.found.values()] == [3, 3] and 3 <= len(listed.rows) <= 6
        rows = listed.rows.values()
        low += [min(x.response_p for x in rows) < 0.05, min(x.pre_auroc_p for x in rows) < 0.05]
    assert np.mean(low) <= 0.1
    inside = [x.pre_auroc.low < 0.5 < x.pre_auroc.high for x in rows]
    assert np.mean(inside) > 0.8


def test_numbers_are_those_of_the_libraries_and_of_the_parts():
    sae = dictionary()
    sides = pairs(sae, plus=2.0)
    made, (pos, neg) = evidence.halved(sides)
    assert len(pos) == PAIRS // 2 and torch.equal(torch.cat([made[0], pos]).sort(0).values, sides[0].sort(0).values)
    listed, truth = found(sae, sides, along=0.3, n=5), [1] * len(pos) + [0] * len(neg)
    for x in listed.rows.values():
        sign = np.sign(x.in_v if evidence.PURSUIT in x.ways else x.on_pairs)
        for f, area in ((decompose.codes_of, x.auroc), (decompose.pre_codes, x.pre_auroc)):
            score = sign * torch.cat([f(sae, pos), f(sae, neg)])[:, x.latent].numpy()
            assert area.value == pytest.approx(roc_auc_score(truth, score))
        row = unit(sae.W_dec[x.latent]).double().numpy()
        assert tuple(x.response) == pytest.approx(tuple(stats.over(2.0 * sign * gradients(0.3) @ row)), rel=1e-6)
    v = (made[0] - made[1]).double().mean(0)
    codes = decompose.pursuit(sae.W_dec, v[None], 8).codes[0]
    expected = (codes.abs() * sae.W_dec.norm(dim=1)).topk(5).indices.tolist()
    assert listed.found[evidence.PURSUIT] == expected == list(listed.rows)[:5]
    assert all(x.in_v == pytest.approx(float(codes[i])) for i, x in listed.rows.items())
    difference = (sae.encode(made[0]) - sae.encode(made[1])).mean(0)
    assert all(listed.rows[i].on_pairs == pytest.approx(float(difference[i]), abs=1e-5) for i in listed.rows)


def test_what_cannot_be_asked_is_refused_in_words():
    sae = dictionary()
    made, held = evidence.halved(pairs(sae))
    few = (held[0][:1], held[1][:1])
    with pytest.raises(ValueError, match="two pairs in either half"):
        evidence.of_latents(sae, made, few, gradients(0), 1.0, 4, 2, torch.ones(LATENTS, dtype=torch.bool))
    with pytest.raises(ValueError, match="two living latents"):
        evidence.of_latents(sae, made, held, gradients(0), 1.0, 4, 2, torch.zeros(LATENTS, dtype=torch.bool))


def test_a_table_says_what_a_latent_is_called_and_where_it_fires():
    sae = dictionary()
    listed = found(sae, pairs(sae, plus=6.0), along=0.7, n=1)
    words = [Latent(i, 0.1, [Context("some | text ", "here", " and", 2.0)], [" joy"], []) for i in range(LATENTS)]
    words[PLANTED] = Latent(PLANTED, 0.0, [], [" tea"], [])
    of_v, one = evidence.lines(listed, words, {PLANTED: "glad *words*"})
    assert {len(x) for x in (of_v, one, evidence.HEAD)} == {len(evidence.HEAD)} and of_v[0] == "v itself"
    assert one[0] == str(PLANTED) and "glad \\*words\\*" in one and "never fired" in one and "' tea'" in one
    assert one[1] == "in v and on pairs"


def test_an_account_is_told_line_by_line():
    sae = dictionary()
    words = [Latent(i, 0.1, [], [" joy"], []) for i in range(LATENTS)]
    difference = torch.zeros(LATENTS)
    difference[[2, 3]] = torch.tensor([2.0, -1.5])
    account = projections.account(sae, torch.randn(D), difference, PLANTED, n=1)
    bias, part, *others, whole, code = evidence.sums(account, words, {PLANTED: "glad"})
    assert len(others) == 3 and whole[0].endswith(f"{PLANTED} (glad)**") and code[1] == f"{account.code:.2f}"
    assert part[0].startswith(("raised by 2.00: 2 (' joy')", "lowered by 1.50: 3 (' joy')"))
    shown = sum(float(x) for _, x in (bias, part, *others))
    assert shown == pytest.approx(account.total, abs=0.03)
