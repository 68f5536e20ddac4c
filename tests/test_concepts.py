"""Trees of words and their category vectors: against libraries and plain runs; measures find a plant and stay silent on noise."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf, ledoit_wolf_shrinkage
from test_study import Session

from helpers import claims, features, stats, study
from helpers.lm import hooks, reading, tokens
from helpers.steering import concepts
from helpers.steering.concepts import Words

WIDTH, LAYER = 200, 1


def a_shape(trees=6, branches=4, learnt=8, held=3):
    """A hierarchy of so many words, without text."""
    n = learnt + held
    branch = np.repeat(np.arange(trees * branches), n)
    out = np.tile(np.arange(n) >= learnt, trees * branches)
    return Words([f"w{i}" for i in range(len(branch))], branch // branches, branch, out)


@pytest.fixture(scope="module")
def shape():
    return a_shape()


def gram(shape, size, seed=0):
    rows = concepts.planted(shape, WIDTH, size, seed)
    return rows @ rows.T


def judged(rule, value, null):
    ledger = claims.Ledger()
    ledger.state("x", "s", rule, source="s", unit="u", over="trees", null="n")
    return ledger.judge("x", value, null).verdict


# --- files ---------------------------------------------------------------------------------------------------------------


def test_there_are_ten_trees_of_three_levels_each_with_a_card_and_held_out_words():
    trees = concepts.load()
    assert len(trees) == 10 and sum(len(b.words) + len(b.held_out) for t in trees for b in t.branches) > 400
    for tree in trees:
        assert len(tree.branches) == 4 and len(tree.card) > 15
        assert all(len(b.words) >= 5 and b.held_out for b in tree.branches)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.replace("card: ", "title: "), "lacks 'card'"),
        (lambda t: t.replace("held_out", "out", 1), "lacks 'held_out'"),
        (lambda t: t.replace("[a, b, c]", "[a, b]"), "three words and one held out"),
        (lambda t: t.replace("[a, b, c]", "[a, b, yes]"), "put it in quotes"),
        (lambda t: t.replace("[a, b, c]", "[a, b, E]"), "more than one place"),
        (lambda t: "- a list", "a tree has a name"),
    ],
)
def test_a_file_that_is_no_tree_is_refused_in_words(tmp_path, change, said):
    tree = (
        "name: n\ncard: c\nchildren:\n  x: {words: [a, b, c], held_out: [d]}\n  z: {words: [e, f, g], held_out: [h]}\n"
    )
    (tmp_path / "one.yaml").write_text(change(tree))
    with pytest.raises(concepts.ConceptError, match=said):
        concepts.load(tmp_path)


def test_words_a_model_lacks_are_left_out_and_so_is_a_branch_or_tree_without_any():
    tree = concepts.Tree
    branch = concepts.Branch
    given = [
        tree(str(i), "c", [branch(f"{i}{j}", [f"{i}{j}{k}" for k in "abc"], [f"{i}{j}d"]) for j in "xyz"])
        for i in range(4)
    ]
    every = [w for t in given for b in t.branches for w in (*b.words, *b.held_out)]
    whole = concepts.of_trees(given)
    assert len(whole.words) == 48 and list(np.bincount(whole.branch)) == [4] * 12 and whole.held.sum() == 12
    some = concepts.of_trees(given, [w for w in every if w != "0xd" and w[:2] not in ("1x", "1y")])
    assert some.branch.max() == 7 and some.tree.max() == 2 and list(some.parents()) == [0, 0, 1, 1, 1, 2, 2, 2]
    with pytest.raises(concepts.ConceptError, match="2 trees have words"):
        concepts.of_trees(given, [w for w in every if w[0] in "01"])


def test_shuffled_words_keep_every_size_and_dealt_branches_stay_whole(shape):
    for seed in range(3):
        mixed = shape.shuffled(seed)
        assert sorted(zip(mixed.tree, mixed.branch, mixed.held, strict=True)) == sorted(
            zip(shape.tree, shape.branch, shape.held, strict=True)
        )
        swapped = shape.exchanged(seed)
        np.testing.assert_array_equal(swapped.tree, shape.tree)
        np.testing.assert_array_equal(np.bincount(swapped.branch), np.bincount(shape.branch))
        np.testing.assert_array_equal(swapped.branch // 4, shape.tree)
        dealt = shape.dealt(seed)
        np.testing.assert_array_equal(dealt.branch, shape.branch)
        assert sorted(dealt.parents()) == sorted(shape.parents()) and (dealt.tree != shape.tree).any()


# --- category vectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 9, 40])
def test_vectors_are_what_linear_discriminant_analysis_with_sklearns_covariance_gives(n):
    rows = np.random.default_rng(n).standard_normal((n + 5, 30)) * np.linspace(0.2, 2, 30) + 1
    own, places = rows[2 : 2 + n], np.arange(2, 2 + n)
    centred = own - own.mean(0)
    assert concepts.shrinkage(centred @ centred.T, 30) == pytest.approx(ledoit_wolf_shrinkage(own), abs=1e-9)
    unit = np.linalg.solve(LedoitWolf().fit(own).covariance_, own.mean(0))
    unit /= np.linalg.norm(unit)
    found = concepts.coefficients(rows @ rows.T, [places], 30) @ rows
    np.testing.assert_allclose(found[0], unit * (unit @ own.mean(0)), rtol=1e-7)


def test_nested_sets_of_noise_are_at_right_angles_and_strangers_are_not(shape):
    for size in (0.0, 1.0):
        g = gram(shape, size)
        assert concepts.right_angles(g, shape, WIDTH).min() > 0.93
        assert concepts.strangers(g, shape, WIDTH).max() < 0.8
    g = gram(shape, 0.0)
    null = np.array([concepts.right_angles(g, shape.shuffled(i), WIDTH).mean() for i in range(20)])
    rule = claims.identity(0.1)
    assert judged(rule, stats.over(concepts.right_angles(g, shape, WIDTH)), null) == "algebra"
    assert judged(rule, stats.over(concepts.strangers(g, shape, WIDTH)), null) == "fails"


def test_children_of_noise_are_corners_of_a_simplex_and_children_on_a_line_are_not(shape):
    assert concepts.corners(gram(shape, 0.0), shape, WIDTH).min() > 0.9
    rng = np.random.default_rng(0)
    line = rng.standard_normal((6, WIDTH))[shape.tree] * (shape.branch % 4)[:, None]
    rows = 0.01 * rng.standard_normal((len(shape.words), WIDTH)) + line + rng.standard_normal((6, WIDTH))[shape.tree]
    assert concepts.corners(rows @ rows.T, shape, WIDTH).max() < 0.7


@pytest.mark.parametrize("measure", [concepts.separation, concepts.among_siblings])
def test_held_out_words_are_told_where_a_category_is_planted_and_not_in_noise(shape, measure):
    def verdict(size):
        g = gram(shape, size, seed=3)
        null = np.array([measure(g, shape.shuffled(i), WIDTH).mean() for i in range(40)])
        value = measure(g, shape, WIDTH)
        return value.mean(), judged(claims.effect(0.1), stats.over(value - null.mean()), null - null.mean())

    assert verdict(0.7)[0] > 0.95 and verdict(0.7)[1] == "holds"
    assert abs(verdict(0.0)[0] - 0.5) < 0.1 and verdict(0.0)[1] in ("fails", "undecided")


def test_unequal_shares_are_seen_where_children_lean_and_not_where_they_do_not():
    """Children that lean against their parent: the published angle stays a right one, what they hold of it differs."""
    shape, rule = a_shape(10), claims.at_most(0.01, 0.01, beats=False)
    for lean, wanted in ((0.0, "holds"), (0.3, "fails")):
        parent = 2 * np.random.default_rng(7).standard_normal((10, WIDTH))[shape.tree]
        rows = concepts.planted(shape, WIDTH, 1.0) + (1 + lean * (shape.branch % 4 - 1.5))[:, None] * parent
        g = rows @ rows.T
        assert concepts.right_angles(g, shape, WIDTH).min() > 0.97
        null = [concepts.unequal(g, shape.exchanged(i), WIDTH).mean() for i in range(20)]
        assert abs(np.mean(null)) < 0.01
        assert judged(rule, stats.over(concepts.unequal(g, shape, WIDTH)), np.mean(null)) == wanted


def test_the_causal_product_makes_the_vocabularys_rows_uncorrelated(tiny):
    every = range(len(tiny.embedding))
    causal, plain = (concepts.unembedded(tiny, every, c) for c in (True, False))
    weight = tiny.unembedding.module.weight.double().numpy()
    np.testing.assert_allclose(plain, weight - weight.mean(0))
    np.testing.assert_allclose(causal.T @ causal / len(causal), np.eye(tiny.d_model), atol=1e-8)


def test_in_the_streams_causal_coordinates_inner_products_are_covariances_of_logits(tiny):
    rows = torch.randn(3, tiny.d_model, generator=torch.Generator().manual_seed(0)).double()
    gain = concepts.final_gain(tiny)
    torch.testing.assert_close(gain, tiny.weights.model.norm.weight.double(), rtol=1e-4, atol=1e-5)
    logits = (rows * gain) @ tiny.unembedding.module.weight.double().T
    found = concepts.as_unembedded(tiny, rows, gain)
    np.testing.assert_allclose(found @ found.T, np.cov(logits.numpy(), bias=True), rtol=1e-6)


def test_a_word_is_read_at_its_last_token_in_each_sentence(tiny, cache):
    found = concepts.in_sentences(tiny, ["anger", "an extraordinary word"], LAYER, ["She wrote", "It was the"])
    for i, word in enumerate(("anger", "an extraordinary word")):
        laid = [tokens.plain(tiny.tokenizer, f"{frame} {word}") for frame in ("She wrote", "It was the")]
        own = torch.stack([x[-1] for x in reading.residuals(tiny, laid, LAYER)]).double().mean(0)
        torch.testing.assert_close(found[i], own, rtol=1e-5, atol=1e-5)


# --- steering ------------------------------------------------------------------------------------------------------------


def test_what_vectors_do_to_the_next_word_is_what_plain_steered_runs_give(tiny):
    vectors = 3 * torch.randn(6, tiny.d_model, generator=torch.Generator().manual_seed(2))
    ids = [5, 17, 300]
    found = concepts.followed(concepts.Following.of(tiny, LAYER), torch.cat([0 * vectors[:1], vectors]), ids)
    assert found.words.shape == (7, 3) and found.kl[0] == 0 and (found.kl[1:] > 0).all()
    for v, words, kl in zip([None, *vectors], found.words, found.kl, strict=True):
        logp, plain = [], []
        for context in concepts.CONTEXTS:
            ids_ = tiny.encode(context)
            plain.append(tiny.weights(ids_).logits[0, -1].log_softmax(-1))
            if v is None:
                logp.append(plain[-1])
                continue
            shift = torch.zeros(ids_.shape[1], tiny.d_model)
            shift[-1] = v
            with hooks.edit(tiny, LAYER, lambda x, shift=shift: x + shift):
                logp.append(tiny.weights(ids_).logits[0, -1].log_softmax(-1))
        p, q = torch.stack(plain), torch.stack(logp)
        np.testing.assert_allclose(words, q[:, ids].double().mean(0), atol=1e-4)
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-4)


def test_raises_are_told_of_own_siblings_and_the_least_of_a_tree(shape):
    change = np.zeros((24, len(shape.words)))
    for b, t in enumerate(shape.parents()):
        change[b] += 1.0  # everywhere: taken off
        change[b, (shape.tree == t)] += 0.5
        change[b, (shape.branch == b)] += 2.0
        change[b, shape.held & (shape.branch == 4 * t)] -= 0.25
    found = concepts.raised(change, shape)
    np.testing.assert_allclose(found["own"], (3 * 2.5 + 2.25) / 4)
    np.testing.assert_allclose(found["least"], (3 * 0.25 + 0.5) / 4)
    np.testing.assert_allclose(found["siblings"], 0.5 - 0.25 * 3 / 11 / 4, atol=1e-9)
    dealt = [concepts.raised(change, shape.dealt(i))["siblings"].mean() for i in range(20)]
    null = [concepts.raised(change, shape.shuffled(i))["siblings"].mean() for i in range(20)]
    assert np.mean(dealt) < 0.25 and np.abs(null).max() < 0.2


def test_at_equal_kl_a_change_is_that_of_the_strength_that_costs_as_much():
    strength = np.array([0.0, 1.0, 2.0, 4.0])
    kl = np.stack([strength**2, 4 * strength**2], 1)  # (strengths, vectors)
    change = np.stack([strength[:, None] * [1.0, 2.0], strength[:, None] * [3.0, 4.0]], 1)
    found = concepts.at_kl(change, kl, 2.25)
    np.testing.assert_allclose(found, [[1.5, 3.0], [2.25, 3.0]])
    np.testing.assert_allclose(concepts.at_kl(change, kl, 1e9)[0], [4, 8])


# --- as the notebook asks ------------------------------------------------------------------------------------------------


@pytest.fixture
def found(tiny, cache):
    """Concepts of a small model, of words that are tokens of its tokenizer."""
    vocabulary = {i: t for t, i in tiny.tokenizer.get_vocab().items()}
    chosen = [t[1:] for i, t in sorted(vocabulary.items()) if t[0] == "Ġ" and t[1:].isalpha() and len(t) > 4]
    shape = a_shape(3, 2, 4, 2)
    words = shape._replace(words=chosen[: len(shape.words)])
    ids = concepts.single_tokens(tiny, words.words)
    lab = study.Single(Session(), tiny, LAYER, [0, LAYER], {})
    lab.__dict__["residuals"] = torch.randn(20, tiny.d_model)
    return features.Concepts(lab, words, list(ids.values()), [f"b{i}" for i in range(6)], ["t0", "t1", "t2"])


def test_each_space_has_its_rows_and_draws_are_of_the_same_measure(found):
    assert set(found.grams) == set(features.SPACES)
    rows = concepts.unembedded(found.lab.model, found.ids, True)
    np.testing.assert_allclose(found.grams[features.CAUSAL], rows @ rows.T)
    assert found.measured(concepts.separation, features.STREAM).shape == (3,)
    draws = found.chance(concepts.separation, features.PLAIN, 4, 1)
    again = concepts.separation(found.grams[features.PLAIN], found.words.shuffled(2), found.lab.model.d_model)
    np.testing.assert_array_equal(draws[1], again)


def test_vectors_have_one_length_siblings_share_their_parents_and_nothing_changes_nothing(found):
    for kind in features.KINDS:
        v = found.vectors(kind)
        torch.testing.assert_close(v.norm(dim=1), torch.full((6,), found.lab.residual_norm))
    parent = found.vectors(features.PARENT)
    assert torch.equal(parent[0], parent[1]) and not torch.equal(parent[1], parent[2])
    steered = found.steered(features.PARENT, [0.1, 0.2])
    assert steered.change.shape == (3, 6, 36) and steered.kl.shape == (3, 6)
    assert not steered.change[0].any() and not steered.kl[0].any()
    whole = concepts.followed(concepts.Following.of(found.lab.model, LAYER), 0.2 * parent, found.ids)
    plain = concepts.followed(concepts.Following.of(found.lab.model, LAYER), 0 * parent[:1], found.ids)
    np.testing.assert_allclose(steered.change[2], whole.words - plain.words, atol=1e-5)
    random = found.by_chance(features.CHILD, [0.1], 2)
    assert [set(w.words) for w, _ in random] == [set(found.words.words)] * 2
    assert not np.array_equal(random[0][1].change, random[1][1].change)


def test_tables_of_a_tree_and_of_what_a_vector_raises(found):
    assert found.listed(1).data.count("\n") == 3
    said = found.says("b2", 0.3).data
    assert "child less parent" in said and "its siblings" in said and SimpleNamespace(n=said.count("\n")).n == 5


@pytest.mark.packaged
def test_every_word_is_one_token_of_the_packaged_model(smol):
    trees = concepts.load()
    every = [w for t in trees for b in t.branches for w in (*b.words, *b.held_out)]
    assert set(concepts.single_tokens(smol, every)) == set(every)
