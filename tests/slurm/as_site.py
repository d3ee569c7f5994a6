"""Run a command on a machine like a site's: everybody may use Python, the checkout and /dev/fuse, and there is an ordinary user.

    unshare --mount --propagation slave python tests/slurm/as_site.py COMMAND ...

The drill runs this as root. The caller has made the mount namespace, so that nothing here is visible outside. A Slurm that COMMAND starts
runs in it and knows the user. DRILL_UID names the user to COMMAND, which stays root because it causes the faults.
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
