"""Maps that are known, maps of noise, and activations between which no map should be fitted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from helpers import stats
from helpers.pair import alignment
from helpers.pair.alignment import Fit

D = 12


def rows(n=600, noise=0.0, weight=None, seed=0):
    """X, Y = X weight + 1 + noise, documents of ten rows."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, D, generator=g, dtype=torch.float64) @ torch.diag(torch.linspace(0.5, 3, D).double())
    weight = torch.eye(D, dtype=torch.float64) if weight is None else weight
    return X, X @ weight + 1 + noise * torch.randn(n, D, generator=g, dtype=torch.float64), torch.arange(n) // 10


def turned(seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64)).Q


def r2(score):
    return stats.ratio(score.total - score.error, score.total)


def test_each_map_is_exact_on_its_own_kind():
    general = torch.randn(D, D, dtype=torch.float64)
    for weight, fit in (
        (torch.eye(D, dtype=torch.float64), alignment.shift),
        (turned(), alignment.procrustes),
        (general, lambda X, Y: alignment.ridge(X, Y, (X, Y), penalties=(1e-12,))),
    ):
        X, Y, documents = rows(weight=weight)
        fitted = fit(X, Y)
        assert torch.allclose(fitted.weight, weight, atol=1e-8) and torch.allclose(
            fitted.bias, torch.ones(D).double(), atol=1e-8
        )
        assert alignment.score(fitted, X, Y, documents).r2 == pytest.approx(1, abs=1e-12)
    assert torch.allclose(fitted.directions(torch.eye(D)), general.float(), atol=1e-6)  # directions get no bias


@pytest.mark.parametrize("affine", [True, False])
def test_ridge_is_sklearns_at_the_penalty_that_dev_prefers(affine):
    X, Y, _ = rows(80, noise=3.0, weight=turned())
    dev = rows(300, noise=3.0, weight=turned(), seed=1)[:2]
    fitted = alignment.ridge(X, Y, dev, affine)
    x = X - X.mean(0) if affine else X
    alpha = fitted.penalty * float(torch.linalg.eigvalsh(x.T @ x).mean())
    theirs = Ridge(alpha=alpha, fit_intercept=affine).fit(X.numpy(), Y.numpy())
    assert np.allclose(fitted.weight.numpy(), theirs.coef_.T, atol=1e-8)
    assert np.allclose(fitted.bias.numpy(), theirs.intercept_, atol=1e-8)
    errors = {
        p: float((dev[1] - alignment.ridge(X, Y, dev, affine, (p,))(dev[0])).square().sum())
        for p in alignment.PENALTIES
    }
    assert fitted.penalty == min(errors, key=errors.get) > min(alignment.PENALTIES)


def test_the_score_is_r2_overall_and_by_dimension_with_an_interval_over_documents():
    from sklearn.metrics import r2_score

    X, Y, documents = rows(noise=1.5)
    fitted = alignment.shift(X, Y)
    found = alignment.score(fitted, X, Y, documents)
    assert found.r2 == pytest.approx(r2_score(Y.numpy(), fitted(X).numpy(), multioutput="variance_weighted"), abs=1e-12)
    assert np.allclose(found.per_dimension.numpy(), r2_score(Y.numpy(), fitted(X).numpy(), multioutput="raw_values"))
    around = r2(found)
    assert len(found.error) == 60 and around.value == pytest.approx(found.r2, abs=1e-12)
    # the mean of Y is taken for known: leaving out documents one by one, with their own mean, gives the same interval
    whole = stats.over(
        np.arange(60),
        lambda kept: r2_score(
            *(z.reshape(60, 10, D)[kept].reshape(-1, D) for z in (Y.numpy(), fitted(X).numpy())),
            multioutput="variance_weighted",
        ),
    )
    assert np.allclose(around, whole, atol=0.1 * (whole.high - whole.low))


def test_what_a_map_removes_of_the_identitys_error_and_the_shuffled_null_removes_nothing():
    """Interpolating rows look perfect where they were fitted; held-out rows and shuffled pairs show what that is worth."""
    g = torch.Generator().manual_seed(5)
    weight = torch.eye(D, dtype=torch.float64) + 0.3 * torch.randn(D, D, generator=g, dtype=torch.float64)
    (X, Y, _), (dx, dy, _), (hx, hy, documents) = (rows(400, 0.3, weight, seed) for seed in range(3))
    base = alignment.score(alignment.identity(X, Y), hx, hy, documents)
    good = alignment.score(alignment.ridge(X, Y, (dx, dy)), hx, hy, documents)
    assert stats.ratio(base.error - good.error, base.error).low > 0.9
    mixed = Y[torch.randperm(400, generator=g)]
    null = alignment.score(alignment.ridge(X, mixed, (dx, dy[torch.randperm(400, generator=g)])), hx, hy, documents)
    assert r2(null).high < 0.05
    few = alignment.ridge(X[:8], mixed[:8], (X[:8], mixed[:8]))
    assert alignment.score(few, X[:8], mixed[:8], torch.arange(8)).r2 > 0.999  # perfect, on nothing
    assert alignment.score(few, hx, hy, documents).r2 < 0


