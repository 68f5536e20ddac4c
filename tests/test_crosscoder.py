"""A crosscoder finds what was planted in one model alone, and calls nothing new that is shared, rescaled or written by others."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HARVEST, a_profile

from helpers import store
from helpers.pair import crosscoder, matching, rankings
from helpers.pair.crosscoder import Joined, Planted
from helpers.sae import topk, train
from helpers.sae.activations import Array

D, SHARED, NEW, SCALED = 32, 20, 3, 3  # the last ones have half their length in the base
CONFIG = train.Config(latents=40, k=3, samples=700 * 512, batch=512, lr=3e-3, low=False, dead_after=20_000)


def planted(new=NEW, seed=0, samples=20_000):
    """Rows of base and chat that share unit features, the chat model's alone being `new`; and the features, new, scaled ones last."""
    g = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(SHARED + NEW + SCALED, D, generator=g), dim=1)
    chosen = torch.rand(samples, len(features), generator=g).topk(3).indices
    codes = torch.zeros(samples, len(features)).scatter(1, chosen, torch.rand(samples, 3, generator=g) + 0.5)
    of_base = torch.ones(len(features))
    of_base[SHARED : SHARED + new] = 0
    of_base[SHARED + NEW :] = 0.5
    noise = 0.02 * torch.randn(2, samples, D, generator=g)
    return codes * of_base @ features + noise[0], codes @ features + noise[1], features


def trained(base, chat):
    """A crosscoder of rows, as what `crosscoder.measured` uses of an SAE, and the rows joined."""
    joined = Joined(Array(base), Array(chat))
    w = topk.unit_decoder(train.fit(joined, CONFIG).weights)
    sae = SimpleNamespace(
        W_dec=w.W_dec, b_dec=w.b_dec, device="cpu", cfg=SimpleNamespace(d_in=2 * D, d_sae=len(w.W_dec)),
        encode=lambda x: topk.encode(x, w, CONFIG.k).dense(len(w.W_dec)), decode=lambda z: z @ w.W_dec + w.b_dec,
    )  # fmt: skip
    return sae, joined


def used(found):
    """Latents that fire often enough to be measured, and that the chat model uses."""
    return (found.fired > 100) & (found.used > 0.5)


def test_rows_are_joined_end_to_end_each_in_units_of_its_own_spread():
    base, chat = torch.randn(300, 5) + 7, 3 * torch.randn(300, 5)
    joined = Joined(Array(base), Array(chat))
    assert len(joined) == 300 and joined.d_model == 10
    index = torch.tensor([4, 0, 299])
    one, other = joined.rows(index).chunk(2, 1)
    assert torch.allclose(one, base[index] * joined.scales[0]) and torch.allclose(other, chat[index] * joined.scales[1])
    rows = joined.rows(torch.arange(300))
    assert (rows - rows.mean(0)).chunk(2, 1)[1].square().mean() == pytest.approx(1, abs=1e-4)
    batch = next(joined.batches(64, seed=3, start=0))
    assert torch.equal(batch[:, :5], next(Array(base).batches(64, seed=3, start=0)) * joined.scales[0])
    assert joined.about() != Joined(Array(base + 1), Array(chat)).about()  # so that no other pair's crosscoder is taken
    assert Joined(Array(chat), Array(base), joined.scales).scales == joined.scales
    assert joined.place(3).count("row 3") == 2


def test_planted_features_have_the_energy_asked_for_on_tokens_of_their_own():
    base = torch.randn(40_000, 12)
    rows = Planted(Array(base), [0.5, 2.0, 0.1], seed=3)
    added = rows.rows(torch.arange(len(rows))) - base
    codes = added @ rows.directions.T
    assert torch.allclose(rows.directions @ rows.directions.T, torch.eye(3), atol=1e-5)
    assert torch.allclose(codes @ rows.directions, added, atol=1e-5) and (codes.abs() > 1e-3).sum(1).max() == 1
    assert codes.square().mean(0).tolist() == pytest.approx([0.5, 2.0, 0.1], rel=0.2)
    assert (codes > 1e-3).double().mean(0).tolist() == pytest.approx([crosscoder.ON] * 3, rel=0.2)
    assert torch.equal(Planted(Array(base[:100]), [1.0, 1.0, 1.0], seed=3).directions, rows.directions)  # held-out rows
    assert rows.about() != Planted(Array(base), [0.5, 2.0, 0.2], seed=3).about() != Array(base).about()


