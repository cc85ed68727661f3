// SPDX-License-Identifier: GPL-2.0
/*
 * Reads, writes and page faults of inodes that have a map: all of them go to the device, and no request is sent.
 */

#include "famfs_internal.h"

#include <linux/dax.h>
#include <linux/iomap.h>
#include <linux/uio.h>

/* Whether a mapped file may be used. What is found wrong once stays so until the inode is evicted. */
static int usable(struct inode *inode, struct famfs_map *map)
{
	if (READ_ONCE(map->failed))
		return -EIO;
	if (i_size_read(inode) != map->file_size) {
		WARN(famfs_conn_of(inode)->strict, "famfs: nodeid %llu has %lld bytes, and by its map %llu\n",
		     get_node_id(inode), i_size_read(inode), map->file_size);
		WRITE_ONCE(map->failed, true);
		return -ENXIO;
	}
	return IS_DAX(inode) ? 0 : -ENXIO;
}

static int slot_usable(struct famfs_map *map, const struct famfs_slot *slot)
{
	if (!READ_ONCE(slot->dax)) {
		WRITE_ONCE(map->failed, true);
		return -EIO;
	}
	if (READ_ONCE(slot->failed)) {
		WRITE_ONCE(map->failed, true);
		return -EHWPOISON;
	}
	return 0;
}

/* Named as in the patches, because servers look for this symbol to know a kernel with famfs. */
static int famfs_fuse_iomap_begin(struct inode *inode, loff_t pos, loff_t length, unsigned int flags,
				  struct iomap *iomap, struct iomap *source)
{
	struct famfs_map *map = famfs_map_of(inode);
	const struct famfs_slot *slot;
	struct famfs_piece piece;
	int err;

	err = map ? usable(inode, map) : -EIO;
	if (!err)
		err = famfs_map_resolve(map, pos, &piece);
	if (err)
		return err;
	slot = &famfs_conn_of(inode)->slots[piece.slot];
	err = slot_usable(map, slot);
	if (err)
		return err;
	iomap->type = IOMAP_MAPPED;
	iomap->flags = 0;
	iomap->offset = piece.start;
	iomap->addr = piece.offset;
	iomap->length = piece.length;
	iomap->dax_dev = slot->dax;
	return 0;
}

static const struct iomap_ops famfs_iomap_ops = {
	.iomap_begin = famfs_fuse_iomap_begin,
};

/* What of an access lies before the end of the file: the rest is cut off. */
static bool within_file(struct kiocb *iocb, struct iov_iter *iter)
{
	loff_t size = i_size_read(file_inode(iocb->ki_filp));

	if (iocb->ki_pos >= size)
		return false;
	iov_iter_truncate(iter, size - iocb->ki_pos);
	return iov_iter_count(iter);
}

ssize_t famfs_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	ssize_t done;

	done = usable(inode, famfs_map_of(inode));
	if (done || !within_file(iocb, to))
		return done;
	inode_lock_shared(inode);
	done = dax_iomap_rw(iocb, to, &famfs_iomap_ops);
	inode_unlock_shared(inode);
	file_accessed(iocb->ki_filp);
	return done;
}

/* Files do not grow: nothing is written at the end of a file or behind it, also not with O_APPEND. */
ssize_t famfs_write_iter(struct kiocb *iocb, struct iov_iter *from)
{
	struct inode *inode = file_inode(iocb->ki_filp);
	ssize_t done;

	done = usable(inode, famfs_map_of(inode));
	if (done || !within_file(iocb, from))
		return done;
	inode_lock(inode);
	done = dax_iomap_rw(iocb, from, &famfs_iomap_ops);
	inode_unlock(inode);
	return done;
}

static vm_fault_t fault(struct vm_fault *vmf, unsigned int order, bool write)
{
	struct inode *inode = file_inode(vmf->vma->vm_file);
	unsigned long pfn;
	vm_fault_t result;

	if (write)
		sb_start_pagefault(inode->i_sb);
	filemap_invalidate_lock_shared(inode->i_mapping);
	result = dax_iomap_fault(vmf, order, &pfn, NULL, &famfs_iomap_ops);
	if (result & VM_FAULT_NEEDDSYNC)
		result = dax_finish_sync_fault(vmf, order, pfn);
	filemap_invalidate_unlock_shared(inode->i_mapping);
	if (write)
		sb_end_pagefault(inode->i_sb);
	return result;
}

static bool stores(const struct vm_fault *vmf)
{
	return (vmf->flags & FAULT_FLAG_WRITE) && (vmf->vma->vm_flags & VM_SHARED);
}

static vm_fault_t famfs_fault(struct vm_fault *vmf)
{
	return fault(vmf, 0, stores(vmf));
}

static vm_fault_t famfs_huge_fault(struct vm_fault *vmf, unsigned int order)
{
	return fault(vmf, order, stores(vmf));
}

static vm_fault_t famfs_mkwrite(struct vm_fault *vmf)
{
	return fault(vmf, 0, true);
}

static const struct vm_operations_struct famfs_vm_ops = {
	.fault = famfs_fault,
	.huge_fault = famfs_huge_fault,
	.page_mkwrite = famfs_mkwrite,
	.pfn_mkwrite = famfs_mkwrite,
};

int famfs_mmap(struct file *file, struct vm_area_struct *vma)
{
	const struct famfs_map *map = famfs_map_of(file_inode(file));

	if (READ_ONCE(map->failed) || map->shared)
		return -EIO;
	file_accessed(file);
	vma->vm_ops = &famfs_vm_ops;
	vm_flags_set(vma, VM_HUGEPAGE);
	return 0;
}
