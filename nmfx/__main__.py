"""``python -m nmfx`` is the ``nmfx`` command."""

from nmfx.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
