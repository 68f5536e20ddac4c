"""What a claim stands beside: vectors, labels and rows that hold nothing of what is claimed, by algebra and in hundreds.

    nulls.random(v, 500); nulls.like_rows(v, residuals, 500); nulls.shuffled(pos, neg, 300); nulls.concepts(model, layer)

Every null vector has the length of the vector it stands for. The null of a whole dictionary is one whose decoder rows stay
random: `train.dictionary(..., frozen=True)`; the null of its rows alone is `rotations`: `in_rotated_rows` and `in_rotated_sae`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from helpers.entries import DataError, listed
from helpers.lm import text
from helpers.lm.reading import LM
from helpers.sae import decompose
from helpers.sae.topk import Dictionary
from helpers.session import ROOT
from helpers.steering import caa, directions
from helpers.steering.behaviors import SystemPair

CONCEPTS = ROOT / "data" / "concepts.txt"
QUESTIONS = 8  # under which each concept is contrasted


def random(v: Tensor, draws: int = 1, seed: int = 0) -> Tensor:
    """Isotropic random directions of the norm of `v` (d_model,), float64 (draws, d_model). ValueError if `v` is zero."""
    length = _length(v, draws)
    drawn = torch.randn(draws, len(v), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return _scaled(drawn, length)


def like_rows(v: Tensor, rows: Tensor, draws: int = 1, seed: int = 0) -> Tensor:
    """Random directions of the norm of `v` with the covariance of `rows` (n, d_model), float64 (draws, d_model).

    `rows` are residuals, special tokens out: a random direction in the space that the model uses. ValueError if `v` is zero
    or all rows are the same.
    """
    length = _length(v, draws)
    if rows.ndim != 2 or rows.shape[1] != len(v) or len(rows) < 2:
        raise ValueError(f"rows {tuple(rows.shape)} were given; two rows or more of {len(v)} are wanted")
    exact = directions.finite("rows", rows)
    if directions.same(exact, directions.rounding(rows)):
        raise ValueError(f"all {len(rows)} rows are the same: they have no covariance to draw from")
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(draws, len(rows), generator=g, dtype=torch.float64)
    return _scaled(weights @ (exact - exact.mean(0)), length)


def shuffled(pos: Tensor, neg: Tensor, draws: int = 1, seed: int = 0) -> Tensor:
    """Mean differences of pairs (pairs, d_model) with half of the sides swapped, as long as the true one: (draws, d_model).

    See `flipped`. ValueError for one pair, and for pairs that all differ alike: with half swapped nothing is left of them.
    """
    length = _length(directions.nonzero_mean(pos, neg), draws)
    signs = torch.stack([_signs(len(pos), seed + i) for i in range(draws)]).double()
    found = signs @ torch.sub(*directions.float64(pos, neg)) / (len(pos) - len(pos) % 2)
    if (found.abs() <= directions.rounding(pos, neg)).all(1).any():
        raise ValueError(
            f"the {len(pos)} pairs all differ alike: with half of them swapped nothing is left, and shuffled labels "
            "are no null; give pairs that differ from one another"
        )
    return _scaled(found, length)


def flipped(pos: Tensor, neg: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The pairs with exactly half of them, drawn at random, having their sides swapped.

    Not each pair with probability one half: that leaves (sum of signs / pairs) of the mean difference behind, about
    1/sqrt(pairs) of it, and scaling to the vector's length blows the leftover up into +-v itself. For the same reason
    an odd pair, drawn at random, is left out: three pairs with one swapped would keep a third of the mean. One pair
    alone is a ValueError: there is nothing to shuffle.
    """
    directions.float64(pos, neg)
    signs = _signs(len(pos), seed).to(pos.device)
    kept, flip = signs != 0, (signs < 0)[:, None]
    return torch.where(flip, neg, pos)[kept], torch.where(flip, pos, neg)[kept]


