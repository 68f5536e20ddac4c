"""Which elements of a dictionary change at later layers when a vector is added, whose they are, and what depends on them.

A *basis* is anything with codes and rows: an SAE, principal components, singular vectors of weights (`axes`). Knows a
`Downstream` and bases, no behaviours. The change of an element is code steered less code unsteered, mean over the response
tokens of each prompt. It is put in units of what random vectors of equal length do, whose spread is moderated as in Smyth
2004 (Stat. Appl. Genet. Mol. Biol. 3) and whose scores are the null of all p-values (pooled, Efron 2010, ch. 6).
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import false_discovery_control
from torch import Tensor, nn
from tqdm import tqdm

from helpers import stats
from helpers.lm import hooks
from helpers.lm.downstream import Downstream
from helpers.lm.reading import LM
from helpers.sae import decompose
from helpers.sae.topk import Dictionary

PRIOR = 10  # draws that the typical spread of a layer's elements weighs, beside each element's own
WRITES = ("o_proj", "out_proj", "dense", "c_proj", "wo")  # what in a block writes to the stream, and does not read it


# --- bases ---------------------------------------------------------------------------------------------------------------


class Axes:
    """Directions (k, d_model) in the shape of an SAE: codes are the products of a row with each, and nothing is centred."""

    device = torch.device("cpu")

    def __init__(self, rows: Tensor):
        self.W_dec = rows.float()
        self.cfg = SimpleNamespace(d_in=rows.shape[1], d_sae=len(rows))

    def state_dict(self) -> dict[str, Tensor]:
        """What it consists of."""
        return {"rows": self.W_dec}

    def encode(self, x: Tensor) -> Tensor:
        """Products (n, k) of x (n, d_model)."""
        return x.float() @ self.W_dec.T

    def decode(self, codes: Tensor) -> Tensor:
        """Sums (n, d_model) of the directions."""
        return codes @ self.W_dec


def read_by(lm: LM, layer: int) -> Axes:
    """The directions that the next block reads most: right singular vectors (d_model, d_model) of all its weights that read the
    stream, those of the largest values first. The gain of its norms is left out. ValueError for the last layer."""
    weights = [
        m.weight.detach().float().cpu()
        for name, m in hooks.block(lm, layer + 1).named_modules()
        if isinstance(m, nn.Linear) and m.in_features == lm.d_model and not name.endswith(WRITES)
    ]
    if not weights:
        raise ValueError(f"block {layer + 1} of {lm.identity} has no linear map that reads the stream")
    both = sum(w.double().T @ w.double() for w in weights)
    return Axes(torch.linalg.eigh(torch.as_tensor(both)).eigenvectors.flip(1).T)


# --- which elements change -----------------------------------------------------------------------------------------------


def changes(
    where: Downstream, vectors: Tensor, bases: Mapping[str, Dictionary], at: Mapping[str, int], parts: Sequence[int]
) -> dict[str, Tensor]:
    """What adding each of `vectors` (n, d_model) changes of each element of the `bases`, whose layers `at` says: (n, parts, elements)
    float32. `parts`: for each prompt the part that it belongs to, from 0; means over tokens, then over a part's prompts."""
    layers, part = sorted(set(at.values())), torch.tensor(list(parts))
    owners = where.owners // where.group
    weight = torch.zeros(int(part.max()) + 1, len(owners))
    tokens, prompts = owners.bincount(minlength=len(part)), part.bincount()
    weight[part[owners], torch.arange(len(owners))] = 1 / (tokens[owners] * prompts[part[owners]]).float()
    plain = where.rows(layers, torch.zeros_like(vectors[0]))
    before = {n: weight @ decompose.codes_of(b, plain[at[n]]).cpu() for n, b in bases.items()}
    found: dict[str, list[Tensor]] = {n: [] for n in bases}
    for v in tqdm(vectors, desc="steer and encode", leave=False):
        rows = where.rows(layers, v)
        for n, b in bases.items():
            found[n].append(weight @ decompose.codes_of(b, rows[at[n]]).cpu() - before[n])
    return {n: torch.stack(x) for n, x in found.items()}


class Scores(NamedTuple):
    """Changes in units of the `spread` over random vectors (elements,): of the vectors asked about, `own` (n, elements), and of every
    random one beside the other random ones, `null` (draws, elements); float64."""

    own: np.ndarray
    null: np.ndarray
    spread: np.ndarray


