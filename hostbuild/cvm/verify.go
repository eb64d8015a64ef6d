package cvm

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"

	"coffer/hostbuild/bundle"
	"coffer/hostbuild/config"
	"coffer/hostbuild/disk/qcow2"
	"coffer/hostbuild/settings"
)

// VerifyParams are what a bundle is compared with.
type VerifyParams struct {
	Bundle string // folder or .tgz
	// Config and Settings are the inputs the bundle was made from; nil compares the
	// bundle with itself alone.
	Config   *config.Config
	Settings *settings.Settings
	Progress func(stage string, done, total int64) // may be nil
}

// Check is one comparison; Err says what differs.
type Check struct {
	Subject string
	Err     error
}

// Verify recomputes every digest of a bundle's manifest: from the bundle, and with
// the inputs from scratch. Only crypt_root's own digest cannot be made anew, since
// its keys are random: it is compared with the bundle's, and the root hash, which
// is what a guest measures, with the inputs.
//
// The error says why no comparison was possible; what differs is in the checks.
func Verify(ctx context.Context, v VerifyParams) (*bundle.Manifest, []Check, error) {
	if v.Progress == nil {
		v.Progress = func(string, int64, int64) {}
	}
	packed, err := bundle.IsArchive(v.Bundle)
	if err != nil {
		return nil, nil, err
	}
	work, err := os.MkdirTemp(filepath.Dir(filepath.Clean(v.Bundle)), ".verify.")
	if err != nil {
		if work, err = os.MkdirTemp("", "verify."); err != nil {
			return nil, nil, err
		}
	}
	defer os.RemoveAll(work)
	dir := v.Bundle
	if packed {
		v.Progress("unpack", 0, 0)
		if dir, err = bundle.Unpack(ctx, v.Bundle, work); err != nil {
			return nil, nil, err
		}
	}
	m, err := bundle.ReadManifest(dir)
	if err != nil {
		return nil, nil, err
	}
	v.Progress("files", 0, 0)
	checks := []Check{{"files", bundle.CheckFiles(ctx, dir, m)}}
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	checks = append(checks,
		Check{"guest config", compareGuestConfig(dir, m)},
		Check{"LUKS2 header", checkHeader(dir, m)},
		Check{"launch digests", checkDigests(dir, m)},
	)
	if v.Config != nil {
		again, err := rebuild(ctx, v, work, m)
		if err != nil {
			return nil, nil, fmt.Errorf("make the bundle again: %w", err)
		}
		checks = append(checks, Check{"inputs", differences(m, again)})
	}
	return m, checks, nil
}

// compareGuestConfig compares what the guest will trust with what the manifest says.
func compareGuestConfig(dir string, m *bundle.Manifest) error {
	b, err := os.ReadFile(filepath.Join(dir, bundle.Initrd))
	if err != nil {
		return err
	}
	gc, err := bundle.GuestConfig(b)
	if err != nil {
		return err
	}
	var errs []error
	kbs := kbsOf(gc)
	kbs.GPUResources = m.KBS.GPUResources // the guest does not tell them from others
	for _, c := range []struct {
		name      string
		got, want any
	}{
		{"cvm_id", gc.CVMID, m.CVMID}, {"platform", gc.Platform, m.Platform}, {"tee", gc.TEE, m.TEE},
		{"created", gc.BuildTime, m.Created.Unix()}, {"disk", gc.Disk, m.Disk}, {"network", gc.Network, m.Network},
		{"attestation", gc.Attestation, m.Attestation}, {"kds_url", gc.API.KDS, m.KDS},
		{"kbs", kbs, m.KBS},
		{"image", bundle.Image{Name: gc.Workload.ImageName, Digest: gc.Workload.ImageDigest}, bundle.Image{Name: m.Image.Name, Digest: m.Image.Digest}},
		{"cmdline", bundle.Cmdline(gc.Platform, gc.CVMID, gc.GPU != nil), m.Cmdline},
	} {
		if !reflect.DeepEqual(plain(c.got), plain(c.want)) {
			errs = append(errs, fmt.Errorf("%s: %+v, the manifest says %+v", c.name, c.got, c.want))
		}
	}
	return errors.Join(errs...)
}

// plain is a value as JSON has it, where nil and empty lists are the same.
func plain(v any) any {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var out any
	if err := json.Unmarshal(b, &out); err != nil {
		return err
	}
	return out
}

