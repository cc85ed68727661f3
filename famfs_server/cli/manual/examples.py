# SPDX-License-Identifier: Apache-2.0
"""Examples for man pages: what is typed, and what it does."""

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "mkfs.famfs": (
        ("mkfs.famfs /dev/dax0.0", "A file system on a device in devdax mode, with a log for 15420 files."),
        ("mkfs.famfs -f --loglen 1g /dev/dax0.0", "Erase what is there, and make a log for 1.9 million files."),
    ),
    "mount.famfs": (
        ("mount -t famfs /dev/dax0.0 /mnt/famfs", "mount(8) runs this program."),
        ("mount -t famfs -o ro,noexec /dev/dax0.0 /mnt/famfs", "Options are separated by commas; see famfs(5)."),
    ),
    "umount.famfs": (("umount /mnt/famfs", "umount(8) runs this program."),),
    "fsck.famfs": (
        ("fsck.famfs /dev/dax0.0", "Look, and change nothing."),
        ("fsck.famfs -y /dev/dax0.0", "Mend what can be mended without losing a file."),
    ),
    "famfs-server": (
        ("famfs-server -o noatime /dev/dax0.0 /mnt/famfs", "Serve until the unmount, with messages on the terminal."),
    ),
    "famfs_fused": (
        ("famfs_fused -f -o daxdev=/dev/dax0.0,shadow=/tmp/shadow /mnt/famfs", "As the reference starts its server."),
    ),
    "famfs mount": (
        ("famfs mount /dev/dax0.0 /mnt/famfs", "Mount; the command returns when the mount can be used."),
        ("famfs mount -o fmap=require /dev/dax0.0 /mnt/famfs", "Fail unless the kernel can map files itself."),
    ),
    "famfs umount": (("famfs umount /mnt/famfs", "Unmount, and return when the device is free."),),
    "famfs upgrade": (("famfs upgrade /mnt/famfs", "After an update: the new program takes over."),),
    "famfs creat": (
        ("famfs creat -s 1g /mnt/famfs/file", "A file of 1 GiB, filled with zeroes."),
        ("famfs creat -s 64m -r -S 7 /mnt/famfs/file", "A file that famfs verify can check."),
        (
            "famfs creat -s 1g -B 4 -N 3 /mnt/famfs/striped",
            "A file in three parts, each in another quarter of the device.",
        ),
        ("famfs creat -M /mnt/famfs/a,1m -M /mnt/famfs/b,2m,7", "Two files at once, the second with data."),
        ("famfs creat --daxdev /dev/dax0.0 -s 8m dir/file", "A file on a device that is not mounted."),
    ),
    "famfs verify": (
        ("famfs verify -f /mnt/famfs/file -S 7", "Whether the file has the data of seed 7."),
        ("famfs verify -m /mnt/famfs/a,1 -m /mnt/famfs/b,2", "The same for several files."),
    ),
    "famfs mkdir": (("famfs mkdir -p -m 750 /mnt/famfs/a/b", "A directory, and its parents."),),
    "famfs cp": (
        ("famfs cp data.bin /mnt/famfs/", "Copy one file."),
        ("famfs cp -r tree /mnt/famfs/tree", "Copy a tree; again, after an interruption, to complete it."),
        ("famfs cp -r -c tree /mnt/famfs/tree", "Compare the copy with its source."),
    ),
    "famfs export": (("famfs export /mnt/famfs -o famfs.tar", "Save all that is there before a new mkfs.famfs."),),
    "famfs import": (("famfs import famfs.tar /mnt/famfs", "Put it back."),),
    "famfs check": (("famfs check /mnt/famfs", "Whether every file of the log is there, with its size and mode."),),
    "famfs fsck": (
        ("famfs fsck -h /mnt/famfs", "Check a file system while it is mounted."),
        ("famfs fsck --repair --save bytes.json /dev/dax0.0", "Mend one that is not, and keep the bytes as they were."),
    ),
    "famfs devadd": (("famfs devadd /dev/dax1.0 /mnt/famfs", "New files may use the second device from then on."),),
    "famfs status": (
        ("famfs status", "Every mount of this host."),
        ("famfs status --watch /mnt/famfs", "One of them, again every second."),
    ),
    "famfs top": (("famfs top -d 5", "All mounts, every five seconds."),),
    "famfs metrics": (
        ("famfs metrics -o /var/lib/node_exporter/famfs.prom", "For a textfile collector, from a timer."),
    ),
    "famfs list": (("famfs list --json", "Mounts and devices, for a script."),),
    "famfs doctor": (("famfs doctor /dev/dax0.0", "Why this device cannot be mounted, and what mends it."),),
    "famfs loglevel": (("famfs loglevel /mnt/famfs debug", "Log everything from now on."),),
    "famfs watch": (
        ("famfs watch /mnt/famfs incoming", "What appears below /mnt/famfs/incoming, whichever host makes it."),
        ("famfs watch --from 0 /mnt/famfs", "All that was ever made, and then what is."),
    ),
    "famfs logplay": (
        ("famfs logplay /mnt/famfs", "What the log holds, and what of it cannot be shown."),
        ("famfs logplay --shadow /tmp/shadow --daxdev /dev/dax0.0", "The tree as files of YAML, for the reference."),
    ),
    "famfs getmap": (("famfs getmap /mnt/famfs/striped", "The places of a file on the device."),),
    "famfs map": (
        ("famfs map /mnt/famfs", "In the terminal."),
        ("famfs map -o famfs.svg /dev/dax0.0", "As a picture, of a device that is not mounted."),
    ),
    "famfs flush": (("famfs flush /mnt/famfs/file", "After stores to a mapping, and before reading another host's."),),
    "famfs chkread": (("famfs chkread -l /mnt/famfs/.meta/.log", "Compare both views of the log."),),
    "famfs mkmeta": (("famfs mkmeta /dev/dax0.0", "Whether the meta files of its mount are there."),),
    "pcq": (
        ("pcq --create -b 1024 -n 4096 /mnt/famfs/queue", "Make a queue, on the master."),
        ("pcq --producer -N 100000 /mnt/famfs/queue", "Put messages, on one host."),
        ("pcq --consumer -N 100000 /mnt/famfs/queue", "Take and check them, on another one."),
    ),
}
"""By tool, as its name is typed; what is a command of famfs and a program has one entry, the program's."""
