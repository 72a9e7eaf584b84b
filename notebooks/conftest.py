"""nbval compares outputs: no progress bars, and no pictures, which need a browser."""

import os

os.environ.update(TQDM_DISABLE="1", TSAE_PNG="0")
