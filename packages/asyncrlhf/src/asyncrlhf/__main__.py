"""``python -m asyncrlhf`` is the command line; ``accelerate launch -m asyncrlhf`` is it, too."""

from asyncrlhf.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
