/*
 * A libnvidia-ml.so.1 without a GPU: every call asks a program on the other side
 * of the unix socket $FAKENVML_SOCKET, or in a guest of the virtio port
 * "coffer.gpus", what to answer, test/gpusim in Go. A query is
 * {op u8, index u32, nonce 32 bytes}, an answer {return i32, length u32, bytes},
 * all little-endian. So all behaviour, good and bad, is written in Go; here are
 * only the prototypes of NVML that gpu-helper calls.
 *
 * gcc -shared -fPIC -o libnvidia-ml.so.1 fakenvml.c
 * -DOLD leaves out what drivers before 550 lack.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define UNKNOWN 999
#define INDEX(dev) ((uint32_t)(uintptr_t)(dev) - 1) /* a handle is its index, and one */

typedef int ret_t;
typedef void *device_t;

static int whole(int fd, void *buf, size_t n, int writing)
{
	for (char *p = buf; n > 0;) {
		ssize_t k = writing ? write(fd, p, n) : read(fd, p, n);
		if (k <= 0)
			return 0;
		p += k;
		n -= k;
	}
	return 1;
}

/* port opens the virtio port. */
static int port(void)
{
	char path[64], name[32];
	for (int i = 0; i < 32; i++) {
		snprintf(path, sizeof path, "/sys/class/virtio-ports/vport%dp%d/name", i / 8, i % 8);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue;
		ssize_t n = read(fd, name, sizeof name);
		close(fd);
		if (n < 11 || memcmp(name, "coffer.gpus", 11))
			continue;
		snprintf(path, sizeof path, "/dev/vport%dp%d", i / 8, i % 8);
		return open(path, O_RDWR | O_CLOEXEC);
	}
	return -1;
}

static int dial(void)
{
	const char *path = getenv("FAKENVML_SOCKET");
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	if (!path)
		return port();
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (strlen(path) >= sizeof addr.sun_path)
		return -1;
	strcpy(addr.sun_path, path);
	if (connect(fd, (struct sockaddr *)&addr, sizeof addr))
		return -1;
	return fd;
}

/* ask returns the answer's return value, and writes at most size bytes of it. */
static ret_t ask(char op, uint32_t index, const void *nonce, void *out, size_t size, uint32_t *length)
{
	static char rest[1 << 16];
	unsigned char query[37] = {op};
	struct { int32_t ret; uint32_t length; } head;
	ret_t ret = UNKNOWN;
	int fd = dial();

	memcpy(query + 1, &index, 4);
	if (nonce)
		memcpy(query + 5, nonce, 32);
	if (fd >= 0 && whole(fd, query, sizeof query, 1) &&
	    whole(fd, &head, sizeof head, 0) && head.length <= sizeof rest && whole(fd, rest, head.length, 0)) {
		ret = head.ret;
		if (out)
			memcpy(out, rest, head.length < size ? head.length : size);
		if (length)
			*length = head.length;
	}
	close(fd);
	if (ret == -1) /* the other side asks for a crash */
		abort();
	return ret;
}

static ret_t text(char op, uint32_t index, char *out, unsigned int size)
{
	if (size > 0)
		memset(out, 0, size);
	return ask(op, index, NULL, out, size ? size - 1 : 0, NULL);
}

ret_t nvmlInit_v2(void) { return ask('I', 0, NULL, NULL, 0, NULL); }
ret_t nvmlInitWithFlags(unsigned int flags) { (void)flags; return nvmlInit_v2(); }
ret_t nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(ret_t ret) { return ret ? "an error of the fake NVML" : "Success"; }
ret_t nvmlSystemGetDriverVersion(char *out, unsigned int size) { return text('D', 0, out, size); }
ret_t nvmlDeviceGetCount_v2(unsigned int *n) { return ask('N', 0, NULL, n, sizeof *n, NULL); }
ret_t nvmlDeviceGetUUID(device_t dev, char *out, unsigned int size) { return text('U', INDEX(dev), out, size); }
ret_t nvmlDeviceGetVbiosVersion(device_t dev, char *out, unsigned int size) { return text('V', INDEX(dev), out, size); }
ret_t nvmlDeviceGetArchitecture(device_t dev, unsigned int *arch) { return ask('A', INDEX(dev), NULL, arch, sizeof *arch, NULL); }
ret_t nvmlDeviceSetPersistenceMode(device_t dev, unsigned int mode) { (void)mode; return ask('P', INDEX(dev), NULL, NULL, 0, NULL); }

ret_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, device_t *dev)
{
	*dev = (device_t)(uintptr_t)(index + 1);
	return ask('H', index, NULL, NULL, 0, NULL);
}

typedef struct { unsigned int cpuCaps, gpusCaps; } caps_t;
typedef struct { unsigned int environment, ccFeature, devToolsMode; } state_t;
typedef struct { unsigned int version, environment, ccFeature, devToolsMode, multiGpuMode; } settings_t;

/* The answer to 'S' is CPU kind, environment, feature, devtools, multi-GPU mode. */
ret_t nvmlSystemGetConfComputeCapabilities(caps_t *caps)
{
	unsigned int s[5] = {0};
	ret_t ret = ask('S', 0, NULL, s, sizeof s, NULL);
	*caps = (caps_t){s[0], 1};
	return ret;
}

ret_t nvmlSystemGetConfComputeState(state_t *state)
{
	unsigned int s[5] = {0};
	ret_t ret = ask('S', 0, NULL, s, sizeof s, NULL);
	*state = (state_t){s[1], s[2], s[3]};
	return ret;
}

#ifndef OLD
ret_t nvmlSystemGetConfComputeSettings(settings_t *settings)
{
	unsigned int s[5] = {0};
	ret_t ret = ask('S', 0, NULL, s, sizeof s, NULL);
	if (settings->version != (sizeof *settings | 1 << 24))
		return 25; /* ARGUMENT_VERSION_MISMATCH */
	*settings = (settings_t){settings->version, s[1], s[2], s[3], s[4]};
	return ret;
}

ret_t nvmlSystemSetConfComputeGpusReadyState(unsigned int ready) { return ask('w', ready, NULL, NULL, 0, NULL); }
#endif
ret_t nvmlSystemGetConfComputeGpusReadyState(unsigned int *ready) { return ask('r', 0, NULL, ready, sizeof *ready, NULL); }

typedef struct {
	unsigned int hasCEC, size, cecSize;
	unsigned char nonce[32], report[8192], cec[4096];
} report_t;
typedef struct {
	unsigned int size, attestationSize;
	unsigned char chain[4096], attestationChain[5120];
} chain_t;

ret_t nvmlDeviceGetConfComputeGpuAttestationReport(device_t dev, report_t *r)
{
	return ask('R', INDEX(dev), r->nonce, r->report, sizeof r->report, &r->size);
}

ret_t nvmlDeviceGetConfComputeGpuCertificate(device_t dev, chain_t *c)
{
	return ask('C', INDEX(dev), NULL, c->attestationChain, sizeof c->attestationChain, &c->attestationSize);
}
