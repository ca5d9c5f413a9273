"""Packaging of retina_plugin. `make setup` makes an environment that has everything."""

from setuptools import find_packages, setup

# Detectron2 is left out on purpose: it has no release on the package index, and whoever has
# one, compiled, keeps it. requirements/detectron2.txt has one for everybody else. For the same
# reason there are no lower bounds here: they would replace the torch that it was compiled with.
INSTALL_REQUIRES = [
    # What retina_plugin and Detectron2 both work with.
    "torch",  # tensors, autograd, torch.nn
    "torchvision",  # the IoU losses; NMS
    "numpy",  # images and annotations on the way to torch
    "Pillow",  # reading images
    "opencv-python",  # resizing and writing images; drawing
    "pycocotools",  # the COCO annotation format and AP
    "fvcore",  # Detectron2's companion: registries, checkpoints, weight initialization
    "iopath",  # the same project's file paths
    "matplotlib",  # training curves and pictures of detections
    "tqdm",  # progress bars
    "PyYAML",  # what a config file that is no YAML raises
    # What Detectron2 alone imports at run time: the pinned wheel comes without its dependencies,
    # because its metadata asks for numpy<2.
    "yacs",  # the config files
    "omegaconf<2.4",  # lazy configs; the bound is Detectron2's own: it uses omegaconf's internals
    "hydra-core",  # overrides of lazy configs, looking up classes by name
    "termcolor",  # log lines
    "tabulate",  # tables in the log
    "cloudpickle",  # data set entries on the way to the loader's workers
    "tensorboard",  # the trainer's event files
    "packaging",  # version checks
    "setuptools<81",  # detectron2.model_zoo imports pkg_resources, which setuptools 81 dropped
]

EXTRAS_REQUIRE = {
    "demo": [
        "scikit-learn",  # its digits and its two photos are the embedded data set
    ],
    "fast": [
        # bounds: another minor release may treat ties or odd files differently
        "hotcoco>=1.3,<1.4",  # COCO's metrics: pycocotools' numbers in a fiftieth of its time
        "orjson",  # writing the detections of an evaluation: most of what is left of that time
    ],
    "dev": [
        "pytest",  # the tests
        # Exact, because their output is a gate: a new release must not fail an old checkout.
        "ruff==0.17.6",  # lint and format; exact: see above
        "mypy==2.4.1",  # types; exact: see above
    ],
}

setup(
    name="retina_plugin",
    version="0.1.0",
    description="RetinaNet and the focal loss as a plugin for Detectron2",
    license="Apache-2.0",
    packages=find_packages(include=["retina_plugin*"]),
    package_data={"retina_plugin.losses": ["*.cpp"]},  # compiled on the user's machine
    python_requires=">=3.10",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    zip_safe=False,
    classifiers=[
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
