"""Two processes that evaluate with TEST.AUG have the metrics of one."""

import json
import os
import subprocess
import sys

import pytest
import torch

from retina_plugin.engine import Trainer

VIEWS = "TEST.AUG.ENABLED True TEST.AUG.FLIP False TEST.AUG.MIN_SIZES (48,64)"


@pytest.mark.slow
def test_metrics_are_those_of_one_process(tiny_cfg, tmp_path, repo):
    tiny_cfg.MODEL.RETINANET.PRIOR_PROB = 0.3  # detections in spite of random weights
    torch.manual_seed(0)
    torch.save({"model": Trainer.build_model(tiny_cfg).state_dict()}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(tiny_cfg.dump())
    found = []
    for launcher in ([], ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]):
        output = tmp_path / str(len(found))
        command = [sys.executable, "-m", *launcher, "retina_plugin", "train", "--eval-only"]
        command += ["--config-file", str(tmp_path / "config.yaml"), "--num-gpus", "0"]
        command += [*VIEWS.split(), "MODEL.WEIGHTS", str(tmp_path / "model.pth")]
        command += ["OUTPUT_DIR", str(output)]
        done = subprocess.run(
            command, cwd=repo, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        (path,) = output.rglob("coco_instances_results.json")
        rows = json.loads(path.read_text())
        found.append({(r["image_id"], r["category_id"], *r["bbox"], r["score"]) for r in rows})
    assert found[0] == found[1] and len(found[0]) > 100
