"""The benchmarks' result files and what the report makes of them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ajepa.config import PRESETS, ObjectiveConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_device
import records
import report
import result_files
from sources import fingerprint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def timed(benchmark="op", shape="64 rows", variant="ajepa op", **more):
    fields = {"median_ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.2, "floor_share": 0.5, "ratio_to_plain": 3.0,
              "ratio_to_best_peer": 1.5, "best_peer": "torch.compile"}  # fmt: skip
    return {"benchmark": benchmark, "variant": variant, "shape": shape, **fields, **more}


def steps(batch: int, grows: bool = False) -> list[dict]:
    benchmark, shape = ("scaling", f"batch {batch}; depth 4") if grows else ("train_step", f"tiny, batch {batch}")
    common = {"model": "tiny", "batch": batch, "mfu": 0.25, "peak_bytes": None}
    common |= {"grows": "batch", "x": batch} if grows else {}
    phases = {"front end": 0.1, "forward": 0.7, "backward": 1.0, "update": 0.2}
    return [
        timed(benchmark, shape, variant, median_ms=ms, clips_per_second=1e3 * batch / ms, ratio_to_plain=4 / ms,
              phases_ms=phases, **common)
        for variant, ms in (("eager", 4.0), ("fused", 2.5))
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A result file of a CPU, one of a GPU, and pages with places for the tables."""
    plain = timed(variant="plain PyTorch", median_ms=6.0, ratio_to_plain=1.0, floor_share=0.17)
    lever = timed(benchmark="levers", shape="tiny, batch 4, recompute", variant="recompute", ratio_to_plain=0.83)
    compiled = {**steps(16)[0], "variant": "compile", "median_ms": 2.0, "clips_per_second": 8e3}
    new = [timed(), plain, lever, *steps(16), *steps(64), compiled, *steps(8, True), *steps(32, True)]
    for device, cuda in (("cpu x", None), ("GPU y", "13.0")):
        marks = {"test": "t", "commit": "abc1234", "date": "2026-01-02"}
        result = {"device": device, "cores": 2, "versions": {"torch": "2.11", "cuda": cuda}, "commit": "abc1234",
                  "ceilings": {"copy_gb_per_s": 10.0}, "records": [{**r, **marks} for r in new]}  # fmt: skip
        (tmp_path / f"{device.replace(' ', '-').lower()}.json").write_text(json.dumps(result))
    (tmp_path / "figures").mkdir()
    (tmp_path / "R.md").write_text(page(""))
    (tmp_path / "tables.md").write_text(page("steps") + page("ops") + page("headline"))
    return tmp_path


def page(name: str) -> str:
    begin = report.BEGIN.format(name=f" {name}" if name else "")
    return f"above\n{begin}\nold\n{report.END}\nbelow\n"


def run(folder, *more) -> int:
    pages = ["--pages", str(folder / "R.md"), str(folder / "tables.md")]
    figures = ["--figures", str(folder / "figures" / "measured.json")]  # beside the result files it would be one
    return report.main(["--results", str(folder), *figures, *pages, *more])


def test_what_was_left_out_stands_in_the_results(folder):
    path, why = folder / "cpu-x.json", {"fbank in a CUDA graph": "launched call by call"}
    records.put_left_out(path, "benchmarks/bench_log_mel.py::test_log_mel[a-jepa]", why)
    records.put_left_out(path, "benchmarks/bench_log_mel.py::test_log_mel[audio-jepa]", why)
    assert run(folder) == 0
    line = "- log_mel: fbank in a CUDA graph: launched call by call"
    assert (folder / "README.md").read_text().count(line) == 1
    records.put(path, "other", [timed("other")])
    assert len(json.loads(path.read_text())["left_out"]) == 2, "another test's records leave it alone"
    for name in ("a-jepa", "audio-jepa"):
        records.put_left_out(path, f"benchmarks/bench_log_mel.py::test_log_mel[{name}]", {})
    assert not json.loads(path.read_text())["left_out"]


def test_every_page_agrees_with_the_result_files():
    assert report.main(["--check"]) == 0, "run `python benchmarks/report.py`"


