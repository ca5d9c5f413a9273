"""What reaches the console, and what only the log file."""

import argparse
import logging
import warnings

import pytest
from detectron2.utils.logger import setup_logger

from retina_plugin.engine.console import console, start_log


@pytest.fixture
def loggers():
    """This package's logger and one of Detectron2's."""
    return logging.getLogger("retina_plugin"), logging.getLogger("detectron2.data.build")


@pytest.fixture
def args():
    return argparse.Namespace(config_file="", eval_only=False, resume=False)


def test_console_prints_our_lines_and_all_warnings(capsys, loggers):
    """From INFO on those of this package, from WARNING on those of Detectron2."""
    logging.getLogger("detectron2").setLevel(logging.DEBUG)
    with console(rank=0):
        for logger in loggers:
            for level in ("debug", "info", "warning", "error"):
                getattr(logger, level)("%s of %s", level, logger.name)
    for logger in loggers:
        logger.error("after the end")
    assert capsys.readouterr().out.splitlines() == [
        "info of retina_plugin",
        "WARNING: warning of retina_plugin",
        "ERROR: error of retina_plugin",
        "WARNING: warning of detectron2.data.build",
        "ERROR: error of detectron2.data.build",
    ]


def test_only_the_first_process_prints(capsys, loggers):
    """Not even warnings of the others appear, which are the same."""
    with console(rank=1):
        for logger in loggers:
            logger.error("error")
    assert capsys.readouterr() == ("", "")


def test_exception_of_a_training_is_printed_once(capsys):
    """Detectron2 logs it and raises it again; Python prints it when it ends the process."""
    logger = logging.getLogger("detectron2.engine.train_loop")
    with console(rank=0), pytest.raises(ValueError):
        try:
            raise ValueError("broken")
        except ValueError:
            logger.exception("Exception during training:")
            raise
    assert capsys.readouterr() == ("", "")


def test_deprecations_in_detectron2_are_not_shown():
    """Other warnings are."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with console(rank=0):
            warnings.warn("torch.meshgrid: in an upcoming release", stacklevel=1)
            warnings.warn("pkg_resources is deprecated as an API", stacklevel=1)
            warnings.warn("your learning rate is high", stacklevel=1)
    assert [str(w.message) for w in shown] == ["your learning rate is high"]


def test_environment_and_config_are_in_the_log_file_only(tiny_cfg, tmp_path, args, capfd):
    """So are Detectron2's other lines. Ours are printed and logged."""
    with console(rank=0):
        start_log(tiny_cfg, args)
        logging.getLogger("detectron2").info("Detectron2's line")
        logging.getLogger("retina_plugin").info("our line")
    assert capfd.readouterr() == ("our line\n", "")
    logged = (tmp_path / "output" / "log.txt").read_text()
    for text in ("Environment info:", "Running with full config:", "Detectron2's line", "our line"):
        assert logged.count(text) == 1, text
    assert (tmp_path / "output" / "config.yaml").read_text() == tiny_cfg.dump()


def test_console_that_a_user_has_set_up_stays(tiny_cfg, args, capsys):
    """Only the handlers of ``default_setup`` are removed."""
    setup_logger(name="detectron2", color=False, abbrev_name="mine")
    with console(rank=0):
        start_log(tiny_cfg, args)
        logging.getLogger("detectron2").info("Detectron2's line")
    assert "Detectron2's line" in capsys.readouterr().out
