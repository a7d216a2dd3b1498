"For all tests, before anything is imported: no progress bars among the lines that are compared."

import os

os.environ["TQDM_DISABLE"] = "1"
