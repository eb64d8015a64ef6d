package gpus

// RoundWaits reports whether a round waits for the answer to somebody else.
func (g *Guard) RoundWaits() bool {
	if g.asking.TryRLock() {
		g.asking.RUnlock()
		return false
	}
	return true
}
