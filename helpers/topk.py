"""TopK sparse autoencoders: the mathematics, and a training step that costs little more than its one dense product.

Knows tensors only: no files, no optimiser, no loop. With rows x (tokens, d_model):

    p = (x - b_dec) W_enc^T + b_enc         the only (tokens, latents) product
    z = ReLU(p) where p_j |W_dec_j| is among the k largest, else 0
    x_hat = z W_dec + b_dec                 loss = mean over tokens of |x - x_hat|^2 + alpha |e - e_hat|^2

Gao et al. 2024 (arXiv:2406.04093), eq. 1-2 and A.2: e = x - x_hat, held fixed, and e_hat its reconstruction p W_dec from the
k_aux largest dead latents, without the ReLU, through which a dead latent could never come back (SAELens does the same).
Latents are ranked by p_j |W_dec_j|, their share of the output, so the loss does not depend on how encoder and decoder share
a length (SAELens: `rescale_acts_by_decoder_norm`); with unit rows that is TopK as published. BatchTopK (Bussmann et al.
2024, arXiv:2412.06410) takes the tokens * k largest of the batch. Everything after the choice is sparse: tokens * k numbers.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


class Weights(NamedTuple):
    """W_enc (latents, d_model), SAELens's transposed; b_enc (latents,); W_dec (latents, d_model); b_dec (d_model,)."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor


class Codes(NamedTuple):
    """The chosen codes of a batch in CSR order: `latents` and `values` (n,), `offsets` (tokens + 1,); values may be 0."""

    latents: Tensor
    values: Tensor
    offsets: Tensor

    @property
    def rows(self) -> Tensor:
        """(n,) the token each code belongs to."""
        return torch.repeat_interleave(self.offsets.diff(), output_size=len(self.latents))

    def dense(self, latents: int) -> Tensor:
        """(tokens, latents) with zeros where nothing was chosen."""
        out = self.values.new_zeros(len(self.offsets) - 1, latents)
        return out.index_put_((self.rows, self.latents), self.values)


class Step(NamedTuple):
    """What one batch gives: `loss` and its parts `mse` and `aux` (0-d), `gradients` shaped as Weights, `codes`, `x_hat`."""

    loss: Tensor
    mse: Tensor
    aux: Tensor
    gradients: Weights
    codes: Codes
    x_hat: Tensor


def check_sizes(d_model: int, latents: int, k: int) -> None:
    """ValueError that says which of the three sizes makes no sense."""
    for name, value in (("d_model", d_model), ("latents", latents), ("k", k)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} = {value!r} given; it must be a whole number of at least 1")
    if k > latents:
        raise ValueError(
            f"k = {k} codes a token were asked of {latents} latents; k must not exceed them (usual: 32 to 64)"
        )


def initial(d_model: int, latents: int, pre_bias: Tensor, seed: int = 0) -> Weights:
    """Decoder rows random of length 1, encoder equal to them, b_dec = `pre_bias` (d_model,), float32 on its device."""
    check_sizes(d_model, latents, 1)
    if pre_bias.shape != (d_model,):
        raise ValueError(f"a pre-bias of shape {tuple(pre_bias.shape)} was given for d_model = {d_model}")
    rows = torch.randn(latents, d_model, generator=torch.Generator().manual_seed(seed)).to(pre_bias.device)
    rows /= rows.norm(dim=1, keepdim=True)
    return Weights(rows.clone(), rows.new_zeros(latents), rows, pre_bias.float().clone())


def geometric_median(x: Tensor, steps: int = 50, tolerance: float = 1e-6) -> Tensor:
    """The point (d_model,) with the least summed distance to the rows of x (n, d_model): Weiszfeld's iteration, float64."""
    x = x.double()
    point = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - point).norm(dim=1).clamp_min(1e-12)
        moved = (weight[:, None] * x).sum(0) / weight.sum()
        close, point = (moved - point).norm() <= tolerance * point.norm(), moved
        if close:
            break
    return point.float()


# --- forward -----------------------------------------------------------------------------------------------------------


def pre_codes(x: Tensor, w: Weights, low: bool = False, out: Tensor | None = None) -> Tensor:
    """p_j |W_dec_j| (tokens, latents): what latents are ranked by; in bfloat16 if `low`. `out`: a buffer that may be used."""
    return _rank(x - w.b_dec, w, low, out)


def _rank(centred: Tensor, w: Weights, low: bool, out: Tensor | None) -> Tensor:
    norms = torch.linalg.vector_norm(w.W_dec, dim=1)
    scaled = torch.empty_like(w.W_enc, dtype=torch.bfloat16 if low else w.W_enc.dtype)
    torch.mul(w.W_enc, norms[:, None], out=scaled)
    return product(centred.to(scaled.dtype), scaled, (w.b_enc * norms).to(scaled.dtype), out)


