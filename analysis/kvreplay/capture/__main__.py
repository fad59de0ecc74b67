"""python -m kvreplay.capture"""

import sys

from kvreplay.capture.cli import main

sys.exit(main())
