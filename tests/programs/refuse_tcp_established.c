/* To be refused: a TCP connection over loopback, fds 10 and 11. Refused, it goes on talking. */
#include <netinet/in.h>
#include <sys/socket.h>

#include "target.h"

enum { NEAR = 10, FAR = 11 };

int main(int argc, char **argv)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
	socklen_t size = sizeof(address);
	uint64_t word;

	target_start(argc, argv);
	int listening = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
	MUST(bind(listening, (struct sockaddr *)&address, size));
	MUST(listen(listening, 1));
	MUST(getsockname(listening, (struct sockaddr *)&address, &size));
	int near = (int)MUST(socket(AF_INET, SOCK_STREAM, 0));
	MUST(connect(near, (struct sockaddr *)&address, size));
	int far = (int)MUST(accept(listening, NULL, NULL));
	MUST(dup2(near, NEAR));
	MUST(dup2(far, FAR));
	close(near);
	close(far);
	close(listening);
	target_ready();
	for (uint64_t i = 0; !target_ending(2); i++) {
		word = target_random(i);
		SAME("send", send(i % 2 ? NEAR : FAR, &word, sizeof(word), 0), sizeof(word));
		SAME("recv", recv(i % 2 ? FAR : NEAR, &word, sizeof(word), MSG_WAITALL), sizeof(word));
		SAME("word", word, target_random(i));
	}
	target_pass();
}
