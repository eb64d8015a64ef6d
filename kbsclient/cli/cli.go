// Package cli is the command line of kbs-client, a drop-in for the tool of the
// same name that Trustee has (July 2025, built with the feature sample_only):
// the same arguments and files, the same standard output, exit code 0 for
// success, 1 for a failure and 2 for wrong usage. From Trustee's newer tool it
// has delete-resource, get-reference-value and --admin-token-file.
//
// It differs on purpose in these points:
//
//   - set-resource names the resource on standard output instead of printing
//     its content.
//   - --cert-file replaces the system's roots instead of adding to them.
//   - The built-in policies import rego.v1; Trustee's own texts, sent by a newer
//     tool to an older KBS, open every resource to everyone.
//   - A policy text that an older KBS would misread in this way is sent, with a
//     warning on standard error.
//   - Admin tokens carry exp, iss, aud and role, so that both old and new
//     servers take them.
//
// The evidence is Trustee's `sample`: it proves nothing, and a KBS that gives a
// secret for it gives it to anybody.
package cli

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"coffer/kbsclient"
)

// Main runs the command and gives the exit code. args are the arguments without
// the program's name.
func Main(ctx context.Context, args []string, env func(string) (string, bool), stdout, stderr io.Writer) int {
	t := &tool{env: env, stdout: stdout, stderr: stderr}
	root := t.root()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	var failed *failure
	switch {
	case err == nil:
		return 0
	case errors.As(err, &failed):
		fmt.Fprintf(stderr, "Error: %v\n", failed.err)
		return 1
	}
	fmt.Fprintf(stderr, "error: %v\n\nFor more information, try '--help'.\n", err)
	return 2
}

// failure is an error of the work, in contrast to one of usage.
type failure struct{ err error }

func (f *failure) Error() string { return f.err.Error() }

type tool struct {
	env            func(string) (string, bool)
	stdout, stderr io.Writer

	// Flags of the root and of config.
	url, certFile             string
	authPrivateKey, tokenFile string
	issuer, audience, role    string
}

// run makes a cobra function of work.
func run(work func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := work(cmd.Context(), args); err != nil {
			return &failure{err}
		}
		return nil
	}
}

// parent is a command that only has subcommands.
func parent(use, short string) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		cmd.SetOut(cmd.ErrOrStderr())
		_ = cmd.Help()
		return errors.New("a subcommand is required")
	}}
}

// leaf is a command that does something.
func leaf(use, short string, args cobra.PositionalArgs, work func(ctx context.Context, args []string) error) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: args, RunE: run(work)}
}

func require(cmd *cobra.Command, flags ...string) {
	for _, name := range flags {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // a flag that is not defined above
		}
	}
}

// Command is the command line, for its manual.
func Command() *cobra.Command { return new(tool).root() }

func (t *tool) root() *cobra.Command {
	root := parent("kbs-client", "A command line client for the APIs of a Trustee KBS")
	root.Version = "0.1.0"
	root.SetVersionTemplate("KBS client {{.Version}}\n")
	root.Flags().BoolP("version", "V", false, "print the version")
	root.SilenceErrors, root.SilenceUsage = true, true
	root.CompletionOptions.DisableDefaultCmd = true
	root.PersistentFlags().StringVar(&t.url, "url", "http://127.0.0.1:8080", "the KBS's root URL")
	root.PersistentFlags().StringVar(&t.certFile, "cert-file", "", "PEM `file` of the certificates to trust instead of the system's")
	root.AddCommand(t.attest(), t.getResource(), t.config())
	return root
}

func (t *tool) attest() *cobra.Command {
	var keyFile string
	cmd := leaf("attest [INIT_DATA]", "Attest with sample evidence and print the token", cobra.MaximumNArgs(1),
		func(ctx context.Context, args []string) error {
			session, err := t.session(ctx, keyFile, args)
			if err != nil {
				return err
			}
			defer session.Close()
			fmt.Fprintln(t.stdout, session.Token())
			return nil
		})
	cmd.Flags().StringVar(&keyFile, "tee-key-file", "", "PEM `file` of the key that the token is bound to; default a fresh one")
	return cmd
}

