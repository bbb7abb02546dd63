"""The one exception a user's mistake raises. It reaches the terminal as a message and exit code 2, never as a traceback."""


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""
