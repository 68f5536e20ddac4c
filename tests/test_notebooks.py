"""Every notebook runs at its fast setting, judges its claims and draws its figures."""

import json

import pytest

from helpers import claims, report
from helpers.session import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.mark.notebooks
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_runs_at_its_fast_setting(path, packaged, tmp_path):
    assert report.main(["--fast", "--only", path.stem, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "results" / f"{path.stem}.json").read_text())
    assert result["claims"] and all(c["rule"] and c["verdict"] for c in result["claims"])
    assert list((tmp_path / "figures").glob(f"{path.stem[:2]}_*.png"))
    assert 0 < sum(c["main"] for c in result["claims"]) <= claims.MAIN


@pytest.mark.notebooks
@pytest.mark.parametrize("profile", ["known_same", "known_earlier", "known_other"])
def test_a_pair_whose_answer_is_known_runs_through_the_notebooks_about_it(profile, packaged, tmp_path):
    assert report.main(["--fast", "--profile", profile, "--out", str(tmp_path)]) == 0
    for name in ("06_diff_sae", "07_same_features"):
        result = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert result["profile"] == f"{profile}-fast" and all(c["verdict"] for c in result["claims"])
    verdict = result["numbers"]["verdicts"]["the pair's planted: refusal"]
    wrong = {"known_same": ("not the same",), "known_earlier": ("not the same",), "known_other": ("same", "related")}
    assert verdict not in wrong[profile]
