"""The substrate as one squashfs image: digest, build, verify, mount read-only, fork.

An image's identity is its tree digest: the sha256 over every path of the payload in byte order, with git's mode strings
(`040755` folder, `100644` file, `100755` executable, `120000` symlink) and each file's sha256 or link target. Owners,
times, umask, hard links and compression do not enter it, so an unpacked copy, a kernel mount and a FUSE mount agree.
The sha256 of the .sqsh file only guards transport: it stands in the manifest beside the image (`substrate.sqsh.json`),
finds a flipped or missing byte before anything parses the file, and proves nothing about what the payload is.

What the node has decides how an image is mounted (`choose_backend`); the choice is part of the returned record.

    loop        kernel squashfs, for root of the machine
    squashfuse  for an ordinary user with /dev/fuse, inside a user namespace
    unpack      with neither: unsquashfs to node-local scratch, bound read-only

A fork is a writable view for one trial: a kernel overlay over the pristine mount, else fuse-overlayfs, else a plain
copy. Its upper layer lies in node-local scratch, because Lustre and NFS cannot carry one.

All mounts go into the private mount namespace of the calling process (namespace.py); outside one nothing is mounted.
Files in scratch outlive a SIGKILL; mounts do not.
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
from pipeline.campaign.files import file_digest, tree_digest, walk
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
# With these the bytes do not depend on run, thread count, owner, time, umask or hard links.
BUILD_FLAGS = (
    *("-noappend", "-quiet", "-no-progress", "-comp", "zstd", "-no-xattrs", "-no-exports", "-no-hardlinks"),
    *("-all-root", "-root-mode", "0755", "-mkfs-time", "0", "-all-time", "0"),
    *("-action", "chmod(0755)@type(d)"),
    *("-action", "chmod(0755)@type(f)&&perm(/u+x)"),
    *("-action", "chmod(0644)@type(f)&&!perm(/u+x)"),
)


@dataclass(frozen=True)
class ImageInfo:
    """The manifest of an image: its identity, the transport checksum of the file, and what made it."""

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
        """Read the whole tree again. Raises IntegrityError when it is not what it was mounted as."""
        _expect(self.root, "tree digest", self.tree_digest, tree_digest(self.root))


@dataclass(frozen=True)
class Fork:
    """A writable view of an image at `root`, made by `backend`. Nothing in it is ever believed."""

    root: Path
    backend: str


def build(payload_dir: Path, out_sqsh: Path) -> ImageInfo:
    """Pack `payload_dir` into `out_sqsh` and write its manifest beside it; equal payloads give equal bytes.

    The tree digest is taken from the folder: a payload that changes while it is packed is refused at the first mount.

    Raises NotFound without the folder or mksquashfs, ConfigError as `tree_digest`, WorkFailed when packing fails.
    """
    if not payload_dir.is_dir():
        raise NotFound(f"no payload folder {payload_dir}")
    digest = tree_digest(payload_dir)
    num_files = sum(stat.S_ISREG((payload_dir / name).lstat().st_mode) for name in walk(payload_dir))
    builder = run_program("mksquashfs", "-version").splitlines()[0]
    aside = out_sqsh.with_name(f".{out_sqsh.name}.{os.getpid()}")
    try:
        run_program("mksquashfs", str(payload_dir), str(aside), *BUILD_FLAGS)
        info = ImageInfo(digest, file_digest(aside), num_files, aside.stat().st_size, builder)
        _publish(aside, out_sqsh)
        # The manifest comes second: in between, the old one refuses the new image, which is the safe way round.
        aside.write_text(json.dumps({"schema": MANIFEST_SCHEMA, **asdict(info)}, indent=1, sort_keys=True) + "\n")
        _publish(aside, _manifest_path(out_sqsh))
    finally:
        aside.unlink(missing_ok=True)
    return info


def show(sqsh: Path) -> ImageInfo:
    """What the manifest beside `sqsh` claims. Raises NotFound without one, IntegrityError for an unknown schema."""
    path = _manifest_path(sqsh)
    if not sqsh.exists():
        raise NotFound(
            f"no image {sqsh}", "`python -m pipeline image build` makes one; a campaign has its own in image/"
        )
    if not path.is_file():
        raise NotFound(f"no image manifest {path}", "copy the .json along with the image, or build it again")
    try:
        fields = strict_json.read(path.read_bytes())
        if fields.pop("schema") != MANIFEST_SCHEMA:
            raise ValueError(f"schema is not {MANIFEST_SCHEMA}")
        return ImageInfo(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is not an image manifest: {error}") from error


def verify(sqsh: Path, expected_tree_digest: str, scratch_dir: Path | None = None) -> ImageInfo:
    """Check manifest, bytes and content of an image by unpacking it into `scratch_dir` (TMPDIR where None).

    Raises IntegrityError naming the image, what was expected and what was found; NotFound without the image.
    """
    info = _verify_file(sqsh, expected_tree_digest)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=scratch_dir) as folder:
        _unpack(sqsh, Path(folder, "payload"))
        _expect(sqsh, "tree digest", expected_tree_digest, tree_digest(Path(folder, "payload")))
    return info


def choose_backend() -> str:
    """The fastest mount backend that this node and user have. A kernel module that is not loaded counts as absent."""
    has_squashfs = "\tsquashfs\n" in Path("/proc/filesystems").read_text()
    if is_machine_root() and has_squashfs and os.path.exists("/dev/loop-control"):
        return "loop"
    if shutil.which("squashfuse") and os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "squashfuse"
    return "unpack"


@contextmanager
def mounted(sqsh: Path, expected_tree_digest: str, scratch_dir: Path, backend: str | None = None) -> Iterator[Mount]:
    """The pristine image, read-only below `scratch_dir`; verified on entry and, unless the body raised, on exit.

    Raises IntegrityError as `verify`, ConfigError outside a private namespace, WorkFailed when the backend fails.
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
            # allow_other: the trial's uid reads this mount too, and FUSE otherwise serves only the one that mounted it.
            serve_fuse(stack, root, "squashfuse", "-f", "-o", f"ro,allow_other,{MOUNT_OPTIONS}", str(sqsh))
        elif backend == "unpack":
            _unpack(sqsh, folder / "payload")
            mount(stack, root, "--bind", str(folder / "payload"))
            run_program("mount", "-o", f"remount,bind,ro,{MOUNT_OPTIONS}", str(root))
        else:
            raise ConfigError(f"no mount backend {backend!r}", f"valid: {', '.join(BACKENDS)}")
        pristine = Mount(root, expected_tree_digest, backend)
        pristine.verify()
        yield pristine
        pristine.verify()


