package cli

import (
	"bufio"
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"text/template"

	"github.com/spf13/cobra"
	"gopkg.in/yaml.v3"

	"coffer/hostbuild/doctor"
	"coffer/hostbuild/settings"
	"coffer/hostbuild/yamlcheck"
)

//go:embed templates
var templates embed.FS

// beginning is what the two files are filled with.
type beginning struct {
	URL, GuestURL, CA, AdminKey, PolicyDir, BaseDir, OutputDir string
	Archive, Ports, OutPorts, Schemas                          string
}

var portList = regexp.MustCompile(`^([0-9]{1,5}(/udp|/tcp)?(,|$))*$`)

func (a *App) init() *cobra.Command {
	var b beginning
	var kbsDir, conf string
	c := &cobra.Command{
		Use:   "init",
		Short: "Write settings and a CONFIG.yaml to start from, and check the KBS",
		Long: `Writes two commented files, the settings of this build host (where --settings says, else
~/.config/coffer/hostbuild.yaml) and a CONFIG.yaml. What no flag says is asked, on a
terminal. A file that is there already stays as it is. Then the KBS of the settings is
checked: does it answer, with a certificate of that authority, does it take the admin key?`,
		Example: `  hostbuild init
  hostbuild init --kbs-url https://kbs.example:8999 --kbs-dir /srv/kbs --archive app.tar.gz --ports 8002`,
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			file, err := a.newSettingsFile()
			if err != nil {
				return err
			}
			if kbsDir != "" {
				for into, name := range map[*string]string{&b.CA: "ca.pem", &b.AdminKey: "admin.key", &b.PolicyDir: "policy"} {
					if *into == "" {
						*into = filepath.Join(kbsDir, name)
					}
				}
			}
			if err := a.ask(&b, file, conf); err != nil {
				return err
			}
			if err := b.prepare(); err != nil {
				return err
			}
			for flag, list := range map[string]string{"--ports": b.Ports, "--out-ports": b.OutPorts} {
				if !portList.MatchString(list) {
					return fmt.Errorf("%w: %s %q is no list such as 8002,53/udp", errUsage, flag, list)
				}
			}
			if err := errors.Join(a.writeNew(conf, "CONFIG.yaml.tmpl", b), a.writeNew(file, "hostbuild.yaml.tmpl", b)); err != nil {
				return err
			}
			s, err := settings.Read(file)
			if err != nil {
				return err
			}
			found := thisHost().KBS(cmd.Context(), s)
			a.findings(found)
			if !doctor.Healthy(found) {
				return fmt.Errorf("the files are there, but the KBS of %s cannot be used yet; `hostbuild doctor` checks again", file)
			}
			fmt.Fprintf(a.Stdout, "next: hostbuild doctor; hostbuild cvm %s\n", conf)
			return nil
		},
	}
	f := c.Flags()
	f.StringVar(&b.URL, "kbs-url", "", "where the KBS is, `https://host:port`")
	f.StringVar(&b.GuestURL, "kbs-guest-url", "", "where guests reach it, if elsewhere")
	f.StringVar(&kbsDir, "kbs-dir", "", "the `FOLDER` that `hostbuild kbs init` made: gives CA, admin key and policy folder")
	f.StringVar(&b.CA, "kbs-ca", "", "PEM `FILE` of the authority that signed the KBS's certificate")
	f.StringVar(&b.AdminKey, "admin-key", "", "PEM `FILE` of the KBS's admin key")
	f.StringVar(&b.PolicyDir, "policy-dir", "", "`FOLDER` of the master copy of the policy; made where it is not there")
	f.StringVar(&b.BaseDir, "base-dir", "", "`FOLDER` of a guest base (default: the installed one)")
	f.StringVar(&b.OutputDir, "output-dir", "", "`FOLDER` for bundles")
	f.StringVar(&b.Archive, "archive", "", "the image, a `FILE` that docker save wrote")
	f.StringVar(&b.Ports, "ports", "", "ports that may be reached, such as `8002,53/udp`")
	f.StringVar(&b.OutPorts, "out-ports", "", "ports that may be connected to")
	f.StringVar(&conf, "config", "CONFIG.yaml", "the CONFIG.yaml to write")
	return c
}

