"""The demo's one error."""


class DemoFailed(Exception):
    """The demo cannot go on. The message is for the person at the terminal, and says what to do."""
