// Package nvflare checks a startup kit of NVIDIA FLARE before it goes into a CVM.
//
// `nvflare provision` lets mistakes pass that leave a site without confidential
// computing, or with a kit that its own `--verify` refuses once the CVM runs. Each
// of them is an error here, with its cause. A kit's form is that of NVFlare 2.7 to
// 2.9: local/*__p_resources.json hold the components of a site, and each folder's
// signature.json a signature by the project's root for all that lies in it.
//
// The package does not know what is done with a kit, nor whether its root is the
// right one: that is in the kit, too.
package nvflare

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"coffer/internal/guestconfig"
	"coffer/internal/strict"
)

const (
	signatureFile = "signature.json"
	rootFile      = "startup/rootCA.pem"
	components    = "local/*__p_resources.json" // of a site's parent process
	ccPackage     = "nvflare.app_opt.confidential_computing."
	ccManager     = ccPackage + "cc_manager.CCManager"
)

// modules are what authorizers import that NVFlare itself does not bring.
var modules = map[string]string{
	ccPackage + "snp_authorizer.SNPAuthorizer": "filelock",
	ccPackage + "gpu_authorizer.GPUAuthorizer": "nv_attestation_sdk",
}

// Kit is a startup kit that passed Check.
type Kit struct {
	dir  string
	role string   // "server" or "client"
	own  []string // ids of the site's own issuers
	auth []component
}

// component is an entry of a components file.
type component struct {
	ID   string `json:"id"`
	Path string `json:"path"` // Python class
	Args struct {
		Verifiers []string `json:"cc_verifier_ids"`
	} `json:"args"`
	file string
}

// Check reads the kit in dir. issuers are the ids of the site's cc_issuers. The
// error holds all that is wrong with it.
func Check(dir string, issuers []string) (*Kit, error) {
	role := ""
	for _, r := range []string{"server", "client"} {
		if _, err := os.Stat(filepath.Join(dir, "startup", "fed_"+r+".json")); err == nil {
			role = r
		}
	}
	if role == "" {
		return nil, fmt.Errorf("%s is no startup kit of an NVFlare server or client: it has neither startup/fed_server.json nor startup/fed_client.json; let `nvflare provision` set user_config.nvflare", dir)
	}
	k := &Kit{dir: dir, role: role, own: issuers}
	all, err := readComponents(dir)
	if err != nil {
		return nil, err
	}
	var errs []error
	manager := slices.IndexFunc(all, func(c component) bool { return c.Path == ccManager })
	if manager < 0 {
		return nil, fmt.Errorf("%s has no cc_manager: NVFlare made this site without confidential computing; "+
			"project.yml needs CCBuilder among its builders, and the site a cc_config with compute_env: onprem_cvm that NVFlare accepts (it prints only \"CC is not enabled for ...\")", dir)
	}
	for _, id := range slices.Compact(slices.Sorted(slices.Values(slices.Concat(all[manager].Args.Verifiers, issuers)))) {
		if !slices.ContainsFunc(all, func(c component) bool { return c.ID == id }) {
			errs = append(errs, fmt.Errorf("%s has no authorizer %q, which cc_issuers or %s names: provision again", dir, id, all[manager].file))
		}
	}
	if err := checkSignatures(dir); err != nil {
		errs = append(errs, err)
	}
	k.auth = slices.DeleteFunc(all, func(c component) bool { return modules[c.Path] == "" })
	return k, errors.Join(errs...)
}

// CheckImage fails where the kit names an authorizer that the image cannot load,
// because a Python module is not among those installed in it.
func (k *Kit) CheckImage(installed []string) error {
	var errs []error
	for _, c := range k.auth {
		module := modules[c.Path]
		if slices.Contains(installed, module) {
			continue
		}
		why := ""
		if !slices.Contains(k.own, c.ID) {
			why = "; it belongs to another site, but NVFlare gives every kit the authorizers of all sites, and the site dies at its start without them"
		}
		errs = append(errs, fmt.Errorf("the image has no Python module %s, which the authorizer %q (%s) of %s needs: add `pip install %s` to the image%s",
			module, c.ID, c.Path, filepath.Join(k.dir, c.file), strings.ReplaceAll(module, "_", "-"), why))
	}
	return errors.Join(errs...)
}

