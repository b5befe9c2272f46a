"""``python -m vzip.runtime`` is the command line `vzip`."""

import sys

from vzip.runtime.cli.main import main

sys.exit(main())
