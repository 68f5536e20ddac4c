"""A crosscoder of two models: one sparse code for both, two decoders; and how much of each latent the base has of its own.

    z = TopK(W_enc [base / s_base, chat / s_chat] + b)     base = s_base z W_base + b_base     chat = s_chat z W_chat + b_chat

It is trained on the sum of both squared errors (Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders), which makes it an
SAE of both models' rows laid end to end: `helpers.sae.train` trains it as it is, and its decoder's rows fall into two halves. Each
model's rows are in units of their own spread s, so that a model with longer rows has nothing new by that alone. No L1 penalty, which
shrinks a shared latent's weaker half to nothing (Minder et al. 2025, arXiv:2504.02922): TopK, or BatchTopK where the profile says so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers import store
from helpers.pair import matching
from helpers.pair.matching import Match
from helpers.pair.rankings import Ranked
from helpers.profiles import Profile
from helpers.sae import saes, topk, train
from helpers.sae.activations import Rows
from helpers.sae.decompose import codes_of
from helpers.sae.topk import Codes, Dictionary

ERROR, RECONSTRUCTION = 0.2, 0.5  # below both ratios a latent is called chat-only, as in arXiv:2504.02922
ON = 0.005  # the share of tokens that hold a planted feature


class Joined(Rows):
    """Two models' rows at the same tokens, laid end to end, each times its model's scale: (samples, 2 d_model) float32.

    By default the `scales` give each model's rows a spread of 1; held-out rows take those of the rows trained on.
    """

    def __init__(self, base: Rows, chat: Rows, scales: Sequence[float] = ()):
        self.base, self.chat, self.d_model = base, chat, base.d_model + chat.d_model
        self.scales = [*scales] or [train.measure(side.sample(16_384))[1] for side in (base, chat)]

    def __len__(self) -> int:
        return len(self.base)

    def about(self) -> dict[str, Any]:
        """What the chat model's rows are, and that the base's come before them."""
        base, chat = self.base.about(), self.chat.about()
        names = f"{base['model_name']} | {chat['model_name']}"
        return {**chat, "joined": names, "base": store.digest(base)[:16], "scales": self.scales}

    def places(self) -> int:
        """As of either side."""
        return self.base.places()

    def placed(self, place: Tensor) -> Tensor:
        """As of either side."""
        return self.base.placed(place)

    def rows(self, index: Tensor) -> Tensor:
        return torch.cat([self.base.rows(index) * self.scales[0], self.chat.rows(index) * self.scales[1]], 1)

    def place(self, index: int) -> str:
        return f"{self.base.place(index)}, or {self.chat.place(index)}"


class Planted(Rows):
    """A model's rows, with features in some of them that the model does not have: orthogonal `directions` (features, d_model) of
    length 1, on ON of the tokens each, no two on one token. `energies`: each feature's mean |code|^2 over all tokens."""

    def __init__(self, base: Rows, energies: Sequence[float], seed: int = 0):
        self.base, self.d_model, self.energies, self.seed = base, base.d_model, [*energies], seed
        n = len(self.energies)
        g = torch.Generator().manual_seed(seed)
        self.directions = torch.linalg.qr(torch.randn(self.d_model, n, generator=g)).Q.T
        self.which = (torch.rand(len(base), generator=g) / ON).long()  # n or more: none
        code = torch.rand(len(base), generator=g) + 0.5  # of mean square 13 / 12
        each = (12 / 13 * torch.tensor(self.energies) / ON).sqrt()
        self.code = torch.where(self.which < n, code * each[self.which.clamp_max(n - 1)], 0)

    def __len__(self) -> int:
        return len(self.base)

    def about(self) -> dict[str, Any]:
        """What the rows are, and what is planted in them."""
        return {**self.base.about(), "planted": self.energies, "on": ON, "seed": self.seed}

    def places(self) -> int:
        """As of the rows alone."""
        return self.base.places()

    def placed(self, place: Tensor) -> Tensor:
        """As of the rows alone."""
        return self.base.placed(place)

    def rows(self, index: Tensor) -> Tensor:
        row = self.directions[self.which[index].clamp_max(len(self.energies) - 1)]
        return self.base.rows(index) + self.code[index, None] * row

    def place(self, index: int) -> str:
        return self.base.place(index)


