package kbs

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"path"
	"slices"
	"time"

	"coffer/internal/snp"
	"coffer/internal/snp/verify"
)

// reportVerifier trusts AMD's roots, and the simulated ones that o names.
func reportVerifier(o Options, d Dialect, st *store, now func() time.Time, log *slog.Logger) (verifyReport, error) {
	roots := verify.AMDRoots()
	if len(o.SimulatedRoots) != 0 {
		simulated, err := verify.LoadRoots(o.SimulatedRoots)
		if err != nil {
			return nil, fmt.Errorf("simulated roots: %w", err)
		}
		roots = append(roots, simulated...)
	}
	minimum := o.MinTCB
	if minimum == nil {
		minimum = verify.DefaultMinTCB()
	}
	highest := uint32(snp.MaxVersion)
	if d == DialectT {
		highest = 4 // Trustee's older verifier knows no more
	}
	mirror, err := newKDS(o.KDS, now)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, r *snp.Report, certs []snp.Cert, reportData [64]byte) (*verify.Result, error) {
		options := verify.Options{Roots: roots, Now: now(), ReportData: &reportData, MaxVersion: highest, MinTCB: minimum}
		if slices.ContainsFunc(certs, func(c snp.Cert) bool { return c.Type == snp.VCEK || c.Type == snp.VLEK }) {
			return verify.Verify(r, certs, options)
		}
		names := vcekNames(r)
		der, err := st.vcek(names...)
		fetched := mirror != nil && (errors.Is(err, errNoVCEK) || err == nil && ofOtherFirmware(der, r))
		if fetched {
			der, err = mirror.vcek(ctx, r)
		}
		if err != nil {
			return nil, err
		}
		res, err := verify.Verify(r, append(certs, snp.Cert{Type: snp.VCEK, Data: der}), options)
		if err == nil && fetched { // now it is known to be AMD's
			if err := st.write(path.Join(vcekDir, names[0]), der); err != nil {
				log.Warn("a VCEK was fetched and cannot be kept", "error", err)
			}
		}
		return res, err
	}, nil
}

// ofOtherFirmware tells whether a VCEK is the chip's, but of a time when it had
// another TCB: a vcek.der stays when firmware is updated.
func ofOtherFirmware(der []byte, r *snp.Report) bool {
	vcek, err := x509.ParseCertificate(der)
	if err != nil {
		return false
	}
	t, err := verify.CertTCB(vcek)
	if r.ReportedTCB.FMC == nil {
		t.FMC = nil
	}
	return err == nil && !t.Equal(r.ReportedTCB)
}

// vcekNames are the files under vcek/ in which a chip's certificate may stand,
// as in Trustee's offline store: <chip id>/bl02_tee00_snp06_ucode21_vcek.der, on
// Turin with _fmc00 before _vcek, or <chip id>/vcek.der. Turin's chip id counts
// eight bytes.
func vcekNames(r *snp.Report) []string {
	t := r.ReportedTCB
	id, fmc := r.ChipID[:], ""
	if t.FMC != nil {
		id, fmc = id[:8], fmt.Sprintf("_fmc%02d", *t.FMC)
	}
	dir := hex.EncodeToString(id)
	return []string{
		path.Join(dir, fmt.Sprintf("bl%02d_tee%02d_snp%02d_ucode%02d%s_vcek.der", t.Bootloader, t.TEE, t.SNP, t.Microcode, fmc)),
		path.Join(dir, "vcek.der"),
	}
}
