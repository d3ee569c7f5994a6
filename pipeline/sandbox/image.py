"""The substrate as one squashfs image: compute its digest, build, verify, mount read-only, fork.

An image's identity is its tree digest: the sha256 over every path of the payload in byte order, with git's mode strings (`040755` folder,
`100644` file, `100755` executable, `120000` symlink) and each file's sha256 or link target. Owners, times, umask, hard links and
compression do not enter it, so an unpacked copy, a kernel mount and a FUSE mount have the same digest. The sha256 of the .sqsh file
stands in the manifest beside the image (`substrate.sqsh.json`). It only finds a damaged or truncated file before anything parses it,
and proves nothing about the payload.

`choose_backend` decides from what the node offers how an image is mounted. The choice is part of the returned record.

    loop        the kernel's squashfs, for root of the machine
    squashfuse  for an ordinary user with /dev/fuse, inside a user namespace
    unpack      with neither of these: unsquashfs to node-local scratch, bound read-only

A fork is a writable view for one trial: a kernel overlay over the pristine mount, else fuse-overlayfs, else a plain copy. Its upper layer
lies in node-local scratch, because Lustre and NFS cannot hold one.

All mounts are made in the private mount namespace of the calling process (namespace.py); outside one, nothing is mounted. After a SIGKILL
files in scratch stay and mounts do not.
"""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.campaign import strict_json
from pipeline.campaign.errors import ConfigError, IntegrityError, NotFound, WorkFailed
from pipeline.campaign.files import file_digest, flush_folder, read_bytes, tree_digest, walk, write_file
from pipeline.campaign.shared_path import claim
from pipeline.sandbox.namespace import (
    is_machine_root,
    mount,
    require_private_namespace,
    run_program,
    scratch_folder,
    serve_fuse,
)

BACKENDS = ("loop", "squashfuse", "unpack")
FORK_BACKENDS = ("overlay", "fuse-overlayfs", "copy")
MANIFEST_SCHEMA = 1
MOUNT_OPTIONS = "nosuid,nodev"
# With these flags the bytes do not depend on the run, the thread count, owners, times, umask or hard links.
BUILD_FLAGS = (
    *("-noappend", "-quiet", "-no-progress", "-comp", "zstd", "-no-xattrs", "-no-exports", "-no-hardlinks"),
    *("-all-root", "-root-mode", "0755", "-mkfs-time", "0", "-all-time", "0"),
    *("-action", "chmod(0755)@type(d)"),
    *("-action", "chmod(0755)@type(f)&&perm(/u+x)"),
    *("-action", "chmod(0644)@type(f)&&!perm(/u+x)"),
)


@dataclass(frozen=True)
class ImageInfo:
    """The manifest of an image: its identity (`tree_digest`), the checksum and size of the file, and the program that built it."""

    tree_digest: str
    sqsh_sha256: str
    num_files: int
    size_bytes: int
    builder: str


@dataclass(frozen=True)
class Mount:
    """A pristine image, mounted read-only at `root` by `backend`."""

    root: Path
    tree_digest: str
    backend: str

    def verify(self) -> None:
        """Read the whole tree again. Raises IntegrityError where its digest has changed since it was mounted."""
        _expect(self.root, "tree digest", self.tree_digest, tree_digest(self.root))


@dataclass(frozen=True)
class Fork:
    """A writable view of an image at `root`, made by `backend`. A trial may change anything in it, so nothing in it is believed."""

    root: Path
    backend: str


