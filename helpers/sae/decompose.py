"""A vector written in a dictionary's latents, by every method that is in use, at a chosen number of latents.

Pure: vectors (n, d_model) and an SAE as sae_lens holds one (`encode`, `decode`, `W_enc`, `W_dec`), or just its rows. Nothing of
models, text or files. Each method returns a Decomposition; what is summed to many is in float64, on the CPU where a device
has none. The encoder's methods (encode, minus the zero vector's code, with and without the vector) answer what the SAE says
of it; the others ask which sparse sum of rows comes closest, whatever an encoder says: orthogonal matching pursuit (Pati et al.
1993) and gradient pursuit (Blumensath & Davies 2008; without sign as in Smith 2024, "Inference-time optimisation").
"""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from helpers import stats, store
from helpers.sae.topk import Dictionary


class Decomposition(NamedTuple):
    """Vectors in a dictionary: `codes` (n, latents) and `reconstruction` (n, d_model), float32 on the CPU; and, each (n,)
    float64, `cosine` of the reconstruction with the vector (0 if either is zero), `error` = |v - reconstruction| / |v| (NaN for
    v = 0) and `l0`; `seconds` for all n together."""

    codes: Tensor
    reconstruction: Tensor
    cosine: np.ndarray
    error: np.ndarray
    l0: np.ndarray
    seconds: float


def _finish(vectors: Tensor, codes: Tensor, reconstruction: Tensor, began: float) -> Decomposition:
    codes, reconstruction = codes.detach().float().cpu(), reconstruction.detach().float().cpu()
    seconds = time.perf_counter() - began  # after the copy: a GPU answers late
    v, r = vectors.double().cpu().numpy(), reconstruction.double().numpy()
    norm = np.linalg.norm(v, axis=1)
    error = np.divide(np.linalg.norm(v - r, axis=1), norm, out=np.full(len(v), np.nan), where=norm > 0)
    return Decomposition(
        codes, reconstruction, stats.cosine(v, r), error, (codes != 0).sum(1).double().numpy(), seconds
    )


def joined(parts: Sequence[Decomposition]) -> Decomposition:
    """One Decomposition of all the vectors of `parts`, in order."""
    return Decomposition(
        torch.cat([p.codes for p in parts]),
        torch.cat([p.reconstruction for p in parts]),
        np.concatenate([p.cosine for p in parts]),
        np.concatenate([p.error for p in parts]),
        np.concatenate([p.l0 for p in parts]),
        sum(p.seconds for p in parts),
    )


def rows_of(sae: Dictionary) -> Tensor:
    """The rows (latents, d_model) with which an SAE's codes make up its reconstruction: decode(z) = z rows + b_dec.

    ValueError for an SAE that rescales its output by what it was last given: its decoder is not linear.
    """
    way = getattr(sae.cfg, "normalize_activations", None)
    if way in ("constant_norm_rescale", "layer_norm"):
        raise ValueError(
            f"this SAE normalises its inputs as it runs ({way}), so codes of two inputs cannot be subtracted: take one without, or "
            "fold the scale into its weights"
        )
    rows = sae.W_dec.detach()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):  # its codes are in units of the output already
        rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return rows


def check_vectors(vectors: Tensor, d_model: int) -> Tensor:
    """`vectors` (n, d_model) without their gradient; ValueError that says what is wrong with their shape or values."""
    if vectors.ndim != 2 or vectors.shape[1] != d_model or not len(vectors):
        raise ValueError(
            f"vectors of shape {tuple(vectors.shape)} were given; the dictionary wants (n, {d_model}), n of 1 or more"
        )
    if not bool(torch.isfinite(vectors).all()):
        raise ValueError("a vector holds NaN or infinity; look at the differences it was made from")
    return vectors.detach()


