package kbs

import (
	"container/list"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/http"
	"slices"
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
	nonce   string // standard base64 of 32 bytes
	tee     string
	expires time.Time

	mu    sync.Mutex // held while evidence is verified
	token string     // of our own making
	facts facts
}

func (s *session) cookie() string {
	return fmt.Sprintf("%s=%s; Expires=%s", cookieName, s.id, s.expires.UTC().Format(http.TimeFormat))
}

// attested returns the session's token, or "".
func (s *session) attested() (string, facts) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.token, s.facts
}

// sessions are the live sessions. Anyone can open one, so there is room for as
// many that wait for their evidence, and for as many that are attested: neither
// kind pushes out the other, and each loses its oldest.
//
// A session that waits can be made anew from its id: the nonce is a MAC of it,
// and the id tells the TEE and when it ends. So a handshake outlives a restart of
// the server, and a flood of others. A made-up id helps nobody: its nonce is known
// to the server alone.
type sessions struct {
	key  []byte // of the MAC
	tees []string
	now  func() time.Time
	max  int

	mu       sync.Mutex
	byID     map[string]*list.Element
	waiting  *list.List // of *session, oldest first
	attested *list.List
}

func newSessions(key []byte, tees []string, now func() time.Time) *sessions {
	return &sessions{key: key, tees: tees, now: now, max: maxSessions, byID: map[string]*list.Element{}, waiting: list.New(), attested: list.New()}
}

// open makes a session for a TEE of the list.
func (ss *sessions) open(tee string) *session {
	var id [16]byte
	rand.Read(id[:])
	binary.BigEndian.PutUint32(id[:], uint32(ss.now().Add(sessionLife).Unix()))
	id[4] = byte(slices.Index(ss.tees, tee))
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // the form of a version 4 UUID, as Trustee's
	s := ss.session(id)
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.insert(s)
	return s
}

// session is what the id stands for.
func (ss *sessions) session(id [16]byte) *session {
	mac := hmac.New(sha256.New, ss.key)
	mac.Write(id[:])
	return &session{
		id: hex.EncodeToString(id[:]), nonce: base64.StdEncoding.EncodeToString(mac.Sum(nil)), tee: ss.tees[id[4]],
		expires: time.Unix(int64(binary.BigEndian.Uint32(id[:])), 0),
	}
}

func (ss *sessions) insert(s *session) {
	for _, l := range []*list.List{ss.waiting, ss.attested} {
		for e := l.Front(); e != nil && !ss.now().Before(e.Value.(*session).expires); e = l.Front() {
			ss.drop(l, e)
		}
	}
	for ss.waiting.Len() >= ss.max {
		ss.drop(ss.waiting, ss.waiting.Front())
	}
	ss.byID[s.id] = ss.waiting.PushBack(s)
}

func (ss *sessions) drop(l *list.List, e *list.Element) {
	delete(ss.byID, e.Value.(*session).id)
	l.Remove(e)
}

// get returns the live session of that id, or nil.
func (ss *sessions) get(name string) *session {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if e, ok := ss.byID[name]; ok {
		if s := e.Value.(*session); ss.now().Before(s.expires) {
			return s
		}
		return nil
	}
	var id [16]byte
	if len(name) != 2*len(id) {
		return nil
	}
	if _, err := hex.Decode(id[:], []byte(name)); err != nil || int(id[4]) >= len(ss.tees) {
		return nil
	}
	s := ss.session(id)
	if left := s.expires.Sub(ss.now()); s.id != name || left <= 0 || left > sessionLife {
		return nil
	}
	ss.insert(s)
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
