"""The command `tensorfork`."""

import sys


def main() -> None:
    """What the installed command runs."""
    try:
        from tensorfork.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"tensorfork: the command needs the package {error.name}; pip install 'tensorfork[cli]'")
    app()