def keep_largest(codes: Tensor, rows: Tensor, k: int) -> Tensor:
    """The codes (n, latents) with all but the k of largest |code| |row| in each line set to zero; all are kept for k = 0."""
    if not k or k >= codes.shape[1]:
        return codes
    chosen = (codes.abs() * rows.norm(dim=1)).topk(k, dim=1).indices
    return torch.zeros_like(codes).scatter(1, chosen, codes.gather(1, chosen))


# --- what the encoder says ---------------------------------------------------------------------------------------------


def codes_of(sae: Dictionary, rows: Tensor, batch: int = 1024) -> Tensor:
    """The SAE's codes (n, latents) float32 of rows (n, d_model), on its own device, `batch` rows at a time."""
    with torch.no_grad():
        return torch.cat([sae.encode(part.float().to(sae.device)).float() for part in rows.split(batch)])


def centred(sae: Dictionary) -> bool:
    """Whether the SAE takes its decoder's bias off its input before it encodes."""
    return bool(getattr(sae.cfg, "apply_b_dec_to_input", True))


def pre_codes(sae: Dictionary, rows: Tensor) -> Tensor:
    """What the encoder gives before it chooses: (x - b_dec) W_enc + b_enc, (n, latents) float32, of rows (n, d_model).

    ValueError for a gated SAE, which has two of it.
    """
    if sae.b_enc is None:
        raise ValueError("this SAE gates its codes by a second encoder, and has no one value before them")
    with torch.no_grad():
        x = rows.float().to(sae.device) - sae.b_dec * centred(sae)
        return (x @ sae.W_enc + sae.b_enc).float()


def encode(sae: Dictionary, vectors: Tensor, k: int = 0) -> Decomposition:
    """decode(encode(v)): the vector taken for an activation. The k largest codes; 0: all the SAE gives."""
    v, began = check_vectors(vectors, sae.cfg.d_in), time.perf_counter()
    codes = keep_largest(codes_of(sae, v), rows_of(sae), k)
    return _finish(v, codes, sae.decode(codes), began)


def encode_unbounded(sae: Dictionary, vectors: Tensor) -> Decomposition:
    """The vector with every latent whose pre-activation is above zero, whatever the SAE's own rule (TopK, a threshold) would keep.

    A mistake, made on purpose: what source 000 measures, and how thousands of latents of a TopK SAE can be "active".
    """
    v, began = check_vectors(vectors, sae.cfg.d_in), time.perf_counter()
    codes = pre_codes(sae, v).relu()
    return _finish(v, codes, codes @ sae.W_dec + sae.b_dec, began)


def encode_less_zero(sae: Dictionary, vectors: Tensor, k: int = 0) -> Decomposition:
    """(encode(v) - encode(0)) W_dec: what the vector adds to the code of nothing. The k largest; 0: all."""
    v, began = check_vectors(vectors, sae.cfg.d_in), time.perf_counter()
    rows = rows_of(sae)
    codes = keep_largest(codes_of(sae, v) - codes_of(sae, torch.zeros(1, sae.cfg.d_in)), rows, k)
    return _finish(v, codes, codes @ rows, began)


def encode_centred(sae: Dictionary, vectors: Tensor, k: int = 0) -> Decomposition:
    """decode(encode(v + b_dec)) - b_dec: v seen from where activations have their centre. The k largest codes; 0: all."""
    v, rows, began = check_vectors(vectors, sae.cfg.d_in), rows_of(sae), time.perf_counter()
    codes = keep_largest(codes_of(sae, v.float().to(sae.device) + sae.b_dec.detach()), rows, k)
    return _finish(v, codes, codes @ rows, began)


def without_bias(sae: Dictionary) -> Dictionary:
    """The same SAE with its encoder's bias set to zero; the weights are shared, and the SAE given stays as it is."""
    twin = copy.deepcopy(sae, {id(w): w for w in (sae.W_enc, sae.W_dec)})
    with torch.no_grad():
        for name in ("b_enc", "b_gate", "b_mag"):  # the last two are a gated SAE's
            if getattr(twin, name, None) is not None:
                getattr(twin, name).zero_()
    return twin


