"""The version of this distribution. `ajepa.__version__` is this one."""

VERSION = "0.1.0"