@contextmanager
def forked(pristine: Mount, scratch_dir: Path, owner: int, backend: str | None = None) -> Iterator[Fork]:
    """A fork of `pristine` below `scratch_dir` in which uid `owner` may change everything; deleted on exit.

    Raises ConfigError for an unknown backend, WorkFailed when the named one, or every one, fails here.
    """
    if backend is not None and backend not in FORK_BACKENDS:
        raise ConfigError(f"no fork backend {backend!r}", f"valid: {', '.join(FORK_BACKENDS)}")
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
    raise WorkFailed(f"no fork of {pristine.root} in {scratch_dir}: {'; '.join(failures)}")


def _fork_by(backend: str, stack: ExitStack, lower: Path, folder: Path, owner: int) -> None:
    root, upper, work = folder / "root", folder / "upper", folder / "work"
    if backend == "copy":
        shutil.copytree(lower, root, symlinks=True)
    else:
        for path in (root, upper, work):
            path.mkdir(mode=0o755)
        layers = f"lowerdir={lower},upperdir={upper},workdir={work},{MOUNT_OPTIONS}"
        if backend == "overlay":
            # A user namespace may not write trusted.* attributes. With metacopy, _give copies no file's content.
            attributes = "metacopy=on" if is_machine_root() else "userxattr"
            mount(stack, root, "-t", "overlay", "-o", f"{layers},{attributes}", "overlay")
        else:
            serve_fuse(stack, root, "fuse-overlayfs", "-f", "-o", f"{layers},allow_other")
    _give(root, owner)


def _give(root: Path, owner: int) -> None:
    if owner != os.geteuid():
        for path in (root, *(root / name for name in walk(root))):
            os.chown(path, owner, owner, follow_symlinks=False)


def _verify_file(sqsh: Path, expected_tree_digest: str) -> ImageInfo:
    if not sqsh.is_file():
        raise NotFound(f"no image {sqsh}")
    info = show(sqsh)
    _expect(sqsh, "tree digest in the manifest", expected_tree_digest, info.tree_digest)
    _expect(sqsh, "sha256 of the file", info.sqsh_sha256, file_digest(sqsh))
    return info


def _expect(path: Path, what: str, expected: str, found: str) -> None:
    if found != expected:
        raise IntegrityError(f"{path}: {what} is {found}, expected {expected}", "copy or build the image again")


def _manifest_path(sqsh: Path) -> Path:
    return sqsh.with_name(sqsh.name + ".json")


def _publish(aside: Path, path: Path) -> None:
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def _unpack(sqsh: Path, folder: Path) -> None:
    run_program("unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-dest", str(folder), str(sqsh))