def product(x: Tensor, rows: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x rows^T + bias: the one dense product of a step. In float32 on a CPU oneDNN's, up to twice as fast as torch's default."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, rows, bias, "none", [], "")
    return torch.mm(x, rows.T, out=out) if bias is None else torch.addmm(bias, x, rows.T, out=out)


def _codes(centred: Tensor, ranked: Tensor, w: Weights, k: int, batch_topk: bool) -> Codes:
    """The chosen codes with their values z."""
    chosen = _valued(centred, select(ranked, k, batch_topk), w)
    return chosen._replace(values=chosen.values.relu())


def _valued(centred: Tensor, chosen: Codes, w: Weights) -> Codes:
    """Chosen codes with their p in the place of the rank p |W_dec|: float32, also where ranked in bfloat16.

    A decoder row of zeros has no share in the output: its p counts as 0.
    """
    norms = torch.linalg.vector_norm(w.W_dec, dim=1)[chosen.latents]
    if chosen.values.dtype == torch.bfloat16:
        chosen = chosen._replace(values=chosen.values.float())
        p = gather_dot(centred, w.W_enc, chosen) + w.b_enc[chosen.latents]
    else:
        p = chosen.values / norms
    return chosen._replace(values=p.masked_fill(norms == 0, 0.0))


def gather_dot(a: Tensor, b: Tensor, codes: Codes) -> Tensor:
    """a[token] . b[latent] for each chosen (token, latent): (n,), from a (tokens, d) and b (latents, d)."""
    if a.device.type == "cpu" and torch.backends.mkl.is_available():
        pattern = torch.sparse_csr_tensor(
            codes.offsets, codes.latents, codes.values, (len(a), len(b)), check_invariants=False
        )
        return torch.sparse.sampled_addmm(pattern, a, b.T, beta=0.0).values()
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a, b, codes.latents, codes.offsets[:-1], codes.rows, 0
    )


