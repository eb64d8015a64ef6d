package rim

// Canonical returns the canonical form of a document.
func Canonical(data []byte) ([]byte, error) {
	root, err := parseXML(data)
	if err != nil {
		return nil, err
	}
	return root.canonical(nil), nil
}
