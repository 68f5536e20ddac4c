"""What a notebook starts from, on a small model: padded pairs, and responses of every behaviour to its own vectors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import study
from helpers.lm import scoring
from helpers.steering import behaviors, caa, directions


@pytest.fixture
def lab(tiny, cache, monkeypatch):
    """A model with two small behaviours, its residual norm taken as 10."""
    data = {n: behaviors.trim(behaviors.load_behavior(n), pairs=3, items=4) for n in ("joy", "format")}
    monkeypatch.setattr(study.Single, "residual_norm", 10.0)
    return study.Single(SimpleNamespace(), tiny, 1, [1], data)


def test_padded_pairs_are_read_over_all_positions(lab):
    for n, b in lab.data.items():
        alone = caa.extract_padded(lab.model, b.system_pairs, [1], ["masked", "after"])
        torch.testing.assert_close(lab.vectors(study.PADDED)[n], directions.mean(*alone["masked"].at(1)))
        torch.testing.assert_close(lab.parts()[n]["after"].at(1), alone["after"].at(1))
    assert lab.nulls("joy", 5, kind=study.PADDED)[study.SHUFFLED].shape == (5, 48)


def test_responses_are_gradients_times_vectors_of_one_length(lab):
    vectors = {n: torch.randn(3, 48) for n in lab.names}
    found = lab.responses(vectors, 0.1)
    gradient = lab.gradients()["format"].mean(0)
    v = vectors["format"][2].double()
    assert found.shape == (3, 2) and found[2, 1] == pytest.approx(float(gradient @ (v / v.norm()).numpy()))


def test_changes_per_token_divide_each_log_p_by_its_tokens(lab):
    v = torch.randn(1, 48)
    where = lab.tested()["joy"]
    logp = [where.log_probs(m * v[0] / v.norm() * 10) / where.lengths() for m in (0.0, 0.1)]
    expected = (logp[1] - logp[0]) @ [1, -1]
    np.testing.assert_allclose(lab.change("joy", v, 0.1, per_token=True)[0], expected, atol=1e-4)
    whole = scoring.log_odds(where, [v[0] / v.norm() * 10], [0.0, 0.1])[0]
    np.testing.assert_allclose(lab.change("joy", v, 0.1)[0], whole[1] - whole[0])
