"""What the package is made of. Everything else about it is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["retina_plugin*"]), "retina_plugin.configs"],
    # The configs stay at the top of the checkout, where Detectron2's users look for them.
    package_dir={"retina_plugin.configs": "configs"},
    package_data={
        "retina_plugin": ["py.typed"],
        "retina_plugin.configs": ["**/*.yaml"],
        "retina_plugin.analysis": ["page/*"],
        "retina_plugin.deploy": ["page/*"],
        "retina_plugin.doctor": ["*.html"],
        "retina_plugin.losses.backends": ["*.cpp"],  # compiled on the user's machine
    },
)
