"""Linear maps from one model's activations to another's, how well they hold on held-out documents, and when not to fit one.

Tensors in, tensors out (`split` reads the rows it is asked for, `of_padding` two models, "where it fails" the tokens they are
of); sums and solutions in float64. Rows are tokens, row i of X and of Y the same token. The gate exists because a map between
two constants is perfect: with more dimensions than distinct rows any fit interpolates.
Sources: orthogonal Procrustes, Schoenemann 1966; ridge, Hoerl & Kennard 1970.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from helpers import stats, store
from helpers.lm import reading, text
from helpers.lm.reading import LM
from helpers.lm.tokens import Tokenizer
from helpers.sae.activations import Pair, Samples
from helpers.sae.latents import Context
from helpers.stats import Interval

PENALTIES = tuple(10.0**e for e in range(-8, 1))  # in units of the mean eigenvalue of the covariance of X


class Map(NamedTuple):
    """x -> x @ weight + bias: `weight` (d, d) and `bias` (d,) float64; the ridge `penalty`, 0 where there is none."""

    kind: str
    weight: Tensor
    bias: Tensor
    penalty: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Rows (n, d) mapped, float64."""
        return x.double() @ self.weight + self.bias

    def directions(self, rows: Tensor) -> Tensor:
        """Directions (n, d), such as a decoder's rows, mapped: the weight alone, float32."""
        return (rows.double() @ self.weight).float()