def test_the_sources_map_is_a_ridge_without_an_intercept_at_the_penalty_given():
    X, Y, _ = rows(80, noise=3.0, weight=turned())
    theirs = Ridge(alpha=1.0, fit_intercept=False).fit(X.numpy(), Y.numpy())
    fitted = alignment.least_squares("source 002", X, Y)
    assert np.allclose(fitted.weight.numpy(), theirs.coef_.T, atol=1e-8) and not fitted.bias.any()


def test_texts_padded_on_the_left_and_cut_are_padding_but_for_the_longest():
    cut = alignment.cut_after_padding([[1, 2], [3], [4, 5, 6, 7, 8, 9]], pad=0, width=3)
    assert cut.tolist() == [[0, 0, 0], [0, 0, 0], [4, 5, 6]]
    assert alignment.cut_after_padding([[1, 2], [3, 4, 5]], 0, 9).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_map_to_shuffled_rows_finds_nothing_and_one_to_shuffled_differences_their_mean():
    (X, Y, _), (dx, dy, _), (hx, hy, documents) = (rows(600, 0.3, turned(), seed) for seed in range(3))
    found = alignment.score(alignment.shuffled(X, Y, (dx, dy), seed=1), hx, hy, documents)
    assert found.r2 < 0.05
    X, Y, _ = rows(600, noise=0.5)  # Y = X + 1 + noise: all there is to find is the mean
    null = alignment.shuffled(X, Y, (X, Y), differences=True)
    assert torch.allclose(null.bias, torch.ones(D).double(), atol=0.2)
    assert torch.allclose(null.weight, torch.eye(D).double(), atol=0.2)


