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
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
ROWS = 512  # tokens whose ranks a CPU computes and picks from at a time: they stay in its cache
GROUP = 16  # latents of which only the largest is looked at first


class Settings(Protocol):
    """The width of an SAE's inputs and how many latents it has; it may also say how they are scaled."""

    d_in: int
    d_sae: int


class Dictionary(Protocol):
    """What is used of an SAE, as sae_lens holds one: rows (n, d_model) to codes (n, latents) and back."""

    @property
    def cfg(self) -> Settings: ...

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    device: torch.device

    def encode(self, x: Tensor) -> Tensor: ...

    def decode(self, codes: Tensor) -> Tensor: ...


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


def pre_codes(x: Tensor, w: Weights, low: bool = False) -> Tensor:
    """p_j |W_dec_j| (tokens, latents): what latents are ranked by; in bfloat16 if `low`."""
    rows, bias = ranker(w, _norms(w), low)
    return product((x - w.b_dec).to(rows.dtype), rows, bias)


def ranker(w: Weights, norms: Tensor, low: bool) -> tuple[Tensor, Tensor]:
    """W_enc and b_enc times the decoder's `norms` (latents,), in bfloat16 if `low`: the product with them ranks latents."""
    dtype = torch.bfloat16 if low else w.W_enc.dtype
    return (w.W_enc * norms[:, None]).to(dtype), (w.b_enc * norms).to(dtype)


def _norms(w: Weights) -> Tensor:
    return torch.linalg.vector_norm(w.W_dec, dim=1)


def product(x: Tensor, rows: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """x rows^T + bias, then ReLU if `relu`: the one dense product of a step.

    On a CPU oneDNN's: in float32 up to twice as fast as torch's default, and ReLU costs nothing.
    """
    if (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and (x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))
    ):
        return torch.ops.mkldnn._linear_pointwise(x, rows, bias, "relu" if relu else "none", [], "")
    out = torch.mm(x, rows.T) if bias is None else torch.addmm(bias, x, rows.T)
    return out.relu_() if relu else out


def _codes(centred: Tensor, w: Weights, norms: Tensor, k: int, batch_topk: bool, low: bool) -> Codes:
    """The chosen codes with their values z, float32 also where ranked in bfloat16.

    A decoder row of zeros has no share in the output: its p counts as 0.
    """
    rows, bias = ranker(w, norms, low)
    cpu = centred.device.type == "cpu"

    def ranks(x: Tensor) -> Tensor:
        p = product(x, rows, bias, relu=low)
        return p.view(torch.int16) if low and cpu else p  # bits of numbers from 0 up order as they do, and faster

    parts = centred.to(rows.dtype).split(ROWS if cpu and not batch_topk else len(centred))
    chosen = _joined([select(ranks(x), k, batch_topk) for x in parts])
    lengths = norms[chosen.latents]
    if low:
        chosen = chosen._replace(values=chosen.values.float())
        p = gather_dot(centred, w.W_enc, chosen) + w.b_enc[chosen.latents]
    else:
        p = chosen.values / lengths
    return chosen._replace(values=p.relu().masked_fill(lengths == 0, 0.0))


