// SPDX-License-Identifier: GPL-2.0
/*
 * The dax devices of a connection. Maps name them by the number of their slot.
 *
 * A device is held, and no other file system can have it, until the connection is freed. A device that the dax core
 * refuses costs the slot for the life of the connection; a name that leads nowhere does not.
 */

#include "famfs_internal.h"
#include "dev.h"
#include "fuse_dev_i.h"

#include <linux/cdev.h>
#include <linux/cred.h>
#include <linux/dax.h>
#include <linux/file.h>
#include <linux/module.h>
#include <linux/namei.h>
#include <linux/uaccess.h>

/* Memory of a device has failed, or its driver goes: nothing of it is trusted from now on. */
static int famfs_memory_failure(struct dax_device *dax, u64 offset, u64 length, int flags)
{
	struct fuse_conn *fc = dax_holder(dax);
	u32 number;

	if (!fc)
		return -EOPNOTSUPP;
	for (number = 0; number < FAMFS_SLOTS; number++) {
		struct famfs_slot *slot = &fc->famfs.slots[number];

		if (READ_ONCE(slot->dax) == dax) {
			pr_err("memory failure in slot %u at %llu, %llu bytes\n", number, offset, length);
			WRITE_ONCE(slot->failed, true);
		}
	}
	return 0;
}

static const struct dax_holder_operations famfs_holder = {
	.notify_failure = famfs_memory_failure,
};

/*
 * A character device that is open: is it a dax one? To the dax core a foreign number would be a new device of its own,
 * and its numbering would suffer when that goes.
 */
static bool is_dax(const struct inode *node)
{
	const struct module *owner = node->i_cdev ? node->i_cdev->owner : NULL;

	return owner && (!strcmp(owner->name, "device_dax") || !strcmp(owner->name, "fsdev_dax"));
}

/* Take the device behind an open character device for a free slot. Called with famfs->lock held. */
static int slot_fill(struct fuse_conn *fc, struct famfs_slot *slot, const struct inode *node)
{
	struct dax_device *dax;
	int err;

	if (!is_dax(node)) {
		slot->refused = true;
		return -ENODEV;
	}
	dax = dax_dev_get(node->i_rdev);
	if (!dax) {
		slot->refused = true;
		return -ENODEV;
	}
	err = fs_dax_get(dax, fc, &famfs_holder);
	/* fs_dax_get() has a reference of its own. */
	put_dax(dax);
	if (err) {
		slot->refused = true;
		return err;
	}
	slot->devt = node->i_rdev;
	WRITE_ONCE(slot->dax, dax);
	return 0;
}

/*
 * Take the device that the server has named for a slot, dialect "pull". The path is that of whoever opens the file, and
 * permissions of the node do not matter. Errors that say nothing of a device leave the slot free.
 */
int famfs_slot_pull(struct fuse_conn *fc, u32 number, const char *name)
{
	struct famfs_slot *slot = &fc->famfs.slots[number];
	struct path path;
	struct file *file;
	int err;

	err = kern_path(name, LOOKUP_FOLLOW, &path);
	if (err)
		return err;
	err = -EINVAL;
	if (!S_ISCHR(d_inode(path.dentry)->i_mode))
		goto out;
	err = -EACCES;
	if ((path.mnt->mnt_flags & MNT_NODEV) || (path.mnt->mnt_sb->s_iflags & SB_I_NODEV))
		goto out;
	mutex_lock(&fc->famfs.lock);
	err = slot->refused ? -EIO : 0;
	if (err || slot->dax)
		goto out_unlock;
	/* Not to wait for whatever device it is. */
	file = dentry_open(&path, O_RDONLY | O_NONBLOCK, current_cred());
	if (IS_ERR(file)) {
		/* No driver is bound. */
		slot->refused = true;
		err = PTR_ERR(file);
		goto out_unlock;
	}
	err = slot_fill(fc, slot, file_inode(file));
	fput(file);
out_unlock:
	mutex_unlock(&fc->famfs.lock);
out:
	path_put(&path);
	return err;
}

static bool in_another_slot(struct famfs_conn *famfs, const struct famfs_slot *slot, dev_t devt)
{
	u32 number;

	for (number = 0; number < FAMFS_SLOTS; number++)
		if (&famfs->slots[number] != slot && famfs->slots[number].dax && famfs->slots[number].devt == devt)
			return true;
	return false;
}

/* Take the device that the server hands over as a descriptor, the dialects that push. */
static int slot_push(struct fuse_conn *fc, const struct fuse_backing_map *request)
{
	struct famfs_conn *famfs = &fc->famfs;
	struct famfs_slot *slot;
	struct inode *node;
	int err;

	if (!famfs_pushes(famfs->dialect))
		return -ENOTTY;
	if (!READ_ONCE(famfs->active))
		return -EOPNOTSUPP;
	if (request->flags)
		return -EINVAL;

	CLASS(fd, descriptor)(request->fd);
	if (fd_empty(descriptor))
		return -EBADF;
	node = file_inode(fd_file(descriptor));
	if (!S_ISCHR(node->i_mode) || request->padding >= FAMFS_SLOTS)
		return -EINVAL;
	slot = &famfs->slots[request->padding];
	mutex_lock(&famfs->lock);
	if (slot->refused)
		err = -EIO;
	else if (slot->dax)
		err = slot->devt == node->i_rdev ? 0 : -EBUSY;
	else if (in_another_slot(famfs, slot, node->i_rdev))
		err = -EBUSY;
	else
		err = slot_fill(fc, slot, node);
	mutex_unlock(&famfs->lock);
	return err;
}

long famfs_ioctl_daxdev_open(struct file *file, void __user *argument)
{
	struct fuse_dev *fud = fuse_get_dev(file);
	struct fuse_backing_map request;

	if (IS_ERR(fud))
		return famfs_pushes(famfs_parameter_dialect()) ? PTR_ERR(fud) : -ENOTTY;
	if (!famfs_pushes(fud->chan->conn->famfs.dialect))
		return -ENOTTY;
	if (copy_from_user(&request, argument, sizeof(request)))
		return -EFAULT;
	return slot_push(fud->chan->conn, &request);
}

/* Whether the connection has all devices that a map names. */
bool famfs_slots_ready(struct famfs_conn *famfs, const struct famfs_map *map)
{
	u32 number;

	for (number = 0; number < map->runs; number++)
		if (!READ_ONCE(famfs->slots[map->run[number].slot].dax))
			return false;
	return true;
}

/* Give all devices back. Nothing can reach them any more: the last inode of the connection is gone. */
void famfs_conn_release(struct fuse_conn *fc)
{
	u32 number;

	for (number = 0; number < FAMFS_SLOTS; number++) {
		struct famfs_slot *slot = &fc->famfs.slots[number];

		if (slot->dax)
			fs_put_dax(slot->dax, fc);
		slot->dax = NULL;
	}
}
