#!/bin/bash
# Stand in for a container whose node has eight GPUs:  with_gpus.sh COMMAND ...
# In a mount namespace of its own /dev also has nvidia0 to nvidia7. They are the device of /dev/null, as those of the testbed's gres.conf, and
# all of them open, because the testbed has no cgroup. So what a job gets follows from Slurm's variables alone.
set -eu
exec unshare --mount --propagation private -- bash -eu -c '
    dev=$(mktemp --directory)
    mount -t tmpfs none "$dev"
    for path in /dev/*; do
        if [ -d "$path" ] && [ ! -L "$path" ]; then
            mkdir "$dev/${path##*/}" && mount --rbind "$path" "$dev/${path##*/}"
        else
            cp -a "$path" "$dev"
        fi
    done
    for number in 0 1 2 3 4 5 6 7; do mknod -m 0666 "$dev/nvidia$number" c 1 3; done
    mknod -m 0666 "$dev/nvidiactl" c 1 3
    mount --move "$dev" /dev
    rmdir "$dev"
    exec "$@"
' with_gpus "$@"
