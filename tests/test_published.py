"""Published numbers: what depends on weights is read off them; what depends on prompts stands beside ours."""

import pytest
import torch
from test_decompose import sae_of

from helpers import profiles
from helpers.sae import projections, published


def test_what_the_weights_say_and_what_prompts_say_are_found_by_name():
    rows = torch.eye(6)
    rows[1] = torch.tensor([0.6, 0.8, 0, 0, 0, 0])
    sae = sae_of("standard", rows, torch.tensor([2.0, 0, 0, 0, 0, 0]))
    known = profiles.Known(
        zero_code={0: 2.1},
        row_cosine=profiles.RowCosine(latents=(0, 1), value=0.6),
        negative_share=profiles.NegativeShare(behavior="a", value=0.5),
        concept_code=profiles.ConceptCode(behavior="a", latent=2, last=0.9, all=0.8),
    )
    found = published.of_weights(known, sae)
    assert found["zero.0"].value == (2, 2, 2) and found["zero.0"].number == 2.1 and found["zero.0"].chance in (0, 2)
    assert found["rows"].value == pytest.approx((0.6,) * 3)
    pos, neg = rows[[0, 2, 3, 2]], rows[[1, 1, 1, 1]]
    (negative,) = projections.of_vectors(sae, [(pos, neg)], draws=9)
    found = published.of_prompts(known, sae, {"a": negative}, {"last": 4 * (pos - neg)})
    assert list(found) == ["negative", "concept.last"] and found["negative"].value.value == negative.share
    assert found["concept.last"].number == 0.9 and 0 < found["concept.last"].value.value < 1
    assert published.of_weights(profiles.Known(), sae) == published.of_prompts(profiles.Known(), sae, {}, {}) == {}