func (t *tool) getResource() *cobra.Command {
	var path, keyFile, tokenFile string
	cmd := leaf("get-resource [INIT_DATA]", "Fetch a resource and print it in base64", cobra.MaximumNArgs(1),
		func(ctx context.Context, args []string) error {
			var session *kbsclient.Session
			var err error
			if tokenFile == "" {
				session, err = t.session(ctx, keyFile, args)
			} else {
				session, err = t.resume(tokenFile, keyFile)
			}
			if err != nil {
				return err
			}
			defer session.Close()
			secret, err := session.Resource(ctx, path)
			if err != nil {
				return err
			}
			defer clear(secret)
			text := append(base64.StdEncoding.AppendEncode(nil, secret), '\n')
			defer clear(text)
			_, err = t.stdout.Write(text)
			return err
		})
	cmd.Flags().StringVar(&path, "path", "", "`repository/type/tag`")
	cmd.Flags().StringVar(&keyFile, "tee-key-file", "", "PEM `file` of the key that the resource is encrypted to; default a fresh one")
	cmd.Flags().StringVar(&tokenFile, "attestation-token", "", "`file` of a token to use instead of attesting; needs its --tee-key-file")
	require(cmd, "path")
	return cmd
}

func (t *tool) config() *cobra.Command {
	cmd := parent("config", "Store resources, policies and reference values")
	flags := cmd.PersistentFlags()
	flags.StringVar(&t.authPrivateKey, "auth-private-key", "", "PEM `file` (PKCS#8) of the Ed25519 key that signs admin tokens")
	flags.StringVar(&t.tokenFile, "admin-token-file", "", "`file` of an admin token to present instead")
	flags.StringVar(&t.issuer, "admin-issuer", "", "iss of signed admin tokens, where the KBS compares it (default \"coffer\")")
	flags.StringVar(&t.audience, "admin-audience", "", "aud of signed admin tokens, where the KBS compares it (default \"kbs\")")
	flags.StringVar(&t.role, "admin-role", "", "role of signed admin tokens, where the KBS compares it (default \"admin\")")
	subcommands := []*cobra.Command{
		t.setResource(), t.deleteResource(), t.setResourcePolicy(), t.setAttestationPolicy(),
		t.getReferenceValues(), t.getReferenceValue(), t.setSampleReferenceValue(),
	}
	for _, sub := range subcommands {
		sub.PreRunE = func(*cobra.Command, []string) error {
			if (t.authPrivateKey == "") == (t.tokenFile == "") {
				return errors.New("config needs one of --auth-private-key and --admin-token-file")
			}
			return nil
		}
	}
	cmd.AddCommand(subcommands...)
	return cmd
}

func (t *tool) setResource() *cobra.Command {
	var path, file string
	cmd := leaf("set-resource", "Store a file as a resource", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		defer clear(data)
		admin, err := t.admin()
		if err != nil {
			return err
		}
		if err := admin.SetResource(ctx, path, data); err != nil {
			return err
		}
		fmt.Fprintf(t.stdout, "Set resource success \n resource: %s\n", path)
		return nil
	})
	cmd.Flags().StringVar(&path, "path", "", "`repository/type/tag`")
	cmd.Flags().StringVar(&file, "resource-file", "", "`file` with the content")
	require(cmd, "path", "resource-file")
	return cmd
}

func (t *tool) deleteResource() *cobra.Command {
	var path string
	cmd := leaf("delete-resource", "Remove a resource (KBS of 2026)", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		admin, err := t.admin()
		if err != nil {
			return err
		}
		if err := admin.DeleteResource(ctx, path); err != nil {
			return err
		}
		fmt.Fprintf(t.stdout, "Delete resource success \n resource: %s\n", path)
		return nil
	})
	cmd.Flags().StringVar(&path, "path", "", "`repository/type/tag`")
	require(cmd, "path")
	return cmd
}