def encode_without_bias(sae: Dictionary, vectors: Tensor, k: int = 0) -> Decomposition:
    """The SAE's rule for what is on, applied to v W_enc alone: neither bias has a say. The k largest codes; 0: all."""
    v, rows, began = check_vectors(vectors, sae.cfg.d_in), rows_of(sae), time.perf_counter()
    x = v.float().to(sae.device) + sae.b_dec.detach() * centred(sae)  # which the SAE takes off again
    codes = keep_largest(codes_of(without_bias(sae), x), rows, k)
    return _finish(v, codes, codes @ rows, began)


def encode_shift(sae: Dictionary, vectors: Tensor, acts: Tensor, k: int = 0) -> Decomposition:
    """mean over `acts` (m, d_model) of (encode(a + v) - encode(a)) W_dec: what the vector changes in real activations.

    Codes may be negative: a latent that was active and goes out. The k largest of the mean; 0: all.
    """
    v, rows, began = check_vectors(vectors, sae.cfg.d_in), rows_of(sae), time.perf_counter()
    before = codes_of(sae, acts).mean(0)
    codes = torch.stack([codes_of(sae, acts + one.to(acts.dtype)).mean(0) for one in v]) - before
    codes = keep_largest(codes, rows, k)
    return _finish(v, codes, codes @ rows, began)


def encode_pairs(sae: Dictionary, pos: Tensor, neg: Tensor, k: int = 0) -> Decomposition:
    """mean over pairs of (encode(pos) - encode(neg)) W_dec, for the one vector mean(pos - neg); pos and neg (pairs, d_model).

    Needs the pairs the vector was made from, and no strength. The k largest of the mean; 0: all.
    """
    v, began = check_vectors((pos - neg).double().mean(0)[None], sae.cfg.d_in), time.perf_counter()
    rows = rows_of(sae)
    codes = keep_largest((codes_of(sae, pos) - codes_of(sae, neg)).mean(0)[None], rows, k)
    return _finish(v, codes, codes @ rows, began)


def readings(sae: Dictionary, vectors: Tensor, acts: Tensor) -> dict[str, Tensor]:
    """The codes (n, latents) of vectors (n, d_model) by the three ways that need no pairs: taken for an activation, less the code
    of nothing, and by what they change in real activations `acts` (m, d_model)."""
    return {
        "encode(v)": encode(sae, vectors).codes,
        "encode(v) less zero": encode_less_zero(sae, vectors).codes,
        "steered - unsteered": encode_shift(sae, vectors, acts).codes,
    }


def raised(sae: Dictionary, acts: Tensor, latent: int, amount: float) -> Tensor:
    """mean over `acts` (m, d_model) of decode(encode(a) + amount on one latent) + the SAE's error - a: (d_model,) float64.

    How source 001 makes "a feature's own vector". It is amount * rows[latent], whatever the activations (algebra).
    """
    with torch.no_grad():
        codes = codes_of(sae, acts)
        error = acts.float() - sae.decode(codes).float().cpu()
        codes[:, latent] += amount
        return (sae.decode(codes).float().cpu() + error - acts.float()).double().mean(0)


def raised_as_rows(sae: Dictionary, acts: Tensor, latents: Sequence[int], amount: float) -> np.ndarray:
    """Cosine (latents,) of `raised` with the latent's decoder row, for each of `latents`."""
    made = torch.stack([raised(sae, acts, latent, amount) for latent in latents])
    return stats.cosine(made.numpy(), sae.W_dec[list(latents)].detach().double().cpu().numpy())


