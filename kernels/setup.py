"""Builds `ajepa-kernels` by the checkout's setup.py, which finds the sources from the folder that it runs in."""

import runpy

runpy.run_path("../setup.py", run_name="__main__")
