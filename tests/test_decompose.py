"""Decompositions against libraries, hand arithmetic and planted vectors; every control fires on a plant and is silent without."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sae_lens import SAE
from sklearn.linear_model import orthogonal_mp

from helpers import stats
from helpers.sae import decompose
from helpers.sae.decompose import METHODS

D, LATENTS, K = 160, 480, 6


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def sae_of(kind, rows, b_enc=None, b_dec=None, **more):
    """An SAE of sae_lens with decoder rows `rows` (latents, d) and the encoder that is its transpose."""
    latents, d = rows.shape
    cfg = {
        "d_in": d,
        "d_sae": latents,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "device": "cpu",
        "dtype": "float32",
    }
    sae = SAE.from_dict({"architecture": kind, **cfg, **more})
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(unit(rows).T)
        sae.b_enc.copy_(torch.zeros(latents) if b_enc is None else b_enc)
        sae.b_dec.copy_(torch.zeros(d) if b_dec is None else b_dec)
        if kind == "jumprelu":
            sae.threshold.fill_(0.3)
    return sae


KINDS = {"topk": {"k": K, "rescale_acts_by_decoder_norm": False}, "jumprelu": {}, "standard": {}}


@pytest.fixture(params=KINDS)
def sae(request):
    """A dictionary with rows of length 1, offsets as a trained SAE has them, in each of three architectures."""
    g = torch.Generator().manual_seed(3)
    rows = unit(torch.randn(LATENTS, D, generator=g))
    if request.param == "standard":
        rows = rows * (0.5 + torch.rand(LATENTS, 1, generator=g))
    return sae_of(
        request.param,
        rows,
        0.05 * torch.randn(LATENTS, generator=g),
        2 * torch.randn(D, generator=g) / D**0.5,
        **KINDS[request.param],
    )


@pytest.fixture
def planted(sae):
    """A sparse signed sum of unit rows plus noise of a tenth: (vectors (5, D), support (5, K), signed weights (5, K))."""
    g = torch.Generator().manual_seed(4)
    support = torch.stack([torch.randperm(LATENTS, generator=g)[:K] for _ in range(5)])
    weight = (1 + torch.rand(5, K, generator=g)) * torch.tensor([1.0, -1, 1, -1, 1, -1])
    clean = torch.einsum("nk,nkd->nd", weight, unit(sae.W_dec.detach())[support])
    noise = torch.randn(5, D, generator=g)
    return clean + 0.1 * clean.norm(dim=1, keepdim=True) * unit(noise), support, weight


def found(result, support, weight):
    """Share of the planted latents that are among the K largest codes with the right sign."""
    top = result.codes.abs().topk(K, dim=1).indices
    hits = [
        sum(j in row and np.sign(code[j]) == np.sign(w) for j, w in zip(s.tolist(), ws.tolist(), strict=True))
        for row, code, s, ws in zip(top.tolist(), result.codes.numpy(), support, weight, strict=True)
    ]
    return np.mean(hits) / K


# --- the methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["orthogonal", "gradient"])
def test_a_planted_signed_sum_is_recovered_by_the_signed_pursuits(update, sae, planted):
    vectors, support, weight = planted
    result = decompose.pursuit(sae.W_dec, vectors, K, update)
    assert found(result, support, weight) > 0.95 and result.cosine.min() > 0.97
    if update == "orthogonal":
        at = result.codes.gather(1, support) * sae.W_dec.norm(dim=1)[support]
        assert (at - weight).abs().max() < 0.5


@pytest.mark.parametrize("name", ["encode", "encode less zero", decompose.UNSIGNED])
def test_a_planted_signed_sum_is_not_recovered_without_a_sign(name, sae, planted):
    vectors, support, weight = planted
    result = METHODS[name](sae, vectors, K, torch.zeros(1, D))
    assert found(result, support, weight) <= 0.55 and result.cosine.max() < 0.9


@pytest.mark.parametrize("kind", ["topk", "jumprelu", "standard"])
def test_activations_in_which_the_planted_latents_are_on_show_both_signs_of_a_change(kind):
    """With and without v, and the codes of pairs, recover a planted sum where the activations let them: all latents on."""
    rows = torch.linalg.qr(torch.randn(D, D)).Q
    more = {"k": D, "rescale_acts_by_decoder_norm": False} if kind == "topk" else {}
    sae = sae_of(kind, rows, **more)
    g = torch.Generator().manual_seed(1)
    support = torch.randperm(D, generator=g)[None, :K]
    weight = torch.tensor([[1.5, -1.2, 1.9, -1.1, 1.3, -1.6]])
    v = weight @ rows[support[0]]
    acts = (5 + torch.rand(30, D, generator=g)) @ rows  # every latent is on, by more than v takes away
    for result in (decompose.encode_shift(sae, v, acts, K), decompose.encode_pairs(sae, acts + v, acts, K)):
        assert found(result, support, weight) == 1.0 and result.cosine[0] > 0.999
    assert found(decompose.encode_shift(sae, v, acts * 0, K), support, weight) <= 0.5  # all off: nothing can go out


def test_without_negative_weights_the_unsigned_pursuit_recovers_it_too(sae, planted):
    _, support, weight = planted
    vectors = torch.einsum("nk,nkd->nd", weight.abs(), unit(sae.W_dec.detach())[support])
    result = METHODS[decompose.UNSIGNED](sae, vectors, K, torch.zeros(1, D))
    assert found(result, support, weight.abs()) > 0.95 and (result.codes >= 0).all()


def test_with_and_without_v_sees_a_latent_that_goes_out_only_where_it_was_on():
    rows = torch.eye(8)
    sae = sae_of("topk", rows, k=4, rescale_acts_by_decoder_norm=False)
    v = 2 * rows[0] - 3 * rows[1]
    on, off = 5 * rows[1][None] + rows[2], rows[2][None]
    codes = decompose.encode_shift(sae, v[None], on).codes[0]
    assert torch.allclose(codes, v) and torch.allclose(decompose.encode_shift(sae, v[None], off).codes[0], 2 * rows[0])
    assert torch.allclose(
        decompose.encode_shift(sae, v[None], torch.cat([on, off])).codes[0], 2 * rows[0] - 1.5 * rows[1]
    )
    pairs = decompose.encode_pairs(sae, on + v, on)
    assert torch.allclose(pairs.codes[0], v) and pairs.error[0] < 1e-6


def test_encode_is_the_sae_and_less_zero_takes_the_zero_vectors_code_off(sae, planted):
    v = planted[0]
    zero = sae.encode(torch.zeros(1, D))
    result = decompose.encode(sae, v)
    assert torch.equal(result.codes, sae.encode(v)) and torch.equal(result.reconstruction, sae.decode(sae.encode(v)))
    assert torch.allclose(decompose.encode_less_zero(sae, v).codes, sae.encode(v) - zero)
    assert np.allclose(result.error, ((v - result.reconstruction).norm(dim=1) / v.norm(dim=1)).numpy(), rtol=1e-5)
    nothing = decompose.encode_less_zero(sae, torch.zeros(1, D))
    assert nothing.l0[0] == 0 and np.isnan(nothing.error[0]) and nothing.cosine[0] == 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_to_the_number_of_latents_on_every_architecture(name, sae, planted):
    acts = torch.randn(20, D)
    for k in (1, 4):
        result = METHODS[name](sae, planted[0], k, acts)
        assert (result.l0 <= k).all() and result.codes.shape == (5, LATENTS) and result.reconstruction.shape == (5, D)
        assert torch.isfinite(result.codes).all() and result.seconds > 0
        if name != "encode":  # which adds b_dec
            assert torch.allclose(result.reconstruction, result.codes @ sae.W_dec, atol=1e-4)


def test_seen_from_the_centre_or_without_a_bias_the_encoder_says_what_the_formula_says(sae, planted):
    """(v + b_dec - b_dec) W_enc + b_enc, and the same without b_enc, under each SAE's own rule for what is on."""
    v, given = planted[0], {name: t.clone() for name, t in sae.state_dict().items()}
    for name, bias in (("encode(v + b_dec)", sae.b_enc), ("encode without bias", 0 * sae.b_enc)):
        before = v @ sae.W_enc + bias
        floor = {
            "topk": before.topk(K).values[:, -1:],
            "jumprelu": sae.threshold[:, None].T if hasattr(sae, "threshold") else 0,
        }
        expected = torch.where(before >= floor.get(sae.cfg.architecture(), 0), before, 0.0).relu()
        result = METHODS[name](sae, v, 0, torch.zeros(1, D))
        torch.testing.assert_close(result.codes, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.reconstruction, expected @ sae.W_dec, rtol=1e-3, atol=1e-3)
    assert METHODS["encode without bias"](sae, torch.zeros(1, D), 0, v).l0[0] == 0  # nothing in, nothing out
    assert all(torch.equal(given[name], t) for name, t in sae.state_dict().items())
    assert decompose.without_bias(sae).W_enc is sae.W_enc


