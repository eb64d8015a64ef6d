// Package register keeps the KBS and the policy folder's master copy in step: it
// gives a CVM's key and rule to the KBS, and takes the rule away again.
//
// The master copy is read, changed and uploaded under the folder's lock, because
// a KBS holds one policy and every upload replaces it. Where the folder holds an
// executable set-policy.sh, that program uploads, and afterwards the KBS is asked
// whether it has the text (Trustee since v0.17 cannot be asked).
package register

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"

	"coffer/hostbuild/bundle"
	"coffer/hostbuild/policy"
	"coffer/hostbuild/settings"
	"coffer/internal/guestconfig"
	"coffer/kbsclient"
)

// Registrar speaks to one KBS.
type Registrar struct {
	CA   []byte               // PEM, of the KBS's authority
	Warn func(policy.Finding) // told of doubtful text in the master copy; may be nil

	admin  *kbsclient.Admin
	folder *policy.Folder
	minTCB map[string]policy.TCB
	hook   *hook  // nil: there is none
	where  string // for messages
}

// Open reads the admin key and the CA that the settings name.
func Open(s *settings.Settings) (*Registrar, error) {
	ca, err := os.ReadFile(s.KBSCA)
	if err != nil {
		return nil, fmt.Errorf("kbs.ca of %s: %w", s.File, err)
	}
	pem, err := os.ReadFile(s.AdminKey)
	if err != nil {
		return nil, fmt.Errorf("kbs.admin_key of %s: %w", s.File, err)
	}
	defer clear(pem)
	key, err := kbsclient.ParseAdminKey(pem)
	if err != nil {
		return nil, fmt.Errorf("kbs.admin_key %s: %w", s.AdminKey, err)
	}
	admin, err := kbsclient.NewAdmin(kbsclient.Config{URL: s.KBSURL, RootCAs: ca, AdminIssuer: s.AdminIssuer, AdminAudience: s.AdminAudience}, key)
	if err != nil {
		return nil, fmt.Errorf("kbs.url of %s: %w", s.File, err)
	}
	folder, err := policy.OpenFolder(s.PolicyDir)
	if err != nil {
		return nil, fmt.Errorf("policy_dir of %s: %w", s.File, err)
	}
	hook, err := findHook(s)
	if err != nil {
		return nil, err
	}
	return &Registrar{CA: ca, admin: admin, folder: folder, minTCB: minTCB(s), hook: hook,
		where: fmt.Sprintf("KBS %s (kbs.url, kbs.admin_key of %s)", s.KBSURL, s.File)}, nil
}

func minTCB(s *settings.Settings) map[string]policy.TCB {
	min := map[string]policy.TCB{}
	for product, t := range s.MinTCB {
		min[product] = policy.TCB{Bootloader: t.Bootloader, TEE: t.TEE, SNP: t.SNP, Microcode: t.Microcode}
	}
	return min
}

// raise lifts each product's minimum to what one CVM asks for.
func raise(settings map[string]policy.TCB, cvm policy.TCB) map[string]policy.TCB {
	min := map[string]policy.TCB{}
	for product, t := range settings {
		min[product] = policy.TCB{
			Bootloader: max(t.Bootloader, cvm.Bootloader), TEE: max(t.TEE, cvm.TEE), SNP: max(t.SNP, cvm.SNP), Microcode: max(t.Microcode, cvm.Microcode),
		}
	}
	return min
}

// Check asks the KBS for its policy, which it gives to its admin alone, and reads
// the rules in the policy folder.
func (r *Registrar) Check(ctx context.Context) error {
	if _, err := r.folder.Rules(); err != nil {
		return err
	}
	_, err := r.admin.ResourcePolicy(ctx)
	if err != nil && !errors.Is(err, kbsclient.ErrNotSupported) {
		return fmt.Errorf("%s: %w", r.where, err)
	}
	return nil
}

// CheckGPU fails where the KBS cannot judge GPUs, as far as it lets one know.
func (r *Registrar) CheckGPU(ctx context.Context) error {
	if _, err := r.admin.ResourcePolicy(ctx); err == nil {
		return fmt.Errorf("%s: it is of a generation (Trustee before v0.17, hostbuild kbs serve --dialect T) that evidence of GPUs ends; use Trustee v0.17 or newer, or the embedded KBS with --dialect H and --gpu-rim-dir, or have the agent alone judge them: gpu.mode local or nras, without gpu.required", r.where)
	} else if !errors.Is(err, kbsclient.ErrNotSupported) {
		return fmt.Errorf("%s: %w", r.where, err)
	}
	return nil
}

// ErrForeign says that a manifest claims resources that are not its CVM's own.
var ErrForeign = errors.New("the manifest claims what is not this CVM's own: it is not as hostbuild wrote it")

// checkOwn fails unless the keys that the manifest names are those of its CVM, and
// what else it names lies outside of the CVMs' repository.
func checkOwn(m *bundle.Manifest) error {
	own := map[string]string{policy.KeyPath(m.CVMID): m.KBS.KeyPath, policy.CanaryPath(m.CVMID): m.KBS.CanaryPath}
	if m.KBS.VaultKeyPath != "" {
		own[policy.VaultKeyPath(m.CVMID)] = m.KBS.VaultKeyPath
	}
	for want, path := range own {
		if path != want {
			return fmt.Errorf("%q: %w: %s instead of %s", m.CVMID, ErrForeign, path, want)
		}
	}
	for _, path := range m.KBS.GPUResources {
		if strings.HasPrefix(path, "keys/") {
			return fmt.Errorf("%q: %w: %s", m.CVMID, ErrForeign, path)
		}
	}
	return nil
}

