"""Run a command as an ordinary user, from root, on a machine that was not prepared for one.

    unshare --mount --propagation slave python as_user.py UID command ...

The caller has made the mount namespace, so that nothing here is visible outside. A tmpfs covers folders on the way to Python and the
repository that only root may enter, and shows nothing but these two. A device node that everybody may use covers /dev/fuse.
"""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

NEEDED = (sys.prefix, sys.base_prefix, Path(__file__).parents[2])


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def open_the_way(needed: list[Path]) -> None:
    """Make `needed` reachable for everybody."""
    stage = Path(tempfile.mkdtemp(prefix="as-user-", dir="/tmp"))
    mount("-t", "tmpfs", "-o", "mode=0755", "stage", str(stage))
    for number, path in enumerate(needed):
        (stage / str(number)).mkdir()
        mount("--rbind", str(path), str(stage / str(number)))
    for number, path in enumerate(needed):
        closed = [parent for parent in reversed(path.parents) if not parent.stat().st_mode & stat.S_IXOTH]
        if closed:
            mount("-t", "tmpfs", "-o", "mode=0755", "way", str(closed[0]))
        if not path.exists():
            path.mkdir(parents=True)
            mount("--rbind", str(stage / str(number)), str(path))
    if os.path.exists("/dev/fuse"):
        node = stage / "fuse"
        os.mknod(node, stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
        node.chmod(0o666)
        mount("--bind", str(node), "/dev/fuse")
    # The binds stay, and no empty folder is left behind in /tmp.
    subprocess.run(["umount", "--lazy", str(stage)], check=True)
    stage.rmdir()


if __name__ == "__main__":
    open_the_way(sorted({Path(path).resolve() for path in NEEDED}))
    uid = int(sys.argv[1])
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.execvp(sys.argv[2], sys.argv[2:])
