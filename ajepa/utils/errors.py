"""Errors that a user can mend. A command prints each as one line, see `ajepa.utils.command`."""


class UserError(Exception):
    """The message names the thing that is wrong and the remedy."""


class ConfigError(UserError, ValueError):
    """An invalid setting, an invalid combination of settings, or a folder or file that a setting must not name."""
