"""The command `tensorfork`."""

import sys


def main() -> None:
    """The entry point of the installed command."""
    try:
        from tensorfork.cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("typer", "rich"):
            raise
        sys.exit(f"tensorfork: the command needs the package {missing}; pip install 'tensorfork[cli]'")
    app()