def build(payload_dir: Path, out_sqsh: Path) -> ImageInfo:
    """Pack `payload_dir` into `out_sqsh` and write the manifest beside it. Equal payloads give equal bytes.

    The image is packed and verified in a folder of its own beside `out_sqsh`, and only then moved there. Of two machines that build at
    once each moves its image together with its manifest, and a build that finds the same image there leaves it as it is.

    Raises NotFound without the folder or mksquashfs, ConfigError for a file that `tree_digest` refuses, IntegrityError where the payload
    changed while it was packed, and WorkFailed where packing fails.
    """
    if not payload_dir.is_dir():
        raise NotFound(f"There is no payload folder {payload_dir}")
    digest = tree_digest(payload_dir)
    num_files = sum(stat.S_ISREG((payload_dir / name).lstat().st_mode) for name in walk(payload_dir))
    builder = run_program("mksquashfs", "-version").splitlines()[0]
    with tempfile.TemporaryDirectory(prefix=f".{out_sqsh.name}.", dir=out_sqsh.parent) as folder:
        aside = Path(folder, out_sqsh.name)
        run_program("mksquashfs", str(payload_dir), str(aside), *BUILD_FLAGS)
        aside.chmod(0o644)
        info = ImageInfo(digest, file_digest(aside), num_files, aside.stat().st_size, builder)
        manifest = json.dumps({"schema": MANIFEST_SCHEMA, **asdict(info)}, indent=1, sort_keys=True) + "\n"
        write_file(_manifest_path(aside), manifest)
        verify(aside, digest)
        with claim(out_sqsh.with_name(f".{out_sqsh.name}.claim")):
            if not _is_published(out_sqsh, info):
                # The manifest is moved second. Until then the old manifest refuses the new image, which is the safe order.
                _publish(aside, out_sqsh)
                _publish(_manifest_path(aside), _manifest_path(out_sqsh))
    return info


def _is_published(sqsh: Path, info: ImageInfo) -> bool:
    """Whether the image is there already, with its manifest and its bytes."""
    try:
        return show(sqsh) == info and file_digest(sqsh) == info.sqsh_sha256
    except (NotFound, IntegrityError):
        return False


def show(sqsh: Path) -> ImageInfo:
    """Read the manifest beside `sqsh` without checking the image.

    Raises NotFound where the image or its manifest is absent, and IntegrityError where the manifest is malformed or has an unknown schema.
    """
    path = _manifest_path(sqsh)
    if not sqsh.exists():
        raise NotFound(
            f"There is no image {sqsh}", "`python -m pipeline image build` makes one; a campaign has its own in image/"
        )
    if not path.is_file():
        raise NotFound(
            f"There is no image manifest {path}", "Copy the .json file with the image, or build the image again"
        )
    try:
        fields = strict_json.read(read_bytes(path))
        if fields.pop("schema") != MANIFEST_SCHEMA:
            raise ValueError(f"schema is not {MANIFEST_SCHEMA}")
        return ImageInfo(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is not an image manifest: {error}") from error


def verify(sqsh: Path, expected_tree_digest: str, scratch_dir: Path | None = None) -> ImageInfo:
    """Check the manifest, the bytes and the content of an image, which is unpacked into `scratch_dir` (None: TMPDIR).

    Raises IntegrityError, which names the image, the expected and the actual digest, and NotFound without the image.
    """
    info = _verify_file(sqsh, expected_tree_digest)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=scratch_dir) as folder:
        _unpack(sqsh, Path(folder, "payload"))
        _expect(sqsh, "tree digest", expected_tree_digest, tree_digest(Path(folder, "payload")))
    return info


def choose_backend() -> str:
    """The fastest mount backend that is available on this node to this user. A kernel module that is not loaded counts as absent."""
    has_squashfs = "\tsquashfs\n" in Path("/proc/filesystems").read_text()
    if is_machine_root() and has_squashfs and os.path.exists("/dev/loop-control"):
        return "loop"
    if shutil.which("squashfuse") and os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "squashfuse"
    return "unpack"