func checkHeader(dir string, m *bundle.Manifest) error {
	f, err := os.Open(filepath.Join(dir, bundle.CryptRoot))
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	r, err := qcow2.NewReader(f, st.Size())
	if err != nil {
		return err
	}
	const most = 64 << 20
	if m.Disk.DataOffset <= 0 || m.Disk.DataOffset > min(most, r.Size()) {
		return fmt.Errorf("disk.data_offset is %d", m.Disk.DataOffset)
	}
	head := make([]byte, m.Disk.DataOffset)
	if _, err := r.ReadAt(head, 0); err != nil {
		return err
	}
	sum := sha256.Sum256(head)
	if got := hex.EncodeToString(sum[:]); got != m.Disk.HeaderSHA256 {
		return fmt.Errorf("SHA-256 %s, the guest wants %s", got, m.Disk.HeaderSHA256)
	}
	return nil
}

func checkDigests(dir string, m *bundle.Manifest) error {
	if len(m.LaunchDigests) == 0 {
		return errors.New("the manifest has none")
	}
	var errs []error
	for _, want := range m.LaunchDigests {
		got, err := predict(m, filepath.Join(dir, bundle.OVMF), []string{want.CPU}, []int{want.VCPUs})
		switch {
		case err != nil:
			errs = append(errs, err)
		case got[0] != want:
			errs = append(errs, fmt.Errorf("%s, %d vCPU: %s, the manifest says %s", want.CPU, want.VCPUs, got[0].Digest, want.Digest))
		}
	}
	return errors.Join(errs...)
}

// nowhere is where a drive goes whose keys nobody needs.
type nowhere struct{}

func (nowhere) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (nowhere) Truncate(int64) error                   { return nil }

// rebuild makes the manifest again: all that is random is taken from m.
func rebuild(ctx context.Context, v VerifyParams, dir string, m *bundle.Manifest) (*bundle.Manifest, error) {
	p := Params{Config: v.Config, Settings: v.Settings, TEE: m.TEE, Progress: v.Progress, Now: m.Created}.withDefaults()
	b, err := openBase(p)
	if err != nil {
		return nil, err
	}
	in, err := checkInputs(p.Config, p.Settings)
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(p.Settings.KBSCA)
	if err != nil {
		return nil, fmt.Errorf("kbs.ca of %s: %w", p.Settings.File, err)
	}
	w := &work{id: m.CVMID, dir: dir}
	key, err := newPassphrase(rand.Reader)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	root, err := buildDisks(ctx, p, b, w, key, nowhere{}, nil, in)
	if err != nil {
		return nil, err
	}
	root.HeaderSHA256 = m.Disk.HeaderSHA256
	cryptRoot := bundle.File{Name: bundle.CryptRoot}
	if i := slices.IndexFunc(m.Files, func(f bundle.File) bool { return f.Name == bundle.CryptRoot }); i >= 0 {
		cryptRoot = m.Files[i]
	}
	f, err := os.CreateTemp(dir, "again.")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	a, err := bundle.NewArchive(f, m.CVMID, p.Now)
	if err != nil {
		return nil, err
	}
	return assemble(a, cryptRoot, dir, guestConfig(p, m.CVMID, string(ca), b, root, in), b, root, p)
}

// differences lists the places where two manifests differ.
func differences(bundled, again *bundle.Manifest) error {
	var errs []error
	byName := func(m *bundle.Manifest) any { // files by name, for messages that one can read
		doc := plain(m).(map[string]any)
		files := map[string]any{}
		for _, f := range m.Files {
			files[f.Name] = plain(f)
		}
		doc["files"] = files
		return doc
	}
	diff("", byName(bundled), byName(again), &errs)
	return errors.Join(errs...)
}

func diff(path string, a, b any, errs *[]error) {
	ma, ok1 := a.(map[string]any)
	mb, ok2 := b.(map[string]any)
	if !ok1 || !ok2 {
		if !reflect.DeepEqual(a, b) {
			*errs = append(*errs, fmt.Errorf("%s: the bundle has %v, the inputs give %v", path, a, b))
		}
		return
	}
	keys := map[string]bool{}
	for k := range ma {
		keys[k] = true
	}
	for k := range mb {
		keys[k] = true
	}
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		sub := k
		if path != "" {
			sub = path + "." + k
		}
		diff(sub, ma[k], mb[k], errs)
	}
}
