"""Six science experts and their mixtures, from published packages to a table: see README.md beside this file."""

import sys
from pathlib import Path

# What is shared with the other examples (downloads, random draws, standard errors) are modules beside their scripts.
_EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [folder for folder in (str(_EXAMPLES), str(_EXAMPLES / "data")) if folder not in sys.path]