@contextmanager
def mounted(sqsh: Path, expected_tree_digest: str, scratch_dir: Path, backend: str | None = None) -> Iterator[Mount]:
    """Mount the pristine image read-only below `scratch_dir`. It is verified on entry and, unless the body raises, on exit.

    Raises IntegrityError as `verify` does, ConfigError outside a private namespace or for an unknown backend, and WorkFailed where the
    backend fails.
    """
    backend = backend or choose_backend()
    require_private_namespace()
    _verify_file(sqsh, expected_tree_digest)
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder(scratch_dir, "pristine-"))
        root = folder / "root"
        root.mkdir()
        if backend == "loop":
            mount(stack, root, "-t", "squashfs", "-o", f"loop,ro,{MOUNT_OPTIONS}", str(sqsh))
        elif backend == "squashfuse":
            # The trial's uid reads this mount too. Without allow_other FUSE serves only the user who mounted it.
            serve_fuse(stack, root, "squashfuse", "-f", "-o", f"ro,allow_other,{MOUNT_OPTIONS}", str(sqsh))
        elif backend == "unpack":
            _unpack(sqsh, folder / "payload")
            mount(stack, root, "--bind", str(folder / "payload"))
            run_program("mount", "-o", f"remount,bind,ro,{MOUNT_OPTIONS}", str(root))
        else:
            raise ConfigError(f"There is no mount backend {backend!r}", f"Use one of {', '.join(BACKENDS)}")
        pristine = Mount(root, expected_tree_digest, backend)
        pristine.verify()
        yield pristine
        pristine.verify()


@contextmanager
def forked(pristine: Mount, scratch_dir: Path, owner: int, backend: str | None = None) -> Iterator[Fork]:
    """Fork `pristine` below `scratch_dir`. The uid `owner` may change everything in the fork, which is deleted on exit.

    Raises ConfigError for an unknown backend, and WorkFailed where the given backend, or without one every backend, fails on this node.
    """
    if backend is not None and backend not in FORK_BACKENDS:
        raise ConfigError(f"There is no fork backend {backend!r}", f"Use one of {', '.join(FORK_BACKENDS)}")
    failures = []
    for candidate in FORK_BACKENDS if backend is None else (backend,):
        with ExitStack() as stack:
            folder = stack.enter_context(scratch_folder(scratch_dir, "fork-"))
            try:
                _fork_by(candidate, stack, pristine.root, folder, owner)
            except (WorkFailed, NotFound) as error:
                failures.append(str(error))
                continue
            yield Fork(folder / "root", candidate)
            return
    raise WorkFailed(f"{pristine.root} could not be forked in {scratch_dir}: {'; '.join(failures)}")


def _fork_by(backend: str, stack: ExitStack, lower: Path, folder: Path, owner: int) -> None:
    root, upper, work = folder / "root", folder / "upper", folder / "work"
    if backend == "copy":
        shutil.copytree(lower, root, symlinks=True)
    else:
        for path in (root, upper, work):
            path.mkdir(mode=0o755)
        layers = f"lowerdir={lower},upperdir={upper},workdir={work},{MOUNT_OPTIONS}"
        if backend == "overlay":
            # A user namespace may not write trusted.* attributes. With metacopy, _give_to copies no file's content.
            attributes = "metacopy=on" if is_machine_root() else "userxattr"
            mount(stack, root, "-t", "overlay", "-o", f"{layers},{attributes}", "overlay")
        else:
            serve_fuse(stack, root, "fuse-overlayfs", "-f", "-o", f"{layers},allow_other")
    _give_to(root, owner)


def _give_to(root: Path, owner: int) -> None:
    """Make `owner` the owner of everything below `root`, unless this process runs as `owner`."""
    if owner != os.geteuid():
        for path in (root, *(root / name for name in walk(root))):
            os.chown(path, owner, owner, follow_symlinks=False)


def _verify_file(sqsh: Path, expected_tree_digest: str) -> ImageInfo:
    if not sqsh.is_file():
        raise NotFound(f"There is no image {sqsh}")
    info = show(sqsh)
    _expect(sqsh, "tree digest in the manifest", expected_tree_digest, info.tree_digest)
    _expect(sqsh, "sha256 of the file", info.sqsh_sha256, file_digest(sqsh))
    return info


def _expect(path: Path, what: str, expected: str, actual: str) -> None:
    if actual != expected:
        raise IntegrityError(f"{path}: the {what} is {actual}, expected {expected}", "Copy or build the image again")


def _manifest_path(sqsh: Path) -> Path:
    return sqsh.with_name(sqsh.name + ".json")


def _publish(aside: Path, path: Path) -> None:
    """Move a file that is whole on disk to its place, so that no reader sees a part of it."""
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)
    flush_folder(path.parent)


def _unpack(sqsh: Path, folder: Path) -> None:
    run_program("unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-dest", str(folder), str(sqsh))
