package snpguest_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha512"
	"math/big"
	"slices"
	"testing"
)

// checkSigned checks a signature in the firmware ABI's form.
func checkSigned(t *testing.T, data, sig, key []byte) {
	t.Helper()
	number := func(b []byte) *big.Int {
		b = slices.Clone(b)
		slices.Reverse(b)
		return new(big.Int).SetBytes(b)
	}
	digest := sha512.Sum384(data)
	k := &ecdsa.PublicKey{Curve: elliptic.P384(), X: number(key[4:76]), Y: number(key[76:148])}
	if !ecdsa.Verify(k, digest[:], number(sig[:72]), number(sig[72:144])) {
		t.Error("a signature is wrong")
	}
}