def _joined(parts: list[Codes]) -> Codes:
    """The codes of tokens one after another."""
    if len(parts) == 1:
        return parts[0]
    counts = torch.cat([part.offsets.diff() for part in parts])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(torch.cat([part.latents for part in parts]), torch.cat([part.values for part in parts]), offsets)


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
        values, chosen = largest(ranked, k)
        return Codes(chosen.flatten(), values.flatten(), torch.arange(0, tokens * k + 1, k, device=ranked.device))
    wide = min(4 * k, latents)  # a row rarely has more than 4 k of them: if one might, everything is looked at
    values, chosen = largest(ranked, wide)
    best = values.flatten().topk(tokens * k, sorted=False)
    where = best.indices // wide * latents + chosen.flatten()[best.indices]
    if wide < latents and bool((values.amin(1) > best.values.min()).any()):
        where = ranked.flatten().topk(tokens * k, sorted=False).indices
    where = where.sort().values
    counts = torch.bincount(where // latents, minlength=tokens)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(where % latents, ranked.flatten()[where], offsets)


def largest(ranked: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of `ranked` (tokens, latents) and where they stand, (tokens, k) each, in any order.

    As `topk`, in two steps. Columns fall into groups; the k groups with the largest maxima are enough, for these maxima are
    k numbers that nothing elsewhere exceeds.
    """
    tokens, latents = ranked.shape
    groups = latents // GROUP
    if latents % GROUP or groups < 2 * k:
        return ranked.topk(k, dim=1, sorted=False)
    grouped = ranked.view(tokens, GROUP, groups)
    best = _top(grouped.amax(1), k)
    near = grouped.gather(2, best[:, None].expand(-1, GROUP, -1)).flatten(1)
    at = _top(near, k)
    return near.gather(1, at), at // k * groups + best.gather(1, at % k)


def _top(x: Tensor, k: int) -> Tensor:
    """Where the k largest of each row of x (n, m) stand: (n, k).

    Numbers of 16 bits on a CPU go with their columns into 32 bits, which numpy partitions four times as fast as torch's `topk`.
    """
    if x.dtype != torch.int16 or x.device.type != "cpu" or x.shape[1] > 1 << 16:
        return x.topk(k, dim=1, sorted=False).indices
    keys = x.int() << 16 | torch.arange(x.shape[1], dtype=torch.int32)
    return torch.from_numpy(np.partition(keys.numpy(), -k, axis=1)[:, -k:] & 0xFFFF).long()


def encode(x: Tensor, w: Weights, k: int, batch_topk: bool = False, low: bool = False) -> Codes:
    """The codes z of x (tokens, d_model). With `low` latents are ranked in bfloat16; values stay exact in float32."""
    return _codes(x - w.b_dec, w, _norms(w), k, batch_topk, low)


def threshold(x: Tensor, w: Weights, k: int, batch: int = 2048) -> float:
    """The p_j |W_dec_j| above which x (tokens, d_model) has k codes a token on average: a BatchTopK SAE at inference.

    Each token's 4 k largest are looked at. Bussmann et al. average the smallest code of training batches for this.
    """
    kept = min(4 * k, len(w.b_enc))
    found = torch.cat([largest(pre_codes(part, w), kept)[0].flatten() for part in x.split(batch)])
    return max(float(found.sort(descending=True).values[min(k * len(x), len(found)) - 1]), 0.0)


def decode(codes: Codes, w: Weights) -> Tensor:
    """x_hat (tokens, d_model) = z W_dec + b_dec."""
    z = embedding_bag(codes.latents, w.W_dec, codes.offsets[:-1], mode="sum", per_sample_weights=codes.values)
    return z + w.b_dec


# --- backward ----------------------------------------------------------------------------------------------------------


class _ByLatent(NamedTuple):
    """The pattern of some Codes sorted by latent, a sparse transpose: their `order`, the tokens `rows`, codes a latent `counts`."""

    order: Tensor
    rows: Tensor
    counts: Tensor

    def sums(self, values: Tensor, table: Tensor) -> Tensor:
        """(latents, d): for each latent, the sum of values * table[token] over its codes, both so sorted; table (tokens, d)."""
        starts = self.counts.cumsum(0) - self.counts
        return embedding_bag(self.rows, table, starts, mode="sum", per_sample_weights=values)

    def totals(self, values: Tensor) -> Tensor:
        """(latents,): for each latent, the sum of sorted values over its codes."""
        return torch.segment_reduce(values, "sum", lengths=self.counts, unsafe=True)


def _by_latent(codes: Codes, latents: int) -> _ByLatent:
    order = torch.sort(codes.latents.int(), stable=True).indices
    return _ByLatent(order, codes.rows[order], torch.bincount(codes.latents, minlength=latents))


def _backward(centred: Tensor, codes: Codes, residual: Tensor, w: Weights, relu: bool = True) -> Weights:
    """Gradients of a loss whose gradient at z W_dec is `residual` (tokens, d_model); b_dec's through the encoder only."""
    by = _by_latent(codes, len(w.W_enc))
    dp = gather_dot(residual, w.W_dec, codes)[by.order]
    z = codes.values[by.order]
    if relu:
        dp *= z > 0
    db_enc = by.totals(dp)
    return Weights(by.sums(dp, centred), db_enc, by.sums(z, residual), -(db_enc @ w.W_enc))


def _auxiliary(centred: Tensor, error: Tensor, w: Weights, norms: Tensor, dead: Tensor, k_aux: int) -> tuple:
    """AuxK: |e - e_hat|^2 (0-d) and its gradients for the dead latents only, e_hat from the k_aux largest of them.

    Few dead latents are cheaper as dense blocks, many as sparse codes: on two cores the costs cross near 4 k_aux.
    """
    few, norms = Weights(w.W_enc[dead], w.b_enc[dead], w.W_dec[dead], w.b_dec), norms[dead]
    k_aux, scale = min(k_aux, len(dead)), 2 / len(centred)
    full = product(centred, few.W_enc, few.b_enc).mul_(norms > 0)
    mask = (norms > 0).to(full).expand_as(full)
    if len(dead) > 4 * k_aux:
        chosen = select(full * norms, k_aux)
        p = chosen._replace(values=full[chosen.rows, chosen.latents])
        gap = decode(p, few) - w.b_dec - error
        return gap.square().sum(1).mean(), _backward(centred, p, scale * gap, few, relu=False)
    if len(dead) > k_aux:
        mask = torch.zeros_like(full).scatter_(1, largest(full * norms, k_aux)[1], 1.0)
        full *= mask
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
) -> Step:
    """Loss and gradients of one batch x (tokens, d_model), float32, by hand.

    `dead`: indices of latents to revive by the auxiliary loss, weighted `alpha`; `k_aux` of them a token (d_model / 2 by
    default). `low`: rank latents in bfloat16.
    """
    centred, norms = x - w.b_dec, _norms(w)
    codes = _codes(centred, w, norms, k, batch_topk, low)
    x_hat = decode(codes, w)
    gap = x_hat - x
    mse = gap.square().sum(1).mean()
    residual = gap * (2 / len(x))
    gradients = _backward(centred, codes, residual, w)
    gradients.b_dec.add_(residual.sum(0))
    aux = mse.new_zeros(())
    if dead is not None and len(dead) and alpha:
        aux, more = _auxiliary(centred, -gap, w, norms, dead, k_aux or max(x.shape[1] // 2, 1))
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
