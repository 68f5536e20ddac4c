"""Aggregation against hand arithmetic, against peers, and on data whose answer is known."""

import numpy as np
import pytest
import torch

from helpers import nulls
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
            nulls.shuffled(pos, neg)
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
            nulls.shuffled(pos, neg)


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
    for f in (*d.METHODS.values(), lambda p, n: nulls.flipped(p, n, 0), nulls.shuffled):
        for pair, name in (((wrong, good), "pos"), ((good, wrong), "neg")):
            with pytest.raises(ValueError, match=rf"{name} \(4, 6\) holds 1 values that are NaN or infinite"):
                f(*pair)
    for call in (
        lambda: nulls.random(wrong[2]),
        lambda: nulls.like_rows(good[0], wrong, 3),
        lambda: nulls.others(good[0], [wrong[2]]),
        lambda: nulls.equal_response(good[0], wrong[2]),
        lambda: d.first_component(wrong),
    ):
        with pytest.raises(ValueError, match="NaN or infinite|differ alike"):
            call()
    with pytest.raises(ValueError, match="float16 overflows"):
        d.mean((good * 1e6).half(), good.half())


def test_a_probe_in_the_span_of_its_rows_is_the_probe_in_all_dimensions():
    from sklearn.linear_model import LogisticRegression

    pos, neg, _ = planted(n=20, width=60)
    x = torch.cat([pos, neg])
    whole = LogisticRegression(max_iter=5000, tol=1e-10)
    whole.fit(((x - x.mean(0)) / x.std(0)).numpy(), [1] * 20 + [0] * 20)
    assert cosine(torch.from_numpy(whole.coef_[0]) / x.std(0), d.logistic(pos, neg)) > 1 - 1e-6


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


def test_means_of_subsets_are_of_pairs_that_are_there():
    rows = torch.eye(6, dtype=torch.float64)
    found = d.of_subsets({"a": rows, "b": 2 * rows[:4]}, 3, 20, seed=1)
    assert {n: x.shape for n, x in found.items()} == {"a": (20, 6), "b": (20, 6)}
    for n, length in (("a", 1 / 3), ("b", 2 / 3)):  # three different pairs each, a third of one in every dimension
        assert ((found[n] > 0).sum(1) == 3).all()
        torch.testing.assert_close(found[n].sum(1), torch.full((20,), 3 * length, dtype=torch.float64))
    assert len(found["a"].unique(dim=0)) > 10
    torch.testing.assert_close(d.of_subsets({"a": rows}, 1, 8)["a"], rows[torch.arange(8) % 6])
    torch.testing.assert_close(d.of_subsets({"a": rows}, 6, 2)["a"], rows.mean(0).expand(2, -1))
    with pytest.raises(ValueError, match="a: 7 of 6 pairs"):
        d.of_subsets({"a": rows}, 7, 2)


def test_halves_agree_where_there_is_a_direction_and_not_where_sides_are_swapped():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(40, 200, generator=g, dtype=torch.float64)
    rows = {"shifted": noise + 1.0, "longer": 3 * (noise + 1.0)}
    assert d.split_cosines(rows, 40, 30).min() > 0.9
    assert d.split_cosines(rows, 8, 30).mean() < d.split_cosines(rows, 40, 30).mean()
    assert abs(d.split_cosines({"noise": noise}, 40, 30).mean()) < 0.2  # these forty have some direction by chance
    for size in (4, 6, 40):  # of three pairs a half, one stays out
        assert abs(d.split_cosines(rows, size, 200, swapped=True).mean()) < 0.05
    shared = torch.ones(4, 3) * torch.tensor(
        [[1.0], [2.0], [3.0], [4.0]]
    )  # one direction: halves of no common pair still agree
    assert d.split_cosines({"a": shared}, 4, 5) == pytest.approx(np.ones(5))
    for size, swapped in ((1, False), (41, False), (3, True)):
        with pytest.raises(ValueError, match="cannot be split"):
            d.split_cosines(rows, size, 5, swapped=swapped)


def test_methods_agree_where_they_share_a_direction_and_not_across_behaviours():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 40, 300, generator=g, dtype=torch.float64)
    axes = 2 * torch.eye(300, dtype=torch.float64)[:3]
    one = {"a": noise[0] + axes[0], "b": noise[1] + axes[1]}
    other = {"a": noise[2] + axes[0], "b": noise[3] + axes[1]}
    elsewhere = {n: rows + axes[2] - axes[i] for i, (n, rows) in enumerate(other.items())}
    methods = {"one": one, "the same pairs": one, "other": other, "elsewhere": elsewhere, "single": one}
    same, apart = d.between(methods, 60, single=["single"])
    ceiling = d.split_cosines(one, 40, 200).mean()
    assert same[0, 0] == pytest.approx(ceiling, abs=0.02) and np.allclose(same, same.T)
    assert same[0, 1] == pytest.approx(same[0, 0])  # no pair on both sides, else it would be 1
    assert same[0, 2] == pytest.approx(ceiling, abs=0.05) and abs(same[0, 3]) < 0.1
    assert 0 < same[4, 4] < same[0, 4] < same[0, 0]
    assert abs(apart[:3, :3]).max() < 0.1 and apart[3, 3] > 0.2
    with pytest.raises(ValueError, match="one pair was given"):
        d.between({"m": {"a": noise[0][:1]}}, 2)


def test_pairs_that_point_one_way_are_coherent():
    rows = torch.eye(4, dtype=torch.float64)
    assert d.coherence(3 * rows[:1].expand(5, -1)) == pytest.approx(1) and d.coherence(rows) == pytest.approx(0.5)
    g = torch.randn(4, dtype=torch.float64)
    scaled = torch.tensor([1.0, 2.0, 5.0, 0.1]).double()[:, None] * rows
    mean = rows.mean(0)  # the mean response of the unit rows is that of a vector along their mean, so much shorter
    assert (rows @ g).mean() == pytest.approx(float(d.coherence(scaled) * (mean / mean.norm()) @ g))
