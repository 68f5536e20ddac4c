"""Numbers published for a profile's SAE (`known:` in the profile), and what the same measurement gives here.

What depends on the SAE's weights alone can be reproduced to the digit; what depends on prompts stands beside ours, whose pairs are not
exactly the sources' own. Pure: an SAE, codes and differences in, numbers out.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers.profiles import Known
from helpers.sae import decompose
from helpers.sae.projections import Negative
from helpers.sae.topk import Dictionary
from helpers.stats import Interval

MAYNE = "arXiv:2411.08790"


class Published(NamedTuple):
    """`what` was published, the `number`, our `value` in the same `unit`, and what `chance` gives: a latent drawn at random, or sides
    dealt out at random."""

    what: str
    source: str
    unit: str
    number: float
    value: Interval
    chance: float | np.ndarray


def of_weights(known: Known, sae: Dictionary, seed: int = 0) -> dict[str, Published]:
    """What depends on the weights alone, by a short name."""
    any_latent = _any_latent(sae, seed)
    zero, rows = decompose.zero(sae).codes[0], decompose.unit_rows(decompose.rows_of(sae))[0]
    found = {}
    for i, number in known.zero_code.items():
        what = f"code of the zero vector at latent {i}"
        found[f"zero.{i}"] = Published(what, MAYNE, "code", number, _exactly(zero[i]), float(zero[any_latent]))
    if known.row_cosine:
        one, two = known.row_cosine.latents
        what, number = f"cosine of the decoder rows {one} and {two}", known.row_cosine.value
        found["rows"] = Published(
            what, MAYNE, "cosine", number, _exactly(rows[one] @ rows[two]), float(rows[one] @ rows[any_latent])
        )
    return found


def of_prompts(
    known: Known, sae: Dictionary, negative: Mapping[str, Negative], gaps: Mapping[str, Tensor], seed: int = 0
) -> dict[str, Published]:
    """What depends on prompts: of `negative`, by behaviour, and of `gaps` (pairs, d_model), the differences of the behaviour whose
    concept was looked for, read at the last or over all positions."""
    found = {}
    if (part := known.negative_share) and part.behavior in negative:
        here = negative[part.behavior]
        what = "share of active latents more active on the negative side"
        found["negative"] = Published(what, MAYNE, "of the active latents", part.value, _exactly(here.share), here.null)
    if concept := known.concept_code:
        for where, gap in gaps.items():
            rows = gap.double().cpu().numpy()
            what = f"cosine of the code of the {where}-position vector with latent {concept.latent}"
            value = decompose.code_cosines(sae, concept.latent, rows, of_mean=where == "last")
            by_chance = decompose.code_cosine(sae, _any_latent(sae, seed), rows)
            found[f"concept.{where}"] = Published(
                what, "source 001", "cosine", getattr(concept, where), value, by_chance
            )
    return found


def _any_latent(sae: Dictionary, seed: int) -> int:
    return int(torch.randint(len(sae.W_dec), (1,), generator=torch.Generator().manual_seed(seed)))


def _exactly(x: float | Tensor) -> Interval:
    return Interval(float(x), float(x), float(x))