def _two(X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    if X.ndim != 2 or X.shape != Y.shape or len(X) < 2:
        raise ValueError(
            f"X {tuple(X.shape)} and Y {tuple(Y.shape)} were given; two equal (tokens, d_model) with two rows or more are wanted"
        )
    X, Y = X.detach().double(), Y.detach().double()
    if not bool(torch.isfinite(X).all() & torch.isfinite(Y).all()):
        raise ValueError("X or Y holds NaN or infinity: look at the activations first")
    return X, Y


def identity(X: Tensor, Y: Tensor) -> Map:
    """No map at all: between a model and its own fine-tune, the baseline to beat."""
    d = X.shape[1]
    return Map("identity", torch.eye(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64))


def shift(X: Tensor, Y: Tensor) -> Map:
    """The identity plus the difference of means."""
    X, Y = _two(X, Y)
    return Map("identity + shift", torch.eye(X.shape[1], dtype=torch.float64), Y.mean(0) - X.mean(0))


def procrustes(X: Tensor, Y: Tensor) -> Map:
    """The orthogonal map (rotation or reflection) of least squared error between the centred rows, and the means."""
    X, Y = _two(X, Y)
    mean_x, mean_y = X.mean(0), Y.mean(0)
    U, _, Vh = torch.linalg.svd((X - mean_x).T @ (Y - mean_y))
    return Map("orthogonal Procrustes", U @ Vh, mean_y - mean_x @ (U @ Vh))


def ridge(
    X: Tensor, Y: Tensor, dev: tuple[Tensor, Tensor], affine: bool = True, penalties: Sequence[float] = PENALTIES
) -> Map:
    """Least squares with penalty * (mean eigenvalue) * rows * |W|^2, the penalty that fits `dev` (X, Y of other documents) best.

    `affine`: rows are centred and the bias is free; else it is zero. One eigendecomposition serves all penalties.
    """
    X, Y = _two(X, Y)
    dev_x, dev_y = _two(*dev)
    zero = torch.zeros(X.shape[1], dtype=torch.float64)
    mean_x, mean_y = (X.mean(0), Y.mean(0)) if affine else (zero, zero)
    values, axes = torch.linalg.eigh((X - mean_x).T @ (X - mean_x))
    if not float(values.clamp_min(0).mean()) > 0:
        raise ValueError(
            f"the {len(X)} rows of X {'are all the same' if affine else 'are all zero'}: there is nothing to fit; look at the tokens they are "
            "of, and at alignment.gate"
        )
    cross = axes.T @ ((X - mean_x).T @ (Y - mean_y))

    def fitted(penalty: float) -> Map:
        weight = axes @ (cross / (values.clamp_min(0) + penalty * values.clamp_min(0).mean())[:, None])
        return Map("affine ridge" if affine else "ridge", weight, mean_y - mean_x @ weight, penalty)

    return min(map(fitted, penalties), key=lambda found: float((dev_y - found(dev_x)).square().sum()))


def least_squares(kind: str, X: Tensor, Y: Tensor, penalty: float = 1.0) -> Map:
    """Ridge without an intercept at a penalty that is given, in the units of X^T X: as source 002 fits its map."""
    X, Y = _two(X, Y)
    eye = torch.eye(X.shape[1], dtype=torch.float64)
    return Map(kind, torch.linalg.solve(X.T @ X + penalty * eye, X.T @ Y), eye.new_zeros(len(eye)), penalty)


# --- what it is fitted on ----------------------------------------------------------------------------------------------

Rows = tuple[Tensor, Tensor]  # X and Y (n, d)


def split(pair: Pair, n: int, seed: int = 0) -> tuple[Rows, Rows]:
    """(X, Y) and (dev X, dev Y) of `n` tokens of a pair, drawn at random: to fit on, and those of every tenth document, to choose a
    penalty by."""
    index = torch.randperm(len(pair.base), generator=torch.Generator().manual_seed(seed))[:n]
    dev = pair.base.named("document")[index] % 10 == 0
    fit, choose = ((pair.base.rows(part), pair.chat.rows(part)) for part in (index[~dev], index[dev]))
    return fit, choose


def shuffled(X: Tensor, Y: Tensor, dev: Rows, seed: int = 0, differences: bool = False) -> Map:
    """The null of `ridge`: the affine map of X to the rows of Y in another order, or with `differences` to X plus the rows of Y - X
    in another order, so that only their mean is left to find."""
    mixed = []
    for x, y in ((X, Y), dev):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        mixed.append(x + (y - x)[order] if differences else y[order])
    return ridge(X, mixed[0], (dev[0], mixed[1]))


def cut_after_padding(coded: Sequence[Sequence[int]], pad: int, width: int) -> Tensor:
    """Token rows (texts, width) as source 002 makes them: padded on the *left* to the longest text, then cut to their first `width`.

    All but the longest texts are padding to the end.
    """
    longest = max(map(len, coded))
    return torch.tensor([([pad] * (longest - len(ids)) + list(ids))[:width] for ids in coded])


class OfPadding(NamedTuple):
    """The map that source 002 fits, on rows most of which are padding: how many of its `rows` are `distinct`, R^2 on these rows
    themselves (`own_r2`), its mean squared error and the identity's (`mse_without`), and what `gate` says of the rows (`refusal`)."""

    map: Map
    rows: int
    distinct: int
    own_r2: float
    mse: float
    mse_without: float
    refusal: str


def of_padding(base: LM, chat: LM, layer: int, texts: int, width: int) -> OfPadding:
    """The map of source 002 rebuilt for a pair of models: least squares on the last position of `texts` packaged texts, padded and cut
    as it does (`cut_after_padding`)."""
    documents = (d for d in text.documents("packaged:wiki+web+stories") if isinstance(d, str))
    coded = [base.tokenizer(d, add_special_tokens=False)["input_ids"] for d in islice(documents, texts)]
    cut = cut_after_padding(coded, base.pad_id, width)
    different, which = torch.unique(cut, dim=0, return_inverse=True)  # equal tokens, equal residuals
    X, Y = (reading.packed(lm, different, [layer])[layer][:, -1].double().cpu()[which] for lm in (base, chat))
    fitted = least_squares("source 002", X, Y)
    mse, without = (float((Y - x).square().mean()) for x in (fitted(X), X))
    own = score(fitted, X, Y, torch.arange(len(cut))).r2
    return OfPadding(fitted, len(cut), len(different), own, mse, without, gate(X, Y).reason)


def best_shuffled(
    X: Tensor, Y: Tensor, dev: Rows, held: Rows, documents: Tensor, draws: int, seed: int = 0, differences: bool = False
) -> float:  # fmt: skip
    """The best R^2 on held-out rows of `draws` maps that are fitted to rows in another order (see `shuffled`)."""
    maps = [store.kept(shuffled, X, Y, dev, seed + i, differences) for i in range(draws)]
    return max(store.kept(score, m, *held, documents).r2 for m in maps)


# --- how well it holds -------------------------------------------------------------------------------------------------


class Score(NamedTuple):
    """A map on held-out rows. R^2 = 1 - sum|y - map(x)|^2 / sum|y - mean(y)|^2.

    It is taken over all rows and dimensions (`r2`) and for each dimension (`per_dimension` (d,)). The
    two sums of each document, `error` and `total` (documents,), are what an interval over documents
    needs: `stats.ratio(total - error, total)` for R^2, `stats.ratio(other.error - error, other.error)`
    for the share of another map's error that this one removes.
    """

    r2: float
    per_dimension: Tensor
    error: np.ndarray
    total: np.ndarray


def score(fitted: Map, X: Tensor, Y: Tensor, documents: Tensor) -> Score:
    """How well a map holds on rows X, Y (n, d) of `documents` (n,) that it was not fitted on."""
    X, Y = _two(X, Y)
    squared, total = (Y - fitted(X)).square(), (Y - Y.mean(0)).square()
    of = torch.unique(documents, return_inverse=True)[1]
    n = int(of.max()) + 1

    def by_document(values: Tensor) -> np.ndarray:
        return torch.zeros(n, dtype=torch.float64).index_add_(0, of, values.double()).numpy()

    return Score(
        1 - float(squared.sum() / total.sum()),
        1 - squared.sum(0) / total.sum(0).clamp_min(1e-300),
        by_document(squared.sum(1)),
        by_document(total.sum(1)),
    )


# --- where it fails ----------------------------------------------------------------------------------------------------


class ByToken(NamedTuple):
    """A map on each held-out token: `error` |y - map(x)|^2 and `total` |y - mean(y)|^2, (tokens,) float64 each."""

    error: np.ndarray
    total: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """A token's error in units of its own distance from the mean, (tokens,): 1 less the R^2 of that token alone."""
        return self.error / np.maximum(self.total, 1e-300)

    def worst(self, n: int) -> np.ndarray:
        """The places (n,) of the tokens that fit worst, by that measure, the worst first."""
        return np.argsort(-self.relative, kind="stable")[:n]


def by_token(fitted: Map, X: Tensor, Y: Tensor) -> ByToken:
    """How well a map holds on each of the rows X, Y (tokens, d) that it was not fitted on."""
    X, Y = _two(X, Y)
    error, total = (Y - fitted(X)).square().sum(1), (Y - Y.mean(0)).square().sum(1)
    return ByToken(error.numpy(), total.numpy())


class Kind(NamedTuple):
    """A token as text, on how many `tokens` kept for measuring it stands, and the R^2 of each map there."""

    token: str
    tokens: int
    r2: dict[str, Interval]


def worst_kinds(
    maps: Mapping[str, ByToken], samples: Samples, tokenizer: Tokenizer, n: int, least: int = 20
) -> list[Kind]:
    """The `n` kinds of token that the first of `maps` fits worst, the worst first, with the R^2 of all of them there, last of all tokens.

    They are chosen on every second document by length, the longest among them, and measured on the others, with an interval over
    these: the worst of many are worse where they were chosen. Left out are kinds that stand on fewer than `least` tokens of either
    half, or in too few documents; the last row too where an interval cannot be had.
    """
    ids, row = samples.token_rows()
    kind = ids[row.long(), samples.named("position").long()].numpy()
    document = samples.named("document").numpy()
    names, lengths = np.unique(document, return_counts=True)
    chosen_on = np.isin(document, names[np.argsort(-lengths, kind="stable")[::2]])
    counts = [np.bincount(kind[half], minlength=int(kind.max()) + 1) for half in (chosen_on, ~chosen_on)]
    first = next(iter(maps.values()))
    error, total = (np.bincount(kind[chosen_on], x[chosen_on], len(counts[0])) for x in first)
    share = np.where(np.minimum(*counts) >= least, error / np.maximum(total, 1e-300), -np.inf)
    out: list[Kind] = []
    for token in np.argsort(-share, kind="stable"):
        here = ~chosen_on & (kind == token)
        if len(out) == n or share[token] == -np.inf:
            break
        with suppress(ValueError):  # too few documents for an interval
            out.append(Kind(tokenizer.decode([int(token)]), int(here.sum()), _r2(maps, here, document)))
    with suppress(ValueError):
        out.append(Kind("all tokens", int((~chosen_on).sum()), _r2(maps, ~chosen_on, document)))
    return out


def _r2(maps: Mapping[str, ByToken], here: np.ndarray, document: np.ndarray) -> dict[str, Interval]:
    """The R^2 of each map on some tokens (tokens,) bool, with an interval over documents."""
    sums = {k: stats.grouped(np.stack([by.error, by.total], 1)[here], document[here]) for k, by in maps.items()}
    return {k: stats.ratio(x[:, 1] - x[:, 0], x[:, 1]) for k, x in sums.items()}


def contexts(
    samples: Samples, tokenizer: Tokenizer, at: np.ndarray, values: np.ndarray, window: int = 8
) -> list[Context]:
    """The text around some samples `at` (n,), `window` tokens either side, with the value (samples,) of each."""
    ids, row = samples.token_rows()
    position = samples.named("position").tolist()

    def around(i: int) -> Context:
        text, here = ids[int(row[i])].tolist(), position[i]
        before, after = text[max(here - window, 0) : here], text[here + 1 : here + 1 + window]
        return Context(
            tokenizer.decode(before), tokenizer.decode([text[here]]), tokenizer.decode(after), float(values[i])
        )

    return [around(int(i)) for i in at]


def fails_again(one: ByToken, other: ByToken, documents: Tensor, n: int) -> Interval:
    """Of the `n` tokens that one map fits worst, the share that are among the n that another fits worst, with an interval over
    `documents` (tokens,)."""
    worst = one.worst(n)
    again = np.isin(worst, other.worst(n))
    return stats.ratio(*stats.grouped(np.stack([again, np.ones(n)], 1), documents.numpy()[worst]).T)


def fails_by_chance(tokens: int, n: int, draws: int, seed: int = 0) -> np.ndarray:
    """The shares (draws,) where the other map fails on `n` of the tokens drawn at random."""
    return np.random.default_rng(seed).hypergeometric(n, tokens - n, n, draws) / n


# --- the gate ----------------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """One condition for comparing two models' activations: what was found, what is wanted, and whether it is met."""

    name: str
    found: str
    wanted: str
    passed: bool


class Gate(NamedTuple):
    """All conditions; `passed` if every one is met, `reason` in words if not."""

    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(c.passed for c in self.checks)

    @property
    def reason(self) -> str:
        """What is not met, in a sentence; empty if nothing."""
        return "; ".join(f"{c.name}: {c.found} (wanted: {c.wanted})" for c in self.checks if not c.passed)

    def table(self) -> str:
        """The checks as a Markdown table."""
        rows = [f"| {c.name} | {c.found} | {c.wanted} | {'met' if c.passed else '**not met**'} |" for c in self.checks]
        return "\n".join(["| condition | found | wanted | |", "|---|---|---|---|", *rows])


class Fits(Protocol):
    """How an SAE fits activations: a `Fit`, or all that `evaluation.evaluate` finds."""

    @property
    def explained_variance(self) -> float: ...

    @property
    def l0(self) -> float: ...


class Fit(NamedTuple):
    """How an SAE fits activations: explained variance and mean L0."""

    explained_variance: float
    l0: float


def distinct(rows: Tensor) -> int:
    """How many of the rows (n, d) differ: rows of equal values have equal sums under random float64 weights."""
    weights = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return len(torch.unique((rows.double().cpu() * weights).sum(1)))


def rank(rows: Tensor, tolerance: float = 1e-6) -> int:
    """Directions in which the centred rows (n, d) vary, in float64: singular values above `tolerance` of the largest."""
    x = rows.double()
    values = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0))).clamp_min(0).sqrt()
    return int((values > tolerance * values.max()).sum()) if float(values.max()) > 0 else 0


