"""`python -m inference_control`."""

import sys

from inference_control.cli import main

sys.exit(main())
