"""Families of latents: clusters by decoder cosine or by firing together, how stable they are, how they split, and a map.

Clusters are those of average linkage (Sokal & Michener 1958), cut into a given number; two clusterings are compared by the adjusted
Rand index (Hubert & Arabie 1985): 1 if they are the same, 0 on average for clusters of these sizes drawn at random. Knows rows,
codes and numbers; no language model.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import csr_matrix
from scipy.spatial.distance import squareform
from sklearn.manifold import TSNE
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from helpers.sae import decompose
from helpers.sae.activations import Rows
from helpers.sae.topk import Dictionary


class Fired(NamedTuple):
    """Which latent fired on which token, one entry each: `token` and `latent` (n,), out of `tokens` and `latents`."""

    token: np.ndarray
    latent: np.ndarray
    tokens: int
    latents: int

    def counts(self) -> np.ndarray:
        """On how many tokens each latent fired (latents,)."""
        return np.bincount(self.latent, minlength=self.latents)

    def shuffled(self, seed: int) -> "Fired":
        """The same with every latent's tokens drawn anew, each as often as before: codes that have nothing to do with one another."""
        rng, count = np.random.default_rng(seed), self.counts()
        token = [rng.choice(self.tokens, n, replace=False) for n in count]
        return self._replace(token=np.concatenate(token), latent=np.repeat(np.arange(self.latents), count))

    def only(self, chosen: np.ndarray) -> "Fired":
        """Of the `chosen` latents (k,) alone, numbered in that order."""
        place = np.full(self.latents, -1)
        place[chosen] = np.arange(len(chosen))
        some = place[self.latent] >= 0
        return Fired(self.token[some], place[self.latent[some]], self.tokens, len(chosen))


def fired(sae: Dictionary, samples: Rows, first: int, last: int, batch: int = 2048) -> Fired:
    """Which latents fire on the samples from number `first` up to `last`."""
    token, latent = [], []
    for start in range(first, last, batch):
        index = torch.arange(start, min(start + batch, last))
        at = decompose.codes_of(sae, samples.rows(index)).cpu().nonzero()
        token.append(at[:, 0] + start - first)
        latent.append(at[:, 1])
    return Fired(torch.cat(token).numpy(), torch.cat(latent).numpy(), last - first, sae.cfg.d_sae)


# --- families ------------------------------------------------------------------------------------------------------------


def together(found: Fired) -> np.ndarray:
    """Correlation of two latents' firing (latents, latents), the phi coefficient: (T n_ij - n_i n_j) / sqrt(n_i (T - n_i) n_j (T - n_j))."""
    ones = np.ones(len(found.token))
    table = csr_matrix((ones, (found.token, found.latent)), (found.tokens, found.latents))
    n, both = found.counts().astype(float), np.asarray((table.T @ table).todense())
    spread = np.sqrt(np.maximum(n * (found.tokens - n), 1e-300))
    return (found.tokens * both - np.outer(n, n)) / np.outer(spread, spread)


def cosines(rows: Tensor) -> np.ndarray:
    """Cosines (latents, latents) of decoder rows."""
    unit = decompose.unit_rows(rows)[0].float().cpu()
    return (unit @ unit.T).double().numpy()


def clusters(alike: np.ndarray, count: int) -> np.ndarray:
    """Clusters (n,), numbered from 0, of a similarity (n, n): average linkage of 1 - similarity, cut into at most `count`."""
    apart = np.clip(1 - (alike + alike.T) / 2, 0, None)
    np.fill_diagonal(apart, 0)
    return fcluster(linkage(squareform(apart, checks=False), "average"), count, "maxclust") - 1


def by_firing(token: np.ndarray, latent: np.ndarray, tokens: int, latents: int, count: int) -> np.ndarray:
    """`clusters` (latents,) of `together`, of a `Fired` given in parts."""
    return clusters(together(Fired(token, latent, tokens, latents)), count)


def by_decoder(rows: Tensor, count: int) -> np.ndarray:
    """`clusters` (latents,) of `cosines`."""
    return clusters(cosines(rows), count)


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """The adjusted Rand index of two clusterings (n,) of the same things."""
    return float(adjusted_rand_score(one, other))


