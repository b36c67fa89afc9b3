"""The folder of a run: written while it runs, read back as tables and figures."""