def select(ranked: Tensor, k: int, batch_topk: bool = False) -> Codes:
    """The k largest of each row of `ranked` (tokens, latents), or the tokens * k largest of all; values are `ranked`'s."""
    tokens, latents = ranked.shape
    if not batch_topk:
        values, chosen = ranked.topk(k, dim=1, sorted=False)
        return Codes(chosen.flatten(), values.flatten(), torch.arange(0, tokens * k + 1, k, device=ranked.device))
    wide = min(4 * k, latents)  # a row rarely has more than 4 k of them: if one might, everything is looked at
    values, chosen = ranked.topk(wide, dim=1, sorted=False)
    best = values.flatten().topk(tokens * k, sorted=False)
    where = best.indices // wide * latents + chosen.flatten()[best.indices]
    if wide < latents and bool((values.amin(1) > best.values.min()).any()):
        where = ranked.flatten().topk(tokens * k, sorted=False).indices
    where = where.sort().values
    counts = torch.bincount(where // latents, minlength=tokens)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(where % latents, ranked.flatten()[where], offsets)


def encode(
    x: Tensor, w: Weights, k: int, batch_topk: bool = False, low: bool = False, out: Tensor | None = None
) -> Codes:
    """The codes z of x (tokens, d_model). With `low` latents are ranked in bfloat16; values stay exact in float32."""
    centred = x - w.b_dec
    return _codes(centred, _rank(centred, w, low, out), w, k, batch_topk)


def threshold(x: Tensor, w: Weights, k: int, batch: int = 2048) -> float:
    """The p_j |W_dec_j| above which x (tokens, d_model) has k codes a token on average: a BatchTopK SAE at inference.

    Each token's 4 k largest are looked at. Bussmann et al. average the smallest code of training batches for this.
    """
    kept = min(4 * k, len(w.b_enc))
    largest = torch.cat([pre_codes(part, w).topk(kept, dim=1).values.flatten() for part in x.split(batch)])
    return max(float(largest.sort(descending=True).values[min(k * len(x), len(largest)) - 1]), 0.0)


def decode(codes: Codes, w: Weights) -> Tensor:
    """x_hat (tokens, d_model) = z W_dec + b_dec."""
    z = embedding_bag(codes.latents, w.W_dec, codes.offsets[:-1], mode="sum", per_sample_weights=codes.values)
    return z + w.b_dec


# --- backward ----------------------------------------------------------------------------------------------------------


class _ByLatent(NamedTuple):
    """The same pattern as some Codes, sorted by latent: a sparse transpose."""

    order: Tensor
    rows: Tensor
    counts: Tensor

    @property
    def starts(self) -> Tensor:
        return self.counts.cumsum(0) - self.counts

    def sums(self, values: Tensor, table: Tensor) -> Tensor:
        """(latents, d): for each latent, the sum of values * table[token] over its codes; table (tokens, d)."""
        return embedding_bag(self.rows, table, self.starts, mode="sum", per_sample_weights=values[self.order])

    def totals(self, values: Tensor) -> Tensor:
        """(latents,): for each latent, the sum of values over its codes."""
        return torch.segment_reduce(values[self.order], "sum", lengths=self.counts, unsafe=True)


def _by_latent(codes: Codes, latents: int) -> _ByLatent:
    order = torch.sort(codes.latents, stable=True).indices
    return _ByLatent(order, codes.rows[order], torch.bincount(codes.latents, minlength=latents))


def _backward(centred: Tensor, codes: Codes, residual: Tensor, w: Weights, relu: bool = True) -> Weights:
    """Gradients of a loss whose gradient at z W_dec is `residual` (tokens, d_model); b_dec's through the encoder only."""
    by = _by_latent(codes, len(w.W_enc))
    dp = gather_dot(residual, w.W_dec, codes)
    if relu:
        dp = dp * (codes.values > 0)
    db_enc = by.totals(dp)
    return Weights(by.sums(dp, centred), db_enc, by.sums(codes.values, residual), -(db_enc @ w.W_enc))


def _auxiliary(centred: Tensor, ranked: Tensor, error: Tensor, w: Weights, dead: Tensor, k_aux: int) -> tuple:
    """AuxK: |e - e_hat|^2 (0-d) and its gradients for the dead latents only, e_hat from the k_aux largest of them.

    Few dead latents are cheaper as dense blocks, many as sparse codes: on two cores the costs cross near 4 k_aux.
    """
    few = Weights(w.W_enc[dead], w.b_enc[dead], w.W_dec[dead], w.b_dec)
    k_aux, scale = min(k_aux, len(dead)), 2 / len(centred)
    p = _valued(centred, select(ranked[:, dead], k_aux), few)
    if len(dead) > 4 * k_aux:
        gap = decode(p, few) - w.b_dec - error
        return gap.square().sum(1).mean(), _backward(centred, p, scale * gap, few, relu=False)
    full, mask = (p._replace(values=v).dense(len(dead)) for v in (p.values, torch.ones_like(p.values)))
    gap = full @ few.W_dec - error
    residual = scale * gap
    dp = (residual @ few.W_dec.T) * mask
    db_enc = dp.sum(0)
    return gap.square().sum(1).mean(), Weights(dp.T @ centred, db_enc, full.T @ residual, -(db_enc @ few.W_enc))


def step(
    x: Tensor,
    w: Weights,
    k: int,
    dead: Tensor | None = None,
    alpha: float = 1 / 32,
    k_aux: int | None = None,
    batch_topk: bool = False,
    low: bool = False,
    out: Tensor | None = None,
) -> Step:
    """Loss and gradients of one batch x (tokens, d_model), float32, by hand.

    `dead`: indices of latents to revive by the auxiliary loss, weighted `alpha`; `k_aux` of them a token (d_model / 2 by
    default). `low`: rank latents in bfloat16. `out`: a (tokens, latents) buffer for the pre-codes, used where
    that saves time.
    """
    centred = x - w.b_dec
    ranked = _rank(centred, w, low, out)
    codes = _codes(centred, ranked, w, k, batch_topk)
    x_hat = decode(codes, w)
    gap = x_hat - x
    mse = gap.square().sum(1).mean()
    residual = gap * (2 / len(x))
    gradients = _backward(centred, codes, residual, w)
    gradients.b_dec.add_(residual.sum(0))
    aux = mse.new_zeros(())
    if dead is not None and len(dead) and alpha:
        aux, more = _auxiliary(centred, ranked, -gap, w, dead, k_aux or max(x.shape[1] // 2, 1))
        for name in ("W_enc", "b_enc", "W_dec"):
            getattr(gradients, name).index_add_(0, dead, getattr(more, name), alpha=alpha)
        gradients.b_dec.add_(more.b_dec, alpha=alpha)
    return Step(mse + alpha * aux, mse, aux, gradients, codes, x_hat)


def clip_scale(gradients: Weights, limit: float) -> Tensor:
    """The factor (0-d) that brings the joint length of the gradients to `limit` at most; infinite `limit` gives 1."""
    if math.isinf(limit):
        return gradients.b_dec.new_ones(())
    length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    return (limit / (length + 1e-6)).clamp(max=1.0)


# --- constraints and change of units -----------------------------------------------------------------------------------


def without_radial(gradient: Tensor, W_dec: Tensor) -> Tensor:
    """The gradient (latents, d_model) less its part along each unit row of W_dec, which renormalising would undo."""
    return gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec


def unit_decoder(w: Weights) -> Weights:
    """The same function with decoder rows of length 1: codes are then in the units of x.

    A row of zeros stays, and its encoder becomes zero too, so that it still takes no other latent's place.
    """
    norms = torch.linalg.vector_norm(w.W_dec, dim=1)
    safe = torch.where(norms > 0, norms, torch.ones_like(norms))
    return Weights(w.W_enc * norms[:, None], w.b_enc * norms, w.W_dec / safe[:, None], w.b_dec)


def rescaled(w: Weights, scale: float) -> Weights:
    """Weights for raw x from weights trained on scale * x: the same latents chosen, x_hat back in raw units."""
    unit = unit_decoder(w)
    return Weights(unit.W_enc, unit.b_enc / scale, unit.W_dec, unit.b_dec / scale)
