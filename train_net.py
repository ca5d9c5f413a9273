#!/usr/bin/env python
"""Train or evaluate: python train_net.py --config-file configs/retina_R101_800.yaml --num-gpus 8

The same as `retina train`, where Detectron2's users look for it.
"""

import sys

try:
    from retina_plugin.cli.train import main
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}")  # the message says what to install

if __name__ == "__main__":
    main()
