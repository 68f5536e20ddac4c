"""A steering vector that is trained by preference: all that is learned is what is added to the stream after one layer.

    L(b) = - log sigmoid(beta [log p_b(c) - log p_0(c) - log p_b(r) + log p_0(r)])  -  w log p_b(c) / tokens of c

b is the vector (d_model,), c the chosen and r the rejected answer, mean over pairs: DPO (Rafailov et al. 2023, arXiv:2305.18290)
in a steering vector's own parametrisation, BiPO (Cao et al. 2024, arXiv:2406.00045), with the likelihood of what is chosen (Pang et
al. 2024, arXiv:2404.19733). Only the blocks above the layer run, on the answers' tokens: the prompts' keys and values are kept.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from tqdm import tqdm
from transformers.cache_utils import DynamicLayer

from helpers.lm import tokens
from helpers.lm.reading import LM
from helpers.lm.scoring import Continuations

Keep = Callable[[Tensor], Tensor]  # a projection (d_model,) -> (d_model,): where the vector may lie


class Config(NamedTuple):
    """How a vector is trained: `beta` and `likelihood` as in L; Adam's steps, at first `pace` long; the steps at which the
    vector is looked at."""

    pace: float
    looks: Sequence[int] = (1, 2, 4, 8, 16, 32)
    beta: float = 0.1
    likelihood: float = 0.25


class Trained(NamedTuple):
    """The vector at each of the looks, `path` (looks, d_model) float64; those `steps`; and the mean loss of the steps since the look
    before, `losses` (looks,)."""

    path: Tensor
    steps: list[int]
    losses: np.ndarray

    @property
    def vector(self) -> Tensor:
        """The last (d_model,)."""
        return self.path[-1]


class Pairs(Continuations):
    """Prompts with a chosen (0) and a rejected (1) answer, in batches that can be differentiated with respect to an added vector."""

    def __init__(self, lm: LM, pairs: Sequence[tuple[str, str, str]], layer: int, batch: int = 10):
        """`pairs`: (prompt, chosen, rejected). ValueError where there is none."""
        laid = [[tokens.chat(lm.tokenizer, prompt, answer=x) for x in answers] for prompt, *answers in pairs]
        super().__init__(lm, laid, layer)
        self.chunk = min(batch, self.chunk)

    @property
    def batches(self) -> int:
        """How many there are."""
        return math.ceil(len(self.order) / self.chunk)

    def under(self, number: int, vector: Tensor) -> tuple[Tensor, Tensor]:
        """log p of a batch's answers under the vector, and their numbers of tokens, both (pairs, 2)."""
        chunk = self._build()[number]
        for kept in chunk.cache.layers:  # the last step's graph ends here
            if isinstance(kept, DynamicLayer) and kept.keys is not None and kept.values is not None:
                kept.keys, kept.values = kept.keys.detach(), kept.values.detach()
        logits = self._predicted(chunk, vector, 1.0).logits.float()
        each = -cross_entropy(logits, chunk.targets, reduction="none")
        counts = chunk.scored.sum(1)
        sums = torch.stack([part.sum() for part in each.split(counts.tolist())])
        return sums.reshape(-1, 2), counts.reshape(-1, 2)


def loss(now: Tensor, before: Tensor, counts: Tensor, beta: float, likelihood: float) -> Tensor:
    """L, mean over pairs: log p under the vector and without it, and numbers of tokens, each (pairs, 2)."""
    gained = now - before
    preferred = -logsigmoid(beta * (gained[:, 0] - gained[:, 1])).mean()
    return preferred - likelihood * (now[:, 0] / counts[:, 0]).mean()


def along(v: Tensor) -> Keep:
    """Multiples of `v` (d_model,) alone."""
    unit = v / v.norm()
    return lambda b: (b @ unit.to(b)) * unit.to(b)


def aside(v: Tensor) -> Keep:
    """Whatever is at right angles to `v` (d_model,)."""
    project = along(v)
    return lambda b: b - project(b)


def train(pairs: Pairs, config: Config, seed: int = 0, keep: Keep = lambda b: b) -> Trained:
    """A vector trained on the pairs, which stays where `keep` puts it. The seed orders the batches and starts the vector a hundredth of
    a step away from zero. ValueError for looks that do not rise from 1, and for a loss that is no number."""
    looks = list(config.looks)
    if not looks or looks[0] < 1 or looks != sorted(set(looks)):
        raise ValueError(f"looks {looks} were given; steps that rise from 1 or more are wanted")
    lm, g = pairs.lm, torch.Generator().manual_seed(seed)
    start = torch.randn(lm.d_model, generator=g, dtype=torch.float64)
    b = keep(0.01 * config.pace * start / start.norm()).float().to(lm.device).requires_grad_(True)
    optimiser = torch.optim.Adam(
        [b], lr=config.pace / lm.d_model**0.5
    )  # whose first step is that long in every coordinate
    with torch.no_grad():
        before = [pairs.under(i, torch.zeros_like(b))[0] for i in range(pairs.batches)]
    path, losses, some = [], [], []
    order: list[int] = []
    for step in tqdm(range(1, looks[-1] + 1), desc="train a vector", leave=False):
        order = order or torch.randperm(pairs.batches, generator=g).tolist()
        number = order.pop()
        with torch.enable_grad():
            now, counts = pairs.under(number, b)
            found = loss(now, before[number], counts, config.beta, config.likelihood)
            (b.grad,) = torch.autograd.grad(found, [b])
        if not torch.isfinite(found):
            raise ValueError(f"the loss is {float(found)} at step {step}: use bfloat16 or float32, or a smaller pace")
        b.grad = keep(b.grad)
        optimiser.step()
        with torch.no_grad():
            b.copy_(keep(b))
        some.append(float(found))
        if step in looks:
            path.append(b.detach().double().cpu().clone())
            losses.append(float(np.mean(some)))
            some = []
    return Trained(torch.stack(path), looks, np.array(losses))


def losses(pairs: Pairs, config: Config, vectors: Tensor) -> np.ndarray:
    """L of all pairs under each of `vectors` (n, d_model): (n,)."""
    out, total = np.zeros(len(vectors)), len(pairs.sequences)
    with torch.no_grad():
        for number in range(pairs.batches):
            before, counts = pairs.under(number, torch.zeros_like(vectors[0]).float())
            for i, b in enumerate(vectors.float()):
                now = pairs.under(number, b)[0]
                out[i] += len(now) / total * float(loss(now, before, counts, config.beta, config.likelihood))
    return out
