"""The one exception that a user sees as a single line instead of a traceback."""


class UserError(Exception):
    """A mistake the user can mend: the message names the field, its value and the remedy.

    `gptjax.cli` prints it on one line and exits with status 1.
    """
