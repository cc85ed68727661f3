// SPDX-License-Identifier: GPL-2.0
/*
 * The module's parameters, and what of them INIT tells the server.
 *
 * They can be changed at any time in /sys/module/famfs/parameters, and count for file systems mounted from then on.
 */

#include "famfs_internal.h"

#include <linux/capability.h>
#include <linux/module.h>

static enum famfs_dialect dialect = FAMFS_PULL;
static unsigned int minor = FUSE_KERNEL_MINOR_VERSION;
static bool offer = true;
static bool strict;
static bool guard;

static const char *const dialect_names[] = {
	[FAMFS_NONE] = "none",
	[FAMFS_PULL] = "pull",
	[FAMFS_PUSH] = "push",
	[FAMFS_PUSH_INTERLEAVE] = "push-interleave",
};

static int dialect_set(const char *value, const struct kernel_param *parameter)
{
	int index = sysfs_match_string(dialect_names, value);

	if (index < 0)
		return index;
	*(enum famfs_dialect *)parameter->arg = index;
	return 0;
}

static int dialect_get(char *buffer, const struct kernel_param *parameter)
{
	return sysfs_emit(buffer, "%s\n", dialect_names[*(enum famfs_dialect *)parameter->arg]);
}

static const struct kernel_param_ops dialect_ops = { .set = dialect_set, .get = dialect_get };

static int minor_set(const char *value, const struct kernel_param *parameter)
{
	unsigned int number;
	int err = kstrtouint(value, 10, &number);

	if (err)
		return err;
	if (number != 45 && number != 46)
		return -EINVAL;
	*(unsigned int *)parameter->arg = number;
	return 0;
}

static const struct kernel_param_ops minor_ops = { .set = minor_set, .get = param_get_uint };

module_param_cb(dialect, &dialect_ops, &dialect, 0644);
MODULE_PARM_DESC(dialect, "famfs protocol: none, pull, push or push-interleave (pull)");
module_param_cb(minor, &minor_ops, &minor, 0644);
MODULE_PARM_DESC(minor, "minor version of FUSE in INIT: 45 or 46 (46)");
module_param(offer, bool, 0644);
MODULE_PARM_DESC(offer, "offer FUSE_DAX_FMAP to a mounter with CAP_SYS_RAWIO (Y)");
module_param(strict, bool, 0644);
MODULE_PARM_DESC(strict, "warn at once of what a server must not do: two maps of one page, a map for an inode with pages "
			 "in the cache, a size that changes (N)");
module_param(guard, bool, 0644);
MODULE_PARM_DESC(guard, "withstand such a server, where kernels with the patches hang or crash; for fuzzing (N)");
MODULE_SOFTDEP("pre: fsdev_dax");

enum famfs_dialect famfs_parameter_dialect(void)
{
	return READ_ONCE(dialect);
}

void famfs_conn_init(struct famfs_conn *famfs)
{
	mutex_init(&famfs->lock);
	famfs->dialect = READ_ONCE(dialect);
	famfs->minor = READ_ONCE(minor);
	famfs->offer = READ_ONCE(offer);
	famfs->strict = READ_ONCE(strict);
	famfs->guard = READ_ONCE(guard);
}

/* The bit for the INIT request, by the capabilities of the process that mounts. */
u64 famfs_offer(struct famfs_conn *famfs)
{
	famfs->offered = famfs->offer && famfs->dialect != FAMFS_NONE && capable(CAP_SYS_RAWIO);
	return famfs->offered ? FAMFS_DAX_FMAP : 0;
}

/* The reply to INIT. A bit that was not offered is ignored. */
void famfs_accept(struct famfs_conn *famfs, u64 flags)
{
	famfs->active = famfs->offered && (flags & FAMFS_DAX_FMAP);
	famfs->guard &= famfs->active;
}
