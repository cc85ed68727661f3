/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Included before everything else, in each file of the module.
 *
 * The module is a second FUSE beside the one that is built into the kernel. It exports nothing, since the built-in one
 * has exported those names; it leaves out the parts of FUSE that belong to other users of it (virtio-fs) or that famfs
 * does not use (io_uring); and its messages bear its own name.
 */
#ifndef FAMFS_FIRST_H
#define FAMFS_FIRST_H

#undef CONFIG_FUSE_DAX
#undef CONFIG_FUSE_IO_URING

#ifndef __ASSEMBLY__
#define pr_fmt(fmt) "famfs: " fmt

#include <linux/export.h>
#undef EXPORT_SYMBOL
#undef EXPORT_SYMBOL_GPL
#define EXPORT_SYMBOL(name)
#define EXPORT_SYMBOL_GPL(name)
#endif

#endif