# --- which sparse sum comes closest ------------------------------------------------------------------------------------


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (latents, d_model) in float32 with length 1, and their lengths; a row of zeros stays one.

    On the CPU if their device has no float64 (mps).
    """
    rows = rows.detach().float()
    rows = rows.cpu() if rows.device.type == "mps" else rows
    norms = rows.norm(dim=1)
    return rows / norms.clamp_min(1e-12)[:, None], norms


def _in_units(codes: Tensor, norms: Tensor) -> Tensor:
    """Codes of unit rows as codes of rows that long; a row of zeros has none."""
    return torch.where(norms > 0, codes / norms.clamp_min(1e-12), torch.zeros_like(codes))


def pursuit(rows: Tensor, vectors: Tensor, k: int, update: str = "orthogonal", signed: bool = True) -> Decomposition:
    """Greedy: k times the row of `rows` (latents, d_model) most aligned with what is left joins, and the codes are updated.

    `update`: orthogonal, least squares on the rows chosen (OMP; equal to sklearn's); gradient, one optimal step along the
    gradient on them; matching, only the newest code (equal to sae_lens's MatchingPursuitSAE where `signed` is False).
    Not `signed`: only rows at a positive angle are chosen and codes are clipped at zero; not for orthogonal. A vector that
    is used up, or to which no row is left, stops early. All vectors at once.
    """
    if update not in ("orthogonal", "gradient", "matching"):
        raise ValueError(f"update = {update!r} given; it is orthogonal, gradient or matching")
    if update == "orthogonal" and not signed:
        raise ValueError("least squares has a sign: take update='gradient' for codes without one")
    v, began = check_vectors(vectors, rows.shape[1]), time.perf_counter()
    unit, norms = unit_rows(rows)
    parts = _in_parts(v, unit, k)
    if update == "matching":
        codes = torch.cat([_matching(unit, part, k, signed) for part in parts])
    else:
        codes = torch.cat([_greedy(unit, part, [k], update == "orthogonal", signed)[0] for part in parts])
    return _finish(v, _in_units(codes, norms), codes @ unit, began)


def pursuit_path(
    rows: Tensor, vectors: Tensor, sizes: Sequence[int], update: str = "orthogonal", signed: bool = True
) -> Tensor:
    """What orthogonal or gradient `pursuit` makes of `vectors` (n, d_model) with each of `sizes` latents, from one run: (sizes, n,
    d_model) float32. ValueError as there."""
    v, (unit, _) = check_vectors(vectors, rows.shape[1]), unit_rows(rows)
    parts = _in_parts(v, unit, max(sizes))
    made = [_greedy(unit, part, sizes, update == "orthogonal", signed)[1] for part in parts]
    return torch.cat(made, 1).float().cpu()


def _in_parts(vectors: Tensor, unit: Tensor, k: int) -> tuple[Tensor, ...]:
    """`vectors` (n, d_model) float64, so few at a time that k rows chosen for each take 0.8 GB."""
    if not 1 <= k <= len(unit):
        raise ValueError(f"k = {k} given; it must lie between 1 and the {len(unit)} rows of the dictionary")
    return vectors.to(unit.device).double().split(max(1, 10**8 // (k * unit.shape[1])))


def _matching(unit: Tensor, left: Tensor, k: int, signed: bool) -> Tensor:
    """Matching pursuit of `left` (n, d_model) float64 in unit rows: codes (n, latents)."""
    codes = torch.zeros(len(left), len(unit), device=unit.device)
    for _ in range(k):
        aligned = left.float() @ unit.T
        new = (aligned.abs() if signed else aligned).argmax(1)
        rows = unit[new].double()
        step = (left * rows).sum(1, keepdim=True)
        step = step if signed else step.clamp_min(0.0)
        codes.scatter_add_(1, new[:, None], step.float())
        left = left - step * rows
    return codes


def _greedy(
    unit: Tensor, target: Tensor, sizes: Sequence[int], orthogonal: bool, signed: bool
) -> tuple[Tensor, Tensor]:
    """Orthogonal or gradient pursuit of `target` (n, d_model) float64 in unit rows: codes (n, latents) with the largest of `sizes`
    latents, and what each of `sizes` makes of it (sizes, n, d_model)."""
    n, k, left = len(target), max(sizes), target
    made = target.new_zeros(len(sizes), *target.shape)
    atoms, wanted = target.new_zeros(n, k, target.shape[1]), target.new_zeros(n, k)  # rows chosen, and target on them
    chosen, values = torch.zeros(n, k, dtype=torch.long, device=unit.device), target.new_zeros(n, k)
    taken = torch.zeros(n, len(unit), dtype=torch.bool, device=unit.device)
    factor = target.new_zeros(n, k, k)  # Cholesky factor of the Gram matrix of the rows chosen
    enough = 1e-6 * target.norm(dim=1)
    for t in range(k):
        aligned = left.float() @ unit.T
        best = (aligned.abs() if signed else aligned).masked_fill_(taken, -1.0).max(dim=1)
        going = (left.norm(dim=1) > enough) & (best.values > 0)  # what stops here keeps its codes
        if not bool(going.any()):
            made[[size > t for size in sizes]] = target - left
            break
        chosen[:, t] = best.indices
        taken.scatter_(1, best.indices[:, None], True)
        atoms[:, t] = unit[best.indices].double() * going[:, None]
        here = atoms[:, : t + 1]
        if orthogonal:
            wanted[:, t] = (atoms[:, t] * target).sum(1)
            now = _least_squares(factor, here, wanted[:, : t + 1], going)
        else:
            slope = torch.einsum("ntd,nd->nt", here, left)
            image = torch.einsum("nt,ntd->nd", slope, here)
            length = slope.square().sum(1, keepdim=True) / image.square().sum(1, keepdim=True).clamp_min(1e-30)
            now = values[:, : t + 1] + length * slope
            now = now if signed else now.clamp_min(0.0)
        values[:, : t + 1] = torch.where(going[:, None], now, values[:, : t + 1])
        left = torch.where(going[:, None], target - torch.einsum("nt,ntd->nd", values[:, : t + 1], here), left)
        made[[size == t + 1 for size in sizes]] = target - left
    return torch.zeros(n, len(unit), device=unit.device).scatter_add_(1, chosen, values.float()), made


def _least_squares(factor: Tensor, atoms: Tensor, wanted: Tensor, going: Tensor) -> Tensor:
    """Codes (n, t) on unit `atoms` (n, t, d_model) of what has the inner products `wanted` (n, t) with them; `factor` (n, k, k) is
    extended by the newest atom in place."""
    t = atoms.shape[1] - 1
    cross = torch.einsum("ntd,nd->nt", atoms[:, :t], atoms[:, t])
    side = torch.linalg.solve_triangular(factor[:, :t, :t], cross[..., None], upper=False)[..., 0]
    factor[:, t, :t] = side * going[:, None]
    factor[:, t, t] = torch.where(going, (1 - side.square().sum(1)).clamp_min(1e-12).sqrt(), 1.0)
    return torch.cholesky_solve(wanted[..., None], factor[:, : t + 1, : t + 1])[..., 0]


# name -> (sae, vectors, k, acts) -> Decomposition; the first five are what the SAE's encoder says; what takes
# long is kept on disk
METHODS: dict[str, Callable[[Dictionary, Tensor, int, Tensor], Decomposition]] = {
    "encode": lambda sae, v, k, acts: encode(sae, v, k),
    "encode less zero": lambda sae, v, k, acts: encode_less_zero(sae, v, k),
    "encode(v + b_dec)": lambda sae, v, k, acts: encode_centred(sae, v, k),
    "encode without bias": lambda sae, v, k, acts: encode_without_bias(sae, v, k),
    "with and without v": lambda sae, v, k, acts: store.kept(encode_shift, sae, v, acts, k),
    "unsigned pursuit": lambda sae, v, k, acts: store.kept(pursuit, rows_of(sae), v, k, "gradient", signed=False),
    "signed pursuit": lambda sae, v, k, acts: store.kept(pursuit, rows_of(sae), v, k),
}
ENCODE, SHIFT, UNSIGNED, PURSUIT = "encode", "with and without v", "unsigned pursuit", "signed pursuit"
WHOLE, PAIRS = f"{SHIFT}, all latents", "codes of the pairs"
PATHS = {UNSIGNED: ("gradient", False), PURSUIT: ("orthogonal", True)}


def at_sizes(method: str, sae: Dictionary, vectors: Tensor, sizes: Sequence[int], acts: Tensor) -> Tensor:
    """What a method of METHODS makes of `vectors` (..., d_model) with each of `sizes` latents, from one run: (sizes, ..., d_model)
    float32. Size 0, all that the method gives, is for what the encoder says."""
    rows, v = rows_of(sae), vectors.flatten(0, -2)
    if method in PATHS:
        update, signed = PATHS[method]
        made = store.kept(pursuit_path, rows, v, list(sizes), update, signed)
    else:
        codes = METHODS[method](sae, v, 0, acts).codes.to(rows.device)
        few = [keep_largest(codes, rows, k) for k in sizes]
        with torch.no_grad():
            made = torch.stack([sae.decode(z) if method == ENCODE else z @ rows for z in few])
    return made.float().cpu().reshape(len(sizes), *vectors.shape)


def written(
    sae: Dictionary, vectors: Tensor, halves: Sequence[tuple[Tensor, Tensor]], k: int, acts: Tensor
) -> dict[str, Tensor]:
    """What every way makes of `vectors` (n, d_model) with k latents, each (n, d_model): those of METHODS, PAIRS, out of the `halves`
    (pos, neg) that each vector was made of, and WHOLE, which has no limit."""
    made = {m: at_sizes(m, sae, vectors, [k], acts)[0] for m in METHODS}
    made[PAIRS] = of_pairs(sae, halves, k).reconstruction
    return made | {WHOLE: at_sizes(SHIFT, sae, vectors, [0], acts)[0]}


def of_pairs(sae: Dictionary, halves: Sequence[tuple[Tensor, Tensor]], k: int) -> Decomposition:
    """`encode_pairs` for several vectors, each made of its own (pos, neg)."""
    return joined([encode_pairs(sae, pos, neg, k) for pos, neg in halves])


def sign_gain(rows: Tensor, vectors: Tensor, k: int) -> np.ndarray:
    """What codes of either sign add to the cosine of a gradient pursuit with k of `rows`: (n,), for vectors (n, d_model)."""
    signed, unsigned = (pursuit(rows, vectors, k, "gradient", signed=sign).cosine for sign in (True, False))
    return signed - unsigned


# --- what of it is the zero vector's -----------------------------------------------------------------------------------


def overlap(codes: Tensor, other: Tensor, k: int) -> np.ndarray:
    """Share (n,) of the k largest |codes| (n, latents) that are also among the k largest of `other` (latents,) or (n, latents).

    Latents with code zero do not count; 0 for a line without any.
    """

    def largest(c: Tensor) -> Tensor:
        top = c.abs().topk(min(k, c.shape[1]), dim=1)
        return torch.zeros(c.shape, dtype=torch.bool, device=c.device).scatter(1, top.indices, top.values > 0)

    mine, theirs = largest(codes), largest(other.expand_as(codes))
    return ((mine & theirs).sum(1) / mine.sum(1).clamp_min(1)).double().cpu().numpy()


def zero(sae: Dictionary) -> Decomposition:
    """decode(encode(0)), of which every SAE has an opinion: its biases'."""
    return encode(sae, torch.zeros(1, sae.cfg.d_in))


def shared_with_zero(sae: Dictionary, vectors: Tensor, k: int) -> np.ndarray:
    """Share (n,) of the k largest codes of each vector (n, d_model) that the zero vector has among its k largest too."""
    return overlap(encode(sae, vectors).codes, zero(sae).codes, k)


def error_over_zero(sae: Dictionary, vectors: Tensor) -> np.ndarray:
    """|v - decode(encode(v))| over |v - decode(encode(0))|, (n,): 1 where encoding v is no better than encoding nothing."""
    from_zero = (vectors - zero(sae).reconstruction).norm(dim=1) / vectors.norm(dim=1)
    return encode(sae, vectors).error / from_zero.double().cpu().numpy()


class Errors(NamedTuple):
    """Relative errors of decode(encode(v)) over 1/|v|, each (lengths, n): `inverse` = 1/|v|, `error` =
    |v - decode(encode(v))| / |v|, and what it would be if v were not seen, `from_zero` = |decode(encode(0))| / |v|."""

    inverse: np.ndarray
    error: np.ndarray
    from_zero: np.ndarray


def errors(sae: Dictionary, vectors: Tensor, lengths: Sequence[float] = ()) -> Errors:
    """The error of vectors (n, d_model) at each of `lengths`, or, where none is given, as long as they are."""
    norm = vectors.double().norm(dim=1)
    wanted = torch.tensor(lengths, dtype=torch.float64)[:, None].expand(-1, len(norm)) if len(lengths) else norm[None]
    scaled = vectors.double() / norm[:, None] * wanted[..., None]
    error = encode(sae, scaled.flatten(0, 1)).error.reshape(wanted.shape)
    inverse = 1 / wanted.numpy()
    return Errors(inverse, error, float(zero(sae).reconstruction.norm()) * inverse)


class Twice(NamedTuple):
    """Which latents change when what decode(encode(v)) gives is encoded again: those that `appear`, `vanish` and
    `stay`, the largest first. `shared`: the share of random vectors with the same change, mean over those that appear
    or vanish (1 where none does); `null` (draws,): the same for each random vector among the others; `rare`: those that
    few of them share, 1 in 20 or less."""

    appear: list[int]
    vanish: list[int]
    stay: list[int]
    shared: float
    null: np.ndarray
    rare: list[int]


def twice(sae: Dictionary, vector: Tensor, random: Tensor) -> Twice:
    """The latents that differ between encode(v) and encode(decode(encode(v))), v being (d_model,), and how many of
    `random` vectors (draws, d_model), two or more and as long as v, see the same. A clue about v would be a change that
    few of them see."""
    if len(random) < 2:
        raise ValueError(f"{len(random)} random vectors were given; two or more are wanted")
    rows = check_vectors(torch.cat([vector[None].double().cpu(), random.double().cpu()]), sae.cfg.d_in)
    once = encode(sae, rows)
    again = codes_of(sae, once.reconstruction).cpu()
    change = (again > 0).int() - (once.codes > 0).int()  # 1: appears, -1: vanishes
    draws = len(random)
    seen = torch.where(
        change > 0, (change[1:] > 0).sum(0), (change[1:] < 0).sum(0)
    ).double()  # as often among the random
    own, moved = seen[0], change != 0
    others = torch.cat([own[None] / draws, (seen[1:] - 1) / (draws - 1)])
    shared = (others * moved).sum(1) / moved.sum(1).clamp_min(1) + (~moved.any(1)).double()

    def largest(mask: Tensor, codes: Tensor) -> list[int]:
        return [int(i) for i in codes.argsort(descending=True) if mask[i]]

    size = torch.maximum(again[0], once.codes[0])
    return Twice(
        largest(change[0] > 0, again[0]),
        largest(change[0] < 0, once.codes[0]),
        largest((change[0] == 0) & (again[0] > 0), size),
        float(shared[0]),
        shared[1:].numpy(),
        largest(moved[0] & (own <= draws / 20), size),
    )


def twice_as_zero(sae: Dictionary, vectors: Tensor) -> np.ndarray:
    """Cosine (n,) of what decoding and encoding twice makes of each vector (n, d_model) with what it makes of zero."""
    both = torch.cat([torch.zeros(1, sae.cfg.d_in), vectors.float().cpu()])
    again = encode(sae, encode(sae, both).reconstruction).reconstruction.numpy()
    return stats.cosine(again[1:], again[:1])


def code_cosine(sae: Dictionary, latent: int, rows: np.ndarray) -> float:
    """Cosine of the code of the mean of `rows` (n, d_model) with one latent; 0 if nothing is on."""
    code = encode(sae, torch.from_numpy(rows).mean(0, keepdim=True)).codes[0]
    return float(code[latent] / code.norm().clamp_min(1e-12))


def code_cosines(sae: Dictionary, latent: int, rows: np.ndarray, of_mean: bool) -> stats.Interval:
    """`code_cosine` over pairs whose differences are `rows` (pairs, d_model): of the code of their mean, or the mean of their codes'."""
    score = partial(code_cosine, sae, latent)
    return stats.over(rows, score) if of_mean else stats.over([score(row[None]) for row in rows])


# --- how much of the steering is left ----------------------------------------------------------------------------------


class Steering(NamedTuple):
    """What some vectors do, and how much of it is left in what stands for them: `vectors` (behaviours, d_model), the `gradient`
    (behaviours, d_model) of each behaviour's log-odds (the mean over items of `scoring.linear_response`), and the `length` to
    which all that is added is brought."""

    vectors: Tensor
    gradient: np.ndarray
    length: float

    def response(self, made: Tensor) -> np.ndarray:
        """Change of the mean log-odds, in nats and by gradient, that `made` (..., behaviours, d_model) gives at that length: (...,
        behaviours). A vector of zeros gives none."""
        v = np.asarray(made, np.float64)
        norm = np.linalg.norm(v, axis=-1, keepdims=True)
        unit = np.divide(v, norm, out=np.zeros_like(v), where=norm > 0)
        return np.einsum("...d,...d->...", unit, self.gradient) * self.length

    @property
    def own(self) -> np.ndarray:
        """The response to the vectors themselves (behaviours,)."""
        return self.response(self.vectors)

    def left(self, made: Tensor) -> np.ndarray:
        """The share of their steering that is left in `made` (..., behaviours, d_model), each in place of its vector: (...,). 1: all
        of it; 0: none; negative: it steers the wrong way."""
        return retained(self.response(made), self.own)

    def kept(self, made: Tensor) -> stats.Interval | None:
        """The same with its interval, of `made` (behaviours, d_model) or (SAEs, behaviours, d_model): see `retention`."""
        return retention(self.response(made), self.own)


def retained(steered: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Steering retained, (...): the responses `steered` (..., behaviours) of reconstructions, summed over behaviours, over
    those of the vectors, `own` (behaviours,). 1: all of it; 0: none; negative: it steers the wrong way."""
    return np.asarray(steered, np.float64).sum(-1) / np.sum(own, dtype=np.float64)


def retention(steered: np.ndarray, own: np.ndarray) -> stats.Interval | None:
    """`retained` with its interval over behaviours and, where `steered` is (SAEs, behaviours), over SAEs as well; None where the
    responses to the vectors, summed, are not clear of zero: there is nothing to divide by."""
    several, below = np.atleast_2d(np.asarray(steered, np.float64)), np.asarray(own, np.float64)
    found = stats.ratio_if_clear(several.mean(0), below)
    if found is None or len(several) == 1:
        return found
    units = np.concatenate([below[None], several]).T  # (behaviours, 1 + SAEs)
    return stats.over(units, lambda part: retained(part[:, 1:].T, part[:, 0]))


def at_equal_kl(responses: np.ndarray, kl: np.ndarray) -> np.ndarray:
    """Responses (..., behaviours) of one length, over the root of their KL: those of one KL, up to a factor.

    A small vector's response grows with its length and its KL with the square. 0 where there is no KL.
    """
    price = np.broadcast_to(np.asarray(kl, np.float64), np.shape(responses))
    return np.divide(responses, np.sqrt(price), out=np.zeros(price.shape), where=price > 0)