func (t *tool) setResourcePolicy() *cobra.Command {
	var file string
	builtin := make([]bool, len(builtinPolicies))
	cmd := leaf("set-resource-policy", "Replace the resource policy", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		var text []byte
		switch {
		case file != "":
			var err error
			if text, err = os.ReadFile(file); err != nil {
				return err
			}
		default:
			for i, p := range builtinPolicies {
				if builtin[i] {
					text = []byte(p.rego)
				}
			}
			if text == nil {
				return errors.New("No policy specified") // Trustee's words
			}
		}
		t.warnOfPolicy(text)
		admin, err := t.admin()
		if err != nil {
			return err
		}
		if err := admin.SetResourcePolicy(ctx, text); err != nil {
			return err
		}
		fmt.Fprintf(t.stdout, "Set resource policy success \n policy: %s\n", base64.StdEncoding.EncodeToString(text))
		return nil
	})
	cmd.Flags().StringVar(&file, "policy-file", "", "rego `file`")
	names := []string{"policy-file"}
	for i, p := range builtinPolicies {
		cmd.Flags().BoolVar(&builtin[i], p.flag, false, p.help)
		names = append(names, p.flag)
	}
	cmd.MarkFlagsMutuallyExclusive(names...)
	return cmd
}

func (t *tool) setAttestationPolicy() *cobra.Command {
	var typ, id, file string
	cmd := leaf("set-attestation-policy", "Replace an attestation policy", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		if typ != "rego" {
			return fmt.Errorf("policy type %q: a KBS knows rego only", typ)
		}
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		t.warnOfPolicy(text)
		admin, err := t.admin()
		if err != nil {
			return err
		}
		if err := admin.SetAttestationPolicy(ctx, id, text); err != nil {
			return err
		}
		fmt.Fprintf(t.stdout, "Set attestation policy success \n policy: %s\n", base64.StdEncoding.EncodeToString(text))
		return nil
	})
	cmd.Flags().StringVar(&typ, "type", "rego", "the policy's language")
	cmd.Flags().StringVar(&id, "id", "default", "the policy's name; the one that a KBS uses for CPUs is default_cpu")
	cmd.Flags().StringVar(&file, "policy-file", "", "rego `file`")
	require(cmd, "policy-file")
	return cmd
}

func (t *tool) getReferenceValues() *cobra.Command {
	return leaf("get-reference-values", "Print all reference values (KBS of 2025)", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		admin, err := t.admin()
		if err != nil {
			return err
		}
		values, err := admin.ReferenceValues(ctx)
		if err != nil {
			return err
		}
		fmt.Fprintln(t.stdout, strconv.Quote(string(values))) // Trustee prints a quoted string
		return nil
	})
}

func (t *tool) getReferenceValue() *cobra.Command {
	var id string
	cmd := leaf("get-reference-value", "Print one reference value (KBS of 2026)", cobra.NoArgs, func(ctx context.Context, _ []string) error {
		admin, err := t.admin()
		if err != nil {
			return err
		}
		value, err := admin.ReferenceValue(ctx, id)
		if err != nil {
			return err
		}
		fmt.Fprintln(t.stdout, string(value))
		return nil
	})
	cmd.Flags().StringVar(&id, "id", "", "the reference value's `name`")
	require(cmd, "id")
	return cmd
}

func (t *tool) setSampleReferenceValue() *cobra.Command {
	var asInteger, asBool, asSingle bool
	cmd := leaf("set-sample-reference-value NAME VALUE", "Register a reference value", cobra.ExactArgs(2), func(ctx context.Context, args []string) error {
		value, err := referenceValue(args[1], asInteger, asBool)
		if err != nil {
			return err
		}
		if !asSingle {
			value = []any{value}
		}
		admin, err := t.admin()
		if err != nil {
			return err
		}
		if err := admin.SetReferenceValue(ctx, args[0], value); err != nil {
			return err
		}
		fmt.Fprintln(t.stdout, "Reference Values Updated")
		return nil
	})
	cmd.Flags().BoolVar(&asInteger, "as-integer", false, "the value is a 32-bit integer")
	cmd.Flags().BoolVar(&asBool, "as-bool", false, "the value is true or false")
	cmd.Flags().BoolVar(&asSingle, "as-single-value", false, "register the value itself, not a list of it")
	cmd.MarkFlagsMutuallyExclusive("as-integer", "as-bool")
	return cmd
}

