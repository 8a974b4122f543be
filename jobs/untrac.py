"""UnTrac as a Ray job: ``isoray run`` on the cluster that the job was submitted to.

    ray job submit --working-dir . -- python jobs/untrac.py configs/untrac/quickstart.yaml [a.b=value ...] [--out DIR]

Give ``storage.path`` (or ``--out``) on storage that outlives the job: its working folder does not.
"""

import sys
from pathlib import Path

# The submitted working folder comes before an installed isoray.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from isoray.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:], "--address", "auto"])
