"""``python -m retina_plugin`` is the command ``retina``."""

from retina_plugin.cli import main

if __name__ == "__main__":
    main()
