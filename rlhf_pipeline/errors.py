"""The one exception a user's mistake raises. It reaches the terminal as a message and exit code 2, never as a traceback."""


class UserError(Exception):
    """Something the user can put right. The message says what is wrong, where, and what to do."""


def cannot_open(path: str, what: str, error: Exception) -> UserError:
    """The error to raise for what transformers raised, which for somebody's damaged files may be of every kind.

    Raises:
        Exception: where there was no memory for it, the same.
    """
    if isinstance(error, UserError | MemoryError) or type(error).__name__ == "OutOfMemoryError":
        raise error
    if isinstance(error, OSError | ValueError):  # these say it in words
        reason = str(error)
    elif "ignore_mismatched_sizes" in str(error):
        reason = "its weights have other shapes than its config.json says; are they of one model?"
    else:
        reason = f"{type(error).__name__}: {error}; are its files damaged?"
    return UserError(f"model.path={path}: cannot be opened as a {what}: {reason}")


class PeerError(Exception):
    """Another process of the run never came, or has gone. Exit code 1; the message says all that is known."""
