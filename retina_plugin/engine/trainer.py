"""The trainer: Detectron2's ``DefaultTrainer`` with this package's keys."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import HookBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, TensorboardXWriter
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from retina_plugin.data import DATASET_MAPPER_REGISTRY
from retina_plugin.data.formats import folder_name
from retina_plugin.data.loader import build_train_loader
from retina_plugin.data.views import build_test_mapper
from retina_plugin.doctor import raise_errors, schedule
from retina_plugin.evaluation import build_evaluators
from retina_plugin.modeling.monitoring import LOG_PERIOD
from retina_plugin.modeling.normalizer import LossNormalizer
from retina_plugin.weights import Checkpointer

from .checkpoint import Checkpoints, best_checkpoint
from .checks import check_batch_size, check_num_classes, check_precision
from .heartbeat import HeartbeatHook
from .hooks import Evaluation, Progress, Results
from .performance import build_detector, prepare_model, training_dtype
from .pictures import EvaluationPictures
from .precise_bn import PreciseBN
from .resume import ResumableTrainer
from .step import StepTrainer
from .step_record import write_record
from .tracking import build_tracking_writers
from .writers import Writers

__all__ = ["Trainer"]

_NO_EVALUATION: Mapping[str, Any] = {}


class Trainer(ResumableTrainer):
    """``DefaultTrainer`` with this package's keys, and with what a training should leave behind.

    The keys are ``TEST.EVALUATORS``, ``INPUT.MAPPER``, ``SOLVER.AMP``, ``SOLVER.ACCUMULATE`` and
    those of speed and memory (``MODEL.COMPILE``, ...). It also keeps the best checkpoint by AP,
    shows a progress bar on a terminal and draws pictures at the end. A training that was killed and
    is resumed ends as if nothing had happened (see :class:`.resume.ResumableTrainer`).

    ``SOLVER.REFERENCE_WORLD_SIZE`` scales batch, learning rate and schedule to the number of
    processes, as in Detectron2.

        trainer = Trainer(setup_cfg("configs/quick/digits_R18.yaml"))
        trainer.resume_or_load(resume=False)
        trainer.train()

    Args:
        cfg: a checked config (see :func:`retina_plugin.engine.check_config`).

    Raises:
        ConfigError: the batch cannot be split over the processes, the schedule cannot be scaled to
            them, the device does not have the precision, or a dataset has another number of
            classes.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's __init__ is not called: it makes the step with Detectron2's trainers
        # (StepTrainer says what they lack), and it gives DistributedDataParallel a GPU id even on
        # the CPU.
        super().__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()  # nobody has: in a notebook, for example
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_batch_size(cfg, comm.get_world_size())
        check_precision(cfg)
        model = self.build_model(cfg)
        # Not in build_model, because evaluation keeps no activations.
        prepare_model(model, activation_checkpointing=cfg.MODEL.ACTIVATION_CHECKPOINTING)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        check_num_classes(cfg)  # again: a COCO file tells its classes when it is loaded
        # With device_ids, DistributedDataParallel would copy the images and synchronise each time.
        model = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
        precision, device_type = training_dtype(cfg), torch.device(cfg.MODEL.DEVICE).type
        self._trainer = StepTrainer(
            model,
            data_loader,
            optimizer,
            passes=cfg.SOLVER.ACCUMULATE,
            precision=precision,
            # Copying the losses synchronises with the GPU: there as rarely as they are written.
            log_period=1 if cfg.MODEL.DEVICE == "cpu" else LOG_PERIOD,
            grad_scaler=torch.amp.GradScaler(device_type) if precision == torch.float16 else None,
            max_skipped_steps=cfg.SOLVER.MAX_SKIPPED_STEPS,
            write_record=functools.partial(write_record, cfg),
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.checkpointer.class_names = _class_names(cfg)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._checkpoints = Checkpoints(
            self.checkpointer,
            cfg.SOLVER.CHECKPOINT_PERIOD,
            cfg.TEST.EVAL_PERIOD,
            config=cfg.dump(),
            loaders=[data_loader],
        )
        self._checkpoints.trainer = weakref.proxy(self)  # a subclass's build_hooks may leave it out
        self.register_hooks(self.build_hooks())

    def run_step(self) -> None:
        """Detectron2's. The inner trainer is told ``max_iter``: it writes its last losses then."""
        self._trainer.max_iter = self.max_iter
        super().run_step()

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks or ours in their place, in Detectron2's order, and more of ours."""
        cfg = self.cfg
        precise_bn = self._build_precise_bn()
        if precise_bn is not None:
            self._checkpoints.loaders.append(precise_bn._data_loader)
        trainer = weakref.proxy(self)
        built: list[HookBase | None] = [
            HeartbeatHook(),
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            precise_bn,
            self._checkpoints,
            Evaluation(
                cfg.TEST.EVAL_PERIOD,
                lambda: trainer._evaluate(),
                lambda: trainer._requests,
                lambda: trainer._say_interrupted(trainer._checkpoints.save_before_evaluation()),
            ),
        ]
        if comm.is_main_process():
            if cfg.DATASETS.TEST:
                built.append(best_checkpoint(cfg, self.checkpointer))
            # Before the writers, which write what the others measure.
            writers = Writers(lambda: trainer.build_writers())
            built += [Progress(cfg), EvaluationPictures(cfg, writers), writers, Results(cfg)]
        return built

    def _build_precise_bn(self) -> PreciseBN | None:
        cfg = self.cfg.clone()
        if not cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(self.model):
            return None
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0
        loader = self.build_train_loader(cfg)
        num_iter = cfg.TEST.PRECISE_BN.NUM_ITER
        return PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, num_iter)

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers and those of ``TRACKING``.

        TensorBoard hides what a resumed training repeats.
        """
        folder = self.cfg.OUTPUT_DIR
        return [
            CommonMetricPrinter(self.max_iter),
            JSONWriter(os.path.join(folder, "metrics.json")),
            # Before TensorBoard's, which deletes the pictures that it has written.
            *build_tracking_writers(self.cfg, resumed=self.start_iter > 0),
            TensorboardXWriter(folder, purge_step=self._last_written("TensorboardXWriter") + 1),
        ]

    def _evaluate(self) -> dict[str, Any]:
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    @property
    def last_evaluation(self) -> Mapping[str, Any]:
        """What :meth:`test` returned last in this training; empty before the first evaluation."""
        return getattr(self, "_last_eval_results", _NO_EVALUATION)

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Detectron2's. The result is checked, as the config was.

        Raises:
            ConfigError: the batch or the schedule cannot be scaled to so many processes.
        """
        raise_errors(schedule.check_reference(cfg))
        scaled = ResumableTrainer.auto_scale_workers(cfg, num_workers)
        raise_errors(schedule.check_scaled(cfg, scaled))
        return scaled

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Detectron2's model with the options that training and evaluation share."""
        model = super().build_model(cfg)
        prepare_model(
            model,
            channels_last=cfg.MODEL.CHANNELS_LAST,
            compile_parts=cfg.MODEL.COMPILE,
        )
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """The training loader with the mapper that the config names.

        It gives this process's part of each batch, and can be resumed at any of them.
        """
        return build_train_loader(cfg, DATASET_MAPPER_REGISTRY.build(cfg, True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's test loader with the mapper that the config names.

        It gives this process's part of the dataset.
        """
        loader = build_detection_test_loader(cfg, dataset_name, mapper=build_test_mapper(cfg))
        check_num_classes(cfg, ("TEST",))
        return loader

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """Detectron2's evaluation on ``DATASETS.TEST``, by :func:`.performance.build_detector`.

        Returns:
            {"bbox": {"AP": ..., ...}}, or with several test sets such a dict for each name.
        """
        check_precision(cfg, eval_only=True)
        return super().test(cfg, build_detector(cfg, model), evaluators)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None
    ) -> DatasetEvaluator:
        """The evaluators that ``TEST.EVALUATORS`` names, as one.

        Args:
            output_dir: where its files go; None: OUTPUT_DIR/inference/NAME, see
                :func:`.folder_name`.
        """
        if output_dir is None:
            output_dir = os.path.join(cfg.OUTPUT_DIR, "inference", folder_name(dataset_name))
        return build_evaluators(cfg, dataset_name, output_dir)

    def state_dict(self) -> dict[str, Any]:
        """Detectron2's state and the moving average of the loss normaliser."""
        state = super().state_dict()
        normalizer = self._normalizer()
        if normalizer is not None:
            state["loss_normalizer_ema"] = normalizer.ema.item()
            state["images_per_pass"] = self._images_per_pass()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`. The checkpoint of Detectron2's trainer has no average."""
        super().load_state_dict(state_dict)
        normalizer = self._normalizer()
        if normalizer is not None and "loss_normalizer_ema" in state_dict:
            # It counts the positives of one pass in one process.
            images = self._images_per_pass()
            factor = images / state_dict.get("images_per_pass", images)
            normalizer.ema.fill_(state_dict["loss_normalizer_ema"] * factor)

    def _images_per_pass(self) -> int:
        solver = self.cfg.SOLVER
        return int(solver.IMS_PER_BATCH // (solver.ACCUMULATE * comm.get_world_size()))

    def _normalizer(self) -> LossNormalizer | None:
        # A user's meta-architecture may have another normaliser, or none.
        model = getattr(self.model, "module", self.model)
        normalizer = getattr(model, "normalizer", None)
        return normalizer if isinstance(normalizer, LossNormalizer) else None


def _class_names(cfg: CfgNode) -> list[str] | None:
    """Of the first training dataset, which is loaded; None if it does not have them."""
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    return list(map(str, names)) if names else None
