package gpu_test

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"coffer/internal/gpu"
	"coffer/internal/gpu/ocsp"
	"coffer/internal/gpu/rim"
	"coffer/internal/gpu/spdm"
	"coffer/test/gpusim"
)

var nonce = [32]byte{1, 2, 3, 31: 32}

// scene is a device, what vouches for it, and who judges it.
type scene struct {
	world     *gpusim.World
	device    *gpusim.Device
	report    *gpusim.Report
	evidence  gpu.Evidence
	driver    *gpusim.RIM // as it will be signed
	vbios     *gpusim.RIM
	rims      gpusim.RIMs
	responder *gpusim.Responder
	verifier  *gpu.Verifier
}

func newScene(t testing.TB, arch string) *scene {
	t.Helper()
	s := &scene{world: gpusim.NewWorld()}
	s.device = s.world.NewDevice(arch)
	s.report = s.device.NewReport(nonce)
	s.vbios = s.device.VBIOSRIM()
	if arch != gpu.LS10 {
		s.driver = s.device.DriverRIM()
	}
	s.rims = gpusim.RIMs{}
	s.responder = s.world.NewResponder(s.device)
	server := httptest.NewServer(s.responder)
	t.Cleanup(server.Close)
	s.verifier = &gpu.Verifier{
		DeviceRoot: s.world.DeviceRoot.Cert, RIMRoot: s.world.RIMRoot.Cert, RIMs: s.rims,
		OCSP:   &ocsp.Client{URL: server.URL, HTTP: server.Client(), Now: now, Rand: rand.Reader},
		Policy: gpu.Policy{OCSP: gpu.OCSPRequire}, Now: now,
	}
	return s
}

func now() time.Time { return gpusim.Now }

// sign makes report and RIMs of what stands in the scene.
func (s *scene) sign() {
	s.evidence = s.device.Evidence(nonce)
	s.evidence.Report = s.report.Sign(s.device.Chain[0].Key)
	for _, m := range []*gpusim.RIM{s.driver, s.vbios} {
		if m != nil && len(s.rims[m.ID]) == 0 {
			s.rims.Add(s.world.RIMChain, m)
		}
	}
}

func (s *scene) verify() (*gpu.Result, error) {
	s.sign()
	return s.verifier.Verify(context.Background(), s.evidence, nonce)
}

func TestAccepted(t *testing.T) {
	for _, arch := range []string{gpu.Hopper, gpu.Blackwell, gpu.LS10} {
		t.Run(arch, func(t *testing.T) {
			s := newScene(t, arch)
			r, err := s.verify()
			if err != nil {
				t.Fatal(err)
			}
			leaf := s.device.Chain[0].Cert
			if !r.Verified || r.Arch != arch || r.Serial != leaf.SerialNumber.String() || r.Driver != s.device.Driver || r.VBIOS != s.device.VBIOS || len(r.Mismatches) > 0 {
				t.Errorf("result %+v", r)
			}
			claims := r.Claims()
			for name, value := range claims {
				if value == false {
					t.Errorf("claim %s is false", name)
				}
			}
			if claims["measres"] != "success" || claims["secboot"] != true || claims["dbgstat"] != "disabled" || claims["ueid"] != r.Serial {
				t.Errorf("claims %v", claims)
			}
			if _, err := json.Marshal(claims); err != nil {
				t.Error(err)
			}
			// Three certificates of the device, three of each RIM.
			questions := 9
			if arch == gpu.LS10 {
				questions = 6
			}
			if s.responder.Asked() != questions {
				t.Errorf("the responder was asked %d times, want %d", s.responder.Asked(), questions)
			}
		})
	}
}

