/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What FUSE and the famfs side know of each other.
 *
 * The files of FUSE call the functions below at the places that edits.py lists. Everything else of famfs lies in
 * famfs_params.c, famfs_map.c, famfs_slots.c, famfs_open.c and famfs_io.c. The messages and their order are described in
 * docs/protocol.md.
 */
#ifndef FAMFS_H
#define FAMFS_H

#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/pagemap.h>
#include <linux/rbtree.h>
#include <linux/types.h>

struct dax_device;
struct file;
struct fuse_conn;
struct inode;
struct iov_iter;
struct kiocb;
struct vm_area_struct;

/* INIT flag; offered to a mounter with CAP_SYS_RAWIO. */
#define FAMFS_DAX_FMAP		(1ULL << 43)

#define FAMFS_GET_FMAP		54
#define FAMFS_GET_DAXDEV	55

/* FUSE_DEV_IOC_DAXDEV_OPEN; its argument is a struct fuse_backing_map with the slot's number in place of the padding. */
#define FAMFS_IOC_DAXDEV_OPEN	_IOW(FUSE_DEV_IOC_MAGIC, 4, struct fuse_backing_map)

#define FAMFS_SLOTS		64

enum famfs_dialect {
	FAMFS_NONE,
	FAMFS_PULL,
	FAMFS_PUSH,
	FAMFS_PUSH_INTERLEAVE,
};

/* One dax device of a connection. */
struct famfs_slot {
	/* Held by the connection; NULL as long as there is none. */
	struct dax_device *dax;
	dev_t devt;
	/* The kernel refused the device once: the slot is of no use until the connection ends. */
	bool refused;
	/* Memory of the device has failed. */
	bool failed;
	/* Ranges of live maps. */
	struct rb_root_cached live;
};

/* The famfs side of a connection; part of struct fuse_conn. */
struct famfs_conn {
	/* As the module's parameters were when the file system was mounted. */
	enum famfs_dialect dialect;
	unsigned int minor;
	bool offer;
	bool strict;
	/* Withstand what kernels with the patches do not survive; only where maps were negotiated. */
	bool guard;
	/* The bit was in the INIT request, and came back in the reply. */
	bool offered;
	bool active;
	/* Taken while slots are filled, and while ranges of live maps change. */
	struct mutex lock;
	struct famfs_slot slots[FAMFS_SLOTS];
};

struct famfs_map;

/* famfs_params.c */
void famfs_conn_init(struct famfs_conn *famfs);
u64 famfs_offer(struct famfs_conn *famfs);
void famfs_accept(struct famfs_conn *famfs, u64 flags);

/* famfs_slots.c */
void famfs_conn_release(struct fuse_conn *fc);
long famfs_ioctl_daxdev_open(struct file *file, void __user *argument);

/* famfs_open.c */
int famfs_open(struct inode *inode);
void famfs_evict_begin(struct inode *inode);
void famfs_evict_end(struct inode *inode);
bool famfs_refuses_store(struct inode *inode);
void famfs_truncate_pagecache(struct inode *inode, loff_t size);
void famfs_truncate_pagecache_range(struct inode *inode, loff_t start, loff_t end);
void famfs_truncate_inode_pages_range(struct address_space *mapping, loff_t start, loff_t end);
int famfs_invalidate_inode_pages2_range(struct address_space *mapping, pgoff_t start, pgoff_t end);
int famfs_invalidate_inode_pages2(struct address_space *mapping);

/* famfs_io.c */
ssize_t famfs_read_iter(struct kiocb *iocb, struct iov_iter *to);
ssize_t famfs_write_iter(struct kiocb *iocb, struct iov_iter *from);
int famfs_mmap(struct file *file, struct vm_area_struct *vma);

/*
 * What FUSE does to the page cache of an inode when the server says that size or content is another one. In the cache
 * of an inode with a map are entries of the dax core, which must not be taken out while programs have the pages: guard=1
 * leaves them there.
 */
#define truncate_pagecache(inode, size) famfs_truncate_pagecache(inode, size)
#define truncate_pagecache_range(inode, start, end) famfs_truncate_pagecache_range(inode, start, end)
#define truncate_inode_pages_range(mapping, start, end) famfs_truncate_inode_pages_range(mapping, start, end)
#define invalidate_inode_pages2_range(mapping, start, end) famfs_invalidate_inode_pages2_range(mapping, start, end)
#define invalidate_inode_pages2(mapping) famfs_invalidate_inode_pages2(mapping)

#endif
