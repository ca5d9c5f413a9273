"""Commands: ``python -m retina_plugin.tools.NAME``. Nothing imports them."""
