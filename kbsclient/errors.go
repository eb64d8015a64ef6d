package kbsclient

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// What went wrong, for errors.Is. An answer of the KBS is an [*Error] that
// matches one of them; a failure before an answer matches ErrUnreachable,
// ErrTLS or ErrClock.
var (
	// ErrUnreachable: no answer. No connection, a connection that broke or
	// timed out, or a proxy's 5xx. It says nothing about the evidence.
	ErrUnreachable = errors.New("the KBS is unreachable")
	// ErrTLS: somebody answers, but not with the certificate or the TLS
	// version asked for.
	ErrTLS = errors.New("TLS failed")
	// ErrClock: the KBS's certificate is the right one, but this machine's
	// time lies outside its validity. Such an error matches ErrTLS as well:
	// ask for ErrClock first.
	ErrClock = errors.New("the time does not fit the KBS's certificate")
	// ErrProtocol: an answer outside the protocol.
	ErrProtocol = errors.New("the KBS's answer is outside the protocol")
	// ErrTooLarge: a body beyond the limit, ours or the KBS's.
	ErrTooLarge = errors.New("too large")
	// ErrNotSupported: this KBS does not have the call.
	ErrNotSupported = errors.New("the KBS does not support this call")

	// ErrAttestationRefused: the KBS does not accept the handshake or its
	// evidence. Trustee says why in its own log only.
	ErrAttestationRefused = errors.New("the KBS refused the attestation")
	// ErrPolicyDenied: the evidence is genuine and the resource policy says no.
	ErrPolicyDenied = errors.New("the KBS's policy denies access")
	// ErrPolicyEngine: the policy cannot be loaded or evaluated.
	ErrPolicyEngine = errors.New("the KBS's policy does not load or evaluate")
	// ErrTokenNotFound: the session is dead. Attest again.
	ErrTokenNotFound = errors.New("the KBS knows no such session")
	// ErrTokenInvalid: the session's token is expired or not trusted by the
	// KBS itself. Attest again, once.
	ErrTokenInvalid = errors.New("the KBS does not accept its own token")
	// ErrNoResource: no such resource, or the KBS's storage failed (Trustee
	// does not tell which).
	ErrNoResource = errors.New("the KBS has no such resource")
	// ErrAdminAuth: the admin token is not accepted.
	ErrAdminAuth = errors.New("the KBS does not accept the admin token")
	// ErrOldKBS: the KBS is of a generation (T) that crashes at evidence of
	// NVIDIA's devices, which was therefore not sent.
	ErrOldKBS = errors.New("the KBS is of a generation that crashes at it")
	// ErrReferenceValue: reference values cannot be read or set.
	ErrReferenceValue = errors.New("the KBS refused the reference value")
)

// opKind says what an ambiguous error type means.
type opKind int

const (
	opAttest opKind = iota
	opResource
	opAdmin
)

// Error is an answer of the KBS with another status than 200.
type Error struct {
	Status int    // HTTP status; Trustee answers 401 to nearly everything
	Type   string // last element of ErrorInformation.type, "" if there is none
	Detail string // ErrorInformation.detail, or the begin of a plain text
	Op     string // what was asked for

	kind opKind
	skew time.Duration // how far this machine's clock is ahead of the KBS's
}

// errorInformation is the body of Trustee's errors.
type errorInformation struct {
	Type   string `json:"type"`
	Detail string `json:"detail"`
}

const (
	errorTypePrefix = "https://github.com/confidential-containers/kbs/errors/"
	maxDetail       = 400
)

// parseErrorInformation gives the type's last element and the detail. A body
// that is no ErrorInformation has no type.
func parseErrorInformation(body []byte) (typ, detail string) {
	var info errorInformation
	if json.Unmarshal(body, &info) == nil {
		if name, ok := strings.CutPrefix(info.Type, errorTypePrefix); ok && isName(name) {
			return name, printable(info.Detail)
		}
	}
	return "", printable(string(body))
}

func isName(s string) bool {
	for _, r := range s {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') {
			return false
		}
	}
	return s != "" && len(s) <= 64
}

// printable makes s one line of bounded length.
func printable(s string) string {
	if len(s) > maxDetail {
		s = s[:maxDetail] + "..."
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?")))
}

func newError(r call, resp *http.Response, body []byte, now time.Time) *Error {
	e := &Error{Status: resp.StatusCode, Op: r.op, kind: r.kind}
	e.Type, e.Detail = parseErrorInformation(body)
	if date := date(resp.Header); !date.IsZero() {
		e.skew = now.Sub(date)
	}
	return e
}

func (e *Error) Error() string {
	text := e.Detail
	if reason := e.reason(); reason != nil {
		text = reason.Error()
		if e.Detail != "" {
			text += ": " + e.Detail
		}
	}
	name := fmt.Sprintf("HTTP %d", e.Status)
	if e.Type != "" {
		name = e.Type + ", " + name
	}
	text = fmt.Sprintf("%s: %s (%s)", e.Op, text, name)
	if e.reason() == ErrAdminAuth && e.skew.Abs() > time.Minute {
		text += fmt.Sprintf("; this machine's clock is %s off the KBS's", e.skew.Abs().Round(time.Second))
	}
	return text
}

// Is makes errors.Is find the Err variable that the answer stands for.
func (e *Error) Is(target error) bool { return target == e.reason() }

func (e *Error) reason() error {
	switch e.Type {
	case "PolicyDeny":
		return ErrPolicyDenied
	case "TokenNotFound":
		return ErrTokenNotFound
	case "TokenVerifierError":
		return ErrTokenInvalid
	case "AttestationError":
		if e.kind == opAdmin { // an attestation policy that does not load
			return ErrPolicyEngine
		}
		return ErrAttestationRefused
	case "PluginInternalError":
		return ErrNoResource
	case "PolicyEngine", "PolicyEngineError", "ParsePolicyError":
		return ErrPolicyEngine
	case "AdminAuth", "AdminAuthAccess", "AdminAuthInitialization":
		return ErrAdminAuth
	case "RvpsError":
		return ErrReferenceValue
	case "PluginNotFound", "InvalidRequestPath":
		return ErrNotSupported
	case "":
		return statusReason(e.Status)
	}
	return ErrProtocol // JweError, SerdeError and what is not known here
}

// statusReason sorts answers that did not come from the KBS proper but from its
// HTTP layer, or from a proxy in front of it.
func statusReason(status int) error {
	switch {
	case status == http.StatusRequestEntityTooLarge, status == http.StatusRequestHeaderFieldsTooLarge:
		return ErrTooLarge
	case status == http.StatusNotFound, status == http.StatusMethodNotAllowed:
		return ErrNotSupported
	case status == http.StatusRequestTimeout, status == http.StatusTooManyRequests, status >= 500:
		return ErrUnreachable
	}
	return ErrProtocol
}

// ClockError says that the KBS's certificates are the right ones and that this
// machine's time lies outside the window in which all of them are valid. It
// matches ErrClock and ErrTLS.
type ClockError struct {
	Host                string
	Now                 time.Time // this machine's time
	NotBefore, NotAfter time.Time // the window
}

func (e *ClockError) Error() string {
	state := "has expired"
	if e.Now.Before(e.NotBefore) {
		state = "is not valid yet"
	}
	return fmt.Sprintf("the certificate of the KBS at %s %s: valid %s, this machine's time is %s; is its clock right?",
		e.Host, state, window(e.NotBefore, e.NotAfter), stamp(e.Now))
}

// Is matches ErrClock and ErrTLS.
func (e *ClockError) Is(target error) bool { return target == ErrClock || target == ErrTLS }