// TestMutations has one defect a row, and the code that it must be refused with.
func TestMutations(t *testing.T) {
	reissue := func(s *scene, at int, edit func(*x509.Certificate)) {
		old := s.device.Chain[at].Cert
		s.device.Chain[at] = s.device.Chain[at+1].Issue(old.Subject.CommonName, old.IsCA, gpusim.Forever, func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{s.device.FWIDExtension()}
			edit(c)
		})
	}
	rename := func(s *scene, name string) {
		reissue(s, 0, func(c *x509.Certificate) { c.Subject.CommonName = name })
	}
	entry := func(m *gpusim.RIM, index int) *rim.Entry { return &m.Entries[index] }
	replace := func(old, new string) func(string) string {
		return func(xml string) string { return strings.Replace(xml, old, new, 1) }
	}
	signedEdit := func(old, new string) func(*scene) {
		return func(s *scene) {
			s.sign()
			data := s.rims[s.driver.ID][0]
			s.rims[s.driver.ID][0] = []byte(strings.Replace(string(data), old, new, 1))
		}
	}
	reason := func(chain func(*scene) []*gpusim.Authority, at, reason int) func(*scene) {
		return func(s *scene) {
			s.responder.Reasons = map[string]int{chain(s)[at].Cert.SerialNumber.String(): reason}
		}
	}
	deviceChain := func(s *scene) []*gpusim.Authority { return s.device.Chain }
	rimChain := func(s *scene) []*gpusim.Authority { return s.world.RIMChain }

	for _, m := range []struct {
		name string
		code gpu.Code
		do   func(*scene)
	}{
		{"old SPDM version", "report-format", func(s *scene) { s.report.Request[0] = 0x12 }},
		{"other request", "report-format", func(s *scene) { s.report.Request[1] = 0xE1 }},
		{"no signature asked for", "report-request", func(s *scene) { s.report.Request[2] = 0 }},
		{"one measurement asked for", "report-request", func(s *scene) { s.report.Request[3] = 1 }},
		{"other slot", "report-request", func(s *scene) { s.report.Request[36] = 1 }},
		{"other response", "report-format", func(s *scene) { s.report.Header[1] = 0x61 }},
		{"two bytes after the signature", "report-format", func(s *scene) { s.report.Tail = []byte{0, 0} }},
		{"a byte after the signature", "report-format", func(s *scene) { s.report.Tail = []byte{1} }},
		{"block twice", "report-format", func(s *scene) { s.report.Blocks[3][0] = 3 }},
		{"raw measurement", "report-format", func(s *scene) { s.report.Blocks[3][4] = 0x81 }},
		{"other measurement specification", "report-format", func(s *scene) { s.report.Blocks[3][1] = 2 }},
		{"field twice", "report-format", func(s *scene) { s.report.Opaque = append(s.report.Opaque, s.report.Opaque[0]) }},
		{"newer opaque data", "report-format", func(s *scene) { s.report.Set(spdm.OpaqueVersion, []byte{2, 0}) }},
		{"driver version with a slash", "report-format", func(s *scene) { s.report.Set(spdm.DriverVersion, []byte("../../x\x00")) }},
		{"no driver version", "report-format", func(s *scene) { s.report.Set(spdm.DriverVersion, nil) }},
		{"no VBIOS version", "report-format", func(s *scene) { s.report.Set(spdm.VBIOSVersion, nil) }},
		{"no board", "report-format", func(s *scene) { s.report.Set(spdm.Project, nil) }},
		{"feature flag of 3 bytes", "report-format", func(s *scene) { s.report.Set(spdm.FeatureFlag, []byte{0, 0, 0}) }},
		{"other nonce", "report-nonce", func(s *scene) { s.report.Request[4]++ }},

		{"no chain", "chain-structure", func(s *scene) { s.device.Chain = nil }},
		{"only the root", "chain-structure", func(s *scene) { s.device.Chain = s.device.Chain[4:] }},
		{"no attestation key", "chain-structure", func(s *scene) { s.device.Chain = s.device.Chain[1:] }},
		{"a certificate left out", "chain-structure", func(s *scene) { s.device.Chain = append(s.device.Chain[:2:2], s.device.Chain[3:]...) }},
		{"six certificates", "chain-structure", func(s *scene) { s.device.Chain = append(s.device.Chain, s.device.Chain[4]) }},
		{"two certificates swapped", "chain-signature", func(s *scene) {
			s.device.Chain[1], s.device.Chain[2] = s.device.Chain[2], s.device.Chain[1]
		}},
		{"a CA as attestation key", "chain-structure", func(s *scene) {
			reissue(s, 0, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign })
		}},
		{"attestation key not for signing", "chain-structure", func(s *scene) {
			reissue(s, 0, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement })
		}},
		{"identity is no CA", "chain-structure", func(s *scene) {
			s.device.Chain[1] = s.device.Chain[2].Issue(s.device.Chain[1].Cert.Subject.CommonName, false, gpusim.Forever, nil)
			reissue(s, 0, func(*x509.Certificate) {})
		}},
		{"path length exceeded", "chain-structure", func(s *scene) {
			reissue(s, 3, func(c *x509.Certificate) { c.MaxPathLen = 1 })
			reissue(s, 2, func(*x509.Certificate) {})
			reissue(s, 1, func(*x509.Certificate) {})
			reissue(s, 0, func(*x509.Certificate) {})
		}},
		{"unknown critical extension", "chain-structure", func(s *scene) {
			reissue(s, 0, func(c *x509.Certificate) {
				c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}})
			})
		}},
		{"other root", "chain-root", func(s *scene) { s.device.Chain = gpusim.NewWorld().NewDevice(gpu.Hopper).Chain }},
		{"other root's certificate left out", "chain-signature", func(s *scene) {
			other := gpusim.NewWorld().NewDevice(gpu.Hopper)
			s.device.Chain = append(other.Chain[:4:4], s.device.Chain[4])
		}},
		{"key issued by another of the same name", "chain-signature", func(s *scene) {
			other := s.world.NewDevice(gpu.Hopper)
			s.device.Chain[0] = other.Chain[0]
		}},
		{"expired", "chain-time", func(s *scene) {
			reissue(s, 0, func(c *x509.Certificate) { c.NotAfter = gpusim.Now.Add(-time.Second) })
		}},
		{"not yet valid", "chain-time", func(s *scene) {
			reissue(s, 0, func(c *x509.Certificate) { c.NotBefore = gpusim.Now.Add(time.Second) })
		}},
		{"no FWID extension", "chain-structure", func(s *scene) {
			reissue(s, 0, func(c *x509.Certificate) { c.ExtraExtensions = nil })
		}},
		{"malformed FWID extension", "chain-structure", func(s *scene) {
			reissue(s, 0, func(c *x509.Certificate) { c.ExtraExtensions[0].Value = []byte{0x30, 0x03, 2, 1, 1} })
		}},

		{"unknown chip", "arch", func(s *scene) { rename(s, "AD102 A01 GSP FMC LF") }},
		{"NVML names another architecture", "arch", func(s *scene) { s.device.Arch = gpu.Blackwell }},
		{"architecture not allowed", "arch", func(s *scene) { s.verifier.Policy.Archs = []string{gpu.Blackwell} }},
		{"no FWID", "fwid-missing", func(s *scene) { s.report.Set(spdm.FWID, nil) }},
		{"other FWID", "fwid-mismatch", func(s *scene) { s.report.Set(spdm.FWID, make([]byte, 48)) }},
		{"short FWID", "fwid-mismatch", func(s *scene) { s.report.Set(spdm.FWID, s.device.FWID[:47]) }},

		{"responder refuses", "ocsp-unreachable", func(s *scene) { s.responder.Refuse = 3 }},
		{"responder is not there", "ocsp-unreachable", func(s *scene) { s.verifier.OCSP.URL = "http://127.0.0.1:1/" }},
		{"responder says nothing sensible", "ocsp-format", func(s *scene) { s.verifier.OCSP = answering(s, []byte("<html>")) }},
		{"OCSP answer without nonce", "ocsp-nonce", func(s *scene) { s.responder.NoNonce = true }},
		{"OCSP answer with another nonce", "ocsp-nonce", func(s *scene) { s.responder.Nonce = []byte{4, 1, 7} }},
		{"OCSP answer of yesterday", "ocsp-stale", func(s *scene) { s.responder.Now = gpusim.Now.Add(-24 * time.Hour) }},
		{"OCSP answer of tomorrow", "ocsp-stale", func(s *scene) { s.responder.Now = gpusim.Now.Add(24 * time.Hour) }},
		{"OCSP signature of another key", "ocsp-responder", func(s *scene) { s.responder.OtherKey = s.world.DeviceRoot.OCSPSigner() }},
		{"OCSP signer without certificate", "ocsp-responder", func(s *scene) { s.responder.Bare = true }},
		{"OCSP signer of another root", "ocsp-responder", func(s *scene) { s.responder.For(s.device.Chain, gpusim.NewRoot("x").OCSPSigner()) }},
		{"OCSP signer not meant for it", "ocsp-responder", func(s *scene) {
			s.responder.For(s.device.Chain, s.world.DeviceRoot.Issue("x", false, gpusim.Forever, nil))
		}},
		{"OCSP signer expired", "ocsp-responder", func(s *scene) {
			s.responder.For(s.device.Chain, s.world.DeviceRoot.Issue("x", false, gpusim.Now.Add(-time.Hour), func(c *x509.Certificate) {
				c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning}
			}))
		}},
		{"OCSP signer issued by the device in question", "ocsp-responder", func(s *scene) {
			s.responder.For(s.device.Chain, s.device.Chain[1].OCSPSigner())
		}},
		{"identity revoked", "ocsp-revoked", reason(deviceChain, 1, 1)},
		{"provisioner revoked", "ocsp-revoked", reason(deviceChain, 2, 0)},
		{"family on hold", "ocsp-hold", reason(deviceChain, 3, 6)},
		{"identity unknown", "ocsp-unknown", reason(deviceChain, 1, -1)},
		{"no OCSP mode", "internal", func(s *scene) { s.verifier.Policy.OCSP = "" }},

		{"signed by the identity key", "report-signature", func(s *scene) {
			s.sign()
			s.evidence.Report = s.report.Sign(s.device.Chain[1].Key)
		}},
		{"signature of zeros", "report-signature", func(s *scene) {
			s.sign()
			clear(s.evidence.Report[len(s.evidence.Report)-96:])
		}},
		{"NVML names another driver", "driver-version", func(s *scene) { s.device.Driver = "1.2" }},
		{"NVML names another VBIOS", "vbios-version", func(s *scene) { s.device.VBIOS = "1.2" }},
		{"driver not listed", "driver-not-allowed", func(s *scene) { s.verifier.Policy.Drivers = []string{"1.2"} }},
		{"driver too old", "driver-not-allowed", func(s *scene) { s.verifier.Policy.MinDriver = "570.124.07" }},
		{"driver too new", "driver-not-allowed", func(s *scene) { s.verifier.Policy.MaxDriver = "570.124" }},
		{"minimum that is no version", "driver-not-allowed", func(s *scene) { s.verifier.Policy.MinDriver = "any" }},
		{"VBIOS not listed", "vbios-not-allowed", func(s *scene) { s.verifier.Policy.VBIOSes = []string{"1.2"} }},
		{"protected PCIe", "report-mode", func(s *scene) { s.report.Set(spdm.PPCIEStatus, []byte{spdm.Enabled}) }},
		{"protected PCIe by its flag", "report-mode", func(s *scene) { s.report.Set(spdm.FeatureFlag, []byte{2, 0}) }},
		{"unknown mode", "report-mode", func(s *scene) { s.report.Set(spdm.FeatureFlag, []byte{3, 0}) }},

		{"no driver RIM", "driver-rim-missing", func(s *scene) { s.driver.ID = "NV_GPU_DRIVER_GH100_1.2" }},
		{"no VBIOS RIM", "vbios-rim-missing", func(s *scene) { s.vbios.ID = "NV_GPU_VBIOS_X" }},
		{"RIMs cannot be fetched", "driver-rim-fetch", func(s *scene) {
			s.verifier.RIMs = rim.Service{URL: "http://127.0.0.1:1", Client: http.DefaultClient}
		}},
		{"RIM is not XML", "driver-rim-format", signedEdit("<SoftwareIdentity", "SoftwareIdentity")},
		{"RIM with a comment", "driver-rim-format", signedEdit("<Payload>", "<Payload><!-- x -->")},
		{"RIM with a DOCTYPE", "driver-rim-format", signedEdit("<SoftwareIdentity", "<!DOCTYPE x><SoftwareIdentity")},
		{"RIM with two payloads", "driver-rim-format", func(s *scene) { s.driver.Edit = replace("</Payload>", "</Payload><Payload></Payload>") }},
		{"RIM that is a patch", "driver-rim-format", func(s *scene) { s.driver.Edit = replace(`patch="false"`, `patch="true"`) }},
		{"RIM with an index twice", "driver-rim-format", func(s *scene) { entry(s.driver, 21).Index = 22 }},
		{"RIM neither active nor not", "driver-rim-format", func(s *scene) { s.driver.Edit = replace(`active="True"`, `active="true"`) }},
		{"RIM with a hidden alternative", "driver-rim-format", func(s *scene) { s.driver.Edit = replace(`alternatives="2"`, `alternatives="1"`) }},
		{"RIM with other algorithms", "driver-rim-format", signedEdit("xmldsig-more#ecdsa-sha384", "xmldsig-more#ecdsa-sha256")},
		{"RIM signed in part", "driver-rim-format", signedEdit(`URI=""`, `URI="#x"`)},
		{"RIM of another chip", "driver-rim-product", func(s *scene) { s.driver.Product = "GB100" }},
		{"RIM of another edition", "driver-rim-product", func(s *scene) { s.driver.Edition = "SWITCH" }},
		{"RIM of another version", "driver-rim-version", func(s *scene) { s.driver.Version = "570.124.07" }},
		{"VBIOS RIM in the driver's place", "driver-rim-version", func(s *scene) { s.vbios.ID, s.driver.ID = s.driver.ID, s.vbios.ID }},
		{"RIM's value edited", "driver-rim-digest", signedEdit(`active="True" alternatives="1"`, `active="False" alternatives="1"`)},
		{"RIM's white space edited", "driver-rim-digest", signedEdit("<Payload>\n", "<Payload>")},
		{"RIM's digest edited", "driver-rim-signature", func(s *scene) {
			s.sign()
			// Content and digest agree, but the signature is that of the other content.
			data, other := string(s.rims[s.driver.ID][0]), *s.driver
			other.Edit = replace(`active="True"`, `active="False"`)
			edited := string(other.Sign(s.world.RIMChain))
			value := func(xml string) string {
				_, rest, _ := strings.Cut(xml, "<ds:SignatureValue>")
				v, _, _ := strings.Cut(rest, "<")
				return v
			}
			s.rims[s.driver.ID][0] = []byte(strings.Replace(edited, value(edited), value(data), 1))
		}},
		{"RIM of another root", "driver-rim-chain", func(s *scene) { s.rims.Add(gpusim.NewWorld().RIMChain, s.driver) }},
		{"RIM signed by a device", "driver-rim-chain", func(s *scene) { s.rims.Add(s.device.Chain, s.driver) }},
		{"RIM signed by a CA", "driver-rim-chain", func(s *scene) { s.rims.Add(s.world.RIMChain[1:], s.driver) }},
		{"RIM's signer expired", "driver-rim-expired", func(s *scene) {
			s.verifier.Now = func() time.Time { return gpusim.RIMEnd.Add(time.Second) }
			s.verifier.Policy.OCSP = gpu.OCSPOff
		}},
		{"RIM's signer expired, allowed, but not pinned", "driver-rim-expired", func(s *scene) {
			s.verifier.Now = func() time.Time { return gpusim.RIMEnd.Add(time.Second) }
			s.verifier.Policy.OCSP, s.verifier.Policy.AllowExpiredRIM = gpu.OCSPOff, true
		}},
		{"RIM's signer revoked", "driver-rim-ocsp-revoked", reason(rimChain, 0, 1)},
		{"RIM's signer on hold", "driver-rim-ocsp-hold", reason(rimChain, 0, 6)},
		{"RIM's CA unknown", "driver-rim-ocsp-unknown", reason(rimChain, 2, -1)},
		{"nearly empty driver RIM", "driver-rim-floor", func(s *scene) {
			for i := 22; i <= 40; i++ {
				entry(s.driver, i).Active = false
			}
		}},
		{"nearly empty VBIOS RIM", "vbios-rim-floor", func(s *scene) { entry(s.vbios, 12).Active = false }},
		{"NVDEC0 neither on nor off", "nvdec-status", func(s *scene) { s.report.Set(spdm.NVDEC0Status, []byte{0}) }},
		{"NVDEC0 not told", "nvdec-status", func(s *scene) { s.report.Set(spdm.NVDEC0Status, nil) }},
		{"both RIMs set an index", "rim-index-conflict", func(s *scene) { entry(s.vbios, 21).Active = true }},
		{"a measurement differs", "measurement-mismatch", func(s *scene) { s.report.Blocks[21][7]++ }},
		{"measurement 35 differs with NVDEC0 on", "measurement-mismatch", func(s *scene) {
			s.report.Set(spdm.NVDEC0Status, []byte{spdm.Enabled})
			s.report.Blocks[35][7]++
		}},
		{"a measurement is missing", "measurement-mismatch", func(s *scene) { s.report.Blocks = s.report.Blocks[:40] }},
	} {
		t.Run(m.name, func(t *testing.T) {
			s := newScene(t, gpu.Hopper)
			m.do(s)
			if s.evidence.Report == nil {
				keep := *s.device
				if len(s.device.Chain) == 0 {
					s.device.Chain = s.world.NewDevice(gpu.Hopper).Chain
				}
				s.sign()
				s.evidence.Chain = gpusim.PEM(keep.Chain)
			}
			r, err := s.verifier.Verify(context.Background(), s.evidence, nonce)
			if got := gpu.CodeOf(err); got != m.code {
				t.Fatalf("code %q, want %q: %v", got, m.code, err)
			}
			if r.Verified || r.Claims()["measres"] == "success" || r.Claims()["secboot"] != nil {
				t.Error("the result says that the device is verified")
			}
			var typed *gpu.Error
			if !errors.As(err, &typed) || !strings.Contains(err.Error(), string(m.code)) {
				t.Errorf("the error does not tell its code: %v", err)
			}
		})
	}
}