def _signs(pairs: int, seed: int) -> Tensor:
    """For each of so many pairs -1 if its sides are swapped, 0 if it stays out, 1 otherwise: see `flipped`."""
    if pairs < 2:
        raise ValueError(
            "one pair was given: swapped or not it is +-v itself, there is nothing to shuffle; give two or more"
        )
    order, signs = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed)), torch.ones(pairs)
    signs[order[: pairs // 2]] = -1
    if pairs % 2:
        signs[order[-1]] = 0
    return signs


def others(v: Tensor, vectors: Sequence[Tensor]) -> Tensor:
    """Vectors of other behaviours or concepts, as long as `v`: (vectors, d_model) float64. ValueError for one that is zero."""
    for i, other in enumerate(vectors):
        if other.shape != v.shape or not directions.finite(f"vectors[{i}]", other).norm() > 0:
            raise ValueError(
                f"vectors[{i}] {tuple(other.shape)} was given; a vector ({len(v)},) that is not zero is wanted"
            )
    return _scaled(torch.stack([x.double().cpu() for x in vectors]), _length(v))


def equal_response(v: Tensor, gradient: Tensor | np.ndarray, draws: int = 1, seed: int = 0) -> Tensor:
    """Random directions that steer as well as `v` to first order, and are as long: (draws, d_model) float64.

    With g the gradient (d_model,) of what is steered: r = (g.v / |g|^2) g + z, z random at right angles to g. A vector is
    chosen to move the behaviour and a random one is not; these are chosen alike. ValueError for a zero vector or gradient.
    """
    length, exact = _length(v, draws), directions.finite("v", v)
    g = directions.finite("gradient", torch.as_tensor(gradient))
    if g.shape != exact.shape or not g.norm() > 0:
        raise ValueError(f"gradient {tuple(g.shape)} was given; ({len(v)},) and not zero is wanted")
    unit = g / g.norm()
    along = exact @ unit
    z = torch.randn(draws, len(v), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z -= (z @ unit)[:, None] * unit
    return along * unit + _scaled(z, (length**2 - along**2).clamp_min(0).sqrt())


def other_items(responses: Sequence[np.ndarray], draws: int, seed: int = 0) -> Iterator[list[np.ndarray]]:
    """Each behaviour's responses (vectors, items) with its items in a random order: what other items would have answered."""
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        yield [x[:, rng.permutation(x.shape[1])] for x in responses]


def elsewhere(count: int, draws: int, seed: int = 0) -> np.ndarray:
    """Random orders (draws, count) of so many things in which none keeps its place. ValueError for one thing."""
    if count < 2:
        raise ValueError(f"{count} thing was given: it has no other place; give two or more")
    rng, found = np.random.default_rng(seed), np.empty((0, count), int)
    while len(found) < draws:
        orders = rng.permuted(np.tile(np.arange(count), (3 * draws, 1)), axis=1)
        found = np.concatenate([found, orders[(orders != np.arange(count)).all(1)]])
    return found[:draws]


def dealt(count: int, draws: int, seed: int = 0) -> np.ndarray:
    """Random orders (draws, count) of so many things, each as likely as any other."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(count), (draws, 1)), axis=1)


def off_diagonal(table: np.ndarray) -> np.ndarray:
    """What each column (n, n) has from other rows than its own: (n - 1, n)."""
    return np.stack([np.delete(column, i) for i, column in enumerate(table.T)], axis=1)


def rotations(d_model: int, draws: int, seed: int = 0) -> Iterator[Tensor]:
    """Random rotations (d_model, d_model) float64, uniform (Stewart 1980): `rows @ rotation` keeps every angle between rows."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(draws):
        q, r = torch.linalg.qr(torch.randn(d_model, d_model, generator=g, dtype=torch.float64))
        yield q * r.diagonal().sign()


def random_rows(latents: int, d_model: int, seed: int = 0) -> Tensor:
    """Rows (latents, d_model) of length 1 in random directions: what the decoder of a frozen-decoder SAE is."""
    rows = torch.randn(latents, d_model, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def in_rotated_rows(rows: Tensor, vectors: Tensor, sizes: Sequence[int], draws: int, seed: int = 0) -> Tensor:
    """What orthogonal pursuit makes of `vectors` (n, d_model) with each of `sizes` of the `rows` turned at random: (draws, sizes, n,
    d_model) float32. Rows as many and as coherent, without a meaning."""
    return _turned(lambda v: decompose.pursuit_path(rows, v, sizes), vectors, draws, seed)


def in_rotated_sae(sae: Dictionary, vectors: Tensor, draws: int, seed: int = 0) -> Tensor:
    """What encoding and decoding makes of `vectors` (n, d_model) in an SAE whose weights are turned at random: (draws, n, d_model)
    float32. It has the same biases, and no idea of where the vectors point."""
    return _turned(lambda v: decompose.encode(sae, v).reconstruction, vectors, draws, seed)


def _turned(see: Callable[[Tensor], Tensor], vectors: Tensor, draws: int, seed: int) -> Tensor:
    """What a turned dictionary would make of `vectors` (n, d_model): `see`, the dictionary as it is, is shown the vectors turned the
    other way, and what it makes (..., n, d_model) is turned with it: (draws, ..., n, d_model) float32."""
    turns = list(rotations(vectors.shape[1], draws, seed))
    back = torch.cat([vectors.double().cpu() @ turn.T for turn in turns])
    made = see(back).double().unflatten(-2, (draws, len(vectors)))
    return torch.stack([(made[..., i, :, :] @ turn).float() for i, turn in enumerate(turns)])


def named_concepts() -> list[tuple[str, str]]:
    """The opposites of data/concepts.txt, one pair a line (`patient / impatient`). DataError names a line that is none."""
    found = []
    for i, line in enumerate(CONCEPTS.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            one, _, other = (part.strip() for part in line.partition(" / "))
            if not other:
                raise DataError(f"{CONCEPTS.name}, line {i}: {line!r}; two words with ' / ' between them are wanted")
            found.append((one, other))
    return found


def concepts(lm: LM, layer: int, questions: int = QUESTIONS) -> dict[str, Tensor]:
    """A contrast vector (d_model,) float64 of each of data/concepts.txt, by its name: what vectors made like a behaviour's
    do when they are about something else.

    The mean difference at the last position, over packaged harmless instructions, of a system prompt that asks for the one
    and one that asks for the opposite (the form of Zou et al. 2023). Read once, then cached.
    """
    asked = listed("instructions.json", (text.fetch("pairs") / "instructions.json").read_text(encoding="utf-8"))
    found = {}
    for one, other in named_concepts():
        first, second = (f"You are a very {x} assistant." for x in (one, other))
        pairs = [SystemPair(first, second, str(q)) for q in asked[:questions]]
        found[one] = directions.mean(*caa.extract(lm, pairs, [layer]).at(layer))
    return found


def _length(v: Tensor, draws: int = 1) -> Tensor:
    if v.ndim != 1 or not len(v) or draws < 1:
        raise ValueError(f"v {tuple(v.shape)} and {draws} draws were given; (d_model,) and one draw or more are wanted")
    length = directions.finite("v", v).norm()
    if not length > 0:
        raise ValueError("v is zero: a null of its length is zero too, and no null")
    return length


def _scaled(rows: Tensor, length: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300) * length
