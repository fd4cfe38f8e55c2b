"""The demo's one error."""


class DemoFailed(Exception):
    """The demo cannot go on. The message is shown at the terminal and names the remedy."""