def test_readme_holds_the_headline_and_kernels_page_a_table_of_every_op():
    root = BENCHMARKS.parent
    blocks = [found["name"] for found in report.BLOCK.finditer((root / "README.md").read_text())]
    assert blocks == ["claim", None, "costs"]
    kernels = [found["name"] for found in report.BLOCK.finditer((root / "docs" / "kernels.md").read_text())]
    assert sorted(kernels) == sorted(report.OPS)


def test_report_writes_tables_and_plots_and_check_finds_what_changed(folder, capsys):
    pytest.importorskip("matplotlib", reason="without it there are no plots")
    assert run(folder, "--check") == 1 and "report.py" in capsys.readouterr().err
    assert run(folder) == 0 and run(folder, "--check") == 0
    for name in ("R.md", "tables.md"):
        text = (folder / name).read_text()
        assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert text.count("above\n") == text.count("\nbelow\n") == 3
    assert "| tiny, batch 64 | 4 | - | 2.5 | 25,600 | 1.60 | - | 25% |" in text
    assert "| `op` | 64 rows | 2 | 50% | 3.00 | 1.50 | torch.compile |" in text
    plots = {path.name for path in (folder / "plots").iterdir()}
    assert plots == {f"{d}-{p}.png" for d in ("cpu-x", "gpu-y") for p in ("phases", "rate", "scaling", "throughput")}
    page = (folder / "README.md").read_text()
    assert all(f"(plots/{name})" in page for name in plots)

    assert "### Levers of the step" in page and "x as shipped" in page and "| 0.83 |" in page

    path = folder / "gpu-y.json"
    path.write_text(path.read_text().replace('"median_ms": 2.5', '"median_ms": 2.25'))
    assert run(folder, "--check") == 1


@pytest.mark.parametrize("cases", [1, 2, 5])
def test_no_plot_cuts_off_its_texts(folder, cases):
    """One case gives the narrowest figure, in which the title of the phases once was cut off."""
    pytest.importorskip("matplotlib", reason="without it there are no plots")
    import plots

    result = report.load(folder)[0] | {"device": "NVIDIA H200 with a long name"}
    others = [r for r in result["records"] if r["benchmark"] != "train_step"]
    result["records"] = others + [{**r, "commit": "c"} for i in range(cases) for r in steps(2**i)]
    for draw in (plots.rate, plots.phases, plots.throughput, plots.scaling):
        figure = draw(result)
        figure.draw_without_rendering()  # lays it out
        drawn, whole = figure.get_tightbbox(figure.canvas.get_renderer()), figure.bbox_inches.padded(0.01)
        assert (drawn.min >= whole.min).all() and (drawn.max <= whole.max).all(), draw.__name__
        plots.plt.close(figure)


def test_headline_is_the_case_that_all_engines_ran(folder):
    assert run(folder) == 0
    text = (folder / "R.md").read_text()
    assert "| GPU y | tiny, batch 16 | 4,000 | 8,000 | 6,400 | 1.60 | 0.80 | 2026-01-02, abc1234 |" in text
    assert text.count("| tiny, batch") == 2, "one row for each device"
    assert text.split(report.END)[0] in (folder / "tables.md").read_text().replace(" headline, written", ", written")


def test_claim_and_costs_follow_from_the_records(folder, monkeypatch):
    results, tiny = report.load(folder), PRESETS["tiny"]
    tiny = replace(tiny, optim=replace(tiny.optim, batch_size=16, steps=1_000), objective=ObjectiveConfig())
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    assert report.claim(results) == (
        "On one GPU y, a training step of tiny, batch 16 takes 2.5 ms, which is 6,400 clips/s: 1.60 times as fast as "
        "plain PyTorch and 0.80 times as fast as `torch.compile`."
    )
    assert report.claim([]) == report.UNMEASURED
    shards = timed("end_to_end", "tiny, batch 8, shards, 2 cores", "fused", clips_per_second=400.0)
    results[1]["records"].append(shards)
    row = next(line for line in report.costs(results).splitlines() if "`tiny`" in line)
    assert "16,000 clips" in row and "40 s from shards to weights on cpu x (2 cores)" in row
    assert "1 s for the steps alone, without data, on GPU y" in row  # at 25,600 clips/s
    assert "56 V100-hours | not yet measured |" in report.costs(results)

    # a recipe with views costs what the step of its objective takes, for each view
    monkeypatch.setitem(PRESETS, "tiny", replace(tiny, objective=ObjectiveConfig(objective="both", views=2)))
    row = next(line for line in report.costs(results).splitlines() if "`tiny`" in line)
    assert "32,000 clips" in row and "not yet measured" in row
    for objective, rate in (("clip", 6_400.0), ("both", 3_200.0)):
        shape = f"tiny, {objective} objective, 48 recordings x 2 views"
        results[1]["records"].append(timed("clip_step", shape, "fused", clips_per_second=rate))
    row = next(line for line in report.costs(results).splitlines() if "`tiny`" in line)
    assert "10 s for the steps alone, without data, on cpu x (2 cores)" in row


