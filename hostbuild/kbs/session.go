package kbs

import (
	"container/list"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"net/http"
	"sync"
	"time"
)

const (
	cookieName  = "kbs-session-id"
	sessionLife = 5 * time.Minute
	maxSessions = 10000 // of each kind: waiting and attested
)

// facts are what the audit says about a guest.
type facts struct {
	tee         string
	measurement string // hexadecimal
	chipID      string // hexadecimal
	simulated   bool
}

// session is one handshake: a nonce, and after a good attestation its token.
type session struct {
	id      string
	nonce   string // standard base64 of 32 random bytes
	tee     string
	expires time.Time

	mu     sync.Mutex // held while evidence is verified
	token  string
	claims map[string]any // the token's, as a reader of it sees them; not changed any more
	facts  facts
}

func (s *session) cookie() string {
	return fmt.Sprintf("%s=%s; Expires=%s", cookieName, s.id, s.expires.UTC().Format(http.TimeFormat))
}

// attested returns the claims of the session's token, or nil.
func (s *session) attested() (map[string]any, facts) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.claims, s.facts
}

// sessions are the live sessions. Anyone can open one, so there is room for as
// many that wait for their evidence, and for as many that are attested: neither
// kind pushes out the other, and each loses its oldest.
type sessions struct {
	now func() time.Time
	max int

	mu       sync.Mutex
	byID     map[string]*list.Element
	waiting  *list.List // of *session, oldest first
	attested *list.List
}

func newSessions(now func() time.Time) *sessions {
	return &sessions{now: now, max: maxSessions, byID: map[string]*list.Element{}, waiting: list.New(), attested: list.New()}
}

func (ss *sessions) open(tee string) *session {
	var id [16]byte
	var nonce [32]byte
	rand.Read(id[:])
	rand.Read(nonce[:])
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // a version 4 UUID, as Trustee's
	s := &session{
		id: hex.EncodeToString(id[:]), nonce: base64.StdEncoding.EncodeToString(nonce[:]), tee: tee,
		expires: ss.now().Add(sessionLife),
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	for _, l := range []*list.List{ss.waiting, ss.attested} {
		for e := l.Front(); e != nil && !ss.now().Before(e.Value.(*session).expires); e = l.Front() {
			ss.drop(l, e)
		}
	}
	for ss.waiting.Len() >= ss.max {
		ss.drop(ss.waiting, ss.waiting.Front())
	}
	ss.byID[s.id] = ss.waiting.PushBack(s)
	return s
}

func (ss *sessions) drop(l *list.List, e *list.Element) {
	delete(ss.byID, e.Value.(*session).id)
	l.Remove(e)
}

// get returns the live session of that id, or nil.
func (ss *sessions) get(id string) *session {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	e, ok := ss.byID[id]
	if !ok {
		return nil
	}
	s := e.Value.(*session)
	if !ss.now().Before(s.expires) {
		return nil
	}
	return s
}

// keep protects an attested session from floods.
func (ss *sessions) keep(s *session) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if e, ok := ss.byID[s.id]; ok {
		ss.waiting.Remove(e)
		for ss.attested.Len() >= ss.max {
			ss.drop(ss.attested, ss.attested.Front())
		}
		ss.byID[s.id] = ss.attested.PushBack(s)
	}
}