// answering returns a client whose responder always gives the same answer.
func answering(s *scene, answer []byte) *ocsp.Client {
	c := *s.verifier.OCSP
	c.HTTP = &http.Client{Transport: roundTrip(func(*http.Request) (*http.Response, error) {
		w := httptest.NewRecorder()
		w.Write(answer)
		return w.Result(), nil
	})}
	return &c
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestAllowed has what is refused by default and can be allowed.
func TestAllowed(t *testing.T) {
	for _, m := range []struct {
		name string
		do   func(*scene)
	}{
		{"padded report", func(s *scene) { s.report.Tail = []byte{0} }},
		{"missing FWID", func(s *scene) {
			s.report.Set(spdm.FWID, nil)
			s.verifier.Policy.AllowMissingFWID = true
		}},
		{"hold", func(s *scene) {
			s.responder.Reasons = map[string]int{s.device.Chain[1].Cert.SerialNumber.String(): 6}
			s.verifier.Policy.AllowHold = true
		}},
		{"protected PCIe", func(s *scene) {
			s.report.Set(spdm.PPCIEStatus, []byte{spdm.Enabled})
			s.verifier.Policy.AllowPPCIE = true
		}},
		{"no OCSP", func(s *scene) { s.verifier.Policy.OCSP, s.verifier.OCSP = gpu.OCSPOff, nil }},
		{"driver in the limits", func(s *scene) {
			s.verifier.Policy.MinDriver, s.verifier.Policy.MaxDriver = "570.9", s.device.Driver
			s.verifier.Policy.Drivers, s.verifier.Policy.VBIOSes = []string{s.device.Driver}, []string{strings.ToLower(s.device.VBIOS)}
		}},
		{"issuer signs OCSP answers itself", func(s *scene) {
			for i := range 4 {
				s.responder.For(s.device.Chain[i:i+2], s.device.Chain[i+1])
			}
			for i := range 3 {
				s.responder.For(s.world.RIMChain[i:i+2], s.world.RIMChain[i+1])
			}
			s.responder.Bare = true
		}},
		{"measurement 35 differs with NVDEC0 off", func(s *scene) { s.report.Blocks[35][7]++ }},
		{"measurement that no RIM names differs", func(s *scene) { s.report.Blocks[60][7]++ }},
		{"stale RIM beside a good one", func(s *scene) {
			stale := s.device.VBIOSRIM()
			stale.Entries[9].Values = [][]byte{make([]byte, 48)}
			s.rims.Add(gpusim.NewWorld().RIMChain, s.driver)
			s.rims.Add(s.world.RIMChain, stale, s.driver, s.vbios)
		}},
		{"RIM not in canonical form", func(s *scene) {
			s.sign()
			data := string(s.rims[s.driver.ID][0])
			data = strings.ReplaceAll(data, "></Resource>", "/>")
			data = strings.ReplaceAll(data, `corpus="false" name=`, "name=")
			data = strings.Replace(data, `<SoftwareIdentity`, "<?xml version='1.0' encoding=\"utf-8\"?>\r\n<SoftwareIdentity  corpus = 'false'", 1)
			data = strings.ReplaceAll(data, "\n<Resource", "\r\n<Resource")
			data = strings.ReplaceAll(data, `tagVersion="0"`, `tagVersion="&#48;"`)
			s.rims[s.driver.ID][0] = []byte(data)
		}},
	} {
		t.Run(m.name, func(t *testing.T) {
			s := newScene(t, gpu.Hopper)
			m.do(s)
			if r, err := s.verify(); err != nil || !r.Verified {
				t.Error(err)
			}
		})
	}
}

// TestPinned pins an expired RIM by its digest.
func TestPinned(t *testing.T) {
	s := newScene(t, gpu.Hopper)
	s.verifier.Policy.OCSP, s.verifier.Policy.AllowExpiredRIM = gpu.OCSPOff, true
	s.verifier.Now = func() time.Time { return gpusim.RIMEnd.Add(time.Hour) }
	s.sign()
	dir := t.TempDir()
	if err := s.rims.Write(dir); err != nil {
		t.Fatal(err)
	}
	pins := []string{}
	for id := range s.rims {
		files, err := rim.Dir{Path: dir}.RIMs(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		pins = append(pins, files[0].SHA256)
	}
	s.verifier.RIMs = rim.Dir{Path: dir, Pins: pins}
	r, err := s.verifier.Verify(t.Context(), s.evidence, nonce)
	if err != nil || len(r.Warnings) != 2 || r.DriverRIM.Chain.Status != "expired" || r.Claims()["x-nvidia-attestation-warning"] == nil {
		t.Errorf("pinned: %v, warnings %v", err, r.Warnings)
	}
	s.verifier.RIMs = rim.Dir{Path: dir, Pins: pins[:1]}
	if _, err := s.verifier.Verify(t.Context(), s.evidence, nonce); !strings.HasSuffix(string(gpu.CodeOf(err)), "-rim-missing") {
		t.Errorf("one of two pinned: %v", err)
	}
	s.verifier.Policy.AllowExpiredRIM, s.verifier.RIMs = false, rim.Dir{Path: dir, Pins: pins}
	if _, err := s.verifier.Verify(t.Context(), s.evidence, nonce); gpu.CodeOf(err) != "driver-rim-expired" {
		t.Errorf("expired is not allowed: %v", err)
	}
}

// TestMismatches wants every index that differs, with its source.
func TestMismatches(t *testing.T) {
	s := newScene(t, gpu.Hopper)
	for _, i := range []int{3, 9, 21, 36} {
		s.report.Blocks[i][7]++
	}
	r, err := s.verify()
	if gpu.CodeOf(err) != gpu.CodeMeasurement {
		t.Fatal(err)
	}
	type found struct {
		index  int
		source gpu.Source
	}
	var got []found
	for _, m := range r.Mismatches {
		got = append(got, found{m.Index, m.Source})
		if m.GoldenSize != 48 || m.RuntimeSize != 48 || len(m.GoldenValue) != 96 || m.RuntimeValue == m.GoldenValue {
			t.Errorf("mismatch %+v", m)
		}
	}
	if want := []found{{21, "driver"}, {36, "driver"}, {3, "vbios"}, {9, "vbios"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("mismatches %v, want %v", got, want)
	}
	if text := err.Error(); !strings.Contains(text, "driver 21, 36") || !strings.Contains(text, "vbios 3, 9") || strings.Contains(text, "only index 9") {
		t.Error(text)
	}
	if list, _ := r.Claims()["x-nvidia-mismatch-measurement-records"].([]gpu.Mismatch); len(list) != 4 {
		t.Errorf("claim %v", r.Claims()["x-nvidia-mismatch-measurement-records"])
	}

	s = newScene(t, gpu.Hopper)
	s.report.Blocks[9][7]++
	if _, err = s.verify(); gpu.CodeOf(err) != gpu.CodeMeasurement || !strings.Contains(err.Error(), "only index 9") || !strings.Contains(err.Error(), "rim fetch") {
		t.Errorf("no hint: %v", err)
	}
}

func TestVerifyAll(t *testing.T) {
	s := newScene(t, gpu.Hopper)
	second := s.world.NewDevice(gpu.Hopper)
	second.Measurements = s.device.Measurements
	third := s.world.NewDevice(gpu.Blackwell)
	s.responder.For(second.Chain, s.world.DeviceRoot.OCSPSigner())
	s.responder.For(third.Chain, s.world.DeviceRoot.OCSPSigner())
	s.rims.Add(s.world.RIMChain, third.DriverRIM(), third.VBIOSRIM())
	s.sign()
	one, two, three := s.evidence, second.Evidence(nonce), third.Evidence(nonce)
	other := second.NewReport(nonce)
	other.Set(spdm.FeatureFlag, []byte{1, 0})
	nvlink := two
	nvlink.Report = other.Sign(second.Chain[0].Key)
	for _, m := range []struct {
		name  string
		count int
		list  []gpu.Evidence
		code  gpu.Code
		found int
	}{
		{"two", 0, []gpu.Evidence{one, two}, "", 2},
		{"two of two", 2, []gpu.Evidence{one, two}, "", 2},
		{"none", 0, nil, "device-count", 0},
		{"one of two", 2, []gpu.Evidence{one}, "device-count", 0},
		{"one twice", 2, []gpu.Evidence{one, one}, "device-duplicate", 2},
		{"two architectures", 0, []gpu.Evidence{one, three}, "device-mixed", 2},
		{"two modes", 0, []gpu.Evidence{one, nvlink}, "device-mixed", 2},
		{"the second is bad", 0, []gpu.Evidence{one, {Report: one.Report}}, "chain-structure", 2},
	} {
		t.Run(m.name, func(t *testing.T) {
			s.verifier.Policy.Count = m.count
			results, err := s.verifier.VerifyAll(t.Context(), m.list, nonce)
			if got := gpu.CodeOf(err); got != m.code || len(results) != m.found {
				t.Errorf("code %q, %d results, want %q and %d: %v", got, len(results), m.code, m.found, err)
			}
		})
	}
}

func TestSettings(t *testing.T) {
	good := gpu.Settings{CPU: 3, Environment: 2, Feature: 1}
	for _, m := range []struct {
		name   string
		code   gpu.Code
		policy gpu.Policy
		edit   func(*gpu.Settings)
	}{
		{"production", "", gpu.Policy{}, func(*gpu.Settings) {}},
		{"NVLink encryption", "", gpu.Policy{}, func(s *gpu.Settings) { s.MultiGPU = 2 }},
		{"off", "settings-cc-off", gpu.Policy{}, func(s *gpu.Settings) { s.Feature, s.Environment = 0, 0 }},
		{"simulation", "settings-environment", gpu.Policy{}, func(s *gpu.Settings) { s.Environment = 1 }},
		{"DevTools", "settings-devtools", gpu.Policy{}, func(s *gpu.Settings) { s.DevTools = 1 }},
		{"TDX", "settings-cpu", gpu.Policy{}, func(s *gpu.Settings) { s.CPU = 2 }},
		{"protected PCIe", "settings-ppcie", gpu.Policy{}, func(s *gpu.Settings) { s.MultiGPU, s.Feature = 1, 0 }},
		{"protected PCIe, allowed", "", gpu.Policy{AllowPPCIE: true}, func(s *gpu.Settings) { s.MultiGPU, s.Feature = 1, 0 }},
		{"protected PCIe, allowed, DevTools", "settings-devtools", gpu.Policy{AllowPPCIE: true}, func(s *gpu.Settings) { s.MultiGPU, s.DevTools = 1, 1 }},
		{"unknown mode", "settings-mode", gpu.Policy{}, func(s *gpu.Settings) { s.MultiGPU = 3 }},
	} {
		t.Run(m.name, func(t *testing.T) {
			s := good
			m.edit(&s)
			if got := gpu.CodeOf(m.policy.CheckSettings(s)); got != m.code {
				t.Errorf("code %q, want %q", got, m.code)
			}
		})
	}
}

// TestCachedOCSP asks once, and then lives on what it kept.
func TestCachedOCSP(t *testing.T) {
	s := newScene(t, gpu.Hopper)
	clock := gpusim.Now
	s.verifier.Now = func() time.Time { return clock }
	s.verifier.OCSP.Now = s.verifier.Now
	s.verifier.Policy.OCSP = gpu.OCSPAllowCached
	s.verifier.OCSP.Cache, s.verifier.OCSP.MaxAge = ocsp.Dir(t.TempDir()), 30*time.Minute
	first, err := s.verify()
	if err != nil {
		t.Fatal(err)
	}
	asked := s.responder.Asked()
	s.responder.Refuse = 3
	clock = clock.Add(29 * time.Minute)
	second, err := s.verify()
	if err != nil || s.responder.Asked() != asked || first.Chain.Cached || !second.Chain.Cached {
		t.Errorf("kept answers were not used: %v, asked %d times more", err, s.responder.Asked()-asked)
	}
	clock = clock.Add(2 * time.Minute)
	if _, err := s.verify(); gpu.CodeOf(err) != gpu.CodeOCSPUnreachable {
		t.Errorf("answers older than allowed were used: %v", err)
	}
	clock = gpusim.Now.Add(time.Minute)
	s.verifier.Policy.OCSP = gpu.OCSPRequire
	if _, err := s.verify(); gpu.CodeOf(err) != gpu.CodeOCSPUnreachable {
		t.Errorf("kept answers were used though each is to be asked for: %v", err)
	}
}

// TestOffline blocks the network: what a bundle carries, pinned RIMs and kept OCSP
// answers, is enough.
func TestOffline(t *testing.T) {
	s := newScene(t, gpu.Hopper)
	kept, dir := ocsp.Dir(t.TempDir()), t.TempDir()
	s.verifier.Policy.OCSP = gpu.OCSPAllowCached
	s.verifier.OCSP.Cache, s.verifier.OCSP.MaxAge = kept, time.Hour
	if _, err := s.verify(); err != nil {
		t.Fatal(err)
	}
	if err := s.rims.Write(dir); err != nil {
		t.Fatal(err)
	}
	var pins []string
	for id := range s.rims {
		files, err := rim.Dir{Path: dir}.RIMs(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		pins = append(pins, files[0].SHA256)
	}
	blocked := &http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
		t.Errorf("%s was asked", r.URL)
		return nil, errors.New("network is unreachable")
	})}
	v := &gpu.Verifier{
		DeviceRoot: s.verifier.DeviceRoot, RIMRoot: s.verifier.RIMRoot, Policy: s.verifier.Policy, Now: now,
		RIMs: rim.First{rim.Dir{Path: dir, Pins: pins}, rim.Service{URL: rim.ServiceURL, Client: blocked}},
		OCSP: &ocsp.Client{URL: ocsp.URL, HTTP: blocked, Now: now, Rand: rand.Reader, Cache: kept, MaxAge: time.Hour},
	}
	nonce := [32]byte{77}
	if r, err := v.Verify(t.Context(), s.device.Evidence(nonce), nonce); err != nil || !r.Chain.Cached {
		t.Error(err)
	}
}

// TestService verifies with RIMs from a service, asked once in a while.
func TestService(t *testing.T) {
	s := newScene(t, gpu.Hopper)
	s.sign()
	requests := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests++
		if r.Header.Get("Authorization") != "Bearer key" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		s.rims.ServeHTTP(w, r)
	}))
	defer server.Close()
	clock := gpusim.Now
	cache := &rim.Cache{Source: rim.Service{URL: server.URL + "/", Key: "key", Client: server.Client()}, TTL: time.Hour, Now: func() time.Time { return clock }}
	s.verifier.RIMs = rim.First{rim.Dir{Path: t.TempDir()}, cache}
	for _, step := range []struct {
		after time.Duration
		want  int
	}{{0, 2}, {59 * time.Minute, 2}, {2 * time.Minute, 4}} {
		clock = clock.Add(step.after)
		if _, err := s.verifier.Verify(t.Context(), s.evidence, nonce); err != nil || requests != step.want {
			t.Errorf("after %s: %d requests, want %d: %v", step.after, requests, step.want, err)
		}
	}
}