def scores(own: Tensor, random: Tensor) -> Scores:
    """Scores of changes `own` (n, elements) beside those of `random` vectors (draws, elements). ValueError for under three draws.

    (change - mean) / (s sqrt(1 + 1/draws)), s^2 = (draws s_i^2 + PRIOR s_0^2) / (draws + PRIOR), s_0^2 the median over elements
    that change at all. An element that no vector changes has score 0.
    """
    x, r = (t.double().numpy() for t in (own, random))
    n = len(r)
    if n < 3:
        raise ValueError(f"{n} random vectors were given; a spread needs three or more")

    def scored(change: np.ndarray, mean: np.ndarray, var: np.ndarray, draws: int) -> np.ndarray:
        s = np.sqrt((draws * var + PRIOR * typical) / (draws + PRIOR) * (1 + 1 / draws))
        return np.divide(change - mean, s, out=np.zeros(np.broadcast_shapes(change.shape, s.shape)), where=s > 0)

    mean, var = r.mean(0), r.var(0, ddof=1)
    typical = float(np.median(var[var > 0])) if (var > 0).any() else 0.0
    out = (n * mean - r) / (n - 1)  # without each draw in turn
    out_var = ((n - 1) * var - n / (n - 1) * (r - mean) ** 2).clip(0) / (n - 2)
    return Scores(scored(x, mean, var, n), scored(r, out, out_var, n - 1), np.sqrt(var))