def test_an_sae_that_leaves_its_input_where_it_is_is_not_centred(sae, planted):
    rows = sae.W_dec.detach()
    plain = sae_of("standard", rows, sae.b_enc, sae.b_dec, apply_b_dec_to_input=False)
    v = planted[0]
    assert torch.equal(METHODS["encode(v + b_dec)"](plain, v, 0, v).codes, plain.encode(v + plain.b_dec))
    torch.testing.assert_close(METHODS["encode without bias"](plain, v, 0, v).codes, (v @ plain.W_enc).relu())
    torch.testing.assert_close(decompose.pre_codes(plain, v), v @ plain.W_enc + plain.b_enc)


def test_a_gated_sae_loses_both_of_its_biases_and_has_no_one_value_before_its_codes():
    gated = sae_of_gated(unit(torch.randn(20, 8)))
    assert (
        METHODS["encode without bias"](gated, torch.zeros(1, 8), 0, None).l0[0]
        == 0
        < gated.encode(torch.zeros(1, 8)).sum()
    )
    with pytest.raises(ValueError, match="gates its codes"):
        decompose.pre_codes(gated, torch.zeros(1, 8))


def sae_of_gated(rows):
    cfg = {"d_in": rows.shape[1], "d_sae": len(rows), "apply_b_dec_to_input": True, "normalize_activations": "none"}
    sae = SAE.from_dict({"architecture": "gated", **cfg, "device": "cpu", "dtype": "float32"})
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        for bias in (sae.b_gate, sae.b_mag):
            bias.fill_(0.5)
    return sae


