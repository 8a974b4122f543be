"""Contrastive Generative Exploration as a Ray job: ``isoray run`` on the cluster that the job was submitted to.

    ray job submit --working-dir . -- python jobs/cge.py configs/cge/falcon_code.yaml [a.b=value ...]

A relative run folder hangs on the home folder, since the job's working folder does not outlive it; the log says where
the run is. On several nodes give ``storage.path`` (or ``--out``) on storage that all of them reach.
"""

import sys
from pathlib import Path

# The submitted working folder comes before an installed isoray.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from isoray.cli import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:], "--address", "auto"])
