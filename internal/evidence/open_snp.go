//go:build !simulated

package evidence

import (
	"fmt"

	"coffer/internal/guestconfig"
)

// Platform is the one platform that this build gives evidence of.
const Platform = guestconfig.PlatformSNP

// Open returns the source of the platform. This build knows the SNP firmware only.
func Open(platform, tee string) (Source, error) {
	if platform != Platform || tee != TEESNP {
		return nil, fmt.Errorf("%w %q with tee %q: it is for platform %q", ErrPlatform, platform, tee, Platform)
	}
	s := newSource(TEESNP, false, newTSM(tsmDir).report)
	s.derive = deriveKey
	return s, nil
}