def test_what_the_encoder_gives_before_it_chooses_is_the_code_where_it_is_on(sae, planted):
    codes, before = decompose.codes_of(sae, planted[0]), decompose.pre_codes(sae, planted[0])
    torch.testing.assert_close(before[codes > 0], codes[codes > 0])
    assert before.shape == codes.shape and (before < 0).any()


def test_orthogonal_pursuit_is_sklearns():
    rows, vectors = unit(torch.randn(LATENTS, D)), torch.randn(7, D)
    for k in (1, 5, 20):
        ours = decompose.pursuit(rows, vectors, k)
        theirs = orthogonal_mp(rows.double().numpy().T, vectors.double().numpy().T, n_nonzero_coefs=k).T
        assert np.abs(ours.codes.numpy() - theirs).max() < 1e-4 and (ours.l0 == k).all()


def test_matching_pursuit_without_a_sign_is_sae_lens_own():
    rows, vectors = unit(torch.randn(LATENTS, D)), torch.randn(7, D)
    cfg = {
        "d_in": D,
        "d_sae": LATENTS,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "device": "cpu",
        "dtype": "float32",
    }
    theirs = SAE.from_dict(
        {
            "architecture": "matching_pursuit",
            **cfg,
            "residual_threshold": 0.0,
            "max_iterations": 12,
            "stop_on_duplicate_support": False,
        }
    )
    with torch.no_grad():
        theirs.W_dec.copy_(rows)
        theirs.b_dec.zero_()
    ours = decompose.pursuit(rows, vectors, 12, "matching", signed=False)
    assert torch.allclose(ours.codes, theirs.encode(vectors), atol=1e-4)


