/* To be refused: an io_uring at fd 7. A refused program is unharmed: the ring still works. */
#include <linux/io_uring.h>

#include "target.h"

enum { RING = 7, ENTRIES = 4, TOKEN = 0x1234 };

int main(int argc, char **argv)
{
	struct io_uring_params params = {0};

	target_start(argc, argv);
	int fd = (int)MUST(syscall(SYS_io_uring_setup, ENTRIES, &params));
	MUST(dup3(fd, RING, O_CLOEXEC));
	close(fd);
	size_t ring_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
	char *ring = (char *)MUST(mmap(NULL, ring_size, PROT_READ | PROT_WRITE, MAP_SHARED, RING, IORING_OFF_SQ_RING));
	struct io_uring_sqe *entry = (struct io_uring_sqe *)MUST(mmap(NULL, ENTRIES * sizeof(*entry),
								      PROT_READ | PROT_WRITE, MAP_SHARED, RING,
								      IORING_OFF_SQES));
	SAME("one map of both rings", !!(params.features & IORING_FEAT_SINGLE_MMAP), true);
	target_ready();
	for (uint32_t sent = 0; !target_ending(2); sent++) {
		uint32_t *tail = (uint32_t *)(ring + params.sq_off.tail);
		uint32_t *head = (uint32_t *)(ring + params.cq_off.head);
		struct io_uring_cqe *done = (struct io_uring_cqe *)(ring + params.cq_off.cqes);

		entry[0] = (struct io_uring_sqe){.opcode = IORING_OP_NOP, .user_data = TOKEN + sent};
		((uint32_t *)(ring + params.sq_off.array))[*tail % params.sq_entries] = 0;
		__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
		SAME("io_uring_enter",
		     MUST(syscall(SYS_io_uring_enter, RING, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0)), 1);
		SAME("completion", done[*head % params.cq_entries].user_data, TOKEN + sent);
		__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	}
	target_pass();
}
