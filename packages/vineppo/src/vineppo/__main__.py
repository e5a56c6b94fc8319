"""``python -m vineppo`` is the command line; ``accelerate launch -m vineppo`` is it, too."""

from vineppo.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
