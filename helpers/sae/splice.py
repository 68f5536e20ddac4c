"""An SAE inside a running model: residuals token by token, the SAE in their place, and edits of latents that change nothing else.

Knows a model, an SAE and token sequences. Steered and unsteered runs are read after the block that is steered,
where the SAE lives. sae_lens's SAETransformerBridge splices too (equal in the tests); it has no choice of positions, so
that first and special tokens, on which no SAE was trained, would be replaced as well.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers import stats
from helpers.lm import hooks
from helpers.lm.hooks import Positions
from helpers.lm.reading import LM
from helpers.lm.tokens import ANSWER, USER, Tokens
from helpers.sae import decompose
from helpers.sae.topk import Dictionary


def errors(sae: Dictionary, rows: Tensor) -> Tensor:
    """x - decode(encode(x)) (tokens, d_model) float32 of rows (tokens, d_model)."""
    codes = decompose.codes_of(sae, rows)
    with torch.no_grad():
        return rows.float() - sae.decode(codes).float().cpu()


class Spoken(NamedTuple):
    """The user's and the answer's tokens of a conversation, which an SAE can be asked about: `rows` (tokens, d_model), the token
    `ids` (tokens,), and where they are the `answer`'s (tokens,) bool."""

    rows: Tensor
    ids: Tensor
    answer: np.ndarray


def spoken(tokens: Tokens, rows: Tensor, limit: float = float("inf")) -> Spoken:
    """What is spoken in a conversation: first, template and special tokens out, and rows (tokens, d_model) longer than `limit`."""
    roles = torch.tensor(tokens.roles)
    kept = ((roles == USER) | (roles == ANSWER)) & (torch.arange(len(roles)) > 0) & (rows.norm(dim=1) <= limit)
    return Spoken(rows[kept], torch.tensor(tokens.ids)[kept], (roles == ANSWER)[kept].numpy())


class Errors(NamedTuple):
    """The SAE's errors of two runs, token by token, each (tokens,) float64: `ratio` of their lengths, other over one; `cosine`."""

    ratio: np.ndarray
    cosine: np.ndarray


def compare_errors(sae: Dictionary, one: Tensor, other: Tensor) -> Errors:
    """Errors of the rows `one` and `other` (tokens, d_model) of the same tokens in two runs."""
    a, b = (errors(sae, rows).double() for rows in (one, other))
    return Errors((b.norm(dim=1) / a.norm(dim=1)).numpy(), stats.cosine(a.numpy(), b.numpy()))


def edited(
    lm: LM,
    layer: int,
    sae: Dictionary,
    edit: Callable[[Tensor], Tensor] | None = None,
    error_term: bool = True,
    positions: Positions | None = None,
) -> AbstractContextManager[None]:
    """Context: the SAE's codes z (..., latents) after block `layer` become edit(z).

    With its error term: x + decode(edit(z)) - decode(z), in which b_dec and what the SAE misses cancel: no edit, no change, and the
    shift is exactly the edited codes' difference times the decoder rows. Without: decode(edit(z)) in place of x. `edit` gets a copy
    and returns codes of the same shape (ValueError otherwise).
    """

    def change(x: Tensor) -> Tensor:
        with torch.no_grad():
            codes = sae.encode(x.float().to(sae.device))
            new = codes if edit is None else edit(codes.clone())
            if new.shape != codes.shape:
                raise ValueError(
                    f"the edit returned codes of shape {tuple(new.shape)} for codes of shape {tuple(codes.shape)}"
                )
            if error_term:
                return x + ((new - codes) @ decompose.rows_of(sae)).to(x.device).to(x.dtype)
            return sae.decode(new).to(x.device).to(x.dtype)

    return hooks.edit(lm, layer, change, positions)
