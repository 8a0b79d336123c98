"""Measures and inspects radam_kernels; each module is a command, `python -m bench.<name>`."""