def discovered(found: Scores, q: float = 0.05, strata: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Which elements change more than by chance, with at most a share `q` of false ones among them (Benjamini & Hochberg 1995):
    (n, elements) bool of the vectors asked about, and (draws, elements) of the random ones.

    Two-sided p-values against the scores of all random vectors, a random one's against those of the others, pooled over elements of
    like spread, in so many `strata`: what few vectors change at all has longer tails. None falls below 1 / (1 + draws elements /
    strata).
    """
    p, null = np.ones_like(found.own), np.ones_like(found.null)

    def beyond(pool: np.ndarray, z: np.ndarray) -> np.ndarray:
        return len(pool) - np.searchsorted(pool, z)

    for part in np.array_split(np.argsort(found.spread, kind="stable"), strata):
        by_draw = np.sort(np.abs(found.null[:, part]))
        pool = np.sort(by_draw.ravel())
        p[:, part] = (1 + beyond(pool, np.abs(found.own[:, part]))) / (1 + len(pool))
        for i, own in enumerate(by_draw):
            z = np.abs(found.null[i, part])
            null[i, part] = (1 + beyond(pool, z) - beyond(own, z)) / (1 + len(pool) - len(own))
    told, by_chance = (np.stack([false_discovery_control(row) <= q for row in x]) for x in (p, null))
    return told, by_chance


def tops(z: np.ndarray, n: int) -> np.ndarray:
    """The n elements of largest |score| in each row (rows, elements), the largest first: (rows, n) numbers from 1, negative where
    the element goes down."""
    order = np.argsort(-np.abs(z), axis=1, kind="stable")[:, :n]
    return (order + 1) * np.where(np.take_along_axis(z, order, 1) < 0, -1, 1)


def shared(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The share of each row of `one` (a, n) that each row of `other` (b, n) holds too, sign and all: (a, b)."""
    return np.array([[len(np.intersect1d(x, y)) / len(x) for y in other] for x in one])


def belonging(tops: np.ndarray, told: np.ndarray, least: float) -> np.ndarray:
    """The share of each row's elements (rows, n) of `tops` that tell a behaviour's sides apart in the direction in which they change:
    (rows, behaviours). `told` (behaviours, elements): AUROCs; `least` of them, or at most 1 - `least` of one that goes down."""
    at, up = np.abs(tops) - 1, tops > 0
    area = told[:, at]
    return np.where(up, area >= least, area <= 1 - least).mean(-1).T


def told(basis: Dictionary, pos: Tensor, neg: Tensor) -> np.ndarray:
    """AUROC (elements,) of what the encoder gives before it chooses, on both sides (pairs, d_model) of pairs."""
    return stats.auroc(*(decompose.pre_codes(basis, side).cpu().numpy() for side in (pos, neg)))


def shifts(where: Downstream, vectors: Tensor, layer: int) -> Tensor:
    """What each of `vectors` (n, d_model) changes of the stream after a layer: (n, rows, d_model) float32."""
    plain = where.rows([layer], torch.zeros_like(vectors[0]))[layer]
    return torch.stack([where.rows([layer], v)[layer] - plain for v in tqdm(vectors, desc="steer", leave=False)])


# --- how much is linear --------------------------------------------------------------------------------------------------


def explained(real: Tensor, predicted: Tensor) -> float:
    """1 - sum|real - predicted|^2 / sum|real|^2 over rows (rows, d_model): 1 if a change is as predicted, 0 if nothing is."""
    return 1 - float((real.double() - predicted.double()).square().sum() / real.double().square().sum())


class Linear(NamedTuple):
    """How much of a change the Jacobian explains, by vector, layer and strength: `fit` (n, layers, strengths); and how much the vector
    explains if it is merely handed on, `skipped`, the same."""

    fit: np.ndarray
    skipped: np.ndarray


def linear(where: Downstream, units: Tensor, layers: Sequence[int], strengths: Sequence[float]) -> Linear:
    """`Linear` of each of `units` (n, d_model) at every one of `strengths`, multiples of it."""
    plain = where.rows(layers, torch.zeros_like(units[0]))
    jacobian = [where.carried(layers, u) for u in tqdm(units, desc="Jacobian", leave=False)]
    fit, skipped = np.zeros((2, len(units), len(layers), len(strengths)))
    for i, u in enumerate(tqdm(units, desc="steer", leave=False)):
        for j, x in enumerate(strengths):
            rows = where.rows(layers, u, x)
            for k, layer in enumerate(layers):
                real = rows[layer] - plain[layer]
                fit[i, k, j] = explained(real, x * jacobian[i][layer])
                skipped[i, k, j] = explained(real, (x * u).float().expand_as(real))
    return Linear(fit, skipped)


# --- what depends on them ------------------------------------------------------------------------------------------------


class Ends(NamedTuple):
    """Both ends of a steering effect after one layer: rows `plain` and `steered` (rows, d_model), and each prompt's log-odds in nats
    with them, `before` and `after` (prompts,)."""

    plain: Tensor
    steered: Tensor
    before: np.ndarray
    after: np.ndarray

    @property
    def effect(self) -> np.ndarray:
        """How far steering moves each prompt (prompts,)."""
        return self.after - self.before


def ends(where: Downstream, layer: int, vector: Tensor) -> Ends:
    """The ends of a vector's effect, read after `layer`."""
    plain, steered = (where.rows([layer], x * vector)[layer] for x in (0.0, 1.0))
    return Ends(plain, steered, where.log_odds(layer, plain), where.log_odds(layer, steered))


def part_of_change(basis: Dictionary, found: Ends, chosen: Tensor) -> Tensor:
    """What the `chosen` elements alone change, (rows, d_model): their codes steered less unsteered, times their rows."""
    codes = decompose.codes_of(basis, found.steered) - decompose.codes_of(basis, found.plain)
    return (codes[:, chosen] @ decompose.rows_of(basis)[chosen]).cpu()


def put_back(where: Downstream, layer: int, found: Ends, part: Tensor) -> np.ndarray:
    """How much of the effect goes, prompt by prompt in nats (prompts,), if a part of the change (rows, d_model) is taken out of the
    steered run. What else there is stays, a basis' error too."""
    return found.after - where.log_odds(layer, found.steered - part)


def put_in(where: Downstream, layer: int, found: Ends, part: Tensor) -> np.ndarray:
    """How much effect that part of the change has alone, added to the unsteered run: nats (prompts,)."""
    return where.log_odds(layer, found.plain + part) - found.before


class Parted(NamedTuple):
    """A vector's `effect` on each prompt (prompts,); and of each set of elements how much of it goes when they are put `back`, and how
    much comes when they alone are put `in`, (sets, prompts) each, in nats. `length`: of each set's change, as a share of all."""

    effect: np.ndarray
    back: np.ndarray
    alone: np.ndarray
    length: np.ndarray


def parted(
    where: Downstream,
    layer: int,
    vector: Tensor,
    basis: Dictionary,
    sets: Sequence[Tensor],
    alone: bool = False,
    like: Tensor | None = None,
) -> Parted:
    """`Parted` of the `sets` of elements (n,) of a basis after `layer`; only with `alone` are they put in too.

    `like`: elements whose change says how long that of every set is made, row by row: a set that changes less is scaled up.
    """
    found = ends(where, layer, vector)
    whole, back, come, length = found.steered - found.plain, [], [], []
    ruler = part_of_change(basis, found, like) if like is not None else None
    for chosen in sets:
        part = part_of_change(basis, found, chosen)
        if ruler is not None:
            part = part * (ruler.norm(dim=1) / part.norm(dim=1).clamp_min(1e-12))[:, None]
        back.append(put_back(where, layer, found, part))
        come.append(put_in(where, layer, found, part) if alone else np.full(len(found.before), np.nan))
        length.append(float(part.norm() / whole.norm()))
    return Parted(found.effect, np.stack(back), np.stack(come), np.array(length))


def largest(change: Tensor, basis: Dictionary, n: int = 0) -> Tensor:
    """The n elements (n,) whose change (elements,) is longest, |change| |row|, or as many as change at all; 0: every element."""
    size = change.abs() * decompose.rows_of(basis).norm(dim=1).cpu()
    return size.topk(min(n, int((size > 0).sum())) if n else len(size)).indices


def any_of(change: Tensor, n: int, draws: int, seed: int = 0) -> list[Tensor]:
    """`draws` times n elements (n,) out of all that change at all, (elements,), drawn without repeats."""
    living, g = (change != 0).nonzero()[:, 0], torch.Generator().manual_seed(seed)
    return [living[torch.randperm(len(living), generator=g)[:n]] for _ in range(draws)]


def signs(units: int, draws: int, seed: int = 0) -> np.ndarray:
    """Random signs (draws, units): the null of a difference between two ways that could as well be called by each other's name."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], (draws, units))
