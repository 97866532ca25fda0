"""The steps of the recipe are scripts beside each other, too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "smollm2"))
