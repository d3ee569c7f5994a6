"""The substrate as one squashfs image: build, digest, verify, mount read-only, fork.

An image's identity is its tree digest: the sha256 over every path below the payload's root in byte order, with git's mode strings
(`040755` folder, `100644` file, `100755` executable, `120000` symlink) and each file's sha256 or link target. Owner, time stamps,
umask, hard links and compression do not enter it, so an unpacked copy, a kernel mount and a FUSE mount of one image agree.
The sha256 of the .sqsh file only guards transport: it is in the manifest beside the image (`substrate.sqsh.json`), finds a flipped
or missing byte before anything parses the file, and proves nothing about what the payload is.

What the node has decides how an image is mounted (`choose_backend`), and the choice is part of the returned record:

    loop        kernel squashfs; wants root of the machine
    squashfuse  an ordinary user with /dev/fuse, inside its own user namespace
    unpack      neither: unsquashfs to node-local scratch, bound read-only

A fork is a writable view for one trial: a kernel overlay over the pristine mount, else fuse-overlayfs, else a plain copy. Its upper
layer lives in node-local scratch, because Lustre and NFS cannot carry one.

Everything here mounts into the private mount namespace of the calling process (`sandbox.enter_private_namespace`) and refuses to
run outside one. Such mounts vanish with their last process; FUSE daemons are processes too and get SIGKILL when the thread that
started them ends, so call from the main thread. Files in scratch outlive a SIGKILL; mounts do not.
"""

import hashlib
import json
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import ConfigError, IntegrityError, NotFound, WorkFailed

BACKENDS = ("loop", "squashfuse", "unpack")
FORK_BACKENDS = ("overlay", "fuse-overlayfs", "copy")
MANIFEST_SCHEMA = 1

# With these the bytes do not depend on run, thread count, owner, time, umask or hard links.
BUILD_FLAGS = (
    *("-noappend", "-quiet", "-no-progress", "-comp", "zstd"),
    *("-all-root", "-mkfs-time", "0", "-all-time", "0", "-no-xattrs", "-no-exports", "-no-hardlinks", "-root-mode", "0755"),
    *("-action", "chmod(0755)@type(d)"),
    *("-action", "chmod(0755)@type(f)&&perm(/u+x)"),
    *("-action", "chmod(0644)@type(f)&&!perm(/u+x)"),
)
MOUNT_OPTIONS = "nosuid,nodev"
FUSE_START_SECONDS = 10.0


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
        """Read the whole tree again. Raises IntegrityError when it is no longer what it was mounted as."""
        _expect(str(self.root), "tree digest", self.tree_digest, tree_digest(self.root))


@dataclass(frozen=True)
class Fork:
    """A writable view of an image at `root`, made by `backend`. What is in it is never believed."""

    root: Path
    backend: str


def tree_digest(root: Path) -> str:
    """The identity of the payload below `root`.

    Raises ConfigError when it holds anything but folders, regular files and symlinks.
    """
    digest = hashlib.sha256()
    for name in _names(root):
        path = root / name
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            kind, content = "120000", os.readlink(path)
        elif stat.S_ISDIR(mode):
            kind, content = "040755", ""
        elif stat.S_ISREG(mode):
            kind, content = "100755" if mode & stat.S_IXUSR else "100644", _file_sha256(path)
        else:
            raise ConfigError(f"{path} is a device, fifo or socket", "a payload holds folders, regular files and symlinks")
        # Neither a path nor a link target can hold a NUL, so the fields cannot run into each other.
        digest.update(b"".join(os.fsencode(field) + b"\0" for field in (name, kind, content)))
    return digest.hexdigest()


def build(payload_dir: Path, out_sqsh: Path) -> ImageInfo:
    """Pack `payload_dir` into `out_sqsh` and its manifest; equal payloads give equal bytes.

    Both files are complete when they exist. The digest is taken from the folder: a payload that changes while it is packed gives an
    image that its own manifest refuses at the first mount.

    Raises ConfigError for a payload that cannot be packed, NotFound without mksquashfs, WorkFailed when it fails.
    """
    if not payload_dir.is_dir():
        raise NotFound(f"no payload folder {payload_dir}")
    digest = tree_digest(payload_dir)
    num_files = sum(stat.S_ISREG((payload_dir / name).lstat().st_mode) for name in _names(payload_dir))
    aside = out_sqsh.with_name(f".{out_sqsh.name}.{os.getpid()}")
    try:
        _run("mksquashfs", str(payload_dir), str(aside), *BUILD_FLAGS)
        info = ImageInfo(digest, _file_sha256(aside), num_files, aside.stat().st_size, _builder_version())
        _publish(aside, out_sqsh)
    finally:
        aside.unlink(missing_ok=True)
    # The manifest comes second: between the two renames the old manifest refuses the new image, which is the safe way round.
    aside.write_text(json.dumps({"schema": MANIFEST_SCHEMA, **asdict(info)}, indent=1, sort_keys=True) + "\n")
    _publish(aside, _manifest_path(out_sqsh))
    return info


