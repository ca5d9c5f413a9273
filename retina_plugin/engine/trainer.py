"""Detectron2's trainer with what a RetinaNet user expects of it."""

from __future__ import annotations

import logging
import os
import weakref
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, TrainerBase, create_ddp_model
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.data.checks import check_num_classes
from retina_plugin.errors import ConfigError
from retina_plugin.evaluation import EVALUATOR_REGISTRY
from retina_plugin.modeling.detector import LOG_PERIOD
from retina_plugin.modeling.normalizer import LossNormalizer

from .hooks import BestCheckpoint, Pictures, ProgressBar
from .precision import Autocast, inference_dtype, make_grad_scaler, training_dtype
from .speed import prepare_model
from .step import StepTrainer

__all__ = ["Trainer"]


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with the evaluator of ``TEST.EVALUATOR``, the mapper of ``INPUT.MAPPER``,
    the best checkpoint by AP, a progress bar on a terminal, pictures at the end, the loss
    normaliser in its checkpoints, and the options of speed and memory (``SOLVER.AMP``,
    ``SOLVER.ACCUMULATE``, ``MODEL.COMPILE``, ...).

    ``SOLVER.REFERENCE_WORLD_SIZE`` scales batch, learning rate and schedule to the number of
    processes, as in Detectron2.

    Args:
        cfg: a checked config (see :func:`retina_plugin.engine.checks.check_config`).
    """

    def __init__(self, cfg: Any) -> None:
        # DefaultTrainer's own __init__ cannot train on several CPU processes: it gives
        # DistributedDataParallel GPU ids in any case.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()  # as Detectron2 does, where nobody has: in a notebook
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_batch_size(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        # a model that is only evaluated keeps no activations, nor has it to do with the limits
        prepare_model(model, activation_checkpointing=cfg.MODEL.ACTIVATION_CHECKPOINTING)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        check_num_classes(cfg)  # again: a user's dataset may know its classes only once loaded
        # device_ids None: DDP would copy the images itself, which synchronises with the GPU
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
        precision = training_dtype(cfg)
        half = precision == torch.float16
        self._trainer = StepTrainer(
            model,
            data_loader,
            optimizer,
            passes=cfg.SOLVER.ACCUMULATE,
            precision=precision,
            # on a GPU as often as Detectron2's writers write: each time it waits for the device
            log_period=1 if cfg.MODEL.DEVICE == "cpu" else LOG_PERIOD,
            grad_scaler=make_grad_scaler(torch.device(cfg.MODEL.DEVICE).type) if half else None,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def run_step(self) -> None:
        """Detectron2's, and the step knows which is the last one: what is left is logged then."""
        self._trainer.max_iter = self.max_iter
        super().run_step()

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
    def build_model(cls, cfg: Any) -> nn.Module:
        """Detectron2's model with the options that training and evaluation share."""
        model = super().build_model(cfg)
        prepare_model(
            model,
            channels_last=cfg.MODEL.CHANNELS_LAST,
            compile_parts=cfg.MODEL.COMPILE,
        )
        return model

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        """Detectron2's loader of batches of ``IMS_PER_BATCH`` with the mapper of the config."""
        mapper = DATASET_MAPPER_REGISTRY.build(cfg, True)
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """The same for a test set; loading may tell how many classes the dataset has."""
        mapper = DATASET_MAPPER_REGISTRY.build(cfg, False)
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        check_num_classes(cfg)
        return loader

    @classmethod
    def test(
        cls,
        cfg: Any,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Detectron2's evaluation on ``DATASETS.TEST``, the model in ``TEST.PRECISION``."""
        device_type = torch.device(cfg.MODEL.DEVICE).type
        return super().test(cfg, Autocast(model, device_type, inference_dtype(cfg)), evaluators)

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
    """``SOLVER.IMS_PER_BATCH`` can be shared evenly by the processes and their passes.

    Raises:
        ConfigError: it cannot, with the nearest batch that can.
    """
    batch, passes = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE
    parts = world_size * passes
    if batch % parts:
        nearest = max(1, round(batch / parts)) * parts
        of_each = f" of SOLVER.ACCUMULATE {passes} passes" if passes > 1 else ""
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} cannot be split over {world_size} "
            f"process{'es' if world_size > 1 else ''}{of_each}: set it to "
            f"{nearest} and SOLVER.BASE_LR to {cfg.SOLVER.BASE_LR * nearest / batch:g}"
        )