def test_figures_of_single_gpus_are_written_and_checked(folder, capsys):
    """The step of a recipe at each batch, as shipped: the one that does not wait after each step, where both are."""
    path, figures = folder / "gpu-y.json", folder / "figures" / "measured.json"
    result, mark = json.loads(path.read_text()), {"date": "2026-01-02", "commit": "abc1234"}
    common = {"median_ms": 40.0, "p20_ms": 39.0, "p80_ms": 41.0, "mfu": 0.5, "peak_bytes": None, **mark}
    common["clips_per_second"] = 6_400.0
    model = "audio-jepa ViT-B, batch 256"
    result["records"] += [
        timed("train_step", model, "fused", batch=256, **common),
        timed("train_step", model, "eager", batch=256, **{**common, "peak_bytes": 7e9}),
        timed("train_step", f"{model}, masks as drawn", "fused", batch=256, **{**common, "median_ms": 50.0}),
        timed("step", f"{model}, masks as drawn, as shipped", "fused", batch=256, **{**common, "median_ms": 45.0}),
        timed("step", f"{model}, masks as drawn, mlp=plain", "fused", batch=256, **{**common, "median_ms": 60.0}),
        timed("train_step", f"{model}, max-autotune", "fused", batch=256, **common),
        timed("adamw_ema", "85.1 M parameters", "ajepa AdamWEMA", median_ms=0.8, **mark),
        timed("adamw_ema", "85.1 M parameters, remainder", "ajepa AdamWEMA, remainder", median_ms=0.7, **mark),
    ]
    path.write_text(json.dumps(result))
    cpu = json.loads((folder / "cpu-x.json").read_text())
    read = timed("loader, flac", "16 x 320000", "shards", median_ms=100.0, **mark)
    cpu["records"] += [read, {**read, "benchmark": "loader, wav"}, {**read, "variant": "soundfile + DataLoader, flac"}]
    (folder / "cpu-x.json").write_text(json.dumps(cpu))
    assert run(folder, "--check") == 1 and "measured.json differs" in capsys.readouterr().err
    assert run(folder) == 0 and run(folder, "--check") == 0
    made = json.loads(figures.read_text())
    drawn, mean = sorted(made["steps"], key=lambda step: step["masks"])
    assert (drawn["masks"], drawn["ms"], drawn["peak_bytes"]) == ("drawn", 45.0, None)
    assert mean == {
        "device": "GPU y", "preset": "audio-jepa", "size": "B", "masks": "mean", "batch": 256, "ms": 40.0,
        "spread": pytest.approx(2 / 1.683 / 40), "product_share": 0.5, "peak_bytes": 7e9, "peak_of": "eager",
        "when": "2026-01-02, abc1234", "old": False,
    }  # fmt: skip
    update = {"device": "GPU y", "parameters": 85_100_000, "ms": 0.8, "when": "2026-01-02, abc1234"}
    assert made["updates"] == [update]
    (loader,) = made["loaders"]
    assert (loader["cores"], loader["samples"], loader["clips_per_second"]) == (2, 320_000, {"shards": 10_000.0})

    figures.write_text(figures.read_text().replace("40.0", "4.0"))
    assert run(folder, "--check") == 1
    assert run(folder, "--no-readme") == 0 and "4.0" in figures.read_text(), "only the page of the results"


