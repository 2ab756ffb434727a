#!/bin/bash
# Boot a real systemd in a box, as process 1 of fresh pid, mount, uts, ipc, net and cgroup namespaces.
# The box sees this machine's files through an overlay in memory: nothing it writes outlives it, except in $OUT.
# From test_systemd_box.py: BOX (an empty folder), OUT, REPO, PYTHON_PREFIX, SITE_PACKAGES, PYTHON (its name), MODEL.
set -eu
mount --make-rprivate /
mount -t tmpfs tmpfs "$BOX"
mkdir "$BOX/upper" "$BOX/work" "$BOX/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$BOX/upper,workdir=$BOX/work" "$BOX/root"
root=$BOX/root
mkdir -p "$root"/{proc,sys,dev,run,tmp,box-old,out}

mount -t proc proc "$root/proc"
mount --bind "$root/proc/sys" "$root/proc/sys"
mount -o remount,bind,ro "$root/proc/sys"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for folder in run tmp dev; do mount -t tmpfs tmpfs "$root/$folder"; done
mkdir "$root/dev/shm" "$root/dev/pts"
mount -t tmpfs tmpfs "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
touch "$OUT/console" "$root/dev/console"
mount --bind "$OUT/console" "$root/dev/console"
mount --bind "$OUT" "$root/out"

# The installation, where the service may read it, wherever it is on this machine.
mkdir -p "$root"/opt/{source,python} "$root/opt/mgpu/bin" "$root/opt/mgpu/lib/$PYTHON/site-packages"
chmod 755 "$root/opt"
mount --bind "$REPO" "$root/opt/source"
mount --bind "$PYTHON_PREFIX" "$root/opt/python"
mount --bind "$SITE_PACKAGES" "$root/opt/mgpu/lib/$PYTHON/site-packages"
printf 'home = /opt/python/bin\ninclude-system-site-packages = false\n' > "$root/opt/mgpu/pyvenv.cfg"
ln -s "/opt/python/bin/$PYTHON" "$root/opt/mgpu/bin/python"
cat > "$root/opt/mgpu/bin/mgpu-launch" <<'LAUNCHER'
#!/bin/sh
export PYTHONPATH=/opt/source/src LD_LIBRARY_PATH=/opt/python/lib
exec /opt/mgpu/bin/python -m mgpu.launch.cli "$@"
LAUNCHER
chmod 755 "$root/opt/mgpu/bin/mgpu-launch"
install -D -m 644 "$MODEL" "$root/var/lib/mgpu/models/model.gguf"

# What the box does: the tests of check_service.py, then the end.
: > "$root/etc/fstab"
for unit in systemd-udevd systemd-udev-trigger systemd-timesyncd systemd-random-seed systemd-modules-load; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit.service"
done
printf '[Unit]\nWants=box.service\nDefaultDependencies=no\n' > "$root/etc/systemd/system/box.target"
cat > "$root/etc/systemd/system/box.service" <<'UNIT'
[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
Environment=PYTHONPATH=/opt/source/src LD_LIBRARY_PATH=/opt/python/lib PYTHONDONTWRITEBYTECODE=1 IN_THE_BOX=1
WorkingDirectory=/opt/source
ExecStart=-/opt/mgpu/bin/python -m pytest -p no:cacheprovider -v --junit-xml=/out/result.xml tests/e2e/systemd_box/check_service.py
ExecStopPost=/bin/systemctl poweroff -ff
StandardOutput=file:/out/log
StandardError=file:/out/log
UNIT

cd "$root"
pivot_root . box-old
umount -l /box-old
mount --make-rshared /
exec env -i container=box PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --unit=box.target --show-status=no
