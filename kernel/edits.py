# SPDX-License-Identifier: GPL-2.0
"""The places of fs/fuse that the module changes, and how.

Each edit is one piece of text that must stand in its file exactly once. So a kernel whose FUSE is another one is
noticed before anything is compiled, and the first edit that does not fit is named.
"""

from dataclasses import dataclass
from pathlib import Path


class EditError(Exception):
    """The sources are not those that the edits were made for; the message names the edit."""


@dataclass(frozen=True)
class Edit:
    """Put `new` in the place of `old` in one file."""

    file: str
    why: str
    old: str
    new: str


def _before(file: str, why: str, anchor: str, new: str) -> Edit:
    return Edit(file, why, anchor, new + anchor)


def _after(file: str, why: str, anchor: str, new: str) -> Edit:
    return Edit(file, why, anchor, anchor + new)


OTHER_NAMES = [
    Edit("inode.c", "name of the file system type", '.name\t\t= "fuse",', '.name\t\t= "famfs",'),
    Edit("inode.c", "alias of the file system type", 'MODULE_ALIAS_FS("fuse");', 'MODULE_ALIAS_FS("famfs");'),
    Edit("inode.c", "no file system on block devices", "return register_filesystem(&fuseblk_fs_type);", "return 0;"),
    Edit("inode.c", "no file system on block devices", "\tunregister_filesystem(&fuseblk_fs_type);\n", ""),
    Edit("inode.c", "no file system on block devices", 'MODULE_ALIAS_FS("fuseblk");\n', ""),
    Edit("inode.c", "name of the inodes' slab cache", 'create("fuse_inode",', 'create("famfs_inode",'),
    Edit(
        "inode.c",
        "folder in sysfs",
        'kobject_create_and_add("fuse", fs_kobj)',
        'kobject_create_and_add("famfs", fs_kobj)',
    ),
    Edit("inode.c", "description", '"Filesystem in Userspace")', '"FUSE with extent maps, beside the kernel\'s own")'),
    Edit("dev.c", "name of the requests' slab cache", 'create("fuse_request",', 'create("famfs_request",'),
    Edit("dev.c", "number of the device", "\t.minor = FUSE_MINOR,", "\t.minor = MISC_DYNAMIC_MINOR,"),
    Edit("dev.c", "name of the device", '\t.name  = "fuse",', '\t.name  = "famfs",'),
    Edit("dev.c", "alias of the device", "MODULE_ALIAS_MISCDEV(FUSE_MINOR);\n", ""),
    Edit("dev.c", "alias of the device", 'MODULE_ALIAS("devname:fuse");\n', ""),
    Edit("control.c", "name of the control file system", '.name\t\t= "fusectl",', '.name\t\t= "famfsctl",'),
    Edit(
        "control.c", "alias of the control file system", 'MODULE_ALIAS_FS("fusectl");', 'MODULE_ALIAS_FS("famfsctl");'
    ),
    Edit("sysctl.c", "folder of the sysctls", 'register_sysctl("fs/fuse",', 'register_sysctl("fs/famfs",'),
    Edit("fuse_trace.h", "name of the trace system", "#define TRACE_SYSTEM fuse\n", "#define TRACE_SYSTEM famfs\n"),
]
"""FUSE's names, so that this module can be loaded beside it."""

CONNECTION = [
    _after("fuse_i.h", "declarations", "#include <linux/user_namespace.h>\n", '\n#include "famfs.h"\n'),
    _after(
        "fuse_i.h",
        "the map of an inode",
        "\t/** @submount_lookup: Submount specific lookup tracking */\n"
        "\tstruct fuse_submount_lookup *submount_lookup;\n",
        "\t/** @famfs_map: where the bytes of the file are */\n\tstruct famfs_map *famfs_map;\n",
    ),
    _after(
        "fuse_i.h",
        "the famfs side of a connection",
        "\t/** @chan: transport layer object */\n\tstruct fuse_chan *chan;\n",
        "\t/** @famfs: devices and dialect */\n\tstruct famfs_conn famfs;\n",
    ),
    _after(
        "inode.c",
        "parameters of a new connection",
        "\tINIT_WORK(&fc->epoch_work, fuse_epoch_work);\n",
        "\tfamfs_conn_init(&fc->famfs);\n",
    ),
    _before(
        "inode.c",
        "devices of a connection that ends",
        "\tcancel_work_sync(&fc->epoch_work);\n",
        "\tfamfs_conn_release(fc);\n",
    ),
    Edit(
        "inode.c",
        "minor version in INIT",
        "ia->in.minor = FUSE_KERNEL_MINOR_VERSION;",
        "ia->in.minor = fm->fc->famfs.minor;",
    ),
    _before("inode.c", "flags in INIT", "\tia->in.flags = flags;\n", "\tflags |= famfs_offer(&fm->fc->famfs);\n"),
    _before(
        "inode.c",
        "flags in the reply to INIT",
        "\t\t\tif (flags & FUSE_REQUEST_TIMEOUT)\n",
        "\t\t\tfamfs_accept(&fc->famfs, flags);\n",
    ),
    _after(
        "dev.c",
        "declarations",
        '#include "dev_uring_i.h"\n',
        '\n#include <linux/fuse.h>\n#include "famfs.h"\n',
    ),
    _before(
        "dev.c",
        "the ioctl that pushes devices",
        "\tcase FUSE_DEV_IOC_SYNC_INIT:\n",
        "\tcase FAMFS_IOC_DAXDEV_OPEN:\n\t\treturn famfs_ioctl_daxdev_open(file, argp);\n\n",
    ),
]
"""INIT, and what a connection owns."""

