package kbsclient

import (
	"crypto/sha512"
	"errors"
	"fmt"
	"maps"
	"slices"
	"unicode/utf8"
)

// object is a JSON object whose values are strings or objects: all that the
// runtime data of a handshake is made of.
type object map[string]any

// appendCanonical appends the canonical form of v by RFC 8785 (JCS): members
// sorted, no white space, the shortest escapes. It knows strings and objects
// only, and ASCII names, for which the order by bytes is the order by UTF-16.
func appendCanonical(b []byte, v any) ([]byte, error) {
	switch v := v.(type) {
	case string:
		return appendString(b, v)
	case object:
		b = append(b, '{')
		for i, name := range slices.Sorted(maps.Keys(v)) {
			if i > 0 {
				b = append(b, ',')
			}
			var err error
			if b, err = appendString(b, name); err != nil {
				return nil, err
			}
			if b, err = appendCanonical(append(b, ':'), v[name]); err != nil {
				return nil, err
			}
		}
		return append(b, '}'), nil
	}
	return nil, fmt.Errorf("canonical JSON of a %T", v)
}

func appendString(b []byte, s string) ([]byte, error) {
	if !utf8.ValidString(s) {
		return nil, errors.New("canonical JSON of a string that is not UTF-8")
	}
	b = append(b, '"')
	for i := range len(s) {
		switch c := s[i]; {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c == '\b':
			b = append(b, `\b`...)
		case c == '\t':
			b = append(b, `\t`...)
		case c == '\n':
			b = append(b, `\n`...)
		case c == '\f':
			b = append(b, `\f`...)
		case c == '\r':
			b = append(b, `\r`...)
		case c < ' ':
			b = fmt.Appendf(b, `\u%04x`, c)
		default:
			b = append(b, c)
		}
	}
	return append(b, '"'), nil
}

// deviceDigest binds a handshake to the evidence of additional devices.
func deviceDigest(nonce string, pub object) ([48]byte, error) {
	return digest(object{"nonce": nonce, "tee-pubkey": pub})
}

// primaryDigest binds a handshake and the additional evidence, exactly as it is
// sent, to the evidence of the CPU.
func primaryDigest(additional, nonce string, pub object) ([48]byte, error) {
	return digest(object{"additional-evidence": additional, "nonce": nonce, "tee-pubkey": pub})
}

func digest(runtimeData object) ([48]byte, error) {
	b, err := appendCanonical(nil, runtimeData)
	if err != nil {
		return [48]byte{}, err
	}
	return sha512.Sum384(b), nil
}
