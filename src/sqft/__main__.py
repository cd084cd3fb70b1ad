"""``python -m sqft`` is ``sqft``."""

import sys


def main() -> int:
    """The command line; Ctrl-C while it is being imported is Ctrl-C too."""
    try:
        from sqft import cli

        return cli.main()
    except KeyboardInterrupt:
        print("sqft: interrupted: nothing was done", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
