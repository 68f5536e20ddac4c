"""Aggregation against hand arithmetic, against peers, and on data whose answer is known."""

import numpy as np
import pytest
import torch

from helpers.steering import directions as d


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


def alike(n=5, width=8, dtype=torch.float64, offset=0.0):
    """n pairs that all differ by the same vector, with halves that are the same (offset 0) or scatter."""
    g = torch.Generator().manual_seed(n)
    one, other, scatter = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((width,), (width,), (n, width)))
    return (one + offset * scatter).to(dtype), (other + offset * scatter).to(dtype)


SCALES = (1e-30, 1e-12, 1.0, 1e12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 5, 33])
def test_pairs_that_all_differ_alike_have_a_mean_but_no_centred_component(n, dtype, scale):
    for offset in (0.0, 1.0):
        pos, neg = (x * scale for x in alike(n, dtype=dtype, offset=offset))
        v = d.mean(pos, neg)
        for name in ("PC1 uncentred", "PC1 pair-centred"):
            assert cosine(d.METHODS[name](pos, neg) / scale, v / scale) > 1 - 1e-9
        assert d.logistic(pos, neg).isfinite().all() and float(d.logistic(pos, neg) @ v) > 0
        with pytest.raises(ValueError, match="the same: with their mean taken out nothing is left"):
            d.pc1_centred(pos, neg)
        with pytest.raises(ValueError, match="shuffled labels are no null"):
            d.nulls(pos, neg, torch.randn(9, 8))
        if not offset:
            with pytest.raises(ValueError, match="no within-class covariance"):
                d.lda(pos, neg)


@pytest.mark.parametrize("name", [m for m in d.METHODS if m != "mean"])
def test_a_mean_that_cancels_has_no_direction(name):
    x = torch.randn(6, 8)
    half = torch.randn(3, 8, dtype=torch.float64)
    for pos, neg in ((x, x), (x.double(), x.double()), (torch.cat([half, -half]), torch.zeros(6, 8)), (0 * x, 0 * x)):
        assert not d.mean(pos, neg).abs().max() > 1e-15
        with pytest.raises(ValueError, match="mean difference of 6 pairs is zero"):
            d.METHODS[name](pos, neg)
        with pytest.raises(ValueError, match="mean difference of 6 pairs is zero"):
            d.nulls(pos, neg, torch.randn(9, 8))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", d.METHODS)
def test_a_direction_does_not_depend_on_the_unit(name, scale):
    pos, neg, _ = planted()
    ours = d.METHODS[name](pos * scale, neg * scale)
    torch.testing.assert_close(ours / scale, d.METHODS[name](pos, neg), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(bad):
    good, wrong = torch.randn(4, 6), torch.randn(4, 6)
    wrong[2, 3] = bad
    for f in (*d.METHODS.values(), lambda p, n: d.flipped(p, n, 0), lambda p, n: d.nulls(p, n, torch.randn(9, 6))):
        for pair, name in (((wrong, good), "pos"), ((good, wrong), "neg")):
            with pytest.raises(ValueError, match=rf"{name} \(4, 6\) holds 1 values that are NaN or infinite"):
                f(*pair)
    for call in (
        lambda: d.random_like(wrong[2], 0),
        lambda: d.random_like(good[0], 0, 3, wrong),
        lambda: d.nulls(good, good + 1, wrong),
        lambda: d.nulls(good, torch.randn(4, 6), good, [wrong[2]]),
        lambda: d.first_component(wrong),
    ):
        with pytest.raises(ValueError, match="NaN or infinite|differ alike"):
            call()
    with pytest.raises(ValueError, match="float16 overflows"):
        d.mean((good * 1e6).half(), good.half())


def test_a_probe_gives_no_weight_to_what_does_not_vary():
    pos, neg, axis = planted()
    pos[:, 5] = neg[:, 5] = 0.1
    found = d.logistic(pos, neg)
    assert found[5] == 0 and cosine(found, axis) > 0.8


def test_components_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="all 3 rows are zero"):
        d.first_component(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="equal size"):
        d.pc1_uncentred(torch.eye(3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"rows \(4,\) were given"):
        d.first_component(torch.ones(4))
    pos, neg = torch.ones(2, 3), torch.zeros(2, 3)
    found = 0
    for seed in range(20):
        try:
            assert cosine(d.lat(pos, neg, seed), torch.ones(3, dtype=torch.float64)) > 0.99
        except ValueError as error:
            found += 1
            assert "matched with its like" in str(error)
    assert 0 < found < 20


def test_one_pair_has_nothing_to_shuffle_and_an_odd_one_is_left_out():
    pos, neg = torch.randn(7, 5), torch.randn(7, 5)
    with pytest.raises(ValueError, match="nothing to shuffle"):
        d.flipped(pos[:1], neg[:1], 0)
    with pytest.raises(ValueError, match="nothing to shuffle"):
        d.nulls(pos[:1], neg[:1], torch.randn(9, 5))
    left_out = set()
    for seed in range(40):
        one, other = d.flipped(pos, neg, seed)
        swapped = [int(((neg == row).all(1)).any()) for row in one]
        assert len(one) == 6 and sum(swapped) == 3
        rows = [
            ((pos == a).all(1) & (neg == b).all(1)) | ((neg == a).all(1) & (pos == b).all(1))
            for a, b in zip(one, other, strict=True)
        ]
        index = [int(r.nonzero()[0, 0]) for r in rows]
        assert index == sorted(set(index))
        left_out |= set(range(7)) - set(index)
    assert left_out == set(range(7))
    constant = torch.ones(3, 5)
    assert not d.mean(*d.flipped(constant, 0 * constant, 1)).any()
    two = d.mean(*d.flipped(pos[:2], neg[:2], 0))
    torch.testing.assert_close(two.abs(), ((pos - neg)[0] - (pos - neg)[1]).double().abs() / 2)


def test_nulls_of_nothing_are_refused():
    pos, neg, rows = torch.randn(4, 6), torch.randn(4, 6), torch.randn(9, 6)
    for call, word in (
        (lambda: d.random_like(torch.zeros(6), 0), "v is zero"),
        (lambda: d.random_like(rows, 0), r"v \(9, 6\)"),
        (lambda: d.random_like(rows[0], 0, 0), "0 draws"),
        (lambda: d.random_like(rows[0], 0, 2, rows[:1]), "two rows or more of 6"),
        (lambda: d.random_like(rows[0], 0, 2, rows[:, :5]), "two rows or more of 6"),
        (lambda: d.random_like(rows[0], 0, 2, torch.ones(9, 6) * 0.1), "the same row"),
        (lambda: d.nulls(pos, neg, rows, [rows[0], torch.zeros(6)]), r"others\[1\] \(6,\)"),
        (lambda: d.nulls(pos, neg, rows, [rows[0, :1]]), r"others\[0\] \(1,\)"),
        (lambda: d.flipped(pos, neg[:3], 0), "were given"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
