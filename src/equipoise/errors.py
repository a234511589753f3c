"""The one exception for what a user can cause."""


class UserError(ValueError):
    """Something the user can put right: bad data, a bad recipe, a bad argument.

    The text is one line that says what was wrong, where, and what to do. The command line prints it and exits
    with code 2; any other exception is a bug of ours and shows its traceback.
    """


class Stopped(Exception):  # noqa: N818 it is no error
    """A signal has stopped a run: 'interrupted' (SIGINT) or 'terminated' (SIGTERM). `command` goes on with it."""

    def __init__(self, how: str, state: str, command: str) -> None:
        super().__init__(f"{how}: {state}; go on with:\n{command}")
        self.code = {"interrupted": 130, "terminated": 143}[how]