// RuleOf is the rule that a bundle needs: its resources, its launch digests
// and the minimum TCBs of the settings, raised to the bundle's own. The manifest is
// believed what the launch digests are: it must be the builder's.
func (r *Registrar) RuleOf(m *bundle.Manifest) (policy.Rule, error) {
	if err := checkOwn(m); err != nil {
		return policy.Rule{}, err
	}
	rule := policy.Rule{CVMID: m.CVMID, Paths: []string{m.KBS.KeyPath, m.KBS.CanaryPath}, TEE: m.TEE, Simulated: m.Platform == guestconfig.PlatformSimulated}
	if m.KBS.VaultKeyPath != "" {
		needGPU := append([]string{m.KBS.VaultKeyPath}, m.KBS.GPUResources...)
		rule.Paths = append(rule.Paths, needGPU...)
		rule.GPUPaths = append(needGPU, m.KBS.CanaryPath)
	}
	if m.TEE == policy.TEESample {
		return rule, nil // sample evidence carries no measurement
	}
	rule.MinTCB = raise(r.minTCB, m.MinTCB)
	for _, d := range m.LaunchDigests {
		var sum [48]byte
		if n, err := hex.Decode(sum[:], []byte(d.Digest)); err != nil || n != len(sum) {
			return rule, fmt.Errorf("%s: %q is no launch digest", m.CVMID, d.Digest)
		}
		rule.Digests = append(rule.Digests, sum)
	}
	return rule, nil
}

// ForgetCVM takes back what AddCVM does, as far as it was done.
func (r *Registrar) ForgetCVM(ctx context.Context, rule policy.Rule) error {
	_, err := r.RemoveRule(ctx, rule.CVMID)
	for _, p := range rule.Paths {
		if !strings.HasPrefix(p, "keys/") {
			continue // a resource that people have put there
		}
		derr := r.admin.DeleteResource(ctx, p)
		if derr != nil && !errors.Is(derr, kbsclient.ErrNotSupported) && !errors.Is(derr, kbsclient.ErrNoResource) {
			err = errors.Join(err, derr)
		}
	}
	return err
}

// AddCVM stores resources, by path, and adds the rule that releases them. The rule
// comes last: without it nothing is released. After an error nothing of it is left.
// The caller wipes the keys among them.
func (r *Registrar) AddCVM(ctx context.Context, rule policy.Rule, resources map[string][]byte) error {
	add := func() error {
		for path, value := range resources {
			if err := r.admin.SetResource(ctx, path, value); err != nil {
				return err
			}
		}
		return r.AddRule(ctx, rule)
	}
	if err := add(); err != nil {
		return errors.Join(fmt.Errorf("%s: %w", r.where, err), r.ForgetCVM(context.WithoutCancel(ctx), rule))
	}
	return nil
}

// AddRule adds a CVM's rule, or replaces it.
func (r *Registrar) AddRule(ctx context.Context, rule policy.Rule) error {
	return r.update(ctx, func(rules *policy.Rules) error { return rules.Put(rule) })
}

// Apply uploads the master copy as it stands, after the check that every change
// goes through.
func (r *Registrar) Apply(ctx context.Context) error {
	return r.update(ctx, func(*policy.Rules) error { return nil })
}

// update changes the rules, uploads them and tells of doubtful text.
func (r *Registrar) update(ctx context.Context, edit func(*policy.Rules) error) error {
	apply := r.admin.SetResourcePolicy
	if r.hook != nil {
		apply = r.applyByHook
	}
	findings, err := r.folder.Update(ctx, edit, apply)
	if r.Warn != nil {
		for _, f := range findings {
			r.Warn(f)
		}
	}
	return err
}

// applyByHook runs the hook and asks the KBS for the text afterwards: a hook
// that ends well without having uploaded would leave the builder with a bundle
// that gets no key.
func (r *Registrar) applyByHook(ctx context.Context, text []byte) error {
	if err := r.hook.run(ctx); err != nil {
		return err
	}
	got, err := r.admin.ResourcePolicy(ctx)
	switch {
	case errors.Is(err, kbsclient.ErrNotSupported):
		return nil
	case err != nil:
		return fmt.Errorf("%s ended well; asked for its policy, the KBS says: %w", r.hook.path, err)
	case !bytes.Equal(got, text):
		return fmt.Errorf("%s ended well, but the KBS holds another policy than %s; does it upload to this KBS?", r.hook.path, r.folder.Path())
	}
	return nil
}

// RemoveRule removes a CVM's rule and reports whether there was one. The key
// stays at the KBS, out of reach: adding the rule again brings the CVM back.
func (r *Registrar) RemoveRule(ctx context.Context, cvmID string) (found bool, err error) {
	err = r.update(ctx, func(rules *policy.Rules) error {
		found = rules.Remove(cvmID)
		return nil
	})
	if err != nil {
		return false, fmt.Errorf("%s: %w", r.where, err)
	}
	return found, nil
}

// Rules lists the rules of a policy folder's master copy.
func Rules(dir string) (policy.Rules, error) {
	folder, err := policy.OpenFolder(dir)
	if err != nil {
		return nil, err
	}
	return folder.Rules()
}

// Text is the master copy, and what is to be said about it.
func Text(dir string) ([]byte, []policy.Finding, error) {
	folder, err := policy.OpenFolder(dir)
	if err != nil {
		return nil, nil, err
	}
	text, err := folder.Text()
	return text, policy.Check(text), err
}
