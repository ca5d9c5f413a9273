"""The command: options, the JSON file, the table and the pictures."""

import json
import os
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks.case import Case, Result
from benchmarks.command import STAGES, main
from benchmarks.report import draw


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(stage, case, *options) -> the JSON file's contents, after ``main`` ran this case."""
    for name in ("RAYON_NUM_THREADS", "KINETO_LOG_LEVEL"):  # main sets them: restore them
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def run_main(stage, case, *options):
        monkeypatch.setitem(STAGES, stage, lambda device: iter([case]))
        main(["--stage", stage, "--output", str(tmp_path), "--default-malloc", *options])
        return json.loads((tmp_path / "cpu.json").read_text())

    yield run_main
    torch.set_num_threads(1)


def test_command_writes_json_and_a_picture(run, tmp_path, capsys):
    """The ratios in the file are those in the table; other stages' results stay in the file."""
    case = Case(
        "matching",
        "tiny",
        {"detectron2": lambda: torch.ones(1 << 22).sum(), "ours": lambda: torch.ones(8).sum()},
        lambda results: "not compared",
    )
    written = run("matching", case, "--rounds", "2")
    ours = written["results"][1]
    assert (ours["case"], ours["implementation"]) == ("tiny", "ours") and ours["ratio"] > 1
    assert f"{ours['ratio']:.2f}x" in capsys.readouterr().out
    machine = written["machine"]
    assert machine["threads"] == 1 and machine["torch"] == torch.__version__
    assert machine["clock"] == "CPU time of the process" and machine["malloc"] == "default"
    assert machine["detectron2's compiled parts"] in ("yes", "no")
    assert (tmp_path / "cpu.png").stat().st_size > 1000

    other = Case("mapper", "other", {"ours": lambda: 1}, lambda results: "")
    again = run("mapper", other, "--rounds", "1")["results"]
    assert again[:2] == written["results"] and again[2]["stage"] == "mapper"


def test_published_results_have_the_fields_of_a_result(repo):
    """docs/benchmarks/cpu.json can be read and continued by the command."""
    published = json.loads((repo / "docs" / "benchmarks" / "cpu.json").read_text())
    results = [Result(**r) for r in published["results"]]
    assert {r.stage for r in results} == set(STAGES)


def test_threads_are_set_for_torch_and_hotcoco(run):
    """Implementations that are compared get the same number of threads."""
    seen = []
    case = Case(
        "matching",
        "tiny",
        {"ours": lambda: seen.append((torch.get_num_threads(), os.environ["RAYON_NUM_THREADS"]))},
        lambda results: "",
    )
    machine = run("matching", case, "--rounds", "1", "--threads", "3")["machine"]
    assert set(seen) == {(3, "3")}
    assert (machine["threads"], machine["clock"]) == (3, "wall clock")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_kept_heap_has_no_page_faults(repo):
    """Memory that was freed is used again; by default the system maps it anew each time."""
    code = """
import resource, torch
from benchmarks.machine import keep_heap

def page_faults():
    for _ in range(20):  # freed blocks that are split make the first ones vary
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 24)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return faults

print(page_faults(), keep_heap(), page_faults())
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=repo, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    default, is_kept, kept = result.stdout.split()
    if is_kept == "False":
        pytest.skip("another C library")
    assert int(default) > 100 * max(int(kept), 1)


def test_peers_have_another_colour(monkeypatch, tmp_path):
    """In 16 bit too. The first implementation has no bar: it is the line at 1."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    names = ("detectron2", "detectron2, 16 bit", "torchvision", "ours", "ours, 16 bit")
    results = [
        Result("stage", "case", name, 1, 1, i or None, i, i, None, 1, "equal")
        for i, name in enumerate(names)
    ]
    draw(results, "title", tmp_path / "a.png")
    colors = [bar.get_facecolor() for bar in figures[0].axes[0].patches]
    assert len(colors) == 4 and colors[0] == colors[1] != colors[2] == colors[3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_device_is_one_line():
    """No traceback."""
    with pytest.raises(SystemExit, match="error: --device cuda: torch sees no CUDA device here"):
        main(["--device", "cuda"])


def test_zero_rounds_is_one_line():
    """No traceback; it says what to give."""
    with pytest.raises(SystemExit, match="error: --rounds 0: give 1 or more"):
        main(["--rounds", "0"])
