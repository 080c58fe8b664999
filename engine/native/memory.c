/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Memory of other processes: many ranges a call, and which pages there are. */
#define _GNU_SOURCE
#include "phaul_native.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096ull

/* linux/fs.h of the build machine may be older than the running kernel's. */
struct scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN_IOCTL _IOWR('f', 16, struct scan_arg)

enum { CAT_FILE = 4, CAT_PRESENT = 8, CAT_SWAPPED = 16, CAT_SOFT_DIRTY = 128 };

typedef ssize_t (*vm_call)(pid_t, const struct iovec *, unsigned long, const struct iovec *, unsigned long,
			   unsigned long);

/* What process_vm_* cannot reach (protection) goes through /proc/PID/mem, which may. */
static int64_t one_by_mem(int mem_fd, bool write_it, uint64_t addr, uint8_t *buf, uint64_t length)
{
	uint64_t done = 0;

	while (done < length) {
		ssize_t n = write_it ? pwrite(mem_fd, buf + done, length - done, (off_t)(addr + done))
				     : pread(mem_fd, buf + done, length - done, (off_t)(addr + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EFAULT;
		done += (uint64_t)n;
	}
	return (int64_t)done;
}

static int64_t transfer(vm_call call, bool write_it, int32_t pid, int mem_fd, const uint64_t *ranges, size_t n,
			uint8_t *buf)
{
	struct iovec remote[IOV_MAX];
	uint64_t total = 0, skip = 0;
	size_t i = 0;

	while (i < n) {
		size_t count = 0;
		uint64_t want = 0;
		struct iovec local = {.iov_base = buf + total};
		ssize_t got;

		for (size_t j = i; j < n && count < IOV_MAX; j++, count++) {
			uint64_t off = j == i ? skip : 0;

			remote[count].iov_base = (void *)(uintptr_t)(ranges[2 * j] + off);
			remote[count].iov_len = ranges[2 * j + 1] - off;
			want += remote[count].iov_len;
		}
		local.iov_len = want;
		got = call(pid, &local, 1, remote, count, 0);
		if (got < 0) {
			if (errno != EFAULT || mem_fd < 0)
				return -errno;
			got = 0;
		}
		total += (uint64_t)got;
		while (i < n && (uint64_t)got >= ranges[2 * i + 1] - skip) {
			got -= (ssize_t)(ranges[2 * i + 1] - skip);
			skip = 0;
			i++;
			if (--count == 0)
				break;
		}
		skip += (uint64_t)got;
		if (count > 0) {
			/* It stopped within range i: that range takes the other road. */
			int64_t rest;

			if (mem_fd < 0)
				return -EFAULT;
			rest = one_by_mem(mem_fd, write_it, ranges[2 * i] + skip, buf + total, ranges[2 * i + 1] - skip);
			if (rest < 0)
				return rest;
			total += (uint64_t)rest;
			skip = 0;
			i++;
		}
	}
	return (int64_t)total;
}

/* ranges: pairs of address and length. mem_fd: /proc/PID/mem, or -1. Returns the sum of the lengths. */
int64_t ph_vm_read(int32_t pid, int mem_fd, const uint64_t *ranges, size_t n, uint8_t *buf)
{
	return transfer(process_vm_readv, false, pid, mem_fd, ranges, n, buf);
}

int64_t ph_vm_write(int32_t pid, int mem_fd, const uint64_t *ranges, size_t n, const uint8_t *buf)
{
	return transfer(process_vm_writev, true, pid, mem_fd, ranges, n, (uint8_t *)buf);
}

/* masks: inverted, all of, any of, returned. One PAGEMAP_SCAN; -ENOTTY before Linux 6.7. */
int64_t ph_pagemap_scan(int fd, uint64_t start, uint64_t end, uint64_t flags, const uint64_t masks[4],
			struct ph_region *ret, uint64_t max, uint64_t *walk_end)
{
	struct scan_arg arg = {
		.size = sizeof(arg), .flags = flags, .start = start, .end = end,
		.vec = (uint64_t)(uintptr_t)ret, .vec_len = max,
		.category_inverted = masks[0], .category_mask = masks[1],
		.category_anyof_mask = masks[2], .return_mask = masks[3],
	};
	int n = ioctl(fd, SCAN_IOCTL, &arg);

	/*
	 * The kernel sets walk_end where its own buffer of 512 regions filled up, and leaves it there when it then
	 * comes to the end (do_pagemap_scan(), seen in 6.18): only a full vector means that something is left.
	 */
	*walk_end = n >= 0 && (uint64_t)n < max ? end : arg.walk_end;
	return n < 0 ? -errno : n;
}

/* The same answer from /proc/PID/pagemap, for kernels without PAGEMAP_SCAN: knows PRESENT, SWAPPED, FILE, SOFT_DIRTY. */
int64_t ph_pagemap_read(int fd, uint64_t start, uint64_t end, const uint64_t masks[4],
			struct ph_region *ret, uint64_t max, uint64_t *walk_end)
{
	uint64_t words[4096];
	uint64_t n = 0, addr = start;

	while (addr < end) {
		uint64_t want = (end - addr) / PAGE;
		ssize_t got;

		if (want > 4096)
			want = 4096;
		got = pread(fd, words, want * 8, (off_t)(addr / PAGE * 8));
		if (got <= 0)
			return got < 0 ? -errno : -EFAULT;
		for (ssize_t i = 0; i < got / 8; i++, addr += PAGE) {
			uint64_t w = words[i], cat, match;

			cat = (w >> 63 & 1 ? CAT_PRESENT : 0) | (w >> 62 & 1 ? CAT_SWAPPED : 0) |
			      (w >> 61 & 1 ? CAT_FILE : 0) | (w >> 55 & 1 ? CAT_SOFT_DIRTY : 0);
			match = cat ^ masks[0];
			if ((match & masks[1]) != masks[1] || (masks[2] && !(match & masks[2])))
				continue;
			cat &= masks[3];
			if (n && ret[n - 1].end == addr && ret[n - 1].categories == cat) {
				ret[n - 1].end += PAGE;
				continue;
			}
			if (n == max) {
				*walk_end = addr;
				return (int64_t)n;
			}
			ret[n++] = (struct ph_region){addr, addr + PAGE, cat};
		}
	}
	*walk_end = end;
	return (int64_t)n;
}
