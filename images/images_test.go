package images_test

import (
	"slices"
	"testing"

	"coffer/images"
)

func TestCPU(t *testing.T) {
	image, err := images.Load("cpu")
	if err != nil {
		t.Fatal(err)
	}
	if image.Firmware.File == "" || image.CA.File == "" {
		t.Error("the firmware's or the certificates' place is missing")
	}
	for _, platform := range []string{"snp", "simulated"} {
		names := image.ModuleNames(platform, "")
		for _, name := range []string{"virtio_blk", "virtio_net", "dm_mod", "dm_crypt", "xts", "dm_verity", "erofs", "overlay", "tsm", "nf_tables"} {
			if !slices.Contains(names, name) {
				t.Errorf("%s: no %s", platform, name)
			}
		}
		// The host must not feed the random pool, and there must be no
		// cipher that does not encrypt.
		for _, name := range []string{"virtio_rng", "crypto_null"} {
			if slices.Contains(names, name) || slices.Contains(names, "-"+name) {
				t.Errorf("%s: %s", platform, name)
			}
		}
		if got := slices.Contains(names, "-sha256_ssse3"); got != (platform == "snp") {
			t.Errorf("%s: sha256_ssse3 is %v", platform, got)
		}
	}
}

func TestLoadKnowsNoOther(t *testing.T) {
	for _, name := range []string{"", "gpu", "../images/cpu", "cpu/"} {
		if _, err := images.Load(name); err == nil {
			t.Errorf("image %q was loaded", name)
		}
	}
}
