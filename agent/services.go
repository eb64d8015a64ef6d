package agent

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"coffer/agent/api"
	"coffer/agent/certs"
	"coffer/agent/nfs"
	"coffer/agent/profile"
	"coffer/internal/evidence"
	"coffer/internal/snp"
)

// socketName is the API's, in the container's /host/run.
const socketName = "coffer.sock"

// certFolder is where a user's drives may hold chip certificates.
const certFolder = "amd_certs"

// Times of the search for the chip's own certificate.
const (
	chipTime  = 20 * time.Second // in all
	chipTry   = 5 * time.Second  // of one report
	chipTries = 3
)

// services is what the agent serves to the workload.
type services struct {
	api   *api.Server
	store *certs.Store // valid once known is closed; nil: no chip
	known chan struct{}
	chip  chan struct{} // closed when the chip's own certificate was found, or given up
	certs string        // folder for the workload's copies; "": none wanted

	cancelNFS context.CancelFunc
}

func (a *agent) hostDir() string { return filepath.Join(a.Paths.Run, "coffer", "host") }

// serve opens the API and begins to look for the chip's certificate.
func (a *agent) serve(context.Context) error {
	s := &services{known: make(chan struct{}), chip: make(chan struct{})}
	a.services = s
	s.api = api.New(api.Config{
		Guest: a.cfg, LaunchDigest: a.handover.LaunchDigest, Source: a.verifier.source, KBS: a.verifier,
		Chips: func() api.Chips {
			<-s.known // within chipTries*chipTry
			if s.store == nil {
				return nil
			}
			return s.store
		},
		Now: a.Now, Wall: time.Now,
	})
	if err := os.MkdirAll(a.hostDir(), 0o755); err != nil {
		return err
	}
	unix, err := net.Listen("unix", filepath.Join(a.hostDir(), socketName))
	if err != nil {
		return fmt.Errorf("the workload's API: %w", err)
	}
	// Whichever user the container has.
	if err := os.Chmod(filepath.Join(a.hostDir(), socketName), 0o666); err != nil {
		return err
	}
	go s.api.Serve(unix, s.api.Handler())
	if port := a.cfg.API.LoopbackPort; port != 0 {
		tcp, err := net.Listen("tcp4", netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port).String())
		if err != nil {
			return fmt.Errorf("the workload's API: %w", err)
		}
		go s.api.Serve(tcp, s.api.Loopback())
	}
	if p := a.cfg.Workload.Profile; p.Certs != "" {
		if s.certs, err = profile.Folder(a.writable(), p.Certs); err != nil {
			return err
		}
	}
	go a.findChip()
	return a.keepNFS()
}

// keepNFS mounts the export that the site names, where the guest config lets it:
// by letting port 2049 be connected to. A bad file is no reason not to start.
func (a *agent) keepNFS() error {
	export, err := nfs.Read(a.Paths.UserData)
	switch {
	case err != nil:
		a.log.Printf("coffer: user_data/%s is not used: %v", nfs.File, err)
		return nil
	case export == nil:
		return nil
	case !a.cfg.NFS():
		a.log.Printf("coffer: user_data/%s is not used: %d is not in allowed_out_ports", nfs.File, nfs.Port)
		return nil
	}
	if err := a.Share(a.Paths.UserData); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	k := &nfs.Keeper{Export: *export, Drive: a.Paths.UserData, Lookup: a.Lookup, Sys: a.NFS,
		Printf: func(format string, args ...any) { a.log.Printf("coffer: "+format, args...) }}
	a.nfsDone, a.services.cancelNFS = done, cancel
	go func() {
		defer close(done)
		k.Run(ctx)
	}()
	return nil
}

// stopNFS lets the export go; a server that is away holds up nothing.
func (a *agent) stopNFS() {
	if a.nfsDone == nil {
		return
	}
	a.services.cancelNFS()
	within(unmountTime, func() { <-a.nfsDone })
}

// findChip makes the chip's certificate known before the workload asks for it.
// What it cannot find is no failure: the KBS has judged the chip.
func (a *agent) findChip() {
	s := a.services
	defer close(s.chip)
	source := a.verifier.source
	if source.TEE() != evidence.TEESNP {
		close(s.known)
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), chipTime)
	defer cancel()
	report, fromHost, err := chipReport(ctx, source)
	s.store = certs.New(certs.Config{
		Cache:   filepath.Join(a.Paths.Scratch, "certs"),
		Folders: []string{filepath.Join(a.configSource, certFolder), filepath.Join(a.Paths.UserData, certFolder)},
		KDS:     a.cfg.API.KDS, Roots: certs.TrustedRoots(fromHost), Now: time.Now,
	})
	close(s.known)
	if err != nil {
		a.log.Printf("coffer: no report at VMPL 1 for the workload: %v", err)
		return
	}
	var der []byte
	from := "host"
	if err = s.store.Add(report, fromHost); err != nil {
		der, from, err = s.store.VCEK(ctx, report)
	} else {
		der, _, err = s.store.VCEK(ctx, report)
	}
	if err != nil {
		a.log.Printf("coffer: no certificate of this chip for the workload: %v", err)
	} else {
		a.log.Printf("coffer: certificate of this chip from=%s", strconv.Quote(from))
	}
	if s.certs != "" {
		if err := s.fillCerts(report, der); err != nil {
			a.log.Printf("coffer: the workload's AMD certificates: %v", err)
		}
	}
}

// chipReport asks for a report as the workload may.
func chipReport(ctx context.Context, source evidence.Source) (r *snp.Report, fromHost []snp.Cert, err error) {
	for range chipTries {
		try, cancel := context.WithTimeout(ctx, chipTry)
		var report, table []byte
		report, table, err = source.Report(try, [64]byte{}, 1)
		cancel()
		if err == nil {
			fromHost, _ = snp.ParseCertTable(table) // the host's: it may be anything
			r, err = snp.ParseReport(report)
			return r, fromHost, err
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil, nil, err
		}
	}
	return nil, nil, err
}

// fillCerts puts ark.pem, ask.pem and vcek.pem where the profile wants them.
func (s *services) fillCerts(r *snp.Report, vcek []byte) error {
	product, err := r.Product()
	if err != nil {
		return err
	}
	files := map[string][]byte{"vcek.pem": vcek}
	for _, root := range s.store.Roots() { // a simulated chip's stand first
		if root.Product == product && root.ASK != nil {
			files["ark.pem"], files["ask.pem"] = root.ARK.Raw, root.ASK.Raw
			break
		}
	}
	var errs []error
	for name, der := range files {
		if der == nil {
			continue
		}
		path := filepath.Join(s.certs, name)
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		errs = append(errs, os.WriteFile(path, text, 0o666), os.Chmod(path, 0o666))
	}
	return errors.Join(errs...)
}

// awaitChip gives the search for the chip's certificate its time.
func (a *agent) awaitChip(ctx context.Context) {
	select {
	case <-a.services.chip:
	case <-ctx.Done():
	}
}
