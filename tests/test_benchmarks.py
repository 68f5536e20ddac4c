"""The benchmarks run, check their contenders against each other, and end in one line of JSON; their times are not tested."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import verdicts
from helpers.session import ROOT


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("benchmarks.topk_step --d 32 --latents 64 --k 4 --batch 64 --steps 3 --rounds 1", {"ratio_bfloat16", "step_over_addmm", "loss_gaps"}),
        ("benchmarks.harvest --tokens 600 --context 64 --rounds 1", {"ratio_activations_store"}),
        ("benchmarks.pursuit --d 24 --latents 48 --k 3 --vectors 4 --rounds 1", {"ratio_matching", "code_gap"}),
        ("benchmarks.matching --sizes 64 --d 8 --rounds 1 --alone 80", {"certificate_gap", "total_gap"}),
        ("benchmarks.diff_sae --device cpu --d 32 --latents 64 --batch 256 --seconds 1 --rounds 1", {"hours", "peak_gb", "budget_gb"}),
    ],
)  # fmt: skip
def test_a_benchmark_runs_to_its_last_line(command, wanted, packaged):
    done = subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert {"bench", "ratio", "low", "high", "sizes", "device"} | wanted <= set(last) and last["ratio"] > 0


def test_the_page_of_verdicts_has_the_tables_that_the_simulation_makes():
    """Row by row, whatever the numbers: they come of more studies than a test has time for."""
    made, _ = verdicts.tables(studies=8, seed=1)
    page = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
    kept = page.partition(verdicts.MARKS[0])[2].partition(verdicts.MARKS[1])[0]

    def rows(text):
        return [line.split(" | ")[0] for line in text.splitlines() if line.startswith(("|", "#"))]

    assert rows(made) == rows(kept)


def test_a_few_studies_leave_the_page_alone(tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{verdicts.MARKS[0]}\nold\n{verdicts.MARKS[1]}\nafter\n")
    monkeypatch.setattr(verdicts, "tables", lambda studies, seed: (f"{studies} studies", []))
    verdicts.main(["--studies", "8", "--page", str(page)])
    assert "old" in page.read_text() and json.loads(capsys.readouterr().out.splitlines()[-1])["studies"] == 8
    verdicts.main(["--page", str(page)])
    assert page.read_text() == f"before\n{verdicts.MARKS[0]}\n\n4000 studies\n\n{verdicts.MARKS[1]}\nafter\n"
