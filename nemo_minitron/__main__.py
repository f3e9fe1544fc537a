"""Runs the command line: ``python -m nemo_minitron``."""

from nemo_minitron.cli.main import main

raise SystemExit(main())
