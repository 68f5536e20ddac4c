"""Aggregation against hand arithmetic, against peers, and on data whose answer is known."""

import numpy as np
import pytest
import torch

from helpers import directions as d


def planted(n=60, width=24, length=3.0, noise=0.3, seed=0):
    g = torch.Generator().manual_seed(seed)
    axis = torch.zeros(width, dtype=torch.float64)
    axis[3] = length
    neg = torch.randn(n, width, generator=g, dtype=torch.float64)
    return neg + axis + noise * torch.randn(n, width, generator=g, dtype=torch.float64), neg, axis


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


def test_mean_is_hand_arithmetic_in_float64():
    pos, neg = torch.tensor([[3.0, 0], [1, 2]]), torch.tensor([[1.0, 0], [0, 0]])
    assert torch.equal(d.mean(pos, neg), torch.tensor([1.5, 1.0], dtype=torch.float64))
    big = torch.full((10_000, 1), 1.0001, dtype=torch.bfloat16)
    assert float(d.mean(big, torch.zeros_like(big))) == float(big[0].double())


@pytest.mark.parametrize("name", [m for m in d.METHODS if m not in ("PC1 centred", "LAT (shuffled)")])
def test_every_method_finds_a_planted_direction(name):
    pos, neg, axis = planted()
    found = d.METHODS[name](pos, neg)
    assert cosine(found, axis) > 0.8
    torch.testing.assert_close(found.norm(), d.mean(pos, neg).norm())
    assert cosine(d.METHODS[name](neg, pos), axis) < -0.8  # the sign rule


def test_lat_finds_it_where_the_classes_dominate():
    pos, neg, axis = planted(n=200, length=12.0)
    assert cosine(d.lat(pos, neg), axis) > 0.9


def test_centred_component_is_silent_about_the_mean():
    pos, neg, axis = planted(noise=0.3)
    assert abs(cosine(d.pc1_centred(pos, neg), axis)) < 0.5


def test_pair_centred_equals_uncentred_whatever_the_data():
    pos, neg = torch.randn(9, 20), torch.randn(9, 20)
    torch.testing.assert_close(d.pc1_pair_centred(pos, neg), d.pc1_uncentred(pos, neg), atol=1e-9, rtol=1e-7)


def test_components_equal_sklearn():
    from sklearn.decomposition import PCA, TruncatedSVD

    pos, neg, _ = planted()
    diff = (pos - neg).numpy()
    pca = PCA(n_components=1).fit(diff).components_[0]
    assert abs(abs(cosine(d.pc1_centred(pos, neg), torch.from_numpy(pca))) - 1) < 1e-9
    svd = TruncatedSVD(n_components=1, algorithm="arpack").fit(diff).components_[0]
    assert abs(abs(cosine(d.pc1_uncentred(pos, neg), torch.from_numpy(svd))) - 1) < 1e-9


def test_inverse_transform_is_the_mean_for_noise_too():
    """The source study's comparison: an identity, whatever the data and the number of components."""
    from sklearn.decomposition import PCA

    noise = np.random.default_rng(0).normal(size=(40, 64))
    for k in (1, 3):
        pca = PCA(n_components=k).fit(noise)
        np.testing.assert_allclose(pca.inverse_transform(pca.transform(noise)).mean(0), noise.mean(0), atol=1e-12)


def test_lda_equals_sklearn():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    pos, neg, _ = planted()
    x, y = torch.cat([pos, neg]).numpy(), [1] * 60 + [0] * 60
    theirs = LinearDiscriminantAnalysis(solver="eigen", shrinkage="auto").fit(x, y).coef_[0]
    assert abs(cosine(d.lda(pos, neg), torch.from_numpy(theirs)) - 1) < 1e-6


def test_mean_and_uncentred_component_equal_the_steering_vectors_package():
    peers = pytest.importorskip(
        "steering_vectors.aggregators", reason="pip install --no-deps -r requirements-oracle.txt"
    )
    pos, neg, _ = planted()
    torch.testing.assert_close(peers.mean_aggregator()(pos, neg), d.mean(pos, neg))
    theirs = peers.pca_aggregator()(pos.float(), neg.float()).double()
    assert cosine(theirs, d.pc1_uncentred(pos, neg)) > 1 - 1e-6


def test_swapping_exactly_half_leaves_nothing_of_a_constant_difference():
    pos, neg = torch.ones(40, 5), torch.zeros(40, 5)
    assert torch.equal(d.mean(*d.flipped(pos, neg, seed=3)), torch.zeros(5, dtype=torch.float64))
    assert not torch.equal(d.flipped(pos, neg, 1)[0], d.flipped(pos, neg, 2)[0])


def test_nulls_have_the_vectors_norm_and_the_covariance_asked_for():
    pos, neg, _ = planted()
    rows = torch.randn(500, 24, dtype=torch.float64) * torch.linspace(0.1, 3, 24, dtype=torch.float64)
    out = d.nulls(pos, neg, rows, [torch.randn(24)], draws=400)
    v = d.mean(pos, neg)
    for name, drawn in out.items():
        wanted = torch.zeros(len(drawn)) if name == "zero" else v.norm().expand(len(drawn)).float()
        torch.testing.assert_close(drawn.norm(dim=1).float(), wanted)
    shares = [
        out[k].square().mean(0) / out[k].square().mean(0).sum() for k in ("random", "random (residual covariance)")
    ]
    assert shares[0].max() < 0.08 and shares[1][-1] > 0.1 and shares[1][0] < 0.01


@pytest.mark.parametrize("pos,neg", [(torch.zeros(2, 3), torch.zeros(3, 3)), (torch.zeros(0, 3), torch.zeros(0, 3))])
def test_bad_shapes_are_refused(pos, neg):
    with pytest.raises(ValueError, match="were given"):
        d.mean(pos, neg)
