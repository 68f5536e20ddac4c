"""The benchmarks run, check their contenders against each other, and end in one line of JSON; their times are not tested."""

import json
import os
import subprocess
import sys

import pytest

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