// newSettingsFile is where settings are written to: the named file, else the user's.
func (a *App) newSettingsFile() (string, error) {
	path, err := settings.Find(a.settingsFile, os.Getenv)
	if errors.Is(err, settings.ErrNotFound) {
		return yamlcheck.Expand("~/.config/coffer/hostbuild.yaml")
	}
	return path, err
}

// ask asks for what is needed and not said: on a terminal, else it is an error.
// A file that is there needs nothing.
func (a *App) ask(b *beginning, file, conf string) error {
	var missing []string
	in := bufio.NewReader(a.Stdin)
	for _, q := range []struct {
		into           *string
		file           string
		flag, question string
	}{
		{&b.URL, file, "--kbs-url", "KBS, https://host:port"},
		{&b.CA, file, "--kbs-ca", "PEM file of the authority of its certificate"},
		{&b.AdminKey, file, "--admin-key", "PEM file of its admin key"},
		{&b.PolicyDir, file, "--policy-dir", "folder of the policy's master copy"},
		{&b.BaseDir, file, "--base-dir", "folder of a guest base (make base, or hostbuild base build)"},
		{&b.Archive, conf, "--archive", "docker archive of the workload"},
	} {
		if q.into == &b.BaseDir && settings.InstalledBase() != "" {
			continue
		}
		if _, err := os.Lstat(q.file); err == nil || *q.into != "" {
			continue
		}
		if !a.Asks {
			missing = append(missing, q.flag)
			continue
		}
		for *q.into == "" {
			fmt.Fprintf(a.Stderr, "%s: ", q.question)
			line, err := in.ReadString('\n')
			if err != nil {
				return fmt.Errorf("no answer: %w", err)
			}
			*q.into = strings.TrimSpace(line)
		}
	}
	if missing != nil {
		return fmt.Errorf("%w: %s not given, and there is no terminal to ask at", errUsage, strings.Join(missing, ", "))
	}
	return nil
}

// prepare makes paths absolute, values fit for YAML, and the policy folder.
func (b *beginning) prepare() error {
	for _, p := range []*string{&b.CA, &b.AdminKey, &b.PolicyDir, &b.BaseDir, &b.OutputDir, &b.Archive} {
		if *p == "" {
			continue
		}
		path, err := yamlcheck.Expand(*p)
		if err != nil {
			return err
		}
		*p = path
	}
	if b.PolicyDir != "" {
		if err := os.MkdirAll(b.PolicyDir, 0o755); err != nil {
			return fmt.Errorf("--policy-dir: %w", err)
		}
	}
	if program, err := os.Executable(); err == nil {
		schemas := filepath.Join(filepath.Dir(filepath.Dir(program)), "share/coffer")
		if _, err := os.Stat(schemas); err == nil {
			b.Schemas = schemas
		}
	}
	for _, p := range []*string{&b.URL, &b.GuestURL, &b.CA, &b.AdminKey, &b.PolicyDir, &b.BaseDir, &b.OutputDir, &b.Archive} {
		if *p == "" {
			continue
		}
		text, err := yaml.Marshal(*p)
		if err != nil {
			return err
		}
		*p = strings.TrimSpace(string(text))
	}
	return nil
}

// writeNew writes a file from a template unless it is there.
func (a *App) writeNew(path, name string, b beginning) error {
	t, err := template.ParseFS(templates, "templates/"+name)
	if err != nil {
		return err
	}
	var text bytes.Buffer
	if err := t.Execute(&text, b); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		fmt.Fprintf(a.Stdout, "%s is there already and stays as it is\n", path)
		return nil
	}
	if err != nil {
		return err
	}
	_, err = f.Write(text.Bytes())
	if err := errors.Join(err, f.Close()); err != nil {
		os.Remove(path)
		return fmt.Errorf("write %s: %w", path, err)
	}
	fmt.Fprintf(a.Stdout, "%s is written\n", path)
	return nil
}
