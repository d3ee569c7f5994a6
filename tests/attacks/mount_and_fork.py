"""Mount an image with every backend, fork it with every backend in one private namespace, and print what was seen.

python mount_and_fork.py FOLDER     FOLDER holds image.sqsh and its manifest, and serves as scratch
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from pipeline.campaign import files
from pipeline.campaign.errors import IntegrityError
from pipeline.sandbox import image
from pipeline.sandbox.namespace import enter_private_namespace, is_machine_root, trial_uid


def look(folder: Path) -> dict[str, Any]:
    digest = image.show(folder / "image.sqsh").tree_digest
    seen: dict[str, Any] = {"default": image.choose_backend(), "mounts": {}, "forks": {}, "copied": {}}
    seen |= {"written": [], "owners": []}
    for backend in image.BACKENDS if is_machine_root() else image.BACKENDS[1:]:
        with image.mounted(folder / "image.sqsh", digest, folder, backend) as mount:
            seen["mounts"][backend] = files.tree_digest(mount.root)
            try:
                (mount.root / "new").write_text("")
                seen["written"].append(backend)
            except OSError:
                pass
            for fork_backend in (None, *image.FORK_BACKENDS):
                with image.forked(mount, folder, trial_uid(), fork_backend) as fork:
                    started = files.tree_digest(fork.root)
                    owners = {path.lstat().st_uid for path in (fork.root, *fork.root.rglob("*"))}
                    seen["owners"] += sorted(owners - {trial_uid()})
                    if fork.backend == "overlay":
                        upper = fork.root.parent / "upper/data"
                        seen["copied"][backend] = upper.stat().st_blocks if upper.exists() else 0
                    (fork.root / "code/run.sh").write_text("changed")
                    (fork.root / "link").unlink()
                    changed = files.tree_digest(fork.root)
                seen["forks"][f"{backend} {fork_backend}"] = [fork.backend, started == digest, changed != digest]
    try:
        with image.mounted(folder / "image.sqsh", digest, folder, "unpack") as mount:
            (mount.root.parent / "payload/code/run.sh").write_text("changed behind the mount")
    except IntegrityError as error:
        seen["refused"] = str(error)
    seen["left"] = sorted(os.listdir(folder))
    return seen


if __name__ == "__main__":
    enter_private_namespace([sys.executable, "-W", "error", *sys.argv])
    print(json.dumps(look(Path(sys.argv[1]))))
