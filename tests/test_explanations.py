"""Replies to a direction at the X: the right position, the right length, and hits against replies dealt out at random."""

import numpy as np
import torch

from helpers.lm import hooks, reading, replies, tokens
from helpers.sae import explanations
from helpers.sae.latents import Context, Latent


def test_the_direction_is_added_at_the_x_alone_and_as_long_as_asked(tiny, monkeypatch):
    question = tokens.chat(tiny.tokenizer, explanations.QUESTION)
    clean = reading.residuals(tiny, [question], 2)[0]
    seen = []

    def write(lm, batch, max_new_tokens):
        with hooks.capture(lm, [2]) as acts:
            reading.forward(lm, batch)
        seen.append(acts[2] - clean)
        return torch.full((len(batch.ids), max_new_tokens), -1)

    rows = torch.randn(3, tiny.d_model, dtype=torch.float64)
    monkeypatch.setattr(replies, "write", write)
    assert explanations.replies_to(tiny, 2, rows, 5.0, 4) == ["", "", ""]
    at = tiny.tokenizer.decode(question.ids).index("X")
    at = next(i for i in range(len(question.ids)) if len(tiny.tokenizer.decode(question.ids[: i + 1])) > at)
    long = rows / rows.norm(dim=1, keepdim=True) * 5
    assert torch.allclose(seen[0][:, at].double(), long, atol=1e-4)
    assert float(seen[0][:, :at].abs().max()) < 1e-5 > float(seen[0][:, at + 1 :].abs().max())


def test_nothing_added_is_the_plain_reply(tiny):
    rows = torch.randn(2, tiny.d_model)
    said = explanations.replies_to(tiny, 1, rows, 0.0, 6)
    assert said == [replies.generate(tiny, [explanations.QUESTION], max_new_tokens=6)[0]] * 2


def test_known_words_are_read_at_their_last_token_less_their_mean(tiny):
    words = ["music", "water"]
    found = explanations.of_words(tiny, 1, words)
    assert torch.allclose(found.sum(0), torch.zeros(tiny.d_model), atol=1e-4)
    asked = [tokens.chat(tiny.tokenizer, f"What is the meaning of {w}?") for w in words]
    for q, w in zip(asked, words, strict=True):
        last = max(i for i, role in enumerate(q.roles) if role == tokens.USER) - 1
        assert tiny.tokenizer.decode(q.ids[: last + 1]).endswith(w)


def test_words_of_a_latent_are_whole_words_of_four_letters_or_more():
    latent = Latent(0, 0.1, [Context("a ", " Garden", ".", 1.0)], [" tea", "'s", " River", "x1y2"], [])
    assert explanations.words_of(latent) == {"garden", "river"}
    table = explanations.hits(["A Garden.", "gardens, rivers", "by the RIVER"], [{"garden"}, {"river"}, {"music"}])
    assert table.tolist() == [[True, False, False], [False, False, True], [False, False, False]]


def test_gain_is_one_for_replies_that_name_their_latent_and_zero_for_dealt_ones():
    assert explanations.gain(np.eye(5, dtype=bool)).tolist() == [1] * 5
    assert explanations.gain(np.ones((5, 5), dtype=bool)).tolist() == [0] * 5  # one reply for all
    tables = [np.eye(5, dtype=bool), np.eye(4, dtype=bool)]
    null = explanations.dealt(tables, 2000)
    assert abs(null.mean()) < 0.02 and (null < 0.9).mean() > 0.99


def test_known_words_are_named_where_the_replies_hold_them(tiny, monkeypatch):
    def replies_to(lm, layer, rows, length, max_new_tokens):
        return [f"It is {w if i < 3 * length else 'tin'}." for i, w in enumerate(explanations.WORDS)]

    monkeypatch.setattr(explanations, "replies_to", replies_to)
    assert explanations.named(tiny, 1, [1, 2]) == [0.25, 0.5]