INODES = [
    _before(
        "inode.c",
        "end of an inode, before its pages go",
        "\ttruncate_inode_pages_final(&inode->i_data);\n",
        "\tfamfs_evict_begin(inode);\n",
    ),
    _after("inode.c", "end of an inode, before FORGET", "\tclear_inode(inode);\n", "\tfamfs_evict_end(inode);\n"),
    Edit(
        "file.c",
        "the first open fetches the map",
        "\t\terr = fuse_finish_open(inode, file);\n",
        "\t\terr = famfs_open(inode);\n\t\tif (!err)\n\t\t\terr = fuse_finish_open(inode, file);\n",
    ),
    Edit(
        "file.c",
        "an open drops no pages of a mapped inode",
        "else if (!(ff->open_flags & FOPEN_KEEP_CACHE))",
        "else if (!(ff->open_flags & FOPEN_KEEP_CACHE) && !fi->famfs_map)",
    ),
    Edit(
        "iomode.c",
        "a mapped inode has no io mode",
        "if (FUSE_IS_DAX(inode) || !ff->args)",
        "if (fi->famfs_map || !ff->args)",
    ),
    _before(
        "iomode.c",
        "a user of the page cache who comes after the map",
        "\t/*\n\t * Check if inode entered passthrough io mode while waiting for parallel\n",
        "\tif (fi->famfs_map) {\n"
        "\t\tclear_bit(FUSE_I_CACHE_IO_MODE, &fi->state);\n"
        "\t\tspin_unlock(&fi->lock);\n"
        "\t\treturn 0;\n"
        "\t}\n\n",
    ),
    _before(
        "notify.c",
        "no pages for inodes that can have a map",
        "\tmapping = inode->i_mapping;\n\tfile_size = i_size_read(inode);\n\tend = pos + num;\n",
        "\tif (famfs_refuses_store(inode)) {\n\t\terr = -EINVAL;\n\t\tgoto out_iput;\n\t}\n\n",
    ),
]
"""Inodes that get a map, and lose it."""

FILES = [
    _before(
        "file.c",
        "read(2)",
        "\tif (FUSE_IS_DAX(inode))\n\t\treturn fuse_dax_read_iter(iocb, to);\n",
        "\tif (get_fuse_inode(inode)->famfs_map)\n\t\treturn famfs_read_iter(iocb, to);\n",
    ),
    _before(
        "file.c",
        "write(2)",
        "\tif (FUSE_IS_DAX(inode))\n\t\treturn fuse_dax_write_iter(iocb, from);\n",
        "\tif (get_fuse_inode(inode)->famfs_map)\n\t\treturn famfs_write_iter(iocb, from);\n",
    ),
    _before(
        "file.c",
        "mmap(2)",
        "\t/* DAX mmap is superior to direct_io mmap */\n",
        "\tif (get_fuse_inode(inode)->famfs_map)\n\t\treturn famfs_mmap(file, vma);\n\n",
    ),
    Edit(
        "file.c",
        "with guard=1 a private mapping of a FOPEN_DIRECT_IO file counts as a user of the page cache",
        "\t\tif (!(vma->vm_flags & VM_MAYSHARE)) {\n",
        "\t\tif (!(vma->vm_flags & VM_MAYSHARE) && !fc->famfs.guard) {\n",
    ),
    _before(
        "file.c",
        "mmap(2) that has waited for the page cache",
        "\tif ((vma->vm_flags & VM_SHARED) && (vma->vm_flags & VM_MAYWRITE))\n\t\tfuse_link_write_file(file);\n",
        "\tif (get_fuse_inode(inode)->famfs_map)\n\t\treturn famfs_mmap(file, vma);\n\n",
    ),
    Edit(
        "file.c",
        "with guard=1 splice(2) out of a FOPEN_DIRECT_IO file leaves no pages in the cache",
        "\t\treturn fuse_passthrough_splice_read(in, ppos, pipe, len, flags);\n\telse\n",
        "\t\treturn fuse_passthrough_splice_read(in, ppos, pipe, len, flags);\n"
        "\telse if ((ff->open_flags & FOPEN_DIRECT_IO) && ff->fm->fc->famfs.guard)\n"
        "\t\treturn copy_splice_read(in, ppos, pipe, len, flags);\n"
        "\telse\n",
    ),
    _before(
        "file.c",
        "splice(2) into a file",
        "\t/* FOPEN_DIRECT_IO overrides FOPEN_PASSTHROUGH */\n"
        "\tif (fuse_file_passthrough(ff) && !(ff->open_flags & FOPEN_DIRECT_IO))\n"
        "\t\treturn fuse_passthrough_splice_write(",
        "\tif (get_fuse_inode(file_inode(out))->famfs_map)\n\t\treturn -EIO;\n\n",
    ),
]
"""What programs do with files that have a map."""

EDITS = [*OTHER_NAMES, *CONNECTION, *INODES, *FILES]


def apply(folder: Path) -> None:
    """Change the sources of fs/fuse in `folder`. Raises EditError, and changes nothing, where an edit does not fit."""
    texts: dict[str, str] = {}
    for edit in EDITS:
        path = folder / edit.file
        if edit.file not in texts:
            if not path.exists():
                raise EditError(f"fs/fuse/{edit.file} does not exist in this kernel ({edit.why})")
            texts[edit.file] = path.read_text()
        found = texts[edit.file].count(edit.old)
        if found != 1:
            first = edit.old.strip().splitlines()[0].strip()
            raise EditError(f"fs/fuse/{edit.file}, {edit.why}: {first!r} stands there {found} times, not once")
        texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
    for name, text in texts.items():
        (folder / name).write_text(text)