def naive_gradient_pursuit(rows, v, k, signed):
    """One vector, dense, as written in the paper."""
    chosen, codes, left = [], torch.zeros(len(rows)).double(), v.double().clone()
    for _ in range(k):
        score = rows.double() @ left
        score = score.abs() if signed else score
        score[chosen] = -1
        chosen.append(int(score.argmax()))
        slope = torch.zeros(len(rows)).double()
        slope[chosen] = (rows.double() @ left)[chosen]
        image = slope @ rows.double()
        codes = codes + slope * (slope @ slope) / (image @ image)
        codes = codes if signed else codes.clamp_min(0)
        left = v.double() - codes @ rows.double()
    return codes


@pytest.mark.parametrize("signed", [True, False])
def test_gradient_pursuit_is_its_naive_twin_and_least_squares_on_an_orthogonal_dictionary(signed):
    rows, vectors = unit(torch.randn(LATENTS, D)), torch.randn(4, D)
    ours = decompose.pursuit(rows, vectors, 9, "gradient", signed).codes
    for code, v in zip(ours, vectors, strict=True):
        assert torch.allclose(code.double(), naive_gradient_pursuit(rows, v, 9, signed), atol=1e-4)
    basis = torch.linalg.qr(torch.randn(D, D)).Q
    exact = decompose.pursuit(basis, vectors, D, "gradient").codes
    assert torch.allclose(exact, vectors @ basis.T, atol=1e-4)


def test_an_exhausted_vector_stops_and_a_batch_is_its_vectors_one_by_one():
    rows = unit(torch.randn(LATENTS, D))
    v = torch.stack([2 * rows[5], torch.zeros(D), *torch.randn(3, D)])
    for update in ("orthogonal", "gradient"):
        batch = decompose.pursuit(rows, v, 10, update)
        assert batch.l0[0] == 1 and batch.l0[1] == 0 and batch.codes[0, 5] == pytest.approx(2, abs=1e-4)
        for i in range(len(v)):
            assert torch.allclose(batch.codes[i], decompose.pursuit(rows, v[i : i + 1], 10, update).codes[0], atol=1e-4)


def test_a_dead_row_and_rows_of_any_length_do_no_harm():
    rows = torch.randn(LATENTS, D) * torch.logspace(-2, 2, LATENTS)[:, None]
    rows[7] = 0
    v = 3 * unit(rows[100]) - 2 * unit(rows[3])
    codes = decompose.pursuit(rows, v[None], 2).codes[0]
    assert torch.isfinite(codes).all() and codes[7] == 0 and torch.allclose(codes @ rows, v, atol=1e-3)
    assert decompose.pursuit(rows, v[None], 2).codes[0].nonzero()[:, 0].tolist() == [3, 100]


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda r: decompose.pursuit(r, torch.randn(2, D), 0), "k = 0 given"),
        (lambda r: decompose.pursuit(r, torch.randn(2, D), 3, "newton"), "update = 'newton' given"),
        (lambda r: decompose.pursuit(r, torch.randn(2, D), 3, signed=False), "gradient"),
        (lambda r: decompose.pursuit(r, torch.randn(2, D + 1), 3), r"wants \(n, 160\)"),
        (lambda r: decompose.pursuit(r, torch.full((1, D), torch.nan), 1), "NaN"),
        (lambda r: decompose.retention(np.ones(2), np.ones(2)), "three or more"),
    ],
)
def test_bad_input_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(LATENTS, D))


# --- algebra -----------------------------------------------------------------------------------------------------------


def test_a_features_own_vector_is_its_decoder_row_whatever_the_activations(sae):
    for acts in (torch.randn(9, D), torch.zeros(1, D)):
        own = decompose.raised(sae, acts, 11, 4.0)
        assert torch.allclose(own, 4 * sae.W_dec[11].double(), atol=1e-4)
        assert decompose.raised_as_rows(sae, acts, [3, 11], 4.0) == pytest.approx([1.0, 1.0])


# --- what is the zero vector's -----------------------------------------------------------------------------------------


