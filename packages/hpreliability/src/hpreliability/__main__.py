"""`python -m hpreliability` is the command `hpreliability`."""

from hpreliability.cli import main

raise SystemExit(main())
