"""Run a command on a machine as a site has it: Python, checkout and /dev/fuse are everybody's, and there is an ordinary user.

    unshare --mount --propagation slave python tests/slurm/as_site.py COMMAND ...

For the drill, as root. The caller has made the mount namespace, so nothing here is seen outside; a Slurm that COMMAND starts runs in
it, knows the user, and its jobs find their way. DRILL_UID names the user to COMMAND, which stays root: it plays the faults.
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.attacks.as_user import NEEDED, mount, open_the_way  # noqa: E402

UID = 12345

if __name__ == "__main__":
    open_the_way(sorted({Path(path).resolve() for path in NEEDED}))
    with tempfile.NamedTemporaryFile("w", prefix="passwd-") as users:
        users.write(Path("/etc/passwd").read_text() + f"drill:x:{UID}:{UID}:the drill:/tmp:/bin/bash\n")
        users.flush()
        os.chmod(users.name, 0o644)
        mount("--bind", users.name, "/etc/passwd")
    os.execvpe(sys.argv[1], sys.argv[1:], {**os.environ, "DRILL_UID": str(UID)})
