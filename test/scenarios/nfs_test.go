package scenarios

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"coffer/internal/testenv"
	"coffer/test/dockersave"
)

// ganesha is an NFS server in user space, on the port that guests may reach. Its
// export lies in memory and is empty after a start.
type ganesha struct {
	dir string
	cmd *exec.Cmd
}

// start starts it with one version of the protocol, and the mount protocol of
// version 3 at a port.
func (g *ganesha) start(t *testing.T, version, mountPort int) {
	t.Helper()
	write(t, g.dir+"/conf", fmt.Appendf(nil, `
NFS_CORE_PARAM { NFS_Port = 2049; MNT_Port = %[2]d; Protocols = %[1]d; Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }
NFSv4 { Graceless = true; RecoveryRoot = %[3]s; Only_Numeric_Owners = true; }
NFS_KRB5 { Active_krb5 = false; }
EXPORT { Export_Id = 1; Path = /mem; Pseudo = /mem; Access_Type = RW; Squash = None; Protocols = %[1]d; Transports = TCP; SecType = sys; FSAL { Name = MEM; } }
MEM { Inode_Size = 4096; }
LOG { Default_Log_Level = EVENT; }
`, version, mountPort, g.dir))
	g.cmd = exec.Command(testenv.LookTool(t, "ganesha.nfsd"), "-F", "-L", g.dir+"/log", "-f", g.dir+"/conf", "-p", g.dir+"/pid")
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if c, err := net.Dial("tcp", "127.0.0.1:2049"); err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			log, _ := os.ReadFile(g.dir + "/log")
			t.Fatalf("ganesha does not serve:\n%s", log)
		}
	}
}

func (g *ganesha) kill() {
	g.cmd.Process.Kill()
	g.cmd.Wait()
}

// nfsGuest boots a guest that may reach these ports alone, and whose workload writes
// to the export that the site has named on the user_data drive.
func nfsGuest(t *testing.T, ports string) *guest {
	t.Helper()
	l := setupKBS(t)
	busybox, err := os.ReadFile(testenv.LookTool(t, "busybox"))
	if err != nil {
		t.Fatal(err)
	}
	layer, err := dockersave.Layer(dockersave.Entry{Name: "bin/"}, dockersave.Entry{Name: "bin/busybox", Mode: 0o755, Body: busybox})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	image := dockersave.Image{Tag: "nfs:1", Entrypoint: []string{"/bin/busybox", "sh", "-c",
		`i=0; while :; do i=$((i+1)); echo tick $i >/user_data/mnt/f; echo "round $i: $(/bin/busybox cat /user_data/mnt/f) on $(/bin/busybox stat -f -c %T /user_data/mnt)"; /bin/busybox sleep 1; done`},
		Layers: [][]byte{layer}}
	if err := image.SaveLegacy(dir + "/image.tar.gz"); err != nil {
		t.Fatal(err)
	}
	write(t, dir+"/CONFIG.yaml", fmt.Appendf(nil, "root_drive_size: 1\ndocker_archive: %s/image.tar.gz\nvcpus: [1]\nmemory_mib: 1024\nallowed_out_ports: [%s]\ncc_attestation:\n  check_frequency: 3\n  max_staleness: 60\n", dir, ports))
	write(t, dir+"/ext_mount.conf", []byte("10.0.2.2:/mem\n"))
	ctx, cancel := context.WithTimeout(t.Context(), buildDeadline)
	defer cancel()
	b, err := l.env.Build(ctx, l.settings, dir+"/CONFIG.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Unpack(ctx, filepath.Join(l.env.Dir, "site")); err != nil {
		t.Fatal(err)
	}
	if _, err := l.env.Run(ctx, "hostbuild", "drive", "put", b.File("user_data.qcow2"), dir+"/ext_mount.conf", "/ext_mount.conf"); err != nil {
		t.Fatal(err)
	}
	return boot(t, b)
}

// A site's server goes away and comes back without a memory of its clients.
func TestNFS(t *testing.T) {
	testenv.LookTool(t, "ganesha.nfsd") // Debian: nfs-ganesha, nfs-ganesha-mem
	ownNamespace(t)
	s := &ganesha{dir: t.TempDir()}
	s.start(t, 4, 0)
	defer func() { s.kill() }()
	g := nfsGuest(t, "2049")
	g.expect(`coffer: the guest's own ports out=.*,nfs:2049/tcp`)
	g.expect(`nfs 10\.0\.2\.2:/mem is mounted at /user_data/mnt options="vers=4\.`)
	g.expect(`workload: round \d+: tick \d+ on nfs`)
	s.kill()
	g.expect(`attestation round=\d+ verdict=pass`) // the outage holds up nothing else
	s.start(t, 4, 0)
	g.expect(`workload: round \d+: tick \d+ on nfs`)
	g.Kill()
}

// A server that speaks version 3 alone: where its mount protocol has a port that is
// closed to the guest, that is told, and nothing else is held up; once the port is an
// open one, the guest mounts. Ganesha has no mount protocol at its NFS port.
func TestNFS3(t *testing.T) {
	testenv.LookTool(t, "ganesha.nfsd")
	ownNamespace(t)
	rpcbind := exec.Command(testenv.LookTool(t, "rpcbind"), "-f") // which ganesha asks for with version 3, and the guest
	if err := rpcbind.Start(); err != nil {
		t.Fatal(err)
	}
	defer rpcbind.Wait()
	defer rpcbind.Process.Kill()
	s := &ganesha{dir: t.TempDir()}
	s.start(t, 3, 20049)
	defer func() { s.kill() }()
	g := nfsGuest(t, "111, 2049, 20048")
	g.expect(`nfs 10\.0\.2\.2:/mem is not mounted: NFS 4: .*; NFS 3, its mount protocol at port 2049 or where port 111 says: connection refused`)
	g.expect(`workload: round \d+: tick \d+ on ext`)
	g.expect(`attestation round=\d+ verdict=pass`)
	s.kill()
	s.start(t, 3, 20048)
	g.expect(`nfs 10\.0\.2\.2:/mem is mounted at /user_data/mnt options="vers=3,`)
	for range 3 {
		g.expect(`workload: round \d+: tick \d+ on nfs`)
	}
	g.Kill()
}
