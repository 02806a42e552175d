"""The quickstart notebook: its cells run in order, and the outputs saved in it are whole and name no machine."""

import json
import re
from pathlib import Path

import matplotlib
import pytest
import torch

from ajepa.utils.json_files import read_json

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
SMALL = {"steps": 8, "n_clips": 110}  # five clips of each class, of which one is for the test


def cells(kind: str) -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    """The code of a cell without the lines that need IPython."""
    return "".join(line for line in cell["source"] if not line.startswith(("%", "from IPython")))


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


@pytest.fixture
def pictures(monkeypatch):
    """The pictures that the cells show: names of files, and figures."""
    import matplotlib.pyplot as plt

    def show():
        shown.extend(plt.figure(number) for number in plt.get_fignums())
        plt.close("all")

    shown = []
    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", show)
    with matplotlib.rc_context():
        yield shown


@pytest.fixture
def names(pictures, tmp_path, monkeypatch):
    """The variables of the notebook, which runs in an empty folder, with stand-ins for IPython's display."""

    def image(path, width):
        assert Path(path).read_bytes().startswith(b"\x89PNG") and width > 0
        return Path(path).name

    monkeypatch.chdir(tmp_path)
    return {"Image": image, "display": pictures.append}


@pytest.mark.slow
def test_the_cells_run_in_order(names, pictures, tmp_path, capsys):
    for number, cell in enumerate(cells("code")):
        exec(compile(source(cell), f"cell {number}", "exec"), names)
        if "parameters" in tags(cell):
            assert SMALL.keys() <= names.keys()
            names.update(SMALL)
    printed = capsys.readouterr().out

    run, summary = tmp_path / names["folder"], names["summary"]
    assert summary == read_json(run / "summary.json") and summary["steps"] == SMALL["steps"]
    assert [picture for picture in pictures if isinstance(picture, str)] == ["curves.png", "masks.png"]
    masks, components = (picture for picture in pictures if not isinstance(picture, str))
    assert [axis.get_title().partition(":")[0] for axis in masks.axes] == [
        "log-mel",
        "random",
        "block",
        "time-frequency",
    ]
    assert all(line.get_ydata().std() > 0 for line in components.axes[-1].lines[:3])
    encoder, frames = names["encoder"], names["frames"]
    wanted = sum(chunk.frames for chunk in encoder.chunks(len(names["sound"]) * encoder.sampling_rate // names["rate"]))
    assert frames.shape == (1, wanted, encoder.output_dim) and frames.isfinite().all()

    for pooling in ("mean", "concat"):
        result = json.loads((run / f"probe-{pooling}" / "probe.json").read_text())
        assert result["folds"][0]["seen_in_pretraining"] == 0
        for features, scores in result["scores"].items():
            row = " +".join([features, pooling, r"\d+", *(f"{score['mean']:.1%}" for score in scores.values())])
            assert re.search(f"^{row}$", printed, re.MULTILINE), f"no {row} in:\n{printed}"

    # the cell that trains can be run again: the finished run is not trained further
    before = {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/*")}
    (training,) = (cell for cell in cells("code") if "ajepa.train(" in source(cell))
    exec(source(training), names)
    assert before and {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/*")} == before
    assert names["summary"] == summary


def test_the_log_mel_picture_is_the_spectrogram(names):
    """The notebook puts patches back together; the result must be what the front end computes without patches."""
    import ajepa
    from ajepa_kernels import log_mel

    names |= {"config": ajepa.preset("tiny"), "steps": SMALL["steps"]}
    first, *rest = map(source, cells("code"))
    for text in [first, *(text for text in rest if "rate = 44_100" in text or "MaskSampler(" in text)]:
        exec(text, names)
    wanted = log_mel(names["pcm"], names["spec"], layout="spectrogram")[0]
    torch.testing.assert_close(names["log_mel"], wanted)


def test_the_saved_outputs_are_whole():
    """The notebook was saved after one execution from top to bottom: each cell that shows something has its output."""
    code = cells("code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        kinds = [output["output_type"] for output in cell["outputs"]]
        assert "error" not in kinds
        assert all(output.get("name") != "stderr" for output in cell["outputs"]), cell["outputs"]
        shows = [word in source(cell) for word in ("print(", "ajepa.train(", "display(", "plt.show(")]
        assert ("stream" in kinds) == any(shows[:2]), source(cell)
        assert kinds.count("display_data") == sum(shows[2:]), source(cell)
    steps = next(re.search(r"steps = ([\d_]+)", source(cell))[1] for cell in code if "parameters" in tags(cell))
    assert f"finished {int(steps)} steps" in json.dumps([cell["outputs"] for cell in code])


def test_the_saved_notebook_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 600_000
    words = json.dumps(
        [[o.get("text"), o.get("data", {}).get("text/plain")] for c in cells("code") for o in c["outputs"]]
    )
    assert not re.search(r"(?<![\w.])(/|~/|[A-Z]:\\)\w", words), "an absolute path"
    assert "\\u001b" not in words and "text/html" not in text, "control characters of a terminal, or HTML"


def test_the_links_of_the_notebook_resolve():
    links = re.findall(r"\]\(([^)#]+)", "".join("".join(cell["source"]) for cell in cells("markdown")))
    assert links
    for link in links:
        assert (NOTEBOOK.parent / link).exists(), link
