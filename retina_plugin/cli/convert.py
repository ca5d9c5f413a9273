"""``retina convert IN --output OUT``: weights of another library, and their config."""

from __future__ import annotations

import argparse
from pathlib import Path

from detectron2.modeling import build_model

from retina_plugin.engine import setup_cfg
from retina_plugin.errors import ConfigError, one_line
from retina_plugin.weights import Checkpointer
from retina_plugin.weights.conversion import (
    SOURCES,
    Converted,
    check_output,
    config_path,
    convert_weights,
    write_converted,
)
from retina_plugin.weights.conversion.resnets import PREFIX

__all__ = ["check_written", "main"]


def main(argv: list[str] | None = None) -> None:
    """Convert, load what was written into the model of its config, and print what was done.

    Files that are there are replaced when the new ones have loaded.

    Raises:
        ConfigError: see :func:`retina_plugin.weights.conversion.convert_file`; an output is there
            already; what was written does not fit its config.
    """
    parser = argparse.ArgumentParser(
        prog="retina convert",
        description=(
            "Convert the weights of another library. The config that belongs to them is written "
            "beside them, as OUT.yaml."
        ),
    )
    parser.add_argument("input", metavar="IN", help="a weights file of any format")
    parser.add_argument("--output", required=True, metavar="OUT", help=".pth or .safetensors")
    parser.add_argument(
        "--from",
        dest="source",
        metavar="LIBRARY",
        help=f"where they are from, if it is not recognised: {', '.join(SOURCES)}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_args(argv)
    output, config = Path(args.output), config_path(args.output)
    check_output(args.input, output)
    for path in (output, config):
        if path.exists() and not args.overwrite:
            raise ConfigError(f"{path} is there already: --overwrite replaces it")
    source, converted = convert_weights(args.input, args.source)
    says = {"Input": f"{args.input}, weights of {source.name}"}
    names, num_classes = converted.class_names, _num_classes(converted)
    says["Tensors"] = str(len(converted.state))
    if num_classes:
        says["Classes"] = f"{num_classes} ({_some(names) if names else 'unknown names'})"
    for name, text in says.items():
        print(f"{name:8} {one_line(text)}")
    for note in converted.notes:
        print(f"Note     {one_line(note)}")
    checked = []

    def check(weights: Path, new_config: Path) -> None:
        try:
            checked.append(check_written(weights, new_config))
        except ConfigError as error:
            raise ConfigError(f"{args.input} cannot be converted: {error}") from None

    try:
        write_converted(converted, output, f"{Path(args.input).name} ({source.name})", check)
    except OSError as error:
        raise ConfigError(str(error)) from None
    print(f"Weights  {output}\nConfig   {config}\nChecked  {checked[0]}")


def check_written(weights: Path, config: Path) -> str:
    """Load written weights into the model that their config builds; say how they fit.

    Raises:
        ConfigError: a tensor of the file is not used, or one of the model is not in the file.
            Weights of a backbone alone need only have all of the ResNet.
    """
    cfg = setup_cfg(str(config), ["MODEL.DEVICE", "cpu"])
    checkpointer = Checkpointer(build_model(cfg))
    checkpointer.load(str(weights))
    fit = checkpointer.fit
    assert fit is not None  # load raises if nothing was loaded
    is_backbone = "head.cls_score.weight" in fit.missing
    missing = [name for name in fit.missing if not is_backbone or name.startswith(PREFIX)]
    if missing or fit.other_shape or fit.unused:
        lacks = f"it lacks {len(missing)} tensors, e.g. {missing[0]}" if missing else str(fit)
        raise ConfigError(f"{weights.name} does not fit the model of {config.name}: {lacks}")
    model = "the ResNet of the config's model" if is_backbone else "the config's model"
    return f"all tensors load into {model}"


def _num_classes(converted: Converted) -> int | None:
    return converted.config["MODEL"].get("RETINANET", {}).get("NUM_CLASSES")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