func referenceValue(text string, asInteger, asBool bool) (any, error) {
	switch {
	case asInteger:
		n, err := strconv.ParseInt(text, 10, 32)
		return n, err
	case asBool:
		if text != "true" && text != "false" {
			return nil, fmt.Errorf("%q is neither true nor false", text)
		}
		return text == "true", nil
	}
	return text, nil
}

func (t *tool) clientConfig() (kbsclient.Config, error) {
	cfg := kbsclient.Config{
		URL: t.url, AllowHTTP: true, UserAgent: "kbs-client/0.1.0",
		AdminIssuer: t.issuer, AdminAudience: t.audience, AdminRole: t.role,
	}
	if t.certFile != "" {
		var err error
		if cfg.RootCAs, err = os.ReadFile(t.certFile); err != nil {
			return cfg, err
		}
	}
	return cfg, nil
}

func (t *tool) admin() (*kbsclient.Admin, error) {
	cfg, err := t.clientConfig()
	if err != nil {
		return nil, err
	}
	if t.tokenFile != "" {
		token, err := os.ReadFile(t.tokenFile)
		if err != nil {
			return nil, err
		}
		return kbsclient.NewAdminToken(cfg, strings.TrimSpace(string(token)))
	}
	text, err := os.ReadFile(t.authPrivateKey)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	key, err := kbsclient.ParseAdminKey(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.authPrivateKey, err)
	}
	return kbsclient.NewAdmin(cfg, key)
}

// session attests with sample evidence. args may hold the init-data.
func (t *tool) session(ctx context.Context, keyFile string, args []string) (*kbsclient.Session, error) {
	cfg, err := t.clientConfig()
	if err != nil {
		return nil, err
	}
	client, err := kbsclient.New(cfg)
	if err != nil {
		return nil, err
	}
	var opts []kbsclient.Option
	if keyFile != "" {
		key, err := readTEEKey(keyFile)
		if err != nil {
			return nil, err
		}
		opts = append(opts, kbsclient.WithTEEKey(key))
	}
	if len(args) == 1 {
		opts = append(opts, kbsclient.WithInitData(args[0]))
	}
	if _, ok := t.env("ENABLE_SAMPLE_DEVICE"); ok {
		return client.Attest(ctx, sampleWithDevice{}, opts...)
	}
	return client.Attest(ctx, sample{}, opts...)
}

// resume takes up the session of a token.
func (t *tool) resume(tokenFile, keyFile string) (*kbsclient.Session, error) {
	if keyFile == "" {
		return nil, errors.New("--attestation-token needs --tee-key-file, the key that the token is bound to")
	}
	token, err := os.ReadFile(tokenFile)
	if err != nil {
		return nil, err
	}
	key, err := readTEEKey(keyFile)
	if err != nil {
		return nil, err
	}
	cfg, err := t.clientConfig()
	if err != nil {
		return nil, err
	}
	client, err := kbsclient.New(cfg)
	if err != nil {
		return nil, err
	}
	session, err := client.Resume(strings.TrimSpace(string(token)), key)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", tokenFile, err)
	}
	return session, nil
}

func readTEEKey(file string) (*kbsclient.TEEKey, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	defer clear(text)
	key, err := kbsclient.ParseTEEKey(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return key, nil
}

// sample is Trustee's evidence for tests.
type sample struct{}

func (sample) TEE() string { return "sample" }

func (sample) Evidence(_ context.Context, digest [48]byte) (json.RawMessage, error) {
	return json.Marshal(sampleEvidence{"1", digest[:]})
}

type sampleEvidence struct {
	SVN        string `json:"svn"`
	ReportData []byte `json:"report_data"` // base64 by encoding/json
}

// sampleWithDevice adds Trustee's device for tests.
type sampleWithDevice struct{ sample }

func (sampleWithDevice) AdditionalEvidence(_ context.Context, digest [48]byte) (string, error) {
	text, err := json.Marshal(map[string]sampleEvidence{"sampledevice": {"2", digest[:]}})
	return string(text), err
}
