package snpguest

import (
	"fmt"
	"slices"
	"strings"
)

// option is one option of a command.
type option struct {
	long  string
	short byte // 0: none
	flag  bool // takes no value
}

// args is a parsed command line. An option that was not given is absent.
type args struct {
	positional []string
	options    map[string]string // by long name; "" for a flag
}

func (a *args) has(long string) bool { _, ok := a.options[long]; return ok }

// or is an option's value, or what stands for it.
func (a *args) or(long, fallback string) string {
	if v, ok := a.options[long]; ok {
		return v
	}
	return fallback
}

// usageError is a command line that cannot be read: exit code 2.
type usageError string

func (e usageError) Error() string { return string(e) }

func usagef(format string, a ...any) error { return usageError(fmt.Sprintf(format, a...)) }

// errHelp asks for the help text: exit code 0.
const errHelp = usageError("help")

// parseArgs reads a command line as clap does: options anywhere, --name=value or
// --name value, -nvalue, -n=value or -n value, flags in one word, and "--".
func parseArgs(words []string, options []option) (*args, error) {
	a := &args{options: map[string]string{}}
	set := func(o option, value string, given bool, rest *[]string) error {
		switch {
		case o.flag && given:
			return usagef("unexpected value '%s' for '--%s' found; no more were expected", value, o.long)
		case a.has(o.long):
			return usagef("the argument '--%s' cannot be used multiple times", o.long)
		case o.flag || given:
		case len(*rest) == 0:
			return usagef("a value is required for '--%s' but none was supplied", o.long)
		default:
			value, *rest = (*rest)[0], (*rest)[1:]
			if len(value) > 1 && value[0] == '-' {
				return usagef("a value is required for '--%s' but none was supplied", o.long)
			}
		}
		a.options[o.long] = value
		return nil
	}
	for len(words) > 0 {
		w := words[0]
		words = words[1:]
		switch {
		case w == "--":
			a.positional = append(a.positional, words...)
			return a, nil
		case w == "--help" || w == "-h":
			return nil, errHelp
		case strings.HasPrefix(w, "--"):
			name, value, given := strings.Cut(w[2:], "=")
			i := slices.IndexFunc(options, func(o option) bool { return o.long == name })
			if i < 0 {
				return nil, usagef("unexpected argument '--%s' found", name)
			}
			if err := set(options[i], value, given, &words); err != nil {
				return nil, err
			}
		case len(w) > 1 && w[0] == '-':
			for w = w[1:]; w != ""; {
				i := slices.IndexFunc(options, func(o option) bool { return o.short != 0 && o.short == w[0] })
				if i < 0 {
					return nil, usagef("unexpected argument '-%c' found", w[0])
				}
				o := options[i]
				w = w[1:]
				value, given := "", false
				if !o.flag && w != "" {
					value, given, w = strings.TrimPrefix(w, "="), true, ""
				}
				if err := set(o, value, given, &words); err != nil {
					return nil, err
				}
			}
		default:
			a.positional = append(a.positional, w)
		}
	}
	return a, nil
}

// want checks the number of positional arguments.
func (a *args) want(least, most int, names string) error {
	if n := len(a.positional); n < least {
		return usagef("the following required arguments were not provided: %s", names)
	} else if n > most {
		return usagef("unexpected argument '%s' found", a.positional[most])
	}
	return nil
}

// oneOf checks a word that is compared without case.
func oneOf(what, value string, allowed ...string) (string, error) {
	if v := strings.ToLower(value); slices.Contains(allowed, v) {
		return v, nil
	}
	return "", usagef("invalid value '%s' for '<%s>' [possible values: %s]", value, what, strings.Join(allowed, ", "))
}
