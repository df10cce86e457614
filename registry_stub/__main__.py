"""`python -m registry_stub`."""

import sys

from registry_stub.cli import main

sys.exit(main())
