"""How an SAE fits what it was not trained on: explained variance, latents in use, and what a language model loses by it.

Knows SAEs, held-out activations and, for the loss, a language model. What is computed is kept on disk under the SAE's own bits.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers import stats, store
from helpers.lm import reading, scoring
from helpers.lm.reading import LM
from helpers.sae.activations import Rows, Samples
from helpers.sae.saes import SaeError
from helpers.sae.topk import Dictionary
from helpers.stats import Interval


class Evaluation(NamedTuple):
    """How an SAE fits samples: mean L0; share of latents that never fired; each latent's share of samples it fired on,
    `frequency`, and its mean squared contribution code^2 |row|^2, `energy`, (latents,) each; and per sample |x - x_hat|^2 and
    |x - mean|^2, `error` and `total` (samples,); float64."""

    l0: float
    dead: float
    frequency: Tensor
    energy: Tensor
    error: Tensor
    total: Tensor

    @property
    def explained_variance(self) -> float:
        """1 - sum|x - x_hat|^2 / sum|x - mean|^2 over all samples and dimensions."""
        return 1 - float(self.error.sum() / self.total.sum())

    @property
    def order(self) -> Tensor:
        """(alive,) the latents that fired at all, the most used by energy first."""
        return self.energy.argsort(descending=True, stable=True)[: int((self.frequency > 0).sum())]


def fingerprint(sae: Dictionary) -> str:
    """A hash of an SAE's weights and settings, for the cache; empty for an object that has no state_dict."""
    if not hasattr(sae, "state_dict"):
        return ""
    return store.digest(store.stated(sae))


