"""The hand-written TopK step against plain autograd, against SAELens, and against itself in other forms."""

import math

import pytest
import torch

from helpers.sae import topk
from helpers.sae.topk import Weights


def problem(d=48, latents=200, tokens=300, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = topk.initial(d, latents, 0.1 * torch.randn(d, generator=g))
    noise = 0.05 * torch.randn(latents, d, generator=g)
    lengths = torch.rand(latents, 1, generator=g) + 0.5
    w = Weights(1.3 * w.W_enc + noise, 0.1 * torch.randn(latents, generator=g), w.W_dec * lengths, w.b_dec)
    return torch.randn(tokens, d, generator=g).to(dtype), Weights(*(t.to(dtype) for t in w))


def autograd(x, w, k, dead=None, alpha=1 / 32, k_aux=None, batch_topk=False):
    """The plain twin: everything dense, gradients by autograd."""
    w = Weights(*(t.clone().requires_grad_() for t in w))
    p = (x - w.b_dec) @ w.W_enc.T + w.b_enc
    ranked = p * w.W_dec.norm(dim=1)
    if batch_topk:
        chosen = torch.zeros(p.numel(), dtype=torch.bool)
        chosen[ranked.flatten().topk(k * len(x)).indices] = True
        z = torch.where(chosen.view_as(p), p.relu(), torch.zeros(()))
    else:
        index = ranked.topk(k, dim=1).indices
        z = torch.zeros_like(p).scatter(1, index, p.gather(1, index).relu())
    x_hat = z @ w.W_dec + w.b_dec
    mse, aux = (x - x_hat).square().sum(1).mean(), torch.zeros(())
    if dead is not None:
        error, few = (x - x_hat).detach(), p[:, dead]
        index = (ranked[:, dead]).topk(min(k_aux, len(dead)), dim=1).indices
        z_aux = torch.zeros_like(few).scatter(1, index, few.gather(1, index))
        aux = (z_aux @ w.W_dec[dead] - error).square().sum(1).mean()
    (mse + alpha * aux).backward()
    return (mse + alpha * aux).detach(), Weights(*(t.grad for t in w))


def close(a, b, tolerance=1e-5):
    return all(float((x - y).abs().max() / y.abs().max()) < tolerance for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("batch_topk", [False, True])
@pytest.mark.parametrize(
    ("dead", "k_aux"), [(None, None), (range(0, 60, 2), 10), (range(0, 180, 2), 5), (range(3), 50)]
)
def test_the_step_equals_autograd(dead, k_aux, batch_topk):
    x, w = problem()
    dead = None if dead is None else torch.tensor(list(dead))
    with torch.enable_grad():
        loss, gradients = autograd(x, w, 8, dead, k_aux=k_aux, batch_topk=batch_topk)
    done = topk.step(x, w, 8, dead, k_aux=k_aux, batch_topk=batch_topk)
    assert abs(float(done.loss - loss)) < 1e-5 * float(loss)
    assert close(done.gradients, gradients)
    if dead is not None:
        assert float(done.aux) > 0
        without = topk.step(x, w, 8, None)
        assert not close(done.gradients, without.gradients)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_step_equals_autograd_on_cuda():
    x, w = problem()
    x, w = x.cuda(), Weights(*(t.cuda() for t in w))
    dead = torch.arange(0, 60, 2, device="cuda")
    with torch.enable_grad():
        loss, gradients = autograd(x, w, 8, dead, k_aux=10)
    done = topk.step(x, w, 8, dead, k_aux=10)
    assert abs(float(done.loss - loss)) < 1e-5 * float(loss) and close(done.gradients, gradients)


def safe_autograd(x, w, k, dead, k_aux, alpha=1 / 32):
    """The plain twin with codes divided by |W_dec_j|, or by 1 where that is 0."""
    w = Weights(*(t.clone().requires_grad_() for t in w))
    norms = w.W_dec.norm(dim=1)
    safe = torch.where(norms > 0, norms, torch.ones(()))
    ranked = ((x - w.b_dec) @ w.W_enc.T + w.b_enc) * norms

    def best(of, k):
        index = of.topk(k, dim=1).indices
        return torch.zeros_like(of).scatter(1, index, of.gather(1, index))

    x_hat = best(ranked, k).relu() / safe @ w.W_dec + w.b_dec
    error = (x - x_hat).detach()
    e_hat = best(ranked[:, dead], k_aux) / safe[dead] @ w.W_dec[dead]
    loss = (x - x_hat).square().sum(1).mean() + alpha * (e_hat - error).square().sum(1).mean()
    loss.backward()
    return loss.detach(), Weights(*(t.grad for t in w))


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(("d", "latents", "k", "k_aux"), [(2, 3, 3, 2), (48, 200, 200, 60), (48, 200, 200, 4)])
def test_a_decoder_row_of_zeros_contributes_nothing(d, latents, k, k_aux, low):
    x, w = problem(d, latents, 60)
    w.W_dec[::3] = 0
    dead = torch.arange(0, latents, 3 if k_aux == 4 else 1)[:60]
    with torch.enable_grad():
        loss, gradients = safe_autograd(x, w, k, dead, k_aux=min(k_aux, len(dead)))
    done = topk.step(x, w, k, dead, k_aux=k_aux, low=low)
    assert abs(float(done.loss - loss)) < 1e-5 * float(loss)
    assert close(done.gradients, gradients)
    assert not any(g[::3].any() for g in done.gradients[:3]) and done.gradients.W_dec[1].any()


def test_unit_rows_keep_the_function_where_a_decoder_row_is_zero():
    x, w = problem()
    w.W_dec[::2] = 0
    for k in (8, 150):
        codes, again = topk.encode(x, w, k), topk.encode(x, topk.unit_decoder(w), k)
        torch.testing.assert_close(topk.decode(again, topk.unit_decoder(w)), topk.decode(codes, w))
    low = topk.encode(x, w, 150, low=True)
    torch.testing.assert_close(low.dense(200)[:, ::2], torch.zeros(300, 100))


@pytest.mark.parametrize("k_aux", [60, 5, 1])
def test_the_auxiliary_loss_is_exact_where_latents_are_ranked_in_bfloat16(k_aux):
    x, w = problem(tokens=60)
    w.b_enc[:60] += 10.0 * torch.arange(60)  # steps that bfloat16 can tell apart
    w.W_dec[:60] /= w.W_dec[:60].norm(dim=1, keepdim=True)
    exact, low = (topk.step(x, w, 200, torch.arange(60), 1.0, k_aux, low=low) for low in (False, True))
    assert abs(float(low.aux / exact.aux) - 1) < 1e-6
    assert close(low.gradients, exact.gradients, 1e-6)


def test_gather_dot_without_mkl_is_the_same(monkeypatch):
    x, w = problem()
    codes = topk.encode(x, w, 8)
    fast = topk.gather_dot(x, w.W_dec, codes)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    torch.testing.assert_close(topk.gather_dot(x, w.W_dec, codes), fast)
    expected = (x[codes.rows] * w.W_dec[codes.latents]).sum(1)
    torch.testing.assert_close(fast, expected)


def test_at_most_k_codes_and_they_are_the_largest():
    x, w = problem()
    z = topk.encode(x, w, 8).dense(200)
    assert int((z > 0).sum(1).max()) == 8
    ranked = ((x - w.b_dec) @ w.W_enc.T + w.b_enc) * w.W_dec.norm(dim=1)
    assert torch.equal((z > 0).nonzero(), ((ranked >= ranked.topk(8).values[:, -1:]) & (ranked > 0)).nonzero())
    torch.testing.assert_close(topk.decode(topk.encode(x, w, 8), w), z @ w.W_dec + w.b_dec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize(("latents", "k"), [(4608, 32), (512, 16), (528, 16), (200, 8), (16, 16)])
def test_the_largest_of_a_row_are_topks_ties_included(dtype, latents, k):
    g = torch.Generator().manual_seed(latents)
    for scale in (1e4, 2.0, 0.0):  # few ties, many, nothing else
        ranked = (scale * torch.randn(40, latents, generator=g)).round().clamp(-(2**15), 2**15 - 1).to(dtype)
        values, at = topk.largest(ranked, k)
        assert torch.equal(values.sort(1).values, ranked.topk(k).values.sort(1).values)
        assert torch.equal(values, ranked.gather(1, at)) and all(len(row.unique()) == k for row in at)


@pytest.mark.parametrize("low", [False, True])
def test_picking_by_blocks_of_tokens_changes_no_bit(low, monkeypatch):
    x, w = problem(latents=512)
    whole = topk.encode(x, w, 8, low=low)
    monkeypatch.setattr(topk, "ROWS", 70)
    for a, b in zip(topk.encode(x, w, 8, low=low), whole, strict=True):
        assert torch.equal(a, b)


def test_batch_topk_takes_tokens_times_k_of_the_whole_batch_ties_included():
    x, w = problem()
    codes = topk.encode(x, w, 8, batch_topk=True)
    assert len(codes.latents) == 8 * len(x) and int(codes.offsets[-1]) == 8 * len(x)
    assert codes.offsets.diff().float().std() > 0  # not eight each
    tied = topk.select(torch.ones(5, 7), 3, batch_topk=True)
    assert len(tied.latents) == 15
    assert len(topk.select(torch.randn(5, 7), 7, batch_topk=True).latents) == 35


def test_ranking_in_bfloat16_keeps_exact_values():
    x, w = problem()
    exact, low = topk.encode(x, w, 8), topk.encode(x, w, 8, low=True)
    a, b = exact.dense(200), low.dense(200)
    both = (a > 0) & (b > 0)
    assert both.sum() > 0.95 * (a > 0).sum()  # few choices differ
    torch.testing.assert_close(a[both], b[both], rtol=1e-5, atol=1e-5)
    done = topk.step(x, w, 8, low=True)
    assert done.gradients.W_enc.dtype == torch.float32
    assert abs(float(done.mse / topk.step(x, w, 8).mse) - 1) < 0.01


def test_codes_survive_unit_rows_and_a_change_of_scale():
    x, w = problem(dtype=torch.float64)
    codes, unit = topk.encode(x, w, 8), topk.unit_decoder(w)
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(200, dtype=torch.float64))
    again = topk.encode(x, unit, 8)
    torch.testing.assert_close(topk.decode(again, unit), topk.decode(codes, w))
    raw = topk.rescaled(w, 0.25)  # trained on x = raw / 4
    back = topk.encode(4 * x, raw, 8)
    torch.testing.assert_close(back.dense(200), 4 * again.dense(200))
    torch.testing.assert_close(topk.decode(back, raw), 4 * topk.decode(codes, w))


def test_encoder_and_decoder_may_share_a_length_in_any_way():
    x, w = problem(dtype=torch.float64)
    other = Weights(w.W_enc * 3, w.b_enc * 3, w.W_dec / 3, w.b_dec)
    torch.testing.assert_close(topk.step(x, other, 8).loss, topk.step(x, w, 8).loss)


def test_a_latent_that_never_fires_has_no_gradient():
    x, w = problem()
    w.b_enc[17] = -1e6
    gradients = topk.step(x, w, 8).gradients
    assert float(gradients.W_enc[17].abs().max()) == 0 == float(gradients.W_dec[17].abs().max())
    revived = topk.step(
        x,
        Weights(w.W_enc, w.b_enc.index_fill(0, torch.tensor([17]), -0.2), w.W_dec, w.b_dec),
        1,
        torch.tensor([17]),
        k_aux=1,
    )
    assert float(revived.gradients.W_dec[17].abs().max()) > 0


def test_clipping_and_the_radial_part():
    x, w = problem()
    gradients = topk.step(x, w, 8).gradients
    length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert abs(float(topk.clip_scale(gradients, 1.0)) - 1 / length) < 1e-5
    assert float(topk.clip_scale(gradients, 1e9)) == 1 == float(topk.clip_scale(gradients, math.inf))
    unit = topk.unit_decoder(w).W_dec
    flat = topk.without_radial(gradients.W_dec, unit)
    assert float((flat * unit).sum(1).abs().max()) < 1e-4


def test_start():
    w = topk.initial(16, 40, torch.ones(16), seed=3)
    torch.testing.assert_close(w.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(w.W_enc, w.W_dec) and torch.equal(w.b_dec, torch.ones(16)) and not w.b_enc.any()
    assert torch.equal(w.W_dec, topk.initial(16, 40, torch.ones(16), seed=3).W_dec)
    assert not torch.equal(w.W_dec, topk.initial(16, 40, torch.ones(16), seed=4).W_dec)


def test_geometric_median_shrugs_off_an_outlier():
    x = torch.randn(500, 8)
    x[0] = 1e6
    assert float(topk.geometric_median(x).norm()) < 0.5 < float(x.mean(0).norm())
    line = torch.tensor([[0.0], [1.0], [10.0]])
    assert abs(float(topk.geometric_median(line, steps=500, tolerance=0)) - 1) < 1e-3  # in one dimension: the median


@pytest.mark.parametrize(
    ("sizes", "word"),
    [((0, 8, 2), "d_model"), ((8, -1, 2), "latents"), ((8, 16, 0), "k"), ((8, 16, 2.5), "k"), ((8, 16, 17), "exceed")],
)
def test_nonsense_sizes_are_refused(sizes, word):
    with pytest.raises(ValueError, match=word):
        topk.check_sizes(*sizes)


def test_a_pre_bias_of_another_width_is_refused():
    with pytest.raises(ValueError, match="pre-bias"):
        topk.initial(16, 40, torch.ones(17))
