"""``retina doctor``: exit status, what is printed, the files, all checks against each other."""

import io
import json
import sys

import pytest
from PIL import Image

from retina_plugin.cli import main
from retina_plugin.cli.doctor import table
from retina_plugin.doctor import Finding, Report, Severity, StepCost

# A registered dataset, as a user's IMPORTS file has it.
REGISTER = """\
from detectron2.data.datasets import register_coco_instances
register_coco_instances({name!r}, {{}}, {json!r}, {root!r})
"""


@pytest.fixture
def project(tmp_path, tiny_cfg, repo):
    """A folder with a dataset of 4 images, the file that registers it, and a config."""
    name = f"doctor_{tmp_path.name}"
    for i in range(4):
        Image.new("RGB", (64, 64), (i, 90, 30)).save(tmp_path / f"{i}.png")
    boxes = [(8.0, 8.0, 16.0, 16.0), (20.0, 20.0, 40.0, 40.0)]
    images = [{"id": i + 1, "file_name": f"{i}.png", "width": 64, "height": 64} for i in range(4)]
    annotations = [
        {"id": 2 * i + k + 1, "image_id": i + 1, "category_id": k + 1, "bbox": box, "iscrowd": 0,
         "area": box[2] * box[3]}
        for i in range(4)
        for k, box in enumerate(boxes)
    ]  # fmt: skip
    categories = [{"id": 1, "name": "größer"}, {"id": 2, "name": "<b>"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data.json").write_text(json.dumps(content))
    user = tmp_path / f"{name}.py"
    user.write_text(
        REGISTER.format(name=name, json=str(tmp_path / "data.json"), root=str(tmp_path))
    )
    tiny_cfg.IMPORTS = (str(user),)
    tiny_cfg.DATASETS.TRAIN = tiny_cfg.DATASETS.TEST = (name,)
    tiny_cfg.MODEL.RETINANET.NUM_CLASSES = 2
    tiny_cfg.MODEL.RETINANET.LOSS_BACKEND = "eager"  # the others have to be compiled first
    (tmp_path / "config.yaml").write_text(tiny_cfg.dump())
    return tmp_path


def doctor(project, *options):
    """Exit status (0 if none), and the JSON."""
    status = 0
    try:
        main(
            ["doctor", "--config-file", str(project / "config.yaml")]
            + ["--output", str(project / "out"), *options]
        )
    except SystemExit as end:
        status = end.code
    return status, json.loads((project / "out" / "doctor.json").read_text())


def test_sound_project(project, capsys):
    status, content = doctor(project)
    printed = capsys.readouterr().out
    assert status == 0 and content["counts"]["error"] == 0, content["findings"]
    names = [check["name"] for check in content["checks"]]
    assert names[:6] == ["keys", "datasets", "machine", "weights", "batch", "images"]
    assert names[-1] == "one step" and content["step"]["images"] == 2
    assert "images: 4 of 4 read" in printed
    assert printed.splitlines()[-3].startswith("0 errors, ")
    assert printed.splitlines()[-2:] == [
        str(project / "out" / "doctor.html"),
        str(project / "out" / "doctor.json"),
    ]
    assert [c["name"] for c in content["classes"]] == ["größer", "<b>"]
    page = (project / "out" / "doctor.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page and '<td class="name"><b>' not in page


def test_quick_reads_no_image_and_times_no_step(project):
    (project / "1.png").write_bytes((project / "1.png").read_bytes()[:50])
    status, content = doctor(project, "--quick")
    names = [check["name"] for check in content["checks"]]
    assert status == 0 and "images" not in names and "one step" not in names
    assert "anchors" in names


def test_damaged_image_is_an_error(project, capsys):
    (project / "1.png").write_bytes((project / "1.png").read_bytes()[:50])
    status, content = doctor(project)
    errors = [f for f in content["findings"] if f["severity"] == "error"]
    assert status == 1 and len(errors) == 1 and "1.png" in errors[0]["what"] + errors[0]["where"]
    assert "one step" not in [check["name"] for check in content["checks"]]
    assert "1 error, " in capsys.readouterr().out


def test_overrides_are_read_and_reported(project):
    _, content = doctor(project, "--quick", "SOLVER.IMS_PER_BATCH", "4")
    assert content["overrides"] == ["SOLVER.IMS_PER_BATCH", "4"]
    assert any("iterations of 4 images" in f["what"] for f in content["findings"])


def test_numbers_are_those_of_the_scaled_training(project, monkeypatch):
    """The config is for 4 GPUs, and here is one process."""
    timed = []

    def measure(cfg, processes):
        timed.append(cfg.SOLVER.IMS_PER_BATCH // processes)
        return StepCost(3.0, 1, 2, timed[0], processes, "cpu")

    monkeypatch.setattr("retina_plugin.cli.doctor.measure_step", measure)
    options = "SOLVER.REFERENCE_WORLD_SIZE 4 SOLVER.IMS_PER_BATCH 8 SOLVER.MAX_ITER 10".split()
    _, content = doctor(project, *options)
    texts = [finding["what"] for finding in content["findings"]]
    assert timed == [2] and any("4, but here is 1 process, with" in text for text in texts)
    assert any(text.startswith("40 iterations of 2 images are") for text in texts)
    (step,) = [text for text in texts if text.startswith("a step of 2 images takes 3 s")]
    assert "SOLVER.MAX_ITER 40 takes 2.0 minutes" in step


def test_schedule_that_cannot_be_scaled_is_an_error(project):
    cosine = "SOLVER.LR_SCHEDULER_NAME WarmupCosineLR SOLVER.BASE_LR_END 0.001".split()
    status, content = doctor(project, "--quick", "SOLVER.REFERENCE_WORLD_SIZE", "2", *cosine)
    errors = [f["where"] for f in content["findings"] if f["severity"] == "error"]
    assert status == 1 and errors == ["SOLVER.BASE_LR_END"]


def test_wrong_key_and_wrong_dataset_are_both_found(project):
    status, content = doctor(
        project, "--quick", "SOLVER.BASE_LR", "-1.0", "DATASETS.TEST", "('x',)"
    )
    errors = [f["where"] for f in content["findings"] if f["severity"] == "error"]
    assert status == 1 and "SOLVER.BASE_LR" in errors and "DATASETS.TEST" in errors
    assert content["anchors"] is not None  # the rest is examined all the same


def test_dataset_function_that_raises_leaves_the_other_checks(project):
    user = next(project.glob("doctor_*.py"))
    lines = user.read_text().replace("register_coco_instances(", "# ")
    user.write_text(
        lines + "from detectron2.data import DatasetCatalog\n"
        "def load():\n    raise RuntimeError('the server is down')\n"
        f"DatasetCatalog.register({user.stem!r} + 'x', load)\n"
    )
    names = f"('{user.stem}x',)"
    status, content = doctor(project, "--quick", "DATASETS.TRAIN", names, "DATASETS.TEST", names)
    errors = [f for f in content["findings"] if f["severity"] == "error"]
    assert status == 1 and any("the server is down" in f["what"] for f in errors)
    assert "schedule" in [check["name"] for check in content["checks"]]


def test_unreadable_config_is_one_line(tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--config-file", str(tmp_path / "none.yaml")])
    assert str(end.value.code).startswith("error: there is no file")


def test_folder_that_cannot_be_written_is_one_line(project):
    (project / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        main(
            ["doctor", "--quick", "--config-file", str(project / "config.yaml")]
            + ["--output", str(project / "file")]
        )
    assert str(end.value.code).startswith("error: --output: cannot write")


def test_files_go_to_the_output_folder_of_the_config(project):
    main(["doctor", "--quick", "--config-file", str(project / "config.yaml")])
    assert (project / "output" / "doctor" / "doctor.html").is_file()


def test_terminal_without_unicode(project, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    doctor(project, "--quick", "INPUT.MIN_SIZE_TRAIN", "(16,)")
    out.flush()
    assert "gr\\xf6\\xdfer" in out.buffer.getvalue().decode("ascii")


def test_progress_on_a_terminal_is_one_line(project, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    cost = StepCost(0.1, 1, 2, 2, 1, "cpu")
    monkeypatch.setattr("retina_plugin.cli.doctor.measure_step", lambda cfg, processes: cost)
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    doctor(project)
    lines = out.getvalue().split("\n")
    assert lines[0].startswith("\rimages: ") and "read" not in lines[0]
    assert lines[0].rpartition("\r")[2].split() == ["where:", "what,", "and", "what", "to", "do"]


def test_table_is_sorted_and_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    report = Report("c.yaml")
    report.run("x", lambda: [Finding(Severity.NOTE, "A.B", "word " * 60, "mend it")])
    report.run("y", lambda: [Finding(Severity.ERROR, "C" * 100, "bad")])
    lines = table(report).splitlines()
    assert max(map(len, lines)) <= 70
    assert lines[2].startswith("error") and any("-> mend it" in line for line in lines)


def test_names_in_the_data_do_not_reach_the_terminal():
    """They could clear it, or make a line of their own."""
    report = Report("c.yaml")
    finding = Finding(Severity.ERROR, "a.json", "the first: \x1b[2J b.jpg\nwarning  of its own")
    report.run("x", lambda: [finding])
    assert table(report).splitlines()[-1].strip() == "the first: ?[2J b.jpg warning  of its own"
