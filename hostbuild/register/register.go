// Package register keeps the KBS and the policy folder's master copy in step: it
// gives a CVM's key and rule to the KBS, and takes the rule away again.
//
// The master copy is read, changed, uploaded and only then replaced, under the
// folder's lock, because a KBS holds one policy and every upload replaces it.
package register

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"

	"coffer/hostbuild/bundle"
	"coffer/hostbuild/policy"
	"coffer/hostbuild/settings"
	"coffer/internal/guestconfig"
	"coffer/kbsclient"
)

// Registrar speaks to one KBS.
type Registrar struct {
	CA []byte // PEM, of the KBS's authority

	admin  *kbsclient.Admin
	folder *policy.Folder
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
	admin, err := kbsclient.NewAdmin(kbsclient.Config{URL: s.KBSURL, RootCAs: ca}, key)
	if err != nil {
		return nil, fmt.Errorf("kbs.url of %s: %w", s.File, err)
	}
	folder, err := policy.OpenFolder(s.PolicyDir)
	if err != nil {
		return nil, fmt.Errorf("policy_dir of %s: %w", s.File, err)
	}
	return &Registrar{CA: ca, admin: admin, folder: folder, where: fmt.Sprintf("KBS %s (kbs.url, kbs.admin_key of %s)", s.KBSURL, s.File)}, nil
}

// Check asks the KBS for its policy, which it gives to its admin alone.
func (r *Registrar) Check(ctx context.Context) error {
	_, err := r.admin.ResourcePolicy(ctx)
	if err != nil && !errors.Is(err, kbsclient.ErrNotSupported) {
		return fmt.Errorf("%s: %w", r.where, err)
	}
	return nil
}

// RuleOf is the rule that a bundle needs: its two resources, its launch digests.
func RuleOf(m *bundle.Manifest) (policy.Rule, error) {
	rule := policy.Rule{CVMID: m.CVMID, Paths: []string{m.KBS.KeyPath, m.KBS.CanaryPath}, TEE: m.TEE}
	if m.TEE == policy.TEESample {
		return rule, nil // sample evidence carries no measurement
	}
	rule.MinTCB = policy.TCB(m.MinTCB)
	rule.Simulated = m.Platform == guestconfig.PlatformSimulated
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
		if derr := r.admin.DeleteResource(ctx, p); derr != nil && !errors.Is(derr, kbsclient.ErrNotSupported) {
			err = errors.Join(err, derr)
		}
	}
	return err
}

// AddCVM stores the key and the canary, the rule's two resources, and adds the rule. The rule comes last:
// without it nothing is released. After an error nothing of it is left. The caller wipes key.
func (r *Registrar) AddCVM(ctx context.Context, rule policy.Rule, key []byte) error {
	add := func() error {
		if err := r.admin.SetResource(ctx, rule.Paths[0], key); err != nil {
			return err
		}
		if err := r.admin.SetResource(ctx, rule.Paths[1], []byte(rule.CVMID)); err != nil {
			return err
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
	return r.folder.Update(ctx, func(rules *policy.Rules) error { return rules.Put(rule) }, r.admin.SetResourcePolicy)
}

// RemoveRule removes a CVM's rule and reports whether there was one. The key
// stays at the KBS, out of reach: adding the rule again brings the CVM back.
func (r *Registrar) RemoveRule(ctx context.Context, cvmID string) (found bool, err error) {
	err = r.folder.Update(ctx, func(rules *policy.Rules) error {
		found = rules.Remove(cvmID)
		return nil
	}, r.admin.SetResourcePolicy)
	if err != nil {
		return false, fmt.Errorf("%s: %w", r.where, err)
	}
	return found, nil
}

// Rules lists the rules of the master copy.
func (r *Registrar) Rules() (policy.Rules, error) {
	return r.folder.Rules()
}