def test_overlap_counts_shared_largest_latents():
    codes = torch.tensor([[3.0, -2, 1, 0], [0, 0, 0, 5.0], [0, 0, 0, 0]])
    assert decompose.overlap(codes, torch.tensor([1.0, 4, 0, 0]), 2).tolist() == [1.0, 0.0, 0.0]


@pytest.fixture
def biased():
    """An SAE on the axes, whose zero vector turns on latents 0 and 1: they read 4 and 3 whatever comes in."""
    offset = torch.zeros(8)
    offset[:2] = torch.tensor([4.0, 3.0])
    return sae_of("topk", torch.eye(8), offset, k=2, rescale_acts_by_decoder_norm=False)


def test_a_short_vector_is_encoded_as_the_zero_vector_is_and_a_long_one_is_not(biased):
    axes = torch.eye(8)
    short, long = 0.5 * axes[5:7], 20 * axes[5:7] + 10 * axes[6:8]
    assert decompose.zero(biased).codes[0, :3].tolist() == [4, 3, 0]
    assert decompose.shared_with_zero(biased, short, 2).tolist() == [1, 1]
    assert decompose.shared_with_zero(biased, long, 2).tolist() == [0, 0]
    assert np.allclose(decompose.error_over_zero(biased, short), 1.0)
    assert np.allclose(decompose.error_over_zero(biased, long), 0.0, atol=1e-6)
    assert np.allclose(decompose.twice_as_zero(biased, short), 1.0)
    assert np.allclose(decompose.twice_as_zero(biased, long), 0.0, atol=1e-6)
    assert decompose.code_cosine(biased, 0, short.numpy()) == pytest.approx(0.8)
    for of_mean in (True, False):
        alike = decompose.code_cosines(biased, 0, np.repeat(short.numpy(), 3, axis=0), of_mean)
        assert alike == pytest.approx((0.8, 0.8, 0.8))


def test_errors_at_several_lengths_are_those_of_vectors_so_long_and_a_line_from_the_zero_vector(biased):
    v = torch.randn(3, 8)
    found = decompose.errors(biased, v, [0.5, 4.0])
    assert found.error.shape == found.inverse.shape == (2, 3) and (found.inverse == [[2] * 3, [0.25] * 3]).all()
    assert np.allclose(found.from_zero, 5 * found.inverse)  # |(4, 3)| over |v|
    for i, length in enumerate((0.5, 4.0)):
        assert np.allclose(found.error[i], decompose.encode(biased, unit(v) * length).error, rtol=1e-5)
    as_long = decompose.errors(biased, v)
    assert np.allclose(as_long.error[0], decompose.encode(biased, v).error, rtol=1e-5)
    assert np.allclose(as_long.inverse[0], 1 / v.norm(dim=1).numpy())
    short = decompose.errors(biased, v, [0.01])
    assert np.allclose(short.error, short.from_zero, rtol=0.01)  # so short that it is not seen


def test_latents_that_appear_vanish_and_stay_when_decoded_twice_are_those_that_were_planted():
    """Latent 0 is on for everything; latent 1's row is latent 3's direction, so that 1 goes and 3 comes."""
    rows = torch.eye(6)
    rows[1] = 2 * torch.eye(6)[3]
    sae = sae_of("standard", rows, b_enc=torch.tensor([1.0, 0, 0, 0, 0, 0]))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(6))
    random = 0.5 * torch.eye(6)[[2, 4, 5, 2]]
    found = decompose.twice(sae, 3 * torch.eye(6)[1], random)
    assert (found.appear, found.vanish, found.stay) == ([3], [1], [0])
    assert found.shared == 0 and found.rare == [3, 1] and found.null.tolist() == [1] * 4  # where nothing changes
    same = decompose.twice(sae, 0.5 * torch.eye(6)[1], torch.eye(6)[[1, 1, 1]])
    assert same.shared == 1 and same.null.tolist() == [1] * 3 and same.rare == []
    with pytest.raises(ValueError, match="two or more"):
        decompose.twice(sae, torch.eye(6)[1], torch.eye(6)[:1])


