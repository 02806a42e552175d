"""The gate of a switch: it compares what it says, and its stored results are judged by the present limits."""

import json
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
RESULTS = sorted((EXPERIMENTS / "results").glob("gate-*.json"))


@pytest.fixture
def gate(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    monkeypatch.delitem(sys.modules, "gate", raising=False)
    import gate as module

    yield module
    monkeypatch.delitem(sys.modules, "gate", raising=False)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_stored_results_are_judged_by_the_present_limits(gate, path):
    result = json.loads(path.read_text())
    assert result["limits"] == gate.LIMITS and result["judged"] == gate.judge(result["runs"])
    assert path.with_suffix(".png").exists()
    seeds, steps = result["settings"]["seeds"], result["settings"]["steps"]
    assert {(run["seed"], run["switched"]) for run in result["runs"]} == {
        (seed, switched) for seed in range(seeds) for switched in (False, True)
    }
    assert all(len(run["losses"]) == run["measured"][-1]["step"] == steps for run in result["runs"])


CHANGES = {"cosine": 0.985, "variance": 0.94, "effective_rank": 1.06, "loss": 1.03}


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_each_limit_can_fail_the_gate(gate, change):
    def run(seed: int, switched: bool, **changed: float) -> dict:
        measured = {"step": 20, "cosine": 0.999, "variance": 0.9, "effective_rank": 60.0} | {
            name: factor if name == "cosine" else factor * {"variance": 0.9, "effective_rank": 60.0}[name]
            for name, factor in changed.items()
            if name != "loss"
        }
        losses = [1.0] * 18 + [0.5 * changed.get("loss", 1.0)] * 2  # only the last tenth counts
        return {"seed": seed, "switched": switched, "losses": losses, "measured": [measured]}

    wrong = {} if change is None else {change: CHANGES[change]}
    runs = [run(0, False), run(0, True), run(1, False), run(1, True, **wrong)]
    assert gate.judge(runs)["passed"] == (change is None)
    assert gate.configuration(gate.Arguments(), 3, True).step.target_precision == "fp8"
    assert gate.configuration(gate.Arguments(switch="residual=bf16"), 3, False).step.residual == "fp32"
