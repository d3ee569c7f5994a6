"""Serve a scripted model: `python -m pipeline.agent.scripted_model SCENARIO` (server.py)."""

import sys

from pipeline.agent.scripted_model.server import main

if __name__ == "__main__":
    sys.exit(main())