def test_a_random_vector_among_random_vectors_changes_what_they_change(sae):
    p = []
    for seed in range(40):
        v = unit(torch.randn(31, D, generator=torch.Generator().manual_seed(seed)))
        found = decompose.twice(sae, v[0], v[1:])
        p.append(stats.p_value(-found.shared, -found.null))
        assert not {*found.appear} & {*found.vanish} and not {*found.stay} & {*found.rare}
    assert np.mean(np.array(p) < 0.1) <= 0.2


# --- the methods, together ---------------------------------------------------------------------------------------------


def test_one_run_gives_every_number_of_latents_for_vectors_of_any_shape(sae):
    vectors, acts, sizes = torch.randn(3, 2, D), torch.randn(4, D), [2, 5]
    for name, method in METHODS.items():
        found = decompose.at_sizes(name, sae, vectors, sizes, acts)
        assert found.shape == (2, 3, 2, D)
        for k, made in zip(sizes, found, strict=True):
            alone = method(sae, vectors[2], k, acts).reconstruction
            assert torch.allclose(made[2], alone, atol=1e-4), name
    halves = [(v + acts, acts) for v in vectors[0]]
    written = decompose.written(sae, vectors[0], halves, 2, acts)
    assert list(written) == [*METHODS, decompose.PAIRS, decompose.WHOLE]
    assert torch.equal(written[decompose.WHOLE], decompose.encode_shift(sae, vectors[0], acts).reconstruction)
    assert torch.equal(written[decompose.PAIRS][1], decompose.encode_pairs(sae, *halves[1], 2).reconstruction[0])


def test_what_is_used_up_stays_as_it_is_with_more_latents():
    rows = unit(torch.randn(LATENTS, D))
    v = torch.stack([2 * rows[5], torch.zeros(D)])
    made = decompose.pursuit_path(rows, v, [1, 3, 9])
    assert torch.allclose(made, v.expand(3, -1, -1), atol=1e-4)


def test_a_sign_adds_to_a_vector_with_negative_codes_and_nothing_to_one_without():
    rows = torch.eye(D)
    with_minus, without = rows[0] - rows[1], rows[0] + rows[1]
    gain = decompose.sign_gain(rows, torch.stack([with_minus, without]), 2)
    assert gain == pytest.approx([1 - 0.5**0.5, 0.0], abs=1e-6)


# --- retention ---------------------------------------------------------------------------------------------------------


def test_a_response_is_of_the_direction_alone_each_vector_under_its_own_gradient():
    gradient = np.array([[1.0, 0, 0], [0, 2.0, 0]])
    vectors = torch.tensor([[[3.0, 4, 0], [0, -5, 0]], [[0, 0, 1], [0, 0, 0]]])
    steering = decompose.Steering(vectors[0], gradient, 10.0)
    assert steering.response(vectors).tolist() == [[6, -20], [0, 0]] and steering.own.tolist() == [6, -20]
    assert steering.left(vectors).tolist() == [1, 0]
    three = decompose.Steering(torch.eye(3), np.eye(3) * [[1], [1.5], [2]], 1.0)
    assert three.kept(torch.eye(3)) == pytest.approx((1, 1, 1))


def test_steering_retained_is_a_ratio_of_sums_over_behaviours_and_saes():
    own = np.array([1.0, 2, 3, 4, 5])
    assert decompose.retention(own, own) == stats.Interval(1.0, 1.0, 1.0)
    assert decompose.retained(np.stack([0.5 * own, -own]), own).tolist() == [0.5, -1]
    noise = np.random.default_rng(0).normal(0, 0.3, (3, 5))
    one, three = (decompose.retention(0.6 * own + x, own) for x in (noise.mean(0), noise))
    assert one == stats.ratio(0.6 * own + noise.mean(0), own) and three.value == pytest.approx(one.value)
    apart = decompose.retention(np.outer([0.5, 0.6, 0.7], own), own)  # behaviours agree: the SAEs alone differ
    assert apart.value == pytest.approx(0.6) and apart.high - 0.6 == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)