// BenchmarkVerify is one GPU in a round after the first, BenchmarkVerifyFirst one
// whose RIMs were not seen before.
func BenchmarkVerify(b *testing.B)      { benchmark(b, false) }
func BenchmarkVerifyFirst(b *testing.B) { benchmark(b, true) }

func benchmark(b *testing.B, first bool) {
	s := newScene(b, gpu.Hopper)
	s.verifier.Policy.OCSP = gpu.OCSPOff
	s.sign()
	begin := cpuTime(b)
	for b.Loop() {
		v := s.verifier
		if first {
			v = &gpu.Verifier{DeviceRoot: v.DeviceRoot, RIMRoot: v.RIMRoot, RIMs: v.RIMs, Policy: v.Policy, Now: v.Now}
		}
		if _, err := v.Verify(context.Background(), s.evidence, nonce); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((cpuTime(b)-begin).Microseconds())/1000/float64(b.N), "cpu-ms/op")
}

// cpuTime is this process's, which a busy machine does not change.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func BenchmarkVerify8(b *testing.B) {
	s := newScene(b, gpu.Hopper)
	s.verifier.Policy.OCSP = gpu.OCSPOff
	s.sign()
	var list []gpu.Evidence
	for range 8 {
		d := s.world.NewDevice(gpu.Hopper)
		d.Measurements = s.device.Measurements
		list = append(list, d.Evidence(nonce))
	}
	begin := cpuTime(b)
	for b.Loop() {
		if _, err := s.verifier.VerifyAll(context.Background(), list, nonce); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64((cpuTime(b)-begin).Microseconds())/1000/float64(b.N), "cpu-ms/op")
}

// TestFlips does to a made-up report what TestGoldenFlips does to a real one.
func TestFlips(t *testing.T) {
	s := newScene(t, gpu.LS10)
	s.verifier.Policy.OCSP = gpu.OCSPOff
	s.sign()
	noneAccepted(t, s.verifier, s.evidence, nonce)
}