def test_scaling_is_predicted_and_says_where_and_why_efficiency_falls():
    results = report.load(BENCHMARKS / "results")
    text = report.scaling(results)
    assert "**not yet measured on several GPUs**" in text and "before a rebuild" in text
    assert text.count("| GPUs | batch |") == len(report.BATCHES)
    assert text.count("| 256 | 256 |") == 1 and "| 256 | 65,536 |" in text
    assert text.count("below 90 % from") + text.count("at least 90 %") == len(report.BATCHES) * len(report.COLUMNS)
    assert "ms to kernels that fewer clips do not shorten and" in text and "ms to reducing the gradients" in text
    assert report.scaling([{**result, "records": []} for result in results]) == report.UNMEASURED


def test_an_op_has_the_cases_of_devices_that_have_a_kernel_for_it(folder):
    for path in folder.glob("*.json"):
        result = json.loads(path.read_text())
        marks = {"date": "2026-01-02", "commit": "abc1234"}
        result["records"] += [
            timed(op, f"{op} on {result['device']}", f"ajepa {op}", **marks) for op in ("resample", "gelu_mlp")
        ]
        path.write_text(json.dumps(result))
    results = report.load(folder)
    resampled, products = report.op_table("resample", results), report.op_table("gelu_mlp", results)
    assert "| GPU y | resample on GPU y | 2 | 50% |" in resampled and "| cpu x | resample on cpu x |" in resampled
    assert "| GPU y | gelu_mlp on GPU y | 2 |" in products and "cpu x" not in products
    assert "Not yet measured" not in resampled + products
    assert report.op_table("gelu_mlp", results[1:]) == "**Not yet measured on a GPU.**"
    assert report.op_table("resample", results[1:]).startswith("**Not yet measured on a GPU.**\n\n| device |")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (page("no_such_op"), "no section is called 'no_such_op'"),
        (page("ops").replace(report.END, ""), "must stand between the lines"),
        (page("ops").replace(", written by benchmarks/report.py", ""), "must stand between the lines"),
    ],
)
def test_a_page_with_a_wrong_marker_is_named(folder, text, message):
    (folder / "R.md").write_text(text)
    with pytest.raises(SystemExit, match=f"R.md: .*{message}"):
        run(folder)
    assert (folder / "R.md").read_text() == text


def test_without_a_gpu_the_report_says_so(folder):
    pages = (report.headline, report.step_tables, report.op_tables, report.results_page)
    assert not any("Not yet measured on a GPU" in page(report.load(folder)) for page in pages)
    (folder / "gpu-y.json").unlink()
    assert all("Not yet measured on a GPU" in page(report.load(folder)) for page in pages)


def test_figures_of_code_that_has_changed_are_marked(folder):
    """Ours by the hash of their sources; others' code does not change here."""
    path = folder / "gpu-y.json"
    result = json.loads(path.read_text())
    test = "benchmarks/bench_layer_norm.py::test_layer_norm[x]"
    for r in result["records"]:
        r |= {"test": test, "sources": fingerprint(test) if r["shape"] != "64 rows" else "of other code"}
    path.write_text(json.dumps(result))
    assert run(folder) == 0
    marked = [line for line in (folder / "README.md").read_text().splitlines() if "before a rebuild |" in line]
    assert len(marked) == 1 and marked[0].startswith("| `op` | 64 rows") and "2026-01-02, abc1234" in marked[0]
    section = (folder / "tables.md").read_text()
    assert section.count("before a rebuild |") == 1
    assert "A figure *before a rebuild* was measured on code" in (folder / "README.md").read_text()
    assert "| tiny, batch 64 | 4 | - | 2.5 | 25,600 | 1.60 | - | 25% | 2026-01-02, abc1234 |" in section


