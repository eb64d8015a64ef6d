package rim

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"coffer/internal/strict"
)

// ErrNotFound is an id that a source has no RIM of.
var ErrNotFound = errors.New("no RIM of this id")

// File is a RIM as it was found.
type File struct {
	Name   string // where it comes from, for people
	Data   []byte
	SHA256 string // of Data, hex
	Pinned bool   // its digest is one of those the source was given
}

func newFile(name string, data []byte) File {
	sum := sha256.Sum256(data)
	return File{Name: name, Data: data, SHA256: hex.EncodeToString(sum[:])}
}

// Source finds RIMs. Ids can change their content over time, so that there may be
// several of one id; any one of them, whole, may match a device.
type Source interface {
	// RIMs returns at least one file, or an error: ErrNotFound where there is none.
	RIMs(ctx context.Context, id string) ([]File, error)
}

var idForm = regexp.MustCompile(`^[A-Z0-9_.a-z-]{1,128}$`)

// CheckID returns an error unless id may be a RIM's: it becomes part of file names
// and addresses.
func CheckID(id string) error {
	if !idForm.MatchString(id) || strings.Contains(id, "..") || strings.HasPrefix(id, ".") {
		return fmt.Errorf("%q is not the id of a RIM", id)
	}
	return nil
}

// Dir is a folder of RIMs: <ID>.xml, <ID>.2.xml, <ID>.3.xml and so on.
type Dir struct {
	Path string
	Pins []string // SHA-256 of files, hex; nil: every file is used, none is pinned
}

// RIMs implements Source.
func (d Dir) RIMs(_ context.Context, id string) ([]File, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	names, err := fs.Glob(os.DirFS(d.Path), id+"*.xml")
	if err != nil {
		return nil, fmt.Errorf("folder of RIMs %s: %w", d.Path, err)
	}
	var files []File
	var unpinned []string
	for _, name := range names {
		if fileID, ok := FileID(name); !ok || fileID != id && name != id+".xml" {
			continue
		}
		name = filepath.Join(d.Path, name)
		file, err := ReadFile(name)
		if err != nil {
			return nil, err
		}
		if file.Pinned = slices.Contains(d.Pins, file.SHA256); d.Pins != nil && !file.Pinned {
			unpinned = append(unpinned, name)
			continue
		}
		files = append(files, file)
	}
	switch {
	case len(files) > 0:
		return files, nil
	case len(unpinned) > 0:
		return nil, fmt.Errorf("%w: %s: the SHA-256 of %s is not one of the pinned ones", ErrNotFound, id, strings.Join(unpinned, ", "))
	}
	return nil, fmt.Errorf("%w: %s in %s", ErrNotFound, id, d.Path)
}

// numbered is the end of the name of a further file of an id. Versions have no
// part of one digit that is not 0 at their end, so that this cannot be one.
var numbered = regexp.MustCompile(`\.[2-9]$`)

// FileID returns the id that the name of a file in a Dir stands for.
func FileID(name string) (id string, ok bool) {
	id, ok = strings.CutSuffix(filepath.Base(name), ".xml")
	id = numbered.ReplaceAllString(id, "")
	return id, ok && CheckID(id) == nil
}

// maxAnswer bounds a file, and a service's answer that holds one.
const maxAnswer = 2 * maxSize

// ReadFile reads a RIM's file.
func ReadFile(name string) (File, error) {
	data, err := strict.ReadFile(name, maxAnswer)
	if err != nil {
		return File{}, fmt.Errorf("RIM: %w", err)
	}
	return newFile(name, data), nil
}

// ServiceURL is NVIDIA's RIM service.
const ServiceURL = "https://rim.attestation.nvidia.com"

// Service asks a RIM service. Nothing it answers is trusted: RIMs are signed.
type Service struct {
	URL    string // ServiceURL, or a mirror
	Key    string // service key, sent as a bearer token where set
	Client *http.Client
}

// RIMs implements Source.
func (s Service) RIMs(ctx context.Context, id string) ([]File, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	var answer struct {
		ID     string `json:"id"`
		RIM    []byte `json:"rim"`
		Format string `json:"rim_format"`
	}
	address, err := s.get(ctx, "/v1/rim/"+url.PathEscape(id), &answer)
	if err != nil {
		return nil, err
	}
	if answer.ID != id || answer.Format != "" && answer.Format != "TCG" {
		return nil, fmt.Errorf("RIM service: %s answered with id %q in format %q, want %s in format TCG", address, answer.ID, answer.Format, id)
	}
	if len(answer.RIM) == 0 {
		return nil, fmt.Errorf("%w: %s holds nothing", ErrNotFound, address)
	}
	return []File{newFile(address, answer.RIM)}, nil
}

// IDs returns the ids that the service knows.
func (s Service) IDs(ctx context.Context) ([]string, error) {
	var answer struct {
		IDs []string `json:"ids"`
	}
	if _, err := s.get(ctx, "/v1/rim/ids", &answer); err != nil {
		return nil, err
	}
	return answer.IDs, nil
}

func (s Service) get(ctx context.Context, path string, answer any) (address string, err error) {
	address = strings.TrimSuffix(s.URL, "/") + path
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return address, fmt.Errorf("RIM service: %w", err)
	}
	if s.Key != "" {
		req.Header.Set("Authorization", "Bearer "+s.Key)
	}
	resp, err := s.Client.Do(req)
	if err != nil {
		return address, fmt.Errorf("RIM service: %w", err)
	}
	defer resp.Body.Close()
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound:
		return address, fmt.Errorf("%w: %s", ErrNotFound, address)
	default:
		return address, fmt.Errorf("RIM service: %s answered %s", address, resp.Status)
	}
	body, err := strict.ReadAll(resp.Body, maxAnswer)
	if err == nil {
		err = json.Unmarshal(body, answer)
	}
	if err != nil {
		return address, fmt.Errorf("RIM service: answer of %s: %w", address, err)
	}
	return address, nil
}

// First is sources in order: the first that has an id counts.
type First []Source

// RIMs implements Source.
func (f First) RIMs(ctx context.Context, id string) ([]File, error) {
	var missing []error
	for _, s := range f {
		files, err := s.RIMs(ctx, id)
		if err == nil || !errors.Is(err, ErrNotFound) {
			return files, err
		}
		missing = append(missing, err)
	}
	if len(missing) == 0 {
		return nil, fmt.Errorf("%w: %s, there is no source of RIMs", ErrNotFound, id)
	}
	return nil, errors.Join(missing...)
}

// Cache remembers what a source answered for a while, in memory. It is bounded,
// and safe for concurrent use.
type Cache struct {
	Source Source
	TTL    time.Duration
	Now    func() time.Time

	mu   sync.Mutex
	have map[string]cached
}

type cached struct {
	files []File
	until time.Time
}

const maxCached = 64

// RIMs implements Source.
func (c *Cache) RIMs(ctx context.Context, id string) ([]File, error) {
	now := c.Now()
	c.mu.Lock()
	hit, ok := c.have[id]
	c.mu.Unlock()
	// An entry from the future is one from before the clock was set back.
	if ok && now.Before(hit.until) && hit.until.Sub(now) <= c.TTL {
		return hit.files, nil
	}
	files, err := c.Source.RIMs(ctx, id)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.have == nil || len(c.have) >= maxCached {
		c.have = map[string]cached{}
	}
	c.have[id] = cached{files, now.Add(c.TTL)}
	return files, nil
}
