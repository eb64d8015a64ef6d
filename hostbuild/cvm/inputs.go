package cvm

import (
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"coffer/hostbuild/config"
	"coffer/hostbuild/nvflare"
	"coffer/hostbuild/settings"
	"coffer/internal/guestconfig"
	"coffer/internal/treedigest"
)

// kitName is the key of user_config that NVFlare sets to a site's startup kit.
const kitName = "nvflare"

// inputs is what checkInputs found.
type inputs struct {
	pinned guestconfig.UserConfig
	kit    *nvflare.Kit // nil without one
	gpu    gpuInputs
	vceks  [][]byte // DER
}

// checkInputs finds what is wrong with the files that config and settings name,
// before the work and all at once.
func checkInputs(c *config.Config, s *settings.Settings) (in inputs, err error) {
	var errs []error
	if st, err := os.Stat(c.DockerArchive); err != nil {
		errs = append(errs, explain("docker_archive", c.DockerArchive, err))
	} else if !st.Mode().IsRegular() {
		errs = append(errs, fmt.Errorf("docker_archive: %s is no file; give the file that `docker save -o` writes", c.DockerArchive))
	}
	for name, folder := range c.UserConfig {
		key := "user_config." + name
		if _, err := os.Stat(folder); err != nil {
			errs = append(errs, explain(key, folder, err))
		} else if err := outside(s.OutputDir, folder); err != nil {
			errs = append(errs, fmt.Errorf("output_dir of %s: %w (%s), which NVFlare empties before it fetches the bundle; choose another", s.File, err, key))
		} else if name == kitName {
			var issuers []string
			for _, is := range c.Issuers {
				issuers = append(issuers, is.ID)
			}
			if in.kit, err = nvflare.Check(folder, issuers); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", key, err))
			}
		}
	}
	if in.gpu, err = checkGPU(c); err != nil {
		errs = append(errs, err)
	}
	if in.vceks, err = readVCEKs(c.VCEKs); err != nil {
		errs = append(errs, fmt.Errorf("vceks: %w", err))
	}
	if err := errors.Join(errs...); err != nil {
		return in, err
	}
	in.pinned, err = pin(c)
	return in, err
}

// readVCEKs reads the certificates of a folder, .der or .pem, in the order of names.
func readVCEKs(dir string) (list [][]byte, err error) {
	if dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		ext := filepath.Ext(e.Name())
		if ext != ".der" && ext != ".pem" {
			continue
		}
		file := filepath.Join(dir, e.Name())
		der, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if ext == ".pem" {
			block, _ := pem.Decode(der)
			if block == nil {
				return nil, fmt.Errorf("%s is not PEM", file)
			}
			der = block.Bytes
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		if cn := cert.Subject.CommonName; cn != "SEV-VCEK" && cn != "SEV-VLEK" {
			return nil, fmt.Errorf("%s is the certificate of %q, not of a chip (SEV-VCEK)", file, cn)
		}
		list = append(list, der)
	}
	switch n := len(list); {
	case n == 0:
		return nil, fmt.Errorf("%s holds no .der or .pem file", dir)
	case n > guestconfig.MaxVCEKs:
		return nil, fmt.Errorf("%s holds %d certificates, more than %d", dir, n, guestconfig.MaxVCEKs)
	}
	return list, nil
}

// checkImage fails where the kit needs Python modules that the image lacks.
func (in inputs) checkImage(modules []string) error {
	if in.kit == nil {
		return nil
	}
	if err := in.kit.CheckImage(modules); err != nil {
		return fmt.Errorf("user_config.%s: %w", kitName, err)
	}
	return nil
}

// pin lists what is pinned of user_config.
func pin(c *config.Config) (pinned guestconfig.UserConfig, err error) {
	pinned.Integrity = c.Integrity
	if c.Integrity == guestconfig.IntegrityOff {
		return pinned, nil
	}
	pinned.Files, err = treedigest.Scan(c.UserConfig, c.Required...)
	switch {
	case errors.Is(err, treedigest.ErrTooLarge):
		return pinned, fmt.Errorf("user_config: %w; put large data into the image or user_data, or say which files count: user_config_integrity: {required: [...]}", err)
	case c.Integrity == guestconfig.IntegrityRequired && err != nil:
		return pinned, fmt.Errorf("user_config_integrity.required: %w", err)
	case err != nil:
		return pinned, fmt.Errorf("user_config: %w", err)
	}
	return pinned, nil
}

func explain(key, path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s: %s is not there", key, path)
	}
	return fmt.Errorf("%s: %w", key, err)
}

// outside fails where dir is folder or lies below it. dir need not exist yet.
func outside(dir, folder string) error {
	folder, err := filepath.EvalSymlinks(folder)
	if err != nil {
		return err
	}
	for given := dir; ; dir = filepath.Dir(dir) {
		real, err := filepath.EvalSymlinks(dir)
		if errors.Is(err, fs.ErrNotExist) && dir != filepath.Dir(dir) {
			continue
		}
		if err != nil {
			return err
		}
		if rel, err := filepath.Rel(folder, real); err == nil && (rel == "." || filepath.IsLocal(rel)) {
			return fmt.Errorf("%s lies inside of %s", given, folder)
		}
		return nil
	}
}
