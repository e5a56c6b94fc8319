"""``python -m gsm_compose`` is the command line."""

from gsm_compose.cli import main

raise SystemExit(main())