def gate(
    X: Tensor, Y: Tensor, transfer: Mapping[str, tuple[Fits, Fits]] | None = None, rows_per_dimension: float = 10,
) -> Gate:  # fmt: skip
    """Whether two models' activations X, Y (tokens, d) can carry a linear map and their SAEs a comparison.

    `transfer`: for each SAE, by name, how it fits its own model and how the other. Wanted: half of the rows distinct or more, nearly
    full rank, `rows_per_dimension` distinct rows a dimension, norms within a factor of two, and SAEs that keep half of their
    explained variance on the other model, with L0 within a factor of two.
    """
    X, Y = _two(X, Y)
    (n, d), checks = X.shape, []
    for name, rows in (("X", X), ("Y", Y)):
        different = distinct(rows)
        checks.append(
            Check(f"distinct rows of {name}", f"{different:,} of {n:,}", "half of them or more", different >= n / 2)
        )
        checks.append(
            Check(
                f"distinct rows a dimension, {name}", f"{different / d:.1f}", f"{rows_per_dimension:g} or more",
                different >= rows_per_dimension * d,
            )
        )  # fmt: skip
        full = rank(rows)
        checks.append(Check(f"rank of {name}", f"{full} of {d}", "nine tenths or more", full >= 0.9 * d))
    ratio = float(Y.norm(dim=1).median() / X.norm(dim=1).median().clamp_min(1e-300))
    checks.append(Check("norm, Y over X (medians)", f"{ratio:.2f}", "0.5 to 2", 0.5 <= ratio <= 2))
    for name, (own, other) in (transfer or {}).items():
        checks.append(
            Check(
                f"SAE of {name} on the other model", f"explains {other.explained_variance:.2f} (at home {own.explained_variance:.2f})",
                "half as much as at home or more, and that above zero",
                own.explained_variance > 0 and other.explained_variance >= 0.5 * own.explained_variance,
            )
        )  # fmt: skip
        checks.append(
            Check(
                f"its L0 there, SAE of {name}", f"{other.l0:.0f} (at home {own.l0:.0f})", "within a factor of two",
                own.l0 > 0 and 0.5 <= other.l0 / own.l0 <= 2,
            )
        )  # fmt: skip
    return Gate(checks)
