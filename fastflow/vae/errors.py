"""The one exception that a user of the experiments is meant to read."""


class VaeError(ValueError):
    """A wrong setting or wrong data: the command line prints it as one line and exits with 2."""