def dictionary(
    profile: Profile, joined: Joined, device: str = "cpu", seed: int = 0, fast: bool = False
) -> tuple[saes.Loaded, Path]:
    """The crosscoder of a pair, of as many latents and codes a token as the profile's SAE, and its folder; trained once, then cached.

    ValueError where the profile does not say how an SAE is trained.
    """
    config = train.of_profile(profile, joined.d_model // 2, seed, fast)
    folder = train.sae(joined, config, device)
    return saes.load(folder, device=device, d_model=joined.d_model, layer=profile.layer), folder


def halves(sae: Dictionary) -> tuple[Tensor, Tensor]:
    """The decoder rows of the base and of the chat model, (latents, d_model) each, in units of either's spread."""
    base, chat = sae.W_dec.detach().float().cpu().chunk(2, 1)
    return base.contiguous(), chat.contiguous()


# --- what is only in the chat model ------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """How much of each latent the base has, in parts of what the chat model has, (latents,) float64, NaN for one that never fires.

    `norm`: the length of the base's row over the chat model's. `error` and `reconstruction`: nu_epsilon and nu_r of
    arXiv:2504.02922. All are near 1 for a shared latent and near 0 for one that only the chat model has. `used` (latents,): the
    smaller of the two scalings in the chat model itself, near 1; where it is not, the ratios are noise. `fired`: tokens on which
    each fires. `explained`: the explained variance of base and chat.
    """

    norm: Tensor
    error: Tensor
    reconstruction: Tensor
    used: Tensor
    fired: Tensor
    explained: tuple[float, float]

    @property
    def relative_norm(self) -> Tensor:
        """The chat row's share of both rows' lengths: 1 where the base's is zero, 1/2 where they are equal (Lindsey et al.)."""
        return 1 / (1 + self.norm)

    @property
    def newness(self) -> Tensor:
        """How new each latent is in the chat model: less what the base has of it by the measure that finds most."""
        return -torch.stack([self.norm, self.error, self.reconstruction]).amax(0)

    @property
    def chat_only(self) -> Tensor:
        """Which latents are only in the chat model by both ratios, (latents,) bool; its row there must be the longer one."""
        return (self.error < ERROR) & (self.reconstruction < RECONSTRUCTION) & (self.norm < 1)


def measured(sae: Dictionary, joined: Rows, batch: int = 2048) -> Measured:
    """How much of each latent of a crosscoder the base has, on held-out rows.

    With codes f of a latent, d its row in the chat model and Y rows of either model, latent scaling is the beta that makes
    |beta f d - Y|^2 least, d.(Y^T f) / (|f|^2 |d|^2); nu is the base's beta over the chat model's. For nu_epsilon Y is what the model's
    other latents leave unexplained: high where the base has the latent and its own row misses it. For nu_r Y is what all latents
    reconstruct: high where other latents write it in the base. The paper's code keeps the decoder's bias in that; here the
    latents alone count, for the bias is a long mean, the same on every token, and adds to either beta what is not the latent's.
    """
    if joined.d_model != sae.cfg.d_in or joined.d_model % 2:
        raise ValueError(
            f"the crosscoder is for width {sae.cfg.d_in}, the rows have {joined.d_model}; both models' rows of one width are wanted"
        )
    base, chat = halves(sae)
    bias, n = sae.b_dec.detach().float().cpu(), len(joined)
    sums = torch.zeros(4, len(chat), dtype=torch.float64)  # of f (Y . d): left over in base and chat, made in either
    power, fired = torch.zeros(2, len(chat), dtype=torch.float64)
    mean, squares, wrong = torch.zeros(3, joined.d_model, dtype=torch.float64)
    for part in torch.arange(n).split(batch):
        x = joined.rows(part)
        dense = codes_of(sae, x)
        with torch.no_grad():
            made = sae.decode(dense).float().cpu()
        codes = _sparse(dense.cpu())
        for total, rows in zip(sums, (*(x - made).chunk(2, 1), *(made - bias).chunk(2, 1)), strict=True):
            along = topk.gather_dot(rows.contiguous(), chat, codes).double()
            total.index_add_(0, codes.latents, codes.values.double() * along)
        power.index_add_(0, codes.latents, codes.values.double().square())
        fired += torch.bincount(codes.latents, minlength=len(chat))
        mean += x.double().sum(0) / n
        squares += x.double().square().sum(0)
        wrong += (x.double() - made.double()).square().sum(0)
    square = chat.double().square().sum(1)
    beta = sums / torch.where(power * square > 0, power * square, torch.nan)
    beta[0] += (base.double() * chat.double()).sum(1) / square
    beta[1] += 1
    share = 1 - wrong.reshape(2, -1).sum(1) / (squares - n * mean**2).reshape(2, -1).sum(1)
    return Measured(
        torch.where(fired > 0, base.double().norm(dim=1) / square.sqrt(), torch.nan),
        beta[0] / beta[1],
        beta[2] / beta[3],
        torch.minimum(beta[1], beta[3]),
        fired,
        (float(share[0]), float(share[1])),
    )


def ranked(sae: Dictionary, found: Measured, least_fired: int = 50, least_used: float = 0.3) -> Ranked:
    """The latents of a crosscoder that can be ranked, with the chat model's rows, by how new they look there: by the `newness` of all
    three measures, and by the relative norm alone.

    Left out are those that fire on fewer than `least_fired` tokens, and those that the chat model hardly uses: see `Measured.used`.
    """
    at = ((found.fired >= least_fired) & (found.used > least_used)).nonzero()[:, 0]
    rows = torch.nn.functional.normalize(halves(sae)[1][at].double(), dim=1)
    by = {"crosscoder": found.newness[at].numpy(), "its relative norm": found.relative_norm[at].numpy()}
    return Ranked(at, rows.numpy(), by, int((found.fired > 0).sum()))


def recovered(some: Ranked, found: Measured, directions: Tensor, alike: float = 0.7) -> np.ndarray:
    """Which planted `directions` (features, d_model) have a latent among `some` that is like them and that is called chat-only,
    (features,) bool."""
    cosine = some.rows @ directions.double().numpy().T
    best = cosine.argmax(0)
    return np.asarray((cosine.max(0) > alike) & found.chat_only[some.ids].numpy()[best])


def false_alarms(some: Ranked, found: Measured, directions: Tensor) -> float:
    """The share of the latents `some` whose rows lie for the most part outside the span of the planted `directions`, and that are called
    chat-only all the same."""
    outside = ((some.rows @ directions.double().numpy().T) ** 2).sum(1) < 0.5
    return float(found.chat_only[some.ids].numpy()[outside].mean())


def _sparse(dense: Tensor) -> Codes:
    """The codes (tokens, latents) that are not zero, in CSR order."""
    csr = dense.to_sparse_csr()
    return Codes(csr.col_indices(), csr.values(), csr.crow_indices())


# --- what a match of two SAEs says of them -----------------------------------------------------------------------------


class Partners(NamedTuple):
    """What two SAEs and their one-to-one match say of latents of a crosscoder, cosines (n,) float64 each.

    `own`: with the latent of the chat model's SAE that is most like it. `other`: of that one with its partner in the base's SAE, 0
    where it has none.
    """

    own: np.ndarray
    other: np.ndarray

    def said(self, alike: float) -> dict[str, np.ndarray]:
        """What the match says of each, (n,) bool: that it is new, that it is shared, or nothing, for the chat model's SAE has no
        latent like it."""
        known, shared = self.own > alike, self.other > alike
        return {"new": known & ~shared, "shared": known & shared, "nothing": ~known}


def partners(rows: Tensor, chat: Tensor, found: Match) -> Partners:
    """The partners of a crosscoder's chat rows (n, d_model) by a match `found` of a base SAE's rows to `chat` (latents, d_model)."""
    near = matching.nearest(rows, chat)
    other = matching.cosines(matching.turned(found))[near.B_for_A.numpy()]
    return Partners(near.cosine.double().numpy(), other)