def test_nothing_is_retained_of_vectors_that_do_not_steer():
    assert decompose.retention(np.ones(4), np.array([1.0, -1, 2, -2])) is None


def test_at_equal_kl_a_response_is_priced_by_the_root():
    responses, kl = np.array([[2.0, 3.0], [2.0, 0.0]]), np.array([4.0, 0.0])
    assert decompose.at_equal_kl(responses, kl).tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("saes", [1, 3])
def test_an_interval_of_retention_covers_over_behaviours_and_saes_that_differ_in_it(saes):
    rng, inside = np.random.default_rng(3), 0
    for _ in range(400):
        own = rng.uniform(1, 3, 7)
        share = rng.normal(0.6, 0.2, (1, 7)) + rng.normal(0, 0.1, (saes, 1)) * (saes > 1)
        found = decompose.retention(share * own, own)
        inside += found.low <= 0.6 <= found.high
    assert 0.92 <= inside / 400 <= 0.99


def test_an_sae_with_gradients_on_is_read_like_any_other(sae, planted):
    with torch.enable_grad():
        sae.W_dec.requires_grad_(True)
        for name, method in METHODS.items():
            assert not method(sae, planted[0], 3, torch.randn(5, D)).codes.requires_grad, name


def test_an_sae_that_normalises_as_it_runs_is_refused_and_one_in_units_of_its_output_is_not():
    rows = 3 * unit(torch.randn(LATENTS, D))
    for way in ("constant_norm_rescale", "layer_norm"):
        other = sae_of("standard", rows, normalize_activations=way)
        with pytest.raises(ValueError, match="normalises its inputs as it runs"):
            METHODS["encode less zero"](other, torch.randn(1, D), 3, torch.zeros(1, D))
    scaled = sae_of("topk", rows, k=K, rescale_acts_by_decoder_norm=True)
    v = torch.randn(4, D)
    expected = scaled.decode(scaled.encode(v)) - scaled.decode(scaled.encode(torch.zeros(1, D)))
    assert torch.allclose(decompose.encode_less_zero(scaled, v).reconstruction, expected, atol=1e-4)
    assert torch.allclose(
        decompose.pursuit(decompose.rows_of(scaled), v, 20).codes @ decompose.rows_of(scaled),
        decompose.pursuit(rows, v, 20).reconstruction,
        atol=1e-3,
    )


def test_methods_take_what_has_an_encoder_and_rows():
    """Nothing but encode, decode, W_dec, W_enc, device and cfg.d_in is asked of an SAE."""
    rows = torch.eye(6)
    thing = SimpleNamespace(
        encode=lambda x: x.relu(),
        decode=lambda c: c @ rows,
        W_dec=rows,
        W_enc=rows,
        device="cpu",
        cfg=SimpleNamespace(d_in=6),
    )
    v = torch.tensor([[1.0, -2, 0, 0, 0, 3]])
    assert METHODS[decompose.PURSUIT](thing, v, 3, v).cosine[0] == pytest.approx(1.0)
    assert METHODS["encode"](thing, v, 3, v).codes.tolist() == [[1, 0, 0, 0, 0, 3]]


def test_skipping_the_topk_keeps_every_latent_above_zero():
    """What source 000 did: about half of the latents, whatever the vector; an SAE without a TopK knows no difference."""
    g = torch.Generator().manual_seed(3)
    rows, v = unit(torch.randn(LATENTS, D, generator=g)), torch.randn(3, D, generator=g).double()
    kept, all_of_them = (
        f(sae_of("topk", rows, **KINDS["topk"]), v) for f in (decompose.encode, decompose.encode_unbounded)
    )
    assert (kept.l0 == K).all() and (abs(all_of_them.l0 / LATENTS - 0.5) < 0.1).all()
    assert torch.equal(decompose.keep_largest(all_of_them.codes, rows, K), kept.codes)
    bias = torch.ones(D)
    plain = sae_of("standard", rows, b_dec=bias)
    one, other = decompose.encode(plain, v), decompose.encode_unbounded(plain, v)
    torch.testing.assert_close(one.reconstruction, other.reconstruction, rtol=1e-5, atol=1e-5)