def partner_rows(rows: Tensor, cosine: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """Two random dictionaries (n, d) whose rows are paired with these cosines (n,), as many and as wide as `rows`: what one-to-one
    pairs of such a quality keep of clusters where there is nothing but the pairs."""
    g = torch.Generator().manual_seed(seed)
    a, noise = (torch.nn.functional.normalize(torch.randn(rows.shape, generator=g), dim=1) for _ in range(2))
    c = torch.as_tensor(cosine, dtype=torch.float32)[:, None].clamp(-1, 1)
    noise = torch.nn.functional.normalize(noise - (noise * a).sum(1, keepdim=True) * a, dim=1)
    return a, c * a + (1 - c**2).sqrt() * noise


# --- splitting -----------------------------------------------------------------------------------------------------------


def heirs(rows: Tensor, other: Tensor, block: int = 2048) -> Tensor:
    """For each row of another dictionary (m, d) the row of this one (n, d) that it is nearest to by cosine, (m,)."""
    unit = decompose.unit_rows(rows)[0].float().cpu()
    parts = decompose.unit_rows(other)[0].float().cpu().split(block)
    return torch.cat([(part @ unit.T).argmax(1) for part in parts])


def axes(rows: Tensor, rank: int) -> Tensor:
    """The first `rank` right singular vectors (rank, d) float64 of rows (n, d) brought to length one, fewer where there are fewer rows;
    by way of the rows' inner products."""
    unit = decompose.unit_rows(rows)[0].double().cpu()
    values, vectors = torch.linalg.eigh(unit @ unit.T)
    some = values > 1e-9 * values.max()
    return ((vectors[:, some] / values[some].sqrt()).T @ unit).flip(0)[:rank]


def kept_subspaces(rows: Tensor, labels: np.ndarray, other: Tensor, rank: int, least: int) -> np.ndarray:
    """How much of each family's subspace another dictionary's heirs of it keep, (families,): of those families with `least` latents or
    more, |U V^T|^2 / rank, U the family's first `rank` axes and V its heirs'; 1 if these span the same, 0 if nothing of it or if it
    has no heir."""
    to = torch.as_tensor(labels)[heirs(rows, other)]
    found = []
    for f in range(int(labels.max()) + 1):
        own, theirs = rows[torch.as_tensor(labels == f)], other[to == f]
        if len(own) < least:
            continue
        inner = axes(own, rank) @ axes(theirs, rank).T if len(theirs) else torch.zeros(1, 1)
        found.append(float(inner.square().sum()) / min(rank, len(own)))
    return np.array(found)


def kept_by_chance(
    rows: Tensor, labels: np.ndarray, other: Tensor, rank: int, least: int, draws: int, seed: int = 0
) -> np.ndarray:
    """The mean of `kept_subspaces` if one of the two dictionaries is turned at random, (draws,)."""
    g, found = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        turn = torch.linalg.qr(torch.randn(rows.shape[1], rows.shape[1], generator=g)).Q
        found.append(float(kept_subspaces(rows @ turn, labels, other, rank, least).mean()))
    return np.array(found)


# --- known answers -------------------------------------------------------------------------------------------------------


class Planted(NamedTuple):
    """Codes with a known answer: which feature `fired`, the `family` of each (features,), and its direction, `rows` (features, d)."""

    fired: Fired
    family: np.ndarray
    rows: Tensor


def planted(trees: int, children: int, tokens: int, width: int = 64, seed: int = 0, random: bool = False) -> Planted:
    """Features of sae_lens.synthetic: `trees` parents with `children` each, which fire only where their parent does and lean its way; or,
    `random`, as many that fire as often and have nothing to do with one another."""
    from sae_lens.synthetic import ActivationGenerator, HierarchyNode, hierarchy_modifier

    torch.manual_seed(seed)
    size = children + 1
    roots = [HierarchyNode(t * size, [HierarchyNode(t * size + 1 + c) for c in range(children)]) for t in range(trees)]
    often = torch.tensor(([0.08] + [0.4] * children) * trees)
    effective = torch.tensor(([0.08] + [0.08 * 0.4] * children) * trees)
    generator = ActivationGenerator(
        trees * size,
        effective if random else often,
        modify_activations=None if random else hierarchy_modifier(roots),
    )
    at = generator.sample(tokens).nonzero().numpy()
    family = np.repeat(np.arange(trees), size)
    own, parent = (torch.nn.functional.normalize(torch.randn(n, width), dim=1) for n in (trees * size, trees))
    rows = own if random else torch.nn.functional.normalize(own + parent[torch.as_tensor(family)], dim=1)
    return Planted(Fired(at[:, 0], at[:, 1], tokens, trees * size), family, rows)


# --- a map ---------------------------------------------------------------------------------------------------------------


def layout(rows: Tensor, seed: int = 0, perplexity: float = 30.0) -> np.ndarray:
    """Places (latents, 2) of rows on a plane, like near like: t-SNE (van der Maaten & Hinton 2008) of unit rows, from their components."""
    unit = decompose.unit_rows(rows)[0].float().cpu().numpy()
    few = min(perplexity, (len(unit) - 1) / 4)
    found = TSNE(init="pca", perplexity=few, max_iter=500, random_state=seed, n_jobs=1).fit_transform(unit)
    return np.asarray(found, np.float64)


def nearest(rows: Tensor, vectors: Tensor, n: int) -> np.ndarray:
    """The n rows of largest cosine with each of some vectors (vectors, n), the nearest first."""
    unit, v = (decompose.unit_rows(x.float())[0].float().cpu() for x in (rows, vectors))
    return (v @ unit.T).topk(n, dim=1).indices.numpy()
