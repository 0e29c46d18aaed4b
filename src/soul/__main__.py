"""``python -m soul``, which launchers of several processes start (``accelerate launch -m soul``)."""

import sys

from soul.cli import main

if __name__ == "__main__":
    sys.exit(main())
