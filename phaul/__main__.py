"""`python -m phaul` is `phaul`."""

import sys

from phaul.cli import main

sys.exit(main())