def show(sqsh: Path) -> ImageInfo:
    """What the manifest beside `sqsh` claims. Raises NotFound without one, IntegrityError for one of another schema."""
    path = _manifest_path(sqsh)
    if not path.is_file():
        raise NotFound(f"no image manifest {path}", "build the image, or copy its .json along with it")
    try:
        fields = json.loads(path.read_text())
        if fields.pop("schema") != MANIFEST_SCHEMA:
            raise ValueError(f"schema is not {MANIFEST_SCHEMA}")
        return ImageInfo(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is not an image manifest: {error}") from error


def verify(sqsh: Path, expected_tree_digest: str, scratch_dir: Path | None = None) -> ImageInfo:
    """Check manifest, bytes and content of an image that is not mounted, by unpacking it into `scratch_dir` (default: TMPDIR).

    Raises IntegrityError naming the image, the expected and the found digest.
    """
    info = _verify_file(sqsh, expected_tree_digest)
    with tempfile.TemporaryDirectory(prefix="verify-", dir=scratch_dir) as folder:
        _unpack(sqsh, Path(folder, "payload"))
        _expect(str(sqsh), "tree digest", expected_tree_digest, tree_digest(Path(folder, "payload")))
    return info


def choose_backend() -> str:
    """The fastest mount backend this node and user can have. A squashfs module that is not loaded counts as absent."""
    if _is_machine_root() and Path("/dev/loop-control").exists() and "\tsquashfs\n" in Path("/proc/filesystems").read_text():
        return "loop"
    if shutil.which("squashfuse") and os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "squashfuse"
    return "unpack"


@contextmanager
def mounted(sqsh: Path, expected_tree_digest: str, scratch_dir: Path, backend: str | None = None) -> Iterator[Mount]:
    """The pristine image as a read-only mount below `scratch_dir`, verified on entry and, unless the body raised, on exit.

    Raises IntegrityError naming the image, the expected and the found digest; ConfigError outside a private namespace; WorkFailed when
    the backend fails.
    """
    backend = backend or choose_backend()
    _require_private_namespace()
    _verify_file(sqsh, expected_tree_digest)
    with ExitStack() as stack:
        folder = _scratch_folder(stack, scratch_dir, "pristine-")
        root = folder / "root"
        root.mkdir()
        if backend == "loop":
            _run("mount", "-t", "squashfs", "-o", f"loop,ro,{MOUNT_OPTIONS}", str(sqsh), str(root))
            stack.callback(_unmount, root)
        elif backend == "squashfuse":
            # allow_other: the trial's uid reads this mount, and FUSE otherwise serves only the uid that mounted it.
            _serve_fuse(stack, root, "squashfuse", "-f", "-o", f"ro,allow_other,{MOUNT_OPTIONS}", str(sqsh), str(root))
        elif backend == "unpack":
            _unpack(sqsh, folder / "payload")
            _run("mount", "--bind", str(folder / "payload"), str(root))
            stack.callback(_unmount, root)
            _run("mount", "-o", f"remount,bind,ro,{MOUNT_OPTIONS}", str(root))
        else:
            raise ConfigError(f"no mount backend {backend!r}", f"valid: {', '.join(BACKENDS)}")
        mount = Mount(root, expected_tree_digest, backend)
        mount.verify()
        yield mount
        mount.verify()


@contextmanager
def forked(pristine: Mount, scratch_dir: Path, owner: int, backend: str | None = None) -> Iterator[Fork]:
    """A fork of `pristine` in which uid `owner` may change everything; it is deleted on exit.

    Raises WorkFailed when no backend (or not the named one) works here, ConfigError for an unknown one.
    """
    if backend is not None and backend not in FORK_BACKENDS:
        raise ConfigError(f"no fork backend {backend!r}", f"valid: {', '.join(FORK_BACKENDS)}")
    candidates = FORK_BACKENDS if backend is None else (backend,)
    with ExitStack() as stack:
        root, used = _first_that_works(stack, pristine.root, scratch_dir, owner, candidates)
        yield Fork(root, used)


def _first_that_works(
    stack: ExitStack, lower: Path, scratch_dir: Path, owner: int, candidates: tuple[str, ...]
) -> tuple[Path, str]:
    failures = []
    for backend in candidates:
        with ExitStack() as attempt:
            folder = _scratch_folder(attempt, scratch_dir, "fork-")
            try:
                root = _fork_by(backend, attempt, lower, folder, owner)
            except (WorkFailed, NotFound) as error:
                failures.append(str(error))
                continue
            stack.push(attempt.pop_all())
            return root, backend
    raise WorkFailed(f"no fork of {lower} in {scratch_dir}: {'; '.join(failures)}")


def _fork_by(backend: str, stack: ExitStack, lower: Path, folder: Path, owner: int) -> Path:
    root, upper, work = folder / "root", folder / "upper", folder / "work"
    if backend == "copy":
        # mksquashfs wrote 0755 and 0644, so the owner of the copy may write everywhere.
        shutil.copytree(lower, root, symlinks=True)
        _give(root, owner)
        return root
    for path in (root, upper, work):
        path.mkdir(mode=0o755)
    layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
    if backend == "overlay":
        # A user namespace may not write trusted.* attributes. With metacopy the change of owner below copies no file's content.
        how = "metacopy=on" if _is_machine_root() else "userxattr"
        _run("mount", "-t", "overlay", "-o", f"{layers},{how},{MOUNT_OPTIONS}", "overlay", str(root))
        stack.callback(_unmount, root)
        _give(root, owner)
    else:
        options = f"{layers},squash_to_uid={owner},squash_to_gid={owner},allow_other,{MOUNT_OPTIONS}"
        _serve_fuse(stack, root, "fuse-overlayfs", "-f", "-o", options, str(root))
    return root


def _give(root: Path, owner: int) -> None:
    if owner == os.geteuid():
        return
    os.chown(root, owner, owner)
    for name in _names(root):
        os.chown(root / name, owner, owner, follow_symlinks=False)


def _serve_fuse(stack: ExitStack, root: Path, *command: str) -> None:
    """Run a FUSE daemon in the foreground until `stack` closes. A daemon keeps its namespace alive, so it must not outlive us."""
    _require_program(command[0])
    with tempfile.TemporaryFile() as log:
        daemon = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        stack.callback(daemon.wait)
        stack.callback(daemon.kill)
        deadline = time.monotonic() + FUSE_START_SECONDS
        while not os.path.ismount(root):
            if daemon.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise WorkFailed(f"{command[0]} did not mount {root}: {log.read().decode(errors='replace').strip()}")
            time.sleep(0.005)
        stack.callback(_unmount, root)


def _verify_file(sqsh: Path, expected_tree_digest: str) -> ImageInfo:
    if not sqsh.is_file():
        raise NotFound(f"no image {sqsh}")
    info = show(sqsh)
    _expect(str(sqsh), "tree digest in the manifest", expected_tree_digest, info.tree_digest)
    _expect(str(sqsh), "sha256 of the file", info.sqsh_sha256, _file_sha256(sqsh))
    return info


def _expect(name: str, what: str, expected: str, found: str) -> None:
    if found != expected:
        raise IntegrityError(f"{name}: {what} is {found}, expected {expected}", "build or copy the image again")


def _names(root: Path) -> list[str]:
    """Every path below `root`, relative, sorted by its bytes (a locale would sort differently from node to node)."""

    def fail(error: OSError) -> None:
        raise error

    names = []
    for folder, subfolders, files in os.walk(root, onerror=fail):
        names += [os.path.relpath(os.path.join(folder, name), root) for name in subfolders + files]
    return sorted(names, key=os.fsencode)


def _file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_path(sqsh: Path) -> Path:
    return sqsh.with_name(sqsh.name + ".json")


def _builder_version() -> str:
    return _run("mksquashfs", "-version").splitlines()[0]


def _publish(aside: Path, path: Path) -> None:
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    os.replace(aside, path)


def _unpack(sqsh: Path, folder: Path) -> None:
    _run("unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-dest", str(folder), str(sqsh))


def _scratch_folder(stack: ExitStack, scratch_dir: Path, prefix: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=scratch_dir))
    # Errors are ignored: what is left of a fork in scratch is a matter of space, and must not hide the outcome of a trial.
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _unmount(root: Path) -> None:
    # Lazy: a busy mount leaves this namespace now and the machine with its last user.
    _run("umount", "--lazy", str(root))


def _is_machine_root() -> bool:
    """Root of the initial user namespace, not a user who is mapped to root in a namespace of its own."""
    return os.geteuid() == 0 and Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


def _require_private_namespace() -> None:
    try:
        shared = os.getpid() != 1 and os.readlink("/proc/1/ns/mnt") == os.readlink("/proc/self/ns/mnt")
    except OSError:
        # Only root of the machine may look at pid 1; anybody else mounts nowhere but in a user namespace, where it is root.
        shared = os.geteuid() != 0
    if shared:
        raise ConfigError("images are mounted only in a private mount namespace", "call sandbox.enter_private_namespace first")


def _require_program(name: str) -> None:
    if shutil.which(name) is None:
        raise NotFound(f"no program {name}", "install squashfs-tools, squashfuse, fuse-overlayfs")


def _run(program: str, *arguments: str) -> str:
    _require_program(program)
    # SOURCE_DATE_EPOCH would clash with the time flags of mksquashfs.
    env = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    done = subprocess.run([program, *arguments], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise WorkFailed(f"{program} exited {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
