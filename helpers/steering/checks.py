"""One call before a steering vector is used: does it steer, against what chance gives, at which price, with which strength?

    from helpers.steering import checks
    checks.check(vector, lab, "refusal")           # a SteeringVector, ours or of `caa.make_vector`
    checks.check("direction.gguf", lab, "refusal") # or a file of somebody else's: see `caa.import_direction`

Knows a study's model and behaviours; says what it found in one sentence and judges by the rule that stands in `Check.sentence`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from helpers import nulls, stats, store
from helpers.claims import table
from helpers.lm import reading, scoring
from helpers.stats import Interval
from helpers.steering import caa, methods, propensity
from helpers.steering.caa import SteeringVector
from helpers.study import Single

ALPHA = 0.05  # p-values below it are said to beat a null


@dataclass(frozen=True)
class Check:
    """What `check` found. `response`: change of the log-odds of the behaviour's test items, in nats, with its interval over items, with the
    vector at `strength`, in residual norms, and so at `multiplier` times the vector as it came, where it costs `price` nats per token
    on other prompts (`reached`: whether the wanted price could be paid). `wrong`: share of items that go the wrong way. `random` and
    `shuffled`: p-values against random directions and against pairs with half of their sides swapped, by gradient; None where there
    are no pairs at that layer."""

    name: str
    behavior: str
    layer: int
    response: Interval
    wrong: float
    random: float
    shuffled: float | None
    price: float
    strength: float
    multiplier: float
    reached: bool

    @property
    def sentence(self) -> str:
        """What to do with it. Use it if the whole interval lies above zero and no null reaches it; turn it round if it lies below zero."""
        beaten = [p < ALPHA for p in (self.random, self.shuffled) if p is not None]
        how = f"{self.response:+.2f} nats at {self.price:.2f} nats of KL per token"
        if self.response.low > 0 and all(beaten):
            return f"It steers *{self.behavior}*: {how}; multiply it by {self.multiplier:.3g}."
        if self.response.high < 0:
            return f"It steers *{self.behavior}* the wrong way: {how}; turn it round, or read its pairs again."
        if self.response.low > 0:
            return f"It moves *{self.behavior}* ({how}), but no further than chance does: do not rely on it."
        return f"It does not clearly move *{self.behavior}*: {how}; do not use it."

    def _repr_markdown_(self) -> str:
        shuffled = "-" if self.shuffled is None else f"{self.shuffled:.2g}"
        rows = [
            ["response, nats [95 % over items]", f"{self.response:+.2f}"],
            ["items that go the wrong way", f"{self.wrong:.0%}"],
            ["p against random directions", f"{self.random:.2g}"],
            ["p against shuffled pairs", shuffled],
            ["price, KL in nats per token", f"{self.price:.2f}" + ("" if self.reached else " (less than wanted)")],
            ["strength, residual norms", f"{self.strength:.2f}"],
            ["multiplier of the vector as it came", f"{self.multiplier:.3g}"],
        ]
        return f"{self.sentence}\n\n{table([f'{self.name}, layer {self.layer}', ''], rows).data}"


def check(
    vector: SteeringVector | str | Path,
    lab: Single,
    behavior: str = "",
    layer: int | None = None,
    price: float = 0.3,
    items: int = 12,
    draws: int = 500,
    seed: int = 0,
    sizes: methods.Sizes | None = None,
) -> Check:
    """A vector, or a file that holds one (`save_vector`'s, or another library's, of whose layers `layer` chooses by the file's own number),
    put to a behaviour of the study. ValueError where the behaviour is not one of them, or the width is another model's."""
    found, sizes = _vector(vector, layer, behavior), sizes or methods.Sizes()
    name = behavior or found.behavior
    if name not in lab.names:
        raise ValueError(f"behaviour {name!r} was given; the study has {', '.join(lab.names)}")
    lm, b, v = lab.model, lab.data[name], found.vector
    if len(v) != lm.d_model:
        raise ValueError(f"the vector has {len(v)} dimensions and {lm.identity} {lm.d_model}: it is another model's")
    if not found.layer < lm.layers:
        raise ValueError(f"the vector is for layer {found.layer}; {lm.identity} has layers 0 to {lm.layers - 1}")
    at = found.layer
    norm = lab.residual_norm if at == lab.layer else _norm(lab, at)
    step = (v / v.norm() * norm).float()
    own = propensity.of_replies(lm, b.open[: sizes.replies], at, sizes.tokens)
    grid = store.kept(methods.curves, own, step[None], methods.STRENGTHS, 2 * price)[0].numpy()
    raw = methods.strength_at(grid, methods.STRENGTHS, price)
    reached, strength = bool(np.isfinite(raw)), float(np.nan_to_num(raw, nan=methods.STRENGTHS[-1]))
    where = propensity.of_items(lm, b.test[:items], at)
    odds = store.kept(methods.log_odds, where, torch.stack([torch.zeros_like(step), strength * step])).numpy()
    moved = odds[1] - odds[0]
    slope = scoring.linear_response(where).mean(0)
    exact = (strength * step).double()
    p = _p(exact, nulls.random(exact, draws, seed), slope)
    shuffled = None
    if at in lab._read:
        pos, neg = lab.halves()[name].at(at)
        shuffled = _p(exact, nulls.shuffled(pos, neg, draws, seed), slope)
    paid = propensity.of_replies(lm, b.open[sizes.replies : 2 * sizes.replies], at, sizes.tokens)
    cost = float(store.kept(methods.costs, paid, strength * step[None]).mean())
    return Check(
        Path(vector).name if isinstance(vector, str | Path) else found.method, name, at, stats.over(moved),
        float((moved < 0).mean()), p, shuffled, cost, strength, strength * norm / found.norm, reached,
    )  # fmt: skip


def _vector(given: SteeringVector | str | Path, layer: int | None, behavior: str) -> SteeringVector:
    if isinstance(given, SteeringVector):
        return given
    return (
        caa.load_vector(given)
        if str(given).endswith(".safetensors")
        else caa.import_direction(given, layer=layer, behavior=behavior)
    )


def _norm(lab: Single, layer: int) -> float:
    """The median length of the stream after a layer."""
    if layer in lab.layers:
        return float(lab.lengths.stream[lab.layers.index(layer)])
    return float(reading.rows(lab.model, lab._prompts, layer).norm(dim=1).median())


def _p(own: Tensor, null: Tensor, slope: np.ndarray) -> float:
    """How often a null vector, as long as the own, has at least its response by gradient."""
    long = null.double() / null.double().norm(dim=1, keepdim=True) * own.norm()
    return stats.p_value(float(own.numpy() @ slope), long.numpy() @ slope)
