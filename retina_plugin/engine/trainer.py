"""Detectron2's trainer with what a RetinaNet user expects of it."""

from __future__ import annotations

import os
import weakref
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from retina_plugin.data.checks import check_num_classes
from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import EVALUATOR_REGISTRY
from retina_plugin.modeling.normalizer import LossNormalizer

from .hooks import BestCheckpoint, Pictures, ProgressBar

__all__ = ["Trainer"]


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with the evaluator of ``TEST.EVALUATOR``, the best checkpoint by AP, a
    progress bar on a terminal, pictures at the end, and the loss normaliser in its checkpoints.

    ``SOLVER.REFERENCE_WORLD_SIZE`` scales batch, learning rate and schedule to the number of
    processes, as in Detectron2.

    Args:
        cfg: a checked config (see :func:`retina_plugin.engine.setup.check_config`).
    """

    def __init__(self, cfg: Any) -> None:
        # DefaultTrainer's own __init__ cannot train on several CPU processes: it gives
        # DistributedDataParallel GPU ids in any case.
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_batch_size(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        check_num_classes(cfg)  # again: a user's dataset may know its classes only once loaded
        ddp_args: dict[str, Any] = {"broadcast_buffers": False}
        if cfg.MODEL.DEVICE == "cpu":
            ddp_args["device_ids"] = None
        model = create_ddp_model(model, **ddp_args)
        trainer_class = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer_class(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list:
        """Detectron2's hooks, ours before the writers, so that they write what ours measure."""
        built = super().build_hooks()
        if not comm.is_main_process():
            return built
        *others, writers = built
        if self.cfg.DATASETS.TEST:
            # with several test sets Detectron2 puts the set's name before the metric
            prefix = f"{self.cfg.DATASETS.TEST[0]}/" if len(self.cfg.DATASETS.TEST) > 1 else ""
            others.append(
                BestCheckpoint(self.cfg.TEST.EVAL_PERIOD, self.checkpointer, f"{prefix}bbox/AP")
            )
        return [*others, ProgressBar(), writers, Pictures(self.cfg)]

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """Detectron2's loader; loading may tell how many classes the dataset has."""
        loader = super().build_test_loader(cfg, dataset_name)
        check_num_classes(cfg)
        return loader

    @classmethod
    def build_evaluator(
        cls, cfg: Any, dataset_name: str, output_dir: str | None = None
    ) -> DatasetEvaluator:
        """The evaluator that ``TEST.EVALUATOR`` names; its files go to OUTPUT_DIR/inference/SET."""
        if output_dir is None:
            output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return EVALUATOR_REGISTRY.build(cfg, dataset_name, output_dir)

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's state and the moving average of the loss normaliser."""
        state = super().state_dict()
        normalizer = self._normalizer()
        if normalizer is not None:
            state["loss_normalizer_ema"] = normalizer.ema.item()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; a checkpoint of Detectron2's trainer has no average."""
        super().load_state_dict(state_dict)
        normalizer = self._normalizer()
        if normalizer is not None and "loss_normalizer_ema" in state_dict:
            normalizer.ema.fill_(state_dict["loss_normalizer_ema"])

    def _normalizer(self) -> LossNormalizer | None:
        # a user's own meta-architecture may have another one, or none
        model = getattr(self.model, "module", self.model)
        normalizer = getattr(model, "normalizer", None)
        return normalizer if isinstance(normalizer, LossNormalizer) else None


def check_batch_size(cfg: Any, world_size: int) -> None:
    """``SOLVER.IMS_PER_BATCH`` can be shared evenly by the processes.

    Raises:
        ConfigError: it cannot, with the nearest batch that can.
    """
    batch = cfg.SOLVER.IMS_PER_BATCH
    if batch % world_size:
        nearest = max(1, round(batch / world_size)) * world_size
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} cannot be split over {world_size} processes: set it to "
            f"{nearest} and SOLVER.BASE_LR to {cfg.SOLVER.BASE_LR * nearest / batch:g}"
        )