def test_a_step_its_kernels_and_the_tests_have_their_tables(folder):
    path = folder / "gpu-y.json"
    result = json.loads(path.read_text())
    kernel = {
        "name": "_add_layer_norm_fwd_kernel",
        "kind": "element-wise and norms",
        "ms": 1.5,
        "calls": 24,
        "share": 0.1,
    }
    mark = {"date": "2026-01-02", "commit": "abc1234"}
    alone = timed(
        "step", "ViT-B, batch 256, masks as drawn", "fused", batch=256, clips_per_second=6400.0, mfu=0.5, **mark
    )
    profile = timed("step_profile", "ViT-B", "fused", kinds={"GEMM": 0.6, "idle": 0.1}, kernels=[kernel], **mark)
    result["records"] += [alone, profile]
    result["tests"] = {"passed": 1234, "skipped": 5, "failed": {"tests/test_x.py::test_y": "too slow"},
                       "dates": ["2026-01-02"], "commits": ["abc1234"]}  # fmt: skip
    values = ["1905 MHz", "1980 MHz", "3201 MHz", "610.00 W", "700.00 W", "61", "580.1"]
    result["clocks"] = dict(zip(bench_device.CLOCKS, values, strict=True))
    path.write_text(json.dumps(result))
    assert run(folder) == 0
    page = (folder / "README.md").read_text()
    assert "Under products: 1905 MHz of 1980 MHz, 610.00 W of 700.00 W, memory 3201 MHz; driver 580.1." in page
    assert "1,234 passed, 1 failed, 5 skipped (2026-01-02, at abc1234).\n- tests/test_x.py::test_y: too slow" in page
    assert "| `_add_layer_norm_fwd_kernel` | element-wise and norms | 1.50 | 24 | 10.0% |" in page
    assert "GEMM 60.0%, idle 10.0%." in page
    assert (
        "| ViT-B, batch 256, masks as drawn | 2 | 6,400 | 50% | 2026-01-02, abc1234 |"
        in (folder / "tables.md").read_text()
    )


def test_lines_of_two_devices_become_two_files(tmp_path):
    about = {"cores": 16, "versions": {"torch": "2.11", "cuda": "13.0"}, "commit": "one", "date": "2026-01-01"}
    known = {
        "ceilings": {"copy_gb_per_s": 1.0},
        "left_out": {},
        "records": [{**timed("old", "x"), "test": "b.py::old"}],
    }
    (tmp_path / "h200.json").write_text(json.dumps({"device": "H200", **about, **known}))

    def line(device: str, item: str, outcome: str = "passed", **more) -> dict:
        mark = {"device": device, "commit": "two", "date": "2026-01-02", "sources": "hash"}
        return {"item": item, "outcome": outcome, "mode": "quick", "inputs": "i", **mark, **more}

    lines = [
        {"run": {"device": "H200", **about, "commit": "two"}},
        {"run": {"device": "H100 80GB", **about}},
        line("H200", "benchmarks/bench_a.py::a", records=[timed("a", "x")], left_out={"peer": "absent"}),
        line("H200", "benchmarks/bench_a.py::b", records=[timed("b", "x")]),
        line("H200", "benchmarks/bench_a.py::b", "failed", reason="wrong"),  # its speed stands no longer
        line("H200", "benchmarks/bench_device.py::d", facts={"ceilings": {"copy_gb_per_s": 4.0}, "clocks": {}}),
        line("H200", "tests/test_a.py::a"), line("H200", "tests/test_a.py::b", "failed", reason="no"),
        line("H200", "tests/test_a.py::b"), line("H200", "tests/test_a.py::c", "skipped", reason="no GPU"),
        line("H100 80GB", "benchmarks/bench_a.py::a", records=[timed("a", "x", median_ms=3.0)]),
    ]  # fmt: skip
    paths = result_files.from_journal(lines, tmp_path)
    assert [path.name for path in paths] == ["h200.json", "h100-80gb.json"]
    h200, h100 = (json.loads(path.read_text()) for path in paths)
    assert {(r["benchmark"], r.get("commit"), r.get("sources")) for r in h200["records"]} == {
        ("old", None, None), ("a", "two", "hash"),
    }  # fmt: skip
    assert h200["ceilings"] == {"copy_gb_per_s": 4.0} and h200["commit"] == "two"
    assert h200["left_out"] == {"benchmarks/bench_a.py::a": {"peer": "absent"}}
    assert h200["tests"] == {"passed": 2, "skipped": 1, "failed": {}, "commits": ["two"], "dates": ["2026-01-02"]}
    assert [r["median_ms"] for r in h100["records"]] == [3.0] and "tests" not in h100
    assert result_files.from_journal(lines, tmp_path) == paths
    assert json.loads(paths[0].read_text()) == h200, "the same lines again change nothing"