class Side:
    """Rows of tokens in documents of ten, as a harvest gives them."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __len__(self):
        return len(self.tensor)

    def rows(self, index):
        return self.tensor[index]

    def named(self, name):
        assert name == "document"
        return torch.arange(len(self.tensor)) // 10


def test_rows_are_split_by_document_and_both_sides_hold_the_same_tokens():
    X, Y, _ = rows(400)
    (x, y), (dev_x, dev_y) = alignment.split(SimpleNamespace(base=Side(X), chat=Side(Y)), 300, seed=2)
    assert len(x) + len(dev_x) == 300 and torch.allclose(y, x + 1) and torch.allclose(dev_y, dev_x + 1)
    place = {tuple(row.tolist()): i // 10 for i, row in enumerate(X)}
    assert {place[tuple(row.tolist())] for row in dev_x} == {0, 10, 20, 30}
    assert not {place[tuple(row.tolist())] for row in x} & {0, 10, 20, 30}


class Told(Side):
    """Such rows, and the tokens they are of: document d is one row of ten tokens, of which token 3 is `odd` everywhere."""

    def __init__(self, tensor, odd=7, usual=5):
        super().__init__(tensor)
        self.ids = torch.full((len(tensor) // 10, 10), usual)
        self.ids[:, 3] = odd
        self.longest = 0  # so many tokens are of one document

    def named(self, name):
        place = torch.arange(len(self.tensor))
        return torch.where(place < self.longest, 0, place // 10) if name == "document" else place % 10

    def token_rows(self):
        return self.ids, torch.arange(len(self.tensor)) // 10


def test_a_map_fails_token_by_token_where_the_rows_were_spoilt():
    X, Y, documents = rows(2000, noise=0.1)
    Y[documents * 10 + 3] += 3 * torch.randn(len(X), D, generator=torch.Generator().manual_seed(1)).double()
    fitted, other = alignment.shift(X, Y), alignment.identity(X, Y)
    by = alignment.by_token(fitted, X, Y)
    found = alignment.score(fitted, X, Y, documents)
    assert 1 - by.error.sum() / by.total.sum() == pytest.approx(found.r2)
    i = 42
    y, mean = Y[i], Y.mean(0)
    assert by.relative[i] == pytest.approx(float((y - fitted(X[i])).norm() ** 2 / (y - mean).norm() ** 2))
    worst = by.worst(150)
    assert (worst % 10 == 3).mean() > 0.95 and np.all(np.diff(by.relative[worst]) <= 0)
    samples, tokenizer = Told(Y), SimpleNamespace(decode=lambda ids: "".join(map(str, ids)))
    maps = {"shift": by, "identity": alignment.by_token(other, X, Y)}
    odd, usual, whole = alignment.worst_kinds(maps, samples, tokenizer, n=5)
    assert (odd.token, usual.token, whole.token) == ("7", "5", "all tokens") and (odd.tokens, whole.tokens) == (
        100,
        1000,
    )
    assert odd.r2["shift"].high < usual.r2["shift"].low and odd.r2["identity"].value < odd.r2["shift"].value
    here = (documents % 2 == 1) & (torch.arange(len(X)) % 10 == 3)  # measured on the documents it was not chosen on
    alone = 1 - by.error[here.numpy()].sum() / by.total[here.numpy()].sum()
    assert odd.r2["shift"].value == pytest.approx(alone)
    assert [k.token for k in alignment.worst_kinds(maps, samples, tokenizer, n=5, least=200)] == ["5", "all tokens"]
    samples.longest = 1500  # a document so long that an interval over it and others has no ends is one to choose on
    odd, whole = alignment.worst_kinds(maps, samples, tokenizer, n=1, least=10)
    assert (odd.token, odd.tokens, whole.tokens) == ("7", 25, 250)
    assert len(alignment.worst_kinds(maps, samples, tokenizer, n=1)) == 2


def test_contexts_are_the_text_around_a_token():
    samples, tokenizer = Told(torch.zeros(30, D)), SimpleNamespace(decode=lambda ids: "".join(map(str, ids)))
    first, last = alignment.contexts(samples, tokenizer, np.array([13, 29]), np.arange(30.0), window=2)
    assert tuple(first) == ("55", "7", "55", 13.0) and tuple(last) == ("55", "5", "", 29.0)


def test_two_maps_fail_on_the_same_tokens_or_on_others():
    rng = np.random.default_rng(0)
    documents = torch.arange(3000) // 10
    hard = rng.exponential(size=3000)
    total = np.ones(3000)
    one, same, apart = (
        alignment.ByToken(x, total) for x in (hard, hard * rng.uniform(0.9, 1.1, 3000), rng.exponential(size=3000))
    )
    chance = alignment.fails_by_chance(3000, 150, 500)
    assert chance.mean() == pytest.approx(0.05, abs=0.01) and chance.shape == (500,)
    again, by_chance = (alignment.fails_again(one, other, documents, 150) for other in (same, apart))
    assert again.low > 0.7 and stats.p_value(again.value, chance) < 0.01
    assert by_chance.high < 0.15 and stats.p_value(by_chance.value, chance) > 0.05
    assert again.value == pytest.approx(np.isin(one.worst(150), same.worst(150)).mean())


def test_the_gate_lets_real_pairs_through_and_refuses_with_the_reason():
    X, Y, _ = rows(noise=0.5)
    fine = {"base": (Fit(0.8, 30), Fit(0.7, 35)), "chat": (Fit(0.8, 30), Fit(0.75, 28))}
    passed = alignment.gate(X, Y, fine)
    assert passed.passed and passed.reason == "" and "**not met**" not in passed.table()
    constant = X[:1].repeat(500, 1)
    constant[7] = X[7]  # source 002: 499 of 500 rows are the same
    refused = alignment.gate(constant, constant * 1.01)
    assert not refused.passed and "2 of 500" in refused.reason and "rank of X: 1 of 12" in refused.reason
    assert "8.3" in alignment.gate(X[:100], Y[:100]).reason
    flat = X.clone()
    flat[:, 6:] = flat[:, :6]
    assert "rank of Y: 6 of 12" in alignment.gate(X, flat).reason
    assert "norm, Y over X" in alignment.gate(X, 30 * Y).reason
    published = {"gemma-2b": (Fit(0.79, 60), Fit(-14.99, 900))}  # the pair that does not transfer
    told = alignment.gate(X, Y, published).reason
    assert "explains -14.99 (at home 0.79)" in told and "900 (at home 60)" in told


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: alignment.shift(torch.zeros(4, 3), torch.zeros(4, 2)), "two equal"),
        (lambda: alignment.procrustes(torch.full((4, 3), torch.nan), torch.zeros(4, 3)), "NaN"),
        (lambda: alignment.ridge(torch.ones(9, 3), torch.ones(9, 3), (torch.ones(9, 3),) * 2), "all the same"),
    ],
)
def test_bad_input_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