// ShutPort says which port of the federation's server the guest's firewall would
// shut, given its open ports; "" where there is none or the kit names no port.
func (k *Kit) ShutPort(in, out []guestconfig.Port) string {
	data, err := strict.ReadFile(filepath.Join(k.dir, "startup", "fed_"+k.role+".json"), maxFile)
	var doc struct {
		Servers []struct{ Service struct{ Target string } }
		// A client's of NVFlare before 2.9: HOST:PORT:ADMIN_PORT.
		Agent struct {
			Args struct {
				Server string `json:"sp_end_point"`
			}
		} `json:"overseer_agent"`
	}
	if err != nil || json.Unmarshal(data, &doc) != nil {
		return ""
	}
	key, does, open := "allowed_out_ports", "connects to", out
	if k.role == "server" {
		key, does, open = "allowed_ports", "is reached at", in
	}
	for _, s := range doc.Servers {
		target := s.Service.Target
		if target == "" {
			target = doc.Agent.Args.Server[:max(0, strings.LastIndexByte(doc.Agent.Args.Server, ':'))]
		}
		_, text, _ := net.SplitHostPort(target)
		port, err := strconv.ParseUint(text, 10, 16)
		if err == nil && !slices.Contains(open, guestconfig.Port{Port: uint16(port), Proto: "tcp"}) {
			return fmt.Sprintf("%s has no %d: this site %s %s, and the guest's firewall will shut it", key, port, does, target)
		}
	}
	return ""
}

func readComponents(dir string) ([]component, error) {
	names, err := fs.Glob(os.DirFS(dir), components)
	if err != nil {
		return nil, err
	}
	var all []component
	for _, name := range names {
		data, err := strict.ReadFile(filepath.Join(dir, name), maxFile)
		if err != nil {
			return nil, err
		}
		var doc struct{ Components []component }
		if err := json.Unmarshal(data, &doc); err != nil {
			return nil, fmt.Errorf("%s: %w", filepath.Join(dir, name), err)
		}
		for _, c := range doc.Components {
			c.file = name
			all = append(all, c)
		}
	}
	return all, nil
}

// maxFile bounds a file of a kit; the largest are a few KiB.
const maxFile = 16 << 20

// checkSignatures does what `sub_start.sh --verify` will do in the CVM.
func checkSignatures(dir string) error {
	key, err := rootKey(filepath.Join(dir, rootFile))
	if err != nil {
		return err
	}
	var unsigned, wrong, other []string
	err = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		signatures := map[string]string{}
		data, err := strict.ReadFile(filepath.Join(name, signatureFile), maxFile)
		if err == nil {
			err = json.Unmarshal(data, &signatures)
		}
		if err != nil {
			other = append(other, fmt.Sprintf("%s: %v", filepath.Join(name, signatureFile), err))
			return nil
		}
		entries, err := os.ReadDir(name)
		if err != nil {
			return err
		}
		for _, e := range entries {
			file := filepath.Join(name, e.Name())
			if e.Name() == signatureFile {
				continue
			}
			content := []byte(e.Name()) // of a folder, its name is signed
			if e.Type().IsRegular() {
				if content, err = strict.ReadFile(file, maxFile); err != nil {
					return err
				}
			} else if !e.IsDir() {
				other = append(other, file+" is neither file nor folder")
				continue
			}
			signature, ok := signatures[e.Name()]
			delete(signatures, e.Name())
			rel, _ := filepath.Rel(dir, file)
			switch {
			case !ok:
				unsigned = append(unsigned, rel)
			case !verify(key, content, signature):
				wrong = append(wrong, rel)
			}
		}
		for gone := range signatures {
			other = append(other, filepath.Join(name, gone)+" is signed, but not there")
		}
		return nil
	})
	if err != nil {
		return err
	}
	var faults []string
	list := func(what string, names []string) {
		if slices.Sort(names); len(names) > 0 {
			faults = append(faults, what+strings.Join(names, ", "))
		}
	}
	list("no signature covers ", unsigned)
	list("changed after they were signed: ", wrong)
	list("", other)
	switch {
	case len(faults) == 0:
		return nil
	case len(unsigned)+len(wrong) > 0:
		faults = append(faults, "in project.yml, CCBuilder must come before SignatureBuilder, and nothing may change in a kit afterwards")
	default:
		faults = append(faults, "provision again")
	}
	return fmt.Errorf("%s is not as it was signed: %s", dir, strings.Join(faults, "; "))
}

func rootKey(name string) (*rsa.PublicKey, error) {
	data, err := strict.ReadFile(name, maxFile)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("%s holds no certificate", name)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	key, ok := cert.PublicKey.(*rsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("%s: NVFlare signs with RSA, and its key is a %T", name, cert.PublicKey)
	}
	return key, nil
}

func verify(key *rsa.PublicKey, content []byte, signature string) bool {
	raw, err := base64.StdEncoding.DecodeString(signature)
	if err != nil {
		return false
	}
	sum := sha256.Sum256(content)
	return rsa.VerifyPSS(key, crypto.SHA256, sum[:], raw, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto}) == nil
}