def test_a_broken_result_file_is_named(folder):
    (folder / "gpu-y.json").write_text('{"records": [')
    with pytest.raises(SystemExit, match=r"gpu-y\.json is no result file"):
        run(folder)


def test_a_partial_run_renews_its_own_records_alone(tmp_path, monkeypatch):
    path = tmp_path / "device.json"
    monkeypatch.setattr(records, "ceilings", lambda: {"copy_gb_per_s": 1.0})
    environment = records.environment()

    def at(commit):
        monkeypatch.setattr(records, "environment", lambda: {**environment, "commit": commit})

    at("one")
    records.put(path, "a.py::test[64]", [timed(shape="64 rows"), timed(shape="256 rows")])
    records.put(path, "b.py::test", [timed("other")])
    at("two")
    records.put(path, "a.py::test[64]", [timed(shape="64 rows", median_ms=1.0)])  # the shape of 256 rows is no more
    kept = {(r["benchmark"], r["shape"]): r for r in records.read(path)}
    assert kept.keys() == {("op", "64 rows"), ("other", "64 rows")}
    assert kept["op", "64 rows"]["commit"] == "two" and kept["op", "64 rows"]["median_ms"] == 1.0
    assert kept["other", "64 rows"]["commit"] == "one"
    assert json.loads(path.read_text())["commit"] == "two"

    records.put(path, "b.py::renamed", [timed("other")])  # the same case, measured by another test
    assert [r["test"] for r in records.read(path) if r["benchmark"] == "other"] == ["b.py::renamed"]
    records.put(path, "b.py::renamed", [])  # its check failed
    assert {r["benchmark"] for r in records.read(path)} == {"op"}
    records.forget_others(path, set())
    assert records.read(path) == []


BENCHMARK = """
import conftest
import pytest
import records
import torch
records.ceilings = lambda: {}

def test_outside_graphs(interleave, monkeypatch):
    monkeypatch.setattr(conftest, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert interleave({"on the CPU": lambda: None}, seconds=0, rounds=2, outside_graphs=["on the CPU"])

@pytest.mark.parametrize("case", [0, 1])
def test_case(case, interleave, record):
    times = interleave({"ajepa op": lambda: None, "plain": lambda: sum(range(999))}, seconds=0, rounds=2)
    record("op", f"case {case}", times, plain="plain", peers=["plain"], more={"ajepa op": {"mfu": 0.5}})
    assert case == 1
"""


def test_a_failed_check_leaves_no_record(tmp_path, monkeypatch):
    """In a process of its own: pytest with the benchmarks' conftest."""
    for name in ("conftest.py", "records.py", "result_files.py", "sources.py"):
        shutil.copy(BENCHMARKS / name, tmp_path / name)
    (tmp_path / "bench_op.py").write_text(BENCHMARK)
    ini = f"[pytest]\npython_files = bench_*.py\npythonpath = . {Path(__file__).parents[1]}\n"
    (tmp_path / "pytest.ini").write_text(ini)
    monkeypatch.setattr(records, "ceilings", dict)
    path = tmp_path / records.results_path().name
    for case in (0, 1):
        records.put(path, f"bench_op.py::test_case[{case}]", [timed(shape=f"case {case}"), timed(shape="another")])

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench_op.py"]
    env = {name: value for name, value in os.environ.items() if name not in ("AJEPA_JOURNAL", "AJEPA_BENCH")}
    env |= {"AJEPA_BENCH_RESULTS": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "1 failed, 2 passed" in done.stdout, done.stdout + done.stderr
    kept = {r["variant"]: r for r in records.read(path)}
    assert {r["shape"] for r in records.read(path)} == {"case 1"}, "case 0 failed, `another` is no more"
    assert kept["plain"]["ratio_to_best_peer"] == 1.0 and kept["ajepa op"]["mfu"] == 0.5
