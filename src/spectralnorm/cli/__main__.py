"""``python -m spectralnorm.cli``."""

from spectralnorm.cli import main

raise SystemExit(main())