def _kept(
    kind: str, saes: Sequence[Dictionary], key: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """compute()'s tensors, kept on disk under the SAEs they are of and `key`."""
    prints = [fingerprint(sae) for sae in saes]
    if not all(prints):
        return compute()
    return store.cached(kind, {"saes": prints, "sae_lens": version("sae_lens"), **key}, compute, __name__)


def evaluate(sae: Dictionary, samples: Rows, limit: int = 0, batch: int = 4096) -> Evaluation:
    """How well an SAE fits `samples` (the first `limit` if given); sums in float64; cached on disk. Of a very wide SAE batches are smaller."""
    if samples.d_model != sae.cfg.d_in:
        raise SaeError(f"the SAE is for width {sae.cfg.d_in}, the samples have {samples.d_model}")
    batch = max(min(batch, (1 << 28) // sae.cfg.d_sae), 1)  # a gigabyte of codes
    n = min(limit or len(samples), len(samples))
    found = _kept(
        "fits", [sae], {"samples": samples.about(), "n": n, "batch": batch}, lambda: _fit(sae, samples, n, batch)
    )
    dead = float((found["frequency"] == 0).double().mean())
    return Evaluation(float(found["frequency"].sum()), dead, **found)


def _fit(sae: Dictionary, samples: Rows, n: int, batch: int) -> dict[str, Tensor]:
    """The tensors of an `Evaluation` on the first n samples."""
    parts = torch.arange(n).split(batch)
    mean = sum(samples.rows(part).double().sum(0) for part in parts) / n
    norms = sae.W_dec.detach().double().norm(dim=1).cpu()
    fired, squares = torch.zeros(sae.cfg.d_sae, dtype=torch.long), torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
    error, total = [], []
    for part in parts:
        x = samples.rows(part)
        with torch.no_grad():
            codes = sae.encode(x.to(sae.device))
            x_hat = sae.decode(codes).cpu()
        fired += (codes != 0).sum(0).cpu()
        squares += codes.square().sum(0).cpu()
        error.append((x.double() - x_hat.double()).square().sum(1))
        total.append((x.double() - mean).square().sum(1))
    each = {"error": torch.cat(error), "total": torch.cat(total)}
    return {"frequency": fired.double() / n, "energy": squares * norms.square() / n, **each}


def explained(fits: Sequence[Evaluation], documents: Tensor, less: Evaluation | None = None) -> Interval:
    """Explained variance with its interval over `documents` (samples,), which each sample is of, and over the SAEs of several
    seeds, one of `fits` each. `less`: the explained variance of another fit of the same samples is taken off, document by document.
    """
    of = np.unique(documents.numpy(), return_inverse=True)[1]
    errors = [fit.error for fit in fits]
    total = fits[0].total
    table = np.stack([np.bincount(of, x.numpy()) for x in (total, total if less is None else less.error, *errors)], 1)

    def over_total(x: np.ndarray) -> np.ndarray:
        whole, other, *each = x.sum(0)
        return (other - np.array(each)) / whole

    return stats.over(table, over_total)


class Principal:
    """The k first principal components of rows (n, d_model) in the shape of an SAE: what as many dense numbers explain."""

    device = torch.device("cpu")

    def __init__(self, rows: Tensor, k: int):
        x = rows.double()
        self.mean = x.mean(0)
        axes = torch.linalg.eigh((x - self.mean).T @ (x - self.mean)).eigenvectors.flip(1)[:, :k]
        self.mean, self.axes = self.mean.float(), axes.float()
        self.W_dec, self.cfg = self.axes.T, SimpleNamespace(d_in=rows.shape[1], d_sae=k)

    def state_dict(self) -> dict[str, Tensor]:
        """What it consists of."""
        return {"mean": self.mean, "axes": self.axes}

    def encode(self, x: Tensor) -> Tensor:
        """Coordinates (n, k) of x (n, d_model)."""
        return (x - self.mean) @ self.axes

    def decode(self, codes: Tensor) -> Tensor:
        """The rows (n, d_model) with those coordinates."""
        return codes @ self.axes.T + self.mean


class LossRecovered(NamedTuple):
    """Next-token cross-entropy (nats) a row: of the model, with the SAE, with the mean, spliced in; each (rows,) float64."""

    model: Tensor
    sae: Tensor
    mean: Tensor

    @property
    def recovered(self) -> float:
        """(mean - SAE) / (mean - model): 1 if the SAE costs nothing, 0 if it is no better than the mean activation."""
        return float((self.mean.sum() - self.sae.sum()) / (self.mean.sum() - self.model.sum()))


def by_document(samples: Samples, *per_sample: Tensor) -> list[np.ndarray]:
    """Sums over documents (documents,) of numbers a sample (samples,), documents without any left out."""
    documents = samples.named("document")[: len(per_sample[0])].numpy()
    some = np.bincount(documents) > 0
    return [np.bincount(documents, weights=x.double().numpy())[some] for x in per_sample]


class Spliceable(NamedTuple):
    """Token rows (rows, context) in which an SAE can be put: `ids`, the positions it is put at, `kept`, and each row's `document`."""

    ids: Tensor
    kept: Tensor
    document: np.ndarray


def spliceable(samples: Samples, rows: int, seed: int = 0) -> Spliceable:
    """A random choice of the rows of tokens that `samples` were harvested from, those that have two kept tokens in a row."""
    ids, row_of = samples.token_rows()
    kept = torch.zeros_like(ids, dtype=torch.bool)
    kept[row_of.long(), samples.named("position").long()] = True
    document = torch.full((len(ids),), -1).scatter(0, row_of.long(), samples.named("document").long())
    some = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))[:rows]
    some = some[(kept[some][:, :-1] & kept[some][:, 1:]).any(1)]
    return Spliceable(ids[some], kept[some], document[some].numpy())


def loss_recovered(
    lm: LM,
    saes: Sequence[Dictionary],
    layer: int,
    ids: Tensor,
    kept: Tensor,
    mean: Tensor,
    limit: float = math.inf,
    batch: int = 8,
) -> list[LossRecovered]:
    """What the language model loses when each of `saes`, or the `mean` activation (d_model,), stands in for the residual stream.

    `ids`, `kept` (rows, context): token rows and the positions that are replaced; special tokens, the first of a row, and residuals
    longer than `limit` (of a harvest: `Samples.limit`) pass through, as the SAE was not trained on them. Loss is taken where a
    kept position predicts a kept one; SaeError for a row that has none. Cached on disk.
    """
    counted = kept[:, :-1] & kept[:, 1:]
    if not bool(counted.any(1).all()):
        row = int((~counted.any(1)).nonzero()[0])
        raise SaeError(f"row {row} has no kept token that is followed by another: leave it out")

    def instead(x: Tensor, keep: Tensor, new: Callable[[Tensor], Tensor]) -> Tensor:
        here = keep & (x.float().norm(dim=-1) <= limit)
        return x.masked_scatter(here[..., None], new(x[here].float()).to(x.dtype))

    def through(sae: Dictionary) -> Callable[[Tensor], Tensor]:
        return lambda a: sae.decode(sae.encode(a.to(sae.device))).to(a.device)

    ways = [lambda a: mean.to(a.device).expand(len(a), -1), *map(through, saes)]

    def compute() -> dict[str, Tensor]:
        found: list[list[Tensor]] = [[] for _ in range(1 + len(ways))]
        for first in range(0, len(ids), batch):
            rows = slice(first, first + batch)
            keep = kept[rows].to(lm.device)
            changes = [partial(instead, keep=keep, new=way) for way in ways]
            for losses, of_rows in zip(
                found, scoring.losses(lm, ids[rows], counted[rows], layer, changes), strict=True
            ):
                losses += [row.mean() for row in of_rows]
        return {"losses": torch.stack([torch.stack(losses) for losses in found])}

    if all(map(fingerprint, saes)):
        reading.unhooked(lm)
    place = {"layer": layer, "ids": store.digest(ids), "kept": store.digest(kept), "mean": store.digest(mean)}
    key = {**lm.key, **place, "limit": str(limit), "batch": batch}
    own, of_mean, *spliced = _kept("spliced", saes, key, compute)["losses"]
    return [LossRecovered(own, of_sae, of_mean) for of_sae in spliced]