def by_hand():
    """Four latents with known codes: shared, shrunk (the base has it, its row there is zero), and two that fire together, of which the
    second writes in the base what the first writes in the chat model; and rows without noise."""
    g = torch.Generator().manual_seed(1)
    rows = torch.linalg.qr(torch.randn(8, 8, generator=g)).Q[:3] * torch.tensor([[1.0], [2.0], [1.5]])
    chat = torch.stack([rows[0], rows[1], rows[2], torch.zeros(8)])
    base = torch.stack([rows[0], torch.zeros(8), torch.zeros(8), rows[2]])
    codes = torch.relu(torch.randn(500, 4, generator=g)) * (torch.rand(500, 4, generator=g) < 0.4)
    codes[:, 3] = codes[:, 2]
    bias = 5 * torch.randn(16, generator=g)
    W_dec = torch.cat([base, chat], 1)
    x = codes @ W_dec + bias
    x[:, :8] += codes[:, 1:2] * rows[1]
    sae = SimpleNamespace(
        W_dec=W_dec, b_dec=bias, device="cpu", cfg=SimpleNamespace(d_in=16, d_sae=4),
        encode=lambda part: codes[[int((x - row).abs().sum(1).argmin()) for row in part]],
        decode=lambda z: z @ W_dec + bias,
    )  # fmt: skip
    return sae, x, codes


def test_the_ratios_are_least_squares_and_tell_shrunk_and_decoupled_latents_from_new_ones():
    sae, x, codes = by_hand()
    found = crosscoder.measured(sae, Array(x), batch=150)
    assert found.norm[:3].tolist() == pytest.approx([1, 0, 0]) and found.norm[3] == torch.inf
    assert found.relative_norm.tolist() == pytest.approx([0.5, 1, 1, 0])
    assert found.error[:3].tolist() == pytest.approx([1, 1, 0], abs=0.01)
    assert found.reconstruction[:3].tolist() == pytest.approx([1, 0, 1], abs=0.1)
    assert not found.chat_only.any() and torch.equal(found.fired, (codes > 0).sum(0).double())
    made, bias = sae.decode(codes), sae.b_dec
    for j in range(3):
        row = sae.W_dec[j, 8:]
        f = (codes[:, j : j + 1] * row).double().flatten()
        for measure, whole in (
            ("error", [x[:, h] - made[:, h] + codes[:, j : j + 1] * sae.W_dec[j, h] for h in (slice(8), slice(8, 16))]),
            ("reconstruction", [(made - bias)[:, h] for h in (slice(8), slice(8, 16))]),
        ):
            base, chat = (float(f @ y.double().flatten() / (f @ f)) for y in whole)
            assert float(getattr(found, measure)[j]) == pytest.approx(base / chat, abs=1e-4)
    total = (x - x.mean(0)).square().sum(0).double().reshape(2, 8).sum(1)
    wrong = (x - made).square().sum(0).double().reshape(2, 8).sum(1)
    assert found.explained == pytest.approx((1 - wrong / total).tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="width 16, the rows have 9"):
        crosscoder.measured(sae, Array(x[:, :9]))


def test_a_latent_that_never_fires_has_no_ratios():
    sae, x, codes = by_hand()
    codes[:, 0] = 0
    found = crosscoder.measured(sae, Array(x))
    assert found.fired[0] == 0 and all(torch.isnan(v[0]) for v in found[:4]) and not found.chat_only[0]


def test_of_two_equal_models_nothing_is_only_in_one():
    _, chat, _ = planted()
    found = crosscoder.measured(*trained(chat, chat))
    some = used(found)
    assert some.sum() >= SHARED and not found.chat_only[some].any() and min(found.explained) > 0.9
    for ratio in (found.norm, found.error, found.reconstruction):
        assert (ratio[some] - 1).abs().max() < 0.05


def test_a_model_with_longer_rows_has_nothing_new():
    _, chat, _ = planted()
    found = crosscoder.measured(*trained(chat, 3 * chat))
    some = used(found)
    assert not found.chat_only[some].any() and (found.norm[some] - 1).abs().max() < 0.05


