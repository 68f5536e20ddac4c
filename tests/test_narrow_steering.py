"""Methods at equal price, refusal of one subject, gates, and the check of a vector: every control with a plant at which it fires and
one at which it stays silent."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from test_decompose import sae_of, unit
from test_study import Session

from helpers import claims, stats, study
from helpers.entries import DataError
from helpers.lm import text, tokens
from helpers.steering import behaviors, caa, checks, directions, methods, narrow, propensity
from helpers.steering.caa import SteeringVector

NAMES = ("joy", "refusal", "anger", "fear")
SMALL = methods.Sizes(items=2, dev=2, others=1, replies=1, tokens=6, pieces=1, said=4)


@pytest.fixture
def lab(tiny, cache, monkeypatch):
    monkeypatch.setattr(text, "excerpt", lambda *_: "A river runs past the mill and the town. " * 30)
    data = {n: behaviors.trim(behaviors.load_behavior(n), 6, 4) for n in NAMES}
    return study.Single(Session(fast=False, layers=[0, 1, 2, 3]), tiny, 1, [0, 1, 2, 3], data)


@pytest.fixture
def best(lab):
    """The plant: for each behaviour the direction that moves its test items most, to first order."""
    return {n: torch.from_numpy(g.mean(0)) for n, g in lab.gradients().items()}


def of(lab, v, layer=1, method="made"):
    return SteeringVector(v, layer, "joy", method, "answer", lab.model.identity, 0, "", None, "")


# --- methods at equal price ----------------------------------------------------------------------------------------------


def test_a_method_that_steers_is_ahead_of_a_random_one_and_both_cost_the_same(lab, best):
    some = {m: methods.METHODS[m] for m in (methods.MEAN, methods.PREFERENCE, methods.PROMPT, *methods.CONTROLS)}
    board = methods.benchmark(lab, some | {"mine": lambda given: best[given.name]}, [0.005, 0.02], 0.005, SMALL)
    assert board.methods == [methods.MEAN, *methods.CONTROLS, "mine"] and board.missing == [methods.PREFERENCE]
    assert (board.own("mine") > board.own(methods.RANDOM)).all() and board.reached.all()
    chance = board.by_chance(board.strength[:, :, board.at], 200)
    assert stats.p_value(board.own("mine").mean(), chance.mean(1)) < 0.05 < stats.p_value(0.0, chance.mean(1))
    for i, n in enumerate(NAMES):
        dev = propensity.of_replies(lab.model, lab.data[n].open[:1], 1, SMALL.tokens)
        for m in range(4):
            push = board.strength[m, i, :, None] * board.steps[m, i].numpy()
            found = methods.costs(dev, torch.from_numpy(push).float()).mean(1)
            assert found.numpy() == pytest.approx([0.005, 0.02], rel=0.5)
    assert [board.methods[m] for m in board.chosen].count("mine") >= 2
    assert board.effect.shape == (4, 4, 2) and board.crossed.shape == (4, 4, 4)
    own = board.crossed[board.row("mine")]
    assert (np.diag(own) > 0).all() and board.entangled("mine") == pytest.approx(
        (np.abs(own).sum(1) - np.diag(own)) / 3
    )
    x, series = board.curves()
    assert len(x) == 3 and x == sorted(x) and [v is None for v in series[methods.PROMPT]].count(False) == 1
    assert "| mine |" in board.leaderboard().data and f"| {methods.PROMPT} |" in board.leaderboard().data
    assert board.takeaway(50).data.count("\n") == 1 + len(NAMES)
    weak, strong = (dataclasses.replace(board, effect=board.effect * x) for x in (0.0, 1e6))
    strong.effect[:] = np.abs(strong.effect)
    assert weak.takeaway(50).data.count("does no more than chance") == len(NAMES)
    lone = dataclasses.replace(board, methods=["m" + x for x in board.methods])
    assert "| - |" in lone.takeaway(50).data and "does no more" not in lone.takeaway(50).data
    assert "does no more than chance" not in strong.takeaway(50).data
    vector, prompt = board.best_over_prompt()
    assert vector.shape == prompt.shape == (4,) and np.isfinite([vector, prompt]).all()
    assert set(board.trade_off()) == set(board.methods)
    some_items, text_of_joy = lab.data["fear"].test[:1], board.prompted.texts[0]
    by_hand = methods.under_prompt(lab.model, some_items, 1, text_of_joy)
    by_hand = by_hand - methods.log_odds(propensity.of_items(lab.model, some_items, 1), torch.zeros(1, 48))[0].numpy()
    crossed = board.prompted.crossed
    assert crossed[0, 3] == pytest.approx(by_hand.mean() / board.spread[3], abs=1e-4)
    assert board.entangled(methods.PROMPT)[0] == pytest.approx(np.abs(crossed[0, 1:]).mean())


def test_no_method_no_board(lab):
    with pytest.raises(ValueError, match="none of trained by preference gave a vector"):
        methods.benchmark(lab, {methods.PREFERENCE: methods.preference}, [0.1], 0.1, SMALL)


def test_dictionaries_rebuild_the_mean_and_controls_are_controls(lab):
    one = methods.given(lab)["joy"]
    v = directions.mean(one.pos, one.neg)
    rows = torch.cat([v[None].float(), torch.randn(40, 48)])
    assert stats.cosine(methods.pursuit(one._replace(sae=rows)).numpy(), v.numpy()) > 0.999
    assert stats.cosine(methods.diff_latents(one._replace(diff=rows[1:])).numpy(), v.numpy()) < 0.999
    assert methods.pursuit(one) is None and methods.preference(one) is None
    assert torch.equal(methods.other(one), lab.vectors()["refusal"])
    assert abs(stats.cosine(methods.random(one).numpy(), v.numpy())) < 0.6
    assert methods.prompt(one) == [p.positive for p in lab.data["joy"].system_pairs[: methods.CANDIDATES]]


def test_a_curve_stops_once_it_is_enough_and_gives_the_strength_of_a_price(lab):
    where = propensity.of_replies(lab.model, lab.data["joy"].open[:1], 1, 6)
    steps = torch.nn.functional.normalize(torch.randn(2, 48), dim=1) * lab.residual_norm
    whole = methods.curves(where, steps, methods.STRENGTHS, float("inf")).numpy()
    cut = methods.curves(where, steps, methods.STRENGTHS, float(whole[0, 2])).numpy()
    assert np.isfinite(whole).all() and not whole[:, 0].any()
    assert np.isinf(cut[0, 3:]).all() and cut[0, :3] == pytest.approx(whole[0, :3])
    strength = methods.strength_at(cut[0], methods.STRENGTHS, 0.8 * whole[0, 2])
    assert methods.STRENGTHS[1] < strength < methods.STRENGTHS[2]
    assert np.isnan(methods.strength_at(cut[0], methods.STRENGTHS, 1e3))


def test_a_system_prompt_that_says_what_the_template_says_costs_nothing_and_another_costs_something(lab):
    asked = lab.data["joy"].open[:2]
    assert methods.prompt_price(lab.model, asked, 1, "You are a helpful assistant.", 6) == pytest.approx(0, abs=1e-6)
    assert methods.prompt_price(lab.model, asked, 1, "Shout every word and be very glad.", 6) > 1e-4
    items = lab.data["joy"].test[:2]
    plain = methods.log_odds(propensity.of_items(lab.model, items, 1), torch.zeros(1, 48))[0]
    same = methods.under_prompt(lab.model, items, 1, "You are a helpful assistant.")
    assert same == pytest.approx(plain.numpy(), abs=1e-4)


def test_repetition_and_unlikely_words_are_no_language(lab):
    lm, q = lab.model, lab.data["joy"].open[:1] * 2
    own = lm.tokenizer(" The river runs past the mill.")["input_ids"]
    said = torch.tensor([own, own[:1] * len(own)])
    assert methods.repeated(own) < methods.REPEATED <= methods.repeated(own[:1] * 8)
    assert methods.is_language(lm, q, said, 1e3).tolist() == [True, False]
    assert not methods.is_language(lm, q, said, 0.0).any()
    assert methods.repeated([1]) == 0


def test_a_mean_over_wordings_is_the_mean_of_their_log_odds(lab):
    item = lab.data["joy"].test[0]
    both = narrow.completed(lab.model, [item], 1)
    each = [item._replace(matching=x) for x in narrow.REFUSED]
    odds = methods.log_odds(propensity.of_items(lab.model, each, 1), torch.zeros(1, 48))[0]
    assert float(methods.log_odds(both, torch.zeros(1, 48))) == pytest.approx(float(odds.mean()), abs=1e-3)


# --- contrast designs ----------------------------------------------------------------------------------------------------


def test_designs_are_hand_arithmetic_on_equally_many_texts(lab):
    found = methods.designs(lab, 3)
    pos, neg = lab.halves(where="answer")["joy"].at(1)
    torch.testing.assert_close(found[methods.PAIRS]["joy"], (pos[:3].double() - neg[:3].double()).mean(0))
    torch.testing.assert_close(found[methods.SETS]["joy"], pos[:3].double().mean(0) - neg[3:6].double().mean(0))
    assert all(set(x) == set(NAMES) for x in found.values()) and set(found) == set(methods.DESIGNS)
    pair = lab.data["joy"].answer_pairs[0]
    laid = tokens.chat(lab.model.tokenizer, methods.reported(pair)[0])
    mask = methods._last_of_user(laid, methods._tail(lab.model, pair.positive))[0]
    assert lab.model.tokenizer.decode(torch.tensor(laid.ids)[mask]).strip() == pair.positive
    one = methods.at_small_price(lab, found[methods.PAIRS], 0.01, SMALL)
    longer = methods.at_small_price(lab, {n: 7 * v for n, v in found[methods.PAIRS].items()}, 0.01, SMALL)
    assert one == pytest.approx(longer, rel=1e-3)  # at equal price length does not count
    assert methods.at_small_price(lab, found[methods.PAIRS], 0.04, SMALL) == pytest.approx(2 * one)


# --- requests ------------------------------------------------------------------------------------------------------------


def test_the_requests_are_whole_and_name_their_subject_alone():
    found = narrow.load()
    assert len(found.subjects) == 12 and len(found.items) == 12 * 4 + 2
    assert {len(x) for (_, kind, _), x in found.items.items() if kind != narrow.UNRELATED} == {4}
    assert len({i.question for x in found.items.values() for i in x}) == 208
    for s in found.subjects:
        word = s.removeprefix("the ")
        names = re.compile(rf"\b({word}|{word.removesuffix('s')})s?\b", re.I)
        for (owner, kind, _), items in found.items.items():
            named = [bool(names.search(i.question)) for i in items]
            assert all(named) if (owner, kind) == (s, narrow.ABOUT) else not any(named), (s, owner, kind)
    worded = {
        split: {i.matching for (*_, at), x in found.items.items() if at == split for i in x}
        for split in ("dev", "test")
    }
    assert worded["test"] == set(narrow.REFUSED) and not worded["dev"] & worded["test"]
    small = found.trimmed(2, 1)
    assert small.subjects == found.subjects[:2] and {len(x) for x in small.items.values()} == {1}


def test_a_line_that_is_no_request_is_named(tmp_path):
    good = {"subject": "tin", "kind": "about", "split": "dev", "question": "q", "answer": "a", "refusal": "r"}
    file = tmp_path / "r.jsonl"
    file.write_text(json.dumps(good) + "\n" + json.dumps({**good, "kind": "far"}))
    with pytest.raises(DataError, match="r.jsonl, line 2: .* kind one of about, near, unrelated"):
        narrow.load(file)
    file.write_text(json.dumps(good))
    with pytest.raises(DataError, match="tin has no requests of kind about, split test"):
        narrow.load(file)


def test_stock_phrases_see_some_refusals_and_no_answers():
    refusal = behaviors.load_behavior("refusal")
    seen, false = (narrow.stock([getattr(i, k) for i in refusal.test]).mean() for k in ("matching", "non_matching"))
    assert 0.3 < seen < 0.9 and false < 0.1


# --- gates ---------------------------------------------------------------------------------------------------------------


def test_a_threshold_parts_what_can_be_parted():
    assert narrow.threshold(np.array([5.0, 6]), np.array([0.0, 1, 2])) == 3.5
    assert narrow.threshold(np.array([5.0]), np.array([0.0, 4.9, 9])) > 4.9


def test_a_condition_vector_opens_for_its_side_of_a_plane_and_is_blind_where_there_is_none():
    about, near, unrelated = narrow.condition(narrow.pool(narrow.planted(0), narrow.planted(1)))
    assert about.all() and not near.any() and not unrelated.any()
    blind = []
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        dev, test = ({k: torch.randn(6, 32, generator=g) for k in narrow.KINDS} for _ in range(2))
        about, near, _ = narrow.condition(narrow.pool(dev, test))
        blind.append(about.mean() - near.mean())
    assert abs(np.mean(blind)) < 0.1
    for kind, x in (spoken := narrow.planted(1)).items():  # the same said by one token in twenty
        quiet = [torch.randn(20, 32, generator=g) for _ in x]
        for rows, one in zip(quiet, x, strict=True):
            rows[7] = 5 * one
        spoken[kind] = quiet
    about, near, _ = narrow.condition(narrow.pool(narrow.planted(0), narrow.planted(1)), largest=True)
    assert about.all() and not near.any()
    dev = {k: [torch.cat([x[None], torch.randn(19, 32, generator=g)]) for x in v] for k, v in narrow.planted(0).items()}
    about, near, _ = narrow.condition(narrow.pool(dev, spoken), largest=True)
    assert about.mean() > 0.8 and near.mean() < 0.2
    across = torch.eye(32, dtype=torch.float64)[5]  # a direction along the plane
    about, near, _ = narrow.condition(narrow.pool(narrow.planted(0), narrow.planted(1)), across)
    assert about.mean() - near.mean() < 0.6


def test_the_latent_of_a_plant_is_found_and_opens_for_it_alone():
    def codes(seed):
        g = torch.Generator().manual_seed(seed)
        found = {k: torch.rand(5, 40, generator=g) for k in narrow.KINDS}
        found[narrow.ABOUT][:, 7] += 3
        return found

    best, (about, near, unrelated) = narrow.latent(codes(0), codes(1))
    assert best == 7 and about.all() and not near.any() and not unrelated.any()


def made(about, near, lab=None):
    """A study in which requests moved so far."""
    own = {narrow.ABOUT: about, narrow.NEAR: near, narrow.UNRELATED: near[:, :2]}
    zero = {k: np.zeros_like(x) for k, x in own.items()}
    subjects = narrow.Requests({}, [f"s{i}" for i in range(len(about))])
    return narrow.Narrow(
        lab, subjects, torch.eye(len(about)), 0.3, own, own, zero, own, {k: x[None] for k, x in own.items()},
        {k: x > 1 for k, x in own.items()}, {k: x > 9 for k, x in own.items()}, np.eye(len(about)),
    )  # fmt: skip


def judged(found, gate=None):
    ledger = claims.Ledger()
    ledger.state("1", "spares", claims.at_least(0.5, 0.1), source="s", unit="u", over="subjects", null="dealt")
    null = found.dealt(400) if gate is None else found.by_chance(gate[1])
    ledger.judge("1", stats.ratio_if_clear(*found.spared(gate and gate[0])), null)
    return ledger["1"].verdict


def test_the_rule_of_sparing_holds_for_a_direction_that_spares_and_fails_for_one_that_does_not():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2, 12, 4)) * 0.3
    assert judged(made(4 + noise[0], 0.5 + noise[1])) == "holds"
    assert judged(made(4 + noise[0], 4 + noise[1])) == "fails"


def test_the_rule_holds_for_a_gate_that_knows_and_not_for_one_that_does_not():
    rng = np.random.default_rng(1)
    found = made(4 + rng.normal(size=(12, 4)) * 0.3, 4 + rng.normal(size=(12, 4)) * 0.3)

    def gate(about, near):
        return narrow.Gate(*(rng.random((12, n)) < p for p, n in ((about, 4), (near, 4), (near, 2))))

    chance = [gate(0.5, 0.5) for _ in range(100)]
    assert judged(found, (gate(1.0, 0.0), chance)) == "holds"
    assert judged(found, (gate(0.5, 0.5), chance)) == "fails"
    shut = gate(0.0, 0.0)
    assert not any(x.any() for x in (*found.gated(shut).values(), *found.paid(shut).values()))
    assert judged(found, (shut, chance)) == "fails"
    every = gate(1.0, 1.0)
    np.testing.assert_array_equal(found.gated(every)[narrow.NEAR], found.gated(None)[narrow.NEAR])
    both = every.both(shut)
    assert not any(x.any() for x in both)
    assert found.reads(None)[narrow.ABOUT] == 1 and found.reads(shut)[narrow.ABOUT] == 0
    assert len(found.cells("g", every)) == len(narrow.GATES)


def test_what_answers_differ_by_is_taken_out_and_what_a_direction_knows_stays():
    rng = np.random.default_rng(2)
    ease = {kind: rng.normal(size=(12, 4)) * 4 for kind in narrow.KINDS}
    control = {kind: 3 + x for kind, x in ease.items()}
    blind = {kind: 2 + 0.8 * x + rng.normal(size=x.shape) * 0.2 for kind, x in ease.items()}
    knows = {kind: x + 2 * (kind == narrow.ABOUT) for kind, x in blind.items()}
    spread = [x[narrow.ABOUT].std() for x in (blind, narrow.adjusted(blind, control))]
    assert spread[1] < 0.1 * spread[0]
    gaps = [
        x[narrow.ABOUT].mean() - x[narrow.NEAR].mean() for x in (narrow.adjusted(w, control) for w in (blind, knows))
    ]
    assert gaps == pytest.approx([0, 2], abs=0.15)
    still = {kind: np.ones((12, 4)) for kind in narrow.KINDS}
    np.testing.assert_array_equal(narrow.adjusted(blind, still)[narrow.NEAR], blind[narrow.NEAR])


def test_the_study_of_a_model_is_to_first_order_what_its_gradients_say(lab, best):
    requests = narrow.load().trimmed(3, 2)
    found = narrow.of(lab, requests, 1e-5, SMALL)
    for kind in narrow.KINDS:
        first = np.stack([found.first_order[kind][i, i] for i in range(3)])
        assert found.own[kind].shape == (3, 2) and found.raw[kind] == pytest.approx(first, rel=0.1, abs=0.02)
        assert (found.cost[kind] >= 0).all() and found.read[kind].shape == (3, 2)
    assert found.steps.shape == (4, 48) and found.halves.shape == (3, 3)
    assert found.selectivity().shape == (4, 3)
    gate, rest = found.by_condition(), found.at_random(3)
    assert gate.about.shape == (3, 2) and len(rest) == 3 and np.isfinite(found.by_chance(rest)).all()
    sae = sae_of("topk", unit(torch.randn(96, 48)), k=8, rescale_acts_by_decoder_norm=False)
    codes = found.codes(sae)
    by_latent, which = found.by_latent(codes)
    assert by_latent.near.shape == (3, 2) and len(which) == 3
    dealt = found.relabelled(codes, 3)
    assert len(dealt) == 3 and [x.shape for x in dealt[0]] == [x.shape for x in by_latent]
    assert found.by_condition(largest=True).about.shape == (3, 2)
    named = found.by_word()
    assert [x.shape for x in named] == [x.shape for x in by_latent] and named.about.all() and not named.unrelated.any()
    assert {k: x.shape for k, x in found.by_prompt().items()} == dict.fromkeys(narrow.KINDS, (3,))


# --- one call before use -------------------------------------------------------------------------------------------------


def test_a_check_says_use_it_turn_it_round_or_leave_it(lab, best):
    def said(v):
        return checks.check(of(lab, v), lab, "joy", price=0.002, items=4, draws=300, sizes=SMALL)

    yes, no = said(best["joy"]), said(-best["joy"])
    assert yes.random < 0.05 and yes.response.value > 0 > no.response.value and no.random > 0.5
    assert yes.strength * lab.residual_norm == pytest.approx(yes.multiplier * float(best["joy"].norm()))
    assert yes.sentence != no.sentence and yes.price < 0.1 and yes.reached
    assert "| p against shuffled pairs |" in yes._repr_markdown_()
    blind = [said(torch.randn(48, generator=torch.Generator().manual_seed(i))).random for i in range(8)]
    assert np.median(blind) > 0.1


def test_what_a_check_concludes():
    def sentence(low, high, random, shuffled):
        return checks.Check(
            "v", "joy", 1, stats.Interval((low + high) / 2, low, high), 0.1, random, shuffled, 0.3, 0.2, 2.0, True
        ).sentence

    assert sentence(1, 2, 0.01, 0.01).startswith("It steers *joy*: ")
    assert sentence(1, 2, 0.01, None).startswith("It steers *joy*: ")
    assert "no further than chance" in sentence(1, 2, 0.2, 0.01) and "no further than chance" in sentence(
        1, 2, 0.01, 0.2
    )
    assert "the wrong way" in sentence(-2, -1, 0.9, 0.9)
    assert "does not clearly move" in sentence(-1, 1, 0.01, 0.01)


def test_foreign_files_get_the_same_answer_as_the_vector_that_they_hold(lab, best, tmp_path):
    v = of(lab, best["joy"].float())
    rows = torch.zeros(5, 48)
    rows[2] = v.vector  # what enters block 2 is what block 1 puts out
    torch.save(rows, tmp_path / "joy_response_avg_diff.pt")
    caa.save_vector(v, tmp_path / "own")
    given = {
        "folder": (caa.export_direction(v, tmp_path / "refusal"), None),
        "gguf": (caa.export_repeng([v], tmp_path / "v.gguf", "llama"), 1),
        "persona": (tmp_path / "joy_response_avg_diff.pt", 2),
        "own": (tmp_path / "own.safetensors", None),
    }
    wanted = checks.check(v, lab, price=0.002, items=4, draws=50, sizes=SMALL)
    for path, layer in given.values():
        found = checks.check(path, lab, "joy", layer, price=0.002, items=4, draws=50, sizes=SMALL)
        assert found.layer == 1 and found.response == pytest.approx(wanted.response, rel=1e-3)
        assert found.multiplier == pytest.approx(wanted.multiplier, rel=1e-4)
    other = checks.check(of(lab, best["joy"], layer=2), lab, price=0.002, items=4, draws=50, sizes=SMALL)
    assert other.layer == 2


@pytest.mark.parametrize(
    ("width", "layer", "behavior", "said"),
    [
        (40, 1, "joy", "has 40 dimensions and tiny-llama 48"),
        (48, 4, "joy", "is for layer 4; tiny-llama has layers 0 to 3"),
        (48, 1, "hope", "behaviour 'hope' was given; the study has joy"),
    ],
)
def test_a_vector_of_another_model_or_behaviour_is_refused(lab, width, layer, behavior, said):
    with pytest.raises(ValueError, match=said):
        checks.check(of(lab, torch.ones(width), layer), lab, behavior)
