"""The one exception for what a user can cause."""


class UserError(ValueError):
    """Something the user can put right: bad data, a bad recipe, a bad argument.

    The text is one line that says what was wrong, where, and what to do. The command line prints it and exits
    with code 2; any other exception is a bug of ours and shows its traceback.
    """