def test_directions_planted_in_the_chat_model_alone_are_found_and_rescaled_ones_are_not_called_new():
    base, chat, features = planted()
    sae, joined = trained(base, chat)
    found = crosscoder.measured(sae, joined)
    rows = torch.nn.functional.normalize(crosscoder.halves(sae)[1], dim=1)
    cosine, nearest = (rows @ features.T * used(found)[:, None]).max(0)
    assert cosine.min() > 0.9  # every feature has its latent
    new, scaled = nearest[SHARED : SHARED + NEW], nearest[SHARED + NEW :]
    assert found.relative_norm[new].min() > 0.9 and found.chat_only[new].all()
    assert max(found.error[new].max(), found.reconstruction[new].max()) < 0.2
    assert not found.chat_only[nearest[:SHARED]].any() and not found.chat_only[scaled].any()
    assert (found.norm[scaled] - 0.5).abs().max() < 0.1 and (found.error[scaled] - 0.5).abs().max() < 0.1
    ranked = crosscoder.ranked(sae, found, 100, 0.5)
    assert ranked.of == (found.fired > 0).sum() and np.allclose(np.linalg.norm(ranked.rows, axis=1), 1)
    for measure in ranked.by.values():
        assert set(ranked.ids[rankings.top(measure, NEW)].tolist()) == set(new.tolist())
    told = crosscoder.recovered(ranked, found, features)
    assert (
        told[SHARED : SHARED + NEW].all() and told.sum() == NEW
    )  # shared and rescaled ones have a latent that is not new
    assert not crosscoder.recovered(ranked, found, torch.linalg.qr(torch.randn(D, 3)).Q.T).any()
    span = torch.linalg.qr(features[SHARED : SHARED + NEW].T).Q.T
    assert crosscoder.false_alarms(ranked, found, span) == 0
    other = torch.linalg.qr(features[: SHARED // 2].T).Q.T  # had others been planted, the new ones would be alarms
    assert 0 < crosscoder.false_alarms(ranked, found, other) < 0.5
    back = crosscoder.measured(*trained(chat, base))  # the other way round they are only in the base
    assert not back.chat_only[used(back)].any()


def test_a_crosscoder_is_trained_once_as_the_profile_says(tmp_path, monkeypatch):
    how = {"expansion": 2, "k": 3, "samples": 40 * 64, "batch": 64, "low": False}
    profile = a_profile(layer=2, sae={"harvest": HARVEST, "train": how})
    base, chat, _ = planted(samples=2000)
    known = dict(model_name="a", hook_name="blocks.2.hook_resid_post")
    joined = Joined(Array(base, **known), Array(chat, **known | {"model_name": "b"}))
    one, folder = crosscoder.dictionary(profile, joined)
    assert one.d_model == 2 * D and one.latents == 2 * D and one.k == 3 and one.model == "b"
    monkeypatch.setattr(train, "fit", None)
    again, same = crosscoder.dictionary(profile, joined)
    assert folder == same and torch.equal(one.sae.W_dec, again.sae.W_dec)
    kept = store.kept(crosscoder.measured, one.sae, joined)
    assert torch.equal(kept.fired, crosscoder.measured(again.sae, joined).fired)


def test_partners_are_those_of_the_latent_most_alike():
    """Four latents of the chat model's SAE, of which the base's holds two in another order, and one left over."""
    chat = torch.eye(6)[:4]
    base = torch.eye(6)[[1, 0, 5]]
    found = matching.match(base, chat)
    rows = torch.stack([chat[0] + 0.1 * chat[3], 3 * chat[1], chat[2], chat[3], torch.eye(6)[4]])
    mates = crosscoder.partners(rows, chat, found)
    assert mates.own[:4].min() > 0.99 and mates.own[4] == 0
    assert mates.other[:2].tolist() == pytest.approx([1, 1]) and mates.other[2:4].tolist() == [0, 0]
    said = mates.said(0.7)
    assert said["shared"].tolist() == [True, True, False, False, False]
    assert said["new"].tolist() == [False, False, True, True, False] and said["nothing"].tolist() == [False] * 4 + [
        True
    ]
