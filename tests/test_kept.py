"""store.kept: what a function of helpers returned comes back whole, and only for the same question."""

import json
from dataclasses import is_dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import store
from helpers.pair import alignment, matching, mixtures, overlap
from helpers.sae import decompose


def test_results_of_every_kind_come_back_and_are_not_computed_again(cache, monkeypatch):
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(40, 16, generator=g), torch.randn(40, 16, generator=g)
    one = mixtures.Steered(A.mean(0), A.mean(0) + 3 * B.mean(0), A)
    changes = [mixtures.Change.of(0.01 * torch.randn(30, 16, generator=g)) for _ in range(5)]
    asked = [
        (matching.match, A, B),
        (matching.references, A, B),
        (decompose.pursuit, A, B[:3], 4),
        (decompose.pursuit_path, A, B[:2], [1, 3]),
        (overlap.best, B[:3], A),
        (alignment.ridge, A, B, (A, B)),
        (mixtures.ruler, mixtures.MEAN, changes, one, 2.0, mixtures.Sizes(2, 2)),
    ]
    first = [store.kept(f, *given) for f, *given in asked]
    made = set(cache.rglob("sidecar.json"))
    again = [store.kept(f, *given) for f, *given in asked]
    assert set(cache.rglob("sidecar.json")) == made and len(made) == len(asked)
    plain = [f(*given) for f, *given in asked]

    def same(a, b):
        assert type(a) is type(b) or isinstance(b, np.generic), (type(a), type(b))
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b)
        elif is_dataclass(a):
            same(vars(a), vars(b))
        elif isinstance(a, dict):
            assert list(a) == list(b)
            for name in a:
                same(a[name], b[name])
        elif isinstance(a, (tuple, list)):
            assert len(a) == len(b)
            names = getattr(a, "_fields", range(len(a)))
            for name, x, y in zip(names, a, b, strict=True):
                if name != "seconds":
                    same(x, y)
        else:
            assert a == b

    same(first, again)
    same(first, plain)


def test_another_argument_or_source_is_another_question(cache, monkeypatch):
    A = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))

    def count():
        return len(list(cache.rglob("sidecar.json")))

    store.kept(decompose.pursuit, A, A[:2], 2)
    store.kept(decompose.pursuit, A, A[:2], k=2)
    assert count() == 1
    store.kept(decompose.pursuit, A, A[:2], 3)
    store.kept(decompose.pursuit, A + 1e-7, A[:2], 2)
    assert count() == 3
    monkeypatch.setitem(store._SOURCE, "helpers.stats", "edited = 1")  # decompose imports it
    store.kept(decompose.pursuit, A, A[:2], 2)
    assert count() == 4
    monkeypatch.setitem(store._SOURCE, "helpers.sae.train", "edited = 1")  # decompose does not
    store.kept(decompose.pursuit, A, A[:2], 2)
    assert count() == 4


def test_an_sae_edited_past_autograd_is_another_question(cache):
    """Weights written through `.data` leave no trace in torch's own version counts."""
    sae = torch.nn.Linear(3, 2)
    sae.cfg = SimpleNamespace(k=1)
    before = store.stated(sae)
    sae.weight.data.mul_(2)
    assert store.stated(sae) != before
    before = store.stated(sae)
    sae.cfg.k = 2
    assert store.stated(sae) != before


def test_what_cannot_be_named_is_refused(cache):
    with pytest.raises(ValueError, match="only functions of helpers"):
        store.kept(np.linalg.norm, torch.zeros(3))
    with pytest.raises(TypeError, match="SimpleNamespace was given"):
        store.kept(decompose.pursuit, SimpleNamespace(), torch.zeros(1, 3), 1)


def test_a_dict_by_numbers_comes_back_by_numbers():
    tensors = {}
    plan = json.loads(json.dumps(store._apart({3: [torch.ones(2)], 14: []}, tensors)))
    found = store._together(dict[int, list[torch.Tensor]], plan, tensors)
    assert list(found) == [3, 14] and torch.equal(found[3][0], torch.ones(2))
